"""Real micro-steps, whose gradients are thrown away: how long they take, and what they keep in memory.

Each is run through one layer and through four: layers are alike, so what thirty take lies on the same line. For time
that is true to a few per cent; for memory to a tenth and more, so what takes only seconds is run whole as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.data.batch import Batch
from deltaw.models.seen import Documents, Span
from deltaw.scoring.loss import batch_loss
from deltaw.train.job import Job
from deltaw.train.memory import peak_bytes, release, resident_bytes

LONG_SECONDS = 15.0
"""A micro-step that would take longer is never run whole to measure it."""
DEPTHS = (1, 4)
BEGINNING_TOKENS = 128


@dataclass(frozen=True)
class Cost:
    """What one micro-step takes: seconds, and the most bytes that the process then holds."""

    seconds: float
    peak_bytes: int


def cost(job: Job, batch: Batch) -> Cost:
    """Run one micro-step; of one that would take long, only a few layers."""
    few, more = DEPTHS
    layers, device = job.model.config.layers, job.model.device
    if layers <= more or device.type == "cuda":
        return Cost(micro_step(job, batch), peak_bytes(device))
    first, second, steps = _held(job, batch, few), _held(job, batch, more), (layers - few) / (more - few)
    seconds = first.seconds + steps * (second.seconds - first.seconds)
    if (
        seconds <= LONG_SECONDS
    ):  # the first time through, memory is fetched from the system, which takes time of its own
        return Cost(min(micro_step(job, batch), seconds), peak_bytes(device))
    return Cost(seconds, int(first.peak_bytes + steps * (second.peak_bytes - first.peak_bytes)))


def beginning(batch: Batch) -> Batch:
    """The first tokens of a micro-batch, all of them learnt: quickly run, and it keeps about as much for each token."""
    n = min(batch.tokens, BEGINNING_TOKENS)
    return replace(batch, ids_T=batch.ids_T[:n], at_T=torch.arange(n), labels_T=batch.ids_T[:n],
                   seen=Documents((Span(0, n),)), targets=n, row_tokens=n)  # fmt: skip


def kept_bytes(job: Job, batch: Batch) -> int:
    """Bytes that a micro-step keeps for its backward pass: those of one layer, and so often what a second one adds."""
    kept = []
    for depth in (1, 2):
        with counting(job.model) as count:
            micro_step(job, batch, depth)
        kept.append(count())
    return kept[0] + (job.model.config.layers - 1) * (kept[1] - kept[0])


def _held(job: Job, batch: Batch, depth: int) -> Cost:
    release()  # else what an earlier step left free would hide what this one takes
    with highest() as most:
        seconds = micro_step(job, batch, depth)
    return Cost(seconds, most())


def micro_step(job: Job, batch: Batch, depth: int | None = None) -> float:
    """Seconds of one forward and backward pass, through the first `depth` layers."""
    with clock() as seconds:
        loss = batch_loss(job.model, batch.to(job.model.device), job.recompute, depth)
        (loss / batch.targets).backward()  # type: ignore[no-untyped-call]
        if job.model.device.type == "cuda":
            torch.cuda.synchronize()
    return seconds()


@contextmanager
def counting(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes kept for the backward pass: each storage once, the frozen model's not."""
    frozen = {t.untyped_storage().data_ptr() for t in model.buffers()}
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        yield lambda: sum(kept.values())


@contextmanager
def highest() -> Iterator[Callable[[], int]]:
    """Watch the memory that the process holds; afterwards the given function says the most it was, in bytes."""
    most, over = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            most.append(max(most.pop(), resident_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        watcher.join()


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """Measure a `with` block; afterwards the given function says its seconds."""
    start = time.perf_counter()
    spent = [0.0]
    yield lambda: spent[0]
    spent[0] = time.perf_counter() - start
