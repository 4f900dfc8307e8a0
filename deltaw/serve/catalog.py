"""Personas by name: adapters in files and folders, ours and PEFT's, which come, change and go while a server runs."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from time import time

import torch
from filelock import FileLock

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError, nearest
from deltaw.files import adapters, foreign, peft
from deltaw.files.atomic import write_text
from deltaw.files.runs import Run
from deltaw.kernels.worn import LAYOUT
from deltaw.models.checkpoint import read_json
from deltaw.models.decoder import Decoder
from deltaw.serve.wardrobe import Entry, Wardrobe
from deltaw.serve.wearing import Served, served

log = logging.getLogger(__name__)
KEPT_SECONDS = 30 * 24 * 3600.0
"""How long laid files are kept that nobody uses."""
MOST_BLENDED = 16
"""Personas that are blended at most."""
BASE = "base"
"""What the model is called that wears nothing."""
Worn = tuple[tuple[Entry, float], ...]


@dataclass(frozen=True)
class Source:
    """An adapter's files as they were when they were looked at; whenever they change, `stamp` is another.

    `fault`: why it can be no persona of this base, as far as that is seen without reading its tensors.
    """

    path: Path
    stamp: str
    method: str = ""
    rank: int | None = None
    base: str = ""
    system: str = ""
    fault: str = ""

    @classmethod
    def of(cls, path: Path, fingerprint: str) -> "Source":
        """An adapter file of ours, or a folder of PEFT's."""
        stamp = _stamp(path)
        try:
            if path.is_file():
                header = adapters.read_header(path)
                other = "" if header.fingerprint == fingerprint else f"It was made for another base: '{header.base}'."
                return cls(path, stamp, header.method, header.settings.get("rank"), header.base, header.system, other)
            told = read_json(path / foreign.CONFIG)
            kind, rank = str(told.get("peft_type", "")).lower(), told.get("r")
            base = _legible(str(told.get("base_model_name_or_path") or ""))
            return cls(path, stamp, "dora" if told.get("use_dora") else kind, rank, base)
        except UserError as e:
            return cls(path, stamp, fault=str(e))

    def read(self, model: Decoder, fingerprint: str, kept: Path) -> Served:
        """It as it is served; what shares a batch is laid into a file of the folder `kept`, and mapped from there.

        Raises:
            UserError: it is damaged, not for this base, or was changed meanwhile.
        """
        if self.fault:
            raise UserError(self.fault)
        laid = next(kept.glob(f"{self.stamp}-*"), None)
        digest = laid.stem.rpartition("-")[2] if laid else self._digest()
        got = served(lambda: self._adapter(model, fingerprint), model, kept / f"{self.stamp}-{digest}.slab")
        if laid is None and _stamp(self.path) != self.stamp:
            raise UserError("Its file was changed while it was read.")
        return replace(got, digest=bytes.fromhex(digest))

    def _adapter(self, model: Decoder, fingerprint: str) -> Adapter:
        adapter = adapters.load(self.path, model, fingerprint) if self.path.is_file() else peft.read(self.path, model)
        if odd := next((name for name, t in adapter.state_dict().items() if not torch.isfinite(t).all()), None):
            raise UserError(f"'{odd}' has values that are no numbers.")
        return adapter

    def _digest(self) -> str:
        """Of what the files hold, whatever they are called."""
        whole = hashlib.blake2b(digest_size=16)
        for file in _files(self.path):
            with file.open("rb") as f:
                whole.update(hashlib.file_digest(f, "sha256").digest())
        return whole.hexdigest()


class Catalog:
    """The personas of one base. Only `found` and `worn` may be asked by any thread; the rest is between two steps."""

    def __init__(self, model: Decoder, fingerprint: str, wardrobe: Wardrobe, folders: Sequence[Path],
                 kept: Path) -> None:  # fmt: skip
        self.model, self.fingerprint, self.wardrobe, self.folders = model, fingerprint, wardrobe, folders
        self.kept = kept / f"{fingerprint[:16]}-{str(model.dtype).removeprefix('torch.')}-{LAYOUT}"
        self.sources: dict[str, Source] = {}
        self.seen: dict[str, str] = {}
        """Stamps of what the folders held when they were looked at last."""
        self.apart: Callable[[Served], Served] = lambda served: served
        """What of an adapter is kept here, where others compute with this process."""
        told = os.fsencode("\n".join(str(folder.absolute()) for folder in folders))
        self.noted = kept / f"{fingerprint[:16]}-{hashlib.blake2b(told, digest_size=8).hexdigest()}.json"
        """Where it is noted what was put up by its path, and taken down: for after a restart, and for replicas."""

    def notes(self) -> dict[str, list[str]]:
        """By name: the path of what was put up; or, of what was taken down, no path and the stamp that it had."""
        try:
            return read_json(self.noted) if self.noted.exists() else {}
        except UserError as e:
            log.warning("What was put up and taken down is forgotten. %s", e)
            return {}

    def note(self, name: str, path: str = "", stamp: str = "") -> None:
        """Remember that it was put up, or taken down."""
        try:
            self.noted.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.noted.with_suffix(".lock")):
                write_text(self.noted, json.dumps(self.notes() | {name: [path, stamp]}))
        except OSError as e:
            log.warning("After a restart, '%s' will not be as it is now: it cannot be noted. %s", name, e)

    def found(self, known: Mapping[str, Source]) -> dict[str, Source]:
        """What there is in the folders now. What is `known` and as it was is not read again."""
        there, noted = dict[str, Source](), self.notes()
        up = ((name, Path(path)) for name, (path, _) in noted.items() if path and Path(path).exists())
        for name, path in chain(up, *map(adapters_in, self.folders)):
            own = known.get(name)
            try:
                if name not in there:
                    same = own is not None and own.path == path and own.stamp == _stamp(path)
                    there[name] = own if same and own else Source.of(path, self.fingerprint)
            except FileNotFoundError:
                continue  # it went meanwhile
            except OSError:  # which may pass
                if own is not None:
                    there[name] = own
        return {name: source for name, source in there.items() if source.stamp not in noted.get(name, ())}

    def update(self, there: Mapping[str, Source]) -> None:
        """Take what the folders hold: what is new or was changed is added, what is gone is removed."""
        for name in self.seen.keys() - there.keys():
            if name in self.sources and self.sources[name].stamp == self.seen[name]:
                self.remove(name)
        for name, source in there.items():
            if source.stamp not in (self.seen.get(name), self.sources[name].stamp if name in self.sources else None):
                self.add(name, source)
        self.seen = {name: source.stamp for name, source in there.items()}

    def add(self, name: str, source: Source) -> Entry:
        """Know a persona by this name; whoever talks with one that had it goes on with that."""
        self.sources[name] = source
        return self.wardrobe.add(name, bytes.fromhex(source.stamp), lambda: self.read(source))

    def read(self, source: Source) -> Served:
        """An adapter as it is served here.

        Raises:
            UserError: it is damaged, not for this base, or was changed meanwhile.
        """
        return self.apart(source.read(self.model, self.fingerprint, self.kept))

    def remove(self, name: str) -> None:
        """Know it no longer; its files stay.

        Raises:
            UserError: there is none of this name.
        """
        self.wardrobe.remove(name)
        del self.sources[name]

    def worn(self, told: str, sees: Callable[[str], bool] = lambda _: True) -> Worn:
        """What a name means: a persona, `base`, or several with weights, `poet:0.7+chef:0.3`.

        Raises:
            UserError: there is no such persona, or not for who `sees` others only; says the nearest.
        """
        if (entry := self.wardrobe.entries.get(told)) is not None and sees(told):
            return ((entry, 1.0),)
        if told == BASE and sees(BASE):
            return ()
        # A copy, as the engine's thread may change them meanwhile.
        entries = {name: entry for name, entry in dict(self.wardrobe.entries).items() if sees(name)}
        blend = list[tuple[Entry, float]]()
        for part in told.split("+", MOST_BLENDED):
            name, weighed, weight = (word.strip() for word in part.partition(":"))
            if name not in entries:
                raise UserError(f"There is no persona '{name}'" + (" to blend" * (told != name)) + ".",
                                remedy=nearest(name, [*filter(sees, [BASE] * (told == name)), *entries]))  # fmt: skip
            if weighed and not re.fullmatch(r"-?(\d{1,3}\.?|\d{0,3}\.\d{1,6})", weight, re.ASCII):
                raise UserError(f"'{weight}' is no weight.", remedy=f"Say '{name}:0.5'.")
            blend.append((entries[name], float(weight) if weighed else 1.0))
        return tuple(blend)

    def sweep(self) -> None:
        """Delete laid files of adapters that are not here, unless a server of theirs used them not long ago."""
        stamps, old = {source.stamp for source in self.sources.values()}, time() - KEPT_SECONDS
        for file in self.kept.glob("*.slab"):
            with suppress(FileNotFoundError):  # another server deleted it
                if file.stem.partition("-")[0] not in stamps and file.stat().st_atime < old:
                    file.unlink()


def adapters_in(path: Path) -> Iterator[tuple[str, Path]]:
    """Adapters at a path, by name: one of ours or of PEFT's, a run that has ended, or a folder of any of these."""
    if (here := _adapter_at(path)) is not None:
        yield here
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            with suppress(OSError):  # others are there nevertheless
                if not child.name.startswith(".") and (here := _adapter_at(child)) is not None:
                    yield here


def _adapter_at(path: Path) -> tuple[str, Path] | None:
    if path.suffix == ".safetensors" and path.is_file():
        inside = path.absolute().parent
        return _legible(inside.parent.name if inside.name == "adapter" else path.stem), path
    if Run(path).adapter.is_file():
        return _legible(path.absolute().name), Run(path).adapter
    if (path / foreign.WEIGHTS).is_file():
        return _legible(path.absolute().name), path
    return None


def _legible(name: str) -> str:
    """A text that can be written: file systems and JSON know others."""
    return name.encode("utf-8", "replace").decode()


def _files(path: Path) -> Iterable[Path]:
    both = path / foreign.CONFIG, path / foreign.WEIGHTS
    return [path] if path.is_file() else [file for file in both if file.exists()]


def _stamp(path: Path) -> str:
    """Another whenever the files are: the system notes each change, which no program can undo."""
    stats = (file.stat() for file in _files(path))
    told = [str(path.absolute()), *(f"{s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in stats)]
    return hashlib.blake2b(os.fsencode("\n".join(told)), digest_size=16).hexdigest()
