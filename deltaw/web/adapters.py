"""Adapters over HTTP: listed, put up by path or by upload, taken down, and followed in the folders they come from."""

import asyncio
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile

from deltaw.errors import UserError
from deltaw.files import foreign
from deltaw.files.atomic import replacing_folder
from deltaw.files.runs import check_name
from deltaw.serve.catalog import BASE, Source, adapters_in
from deltaw.web.answers import Hub, UnknownModel
from deltaw.web.asked import AdapterAsked, LoadAsked, UnloadAsked
from deltaw.web.keys import Tenant

WATCH_SECONDS = 2.0
"""How often folders are looked at."""
LONGEST_NAME = 100
PARTS = {"adapter.safetensors", foreign.CONFIG, foreign.WEIGHTS}
"""Files that an adapter is uploaded as: ours, or PEFT's two."""


class Shelf:
    """The personas of a hub, as they are put up and taken down over HTTP. Uploads go to the first of its folders."""

    def __init__(self, hub: Hub, created: int) -> None:
        self.hub, self.catalog, self.created = hub, hub.catalog, created
        self.say: Callable[[str], None] = lambda _: None
        """Told what changes, a line each."""

    async def look(self) -> None:
        """Take in what changed in the folders."""
        before = dict(self.catalog.sources)
        await self._do(partial(self.catalog.update, await asyncio.to_thread(self.catalog.found, before)))
        for name in before.keys() | self.catalog.sources.keys():
            was, now = before.get(name), self.catalog.sources.get(name)
            if was != now:
                self.say(f"{'-' if now is None else '+' if was is None else '~'} {name} {now.fault if now else ''}")

    async def put(self, name: str, path: Path) -> dict[str, Any]:
        """Let the adapter at a path be known by a name, once it was read whole.

        Raises:
            UserError: it is outside the folders, or no adapter of this base; says what does not fit.
        """
        _check_name(name, self.hub.name)
        if not any(path.resolve().is_relative_to(folder.resolve()) for folder in self.catalog.folders):
            raise UserError("This path is in none of the folders that are served.", where=str(path))
        found = next((at for _, at in adapters_in(path)), None)
        if found is None:
            raise UserError("There is no adapter here.", where=str(path))
        source = await asyncio.to_thread(Source.of, found, self.catalog.fingerprint)
        await asyncio.wrap_future(self.catalog.wardrobe.reader.submit(self.catalog.read, source))
        await asyncio.to_thread(self.catalog.note, name, str(source.path.absolute()))
        await self._do(partial(self.catalog.add, name, source))
        self.say(f"+ {name} from {found}")
        return self.card(name)

    async def upload(self, name: str, parts: list[UploadFile]) -> dict[str, Any]:
        """Take an adapter's files, as a new one of this name; nothing is left of one that does not fit."""
        _check_name(name, self.hub.name)
        names = sorted(str(part.filename) for part in parts)
        if not self.catalog.folders:
            raise UserError("This server has no folder for adapters.", remedy="Start it with --personas FOLDER.")
        if names not in (["adapter.safetensors"], [foreign.CONFIG, foreign.WEIGHTS]):
            raise UserError(f"Files are called {', '.join(sorted(PARTS))}: ours, or PEFT's two.")
        folder = self.catalog.folders[0] / name
        if name in self.catalog.sources:
            raise UserError(f"There is an adapter '{name}' already.", remedy="Take another name, or take it down.")
        await asyncio.to_thread(_store, folder, parts)
        try:
            return await self.put(name, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    async def drop(self, name: str) -> None:
        """Know it no longer; whoever talks with it is answered to the end, and its files stay."""
        if (source := self.catalog.sources.get(name)) is None:
            raise UnknownModel(f"There is no persona '{name}'.")
        await asyncio.to_thread(self.catalog.note, name, "", source.stamp)
        await self._do(partial(self.catalog.remove, name))
        self.say(f"- {name}")

    def card(self, name: str) -> dict[str, Any]:
        """What there is to say of a persona, or of the base."""
        told = {"id": name, "object": "model", "created": self.created, "owned_by": "deltaw"}
        if name == self.hub.name:
            return {**told, "root": str(self.hub.base.path), "parent": None, "base": name, "method": None, "rank": None,
                    "system": "", "hash": self.hub.base.fingerprint, "state": "ready",
                    "max_model_len": self.hub.base.model.context}  # fmt: skip
        source, entry = self.catalog.sources[name], self.catalog.wardrobe.entries[name]
        served = entry.served
        return {**told, "root": str(source.path), "parent": self.hub.name, "base": source.base,
                "method": source.method, "rank": source.rank, "system": source.system,
                "bytes": served.size_bytes if served else None, "hash": served.digest.hex() if served else None,
                "shares_batch": served.alone is None if served else None,
                "state": entry.state, "fault": entry.fault or source.fault or None}  # fmt: skip

    def cards(self, tenant: Tenant, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Of the base and all personas, or of these, as far as a tenant sees them, and of none that goes meanwhile.

        Where files lie, and what is wrong with them, is for who manages the server.
        """
        for name in [self.hub.name, *self.catalog.sources] if names is None else names:
            with suppress(KeyError):
                if tenant.sees(BASE if name == self.hub.name else name):
                    card = self.card(name)
                    yield card if tenant.rights.manage else {**card, "root": name, "base": self.hub.name, "fault": None}

    async def _do(self, work: Any) -> Any:
        return await asyncio.wrap_future(self.hub.service.do(work))


def adapter_routes(routes: APIRouter, shelf: Shelf) -> None:
    """What is said of adapters over HTTP."""

    @routes.post("/v1/adapters", status_code=201)
    async def put(asked: AdapterAsked) -> dict[str, Any]:
        """Put up an adapter that lies in one of the folders that are served."""
        return await shelf.put(asked.name, Path(asked.path))

    @routes.post("/v1/adapters/upload", status_code=201)
    async def upload(name: Annotated[str, Form()], files: list[UploadFile]) -> dict[str, Any]:
        """Upload an adapter: `adapter.safetensors`, or PEFT's two files."""
        return await shelf.upload(name, files)

    @routes.delete("/v1/adapters/{name}")
    async def drop(name: str) -> dict[str, Any]:
        """Take an adapter down; its files stay."""
        await shelf.drop(name)
        return {"id": name, "object": "model", "deleted": True}

    @routes.post("/v1/load_lora_adapter")
    async def load(asked: LoadAsked) -> str:
        """Put up an adapter, in vLLM's words."""
        if asked.lora_name in shelf.catalog.sources and not asked.load_inplace:
            raise UserError(f"There is an adapter '{asked.lora_name}' already.", remedy="Say load_inplace: true.")
        await shelf.put(asked.lora_name, Path(asked.lora_path))
        return f"Success: LoRA adapter '{asked.lora_name}' added successfully."

    @routes.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadAsked) -> str:
        """Take an adapter down, in vLLM's words."""
        await shelf.drop(asked.lora_name)
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def _check_name(name: str, base: str) -> None:
    check_name(name)
    if len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise UserError(f"A name has {LONGEST_NAME} letters at most.")
    if name in (BASE, base):
        raise UserError(f"'{name}' is what the base is called.")


def _store(folder: Path, parts: list[UploadFile]) -> None:
    there = UserError("Here are files already.", where=str(folder), remedy="Put them up by their path.")
    if folder.exists():
        raise there
    try:
        with replacing_folder(folder) as scratch:
            inside = scratch / "adapter" if len(parts) == 1 else scratch  # where it is found again: as in a run
            inside.mkdir(exist_ok=True)
            for part in parts:
                with (inside / str(part.filename)).open("wb") as file:
                    shutil.copyfileobj(part.file, file)
    except OSError as e:
        raise there if e.errno == errno.ENOTEMPTY else e from None  # they came meanwhile, here or by another replica
