"""How answers look in JSON: completions and chats, whole and in pieces."""

import json
import secrets
import time
from collections.abc import Sequence as Row
from typing import Any

from deltaw.models.tokenizer import Tokenizer
from deltaw.serve.choice import Score
from deltaw.web.answers import Choice, Piece
from deltaw.web.asked import CompletionAsked

Json = dict[str, Any]


class Form:
    """What is said of one request; `kind` is the prefix of its id, `whole` and `part` are the names of its objects."""

    kind, whole, part = "", "", ""
    silent = False
    """Whether of an answer nothing is told: only the prompt was asked for."""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.head = {"id": f"{self.kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.tokenizer = tokenizer

    def chunk(self, piece: Piece) -> Json:
        """A piece of an answer, as an event of a stream."""
        return self._object(self.part, [{**self.event(piece, piece.first), "index": piece.choice.index,
                                         "finish_reason": piece.finish}])  # fmt: skip

    def usage_chunk(self, choices: Row[Choice]) -> Json:
        """What a stream ends with if it was asked for."""
        return {**self._object(self.part, []), "usage": self.usage(choices)}

    def answer(self, pieces: Row[Piece], choices: Row[Choice]) -> Json:
        """All answers at once."""
        of = {choice: [p for p in pieces if p.choice is choice] for choice in choices}
        told = [{**self.said(c, Piece(c, "".join(p.text for p in own), [i for p in own for i in p.ids],
                                      [s for p in own for s in p.scores])),
                 "index": c.index, "finish_reason": c.finish} for c, own in of.items()]  # fmt: skip
        return {**self._object(self.whole, told), "usage": self.usage(choices)}

    def usage(self, choices: Row[Choice]) -> Json:
        """Tokens of prompts, each counted once, and of answers."""
        asked = sum(len(c.sequence.asked) for c in choices if c.sequence.stream == 0)
        said = 0 if self.silent else sum(c.told for c in choices)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def event(self, piece: Piece, first: bool) -> Json:
        """One choice of a chunk."""
        raise NotImplementedError

    def said(self, choice: Choice, whole: Piece) -> Json:
        """One choice of an answer."""
        raise NotImplementedError

    def _object(self, name: str, choices: list[Json]) -> Json:
        return {**self.head, "object": name, "choices": choices}

    def word(self, token: int) -> str:
        """One token as text."""
        return self.tokenizer.decode([token])


class CompletionForm(Form):
    """`text_completion`; with `echo` the prompt is told first."""

    kind, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, asked: CompletionAsked, texts: Row[str]) -> None:
        super().__init__(model, tokenizer)
        self.asked, self.texts, self.silent = asked, texts, asked.max_tokens == 0

    def event(self, piece: Piece, first: bool) -> Json:
        return self._told(piece.choice, piece, first and self.asked.echo)

    def said(self, choice: Choice, whole: Piece) -> Json:
        return self._told(choice, whole, self.asked.echo)

    def _told(self, choice: Choice, piece: Piece, echo: bool) -> Json:
        text, ids, scores = ("", [], []) if self.silent else (piece.text, piece.ids, piece.scores)
        own: list[Score | None] = [*scores]
        if echo:
            text = self.texts[choice.index // (self.asked.n or 1)] + text
            ids, own = [*choice.sequence.asked, *ids], [None, *choice.sequence.echoed, *scores]
        return {"text": text, "logprobs": None if self.asked.tops is None else self._logprobs(ids, own)}

    def _logprobs(self, ids: Row[int], scores: Row[Score | None]) -> Json:
        words, offsets, at = [self.word(i) for i in ids], list[int](), 0
        for word in words:
            offsets.append(at)
            at += len(word)
        tops: list[dict[str, float] | None] = []
        for word, score in zip(words, scores, strict=True):
            likeliest: dict[str, float] = {}
            for token, p in score.tops if score else ():
                likeliest.setdefault(self.word(token), p)  # halves of characters look alike: the likelier one counts
            if score:
                likeliest.setdefault(word, score.logprob)
            tops.append(likeliest if score else None)
        return {"tokens": words, "token_logprobs": [s and s.logprob for s in scores], "top_logprobs": tops,
                "text_offset": offsets}  # fmt: skip


class ChatForm(Form):
    """`chat.completion`, and its chunks."""

    kind, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def event(self, piece: Piece, first: bool) -> Json:
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": piece.text}, "logprobs": self._logprobs(piece)}

    def said(self, choice: Choice, whole: Piece) -> Json:  # noqa: ARG002 (the form's contract)
        return {
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
        }

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
