"""MultiLoRA: several LoRAs side by side, each behind output scales that start at zero (Wang et al. 2023).

arXiv:2311.11501. There is no code of the authors; scales as vectors and B's start are those of pUmpKin-Co/MTL-LoRA.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaw.adapters.adapter import Site
from deltaw.methods.lora import LoRA, LowRank
from deltaw.settings import Rank, settings


class Parallel(LowRank):
    """y = W x + scale * sum_n g_n * B_n (A_n x), computed as one pair of rank N R; g_n is a vector O, or a number."""

    undecayed = ("g",)  # decay would pull the whole update to zero

    def __init__(self, A_RI: Tensor, B_OR: Tensor, g: Tensor, scale: float, dropout: float) -> None:
        super().__init__(A_RI, B_OR, scale, dropout)
        self.g = nn.Parameter(g)

    def factors(self) -> tuple[Tensor, Tensor]:
        B_ONR = self.B.view(len(self.B), len(self.g), -1)
        return self.A, (B_ONR * self.g.t()[..., None]).flatten(1)


@settings
class MultiLoRA(LoRA):
    """Train several LoRAs side by side, all of them always on: for several tasks at once."""

    rank: Rank = 8
    """Rank R of each of the parts."""
    parts: Annotated[int, Field(ge=1, le=64)] = 3
    """How many stand side by side."""
    scales: Literal["vector", "scalar"] = "vector"
    """What each part's output is multiplied by: a number for every output, or one for all of them."""
    scale_pace: Annotated[float, Field(gt=0, le=1000)] = 10.0
    """The scales learn so many times as fast as the matrices, which stand still until the scales have moved."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        o, i = site.slot.weight.shape
        wide = self.parts * site.rank
        B_OR = torch.empty(o, wide).uniform_(-(site.rank**-0.5), site.rank**-0.5, generator=rng)
        g = torch.zeros(self.parts, o if self.scales == "vector" else 1)
        A_RI = torch.cat([self.drawn(site.rank, i, rng) for _ in range(self.parts)])
        delta = Parallel(A_RI, B_OR, g, self.scale(site), self.dropout)
        delta.pace = {"g": self.scale_pace}
        return delta
