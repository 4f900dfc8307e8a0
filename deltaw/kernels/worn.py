"""What each row of a batch wears at a linear layer, beside others that wear other things (native/worn.cpp).

An adapter is one piece of memory: a directory, and for each layer A, B, gain and bias, read where they lie.

`Calls`: calls of native functions, these among them, as a list that is made once (native/program.cpp): in bf16, where a
processor multiplies it.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.attention import Paged
from deltaw.kernels.library import AT, COUNT, FLAG, NUMBER, PLAIN, WIDE, fields, function
from deltaw.kernels.products import Product, summed

LAYOUT = "panels-summed"
"""What the way is called in which a slab lies: files of another one are none of ours."""
SIDE = 32
"""Columns of a panel of B, which lie together."""
FIELDS = 5
"""Of a directory's row: the rank, and how many bytes from the beginning A, B, gain and bias lie (0: nowhere)."""
ALIGNED = 64
Part = tuple[int, int]
"""Which of how many."""


class Change(NamedTuple):
    """What an adapter adds to y = W x + b of one layer: gain y + B (A x) + bias. A may be a part of its rows."""

    A_RI: Tensor
    B_RO: Tensor
    gain_O: Tensor | None = None
    bias_O: Tensor | None = None


class Slab:
    """One adapter in one piece of memory: for each layer of a model, by its number, a `Change` or nothing."""

    def __init__(self, memory: Tensor, layers: int, dtype: torch.dtype) -> None:
        self.memory, self.dtype = memory, dtype
        self.directory = memory[: layers * FIELDS * 8].view(torch.int64).view(layers, FIELDS).tolist()

    @classmethod
    def of(cls, changes: Sequence[Change | None], dtype: torch.dtype) -> "Slab":
        """Lay changes of all layers, in order, into memory of their own."""
        size, rows, parts = _up(len(changes) * FIELDS * 8), list[list[int]](), list[tuple[int, Tensor]]()
        for change in changes:
            rows.append([0 if change is None else len(change.B_RO)])
            for part in (None,) * 4 if change is None else change._replace(B_RO=_panels(change.B_RO, dtype)):
                rows[-1].append(0 if part is None else size)
                if part is not None:
                    parts.append((size, part.detach().to(dtype).contiguous()))
                    size = _up(size + parts[-1][1].nbytes)
        memory = torch.zeros(size, dtype=torch.uint8)
        memory[: len(rows) * FIELDS * 8] = torch.tensor(rows).view(-1).view(torch.uint8)
        for at, part in parts:
            memory[at : at + part.nbytes] = part.view(-1).view(torch.uint8)
        return cls(memory, len(changes), dtype)

    @classmethod
    def mapped(cls, path: Path, layers: int, dtype: torch.dtype) -> "Slab | None":
        """One that was saved: its memory is the file's, read from the disk now; None: it is damaged, or not there."""
        if not path.exists() or path.stat().st_size <= ALIGNED:
            return None
        whole = np.memmap(path, np.uint8, "c")
        memory, summed = whole[:-ALIGNED], int.from_bytes(whole[-ALIGNED:].tobytes(), "little")
        return cls(torch.from_numpy(memory), layers, dtype) if crc32(memory.data) == summed else None

    def save(self, path: Path) -> None:
        """Write it as it lies, and behind it a checksum."""
        memory = self.memory.numpy()
        with path.open("wb") as f:
            memory.tofile(f)
            f.write(crc32(memory.data).to_bytes(ALIGNED, "little"))

    def change(self, layer: int, inputs: int, outputs: int) -> Change | None:
        """What it adds to a layer, as a whole."""
        rank, *places = self.directory[layer]
        if not any(places):
            return None
        each = 4 // self.dtype.itemsize
        panels = _up(outputs, SIDE) // SIDE, _up(rank, 2) // each, SIDE, each
        shapes = (rank, inputs), panels, (outputs,), (outputs,)
        A_RI, B, *more = (self._view(at, shape) if at else None for at, shape in zip(places, shapes, strict=True))
        assert A_RI is not None
        assert B is not None
        return Change(A_RI, B.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:rank, :outputs], *more)

    def down(self, x_TI: Tensor, layer: int, part: Part = (0, 1)) -> Tensor:
        """What comes of x by the rows of A that are here: all of them, or a part's."""
        rank, at, *_ = self.directory[layer]
        return x_TI @ self._view(at, (len(share(rank, part)), x_TI.shape[1])).t()

    def _view(self, at: int, shape: tuple[int, ...]) -> Tensor:
        return self.memory[at : at + math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)


def share(count: int, part: Part) -> range:
    """What one of several has of so many; the first have one more."""
    return range(*(-(-count * each // part[1]) for each in (part[0], part[0] + 1)))


def _up(size: int, to: int = ALIGNED) -> int:
    return -(-size // to) * to


def _panels(B_RO: Tensor, dtype: torch.dtype) -> Tensor:
    """B as it is read: panels of SIDE columns, and in them words of as many ranks as are multiplied at once."""
    each, (rank, outputs) = 4 // dtype.itemsize, B_RO.shape
    B = F.pad(B_RO.detach().to(dtype), (0, -outputs % SIDE, 0, rank % 2))
    return B.view(len(B) // each, each, B.shape[1] // SIDE, SIDE).permute(2, 0, 3, 1)


class Group(ctypes.Structure):
    """Rows that wear the same, as C has it."""

    _fields_ = fields((COUNT, "start stop first last"))


class Each(ctypes.Structure):
    """An adapter and its weight, as C has it."""

    _fields_ = fields((AT, "adapter"), (NUMBER, "weight"))


class Call(ctypes.Structure):
    """What is worn at one layer, as C has it."""

    _fields_ = fields((AT, "x y groups each down"), (COUNT, "count layer inputs outputs x_across y_across"),
                      (COUNT, "down_across part parts"), (FLAG, "bf16 threads"))  # fmt: skip


class Rows(NamedTuple):
    """Rows `start:stop` of a batch, and the adapters they wear, each with a weight."""

    start: int
    stop: int
    worn: tuple[tuple[Slab, float], ...]


class Wear:
    """What the rows of one batch wear, at all layers."""

    def __init__(self, rows: Sequence[Rows]) -> None:
        self.native, few, self.many = function("wear"), list[Rows](), list[Rows]()
        self.rows = [each for each in rows if each.worn]
        for each in self.rows:
            natively = self.native and all(slab.dtype in PLAIN and slab.memory.is_cpu for slab, _ in each.worn)
            (few if natively else self.many).append(each)
        ends = list(accumulate((len(each.worn) for each in few), initial=0))
        self.groups = (Group * len(few))(*(Group(r.start, r.stop, *ends[i : i + 2]) for i, r in enumerate(few)))
        self.each = (Each * ends[-1])(*(Each(slab.memory.data_ptr(), w) for r in few for slab, w in r.worn))

    def told(self) -> dict[str, int]:
        """What a native call is told that is the same at all layers."""
        groups, each = ctypes.addressof(self.groups), ctypes.addressof(self.each)
        return {"groups": groups, "each": each, "count": len(self.groups), "threads": torch.get_num_threads()}

    def onto(self, y_TO: Tensor, x_TI: Tensor, layer: int) -> Tensor:
        """Add what is worn at this layer to its output y_TO, in place. Rows of both lie whole in memory."""
        self._call(layer, y_TO.dtype, x_TI.shape[1], y_TO.shape[1], x=x_TI, y=y_TO)
        for start, stop, worn in self.many:
            downs = [weight * slab.down(x_TI[start:stop], layer) for slab, weight in worn]
            _add(y_TO[start:stop], worn, layer, downs)
        return y_TO

    def down(self, x_TI: Tensor, layer: int, part: Part) -> Tensor:
        """What is between A and B: of each row weight * A x, of all adapters one after another, in float32.

        `part`: which of A's rows are here; what others make is 0, so that all parts' are to be summed.
        """
        ranks = [[slab.directory[layer][0] for slab, _ in each.worn] for each in self.rows]
        h_TR = torch.zeros(len(x_TI), max(map(sum, ranks), default=0), device=x_TI.device)
        self._call(layer, x_TI.dtype, x_TI.shape[1], 0, part, x=x_TI, down=h_TR)
        for start, stop, worn in self.many:
            first = 0
            for slab, weight in worn:
                own = share(slab.directory[layer][0], part)
                here_TR = h_TR[start:stop, first + own.start : first + own.stop]
                here_TR.copy_(weight * slab.down(x_TI[start:stop], layer, part))
                first += slab.directory[layer][0]
        return h_TR

    def up(self, y_TO: Tensor, h_TR: Tensor, layer: int) -> Tensor:
        """Add what comes of it to this layer's output y_TO, in place, with what else is worn here."""
        self._call(layer, y_TO.dtype, 0, y_TO.shape[1], y=y_TO, down=h_TR)
        for start, stop, worn in self.many:
            ranks = [slab.directory[layer][0] for slab, _ in worn]
            downs = torch.split(h_TR[start:stop, : sum(ranks)].to(y_TO.dtype), ranks, 1)
            _add(y_TO[start:stop], worn, layer, downs)
        return y_TO

    def _call(self, layer: int, dtype: torch.dtype, inputs: int, outputs: int, part: Part = (0, 1),
              **tensors: Tensor) -> None:  # fmt: skip
        if len(self.groups):
            told = {name: t.data_ptr() for name, t in tensors.items()} | {"inputs": inputs, "outputs": outputs}
            told |= {f"{name}_across": t.stride(0) for name, t in tensors.items()}
            told |= {"part": part[0], "parts": part[1]}
            self.native(ctypes.byref(Call(**self.told(), **told, layer=layer, bf16=dtype == torch.bfloat16)))


def _add(y_TO: Tensor, worn: Sequence[tuple[Slab, float]], layer: int, downs: Sequence[Tensor]) -> None:
    products, more_TO = list[Product](), None
    for (slab, weight), down_TR in zip(worn, downs, strict=True):
        if (change := slab.change(layer, 0, y_TO.shape[1])) is None:
            continue
        products.append((down_TR, change.B_RO))
        for part, by in (change.gain_O, y_TO), (change.bias_O, None):
            if part is not None:
                own_TO = weight * (part.float() if by is None else part.float() * by.float())
                more_TO = own_TO if more_TO is None else more_TO + own_TO
    if more_TO is not None:  # of what y was before
        y_TO += more_TO.to(y_TO.dtype)
    if products:
        summed(products, onto=y_TO)


KINDS = ("norm", "product", "add", "turn", "paged", "gated", "wear")


class Op(ctypes.Structure):
    """One call, as C has it."""

    _fields_ = fields((COUNT, "kind"), (AT * 5, "at"), (COUNT * 4, "sizes"), (WIDE, "number"))


class Angles(ctypes.Structure):
    """By what pairs are turned, as C has it."""

    _fields_ = fields((AT, "cosine sine"), (COUNT, "width"))


class Program(ctypes.Structure):
    """A list of calls, and what is another for every step, as C has them."""

    _fields_ = fields((AT, "ops"), (COUNT, "count rows"), (Angles * 2, "angles"), (Paged, "paged"), (Call, "worn"),
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
        calls = Paged(**seen), Call(**wear, bf16=1)
        told = Program(ctypes.addressof(ops), len(ops), rows, by, *calls, torch.get_num_threads())
        self.native(ctypes.byref(told))
