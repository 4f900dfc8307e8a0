"""Replicas of a server on Ray Serve: who asks for a persona comes to where it is loaded, and one that dies is replaced.

The process that listens lets people in, and passes each request on. What had been told when a replica died is not told
again: another one says the same from the same seed.
"""

import asyncio
import json
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter
from ray import serve
from ray.exceptions import RayActorError
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from deltaw.api.persona import Base
from deltaw.errors import explained
from deltaw.settings import Rights, Serving
from deltaw.web.answers import Refused
from deltaw.web.app import application, unless_gone
from deltaw.web.door import guarded, manages, tenant_of
from deltaw.web.forms import Gone, mistakes
from deltaw.web.keys import Tenant
from deltaw.web.metrics import measured
from deltaw.web.server import hub_of

MOST_KNOWN = 10_000
"""Personas that a replica is known to have had; which of them are in memory, its own budget says."""
TOLD = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "root_path", "scheme")
ANSWERING = {"/v1/completions", "/v1/chat/completions"}


class Spent(Tenant):
    """Who asks, as a replica knows it: it was let in, and what it has is told to who let it in."""

    def __init__(self, name: str, rights: Rights, tell: Callable[[Message], None]) -> None:
        super().__init__(name, rights)
        self.tell = tell

    def had(self, tokens: int, requests: int = 0) -> None:
        """Tell what it had."""
        self.tell({"type": "spent", "tokens": tokens, "requests": requests})


class Replica:
    """One server of several, asked through Ray."""

    async def __init__(self, load: Callable[[], Base], folders: Sequence[Path], serving: Serving) -> None:  # type: ignore[misc]  # Ray awaits it
        self.stack = AsyncExitStack()
        base = await asyncio.to_thread(load)
        self.hub, shelf = self.stack.enter_context(hub_of(base, folders, serving))
        self.app = application(self.hub, shelf, serving, guard=False)
        await self.stack.enter_async_context(self.app.router.lifespan_context(self.app))

    @serve.multiplexed(max_num_models_per_replica=MOST_KNOWN)  # type: ignore[untyped-decorator]  # Ray's
    async def known(self, persona: str) -> str:
        """Let Ray know that who asks for this persona is best sent here."""
        return persona

    async def ask(self, scope: Scope, body: bytes, name: str, rights: Rights) -> AsyncIterator[Message]:
        """What the server sends; before it, whether the persona was loaded, and between, what the tenant has."""
        persona = serve.get_multiplexed_model_id()
        entry = self.hub.catalog.wardrobe.entries.get(persona)
        yield {"type": "from", "loaded": "no persona" if entry is None else str(entry.state == "ready").lower()}
        if persona:
            await self.known(persona)
        received, sent = asyncio.Queue[Message](), asyncio.Queue[Message | None]()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        state = {"tenant": Spent(name, rights, sent.put_nowait)}
        running = asyncio.create_task(self.app({**scope, "state": state}, received.get, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
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
        self.routed = Counter("deltaw_routed", "Requests by whether their persona was loaded where they went.",
                              ["loaded"], registry=self.registry)  # fmt: skip
        self.again = Counter("deltaw_again", "Requests asked again, as a replica died.", registry=self.registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request be answered, until the answer is whole, or the client gone."""
        request = Request(scope, receive)
        with suppress(Gone, ClientDisconnect):
            tenant, persona, body = tenant_of(request), "", await request.body()
            if scope["path"] in ANSWERING:
                tenant.ask()
                persona, body = _asked(body)
            await unless_gone(request, self.pass_on(scope, body, tenant, persona, send))

    async def pass_on(self, scope: Scope, body: bytes, tenant: Tenant, persona: str, send: Send) -> None:
        """Send what a replica answers; if it dies, what is missing of it, from another."""
        told, charged, scope = 0, False, {name: scope[name] for name in TOLD if name in scope}
        for _ in range(3 + self.serving.replicas):  # as one that is dead may be asked once more
            stream = self.replicas.options(multiplexed_model_id=persona, stream=True)
            answer, at = stream.ask.remote(scope, body, tenant.name, tenant.rights), 0
            try:
                async for message in answer:
                    if message["type"] == "from":
                        self.routed.labels(message["loaded"]).inc()
                    elif message["type"] == "spent":
                        if not (charged and message["requests"]):  # by the one that died
                            tenant.had(message["tokens"], message["requests"])
                        charged = True
                    elif (at := at + 1) > told:
                        await send(message)
                        told += 1
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
    ends = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, ends)  # Ray has one of its own, which leaves at once
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    options = {"num_cpus": (os.cpu_count() or 1) / serving.replicas}
    made = serve.deployment(num_replicas=serving.replicas, max_ongoing_requests=MOST_KNOWN, ray_actor_options=options)
    try:
        with explained("The replicas did not come up.", RuntimeError, why=lambda e: str(e).splitlines()[0]):
            replicas = serve.run(made(Replica).bind(load, folders, serving), name="deltaw", route_prefix=None)
        yield replicas
    finally:
        if "RAY_ADDRESS" in os.environ:  # else all of Ray ends with this process
            serve.delete("deltaw")
        ray.shutdown()


def _asked(body: bytes) -> tuple[str, bytes]:
    """The persona that is asked for; and the body, with a seed, so that another replica can say the same."""
    with suppress(ValueError, RecursionError):  # which a replica tells
        told = json.loads(body)
        if isinstance(told, dict) and isinstance(told.get("model"), str):
            if told.get("seed") is None:
                body = json.dumps(told | {"seed": random.getrandbits(31)}).encode()
            return told["model"].partition("+")[0].partition(":")[0].strip(), body
    return "", body
