"""The values that codes stand for: NormalFloat of any width (Dettmers et al. 2023, arXiv:2305.14314) and FP4."""

from functools import lru_cache

import torch
from torch import Tensor

OFFSET = 0.9677083
"""Quantile of the outermost level, as none is infinite: 1 - (1/30 + 1/32) / 2, to the digits of published code."""
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes of bitsandbytes' FP4 by its lower three bits, in twelfths; the highest bit is the sign."""


def normal(width: int) -> Tensor:
    """NF of so many bits: quantiles of the normal distribution, 2**(width - 1) above zero, one less below, and zero.

    The narrower ones take the 4-bit offset, as bitsandbytes, LoftQ and LQ-LoRA do.
    """

    def quantiles(count: int) -> Tensor:
        found: Tensor = torch.special.ndtri(torch.linspace(OFFSET, 0.5, count)[:-1].double())
        return found

    half = 1 << width - 1
    levels = torch.cat([quantiles(half + 1), torch.zeros(1).double(), -quantiles(half)]).float()
    return (levels / levels.max()).sort().values


def fp4() -> Tensor:
    """Bitsandbytes' FP4 by code; code 8 is zero too."""
    magnitudes = torch.tensor(FP4) / 12
    return torch.cat([magnitudes, -magnitudes])


@lru_cache
def dynamic() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit dynamic type: seven decades, each cut as finely as bits are left, twice."""
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [middle, -middle]
    return torch.cat(levels).sort().values
