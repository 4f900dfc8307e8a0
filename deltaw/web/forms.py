"""How answers look in JSON, completions and chats, whole and in pieces; and mistakes, in the form of OpenAI's."""

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltaw.errors import UserError, nearest
from deltaw.files.atomic import disk_is_full
from deltaw.models.tokenizer import Tokenizer
from deltaw.serve.choice import Score
from deltaw.serve.order import Busy, Later
from deltaw.serve.service import Closed
from deltaw.web.answers import Choice, Piece, Refused, UnknownModel
from deltaw.web.asked import ChatAsked, CompletionAsked
from deltaw.web.keys import TooMuch

Json = dict[str, Any]
Mark = tuple[str, int, int]
"""What an answer is known by, wherever it is computed: an id, a time, and the seed if none is asked for."""
FIELDS = CompletionAsked.model_fields.keys() | ChatAsked.model_fields.keys()
MISTAKE = {"description": "What is wrong, and what to do.", "content": {"application/json": {}}}
ROUTE = ": clients take /v1 as the end of their base_url."


class Form:
    """What is said of one request, by its mark; `kind` is the prefix of its id, `whole` and `part` name its objects."""

    kind, whole, part = "", "", ""
    silent = False
    """Whether of an answer nothing is told: only the prompt was asked for."""

    def __init__(self, mark: Mark, model: str, tokenizer: Tokenizer) -> None:
        self.head = {"id": f"{self.kind}-{mark[0]}", "created": mark[1], "model": model}
        self.tokenizer = tokenizer

    def chunk(self, piece: Piece) -> Json:
        """A piece of an answer, as an event of a stream."""
        return self._object(self.part, [{**self.event(piece), "index": piece.choice.index,
                                         "finish_reason": piece.finish}])  # fmt: skip

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """What a stream ends with if it was asked for."""
        return {**self._object(self.part, []), "usage": self.usage(choices)}

    def answer(self, pieces: Sequence[Piece], choices: Sequence[Choice]) -> Json:
        """All answers at once."""
        of = {choice: [p for p in pieces if p.choice is choice] for choice in choices}
        told = [{**self.said(Piece(c, "".join(p.text for p in own), [i for p in own for i in p.ids],
                                   [s for p in own for s in p.scores])),
                 "index": c.index, "finish_reason": c.finish} for c, own in of.items()]  # fmt: skip
        return {**self._object(self.whole, told), "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens of prompts, each counted once, and of answers."""
        asked = sum(len(c.sequence.asked) for c in choices if c.sequence.stream == 0)
        said = 0 if self.silent else sum(c.told for c in choices)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def event(self, piece: Piece) -> Json:
        """One choice of a chunk."""
        raise NotImplementedError

    def said(self, whole: Piece) -> Json:
        """One choice of an answer: by default, as if it were all in one chunk."""
        return self.event(whole)

    def _object(self, name: str, choices: list[Json]) -> Json:
        return {**self.head, "object": name, "choices": choices}

    def word(self, token: int) -> str:
        """One token as text."""
        return self.tokenizer.decode([token])


class CompletionForm(Form):
    """`text_completion`; with `echo` the prompt is told first."""

    kind, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, mark: Mark, asked: CompletionAsked, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        super().__init__(mark, asked.model, tokenizer)
        self.asked, self.texts, self.silent = asked, texts, asked.max_tokens == 0

    def event(self, piece: Piece) -> Json:
        text, ids, scores = ("", [], []) if self.silent else (piece.text, piece.ids, piece.scores)
        own: list[Score | None] = [*scores]
        if self.asked.echo and piece.first:
            text = self.texts[piece.choice.index // (self.asked.n or 1)] + text
            ids, own = [*piece.choice.sequence.asked, *ids], [None, *piece.choice.sequence.echoed, *scores]
        return {"text": text, "logprobs": None if self.asked.tops is None else self._logprobs(ids, own)}

    def _logprobs(self, ids: Sequence[int], scores: Sequence[Score | None]) -> Json:
        words = [self.word(i) for i in ids]
        tops = [score and self._tops(word, score) for word, score in zip(words, scores, strict=True)]
        return {"tokens": words, "token_logprobs": [s and s.logprob for s in scores], "top_logprobs": tops,
                "text_offset": list(accumulate(map(len, words), initial=0))[:-1]}  # fmt: skip

    def _tops(self, word: str, score: Score) -> dict[str, float]:
        likeliest: dict[str, float] = {}
        for text, p in (*((self.word(token), p) for token, p in score.tops), (word, score.logprob)):
            likeliest.setdefault(text, p)  # halves of characters look alike: the likelier one counts
        return likeliest


class ChatForm(Form):
    """`chat.completion`, and its chunks."""

    kind, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def event(self, piece: Piece) -> Json:
        role = {"role": "assistant"} if piece.first else {}
        return {"delta": {**role, "content": piece.text}, "logprobs": self._logprobs(piece)}

    def said(self, whole: Piece) -> Json:
        said = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"message": said, "logprobs": self._logprobs(whole)}

    def _logprobs(self, piece: Piece) -> Json | None:
        if piece.choice.sequence.tops is None:
            return None
        return {"content": [{**self._one(i, s.logprob), "top_logprobs": [self._one(*top) for top in s.tops]}
                            for i, s in zip(piece.ids, piece.scores, strict=True)], "refusal": None}  # fmt: skip

    def _one(self, token: int, p: float) -> Json:
        word = self.word(token)
        return {"token": word, "logprob": p, "bytes": list(word.encode())}


def event(told: Json | str) -> bytes:
    """A server-sent event."""
    return f"data: {told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)}\n\n".encode()


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
            again = {"retry-after": str(error.seconds)} if isinstance(error, Later) else None
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
    handle(OSError, lambda e: (507 if disk_is_full(e) else 500, f"{e.strerror or e}.", "server_error"))


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
