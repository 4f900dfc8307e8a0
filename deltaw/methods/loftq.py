"""LoftQ: a packed Q and a B A whose sum is close to W, found by turns (Li et al. 2023, arXiv:2310.08659).

Quantise W - B A, take the strongest directions of what is missing, and again. Q belongs to the adapter, which fits no
other rounding of the same base: it is saved with A and B, and stands in the place of W where the adapter is worn.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Adapter, Losses, Site
from deltaw.methods.lora import LoRA, LowRank, first
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import settings
from deltaw.weights import Format, Weight
from deltaw.weights.formats import parse

EXACT = 2048
"""Smaller sides than this are decomposed whole; of larger ones the strongest directions are searched for."""
SEARCHED = 4
Weights = Mapping[str, tuple[Tensor, Tensor]]
"""How much each layer's outputs and inputs matter, by its name."""


class Corrected(LowRank):
    """y = Q x + scale * B A x, with Q the adapter's own."""

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float, weight: Weight) -> None:
        super().__init__(A_RI, B_OR, scale, dropout)
        self.weight = weight

    def frozen(self, slot: Linear) -> Weight:  # noqa: ARG002 (Q is in its place)
        return self.weight

    def served(self, slot: Linear) -> None:  # noqa: ARG002 (no slot's W has Q in it)
        return None


@settings
class LoftQ(LoRA):
    """Train LoRA that starts as what the packed weights lack."""

    identity_at_start: ClassVar[bool] = False

    format: str = "nf4"
    """How Q is packed: nf4, nf3, nf2-dq, int4-g32 or another."""
    format_pattern: dict[str, str] = field(default_factory=dict)
    """Other formats for some layers, by pattern of their names: {"layers[.]2..*": nf2}."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """How often Q and B A take turns; the best turn is kept."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        weight = self.form(site.name).pack(site.slot.weight.dense(), site.slot.weight.dtype)
        return Corrected(*self.start(site, rng), self.scale(site), self.dropout, weight)

    def patterns(self) -> list[str]:
        return [*super().patterns(), *self.format_pattern]

    def form(self, name: str) -> Format:
        """How the layer of this name is packed."""
        return parse(first(self.format_pattern, name, self.format))

    def begin(self, adapter: Adapter, model: Decoder, tokenizer: Tokenizer, losses: Losses) -> Adapter:  # noqa: ARG002 (W is enough)
        return self.corrected(adapter, model, {})

    def corrected(self, adapter: Adapter, model: Decoder, weights: Weights, quantised_first: bool = True) -> Adapter:
        """Let every delta start from its layer's Q, A and B, by weights of its outputs and inputs if there are some."""
        for name, delta in adapter.named_deltas():
            if isinstance(delta, Corrected):
                w_OI = model.get_submodule(name).weight.dense()  # type: ignore[union-attr, operator]  # a Linear
                rows_O, columns_I = weights.get(name, (None, None))
                fill(delta, split(w_OI, self.form(name), len(delta.A), self.iterations, rows_O, columns_I,
                                  quantised_first))  # fmt: skip
        return adapter


@torch.no_grad()
def fill(delta: Corrected, found: tuple[Weight, Tensor, Tensor]) -> None:
    """Let a delta start from Q, A and B, whatever its scale; a direction in which nothing is missing, as LoRA does."""
    device = delta.A.device
    delta.weight, A_RI, B_OR = found[0].to(device), found[1].to(device), found[2].to(device)
    A, B = delta.A[: len(A_RI)], delta.B[:, : len(A_RI)]  # a matrix has no more directions than its smaller side
    A.copy_(torch.where(A_RI.any(1, keepdim=True), A_RI / delta.scale**0.5, A))
    B.copy_(B_OR / delta.scale**0.5)


@torch.no_grad()
def split(w_OI: Tensor, form: Format, rank: int, iterations: int, rows_O: Tensor | None = None,
          columns_I: Tensor | None = None, quantised_first: bool = True) -> tuple[Weight, Tensor, Tensor]:  # fmt: skip
    """Q, A and B with Q + B A close to W: the best of all turns, by the error times weights of rows and columns.

    `quantised_first`: begin with Q, as LoftQ does, rather than with B A, as LQ-LoRA does.
    """
    w, dtype = w_OI.float().cpu(), w_OI.dtype
    by_O = torch.ones(len(w), 1) if rows_O is None else rows_O[:, None]
    by_I = torch.ones(1, w.shape[1]) if columns_I is None else columns_I[None]

    def strongest(missing_OI: Tensor) -> tuple[Tensor, Tensor]:
        A_RI, B_OR = directions(by_O * missing_OI * by_I, rank)
        return A_RI / by_I, B_OR / by_O

    A, B = (torch.zeros(rank, w.shape[1]), torch.zeros(len(w), rank)) if quantised_first else strongest(w)
    best: tuple[float, Weight, Tensor, Tensor] | None = None
    for _ in range(iterations):
        q = form.pack(w - B @ A, dtype)
        q_OI = q.dense().float()
        if quantised_first:
            A, B = strongest(w - q_OI)
        error = float((by_O * (w - q_OI - B @ A) * by_I).square().sum())
        if best is None or error < best[0]:
            best = error, q, A, B
        elif not quantised_first:
            break
        if not quantised_first:
            A, B = strongest(w - q_OI)
    assert best is not None
    return best[1:]


def directions(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B whose product is W within its strongest directions, the strength of each shared out evenly.

    Eigenvectors u of W W' take less time than all singular vectors do, and B A = u u' W holds whatever they lack in
    exactness.
    """
    if len(w_OI) > w_OI.shape[1]:
        A_RI, B_OR = directions(w_OI.t(), rank)
        return B_OR.t(), A_RI.t()
    if len(w_OI) <= EXACT:
        u_OR = torch.linalg.eigh(w_OI @ w_OI.t())[1][:, -rank:]
    else:
        u_OR = torch.svd_lowrank(w_OI, rank + 10, SEARCHED)[0][:, :rank]
    return within(w_OI, u_OR)


def within(w_OI: Tensor, u_OR: Tensor) -> tuple[Tensor, Tensor]:
    """A and B whose product is W within these directions of its outputs, the strength of each shared out evenly."""
    along_RI = u_OR.t() @ w_OI
    root_R = along_RI.norm(dim=1).sqrt()
    return along_RI / root_R.clamp(min=1e-30)[:, None], u_OR * root_R
