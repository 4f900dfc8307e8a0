"""`deltaw serve`: one model, many personas, over HTTP as OpenAI's clients speak it."""

import importlib.util
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import Annotated, Any

import yaml
from cyclopts import Parameter
from rich.console import Console

from deltaw.cli.show import Flat, busy
from deltaw.errors import UserError, explained
from deltaw.files.atomic import write_text
from deltaw.files.runs import check_name
from deltaw.settings import KEY, Machine, Rights, Serving, plain, read_yaml
from deltaw.web.keys import hashed
from deltaw.words import some

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart", "llguidance")


def serve(*, base: str | None = None, base_format: str = "",
          personas: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
          serving: Flat[Serving] = None,
          machine: Flat[Machine] = None) -> None:  # fmt: skip
    """Serve a base and its personas, each of which is a model by its name.

    Parameters
    ----------
    base
        The base model. By default: that of the first persona.
    base_format
        Pack the base's matrices: nf4-dq, int4-g32, … By default: as the first persona's were.
    personas
        Adapter files, runs, PEFT folders, or folders of these, which are looked at all the time. By default: runs.
    """
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        raise UserError(f"The server needs {', '.join(missing)}.", remedy="pip install 'deltaw[serve]'")
    from deltaw.api.persona import load_base
    from deltaw.serve.parallel import follow, joined
    from deltaw.web.app import application
    from deltaw.web.server import Listener, bound, hub_of

    serving, folders = serving or Serving(), [Path("runs")] if personas is None else personas
    serving = replace(serving, key=serving.key or os.environ.get(KEY, ""))
    if lost := next((folder for folder in personas or [] if not folder.exists()), None):
        raise UserError("There is no such file or folder.", where=str(lost))
    first, form = _trained_on(folders)
    if not (base or first):
        raise UserError(f"There is no adapter in {', '.join(map(str, folders))}, and no base is named.",
                        remedy="Take --base smollm2-135m, or other --personas.")  # fmt: skip
    machine, together = machine or Machine(), int(os.environ.get("WORLD_SIZE", serving.tensor_parallel))
    if (shared := max(together, serving.replicas)) > 1 and machine.threads is None:
        machine = replace(machine, threads=max(1, (os.cpu_count() or 1) // shared))
    load = partial(load_base, base or first, base_format=base_format or form, **plain(machine))
    if serving.replicas > 1:
        return _replicated(load, folders, serving)
    with nullcontext() if int(os.environ.get("RANK", 0)) else bound(serving) as at, joined(together) as ranks:
        if at is None:
            return follow(lambda: load().model, ranks)
        # In a thread that ends: what computes in this one would keep OpenMP's threads, and with more of them than cores
        # those of the engine sleep after each product.
        with busy() as say, ThreadPoolExecutor(1) as loader:
            loaded = loader.submit(load, say=say).result()
        with hub_of(loaded, folders, serving, ranks) as (hub, shelf):
            cards = [shelf.card(name) for name in shelf.catalog.sources]
            faulty = [card for card in cards if card["fault"]]
            console = _tell(f"{hub.name} with {some(len(cards) - len(faulty), 'persona')}", at, serving)
            for card in faulty:
                console.print(f"Not served: {card['id']}. {card['fault']}", style="yellow", markup=False)
            shelf.say = partial(console.print, markup=False)
            Listener(application(hub, shelf, serving), hub, shelf.say).run([at])
    return None


def _replicated(load: partial[Any], folders: list[Path], serving: Serving) -> None:
    if serving.tensor_parallel > 1:
        raise UserError("A replica is one process.", remedy="Leave --tensor-parallel or --replicas out.")
    from deltaw.models import source

    source.find(load.args[0])  # told here if it is not there, and fetched once
    with explained("Replicas need Ray.", ImportError, remedy="pip install 'deltaw[serve,scale]'"):
        from deltaw.web.replicas import front, replicas_of
    import uvicorn

    from deltaw.web.server import bound

    with bound(serving) as at, replicas_of(load, [folder.absolute() for folder in folders], serving) as replicas:
        _tell(some(serving.replicas, "replica"), at, serving)
        uvicorn.Server(uvicorn.Config(front(replicas, serving), log_level="warning", access_log=False)).run([at])


def key(name: str, /, *, file: Path = Path("keys.yaml"), rights: Flat[Rights] = None) -> None:
    """Make a key and print it, once; `deltaw serve --keys FILE` lets in who brings it.

    Parameters
    ----------
    name
        Who it is for; in what is measured, too.
    file
        Where a hash of it and what it is for are written, beside those of others. A server takes changes at once.
    """
    check_name(name)
    told = read_yaml(file) if file.exists() else {}
    if name in told:
        raise UserError(f"There is a key '{name}' already.", where=str(file), remedy="Delete its entry first.")
    drawn = f"dw-{secrets.token_urlsafe(32)}"
    given = {field: value for field, value in plain(rights or Rights()).items() if value}
    told[name] = {"sha256": hashed(drawn), **given}
    write_text(file, yaml.safe_dump(told, sort_keys=False))
    sys.stdout.write(f"{drawn}\n")


def _trained_on(folders: list[Path]) -> tuple[str, str]:
    """The base of the first persona, and how it was packed."""
    from deltaw.files import adapters
    from deltaw.serve.catalog import Source, adapters_in

    for path in (path for folder in folders for _, path in adapters_in(folder)):
        if path.is_dir():
            return Source.of(path, "").base, ""
        header = adapters.read_header(path)
        return header.base, header.base_format
    return "", ""


def _tell(what: str, at: socket, serving: Serving) -> Console:
    """Where it is."""
    console, url = Console(highlight=False, soft_wrap=True), f"http://{serving.host}:{at.getsockname()[1]}"
    lines = f"{what} at {url}", f"  a page to talk with them   {url}/", f"  for OpenAI's clients       {url}/v1"
    console.print(*lines, sep="\n", markup=False)
    return console
