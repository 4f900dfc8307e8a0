"""A server from its parts to its end: the base and the engine, an address, and everybody answered before it closes."""

import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deltaw.api.persona import Base
from deltaw.errors import UserError, explained
from deltaw.models import source
from deltaw.models.ranks import ALONE, Ranks, part_of
from deltaw.serve.catalog import BASE, Catalog
from deltaw.serve.engine import Engine
from deltaw.serve.grammar import Grammars
from deltaw.serve.parallel import Leader
from deltaw.serve.service import Service
from deltaw.settings import Serving
from deltaw.web.adapters import Shelf
from deltaw.web.answers import Hub, Post
from deltaw.web.metrics import Metrics
from deltaw.words import some

GIGABYTE = 1 << 30


@contextmanager
def hub_of(base: Base, folders: Sequence[Path], serving: Serving,
           ranks: Ranks = ALONE) -> Iterator[tuple[Hub, Shelf]]:  # fmt: skip
    """A base with the personas of these files and folders, answering until the end of a `with` block.

    `ranks`: processes that compute it together, of which this is the first.
    """
    model = base.model if ranks.count == 1 else part_of(base.model, ranks.part)
    engine = Engine(model, int(serving.budget_gb * GIGABYTE), serving.most, serving.chunk)
    if engine.arena.count < serving.most:
        least = math.ceil(1000 * serving.most * engine.arena.page_bytes / GIGABYTE) / 1000
        raise UserError(f"{serving.budget_gb:g} GB have no room for {serving.most} answers at once.",
                        remedy=f"Take --budget-gb {least} or more, or a smaller --most.")  # fmt: skip
    catalog = Catalog(base.model, base.fingerprint, engine.wardrobe, folders, source.cache() / "served")
    if ranks.count > 1:
        catalog.apart = Leader(base.model, engine, ranks).apart
    catalog.update(catalog.found({}))
    catalog.sweep()
    name = (Path(base.name).name or base.path.resolve().name) if Path(base.name).exists() else base.name
    with Service(engine) as service:
        hub = Hub(base, name or BASE, service, catalog, Grammars(base.tokenizer, base.model.config.vocab),
                  Metrics(engine), Post(), serving)  # fmt: skip
        yield hub, Shelf(hub, int(time.time()))
    ranks.agreed(None)  # so that the others end


def bound(serving: Serving) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: nobody but this machine should ask without a key, or the address cannot be had.
    """
    if not serving.alone and not serving.key and not serving.keys:
        raise UserError(f"At {serving.host} everybody could ask, and there is no key.",
                        remedy="Set DELTAW_API_KEY, take --keys, or leave --host out.")  # fmt: skip
    with explained("The server cannot listen here.", OSError, where=f"{serving.host}:{serving.port}",
                   why="{error.strerror}.", remedy="Take another --port."):  # fmt: skip
        return socket.create_server((serving.host, serving.port))


class Listener(uvicorn.Server):
    """One that is asked to end lets everybody be answered; asked once more, it cuts them; a third time, it is gone."""

    def __init__(self, app: FastAPI, hub: Hub, say: Callable[[str], None]) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on",
                                        timeout_keep_alive=60))  # fmt: skip
        self.hub, self.say = hub, say

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self.hub.service
        left, first = len(service.engine.running) + len(service.engine.waiting), not self.should_exit
        self.hub.ending = True
        if not first and not service.closed:
            service.close()
            self.should_exit = False  # or uvicorn would leave before everybody heard so
        super().handle_exit(sig, frame)
        if first and left:  # at the end, as it may be asked again before this is said
            self.say(f"Ending, once {some(left, 'answer')} under way are whole; asked again, without them.")
