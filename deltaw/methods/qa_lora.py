"""QA-LoRA: B A as a change of a quantised base's offsets, so that it merges exactly (Xu et al. 2023, arXiv:2309.14717).

W x + s B A p(x), with p(x) the sums of x over the groups of the base: what B A adds is the same for all inputs of a
group, as is the offset of the group. The merged model is as quantised as it was.
"""

from typing import Annotated, ClassVar, Literal, TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Adapter, Site
from deltaw.errors import UserError
from deltaw.methods.lora import LoRA, LowRank
from deltaw.models.slots import Linear, Parts
from deltaw.settings import settings
from deltaw.weights import Weight
from deltaw.weights.grid import Gridded, Ordered
from deltaw.words import some


class Pooled(LowRank):
    """y = W x + scale * B A (share * sums of x over groups), with A of shape R x G."""

    order: Tensor | None

    def __init__(self, A_RG: Tensor, B_OR: Tensor, scale: float, dropout: float, group: int, share: float,
                 order_I: Tensor | None = None) -> None:  # fmt: skip
        super().__init__(A_RG, B_OR, scale, dropout)
        self.group, self.share = group, share
        self.register_buffer("order", order_I)  # kept with it: on another base it would be another adapter

    def factors(self) -> tuple[Tensor, Tensor]:
        A_RI = self.share * self.A.repeat_interleave(self.group, 1)
        return A_RI if self.order is None else A_RI[:, self.order.argsort()], self.B

    def merged(self, slot: Linear) -> Parts:
        weight = slot.weight
        if not self.fits(weight):
            return super().merged(slot)
        by_OG = self.scale * self.share * (self.B @ self.A)
        return {"weight": weight.shifted(by_OG.repeat_interleave(self.group // weight.form.group, 1))}

    def fits(self, weight: Weight) -> TypeGuard[Gridded]:
        """Whether what it adds is the same for all inputs of each group that this matrix has."""
        return isinstance(weight, Gridded) and self.group % weight.form.group == 0


@settings
class QALoRA(LoRA):
    """Train what the offsets of a quantised base can take in when it is merged."""

    base_format: ClassVar[str] = "int4-g32"

    group: Annotated[int, Field(ge=1, le=65536)] = 32
    """How many inputs are summed: the group of the base's format, or a multiple of it."""
    pooling: Literal["root", "sum", "mean"] = "root"
    """Sums are divided by the root of the group, for LoRA's rates to hold; or they are sums (paper) or means (code)."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        (o, i), weight = site.slot.weight.shape, site.slot.weight
        if i % self.group:
            raise UserError(f"The {i} inputs of {site.name} are no whole number of groups of {self.group}.",
                            remedy="Take another --group, or other --targets.")  # fmt: skip
        share = {"root": self.group**-0.5, "sum": 1.0, "mean": 1 / self.group}[self.pooling]
        A_RG, B_OR = self.drawn(site.rank, i // self.group, rng), torch.zeros(o, site.rank)
        order_I = weight.order.clone() if isinstance(weight, Ordered) else None
        return Pooled(A_RG, B_OR, self.scale(site), self.dropout, self.group, share, order_I)

    def notices(self, adapter: Adapter) -> tuple[str, ...]:
        fits = [delta.fits(slot.weight) for slot, delta in adapter.items()
                if isinstance(slot, Linear) and isinstance(delta, Pooled)]  # fmt: skip
        if all(fits):
            return ()
        return (f"{fits.count(False)} of {some(len(fits), 'layer')} have no groups that fit --group {self.group}; "
                f"merged, they keep no codes. Over --base-format int4-g{self.group} they do.",)  # fmt: skip
