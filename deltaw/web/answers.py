"""From what was asked to sequences, and from tokens to text: between the engine's thread and the event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence as Row
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic

from deltaw.api.persona import Base
from deltaw.decode.generate import Speech
from deltaw.errors import UserError
from deltaw.serve.catalog import BASE, Catalog
from deltaw.serve.choice import Score
from deltaw.serve.grammar import Grammars
from deltaw.serve.order import Later
from deltaw.serve.sequence import End, Sequence
from deltaw.serve.service import Closed, Service
from deltaw.settings import Serving
from deltaw.web.asked import Asked
from deltaw.web.keys import Tenant
from deltaw.web.metrics import Metrics

MOST_ANSWERS = 1024
"""Of one request: prompts times answers to each."""


class Refused(Exception):
    """What was asked cannot be answered; `status`: of HTTP, from 500 on the fault is ours."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status, self.kind = status, "invalid_request_error" if status < 500 else "server_error"


@dataclass(eq=False)
class Choice:
    """One answer under way: what is said so far, and how much of it was told."""

    index: int
    sequence: Sequence
    speech: Speech
    told: int = 0
    """Tokens."""
    first: float | None = None
    """When its first token came, in seconds."""
    finish: str | None = None


@dataclass
class Piece:
    """What is new of an answer: text, and the tokens that it came with."""

    choice: Choice
    text: str
    ids: list[int]
    scores: list[Score]
    finish: str | None = None
    first: bool = True
    """Whether nothing was told of the answer before."""


@dataclass
class Post:
    """Carries what the engine says into the event loop: one wake-up for all that a step says."""

    loop: asyncio.AbstractEventLoop | None = None
    box: deque[tuple[asyncio.Queue[tuple[Choice, int | End]], Choice, int | End]] = field(default_factory=deque)
    due: bool = False

    def tell(self, queue: asyncio.Queue[tuple[Choice, int | End]], choice: Choice, what: int | End) -> None:
        """Called by the engine's thread."""
        self.box.append((queue, choice, what))
        if not self.due and self.loop is not None:
            self.due = True
            with suppress(RuntimeError):  # the loop is closed, and nobody listens
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.due = False
        while self.box:
            queue, choice, what = self.box.popleft()
            queue.put_nowait((choice, what))


@dataclass
class Hub:
    """All that requests share."""

    base: Base
    name: str
    service: Service
    catalog: Catalog
    grammars: Grammars
    metrics: Metrics
    post: Post
    serving: Serving
    ending: bool = False
    """Whether only those are answered who have asked already."""

    def choices(self, asked: Asked, prompts: Row[Row[int]], tenant: Tenant) -> list[Choice]:
        """The answers that are asked for, not begun yet.

        Raises:
            UserError: the persona is not known, or the form of the answer is none.
        """
        try:
            worn = self.catalog.worn(asked.model if asked.model != self.name else BASE, tenant.sees)
        except UserError as e:
            raise UnknownModel(str(e)) from None
        count = asked.n or 1
        if (wanted := len(prompts) * count) > MOST_ANSWERS:
            raise UserError(f"{wanted:,} answers are more than one request may ask for: {MOST_ANSWERS:,}.")
        ends = frozenset() if asked.ignore_eos else frozenset(self.base.tokenizer.end_ids)
        form, made = asked.grammar(), list[Choice]()
        for prompt in prompts or [()]:
            self._check(prompt, asked)
            sampling = asked.sampling(self.base.model.context - len(prompt))
            for stream in range(count):
                sequence = Sequence(
                    tuple(prompt), sampling, ends | {*(asked.stop_token_ids or [])}, worn, stream=stream,
                    least=min(asked.min_tokens, sampling.max_new_tokens), tops=asked.tops, open=asked.most is None,
                    echo=getattr(asked, "echo", False) and asked.tops is not None,
                    grammar=self.grammars.of(*form) if form else None, tenant=tenant.name,
                    priority=tenant.rights.priority, urgency=asked.priority,
                    secret="" if self.serving.share_prefixes else tenant.name,
                )  # fmt: skip
                made.append(Choice(len(made), sequence, Speech(self.base.tokenizer, asked.stops, sequence.least)))
        return made

    def _check(self, prompt: Row[int], asked: Asked) -> None:
        words = self.base.model.config.vocab
        if not prompt:
            raise UserError("The prompt is empty.")
        if odd := next((i for i in (*prompt, *(asked.stop_token_ids or [])) if i >= words), None):
            raise UserError(f"There is no token {odd}: this model knows {words:,}.")
        if asked.min_tokens > (asked.most or asked.min_tokens):
            raise UserError(f"min_tokens = {asked.min_tokens} is more than the answer may have: {asked.most}.")

    async def answered(self, asked: Asked, choices: Row[Choice], tenant: Tenant) -> AsyncIterator[Piece]:
        """All answers as they come, each ended by a piece with a `finish`. Left early, they are given up.

        Raises:
            Refused: one cannot be answered, or not in time.
            TooMuch: the tenant has asked and was told as much as it may.
            Busy: the first would begin too late.
        """
        heard, sequences = asyncio.Queue[tuple[Choice, int | End]](), [choice.sequence for choice in choices]
        for choice in choices:
            choice.sequence.heard = partial(self.post.tell, heard, choice)
        within, left, charged = self.serving.first_token_seconds or inf, 0, 0
        seconds = self.serving.request_seconds
        until = asyncio.get_running_loop().time() + seconds
        try:
            tenant.ask()
            charged = sum(len(sequence.asked) for sequence in sequences if not sequence.stream)
            tenant.had(charged, requests=1)  # at once: others of its requests are not to come in meanwhile
            async with asyncio.timeout_at(until):
                await asyncio.wrap_future(self.service.submit(*sequences, within=within))
            left = len(choices)
            while left:
                async with asyncio.timeout_at(until):
                    choice, what = await heard.get()
                if choice.finish is None and (piece := self._piece(asked, choice, what)) is not None:
                    left -= piece.finish is not None
                    yield piece
        except Later as e:
            tenant.had(-charged, requests=-bool(charged))
            self.metrics.refused.labels(tenant.name, type(e).__name__).inc()
            raise
        except TimeoutError:
            raise Refused(f"This took longer than {seconds:g} s.", 504) from None
        finally:
            for choice in choices:
                tenant.had(len(choice.sequence.said))
                if left and choice.finish is None:
                    self._ended(asked, choice, "abort")
                with suppress(Closed):
                    self.service.abort(choice.sequence)

    def _piece(self, asked: Asked, choice: Choice, what: int | End) -> Piece | None:
        """What there is to tell after one more token, or at the end; None: nothing yet."""
        sequence, speech = choice.sequence, choice.speech
        if what in ("error", "refused", "abort"):
            self._ended(asked, choice, str(what))
            raise Refused(sequence.fault or "The server is closing.", 400 if what == "refused" else 500)
        finish = what if isinstance(what, str) else None
        if finish is None:
            choice.first = choice.first or monotonic()
            text = speech.add(int(what))
        else:
            text = speech.rest()
        finish = "stop" if speech.stopped else finish
        if finish is None and not text and sequence.tops is None:
            return None
        start, choice.told = choice.told, len(speech.ids)
        ids, scores = speech.ids[start:], sequence.scores[start : choice.told]
        if what == "stop" and sequence.ended is not None and sequence.tops is not None:
            # lm-evaluation-harness counts on it
            ids, scores = [*ids, sequence.ended], sequence.scores[start:]
        if finish is not None:
            self._ended(asked, choice, finish)
            if speech.stopped:
                self.service.abort(sequence)
        return Piece(choice, text, ids, scores, finish, start == 0)

    def _ended(self, asked: Asked, choice: Choice, why: str) -> None:
        choice.finish = why
        self.metrics.ended(asked.model, choice.sequence, choice.first, why)


class UnknownModel(Exception):
    """No persona has this name."""
