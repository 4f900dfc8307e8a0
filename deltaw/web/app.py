"""The routes: what may be asked, and how it is answered."""

import asyncio
import logging
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from time import monotonic
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from deltaw import __version__
from deltaw.api.persona import Persona
from deltaw.errors import UserError
from deltaw.serve.catalog import BASE
from deltaw.settings import Serving
from deltaw.web.adapters import WATCH_SECONDS, Shelf, adapter_routes
from deltaw.web.answers import Choice, Hub, Piece, Refused, UnknownModel
from deltaw.web.asked import Asked, ChatAsked, CompletionAsked, DetokenizeAsked, TokenizeAsked, turns
from deltaw.web.door import guarded, manages, tenant_of
from deltaw.web.forms import MISTAKE, Answer, ChatForm, CompletionForm, Form, Gone, event, fault, mistakes
from deltaw.web.metrics import measured

T = TypeVar("T")
log = logging.getLogger(__name__)


def application(hub: Hub, shelf: Shelf, serving: Serving, guard: bool = True) -> FastAPI:
    """The server; without `guard`, of those whom another one let in.

    Raises:
        UserError: the file of keys cannot be read.
    """

    @asynccontextmanager
    async def watching(_: FastAPI) -> AsyncIterator[None]:
        hub.post.loop = asyncio.get_running_loop()
        watch = asyncio.create_task(_watch(shelf))
        yield
        watch.cancel()

    app = FastAPI(title="deltaw", version=__version__, lifespan=watching, redoc_url=None, default_response_class=Answer,
                  responses={"4XX": MISTAKE, "5XX": MISTAKE})  # fmt: skip
    if guard:
        guarded(app, serving)
    managing = APIRouter(dependencies=[Depends(manages)])
    _answering(app, hub)
    _telling(app, managing, hub, shelf)
    adapter_routes(managing, shelf)
    app.include_router(managing)
    _open(app, hub)
    mistakes(app)
    return app


async def _watch(shelf: Shelf) -> None:
    took = 0.0
    while True:
        await asyncio.sleep(max(WATCH_SECONDS, 20 * took))
        began = monotonic()
        try:
            await shelf.look()
        except Exception:
            log.exception("The folders could not be looked at.")
        took = monotonic() - began


def _answering(routes: FastAPI, hub: Hub) -> None:
    tokenizer = hub.base.tokenizer

    @routes.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        """Go on with a text, or with tokens; several prompts are answered together."""
        one = isinstance(asked.prompt, str) or (asked.prompt and isinstance(asked.prompt[0], int))
        prompts = cast("list[str] | list[list[int]]", [asked.prompt] if one else asked.prompt)
        begin = tokenizer.begin_ids if asked.add_special_tokens else []
        ids = [[*begin, *tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts] if asked.echo else []
        return await _respond(hub, asked, ids, CompletionForm(request.state.mark, asked, tokenizer, texts), request)

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer a conversation. One without a system prompt gets the persona's own."""
        source = hub.catalog.sources.get(asked.model) if tenant_of(request).sees(asked.model) else None
        prompt = Persona(asked.model, hub.base, system=source.system if source else "").prompt(turns(asked.messages))
        return await _respond(hub, asked, [prompt], ChatForm(request.state.mark, asked.model, tokenizer), request)

    @routes.post("/tokenize")
    async def tokenize(asked: TokenizeAsked) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        if (asked.prompt is None) == (asked.messages is None):
            raise UserError("Give a prompt, or messages.")
        if asked.messages is not None:
            ids = tokenizer.encode(tokenizer.chat(turns(asked.messages), prompt=asked.add_generation_prompt))
        else:
            begin = tokenizer.begin_ids if asked.add_special_tokens else []
            ids = [*begin, *tokenizer.encode(asked.prompt or "")]
        return {"tokens": ids, "count": len(ids), "max_model_len": hub.base.model.context}

    @routes.post("/detokenize")
    async def detokenize(asked: DetokenizeAsked) -> dict[str, str]:
        """The text of tokens."""
        return {"prompt": tokenizer.decode(asked.tokens)}


async def _respond(hub: Hub, asked: Asked, prompts: list[list[int]], form: Form, request: Request) -> Response:
    tenant = tenant_of(request)
    tenant.ask()  # before anything is done for it
    asked.seed = request.state.mark[2] if asked.seed is None else asked.seed
    choices = await asyncio.to_thread(hub.choices, asked, prompts, tenant)  # a grammar may take its time
    pieces = hub.answered(asked, choices, tenant)
    if asked.stream:
        first = await unless_gone(request, anext(pieces))  # so that what cannot be answered has a status of its own
        return StreamingResponse(_events(asked, form, choices, first, pieces), media_type="text/event-stream",
                                 headers={"cache-control": "no-cache"})  # fmt: skip

    async def all_of_it() -> list[Piece]:
        return [piece async for piece in pieces]

    return Answer(form.answer(await unless_gone(request, all_of_it()), choices))


async def _events(asked: Asked, form: Form, choices: list[Choice], first: Piece,
                  pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:  # fmt: skip
    yield event(form.chunk(first))
    try:
        async for piece in pieces:
            yield event(form.chunk(piece))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield event(form.usage_chunk(choices))
    except Refused as e:
        yield event(fault(str(e), e.kind))
    yield event("[DONE]")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives; given up as soon as the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        return cast("T", tasks[0].result())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _telling(routes: FastAPI, managing: APIRouter, hub: Hub, shelf: Shelf) -> None:
    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The base and its personas."""
        return {"object": "list", "data": list(shelf.cards(tenant_of(request)))}

    @routes.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        """One of them."""
        cards = shelf.cards(tenant_of(request), [hub.name if name == BASE else name])
        if (card := next(cards, None)) is None:
            raise UnknownModel(f"There is no persona '{name}'.")
        return card

    @managing.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return measured(hub.metrics.registry)


def _open(app: FastAPI, hub: Hub) -> None:
    """What needs no key."""
    page = files("deltaw.web").joinpath("page.html").read_text(encoding="utf-8")
    own = [f"{kind}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
           for kind, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)]  # fmt: skip
    policy = "; ".join(["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'",
                        "form-action 'none'", "frame-ancestors 'none'", *own])  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def talk() -> HTMLResponse:
        """A page to talk with them; what an answer might smuggle in, a browser neither runs nor fetches."""
        return HTMLResponse(page, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    @app.get("/healthz")
    @app.get("/health", include_in_schema=False)
    async def alive() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Nothing is answered, and why."}})
    async def ready() -> JSONResponse:
        """Whether questions are answered."""
        status = "ending" if hub.ending else hub.service.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)
