"""Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of numbers turned by angles; nothing is kept but those."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.plain import LANES, plainly


def rotate(x_THE: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
    """Turn every pair (x[e], x[e + W/2]) by its token's angle; numbers beyond the angles' width W stay."""
    width, size = cos_T1W.shape[-1], x_THE.shape[-1]
    by_itself = x_THE[:1].is_contiguous() and not (cos_T1W.requires_grad or sin_T1W.requires_grad)
    if by_itself and width % (2 * LANES) == size % LANES == 0 and plainly("turn", x_THE[:1], cos_T1W, sin_T1W):
        y_THE: Tensor = _Turn.apply(x_THE, cos_T1W, sin_T1W)  # type: ignore[no-untyped-call]  # torch's
        return y_THE
    if width < size:
        return torch.cat((rotate(x_THE[..., :width], cos_T1W, sin_T1W), x_THE[..., width:]), -1)
    a, b = x_THE.chunk(2, -1)
    return x_THE * cos_T1W + torch.cat((-b, a), -1) * sin_T1W


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1W, sin_T1W)
        return _turned(x_THE, cos_T1W, sin_T1W, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor, None, None]:
        cos_T1W, sin_T1W = ctx.saved_tensors
        return _turned(dy_THE.contiguous(), cos_T1W, sin_T1W, -1.0), None, None


def _turned(x_THE: Tensor, cos_T1W: Tensor, sin_T1W: Tensor, way: float) -> Tensor:
    t, h, e = x_THE.shape
    y_THE = torch.empty(t, h, e, dtype=x_THE.dtype)
    plainly("turn", y_THE, cos_T1W)(
        x_THE.data_ptr(), x_THE.stride(0), cos_T1W.data_ptr(), sin_T1W.data_ptr(), y_THE.data_ptr(), t, h, e,
        cos_T1W.shape[-1], way)  # fmt: skip
    return y_THE
