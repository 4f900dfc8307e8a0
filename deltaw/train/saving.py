"""What a run leaves on the disk as it goes: checkpoints, the best adapter, the result. A full disk ends no run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from safetensors import SafetensorError

from deltaw.files import adapters
from deltaw.files.atomic import disk_is_full
from deltaw.settings import plain
from deltaw.train import checkpoint
from deltaw.train.checkpoint import Progress
from deltaw.train.events import Event, Saved, Warned
from deltaw.train.job import Job

SAVE_SECONDS = 120
LATER = "The disk is full: nothing was saved. Training goes on, and saving is tried again."


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

    def checkpoint(self, progress: Progress, random: checkpoint.Random | None = None) -> Iterator[Event]:
        """Write what the run resumes from; `random`: the state of random numbers, if not the present one."""
        written = []
        state = checkpoint.get_random(self.job.model.device) if random is None else random
        warned = list(guarded(lambda: written.append(
            checkpoint.save(self.job.run, self.job.adapter, self.optimizer, progress, state))))  # fmt: skip
        yield from () if self.full else warned  # once is enough until it is mended
        self.at, self.full = time.monotonic(), bool(warned)
        for path in written:
            self.step = progress.step
            yield Saved(step=progress.step, path=str(path))

    def best(self, progress: Progress, loss: float) -> Iterator[Event]:
        """Keep the adapter as the best so far."""
        warned = list(guarded(lambda: adapters.save(self.job.adapter, self.job.header, self.job.run.best)))
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
