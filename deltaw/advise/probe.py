"""Real micro-steps, whose gradients are thrown away: how long they take, and what they keep in memory.

One that takes only seconds is run whole. One that takes long is told from two of its layers and a few of its labels:
layers are alike, and so are labels.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.data.batch import IGNORED, Batch
from deltaw.kernels.memory import peak_bytes
from deltaw.models.seen import Documents, Span
from deltaw.scoring.loss import batch_loss, cross_entropy
from deltaw.train.events import Job

LONG_SECONDS = 6.0
"""A micro-step that would take longer is never run whole to measure it."""
PROBED_LAYERS = 2
PROBED_LABELS = 512
BEGINNING_TOKENS = 128


@dataclass(frozen=True)
class Cost:
    """Seconds of a micro-step, and whether it was run whole: its memory was then really held."""

    seconds: float
    whole: bool


def cost(job: Job, batch: Batch) -> Cost:
    """Run one micro-step; of one that would take long, only two layers."""
    layers, device = job.model.config.layers, job.model.device
    if layers > PROBED_LAYERS and device.type != "cuda" and (long := _told(job, batch)) > LONG_SECONDS:
        return Cost(long, whole=False)
    most, seconds = peak_bytes(device), micro_step(job, batch)
    if peak_bytes(device) > most:  # it fetched memory from the system, which takes time, and only once
        seconds = min(seconds, micro_step(job, batch))
    return Cost(seconds, whole=True)


def _told(job: Job, batch: Batch) -> float:
    some = with_labels(batch, PROBED_LABELS)
    head = head_seconds(job, some.targets)
    through = micro_step(job, some, PROBED_LAYERS) - head
    return through * job.model.config.layers / PROBED_LAYERS + head * batch.targets / some.targets


def with_labels(batch: Batch, most: int) -> Batch:
    """The batch with no more than its first `most` labels."""
    labels_T = batch.labels_T.clone()
    labels_T[(labels_T != IGNORED).cumsum(0) > most] = IGNORED
    return replace(batch, labels_T=labels_T, targets=min(batch.targets, most))


def head_seconds(job: Job, targets: int) -> float:
    """Seconds that the loss of so many tokens takes, forward and backward, once their hidden states are there."""
    h_ND = torch.zeros(targets, job.model.config.width, dtype=job.model.dtype, device=job.model.device)
    labels_N = torch.zeros(targets, dtype=torch.long, device=job.model.device)
    with clock() as seconds:
        loss = cross_entropy(h_ND.requires_grad_(), job.model.head_VD(), labels_N, job.model.config.logit_cap)
        loss.backward()  # type: ignore[no-untyped-call]
    return seconds()


def beginning(batch: Batch) -> Batch:
    """The first tokens of a micro-batch, all of them learnt: quickly run, and it keeps about as much for each token."""
    n = min(batch.tokens, BEGINNING_TOKENS)
    return replace(batch, ids_T=batch.ids_T[:n], at_T=torch.arange(n), labels_T=batch.ids_T[:n],
                   seen=Documents((Span(0, n),)), targets=n, row_tokens=n)  # fmt: skip


def kept_bytes(job: Job, batch: Batch) -> int:
    """Bytes that a micro-step keeps for its backward pass: those of one layer, and so often what a second one adds."""
    kept = []
    for depth in (1, 2):
        with counting(job.model, job.adapter) as count:
            micro_step(job, batch, depth)
        kept.append(count())
    return kept[0] + (job.model.config.layers - 1) * (kept[1] - kept[0])


def micro_step(job: Job, batch: Batch, depth: int | None = None) -> float:
    """Seconds of one forward and backward pass, through the first `depth` layers."""
    with clock() as seconds:
        loss = batch_loss(job.model, batch.to(job.model.device), job.recompute, depth)
        (loss / batch.targets).backward()  # type: ignore[no-untyped-call]
        if job.model.device.type == "cuda":
            torch.cuda.synchronize()
    return seconds()


@contextmanager
def counting(*modules: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes kept for the backward pass: each storage once; what belongs to the modules is there anyway."""
    there = {t.untyped_storage().data_ptr() for m in modules for t in (*m.buffers(), *m.parameters())}
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        yield lambda: sum(kept.values())


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """Measure a `with` block; afterwards the given function says its seconds."""
    start = time.perf_counter()
    spent = [0.0]
    yield lambda: spent[0]
    spent[0] = time.perf_counter() - start
