"""PiSSA: LoRA that starts as the strongest directions of W itself (Meng et al. 2024, arXiv:2404.02948).

The base stays as it is: what A and B start as is kept beside them, and taken off again. So nothing has to know of a
changed base, and what is exported is a plain LoRA of twice the rank on the base as it was.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaw.adapters.adapter import Site
from deltaw.methods.loftq import within
from deltaw.methods.lora import LoRA, LowRank
from deltaw.settings import settings

SPARE = 10
"""Directions that are looked for beyond those that are kept (Halko et al. 2011, arXiv:0909.4061)."""


class Moved(LowRank):
    """y = W x + scale * (B (A - A0) + (B - B0) A0) x, with A0 and B0 what A and B started as: zero at the start."""

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float) -> None:
        super().__init__(A_RI, B_OR, scale, dropout)
        self.A0, self.B0 = nn.Buffer(A_RI.clone()), nn.Buffer(B_OR.clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        # As differences, which are taken in fp32: in bf16 that of the two products would be their rounding.
        return torch.cat((self.A - self.A0, self.A0)), torch.cat((self.B, self.B - self.B0), 1)


@settings
class PiSSA(LoRA):
    """Train the strongest directions of each weight, in place of new ones."""

    init: Literal["pissa"] = "pissa"  # type: ignore[assignment]  # it is only read
    """There is one way to start: as the strongest directions of each weight."""
    niter: Annotated[int, Field(ge=0, le=64)] = 4
    """Rounds of the randomised search for those directions; 0: the whole decomposition, exact and slow."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        scale = self.scale(site)
        A_RI, B_OR = principal(site.slot.weight.dense().float().cpu(), site.rank, self.niter, rng)
        return Moved(A_RI / scale**0.5, B_OR / scale**0.5, scale, self.dropout)


def principal(w_OI: Tensor, rank: int, niter: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B whose product is the part of W with the `rank` largest singular values, the root of each in either."""
    o, i = w_OI.shape
    q_OK = torch.eye(o)
    if niter and (wide := min(rank + SPARE, o, i)) < o:
        q_OK = torch.linalg.qr(w_OI @ torch.randn(i, wide, generator=rng)).Q
        for _ in range(niter):
            q_OK = torch.linalg.qr(w_OI @ torch.linalg.qr(w_OI.t() @ q_OK).Q).Q
    return within(w_OI, q_OK @ torch.linalg.svd(q_OK.t() @ w_OI, full_matrices=False).U[:, :rank])
