"""DoRA: LoRA on the direction of W's rows, whose lengths are trained apart (Liu et al. 2024, arXiv:2402.09353)."""

from typing import Self

import torch
from torch import Tensor, nn

from deltaw.adapters.adapter import Site
from deltaw.methods.lora import LoRA, LowRank
from deltaw.models.slots import Affine, Linear
from deltaw.settings import settings


class Directed(LowRank):
    """y = m / |W + scale * B A| * (W + scale * B A) x, the norm taken by row and held constant on the way back.

    The norm comes from W A' and A A', so that no second W is ever made; outside of training it is kept.
    """

    undecayed = ("m",)

    def __init__(self, A_RI: Tensor, B_OR: Tensor, w_OI: Tensor, scale: float, dropout: float) -> None:
        super().__init__(A_RI, B_OR, scale, dropout)
        self.m = nn.Parameter(w_OI.float().square().sum(1).sqrt())
        self._rows: tuple[object, Tensor] | None = None
        self._norm: tuple[object, Tensor] | None = None

    def gain(self, slot: Linear) -> Tensor:
        """What each output of the layer and its LoRA is multiplied by."""
        now = (self.A._version, self.B._version, self.A.device, slot.weight)
        if self.training or self._norm is None or self._norm[0] != now:  # fused optimizers leave versions as they were
            with torch.inference_mode(mode=False), torch.no_grad():  # what is kept may be asked for gradients later
                w_OI = slot.weight.dense().float()
                if self._rows is None or self._rows[0] is not slot.weight:
                    self._rows = slot.weight, w_OI.square().sum(1)
                added_OR = 2 * self.scale * (w_OI @ self.A.t()) + self.scale**2 * self.B @ (self.A @ self.A.t())
                squares_O = self._rows[1] + (added_OR * self.B).sum(1)
                self._norm = now, squares_O.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return self.m / self._norm[1]

    def train(self, mode: bool = True) -> Self:
        self._norm = None
        return super().train(mode)

    def dropped(self, slot: Linear, x_TI: Tensor) -> Tensor:
        y_TO = super().dropped(slot, x_TI)
        return y_TO + (self.gain(slot) - 1).to(x_TI.dtype) * y_TO  # the gain itself would be rounded to one

    def affine(self, slot: Linear) -> Affine:
        gain_O = self.gain(slot)
        return Affine(self.A, gain_O[:, None] * self.B, self.scale, gain_O)


@settings
class DoRA(LoRA):
    """Train LoRA, and beside it the length of each row of the weights."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        return Directed(*self.start(site, rng), site.slot.weight.dense(), self.scale(site), self.dropout)
