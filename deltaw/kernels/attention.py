"""Softmax attention of documents laid one after another (native/attention.cpp): all of them in one call."""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.library import LANES, PLAIN, function

TENSORS = ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "spans")


class Call(ctypes.Structure):
    """What there is to attend to, as C has it."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        *((name, ctypes.c_void_p) for name in TENSORS),
        *((name, ctypes.c_int64) for name in ("documents", "tokens", "heads", "kv_heads", "size", "window")),
        ("scale", ctypes.c_float), ("bf16", ctypes.c_int32), ("threads", ctypes.c_int32),
    ]  # fmt: skip


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans: Sequence[tuple[int, int, int, int]], scale: float,
           window: int) -> Tensor | None:  # fmt: skip
    """What every token sees of its stem, if it has one, and of its document so far; None: torch is to do this.

    `spans`: start and stop of each document, and of its stem, which is a document before it; `window`: how many
    tokens are seen at most, or 0.
    """
    if (
        q_THE.device.type != "cpu"
        or q_THE.dtype not in PLAIN
        or not q_THE.dtype == k_TKE.dtype == v_TKE.dtype
        or q_THE.shape[1] % k_TKE.shape[1]
        or q_THE.shape[-1] % (2 * LANES)
        or not spans
        or not function("attend")
    ):
        return None
    seen_THE: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]  # torch's
        q_THE.contiguous(), k_TKE.contiguous(), v_TKE.contiguous(), torch.tensor(spans), scale, window)  # fmt: skip
    return seen_THE


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans: Tensor, scale: float,
                window: int) -> Tensor:  # fmt: skip
        tensors = {"q": q_THE, "k": k_TKE, "v": v_TKE, "spans": spans,
                   "out": torch.empty_like(q_THE), "lse": torch.empty(q_THE.shape[:2])}  # fmt: skip
        _call("attend", tensors, scale, window)
        ctx.save_for_backward(*tensors.values())
        ctx.names, ctx.told = tuple(tensors), (scale, window)
        return tensors["out"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THE: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | {"dout": dout_THE.contiguous()}
        grads = {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
        _call("attend_back", tensors | grads, *ctx.told)
        return grads["dq"], grads["dk"], grads["dv"], None, None, None


def _call(name: str, tensors: dict[str, Tensor], scale: float, window: int) -> None:
    q_THE = tensors["q"]
    sizes = len(tensors["spans"]), *q_THE.shape[:2], *tensors["k"].shape[1:], window
    pointers = (tensors[key].data_ptr() if key in tensors else None for key in TENSORS)
    narrow = int(q_THE.dtype == torch.bfloat16)
    function(name)(ctypes.byref(Call(*pointers, *sizes, scale, narrow, torch.get_num_threads())))
