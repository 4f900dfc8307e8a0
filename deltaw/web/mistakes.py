"""What a mistake looks like: a status, and what there is to say, in the form of OpenAI's."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltaw.errors import UserError, nearest
from deltaw.serve.order import Busy
from deltaw.serve.service import Closed
from deltaw.web.answers import Refused, UnknownModel
from deltaw.web.asked import ChatAsked, CompletionAsked
from deltaw.web.keys import TooMuch

FIELDS = CompletionAsked.model_fields.keys() | ChatAsked.model_fields.keys()
MISTAKE = {"description": "What is wrong, and what to do.", "content": {"application/json": {}}}
ROUTE = ": clients take /v1 as the end of their base_url."


class Gone(Exception):
    """The client left before its answer was there."""


class Answer(JSONResponse):
    """In ASCII: halves of characters, which a client may send, have no other form."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def mistakes(app: FastAPI) -> None:
    """Answer each kind of mistake with its status, in the form of OpenAI's."""

    def handle(kind: type[Exception], told: Callable[[Any], tuple[int, str, str]]) -> None:
        async def answer(_: Request, error: Exception) -> JSONResponse:
            status, text, name = told(error)
            again = {"retry-after": str(error.seconds)} if isinstance(error, Busy | TooMuch) else None
            return Answer(fault(text, name), status, again)

        app.add_exception_handler(kind, answer)

    handle(UserError, lambda e: (400, str(e), "invalid_request_error"))
    handle(RequestValidationError, lambda e: (400, _complaint(e), "invalid_request_error"))
    handle(UnicodeError, lambda e: (400, f"This is no text: {e}.", "invalid_request_error"))
    handle(HTTPException, lambda e: (e.status_code, e.detail + ROUTE * (e.status_code in (404, 405)),
                                     "invalid_request_error"))  # fmt: skip
    handle(UnknownModel, lambda e: (404, str(e), "model_not_found"))
    handle(Refused, lambda e: (e.status, str(e), e.kind))
    handle(Busy, lambda e: (503, str(e), "server_busy"))
    handle(TooMuch, lambda e: (429, str(e), "rate_limit_exceeded"))
    handle(Gone, lambda _: (499, "The client left.", "client_closed_request"))
    handle(Closed, lambda e: (503, str(e), "server_error"))


def fault(text: str, name: str) -> dict[str, Any]:
    """A mistake as it is told."""
    return {"error": {"message": text, "type": name, "param": None, "code": name}}


def _complaint(error: RequestValidationError) -> str:
    """What is wrong with a body, in a sentence: the field, and why."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "The body is no JSON."
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "str", "list"))
    if not where:
        return "The body is read as JSON, and as an object of fields: with the header Content-Type: application/json."
    if first["type"] == "extra_forbidden":
        return f"There is no field '{where}'. {nearest(where, FIELDS)}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said[:1].lower()}{said[1:]}."
