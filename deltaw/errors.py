"""The errors a user can meet: each says what happened, where, why, and how to mend it, and has an exit code."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

MOST = 40
"""Names that are listed for one that is not known."""


class UserError(Exception):
    """A mistake in usage or data; the command line shows it as a panel and leaves with `code`."""

    code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.remedy = what, where, why, remedy

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join(part for part in (head, self.why, self.remedy) if part)


class WillNotFit(UserError):
    """The work needs more memory or disk than the machine has."""

    code = 3


class Diverged(UserError):
    """Training met a loss that is not a number twice."""

    code = 4


class Interrupted(UserError):
    """The user stopped the work; what was done is saved."""

    code = 130


@contextmanager
def located(where: str) -> Iterator[None]:
    """Let a mistake in this block say where it is, if it does not."""
    try:
        yield
    except UserError as e:
        e.where = e.where or where
        raise


@contextmanager
def explained(what: str, *kinds: type[Exception], where: object = "", why: str | Callable[[Any], object] = str,
              remedy: str = "") -> Iterator[None]:  # fmt: skip
    """Let errors of these kinds in this block be a user's mistake.

    `why` may speak of the {error} and its {kind}, or be what the error is told by.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as e:
        told = why.format(error=e, kind=type(e).__name__) if isinstance(why, str) else str(why(e))
        raise UserError(what, where=str(where), why=told, remedy=remedy) from None


def nearest(name: str, names: Iterable[str]) -> str:
    """Name the known one that is closest, or list them all: the remedy for a misspelt name."""
    known = sorted(names)
    if close := get_close_matches(name, known, 1, 0.6):
        return f"Did you mean '{close[0]}'?"
    more = f" and {len(known) - MOST:,} more" if len(known) > MOST else ""
    return f"There are: {', '.join(known[:MOST])}{more}."
