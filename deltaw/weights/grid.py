"""Whole numbers in groups along each row: w = scale * code + offset, both floating-point, one of each for a group.

As llama.cpp's Q4_1 and torch's int4 product have it. That offsets are floating-point is what QA-LoRA needs: integer
zero points round away all that is smaller than half a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels.packed import Layout
from deltaw.weights import PACKED_AT_ONCE, Format, Packed
from deltaw.weights.bits import pack, stored_bytes, unpack


@dataclass(frozen=True)
class Grid(Format):
    """`width` bits a number; a scale and an offset for every `group` inputs of a row, of 16 bits or, if moved, 32."""

    width: int = 4
    group: int = 32
    moved: bool = False

    def pack(self, w_OI: Tensor, dtype: torch.dtype) -> Gridded:
        groups_OGI = self.grouped(w_OI.detach().float())
        return self.coded(groups_OGI, *self.spanned(groups_OGI), dtype)

    def spanned(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets, as they are stored, that reach from the least to the largest of the last dimension."""
        low, high = values.amin(-1), values.amax(-1)
        return ((high - low) / ((1 << self.width) - 1)).half(), low.float() if self.moved else low.half()

    def near(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """The nearest whole numbers that codes have."""
        steps = (values - offset.float()) / scale.float().clamp(min=1e-38)
        return steps.round().clamp(0, (1 << self.width) - 1)

    def coded(self, groups_OGI: Tensor, scale_OG: Tensor, offset_OG: Tensor, dtype: torch.dtype) -> Gridded:
        """The nearest whole numbers by these scales and offsets."""
        o, g, i = groups_OGI.shape
        rows = max(1, PACKED_AT_ONCE // max(1, g * i))
        parts = (slice(start, start + rows) for start in range(0, o, rows))
        near = (self.near(groups_OGI[part], scale_OG[part, :, None], offset_OG[part, :, None]) for part in parts)
        codes = torch.cat([part.to(torch.uint8).flatten() for part in near])
        kept = {"codes": pack(codes, self.width), "scale": scale_OG, "offset": offset_OG}
        return Gridded(self, (o, g * i), dtype, kept)

    def grouped(self, w_OI: Tensor) -> Tensor:
        """Rows cut into groups: O x G x group.

        Raises:
            UserError: rows are no whole number of groups.
        """
        if w_OI.shape[1] % self.group:
            raise UserError(f"Rows of {w_OI.shape[1]} numbers are no whole number of groups of {self.group}.",
                            remedy="Take a smaller group, or nf4.")  # fmt: skip
        return w_OI.view(len(w_OI), -1, self.group)

    def stored_bytes(self, o: int, i: int) -> int:
        return stored_bytes(o * i, self.width) + (6 if self.moved else 4) * o * (i // self.group)

    def __str__(self) -> str:
        return f"int{self.width}-g{self.group}{'-moved' * self.moved}"

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> Gridded:
        return Gridded(self, shape, dtype, kept)


class Gridded(Packed):
    """A matrix as codes, scales and offsets."""

    form: Grid
    codes: Tensor
    scale: Tensor
    offset: Tensor

    def layout(self) -> Layout:
        return Layout(self.shape, self.form.width, self.form.group, self.codes, self.scale, offset=self.offset)

    def plain(self) -> Tensor:
        o, i = self.shape
        w_OGI = unpack(self.codes, self.form.width, o * i).view(o, -1, self.form.group).float()
        w_OGI.mul_(self.scale.float()[..., None]).add_(self.offset.float()[..., None])
        return w_OGI.view(o, i).to(self.dtype)

    def shifted(self, by_OG: Tensor) -> Gridded:
        """The same codes and scales with every group's offset moved, and held in fp32: nothing is rounded again."""
        moved = self.offset.float() + by_OG.to(self.offset.device)
        return Gridded(replace(self.form, moved=True), self.shape, self.dtype, {**self.kept, "offset": moved})
