"""Plain fine-tuning: every weight is trained, as fp32 copies of the base's. The yardstick for all other methods.

Beside other methods, embeddings, norms and heads are trained whole in the same way.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.adapter import Method, Site
from deltaw.models.checkpoint import get
from deltaw.models.slots import PART, CannotMerge, Delta, Linear, Parts, Slot
from deltaw.settings import settings
from deltaw.weights import Weight


class Whole(Delta):
    """A trained copy of one tensor of a slot, used in its place.

    `heads`: whether a head that is tied to this embedding follows it. PEFT leaves the head as it was by default.
    """

    def __init__(self, slot: Slot, heads: bool = True) -> None:
        super().__init__()
        self.part, self.heads = PART[type(slot)], heads
        self.value = nn.Parameter(get(slot, self.part).detach().float().clone())

    def forward(self, slot: Slot, x: Tensor) -> Tensor:
        if isinstance(slot, Linear):
            y = F.linear(x, self.value.to(x.dtype))
            return y if slot.bias is None else y + slot.bias
        return slot.run(x, self.value.to(getattr(slot, self.part).dtype))

    def merged(self, slot: Slot) -> Parts:
        if not self.heads:
            raise CannotMerge("The embedding was trained and the head that shares its table was not.")
        old = getattr(slot, self.part)
        return {self.part: old.repack(self.value) if isinstance(old, Weight) else self.value.to(old.dtype)}


@settings
class Full(Method):
    """Train every weight of the model."""

    kinds: ClassVar[tuple[type[Slot], ...]] = tuple(PART)
    peak_rate: ClassVar[float] = 1e-4
    """BLEU 41.3, 38.7 at 1e-4, 3e-4 (benchmarks/table.py --set minutes=null steps=30)."""

    targets: str = "all"
    """Layers to train: all, all-linear, short names such as q,v, full names, or patterns; separated by commas."""

    def build(self, site: Site, rng: torch.Generator) -> Delta:  # noqa: ARG002 (nothing is random here)
        return Whole(site.slot)
