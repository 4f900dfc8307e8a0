"""A request under way: what was asked and said, what it wears, and which pages are its own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, Literal

import torch

from deltaw.adapters.adapter import Adapter
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.kernels.attention import SIDE
from deltaw.models.slots import Before
from deltaw.serve.arena import Arena, names
from deltaw.serve.grammar import Matcher
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served

End = Literal["stop", "length", "abort", "refused", "error"]
"""Why nothing more is said: the model ended, there was no more room, nobody listens, what was asked cannot be answered,
or it could not be computed."""
PREFIX = -1
"""Stands for a token of a persona's prefix."""


@dataclass(eq=False)
class Sequence:
    """Tokens and their places, of which those of the prefix come first. `known` places have keys and values in pages.

    `root`: what is worn, as pages are known by. `heard` is told every token as it is said, and then why it ends.
    """

    asked: tuple[int, ...]
    sampling: Sampling
    end_ids: frozenset[int]
    worn: tuple[tuple[Entry, float], ...] = ()
    heard: Callable[[int | End], None] = lambda _: None
    stream: int = 0
    """Which of the seed's streams it draws from: each answer to one prompt has its own."""
    least: int = 0
    """Tokens before which it may not end."""
    grammar: Matcher | None = None
    tops: int | None = None
    """How many likelier tokens are told with each token's score; None: no scores are."""
    echo: bool = False
    """Whether the tokens that were asked have scores too, all but the first."""
    open: bool = False
    """Whether no end was asked for: it may say as much as there is room for."""
    ended: int | None = None
    """The token by which the model ended; it has a score, and is not said."""
    scores: list[Any] = field(default_factory=list)
    echoed: list[Any] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    known: int = 0
    named: int = 0
    """Pages that others may know."""
    fault: str = ""
    """What there is to say of an error."""
    draws: torch.Generator = field(default_factory=torch.Generator)
    root: bytes = b""
    before: tuple[Before, ...] = ()
    alone: Adapter | None = None
    """What it wears that shares no batch."""
    tenant: str = ""
    """Who asks, if that is told apart."""
    secret: str = ""
    """Pages are shared only with those who have the same."""
    priority: int = 0
    urgency: int = 0
    """Lower ones come first: of a tenant among all, and of a request among its tenant's."""
    charged: int = 0
    """Tokens of its answer that its tenant was charged for, some before they are said."""
    promised: float = -1.0
    """Seconds in which its first token is to be there; negative: that was not promised."""
    since: float = field(default_factory=monotonic)
    begun: float | None = None
    passed: float | None = None
    """When it was asked, when it was begun first, and when others went before it as it lacked room for what it wears;
    in seconds."""

    def __post_init__(self) -> None:
        self.draws.manual_seed(self.sampling.seed * 1_000_003 + self.stream)  # as an answer of `decode.generate`

    @property
    def entries(self) -> list[Entry]:
        """The adapters that it wears."""
        return [entry for entry, _ in self.worn]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(entry.name for entry in self.entries)

    @property
    def served(self) -> list[tuple[Served, float]]:
        """The adapters that it wears, which are there, with their weights."""
        there = [(entry.served, weight) for entry, weight in self.worn if entry.served is not None]
        assert len(there) == len(self.worn), "what is worn is not there"
        return there

    def dress(self) -> None:
        """Take on what it wears, which is there.

        Raises:
            UserError: it cannot be worn together, or in part.
        """
        whole = [served for served, _ in self.served if served.alone is not None or served.before]
        alone = next((served.alone for served in whole if served.alone is not None), None)
        if len(whole) > 1 or (alone is not None and len(self.worn) > 1):
            raise UserError("An adapter that is worn by itself, or a second prefix, cannot be blended with others.")
        if any(weight != 1 for served, weight in self.served if served in whole):
            raise UserError("Only what is added to layers has a weight: no prefix, and nothing that is worn by itself.")
        self.before, self.alone = next((served.before for served in whole), ()), alone
        told = self.secret, [(entry.digest, weight) for entry, weight in self.worn]
        self.root = hashlib.blake2b(repr(told).encode(), digest_size=16).digest()

    @property
    def free(self) -> bool:
        """Whether it may say anything next."""
        return self.grammar is None and len(self.said) >= self.least

    @property
    def prefix(self) -> int:
        """Places before the first token."""
        return len(self.before[0].k_PKE) if self.before else 0

    @property
    def ids(self) -> list[int]:
        """What stands at its places."""
        return [*[PREFIX] * self.prefix, *self.asked, *self.said]

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in pages yet."""
        return len(self.asked) + len(self.said) - max(0, self.known - self.prefix)

    @property
    def most(self) -> int:
        """Places that it may come to have."""
        return self.prefix + len(self.asked) + self.sampling.max_new_tokens

    def unscored(self, count: int) -> int:
        """How many of the next tokens are followed by one that was asked and is to be scored."""
        at = max(0, self.known - self.prefix)
        return max(0, min(count, len(self.asked) - 1 - at)) if self.echo else 0

    def missing(self, count: int) -> int:
        """Pages that so many more tokens need."""
        return max(0, -(-(max(self.known, self.prefix) + count) // SIDE) - len(self.pages))

    def begin(self, arena: Arena) -> None:
        """Hold what is known of its places, but for the last one, and all that are to be scored: these are computed."""
        self.begun = self.begun or monotonic()
        if scoring := self.echo and len(self.echoed) < len(self.asked) - 1:
            self.echoed.clear()
        for page in [] if scoring else arena.find(self.root, self.ids[:-1]):
            arena.hold(page)
            self.pages.append(page)
        self.named = len(self.pages)
        self.known = self.named * SIDE

    def extend(self, arena: Arena, count: int) -> None:
        """Take pages for so many more tokens, of which there are enough; a prefix is written at once."""
        for _ in range(self.missing(count)):
            self.pages.append(arena.take())
        if self.known < self.prefix:
            arena.write(list(self.pages), self.known, self.before)
            self.known = self.prefix

    def advance(self, arena: Arena, count: int) -> None:
        """So many more tokens are in pages: those that are full are known to others from now on."""
        self.known += count
        if (full := self.known // SIDE) > self.named:
            for page, name in zip(self.pages[:full], names(self.root, self.ids), strict=False):
                arena.learn(page, name)
            self.named = full

    def leave(self, arena: Arena) -> None:
        """Give all pages back, to begin anew or not at all; the last first, as others need beginnings more."""
        for page in reversed(self.pages):
            arena.drop(page)
        self.pages, self.known, self.named = [], 0, 0
