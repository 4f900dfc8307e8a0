"""What a row goes through beside products (native/rows.cpp): norm, gate, turn, and the surprise of its label.

RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): x / rms(x) * gain. Gated linear units (Shazeer 2020,
arXiv:2002.05202): act(gate) * up, of which only gate and up are kept. Rotary positions (Su et al. 2021,
arXiv:2104.09864): pairs of numbers turned by angles; nothing is kept but those. And how surprising a label is, by its
row of logits: log sum exp(z) - z[label], and what that asks of the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.library import LANES, plainly


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Each of the rows of the last dimension by its root mean square, times the gain; shaped as x is."""
    call = None if len(gain_D) % LANES else plainly("norm", x, gain_D)
    if call is None:
        return F.rms_norm(x, x.shape[-1:], gain_D, eps)
    return _Norm.apply(x, gain_D, eps, call)  # type: ignore[no-any-return, no-untyped-call]  # torch's


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float, call: Any) -> Tensor:
        rows, y = x.numel() // len(gain_D), torch.empty_like(x)
        inverse_N = torch.empty(rows)
        call(x, gain_D, y, inverse_N, rows, len(gain_D), eps)
        ctx.save_for_backward(x, gain_D, inverse_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, gain_D, inverse_N = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        plainly("norm_back", x, gain_D, dy)(x, gain_D, inverse_N, dy, dx, len(inverse_N), len(gain_D))
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dgain_D = (dy.float() * x.float()).view(-1, len(gain_D)).mul_(inverse_N[:, None]).sum(0)
        return dx, dgain_D.to(gain_D.dtype), None, None


def gated(gate_TI: Tensor, up_TI: Tensor, gelu: bool) -> Tensor:
    """SiLU of the gate, or its GELU by tanh, times what is let through."""
    call = plainly("gated", gate_TI, up_TI) if gate_TI.numel() % LANES == 0 else None
    if call is None:
        return (F.gelu(gate_TI, approximate="tanh") if gelu else F.silu(gate_TI)) * up_TI
    return _Gated.apply(gate_TI, up_TI, gelu, call)  # type: ignore[no-any-return, no-untyped-call]  # torch's


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, gelu: bool, call: Any) -> Tensor:
        y_TI = torch.empty_like(gate_TI)
        call(gate_TI, up_TI, y_TI, y_TI.numel(), gelu)
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.gelu = gelu
        return y_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TI: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_TI, up_TI = ctx.saved_tensors
        dy_TI, dgate_TI, dup_TI = dy_TI.contiguous(), torch.empty_like(gate_TI), torch.empty_like(up_TI)
        back = plainly("gated_back", gate_TI, up_TI, dy_TI)
        back(gate_TI, up_TI, dy_TI, dgate_TI, dup_TI, dy_TI.numel(), ctx.gelu)
        return dgate_TI, dup_TI, None, None


def rotate(x_THE: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
    """Turn every pair (x[e], x[e + W/2]) by its token's angle; numbers beyond the angles' width W stay."""
    width, size = cos_T1W.shape[-1], x_THE.shape[-1]
    by_itself = x_THE[:1].is_contiguous() and not (cos_T1W.requires_grad or sin_T1W.requires_grad)
    if by_itself and width % (2 * LANES) == size % LANES == 0 and plainly("turn", x_THE[:1], cos_T1W, sin_T1W):
        return _Turn.apply(x_THE, cos_T1W, sin_T1W)  # type: ignore[no-any-return, no-untyped-call]  # torch's
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
    turn = plainly("turn", y_THE, cos_T1W)
    turn(x_THE, x_THE.stride(0), cos_T1W, sin_T1W, y_THE, t, h, e, cos_T1W.shape[-1], way)
    return y_THE


def surprise(logits_NV: Tensor, labels_N: Tensor, back: bool) -> Tensor:
    """The loss of each row, in nats and fp32. With `back`, logits become its gradient, softmax(z) - onehot(label)."""
    call, labels_N = plainly("surprise", logits_NV), labels_N.contiguous()
    if call is not None:
        loss_N = torch.empty(len(labels_N))
        call(logits_NV, labels_N, loss_N, *logits_NV.shape, back)
        return loss_N
    wide_NV, label_N1 = logits_NV.float(), labels_N[:, None]
    lse_N1 = wide_NV.logsumexp(1, keepdim=True)
    loss_N = (lse_N1 - wide_NV.gather(1, label_N1))[:, 0]
    if back:
        shares_NV = (wide_NV - lse_N1).exp_()
        logits_NV.copy_(shares_NV.scatter_add_(1, label_N1, torch.full_like(lse_N1, -1.0)))
    return loss_N
