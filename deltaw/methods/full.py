"""Plain fine-tuning: every weight is trained, as fp32 copies of the base's. The yardstick for all other methods."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.protocol import Method, Site
from deltaw.models.slots import Delta, Embedding, Linear, Parts, RMSNorm, Slot
from deltaw.settings import settings
from deltaw.weights import Weight


class Whole(Delta):
    """A trained copy of one tensor of a slot, used in its place."""

    def __init__(self, part: str, value: Tensor) -> None:
        super().__init__()
        self.part = part
        self.value = nn.Parameter(value.detach().float().clone())

    def forward(self, slot: Slot, x: Tensor) -> Tensor:
        if isinstance(slot, Linear):
            y = F.linear(x, self.value.to(x.dtype))
            return y if slot.bias is None else y + slot.bias
        return slot.run(x, self.value.to(getattr(slot, self.part).dtype))

    def merged(self, slot: Slot) -> Parts:
        old = getattr(slot, self.part)
        return {self.part: old.repack(self.value) if isinstance(old, Weight) else self.value.to(old.dtype)}


PART = {Linear: "weight", RMSNorm: "gain", Embedding: "table"}


@settings
class Full(Method):
    """Train every weight of the model."""

    kinds: ClassVar[tuple[type[Slot], ...]] = (Linear, RMSNorm, Embedding)
    peak_rate: ClassVar[float] = 1e-4

    targets: str = "all"
    """Layers to train: all, all-linear, short names such as q,v, full names, or patterns; separated by commas."""

    def build(self, site: Site, rng: torch.Generator) -> Delta:  # noqa: ARG002 (nothing is random here)
        part = PART[type(site.slot)]
        value = getattr(site.slot, part)
        return Whole(part, value.dense() if isinstance(value, Weight) else value)
