"""How a frozen weight is stored: a format knows how to multiply, unpack and pack again; the plain one is here.

Shape legend (whole package): B batch, T tokens, S tokens seen, V vocabulary, D model width, H query heads, K key/value
heads, E head width, I in-features, O out-features, R rank, G groups, N rows with a label, or blocks of a matrix.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaw.kernels.library import PLAIN
from deltaw.kernels.packed import FEW, SCRATCH, Layout, Native, native
from deltaw.kernels.products import Product, summed, times

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What plain numbers may be stored as."""
PACKED_AT_ONCE = 1 << 20
"""Numbers of a matrix that are turned into codes at a time."""


class Format(ABC):
    """A recipe by which a matrix is stored, and what it needs."""

    @abstractmethod
    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> "Weight":
        """Store a matrix; it is multiplied with, and unpacked, in `dtype`."""

    @abstractmethod
    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> "Weight":
        """A weight of tensors that were kept of one."""

    @abstractmethod
    def stored_bytes(self, o: int, i: int) -> int:
        """Bytes of an O x I matrix."""

    @abstractmethod
    def __str__(self) -> str:
        """The name by which `formats.parse` knows it."""


class Weight(nn.Module):
    """A frozen O x I matrix in some storage format. What is stored are its buffers; nothing else grows with it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    stands = False
    """Whether what is lent stays as it is when another is lent."""

    def dense(self) -> Tensor:
        """Unpack to a plain matrix W_OI."""
        raise NotImplementedError

    def repack(self, w_OI: Tensor) -> "Weight":
        """Store another matrix in this very format."""
        raise NotImplementedError

    def lent(self) -> Tensor:
        """Unpack to a plain matrix that is good until another is lent to this thread."""
        return self.dense()

    def product(self, x_TI: Tensor, *also: Product) -> Tensor:
        """Return x W' as y_TO, with other products added; nothing is remembered for a backward pass."""
        return summed([(x_TI, self.lent().t()), *also])

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return x W' as y_TO; for the backward pass neither x nor a dense copy of W is kept."""
        if x_TI.requires_grad and torch.is_grad_enabled():
            return FrozenMatmul.apply(x_TI, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(x_TI)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(t.nbytes for t in self.buffers())


class Packed(Weight):
    """A matrix that is stored by a `format`, in its parts."""

    _native: Native | None = None
    _native_of: tuple[int, ...] = ()

    def __init__(self, form: Format, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.form, self.shape, self.dtype = form, (shape[0], shape[1]), dtype
        for name, t in kept.items():
            self.register_buffer(name, t)

    @property
    def kept(self) -> dict[str, Tensor]:
        """What is stored, by name: where processes share it, its matrices are parameters."""
        return {**dict(self.named_buffers()), **dict(self.named_parameters())}

    def layout(self) -> Layout:
        """How native code reads it."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """Unpack by torch alone, as native code does: columns as they are stored."""
        raise NotImplementedError

    def native(self) -> Native | None:
        """What reads this natively, if anything does: made anew only when what is stored was replaced."""
        stored = *self._buffers.values(), *self._parameters.values()  # asked for every product: quickly
        at = tuple([t.data_ptr() for t in stored if t is not None])
        if self._native is None or at != self._native_of:
            made = native(self.layout())
            if made is None or not made.layout.lasting:
                self._native = None  # nor does it keep what was moved elsewhere
                return made
            self._native, self._native_of = made, at
        return self._native

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._native = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_native")}

    def dense(self) -> Tensor:
        return self.unpacked(torch.empty)

    def lent(self) -> Tensor:
        return self.unpacked(SCRATCH.of)

    def unpacked(self, place: Callable[..., Tensor]) -> Tensor:
        """Unpack to a plain matrix, natively to a place that is given for its shape and type."""
        if self.dtype in PLAIN and (native := self.native()):
            return native.unpack(place(self.shape, dtype=self.dtype))
        return self.plain()

    def product(self, x_TI: Tensor, *also: Product) -> Tensor:
        if len(x_TI) <= FEW and (native := self.native()):
            y_TO = native.multiply(x_TI if x_TI.dtype in PLAIN else x_TI.float()).to(x_TI.dtype)
            return summed(also, onto=y_TO) if also else y_TO
        return super().product(x_TI, *also)

    def repack(self, w_OI: Tensor) -> Weight:
        return self.form.pack(w_OI, self.dtype)


class FrozenMatmul(torch.autograd.Function):
    """y = x W', dx = dy W. The weight never gets a gradient, so x is not saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return weight.product(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, None]:
        return summed([(dy_TO, ctx.weight.lent())]), None


@dataclass(frozen=True)
class Plainly(Format):
    """Numbers of this type; whatever they are multiplied with has another one, maybe."""

    kind: str

    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> "Dense":
        return Dense(w_OI.detach().to(TYPES[self.kind], copy=True), dtype)  # whatever happens to the other then

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> "Dense":  # noqa: ARG002 (w says it)
        return Dense(kept["w_OI"], dtype)

    def stored_bytes(self, o: int, i: int) -> int:
        return TYPES[self.kind].itemsize * o * i

    def __str__(self) -> str:
        return self.kind


class Dense(Weight):
    """A plain O x I tensor; `dtype`: the type it is multiplied in, if another."""

    w_OI: Tensor
    stands = True

    def __init__(self, w_OI: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape, self.dtype = (w_OI.shape[0], w_OI.shape[1]), dtype or w_OI.dtype
        self.register_buffer("w_OI", w_OI)

    def dense(self) -> Tensor:
        w_OI = self.w_OI
        return w_OI if w_OI.dtype == self.dtype else w_OI.to(self.dtype)

    def product(self, x_TI: Tensor, *also: Product) -> Tensor:
        return super().product(x_TI, *also) if also else times(x_TI, self.dense())

    def repack(self, w_OI: Tensor) -> "Dense":
        return Dense(w_OI.to(self.w_OI.dtype), self.dtype)
