"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): x / rms(x) * gain."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.plain import LANES, plainly


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Each of the rows of the last dimension by its root mean square, times the gain; shaped as x is."""
    call = None if len(gain_D) % LANES else plainly("norm", x, gain_D)
    if call is None:
        return F.rms_norm(x, x.shape[-1:], gain_D, eps)
    normed: Tensor = _Norm.apply(x, gain_D, eps, call)  # type: ignore[no-untyped-call]  # torch's
    return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float, call: Any) -> Tensor:
        rows, y = x.numel() // len(gain_D), torch.empty_like(x)
        inverse_N = torch.empty(rows)
        call(x.data_ptr(), gain_D.data_ptr(), y.data_ptr(), inverse_N.data_ptr(), rows, len(gain_D), eps)
        ctx.save_for_backward(x, gain_D, inverse_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, gain_D, inverse_N = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        plainly("norm_back", x, gain_D, dy)(x.data_ptr(), gain_D.data_ptr(), inverse_N.data_ptr(), dy.data_ptr(),
                                            dx.data_ptr(), len(inverse_N), len(gain_D))  # fmt: skip
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dgain_D = (dy.float() * x.float()).view(-1, len(gain_D)).mul_(inverse_N[:, None]).sum(0)
        return dx, dgain_D.to(gain_D.dtype), None, None
