"""Calls of native functions as a list, made once (native/program.cpp): in bf16, where a processor multiplies it."""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaw.kernels import worn
from deltaw.kernels.attention import Paged
from deltaw.kernels.library import AT, COUNT, FLAG, WIDE, fields, function

KINDS = ("norm", "product", "add", "turn", "paged", "gated", "wear")


class Op(ctypes.Structure):
    """One call, as C has it."""

    _fields_ = fields((COUNT, "kind"), (AT * 5, "at"), (COUNT * 4, "sizes"), (WIDE, "number"))


class Angles(ctypes.Structure):
    """By what pairs are turned, as C has it."""

    _fields_ = fields((AT, "cosine sine"), (COUNT, "width"))


class Program(ctypes.Structure):
    """A list of calls, and what is another for every step, as C has them."""

    _fields_ = fields((AT, "ops"), (COUNT, "count rows"), (Angles * 2, "angles"), (Paged, "paged"), (worn.Call, "worn"),
                      (FLAG, "threads"))  # fmt: skip


class Calls:
    """A list of calls that are told one by one, and made at once as often as is asked."""

    def __init__(self) -> None:
        self.native = function("program")
        self.told, self.held = list[Op](), list[Tensor]()

    def tell(self, kind: str, *tensors: Tensor, sizes: Sequence[int] = (), number: float = 0.0) -> None:
        """Add a call of this kind. Its tensors are held; what sizes mean is said in native/program.cpp."""
        self.held += tensors
        places = (AT * 5)(*(t.data_ptr() for t in tensors))
        self.told.append(Op(KINDS.index(kind), places, (COUNT * 4)(*sizes), number))

    def make(self, rows: int, angles: Sequence[Tensor], seen: Mapping[str, int],
             wear: Mapping[str, int]) -> None:  # fmt: skip
        """Make all calls for so many rows. Angles: cosines and sines, of shape 2 x T x 1 x E, contiguous."""
        ops = (Op * len(self.told))(*self.told)
        by = (Angles * 2)(*(Angles(a[0].data_ptr(), a[1].data_ptr(), a.shape[-1]) for a in angles))
        calls = Paged(**seen), worn.Call(**wear, bf16=1)
        told = Program(ctypes.addressof(ops), len(ops), rows, by, *calls, torch.get_num_threads())
        self.native(ctypes.byref(told))
