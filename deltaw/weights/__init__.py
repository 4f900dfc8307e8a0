"""How a frozen weight is stored: a format is a file here that knows how to multiply, unpack and pack again.

Shape legend (whole package): B batch, T tokens, S tokens seen, V vocabulary, D model width, H query heads, K key/value
heads, E head width, I in-features, O out-features, R rank, N rows with a label.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weight(nn.Module):
    """A frozen O x I matrix in some storage format."""

    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """Unpack to a plain matrix W_OI."""
        raise NotImplementedError

    def repack(self, w_OI: Tensor) -> Weight:
        """Store another matrix in this very format."""
        raise NotImplementedError

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return x W' as y_TO; for the backward pass neither x nor a dense copy of W is kept."""
        return FrozenMatmul.apply(x_TI, self)  # type: ignore[no-any-return, no-untyped-call]


class FrozenMatmul(torch.autograd.Function):
    """y = x W', dx = dy W. The weight never gets a gradient, so x is not saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x_TI, weight.dense())

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, None]:
        return dy_TO @ ctx.weight.dense(), None
