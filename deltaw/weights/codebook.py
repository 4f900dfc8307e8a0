"""Codes into a table of levels, times a scale for each block: the NormalFloats and FP4 of bitsandbytes, and others.

The matrix is taken row by row as one line of numbers, cut into blocks wherever rows end; the last one may be short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from deltaw.kernels.library import LANES
from deltaw.kernels.packed import Layout, nearest
from deltaw.weights import PACKED_AT_ONCE, Format, Packed
from deltaw.weights.bits import pack, stored_bytes, unpack
from deltaw.weights.levels import fp4, normal
from deltaw.weights.scales import Plain, Scales


@dataclass(frozen=True)
class Codebook(Format):
    """`width` bits a number, into NormalFloat or FP4; a scale for every `block` of them."""

    width: int = 4
    block: int = 64
    scales: Scales = field(default_factory=Plain)
    fp4: bool = False

    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> Coded:
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
            some = flat[start : start + step].float()
            yield torch.nn.functional.pad(some, (0, -len(some) % self.block)).view(-1, self.block)

    def stored_bytes(self, o: int, i: int) -> int:
        return stored_bytes(o * i, self.width) + self.scales.size(-(-o * i // self.block))

    def __str__(self) -> str:
        block = "" if self.block == 64 else f"-b{self.block}"
        return f"{'fp' if self.fp4 else 'nf'}{self.width}{block}{self.scales}"

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> Coded:
        return Coded(self, shape, dtype, kept)

    def levels(self, device: torch.device) -> Tensor:
        """What every code stands for, as a share of the block's scale."""
        return _levels(self.width, self.fp4).to(device)


class Coded(Packed):
    """A matrix as codes and scales."""

    form: Codebook
    codes: Tensor

    def layout(self) -> Layout:
        form, (o, i) = self.form, self.shape
        scales = form.scales.laid(self.kept, -(-o * i // form.block))
        return Layout((o, i), form.width, form.block, self.codes, levels=_table(form.width, form.fp4), **scales)

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
def _table(width: int, is_fp4: bool) -> Tensor:
    levels = _levels(width, is_fp4)
    return torch.nn.functional.pad(levels, (0, max(0, LANES - len(levels))))


@lru_cache
def _levels(width: int, is_fp4: bool) -> Tensor:
    return fp4() if is_fp4 else normal(width)
