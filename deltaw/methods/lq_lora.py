"""LQ-LoRA: LoftQ's turns, weighted, and a format for each layer by a budget (Guo et al. 2024, arXiv:2311.12023).

What matters is the mean squared gradient by outputs and by inputs; formats are chosen by an integer programme.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Adapter, Losses
from deltaw.adapters.watch import importance
from deltaw.errors import UserError
from deltaw.methods.loftq import Corrected, LoftQ, Weights
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import settings
from deltaw.weights import Format
from deltaw.weights.codebook import Codebook, TwoLevel

SAMPLE = 16
"""One of so many rows of a matrix tells what a format does to it."""
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
BUDGET = rf"^(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})$"
GAP, SECONDS = 1e-4, 60
"""How near to the best a choice must be, and how long is looked for it."""


@settings
class LQLoRA(LoftQ):
    """Train LoRA that starts as what matters most of what packed weights lack."""

    format: str = "nf3-dq"
    """How Q is packed, where no budget chooses."""
    bits: Annotated[float, Field(gt=0, le=32)] | None = None
    """Bits a number that the packed matrices have on average: the format of each is chosen under it."""
    budget: Annotated[str, Field(pattern=BUDGET)] | None = None
    """Or their size in all, such as 60MB."""
    fisher: bool = True
    """Whether errors count as much as the training rows say that they matter."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 8
    """How often B A and Q take turns at most; it ends where a turn is worse."""

    def begin(self, adapter: Adapter, model: Decoder, tokenizer: Tokenizer, losses: Losses) -> Adapter:  # noqa: ARG002 (no text)
        slots: dict[str, Any] = {name: model.get_submodule(name) for name, delta in adapter.named_deltas()
                                 if isinstance(delta, Corrected)}  # fmt: skip
        chosen = [flag for flag, said in (("--bits", self.bits), ("--budget", self.budget),
                                          ("--format-pattern", self.format_pattern)) if said]  # fmt: skip
        if len(chosen) > 1:
            raise UserError("A budget chooses the format of every layer.", remedy=f"Leave {' or '.join(chosen)} out.")
        most = self.most_bytes(sum(s.weight.shape[0] * s.weight.shape[1] for s in slots.values()))
        alike = {name: (torch.ones(s.weight.shape[0]), torch.ones(s.weight.shape[1])) for name, s in slots.items()}
        weights = importance(slots, losses()) if self.fisher else alike
        method = self if most is None else replace(self, format_pattern=planned(slots, weights, most))
        made = Adapter.build(method, model).to(model.device)
        return method.corrected(made, model, weights, quantised_first=False)

    def most_bytes(self, numbers: int) -> float | None:
        """What so many numbers may take; None: as much as their format has."""
        if said := re.match(BUDGET, self.budget or ""):
            return float(said[1]) * UNITS[said[2]]
        return None if self.bits is None else self.bits * numbers / 8


def choices() -> list[Format]:
    """The formats of the paper's grid, but for maxima in bf16, which are as large as in fp16 and no better."""
    return [Codebook(b0, B0, TwoLevel(b1, b2, B1)) for b0, B0, b1, b2, B1 in
            product((2, 3, 4, 8), (16, 32, 64), (2, 3, 4, 8), ("fp16", "fp32"), (16, 64, 256))]  # fmt: skip


def planned(slots: Mapping[str, Linear], weights: Weights, most_bytes: float) -> dict[str, str]:
    """The format of each layer, by pattern of its name, such that all together have so many bytes at most.

    Raises:
        UserError: no formats are that small.
    """
    formats = choices()
    costs = np.array([errors(slot.weight.dense(), weights[name], formats) for name, slot in slots.items()])
    sizes = np.array([[float(f.stored_bytes(*slot.weight.shape)) for f in formats] for slot in slots.values()])
    numbers, least = sum(slot.weight.shape[0] * slot.weight.shape[1] for slot in slots.values()), sizes.min(1).sum()
    if least > most_bytes:
        raise UserError(f"No formats have {8 * most_bytes / numbers:g} bits a number.",
                        remedy=f"Take --bits {np.ceil(800 * least / numbers) / 100:.2f} or more, "
                               f"or --budget {np.ceil(least / 1e3):.0f}kB.")  # fmt: skip
    chosen = choose(costs, sizes, most_bytes)
    return {re.escape(name): str(formats[c]) for name, c in zip(slots, chosen, strict=True)}


@torch.no_grad()
def errors(w_OI: Tensor, weights: tuple[Tensor, Tensor], formats: Sequence[Format]) -> list[float]:
    """The weighted squared error of each format, estimated on some rows."""
    some, by_O, by_I = w_OI[::SAMPLE].float().cpu(), weights[0][::SAMPLE, None], weights[1]
    return [float((by_O * (form.pack(some, torch.float32).dense() - some) * by_I).square().sum()) for form in formats]


def choose(costs: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], most: float) -> list[int]:
    """One choice a row, whose sizes together are no more than `most` and whose costs are the least (HiGHS)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    rows, columns = costs.shape
    order = np.lexsort((costs, sizes))  # a choice that is as large as another, and no better, is none
    least = np.minimum.accumulate(np.take_along_axis(costs, order, 1), 1)
    better = np.diff(least, axis=1, prepend=np.inf) < 0
    open_to = np.zeros_like(costs)
    np.put_along_axis(open_to, order, better.astype(float), 1)
    one_each = csr_array(kron(np.eye(rows), np.ones((1, columns))))
    within = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1) / most, -np.inf, 1)]
    done = milp(costs.ravel() / max(costs.min(1).sum(), 1e-30), integrality=np.ones(costs.size),
                bounds=Bounds(0, open_to.ravel()), constraints=within,
                options={"mip_rel_gap": GAP, "time_limit": SECONDS})  # fmt: skip
    if done.x is None:
        raise UserError("No formats fit the budget.", why=str(done.message))
    return [int(c) for c in done.x.reshape(rows, columns).argmax(1)]
