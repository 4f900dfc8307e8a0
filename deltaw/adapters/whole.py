"""A layer's tensor trained whole, as an fp32 copy: full fine-tuning, and embeddings and norms beside other methods."""

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.models.slots import CannotMerge, Delta, Embedding, Linear, Parts, RMSNorm, Slot
from deltaw.weights import Weight

PART = {Linear: "weight", RMSNorm: "gain", Embedding: "table"}
"""The attribute of a layer that is trained."""


class Whole(Delta):
    """A trained copy of one tensor of a slot, used in its place.

    `heads`: whether a head that is tied to this embedding follows it. PEFT leaves the head as it was by default.
    """

    def __init__(self, slot: Slot, heads: bool = True) -> None:
        super().__init__()
        self.part, self.heads = PART[type(slot)], heads
        value = getattr(slot, self.part)
        value = value.dense() if isinstance(value, Weight) else value
        self.value = nn.Parameter(value.detach().float().clone())

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
