"""One model computed by several processes (tensor parallelism), of which the first has the engine.

It tells the others every step, and all sum what layers behind give; rows of A are shared among them where the layer's
outputs are, and A's columns where its inputs are (S-LoRA, Sheng et al. 2023, arXiv:2311.03285, section 6). B is shared
with the outputs; where a layer's outputs are whole, so is B, and what is between A and B is summed with them.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.kernels.worn import Change, Part, Slab, share
from deltaw.models.checkpoint import linears
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.ranks import MEET, Ranks, cut, part_of
from deltaw.models.slots import Before, Linear
from deltaw.serve.arena import Arena
from deltaw.serve.engine import Engine
from deltaw.serve.layers import Forward, Step
from deltaw.serve.wearing import Floor, Mixed, Served


class Told(NamedTuple):
    """What the others are told of a step, whose adapters are numbers: some are new (a part for each), some gone."""

    step: Step
    new: dict[int, list[Slab]]
    gone: list[int]
    written: list[tuple[list[int], int, tuple[Before, ...]]]


class Apart(Mixed):
    """What a linear layer of a part does, and with it what rows wear there."""

    floor: "Hall"

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        wear, ranks = self.floor.wear, self.floor.ranks
        if self.floor.cuts[self.layer].inputs is None:
            return wear.up(slot.run(x_TI), self.floor.between(self.layer, x_TI), self.layer)
        y_TO, h_TR = slot.weight(x_TI), wear.down(x_TI, self.layer, (0, 1))
        # In float32, so that it is rounded once, as where one process computes it.
        both = ranks.sum(torch.cat([y_TO.float(), h_TR], 1))
        y_TO = both[:, : y_TO.shape[1]].to(y_TO.dtype)
        return wear.up(y_TO if slot.bias is None else y_TO + slot.bias, both[:, y_TO.shape[1] :], self.layer)


class Hall(Floor):
    """Where rows wear what they do in a part of a model. What layers that read the same x need is summed at once."""

    def __init__(self, whole: ModelConfig, part: Decoder, ranks: Ranks) -> None:
        super().__init__(part, Apart)
        self.ranks, self.found = ranks, dict[int, Tensor]()
        self.cuts = [cut(name, whole, ranks.part) for name, _ in linears(part)]

    def between(self, layer: int, x_TI: Tensor) -> Tensor:
        """What is between A and B at a layer; its neighbours' is kept until they ask."""
        if layer not in self.found:
            last = next(i for i in range(layer, len(self.cuts)) if self.cuts[i].outputs is None)
            each = [self.wear.down(x_TI, i, self.ranks.part) for i in range(layer, last)]
            all_TR = torch.cat(each, 1)
            summed = self.ranks.sum(all_TR) if all_TR.shape[1] else all_TR
            self.found = dict(enumerate(torch.split(summed, [h_TR.shape[1] for h_TR in each], 1), layer))
        return self.found.pop(layer)


class Forwards(Forward):
    """A part of a model; only the first process has the logits."""

    def __init__(self, whole: ModelConfig, part: Decoder, arena: Arena, ranks: Ranks) -> None:
        self.model, self.arena, self.layers, self.ranks = part, arena, None, ranks
        self.floor: Hall = Hall(whole, part, ranks)
        heads = share(whole.kv_heads, ranks.part)
        arena.heads = slice(heads.start, heads.stop)

    def __call__(self, step: Step, alone: Adapter | None = None) -> Tensor:
        self.floor.found.clear()
        return self.ranks.beside(super().__call__(step, alone), self.model.config.vocab)


class Leader:
    """The first of the processes, with the engine: it tells the others what is computed, and computes its part."""

    def __init__(self, whole: Decoder, engine: Engine, ranks: Ranks) -> None:
        self.whole, self.ranks = whole, ranks
        self.forward = Forwards(whole.config, engine.model, engine.arena, ranks)
        self.numbers, self.clock = weakref.WeakKeyDictionary[Slab, int](), count()
        self.unsent = weakref.WeakKeyDictionary[Slab, list[Slab]]()
        self.gone, self.written = deque[int](), list[tuple[list[int], int, tuple[Before, ...]]]()
        engine.compute, engine.arena.wrote = self, lambda *told: self.written.append(told)
        ranks.agreed(engine.arena.count)

    def apart(self, served: Served) -> Served:
        """An adapter's part for this process; those of others are kept until it is worn.

        Raises:
            UserError: it is not of the form that is shared.
        """
        if served.alone is not None:
            raise UserError("It does more than several processes compute.", remedy="Leave --tensor-parallel out.")
        if served.slab is None:
            return served
        slab, *others = (slab_of(served.slab, self.whole, (k, self.ranks.count)) for k in range(self.ranks.count))
        self.numbers[slab], self.unsent[slab] = next(self.clock), others
        weakref.finalize(slab, self.gone.append, self.numbers[slab])
        return replace(served, slab=slab)

    def __call__(self, step: Step, alone: Adapter | None = None) -> Tensor:
        worn = {slab for rows in step.rows for slab, _ in rows.worn}
        new = {self.numbers[slab]: self.unsent.pop(slab) for slab in worn if slab in self.unsent}
        gone = [self.gone.popleft() for _ in range(len(self.gone))]
        written, self.written = self.written, []
        try:
            self.ranks.agreed(Told(_called(step, self.numbers), new, gone, written))
            return self.forward(step, alone)
        except Exception as e:  # the others are in the midst of it, and would wait for ever
            _end(f"The step of several processes failed: {e}")


@torch.inference_mode()
def follow(load: Callable[[], Decoder], ranks: Ranks) -> None:
    """Compute a part of every step that the first process tells, until it tells no more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which torchrun sends to all: the first answers to the end
        signal.signal(number, signal.SIG_IGN)
    with ranks.once():
        whole = load()
        part, config = part_of(whole, ranks.part), whole.config
        del whole  # of which each has a part
        arena = Arena(part, ranks.agreed(0) * Arena(part, 0).page_bytes)
    forward, slabs = Forwards(config, part, arena, ranks), dict[int, Slab]()
    while (told := _heard(ranks)) is not None:
        new = {number: parts[ranks.own - 1] for number, parts in told.new.items()}
        slabs = {number: slab for number, slab in (slabs | new).items() if number not in told.gone}
        for each in told.written:
            arena.write(*each)
        forward(_called(told.step, slabs))


def slab_of(slab: Slab, whole: Decoder, part: Part) -> Slab:
    """An adapter's part: rows of A and columns of B where the layer's outputs are shared, else columns of A."""
    changes = list[Change | None]()
    for i, (name, slot) in enumerate(linears(whole)):
        outputs, inputs = cut(name, whole.config, part)
        change = slab.change(i, slot.weight.shape[1], slot.weight.shape[0])
        if change is not None and outputs is None:
            change = change._replace(A_RI=change.A_RI[:, inputs])
        elif change is not None:
            own, (B_RO, *more) = share(len(change.A_RI), part), change[1:]
            gain_O, bias_O = (None if t_O is None else t_O[outputs] for t_O in more)
            change = Change(change.A_RI[own.start : own.stop], B_RO[:, outputs], gain_O, bias_O)
        changes.append(change)
    return Slab.of(changes, slab.dtype)


def _called(step: Step, names: Mapping[Any, Any]) -> Step:
    """A step whose adapters have other names."""
    rows = [each._replace(worn=tuple((names[slab], weight) for slab, weight in each.worn)) for each in step.rows]
    return step._replace(rows=rows)


def _heard(ranks: Ranks) -> Any:
    with suppress(RuntimeError):  # the first process is gone, and nobody is left to compute for
        return ranks.agreed(())


def _end(why: str) -> NoReturn:
    """End now, and all with this process: none can compute without the others."""
    sys.stderr.write(f"{why}: no more is answered.\n")
    os._exit(1)


@contextmanager
def joined(ranks: int) -> Iterator[Ranks]:
    """The processes that compute one model: those that `torchrun` began, or else this one and others like it.

    Others run the same command, on this machine. If one ends before it was to, so does this: nothing can be answered.
    """
    others, ended, env = list[subprocess.Popen[bytes]](), threading.Event(), os.environ

    def watch(other: subprocess.Popen[bytes], number: int) -> None:
        if other.wait() is not None and not ended.is_set():
            _end(f"Process {number} of those that compute the model has ended")

    try:
        with tempfile.TemporaryDirectory(prefix="deltaw-") as folder:  # which nobody else reads, unlike a port
            if "RANK" not in env:
                env.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
                env |= {MEET: f"file://{folder}/meet", "WORLD_SIZE": str(ranks)}
                command = [sys.executable, "-m", "deltaw.cli", *sys.argv[1:]]
                for number in range(1, ranks):  # in sessions of their own, as Ctrl-C is for the first
                    other = subprocess.Popen(command, env={**env, "RANK": str(number)}, start_new_session=True)
                    threading.Thread(target=watch, args=(other, number), daemon=True).start()
                    others.append(other)
            met = Ranks.joined()
            met.all(None)  # so that none needs the folder any more, which nobody may be left to delete
        yield met
    finally:
        ended.set()
        if dist.is_initialized():
            dist.destroy_process_group()
        for other in others:
            other.wait()
