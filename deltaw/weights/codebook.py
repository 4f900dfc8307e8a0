"""Codes into a table of levels, times a scale for each block: the NormalFloats and FP4 of bitsandbytes, and others.

The matrix is taken row by row as one line of numbers, cut into blocks wherever rows end; the last one may be short.
Levels are the values that codes stand for: NormalFloat of any width (Dettmers et al. 2023, arXiv:2305.14314) and FP4.
The scales of blocks are stored as they are, or quantised once more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.library import LANES
from deltaw.kernels.packed import Layout, nearest, pack, stored_bytes, unpack
from deltaw.weights import PACKED_AT_ONCE, TYPES, Format, Packed

Parts = Mapping[str, Tensor]
"""Tensors by name, as they are stored."""
OFFSET = 0.9677083
"""Quantile of the outermost level, as none is infinite: 1 - (1/30 + 1/32) / 2, to the digits of published code."""
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes of bitsandbytes' FP4 by its lower three bits, in twelfths; the highest bit is the sign."""


@lru_cache
def normal(width: int) -> Tensor:
    """NF of so many bits: quantiles of the normal distribution, 2**(width - 1) above zero, one less below, and zero.

    The narrower ones take the 4-bit offset, as bitsandbytes, LoftQ and LQ-LoRA do.
    """

    def quantiles(count: int) -> Tensor:
        found: Tensor = torch.special.ndtri(torch.linspace(OFFSET, 0.5, count)[:-1].double())
        return found

    half = 1 << width - 1
    levels = torch.cat([quantiles(half + 1), torch.zeros(1).double(), -quantiles(half)]).float()
    return (levels / levels.max()).sort().values


@lru_cache
def fp4() -> Tensor:
    """Bitsandbytes' FP4 by code; code 8 is zero too."""
    magnitudes = torch.tensor(FP4) / 12
    return torch.cat([magnitudes, -magnitudes])


@lru_cache
def dynamic() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit dynamic type: seven decades, each cut as finely as bits are left, twice."""
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [middle, -middle]
    return torch.cat(levels).sort().values


@dataclass(frozen=True)
class Plain:
    """Scales of blocks, as they are: one fp32 number a block."""

    exact = True
    """Whether numbers are divided by the scale itself, or by what is left of it."""

    def store(self, scale_N: Tensor) -> Parts:
        """What is kept of the scales."""
        return {"absmax": scale_N}

    def read(self, kept: Parts, count: int) -> Tensor:  # noqa: ARG002 (others need it)
        """The scales again, in fp32."""
        return kept["absmax"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:
        """What native code reads them from, by the names of `Layout`."""
        return {"scale": self.read(kept, count)}

    def size(self, count: int) -> int:
        """Bytes that so many scales take."""
        return 4 * count

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Double(Plain):
    """QLoRA's double quantisation, as bitsandbytes has it: the mean taken away, then 8-bit dynamic codes in blocks."""

    BLOCK = 256

    def store(self, scale_N: Tensor) -> Parts:
        mean = scale_N.mean()
        blocks, count = _blocks(scale_N - mean, self.BLOCK), len(scale_N)
        most = blocks.abs().amax(1)
        codes = nearest((blocks / most.clamp(min=1e-38)[:, None]).clamp(-1, 1), dynamic().to(scale_N.device))
        return {"codes2": codes.flatten()[:count], "absmax2": most, "mean": mean.view(1)}

    def read(self, kept: Parts, count: int) -> Tensor:
        values = dynamic().to(kept["codes2"].device)[kept["codes2"].int()]
        return (_blocks(values, self.BLOCK) * kept["absmax2"][:, None]).flatten()[:count] + kept["mean"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:  # noqa: ARG002 (others need it)
        return {"scale": kept["codes2"], "nested": dynamic(), "most": kept["absmax2"], "mean": kept["mean"]}

    def size(self, count: int) -> int:
        return count + 4 * -(-count // self.BLOCK) + 4

    def __str__(self) -> str:
        return "-dq"


@dataclass(frozen=True)
class TwoLevel(Plain):
    """LQ-LoRA's: the least scale taken away, then unsigned integers in blocks whose maxima have a type of their own.

    The published code needs whole blocks, and fails where all scales of one are equal; here either is stored.
    """

    width: int = 8
    kind: str = "fp32"
    block: int = 256
    exact = False

    def store(self, scale_N: Tensor) -> Parts:
        least, top = scale_N.min(), (1 << self.width) - 1
        blocks = _blocks(scale_N - least, self.block)
        most = blocks.amax(1).to(TYPES[self.kind])
        codes = (blocks * top / most.float().clamp(min=1e-38)[:, None]).round().clamp(0, top)
        return {"codes2": pack(codes.flatten()[: len(scale_N)].to(torch.uint8), self.width), "most": most,
                "least": least.view(1)}  # fmt: skip

    def read(self, kept: Parts, count: int) -> Tensor:
        codes = _blocks(unpack(kept["codes2"], self.width, count).float(), self.block)
        step = kept["most"].float()[:, None] / ((1 << self.width) - 1)
        return (codes * step).flatten()[:count] + kept["least"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:
        return {"scale": self.read(kept, count), "lasting": False}

    def size(self, count: int) -> int:
        return stored_bytes(count, self.width) + TYPES[self.kind].itemsize * -(-count // self.block) + 4

    def __str__(self) -> str:
        return f"-s{self.width}.{self.kind}.{self.block}"


def _blocks(values_N: Tensor, block: int) -> Tensor:
    """Rows of one block each, the last filled up with zeros."""
    return torch.nn.functional.pad(values_N, (0, -len(values_N) % block)).view(-1, block)


@dataclass(frozen=True)
class Codebook(Format):
    """`width` bits a number, into NormalFloat or FP4; a scale for every `block` of them."""

    width: int = 4
    block: int = 64
    scales: Plain = field(default_factory=Plain)
    fp4: bool = False

    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> "Coded":
        flat, count = w_OI.detach().flatten(), w_OI.numel()
        most = torch.cat([blocks.abs().amax(1) for blocks in self._blocks(flat)])
        kept = self.scales.store(most)
        by_N = (most if self.scales.exact else self.scales.read(kept, len(most))).clamp(min=1e-38)[:, None]
        levels, order = self.levels(w_OI.device).sort(stable=True)
        order = order.to(torch.uint8)
        parts, first = list[Tensor](), 0
        for blocks in self._blocks(flat):
            by, first = by_N[first : first + len(blocks)], first + len(blocks)
            scaled = blocks * (1 / by)
            if first == len(by_N) and count % self.block:
                scaled[-1] = blocks[-1] / by[-1]  # to the last bit as bitsandbytes has it
            parts.append(nearest(scaled.flatten(), levels))
        parts = [order[part.int()] if self.fp4 else part for part in parts]  # all others ascend
        zero = order[nearest(torch.zeros(1, device=w_OI.device), levels).int()]
        codes = torch.cat([torch.cat(parts)[:count], *[zero] * (count % 2 * (self.width == 4))])
        return Coded(self, (w_OI.shape[0], w_OI.shape[1]), dtype, {"codes": pack(codes, self.width), **kept})

    def _blocks(self, flat: Tensor) -> Iterator[Tensor]:
        """Blocks as rows, in fp32, the last filled up with zeros: some at a time, or packing took several copies."""
        step = max(1, PACKED_AT_ONCE // self.block) * self.block
        for start in range(0, len(flat), step):
            yield _blocks(flat[start : start + step].float(), self.block)

    def stored_bytes(self, o: int, i: int) -> int:
        return stored_bytes(o * i, self.width) + self.scales.size(-(-o * i // self.block))

    def __str__(self) -> str:
        block = "" if self.block == 64 else f"-b{self.block}"
        return f"{'fp' if self.fp4 else 'nf'}{self.width}{block}{self.scales}"

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> "Coded":
        return Coded(self, shape, dtype, kept)

    def levels(self, device: torch.device) -> Tensor:
        """What every code stands for, as a share of the block's scale."""
        return (fp4() if self.fp4 else normal(self.width)).to(device)


class Coded(Packed):
    """A matrix as codes and scales."""

    form: Codebook
    codes: Tensor

    def layout(self) -> Layout:
        form, (o, i) = self.form, self.shape
        scales = form.scales.laid(self.kept, -(-o * i // form.block))
        return Layout((o, i), form.width, form.block, self.codes, levels=_table(form), **scales)

    def plain(self) -> Tensor:
        form, count = self.form, self.shape[0] * self.shape[1]
        levels = form.levels(self.codes.device)
        if form.width == 4:  # two numbers for each byte, at once
            pairs = torch.cartesian_prod(levels, levels)
            flat = pairs.index_select(0, self.codes.int()).flatten()[:count]
        else:
            flat = levels.index_select(0, unpack(self.codes, form.width, count).int())
        scale_N = form.scales.read(self.kept, -(-count // form.block))
        if count % form.block:
            flat *= scale_N.repeat_interleave(form.block)[:count]
        else:
            flat.view(-1, form.block).mul_(scale_N[:, None])
        return flat.view(self.shape).to(self.dtype)


@lru_cache
def _table(form: Codebook) -> Tensor:
    levels = form.levels(torch.device("cpu"))
    return torch.nn.functional.pad(levels, (0, max(0, LANES - len(levels))))
