"""Replicas of a server on Ray Serve: who asks for a persona comes to where it is loaded, and one that dies is replaced.

The process that listens lets people in, and passes each request on. What had been told when a replica died is not told
again: another one says the same from the same seed.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import ray
from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter as Counts
from ray import serve
from ray.exceptions import RayActorError, RayError
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from deltaw.api.persona import Base
from deltaw.errors import explained
from deltaw.settings import Serving
from deltaw.web.answers import Refused
from deltaw.web.app import application, unless_gone
from deltaw.web.door import guarded, manages, tenant_of
from deltaw.web.forms import Gone, mistakes
from deltaw.web.keys import Tenant
from deltaw.web.metrics import measured
from deltaw.web.server import hub_of

GROUPS = 1024
"""Of personas, by their names: Ray keeps where each was, and of names, which anybody may make up, it forgets none."""
TOLD = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "root_path", "scheme", "state")
CHOICE = re.compile(rb'"index": \d+, "finish_reason": ')
"""Of which answer a chunk is; how those of one request follow each other, differs from one engine to another."""
ANSWERING = {"/v1/completions", "/v1/chat/completions"}


class Spent(Tenant):
    """Who asks, as a replica knows it: it was let in, and what it has is owed to who let it in.

    `again`: whether another one, which died, told what the prompt is.
    """

    def __init__(self, known: Tenant, owed: Counter[str], again: bool) -> None:
        super().__init__(known.name, known.rights)
        self.owed, self.again = owed, again

    def had(self, tokens: int, requests: int = 0) -> None:
        """Owe what it had."""
        if not (self.again and requests):
            self.owed[self.name] += tokens


class Replica:
    """One server of several, asked through Ray."""

    async def __init__(self, load: Callable[[], Base], folders: Sequence[Path], serving: Serving) -> None:  # type: ignore[misc]  # Ray awaits it
        self.stack, self.owed = AsyncExitStack(), Counter[str]()
        self.hub, shelf = self.stack.enter_context(hub_of(await asyncio.to_thread(load), folders, serving))
        self.app = application(self.hub, shelf, serving, guard=False)
        await self.stack.enter_async_context(self.app.router.lifespan_context(self.app))

    @serve.multiplexed(max_num_models_per_replica=GROUPS)  # type: ignore[untyped-decorator]  # Ray's
    async def known(self, group: str) -> str:
        """Let Ray know that who asks for a persona of this group is best sent here."""
        return group

    async def ask(self, scope: Scope, body: bytes, model: str, again: bool) -> AsyncIterator[tuple[int, Message]]:
        """What the server sends; before it, whether the persona was loaded.

        With each, the tokens that the tenant had meanwhile (of an answer that it left early: when it asks again).
        """
        entries = self.hub.catalog.wardrobe.entries
        entry = entries.get(model) or entries.get(_first(model))
        loaded = "no persona" if entry is None else str(entry.state == "ready").lower()
        who = scope["state"]["tenant"] = Spent(scope["state"]["tenant"], self.owed, again)
        yield self.owed.pop(who.name, 0), {"type": "from", "loaded": loaded}
        if entry is not None:
            await self.known(serve.get_multiplexed_model_id())
        received, sent = asyncio.Queue[Message](), asyncio.Queue[Message | None]()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        running = asyncio.create_task(self.app(scope, received.get, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield self.owed.pop(who.name, 0), message
            await running
        finally:
            received.put_nowait({"type": "http.disconnect"})

    async def check_health(self) -> None:
        """Ray begins another in the place of one that is not well."""
        if self.hub.service.status != "ok":
            raise RuntimeError(self.hub.service.status)


class Front:
    """What listens: it passes requests on to replicas, and counts where they went."""

    def __init__(self, replicas: Any, serving: Serving) -> None:
        self.replicas, self.serving, self.registry = replicas, serving, CollectorRegistry()
        self.routed = Counts("deltaw_routed", "Requests by whether their persona was loaded where they went.",
                              ["loaded"], registry=self.registry)  # fmt: skip
        self.again = Counts("deltaw_again", "Requests asked again, as a replica died.", registry=self.registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request be answered, until the answer is whole, or the client gone."""
        request = Request(scope, receive)
        with suppress(Gone, ClientDisconnect):
            await unless_gone(request, self.pass_on(scope, await request.body(), tenant_of(request), send))

    async def pass_on(self, scope: Scope, body: bytes, tenant: Tenant, send: Send) -> None:
        """Send what a replica answers; if it dies, what is missing of it, from another."""
        model, told, scope = "", Counter[bytes](), {name: scope[name] for name in TOLD if name in scope}
        if asks := scope["path"] in ANSWERING:
            tenant.ask()
            tenant.had(0, requests=1)  # at once, as others of it may ask before a replica says so
            model = _asked(body)
        group = str(crc32(_first(model).encode("utf-8", "replace")) % GROUPS) if model else ""
        for _ in range(3 + self.serving.replicas):  # as one that is dead may be asked once more
            stream = self.replicas.options(multiplexed_model_id=group, stream=True)
            answer, at = stream.ask.remote(scope, body, model, bool(told)), Counter[bytes]()
            try:
                async for tokens, message in answer:
                    tenant.had(tokens)
                    if message["type"] == "from":
                        self.routed.labels(message["loaded"]).inc()
                        continue
                    choice = (CHOICE.search(message.get("body", b"")) or [b""])[0]
                    at[choice] += 1
                    if at[choice] > told[choice]:
                        if asks and message.get("status", 0) >= 400:  # who is refused has not asked
                            tenant.had(0, requests=-1)
                        await send(message)
                        told[choice] += 1
                return
            except RayActorError:
                self.again.inc()
                await asyncio.sleep(0.1)
            finally:
                answer.cancel()
        raise Refused("Every replica that was asked has died.", 503)


def front(replicas: Any, serving: Serving) -> FastAPI:
    """The server that passes requests on.

    Raises:
        UserError: the file of keys cannot be read.
    """
    app, own = FastAPI(openapi_url=None), Front(replicas, serving)

    @app.get("/metrics/routing", dependencies=[Depends(manages)])
    async def metrics() -> Response:
        return measured(own.registry)

    app.router.routes.append(Route("/{path:path}", own))
    guarded(app, serving)
    mistakes(app)
    return app


@contextmanager
def replicas_of(load: Callable[[], Base], folders: Sequence[Path], serving: Serving) -> Iterator[Any]:
    """Replicas on this machine's processors, or on the cluster that RAY_ADDRESS names.

    Raises:
        UserError: they did not come up.
    """
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", **os.environ})
    there, name = os.environ.get("RAY_ADDRESS"), f"deltaw-{secrets.token_hex(4)}"  # others may be in one cluster
    options = {"num_cpus": (os.cpu_count() or 1) / serving.replicas}
    made = serve.deployment(num_replicas=serving.replicas, ray_actor_options=options,
                            max_ongoing_requests=10_000)  # fmt: skip  # which of them wait, its own engine says
    kinds, signals = (RayError, RuntimeError, ValueError, OSError), signal.getsignal(signal.SIGTERM)
    with ExitStack() as ends:
        with explained("The replicas did not come up.", *kinds, why=lambda e: str(e).partition("\n")[0]):
            ends.callback(ray.shutdown)
            ray.init(there or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, signals)  # Ray has one of its own, which leaves at once
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled")
            if there:  # else all of Ray ends with this process
                ends.callback(serve.delete, name)
            replicas = serve.run(made(Replica).bind(load, folders, serving), name=name, route_prefix=None)
        yield replicas


def _first(model: str) -> str:
    """The persona, or the first of a blend."""
    return model.partition("+")[0].partition(":")[0].strip()


def _asked(body: bytes) -> str:
    """The model that is asked for."""
    with suppress(ValueError, RecursionError):  # which a replica tells
        told = json.loads(body)
        if isinstance(told, dict) and isinstance(told.get("model"), str):
            return str(told["model"])
    return ""
