"""Packed matrices (native/packed.cpp, native/codes.cpp): numbers into codes and back; few rows multiplied as read.

Codes of 2, 3, 4 or 8 bits lie in bytes, the first code in the highest bits, as bitsandbytes has it. Three bits are
stored as two and one, each packed by itself, so that no code lies across a byte's border.
"""

import ctypes
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.library import AT, COUNT, FLAG, LANES, fields, function

FEW = 8
"""Rows up to which reading the codes takes longer than the products do."""
WIDTHS = {4: 2, 8: 3, 16: 4, 256: 8}
"""Bits of a code, by how many levels there are."""
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Of how many bits the pieces of a code are, the lowest first; each divides a byte."""
KINDS = {None: 0, torch.float32: 1, torch.float16: 2, torch.uint8: 3}

TENSORS = ("codes", "levels", "scale", "offset", "nested", "most", "mean")


class Layout(NamedTuple):
    """How an O x I matrix lies in memory: w = levels[code] * scale + offset, with one of both for each block.

    Scales of 8 bits are codes into `nested`, times `most` of 256 of them, and `mean` more.
    """

    shape: tuple[int, int]
    width: int
    block: int
    codes: Tensor
    scale: Tensor
    levels: Tensor | None = None
    """Sixteen at least; without any, a code stands for itself."""
    offset: Tensor | None = None
    nested: Tensor | None = None
    most: Tensor | None = None
    mean: Tensor | None = None
    lasting: bool = True
    """Whether all of it is stored like that; else it was made, to be used once."""


class Matrix(ctypes.Structure):
    """A layout as C has it."""

    _fields_ = fields((AT, " ".join(TENSORS)), (COUNT, "rows columns block"), (FLAG, "width scale_kind offset_kind"))


class Native:
    """A layout that there is native code for, and what it is called with: made once, as it takes longer than a call."""

    def __init__(self, layout: Layout) -> None:
        pointers = (None if t is None else t.data_ptr() for t in map(layout._asdict().get, TENSORS))
        kinds = KINDS[layout.scale.dtype], KINDS[None if layout.offset is None else layout.offset.dtype]
        self.layout = layout  # whose tensors live as long as this points into them
        self._matrix = Matrix(*pointers, *layout.shape, layout.block, layout.width, *kinds)
        self._at = ctypes.addressof(self._matrix)

    def unpack(self, out_OI: Tensor) -> Tensor:
        """Write the plain numbers, to fp32 or bf16."""
        narrow = int(out_OI.dtype == torch.bfloat16)
        function("unpack")(self._at, out_OI.data_ptr(), narrow, torch.get_num_threads())
        return out_OI

    def multiply(self, x_TI: Tensor) -> Tensor:
        """Return x W' as y_TO, both in fp32 or both in bf16; its sums are in fp32."""
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(len(x_TI), self.layout.shape[0])
        narrow = int(x_TI.dtype == torch.bfloat16)
        function("multiply")(self._at, x_TI.data_ptr(), y_TO.data_ptr(), len(x_TI), narrow, torch.get_num_threads())
        return y_TO


def native(layout: Layout) -> Native | None:
    """What reads a matrix that lies so; None: there is no native code for it."""
    fits = layout.shape[1] > 0 == layout.shape[1] % LANES == layout.block % LANES
    return Native(layout) if fits and layout.codes.device.type == "cpu" and function("unpack") is not None else None


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Which of the ascending levels is nearest to each value, as uint8; of two that are as near, the lower."""
    edges = (levels[1:] + levels[:-1]) / 2
    call, width = function("nearest"), WIDTHS.get(len(levels))
    if call is None or width is None or values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.bucketize(values, edges).to(torch.uint8)
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    edges = torch.nn.functional.pad(edges.contiguous(), (0, max(1, LANES - len(edges))))
    threads = torch.get_num_threads()
    call(values.data_ptr(), values.numel(), edges.data_ptr(), width, codes.data_ptr(), threads)
    return codes


class Scratch(threading.local):
    """A place for one plain matrix at a time: fresh memory for each may cost more than unpacking it.

    One buffer for each thread, as large as the largest matrix so far.
    """

    held = torch.empty(0, dtype=torch.uint8)

    def of(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory for a matrix, until the next is asked for."""
        size = math.prod(shape) * dtype.itemsize
        if len(self.held) < size:
            self.held = torch.empty(size, dtype=torch.uint8)
        return self.held[:size].view(dtype).view(shape)


SCRATCH = Scratch()


def stored_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return sum(-(-count * piece // 8) for piece in PLANES[width])


def pack(codes_N: Tensor, width: int) -> Tensor:
    """Put codes below 2**width, as uint8, together; what is left of the last byte is zero."""
    planes, low = [], 0
    for piece in PLANES[width]:
        part_N, per = codes_N >> low & (1 << piece) - 1, 8 // piece
        if over := -len(part_N) % per:
            part_N = torch.nn.functional.pad(part_N, (0, over))
        part_N = part_N.view(-1, per)
        planes.append(sum((part_N[:, i] << 8 - piece * (i + 1) for i in range(1, per)), part_N[:, 0] << 8 - piece))
        low += piece
    return torch.cat(planes)


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The codes again, as uint8."""
    whole, low, start = torch.zeros(count, dtype=torch.uint8, device=packed.device), 0, 0
    for piece in PLANES[width]:
        size, per = -(-count * piece // 8), 8 // piece
        plane = packed[start : start + size]
        parts = torch.stack([plane >> 8 - piece * (i + 1) & (1 << piece) - 1 for i in range(per)], 1)
        whole |= parts.flatten()[:count] << low
        low, start = low + piece, start + size
    return whole
