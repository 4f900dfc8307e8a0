"""Gated linear units (Shazeer 2020, arXiv:2002.05202): act(gate) * up, of which only gate and up are kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.plain import LANES, plainly


def gated(gate_TI: Tensor, up_TI: Tensor, gelu: bool) -> Tensor:
    """SiLU of the gate, or its GELU by tanh, times what is let through."""
    call = plainly("gated", gate_TI, up_TI) if gate_TI.numel() % LANES == 0 else None
    if call is None:
        return (F.gelu(gate_TI, approximate="tanh") if gelu else F.silu(gate_TI)) * up_TI
    y_TI: Tensor = _Gated.apply(gate_TI, up_TI, gelu, call)  # type: ignore[no-untyped-call]  # torch's
    return y_TI


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, gelu: bool, call: Any) -> Tensor:
        y_TI = torch.empty_like(gate_TI)
        call(gate_TI.data_ptr(), up_TI.data_ptr(), y_TI.data_ptr(), y_TI.numel(), gelu)
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.gelu = gelu
        return y_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TI: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_TI, up_TI = ctx.saved_tensors
        dy_TI, dgate_TI, dup_TI = dy_TI.contiguous(), torch.empty_like(gate_TI), torch.empty_like(up_TI)
        plainly("gated_back", gate_TI, up_TI, dy_TI)(
            gate_TI.data_ptr(), up_TI.data_ptr(), dy_TI.data_ptr(), dgate_TI.data_ptr(), dup_TI.data_ptr(),
            dy_TI.numel(), ctx.gelu)  # fmt: skip
        return dgate_TI, dup_TI, None, None
