"""Who may ask what, and how much: keys of which only hashes are kept, with personas, limits and a priority each."""

import hashlib
import logging
from contextlib import suppress
from math import ceil, inf
from pathlib import Path
from time import monotonic

from deltaw.errors import UserError
from deltaw.serve.order import Later
from deltaw.settings import Rights, build, read_yaml

log = logging.getLogger(__name__)
ROUNDED = 1e-6
"""So little is missing only by rounding."""


class TooMuch(Later):
    """A tenant's share of this minute is used up."""


class Bucket:
    """So much a minute, if there is a limit; what is not used is kept for a minute."""

    def __init__(self, what: str, per_minute: int | None) -> None:
        self.what, self.most, self.at = what, per_minute or inf, monotonic()
        self.room = self.most

    def take(self, amount: float, least: float = 1.0) -> None:
        """Take an amount, even of what comes later.

        Raises:
            TooMuch: there is not even the least now; nothing is taken.
        """
        now = monotonic()
        if self.most < inf:
            self.room, self.at = min(self.most, self.room + (now - self.at) * self.most / 60), now
        if self.room < least - ROUNDED:
            seconds = ceil((least - self.room) * 60 / self.most - ROUNDED)
            raise TooMuch(f"This key has used up its {self.most:,} {self.what} a minute.", seconds)
        self.room -= amount


class Tenant:
    """All that ask with one key."""

    def __init__(self, name: str, rights: Rights) -> None:
        self.name, self.rights = name, rights
        self.requests = Bucket("requests", rights.requests_per_minute)
        self.tokens = Bucket("tokens", rights.tokens_per_minute)

    def sees(self, persona: str) -> bool:
        """Whether this one is there for it."""
        return self.rights.personas is None or persona in self.rights.personas

    def ask(self) -> None:
        """Look whether it may ask now.

        Raises:
            TooMuch: it has had as much as it may.
        """
        self.requests.take(0)
        self.tokens.take(0)

    def had(self, tokens: int, requests: int = 0) -> None:
        """Count what it had, whether there was so much or not."""
        self.requests.take(requests, least=-inf)
        self.tokens.take(tokens, least=-inf)


class Keys:
    """Tenants by their keys: those of a file, which is read anew when it changes, and of one that may do everything.

    Raises:
        UserError: the file is missing or says something else.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.own = path, hashed(key) if key else ""
        self.all = Tenant("", Rights(manage=True))
        """Who brings the one key, and anybody where none is asked for."""
        self.tenants, self.seen = dict[str, Tenant](), 0
        if path is not None:
            self.tenants = self._read(path)

    def of(self, key: str) -> Tenant | None:
        """Whose key this is; None: nobody's."""
        if not self.own and self.path is None:
            return self.all
        with suppress(OSError):  # who deletes the file goes on with what it said
            if self.path is not None and self.seen != self.path.stat().st_mtime_ns:
                try:
                    self.tenants = self._read(self.path)
                except UserError as e:
                    log.error("The keys are as they were. %s", e)
        given = hashed(key)
        return self.all if given == self.own else self.tenants.get(given)

    def _read(self, path: Path) -> dict[str, Tenant]:
        self.seen = path.stat().st_mtime_ns if path.exists() else 0  # before it is read: it may change meanwhile
        told, before, found = read_yaml(path), {t.name: t for t in self.tenants.values()}, dict[str, Tenant]()
        for name, each in told.items():
            kept = str(each.pop("sha256", "")).lower() if isinstance(each, dict) else ""
            if len(kept) != 64 or None in (name, *each.values()):  # nothing must not mean all
                raise UserError(f"The key '{name}' is not whole.", where=str(path), remedy="Make it with deltaw key.")
            rights = build(Rights, each, where=f"{path}: {name}")
            known = before.get(str(name))  # with what it has used up
            found[kept] = known if known and known.rights == rights else Tenant(str(name), rights)
        return found


def hashed(key: str) -> str:
    """What is kept of a key. Keys are drawn, not thought up, so guessing needs no slow hash against it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
