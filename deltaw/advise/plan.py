"""How long a run will take and how much memory: measured on real micro-steps, whose gradients are thrown away.

The shortest, the median and the longest micro-batch of the first epoch are run forward and backward. What the others
take is interpolated over the arithmetic they need; evaluations, samples and checkpoints are measured and added. Memory
is what the process held at most in the longest micro-step, or, where that was not run whole, what it keeps for its
backward pass, counted; and what is not there yet, Adam's moments.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from deltaw.advise.machine import available_bytes
from deltaw.advise.probe import Cost, beginning, clock, cost, kept_bytes, micro_step
from deltaw.data.batch import Batch, micro_batches, per_epoch, steps
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, WillNotFit, explained
from deltaw.kernels.memory import frugal, held_bytes, peak_bytes, resident_bytes
from deltaw.models.checkpoint import read_json
from deltaw.scoring.loss import batch_loss
from deltaw.settings import Count, complaint
from deltaw.train.checkpoint import SAVE_SECONDS, get_random, set_random
from deltaw.train.events import SAMPLE_TOKENS, Job

SPREAD = 0.15
"""Half the width of the shown range: how much the same step varies on a quiet machine."""
MOMENTS_BYTES = 8
"""Adam's two moments, in fp32, per trained number."""
HELD_PER_KEPT = 1.5
"""Bytes held in the backward pass per byte kept for it, measured: a layer's gradients, and above all gaps in the heap.

glibc cannot give a freed aligned block to the next request of its size once a small object lies at its edge.
"""
PROBED_TOKENS = 6
SEEN_STEPS = 1000
"""Steps whose micro-batches are looked at."""
ALIKE = 0.95
"""A micro-batch with more than this share of another's work tells nothing new."""


@dataclass(frozen=True)
class Plan:
    """What a run takes. `seconds` covers steps, evaluations, samples and checkpoints."""

    steps: Count
    seconds: float
    step_seconds: float
    fixed_seconds: float
    peak_bytes: int
    available_bytes: int
    recompute: bool
    notices: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan that a run was begun with.

        Raises:
            UserError: the file is damaged.
        """
        anew = "Remove the file; the run is then planned anew."
        try:
            values = read_json(path)
        except UserError as e:
            e.remedy = anew
            raise
        values.pop("actual", None)
        with explained("The plan cannot be understood.", ValidationError, where=path, why=complaint, remedy=anew):
            return TypeAdapter(cls).validate_python(values)

    def after(self, done: int) -> float:
        """Seconds that `done` steps of the plan take."""
        return self.seconds * done / self.steps


def through(costs: dict[float, Cost]) -> Callable[[float], float]:
    """Seconds by arithmetic, in operations: on the line through measured points; more work never takes less."""
    points = sorted(costs)
    seconds = np.maximum.accumulate([costs[p].seconds for p in points]).tolist()

    def line(operations: float) -> float:
        if operations >= points[-1]:  # beyond the last in proportion
            return float(seconds[-1] * operations / points[-1])
        return float(np.interp(operations, points, seconds))

    return line


def measure(job: Job, minutes: float | None = None) -> Plan:
    """Plan the run `job`; with `minutes`, choose as many steps as they allow.

    Raises:
        WillNotFit: it needs more memory than there is, whatever can be saved.
        UserError: the minutes do not allow one step.
    """
    epoch = _first_steps(job)
    longest = micro_batches([job.rows[job.rows.longest()]], job.settings.micro_tokens)
    batches = sorted((b for step in [*epoch, longest] for b in step), key=lambda b: operations(b, job))
    random = get_random(job.model.device)
    with job.adapter.on():
        job.adapter.train()
        micro_step(job, beginning(batches[-1]))  # the first is slower: weights are read, kernels are prepared
        held = resident_bytes()
        recompute, need, notices = _fitting(job, batches)
        job = replace(job, recompute=recompute)
        with frugal(recompute):
            costs = _measured(job, batches)
        work, peak = through(costs), peak_bytes(job.model.device)
        if not all(c.whole for c in costs.values()):
            peak = max(peak, held + need)
        peak += _moments_bytes(job)
        step_seconds = sum(work(operations(b, job)) for step in epoch for b in step) / len(epoch)
        fixed = _evaluation_seconds(job)
    job.adapter.zero_grad(set_to_none=False)
    set_random(random, job.model.device)
    total = job.steps if minutes is None else _within(minutes, step_seconds, fixed, job)
    seconds = total * step_seconds + fixed
    seconds += _save_seconds(job) * (1 + seconds / SAVE_SECONDS)
    room = held_bytes(job.model.device) + available_bytes(job.model.device)
    return Plan(total, seconds, step_seconds, fixed, peak, room, recompute, notices)


def _within(minutes: float, step_seconds: float, fixed_seconds: float, job: Job) -> int:
    """How many steps so many minutes allow; with `steps` given, no more than those."""
    allowed = int((minutes * 60 - fixed_seconds) / step_seconds)
    if allowed < 1:
        need = (fixed_seconds + step_seconds) / 60
        raise UserError(f"{minutes:g} minutes are too few: one step, evaluations and samples take {need:.1f}.",
                        remedy=f"Take --minutes {math.ceil(need)} or more, or --evaluations 0.")  # fmt: skip
    return min(allowed, job.settings.steps or allowed)


def operations(batch: Batch, job: Job) -> float:
    """Multiplications and additions of a training micro-step: products, head, attention, each forward and backward."""
    c = job.model.config
    attention, mlp = 2 * (c.heads + c.kv_heads) * c.head_width * c.width, 3 * c.width * c.hidden
    products = 4 * batch.tokens * c.layers * (attention + mlp)
    head = 4 * batch.targets * c.width * c.vocab
    pairs = 14 * batch.pairs * c.layers * c.heads * c.head_width
    return float(products + head + pairs)


def _first_steps(job: Job) -> list[list[Batch]]:
    """The first epoch, or as much of it as tells what the rest is like: rows come in random order."""
    order = steps(job.weights, job.batch_rows, job.settings.seed)
    count = min(job.steps, per_epoch(job.weights, job.batch_rows), SEEN_STEPS)
    drawn = [next(order)[1] for _ in range(count)]
    return [micro_batches([job.rows[i] for i in rows], job.settings.micro_tokens, job.model.shares) for rows in drawn]


def _fitting(job: Job, batches: list[Batch]) -> tuple[bool, int, tuple[str, ...]]:
    """Whether layers must be computed again in the backward pass for the largest micro-batch to fit; bytes it takes."""
    config, some, largest = job.model.config, beginning(batches[-1]), max(batches, key=lambda b: b.tokens)
    free, wanted = available_bytes(job.model.device), job.settings.gradient_checkpointing
    kept = kept_bytes(job, some) * largest.tokens / some.tokens
    inputs = config.layers * largest.tokens * config.width * job.model.dtype.itemsize
    state = _moments_bytes(job) + 4 * job.adapter.parameter_count
    kept_by = {False: kept, True: inputs + 2 * kept / config.layers}
    need = {recompute: int(HELD_PER_KEPT * numbers + state) for recompute, numbers in kept_by.items()}
    recompute = wanted == "on" or (wanted == "auto" and need[False] > free)
    if need[recompute] > free:
        per_token = (need[recompute] - state) / largest.tokens
        fitting = int(0.9 * (free - state) / per_token)
        knob = "" if recompute else ", or take --gradient-checkpointing on"
        paged = ", or --optimizer paged_adamw" if _moments_bytes(job) else ""
        fewer = f"Adam's state alone needs {state / 1e9:.1f} GB: take a lower --rank, or fewer --targets{paged}."
        raise WillNotFit(f"The longest micro-batch ({largest.tokens:,} tokens) needs about "
                         f"{need[recompute] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
                         remedy=f"Cut rows with --max-tokens {fitting}{knob}." if fitting > 0 else fewer)  # fmt: skip
    saved = f"{need[True] / 1e9:.1f} GB instead of {need[False] / 1e9:.1f} GB"
    notice = (f"Layers are computed twice to save memory: {saved}.",) if recompute and wanted == "auto" else ()
    return recompute, need[recompute] - state, notice


def _moments_bytes(job: Job) -> int:
    """What of Adam's moments must be in memory: none that lies in a file."""
    return 0 if job.settings.optimizer == "paged_adamw" else MOMENTS_BYTES * job.adapter.parameter_count


def _measured(job: Job, batches: list[Batch]) -> dict[float, Cost]:
    """What the longest, the median and the shortest micro-batch take, by their arithmetic."""
    chosen: dict[float, Batch] = {}
    for batch in (batches[-1], batches[len(batches) // 2], batches[0]):
        if operations(batch, job) < ALIKE * min(chosen, default=math.inf):
            chosen[operations(batch, job)] = batch
    return {work: cost(job, batch) for work, batch in chosen.items()}


def _evaluation_seconds(job: Job) -> float:
    """Seconds of all evaluations and samples of the run."""
    rounds = job.evaluations
    seconds = 0.0
    if rounds:
        longest = max(job.val, key=lambda b: b.tokens)
        with torch.no_grad(), clock() as spent:
            batch_loss(job.model, longest.to(job.model.device)).item()  # a GPU is waited for
        seconds += rounds * spent() * sum(operations(b, job) for b in job.val) / operations(longest, job)
    if job.question is not None:
        with clock() as spent, suppress(UserError):  # logits that are no numbers are told by the run itself
            complete(job.model, job.tokenizer, [job.question.ids], Sampling(max_new_tokens=PROBED_TOKENS))
        said = len(job.tokenizer.encode(job.question.expected)) or SAMPLE_TOKENS
        # An untrained model talks on to the limit; a trained one says about what is expected.
        seconds += spent() / PROBED_TOKENS * (SAMPLE_TOKENS + max(rounds, 1) * min(said, SAMPLE_TOKENS))
    return seconds


def _save_seconds(job: Job) -> float:
    """A checkpoint writes the adapter and both moments; disks flush about 200 MB a second."""
    return 12 * job.adapter.parameter_count / 200e6
