"""The matrix as it is, in any floating-point type."""

from __future__ import annotations

from torch import Tensor

from deltaw.weights import Weight


class Dense(Weight):
    """A plain O x I tensor."""

    w_OI: Tensor

    def __init__(self, w_OI: Tensor) -> None:
        super().__init__()
        self.shape = (w_OI.shape[0], w_OI.shape[1])
        self.register_buffer("w_OI", w_OI)

    def dense(self) -> Tensor:
        return self.w_OI

    def repack(self, w_OI: Tensor) -> Dense:
        return Dense(w_OI.to(self.w_OI.dtype))
