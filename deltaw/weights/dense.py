"""The matrix as it is, in any floating-point type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels.products import Product, times
from deltaw.weights import TYPES, Format, Weight


@dataclass(frozen=True)
class Plainly(Format):
    """Numbers of this type; whatever they are multiplied with has another one, maybe."""

    kind: str

    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> Dense:
        return Dense(w_OI.detach().to(TYPES[self.kind], copy=True), dtype)  # whatever happens to the other then

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> Dense:  # noqa: ARG002 (w says it)
        return Dense(kept["w_OI"], dtype)

    def stored_bytes(self, o: int, i: int) -> int:
        return TYPES[self.kind].itemsize * o * i

    def __str__(self) -> str:
        return self.kind


class Dense(Weight):
    """A plain O x I tensor; `dtype`: the type it is multiplied in, if another."""

    w_OI: Tensor
    stands = True

    def __init__(self, w_OI: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape, self.dtype = (w_OI.shape[0], w_OI.shape[1]), dtype or w_OI.dtype
        self.register_buffer("w_OI", w_OI)

    def dense(self) -> Tensor:
        w_OI = self.w_OI
        return w_OI if w_OI.dtype == self.dtype else w_OI.to(self.dtype)

    def product(self, x_TI: Tensor, *also: Product) -> Tensor:
        return super().product(x_TI, *also) if also else times(x_TI, self.dense())

    def repack(self, w_OI: Tensor) -> Dense:
        return Dense(w_OI.to(self.w_OI.dtype), self.dtype)
