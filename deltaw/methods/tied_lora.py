"""Tied-LoRA: one A and one B for all layers, told apart by two vectors in each (Renduchintala et al., NAACL 2024).

arXiv:2311.09578; what is tied and trained is that of NVIDIA/NeMo's `VeraAdapter`, which is by the first author.
"""

import math
import re
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltaw.adapters.adapter import Method, Site, held
from deltaw.errors import UserError
from deltaw.methods.lora import Product
from deltaw.settings import Rank, settings

GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Layers that read the same input have one A, and in each block one u."""


class Tied(Product):
    """y = W x + v * B (u * (A x)). A, B and u lie in `owner`, which other sites refer to as well.

    `names`: those of A, B and u there; matrices that are larger than the layer are used in part.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, str, str], i: int, v_O: Tensor, trained: bool) -> None:
        super().__init__()
        self._owner, self._names, self._i = (owner,), names, i  # in a tuple, so that it is not registered here
        self.v = held(v_O, trained)

    def factors(self) -> tuple[Tensor, Tensor]:
        A_RI, B_OR, u_R = (getattr(self._owner[0], name) for name in self._names)
        return A_RI[:, : self._i], self.v[:, None] * B_OR[: len(self.v)] * u_R


@settings
class TiedLoRA(Method):
    """Train one pair of matrices for all layers, and two vectors in each: the fewest numbers."""

    peak_rate: ClassVar[float] = 1e-2
    """BLEU 36.3, 40.8, 37.3 at 3e-3, 1e-2, 3e-2 (benchmarks/table.py --rows 60 --set minutes=null steps=30)."""

    rank: Rank = 8
    """Rank R of the update."""
    variant: Literal["tl6", "tl5", "tl2", "vbua"] = "tl6"
    """What is trained: matrices and vectors, the matrices, the vectors; vbua: all, with matrices for every layer."""

    def build(self, site: Site, rng: torch.Generator) -> Tied:
        o, i = site.slot.weight.shape
        at, _, name = site.name.rpartition(".")
        every = f"{at}/{name}".replace(".", "/")
        if self.variant != "vbua":  # without its block's number, by which all blocks have the same
            every = re.sub(r"^layers/\d+/", "", every)
        group = GROUPS.get(name, name)
        u, names = f"{at}/{group}/u".replace(".", "/"), (every.rsplit("/", 1)[0] + f"/{group}/A", f"{every}/B")
        fixed = self.variant == "tl5"  # u and v are one, so B is what starts at zero
        B_OR = torch.zeros(o, self.rank) if fixed else _normal((o, self.rank), self.rank, rng)
        A_RI = _normal((self.rank, i), i, rng)
        for key, t, trained in ((names[0], A_RI, self.variant != "tl2"), (names[1], B_OR, self.variant != "tl2"),
                                (u, torch.ones(self.rank), not fixed)):  # fmt: skip
            if not hasattr(site.shared, key):
                setattr(site.shared, key, held(t, trained))
            elif getattr(site.shared, key).shape != t.shape:
                raise UserError("Layers of different sizes cannot have one matrix.", where=site.name,
                                why=f"{tuple(t.shape)} is not {tuple(getattr(site.shared, key).shape)}.",
                                remedy="Leave some of them out: --targets.")  # fmt: skip
        return Tied(site.shared, (*names, u), i, torch.ones(o) if fixed else torch.zeros(o), not fixed)


def _normal(shape: tuple[int, int], fan_in: int, rng: torch.Generator) -> Tensor:
    """Normal, and so that what comes out is as large as what goes in."""
    return torch.randn(shape, generator=rng) / math.sqrt(fan_in)
