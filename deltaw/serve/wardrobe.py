"""Adapters by name: read by a thread beside when they are asked for, mapped from a file, forgotten when room is needed.

An adapter is known by what it holds. Under its old name another one is another adapter; whoever wears the old one goes
on with it.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Literal

import torch

from deltaw.errors import UserError
from deltaw.serve.arena import Arena
from deltaw.serve.wearing import Served

State = Literal["known", "reading", "waiting", "ready", "failed"]
"""Not asked for; being read; read, without room yet; to be worn; damaged."""
Read = Callable[[], Served]


@dataclass(eq=False)
class Entry:
    """An adapter of this name, with what reads it. `users` wear it now; `given` are the pages it takes the place of.

    `digest`: another for whatever may be another adapter; that of what it holds once it was read.
    """

    name: str
    digest: bytes
    read: Read
    served: Served | None = None
    given: list[int] = field(default_factory=list)
    size_bytes: int = 0
    """What it took when it was there last."""
    users: int = 0
    used: int = 0
    """When it was asked for last, in no unit."""
    fault: str = ""
    reading: Future[Served] | None = None
    seconds: float | None = None
    """How long reading took, when it was read last."""
    gone: bool = False
    """Nobody can ask for it any more."""

    @property
    def state(self) -> State:
        """Whether it can be worn."""
        if self.fault:
            return "failed"
        if self.served is not None:
            return "ready"
        if self.reading is None:
            return "known"
        return "waiting" if self.reading.done() else "reading"


class Wardrobe:
    """All adapters of a server. Only `read` runs beside; everything else is done between two steps."""

    def __init__(self, arena: Arena) -> None:
        self.arena, self.entries = arena, dict[str, Entry]()
        self.reader = ThreadPoolExecutor(1, "reader", torch.set_num_threads, (1,))  # the cores are the engine's
        self.clock = count(1)
        self.kept: set[Entry] = set()
        """Those that have pages."""

    def add(self, name: str, digest: bytes, read: Read) -> Entry:
        """Know an adapter by this name from now on; one that had it is gone."""
        if name in self.entries:
            self.remove(name)
        self.entries[name] = entry = Entry(name, digest, read)
        return entry

    def remove(self, name: str) -> None:
        """Know it no longer. Whoever wears it goes on; then its room is free.

        Raises:
            UserError: there is none of this name.
        """
        if (entry := self.entries.pop(name, None)) is None:
            raise UserError(f"There is no adapter '{name}'.")
        entry.gone = True
        self._forget_unused(entry)

    def ready(self, entries: Sequence[Entry]) -> bool:
        """Whether all of these can be worn now: then they are, until `unwear`. Else they are read, or wait for room.

        Raises:
            UserError: one is damaged or cannot be read now, or together they take more than all the room there is.
        """
        for entry in entries:
            entry.users += 1  # none makes room for another
        there = False
        try:
            found = [self._settled(entry) for entry in entries]  # all, so that all are read
            there = all(found)
            if sum(self._pages(entry) for entry in {*entries}) > self.arena.count:
                raise UserError("Together these adapters take more than all there is room for.")
        finally:
            if not there:
                self.unwear(entries)
        return there

    def fetch(self, entries: Sequence[Entry]) -> None:
        """Begin to read those that somebody waits for, before it is their turn."""
        for entry in entries:
            if entry.state == "known":
                entry.reading = self.reader.submit(_timed, entry)

    def unwear(self, entries: Iterable[Entry]) -> None:
        """Somebody wears these no longer."""
        for entry in entries:
            entry.users -= 1
            self._forget_unused(entry)

    def evict(self) -> bool:
        """Forget the adapter that was not asked for the longest, of those that nobody wears; whether there was one."""
        idle = [entry for entry in self.kept if not entry.users]
        if not idle:
            return False
        self._forget(min(idle, key=lambda entry: entry.used))
        return True

    def close(self) -> None:
        """Read nothing more."""
        self.reader.shutdown(cancel_futures=True)

    def _settled(self, entry: Entry) -> bool:
        """Whether it can be worn by now: it is read when it is asked for, and takes its room once that is done."""
        entry.used = next(self.clock)
        if entry.served is not None:
            return True
        if entry.fault:
            raise UserError(f"The adapter '{entry.name}' cannot be worn.", why=entry.fault)
        self.fetch([entry])
        if entry.reading is None or not entry.reading.done():
            return False
        try:
            served = entry.reading.result()
        except (OSError, MemoryError) as e:  # which may pass
            entry.reading = None
            raise UserError(f"The adapter '{entry.name}' cannot be read now.", why=f"{e}.") from None
        except Exception as e:  # whatever is wrong with it, it is the adapter's fault
            return self._failed(entry, str(e))
        if served.size_bytes > self.arena.count * self.arena.page_bytes:
            return self._failed(entry, f"It takes {served.size_bytes:,} bytes, more than all there is room for.")
        while not (given := self.arena.give(served.size_bytes)):
            if not self.evict():
                return False
        entry.served, entry.given, entry.reading = served, given, None
        entry.digest, entry.size_bytes = served.digest or entry.digest, served.size_bytes
        self.kept.add(entry)
        return True

    def _pages(self, entry: Entry) -> int:
        """How many pages it takes the place of, or will once there is room, as soon as that is known."""
        if entry.reading is None or not entry.reading.done() or entry.reading.exception() is not None:
            return len(entry.given)
        return self.arena.pages_for(entry.reading.result().size_bytes)

    def _failed(self, entry: Entry, why: str) -> bool:
        entry.fault, entry.reading = why, None
        return self._settled(entry)

    def _forget_unused(self, entry: Entry) -> None:
        if entry.gone and not entry.users and entry in self.kept:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self.arena.back(entry.given)
        entry.served, entry.given = None, []
        self.kept.remove(entry)


def _timed(entry: Entry) -> Served:
    begun = monotonic()
    served = entry.read()
    entry.seconds = monotonic() - begun
    return served
