"""The run folder: everything one training run was told, did and made, in one place.

config.yaml     the settings as resolved        plan.json       predicted and measured time and memory
events.jsonl    what happened, line by line     checkpoints/    what a run resumes from; the last two
adapter/        the result                      report.html     the same for people
manifest.json   fingerprints of base, tokenizer, template and data, and the settings once more
MODEL_CARD.md   what was made, from what, and what was measured
"""

import atexit
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError, explained, nearest
from deltaw.files import adapters
from deltaw.files.atomic import replacing_folder, write_text
from deltaw.models.ranks import Ranks

FORMAT = 2
"""Of the run folder; a folder of a higher one was made by a newer version."""
MOVABLE = ("base", "runs", "device", "threads")
"""Settings that may be others when a run goes on: where things are, and not what they are."""
RUNS = Path("runs")
"""Where run folders are made and looked for, if nothing else is said."""


@dataclass
class Run:
    """Paths in a run folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.name = self.folder.name
        self.adapter = self.folder / "adapter" / "adapter.safetensors"
        """The result, in our one-file form."""
        self.best = self.folder / "checkpoints" / "best.safetensors"
        """The adapter with the best validation loss so far."""
        self.config = self.folder / "config.yaml"
        """The settings as resolved."""
        self.events = self.folder / "events.jsonl"
        """What happened, one JSON object a line."""
        self.plan = self.folder / "plan.json"
        """Predicted and measured time and memory."""
        self.manifest = self.folder / "manifest.json"
        """Fingerprints of base, tokenizer, template and data."""

    @property
    def there(self) -> bool:
        """Whether this is a run: one that was begun here, or an adapter that was imported."""
        return self.config.exists() or self.adapter.exists()

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob(f"step-{7 * '[0-9]'}.safetensors"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from training this run, for the length of a `with` block.

        Raises:
            UserError: another one is at it. The system lets go of the lock when its process ends, however that ends.
        """
        with explained(f"The run '{self.name}' is being trained by another process.", Timeout, where=self.folder,
                       why="", remedy="Wait for it, or stop it with Ctrl-C."):  # fmt: skip
            taken = FileLock(self.folder / ".lock", blocking=False).acquire()
        with taken:
            yield

    def busy(self) -> bool:
        """Whether a process is training this run now."""
        try:
            with self.held():
                return False
        except UserError:
            return True

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, verb: str) -> str:
        """The command that does this with the run: `deltaw chat village --runs elsewhere`."""
        elsewhere = "" if self.folder.parent == RUNS else f" --runs {shlex.quote(str(self.folder.parent))}"
        return f"deltaw {verb} {shlex.quote(self.name)}{elsewhere}"

    def touched(self) -> float:
        """When the run was begun, saved or ended: the last of these, in seconds."""
        files = [path for path in (self.config, self.adapter, *self.checkpoints()) if path.exists()]
        return max(path.stat().st_mtime for path in files)

    def read_config(self) -> dict[str, Any]:
        """The settings that the run was made with.

        Raises:
            UserError: the folder has none.
        """
        if self.adapter.exists() and not self.config.exists():
            raise UserError("This persona was imported or combined: it was not trained here.", where=str(self.folder))
        with explained("This run folder has no readable config.yaml.", OSError, yaml.YAMLError, TypeError, ValueError,
                       KeyError, RecursionError, where=self.folder,
                       remedy="Put it back as it was, or train anew."):  # fmt: skip
            values = dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
            json.dumps(values, default=str)
            if not (isinstance(values["data"], list) and all(isinstance(name, str) for name in values["data"])):
                raise TypeError("data is no list of files")
            return values

    def write_config(self, values: dict[str, Any]) -> None:
        """Write the settings as resolved."""
        write_text(self.config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def read_manifest(self) -> dict[str, Any]:
        """What the run was begun with, which must be so still when it goes on.

        Raises:
            UserError: there is none, or one of another format, or the settings are not those it was begun with.
        """
        anew = f"Train anew with its settings: deltaw train --config {shlex.quote(str(self.config))}"
        with explained("This run folder has no readable manifest.json.", OSError, ValueError, TypeError, KeyError,
                       RecursionError, where=self.folder, why="{kind}: {error}.", remedy=anew):  # fmt: skip
            told = json.loads(self.manifest.read_text(encoding="utf-8"))
            made, settings = told["format"], dict(told["settings"] if told["format"] == FORMAT else {})
        if made != FORMAT:
            newer = isinstance(made, int) and made > FORMAT
            raise UserError(f"The run '{self.name}' is of format {made}, and this version goes on with {FORMAT}.",
                            where=str(self.manifest), remedy="Update deltaw." if newer else anew)  # fmt: skip
        now = json.loads(json.dumps(self.read_config(), default=str))
        if odd := next((key for key in {**settings, **now}
                        if key not in MOVABLE and settings.get(key) != now.get(key)), None):  # fmt: skip
            raise UserError(f"'{odd}' is not what the run '{self.name}' was begun with.", where=str(self.config),
                            why=f"It is {now.get(odd)}, and was {settings.get(odd)}.",
                            remedy="Put it back, or train anew: deltaw train --config FILE")  # fmt: skip
        return dict(told)

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Write one of the folder's JSON files."""
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def create(runs: Path, name: str | None, stem: str, method: str) -> Run:
    """Make a new run folder, called `name`, or by the data, the method and the first free number.

    Raises:
        UserError: a run of this name is there already.
    """
    if name is not None:
        run = Run(runs / name)
        go_on = f", or go on with it: {run.command('train --resume')}" if run.there else "."
        fresh(name, runs, f"--name{go_on}").folder.mkdir(parents=True)
        return run
    runs.mkdir(parents=True, exist_ok=True)
    stem, number = stem.lstrip(".-") or "run", 1
    while True:
        with suppress(FileExistsError):
            (folder := runs / f"{stem}-{method}-{number}").mkdir()
            return Run(folder)
        number += 1


def fresh(name: str, runs: Path, flag: str) -> Run:
    """The run that is to be made under this name.

    Raises:
        UserError: it is no name, or there is such a run already; then `flag` gives another.
    """
    check_name(name)
    run = Run(runs / name)
    if run.folder.exists():
        raise UserError(f"There is a run '{name}' already.", where=str(run.folder), remedy=f"Take another {flag}")
    return run


def kept(adapter: Adapter, header: adapters.Header, run: Run) -> Path:
    """Save an adapter that was not trained here as a run of its own: its file."""
    with replacing_folder(run.folder) as scratch:
        adapters.save(adapter, header, Run(scratch).adapter)
    return run.adapter


def check_name(name: str) -> None:
    """Stop at what is no name for a run.

    Raises:
        UserError: it is empty, has other characters, or begins as a hidden folder or a flag does.
    """
    if not name or re.search(r"[^\w.-]", name) or name[0] in ".-":
        raise UserError(f"{name!r} is no name for a run.", remedy="Take a --name of letters, digits, '-', '_' and '.'.")


def find(name: str | None, runs: Path, suits: Callable[[Run], bool] = lambda _: True) -> Run:
    """Find a run by its name or path; without one, the newest that `suits`.

    Raises:
        UserError: there is no such run.
    """
    known = sorted((Run(p) for p in runs.glob("[!.]*") if Run(p).there), key=Run.touched)
    if name is None:
        if newest := next((run for run in reversed(known) if suits(run)), None):
            return newest
        raise _nothing_suits(known, runs)
    for folder in (runs / name, Path(name)):
        if Run(folder).there:
            return Run(folder)
    if Path(name).exists():
        raise UserError("This is no run.", where=name,
                        remedy="Give a model with --base; of a PEFT folder deltaw import makes a run.")  # fmt: skip
    remedy = nearest(name, [run.name for run in known]) if known else "Train one: deltaw train FILE"
    raise UserError(f"There is no run '{name}'.", where=str(runs), remedy=remedy)


def _nothing_suits(known: list[Run], runs: Path) -> UserError:
    """Why none of the runs can be taken, and what to do with the newest."""
    if not known:
        return UserError("There is no run yet.", where=str(runs), remedy="Train one: deltaw train FILE")
    newest = known[-1]
    if newest.adapter.exists():
        return UserError("Every run has ended.", where=str(runs), remedy=newest.command("chat"))
    if newest.busy():
        return UserError(f"The run '{newest.name}' is still being trained.", where=str(runs), remedy="Wait for it.")
    return UserError(f"The run '{newest.name}' has not ended.", where=str(runs),
                     remedy=f"Go on with it: {newest.command('train --resume')}")  # fmt: skip


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def for_all(ranks: Ranks, find: Callable[[], Run]) -> Run:
    """The run that the first process makes or finds; others have a copy of what it begins with, until they end."""
    run = Run(Path(tempfile.mkdtemp(prefix="deltaw-"))) if ranks.own else find()
    if ranks.own:
        atexit.register(run.remove)
    files = [] if ranks.own or ranks.count == 1 else [run.config, run.manifest, run.plan, run.best, *run.checkpoints()]
    there = {str(f.relative_to(run.folder)): f.read_bytes() for f in files if f.exists()}
    told = ranks.agreed(there)
    for name, content in told.items() if ranks.own else ():
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_bytes(content)
    return run
