"""VeRA: one random A and B for the whole model, which stay, and two vectors in each layer (Kopiczko et al. 2023).

arXiv:2310.11454. Matrices are as large as the largest layer, and smaller ones use a part, as in PEFT.
"""

from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Method, Site, held
from deltaw.methods.tied_lora import Tied
from deltaw.settings import Rank, settings


@settings
class VeRA(Method):
    """Train two vectors in each layer, around random matrices that all of them have together."""

    peak_rate: ClassVar[float] = 3e-2
    """BLEU 31.1, 37.7 at 1e-2, 3e-2 (benchmarks/table.py --rows 60 --set minutes=null steps=30)."""

    rank: Rank = 256
    """Rank R of the random matrices."""
    d_initial: Annotated[float, Field(gt=0, le=10)] = 0.1
    """What the vector between the matrices starts with; the one behind them starts at zero."""
    projection_prng_key: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the random matrices, which are drawn anew from it whenever the adapter is read."""

    def plan(self, sites: list[Site]) -> list[Site]:
        rows, columns = zip(*(site.slot.weight.shape for site in sites), strict=True)
        return [replace(site, shape=(max(rows), max(columns))) for site in sites]

    def build(self, site: Site, rng: torch.Generator) -> Tied:  # noqa: ARG002 (its own seed decides)
        if not hasattr(site.shared, "A"):
            random = np.random.RandomState(self.projection_prng_key)
            site.shared.A = held(_kaiming((self.rank, site.shape[1]), random), trained=False, stored=False)
            site.shared.B = held(_kaiming((site.shape[0], self.rank), random), trained=False, stored=False)
        o, i = site.slot.weight.shape
        u = site.name.replace(".", "/") + "/u"
        setattr(site.shared, u, held(torch.full((self.rank,), self.d_initial), trained=True))
        return Tied(site.shared, ("A", "B", u), i, torch.zeros(o), trained=True)


def _kaiming(shape: tuple[int, int], random: np.random.RandomState) -> Tensor:
    bound = (6 / shape[1]) ** 0.5
    return torch.from_numpy(random.uniform(-bound, bound, shape).astype(np.float32))
