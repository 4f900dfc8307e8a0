"""Sums of matrix products in bf16, computed as one (native/products.cpp): c = a1 b1 + a2 b2 + ..., rounded once."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.library import AT, COUNT, FLAG, fields, function

FEWEST_ROWS = 16
"""Fewer are left to torch, unless each b is a matrix that was turned: else all of it would be laid for them."""
Product = tuple[Tensor, Tensor]
"""a of N x K, and b of K x M; either's rows may lie apart, and b may be a matrix that was turned."""


class Part(ctypes.Structure):
    """One product, as C has it."""

    _fields_ = fields((AT, "a b"), (COUNT, "across stride depth turned"))


class Sum(ctypes.Structure):
    """What is summed, and where to."""

    _fields_ = fields((AT, "parts c"), (COUNT, "count rows columns ld"), (FLAG, "onto threads"))


def summed(products: Sequence[Product], onto: Tensor | None = None, to: Tensor | None = None,
           fewest: int = FEWEST_ROWS) -> Tensor:  # fmt: skip
    """The sum of all a b; added to `onto`, or written to `to`, if either is there."""
    a_NK, b_KM = products[0]
    c_NM = to if onto is None else onto
    native = _native(products, c_NM) if len(a_NK) >= fewest or all(_turned(b_KM) for _, b_KM in products) else None
    if native is None:
        c_NM = torch.mm(a_NK, b_KM, out=to) if onto is None else onto.addmm_(a_NK, b_KM)
        for a_NK, b_KM in products[1:]:
            c_NM.addmm_(a_NK, b_KM)
        return c_NM
    if c_NM is None:
        c_NM = a_NK.new_empty(len(a_NK), b_KM.shape[1])
    parts = (Part * len(products))(*(_part(*each) for each in products))
    native(ctypes.byref(Sum(ctypes.addressof(parts), c_NM.data_ptr(), len(products), *c_NM.shape, c_NM.stride(0),
                            int(onto is not None), torch.get_num_threads())))  # fmt: skip
    return c_NM


def times(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """The product x W', for few rows by reading W as it lies, once; gradients are torch's."""
    learns = torch.is_grad_enabled() and (x_NI.requires_grad or w_OI.requires_grad)
    native = None if learns or x_NI.dtype != torch.bfloat16 or w_OI.dtype != torch.bfloat16 else function("product")
    if native is None or not (x_NI.is_cpu and w_OI.is_cpu and x_NI.numel() and w_OI.numel()
                              and x_NI.stride(1) == w_OI.stride(1) == 1):  # fmt: skip
        return F.linear(x_NI, w_OI)
    (rows, inputs), outputs = x_NI.shape, len(w_OI)
    y_NO = x_NI.new_empty(rows, outputs)
    native(x_NI.data_ptr(), w_OI.data_ptr(), y_NO.data_ptr(), rows, outputs, inputs, x_NI.stride(0), w_OI.stride(0),
           torch.get_num_threads())  # fmt: skip
    return y_NO


def across(a_TN: Tensor, b_TM: Tensor) -> Tensor:
    """The product a' b, for any number of rows: torch would keep code, and memory, for every number that it meets."""
    return summed([(a_TN.t().contiguous(), b_TM)], fewest=1)


def _native(products: Sequence[Product], c_NM: Tensor | None) -> Any:
    """What does it natively; None: torch does."""
    if not (found := function("summed")):
        return None
    tensors = [*(t for each in products for t in each), *(() if c_NM is None else (c_NM,))]
    flat = all(t.numel() and t.dtype == torch.bfloat16 and t.device.type == "cpu" and 1 in t.stride() for t in tensors)
    rows = all(a_NK.stride(1) == 1 for a_NK, _ in products) and (c_NM is None or c_NM.stride(1) == 1)
    return found if flat and rows else None


def _turned(b_KM: Tensor) -> bool:
    return b_KM.stride(0) == 1 and b_KM.stride(1) != 1


def _part(a_NK: Tensor, b_KM: Tensor) -> Part:
    turned = _turned(b_KM)
    return Part(a_NK.data_ptr(), b_KM.data_ptr(), a_NK.stride(0), b_KM.stride(int(turned)), a_NK.shape[1], int(turned))
