"""What a run leaves on the disk as it goes: checkpoints, the best adapter, the result. A full disk ends no run.

From a checkpoint a run resumes bit for bit: adapter, Adam's moments, random state and counters, all in one file.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.errors import explained
from deltaw.files import adapters
from deltaw.files.adapters import read_said, read_tensors, sealed
from deltaw.files.atomic import disk_is_full, replacing
from deltaw.files.runs import Run
from deltaw.settings import plain
from deltaw.train.events import Event, Job, Saved, Warned

KEPT, KEY = 2, "progress"
SAVE_SECONDS = 120
LATER = "The disk is full: nothing was saved. Training goes on, and saving is tried again."
Random = dict[str, Tensor]


@dataclass
class Progress:
    """Where a run is: everything that decides the next step and is no tensor."""

    step: int = 0
    steps: int = 0
    """How many there will be, which the schedule of the rate goes by."""
    rate_scale: float = 1.0
    skipped: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    seconds: float = 0.0


def save(run: Run, adapter: Adapter, optimizer: torch.optim.Optimizer, progress: Progress, random: Random) -> None:
    """Write a checkpoint of the moment before step `progress.step`, and forget all but the last two.

    Raises:
        Diverged: a value is not finite; nothing is written.
        OSError: the disk is full or cannot be written.
    """
    tensors = {f"adapter.{name}": t for name, t in adapters.state(adapter).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": t.detach().cpu().contiguous() for key, t in state.items()}
    tensors |= {f"random.{device}": state for device, state in random.items()}
    adapters.refuse_nan(tensors)
    path = run.folder / "checkpoints" / f"step-{progress.step:07d}.safetensors"
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=sealed(KEY, asdict(progress), tensors))
    for old in run.checkpoints()[:-KEPT]:
        old.unlink()


def load(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Put a checkpoint back into the adapter, the optimizer and torch's random state.

    Raises:
        UserError: the file is damaged or does not fit this adapter.
    """
    with explained("The checkpoint is damaged.", SafetensorError, OSError, TypeError, KeyError, ValueError,
                   where=path, remedy="No other is left: train anew."), safe_open(path, "pt") as file:  # fmt: skip
        progress = Progress(**(read_said(file, KEY) or {}))
        tensors = read_tensors(file, KEY)
    adapters.put(adapter, _part(tensors, "adapter."), str(path))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, t in _part(tensors, "optimizer.").items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = t
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    set_random(_part(tensors, "random."), device)
    return progress


def get_random(device: torch.device) -> Random:
    """The state of torch's random numbers: those of the processor, and of the device where it is another."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random(random: Random, device: torch.device) -> None:
    """Put random numbers back to where they were; those of a device that this run is not on are left alone."""
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "device" in random:
        torch.cuda.set_rng_state(random["device"], device)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


class Saver:
    """Writes a run's files, and knows what was written last."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self.job, self.optimizer = job, optimizer
        self.at, self.step, self.full = time.monotonic(), -1, False

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this many steps."""
        if asked := self.job.settings.save_every:
            return step % asked == 0
        return self.job.evaluates(step) or time.monotonic() - self.at > SAVE_SECONDS

    def checkpoint(self, progress: Progress, random: Random | None = None) -> Iterator[Event]:
        """Write what the run resumes from; `random`: the state of random numbers, if not the present one."""
        job, state = self.job, get_random(self.job.model.device) if random is None else random
        warned = list(guarded(lambda: save(job.run, job.adapter, self.optimizer, progress, state)))
        yield from () if self.full else warned  # once is enough until it is mended
        self.at, self.full = time.monotonic(), bool(warned)
        if not warned:
            self.step = progress.step
            yield Saved(step=progress.step, path=str(job.run.checkpoints()[-1]))

    def best(self, progress: Progress, loss: float) -> Iterator[Event]:
        """Keep the adapter as the best so far, if each process can: what comes of it must be so for all."""
        told = guarded(lambda: adapters.save(self.job.adapter, self.job.header, self.job.run.best))
        warned = next(filter(None, self.job.ranks.all([*told])), [])
        yield from warned
        if not warned:  # else the file still holds the one before
            progress.best_loss, progress.best_step = loss, progress.step

    def take_best(self) -> None:
        """Put the best adapter in the place of the last."""
        adapters.put(self.job.adapter, adapters.read(self.job.run.best)[1], str(self.job.run.best))

    def result(self) -> Iterator[Event]:
        """Write the adapter as what the run made; whether it was, `run.adapter` tells."""
        kept = self.job.adapter.method.finished(self.job.adapter)
        header = replace(self.job.header, settings=plain(kept.method))
        yield from guarded(lambda: adapters.save(kept, header, self.job.run.adapter))


def guarded(write: Callable[[], object], text: str = LATER) -> Iterator[Warned]:
    """Run `write`; a full disk becomes a warning."""
    try:
        write()
    except (OSError, SafetensorError) as e:
        if not disk_is_full(e):
            raise
        yield Warned(text=text)
