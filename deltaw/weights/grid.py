"""Whole numbers in groups along each row: w = scale * code + offset, both floating-point, one of each for a group.

As llama.cpp's Q4_1 and torch's int4 product have it. That offsets are floating-point is what QA-LoRA needs: integer
zero points round away all that is smaller than half a step.

`gptq` rounds column by column, and lets those to come make up for the error (Frantar et al. 2023, arXiv:2210.17323).
What is kept small is |(W - Q) x| over the inputs x that were seen, not |W - Q|. A format with act-order takes the
largest inputs first, while all others can still make up for them, and groups them so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels.packed import FEW, Layout, pack, stored_bytes, unpack
from deltaw.kernels.products import Product
from deltaw.weights import PACKED_AT_ONCE, Format, Packed, Weight


@dataclass(frozen=True)
class Grid(Format):
    """`width` bits a number; a scale and an offset for every `group` inputs of a row, of 16 bits or, if moved, 32.

    `ordered`: a group is not of neighbours but of inputs that matter as much, as GPTQ's act-order has it.
    """

    width: int = 4
    group: int = 32
    ordered: bool = False
    moved: bool = False

    def pack(self, w_OI: Tensor, dtype: torch.dtype, order: Tensor | None = None) -> "Gridded":
        if self.ordered and order is None and not w_OI.is_meta:
            raise UserError("Which inputs matter is told by rows, and there are none.",
                            remedy=f"deltaw quantize MODEL --format {self} --calibrate rows.jsonl")  # fmt: skip
        w_OI = w_OI.detach().float()
        groups_OGI = self.grouped(w_OI if order is None else w_OI[:, order])
        return self.coded(groups_OGI, *self.spanned(groups_OGI), dtype, order)

    def spanned(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets, as they are stored, that reach from the least to the largest of the last dimension."""
        low, high = values.amin(-1), values.amax(-1)
        return ((high - low) / ((1 << self.width) - 1)).half(), low.float() if self.moved else low.half()

    def near(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """The nearest whole numbers that codes have."""
        steps = (values - offset.float()) / scale.float().clamp(min=1e-38)
        return steps.round().clamp(0, (1 << self.width) - 1)

    def coded(self, groups_OGI: Tensor, scale_OG: Tensor, offset_OG: Tensor, dtype: torch.dtype,
              order: Tensor | None = None) -> "Gridded":  # fmt: skip
        """The nearest whole numbers by these scales and offsets; `order`: which input each column of groups is."""
        o, g, i = groups_OGI.shape
        rows = max(1, PACKED_AT_ONCE // max(1, g * i))
        parts = (slice(start, start + rows) for start in range(0, o, rows))
        near = (self.near(groups_OGI[part], scale_OG[part, :, None], offset_OG[part, :, None]) for part in parts)
        codes = torch.cat([part.to(torch.uint8).flatten() for part in near])
        kept = {"codes": pack(codes, self.width), "scale": scale_OG, "offset": offset_OG}
        if self.ordered:
            order = torch.arange(g * i, device=groups_OGI.device) if order is None else order
            kept["order"] = order.int()
        return self.load((o, g * i), dtype, kept)

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
        return stored_bytes(o * i, self.width) + (6 if self.moved else 4) * o * (i // self.group) + 4 * i * self.ordered

    def __str__(self) -> str:
        return f"int{self.width}-g{self.group}{'-actorder' * self.ordered}{'-moved' * self.moved}"

    def load(self, shape: tuple[int, int], dtype: torch.dtype, kept: Mapping[str, Tensor]) -> "Gridded":
        """A weight of tensors that were kept of one.

        Raises:
            ValueError: an input is missing in the order of columns.
        """
        order = kept.get("order", torch.empty(0))
        if self.ordered and not order.is_meta and order.sort().values.tolist() != list(range(shape[1])):
            raise ValueError("no order of the inputs")
        return (Ordered if self.ordered else Gridded)(self, shape, dtype, kept)


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

    def shifted(self, by_OG: Tensor) -> "Gridded":
        """The same codes and scales with every group's offset moved, and held in fp32: nothing is rounded again."""
        moved = self.offset.float() + by_OG.to(self.offset.device)
        return type(self)(replace(self.form, moved=True), self.shape, self.dtype, {**self.kept, "offset": moved})


class Ordered(Gridded):
    """A matrix whose columns are stored in another order than inputs come in: column c is input `order[c]`."""

    order: Tensor

    def unpacked(self, place: Callable[..., Tensor]) -> Tensor:
        return super().unpacked(place)[:, self.order.argsort()]

    def product(self, x_TI: Tensor, *also: Product) -> Tensor:
        if len(x_TI) <= FEW and self.native():
            return super().product(x_TI[:, self.order], *also)
        return Weight.product(self, x_TI, *also)

    def repack(self, w_OI: Tensor) -> Gridded:
        return self.form.pack(w_OI, self.dtype, self.order)


DAMPING = 0.01
"""Share of the mean square of an input that is added to each, lest what was hardly seen is made up for wildly."""
BLOCK = 128
"""Columns after which the error is passed on to all others at once."""


@torch.no_grad()
def gptq(w_OI: Tensor, products_II: Tensor, form: Grid, dtype: torch.dtype) -> Gridded:
    """Pack a matrix, given the sum of x x' over inputs that it multiplies.

    Raises:
        UserError: the inputs are no numbers, or rows are no whole number of groups.
    """
    form.grouped(w_OI)
    if not bool(products_II.isfinite().all()):
        raise UserError("What these rows become on their way through the model is no number, or too large.",
                        remedy="Look at the model: deltaw eval; or take other rows.")  # fmt: skip
    work_OI, h_II, order_I = w_OI.float().clone(), products_II.float().clone(), None
    if form.ordered:
        order_I = h_II.diag().argsort(descending=True, stable=True)
        work_OI, h_II = work_OI[:, order_I], h_II[order_I][:, order_I]
    unseen = h_II.diag() == 0
    h_II[unseen, unseen] = 1
    h_II += DAMPING * h_II.diag().mean() * torch.eye(len(h_II))
    # Row i of this: how the error of column i is made up for by the columns after it, those before being settled.
    pass_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h_II)), upper=True)
    i = work_OI.shape[1]
    rounded_OI = torch.empty_like(work_OI)
    scales, offsets = [], []
    step = max(BLOCK // form.group, 1) * form.group
    for start in range(0, i, step):
        stop = min(start + step, i)
        errors = []
        for c in range(start, stop):
            if c % form.group == 0:
                scale_O, offset_O = form.spanned(form.grouped(work_OI[:, c : c + form.group])[:, 0])
                scales.append(scale_O)
                offsets.append(offset_O)
            rounded_OI[:, c] = form.near(work_OI[:, c], scale_O, offset_O) * scale_O.float() + offset_O.float()
            error_O = (work_OI[:, c] - rounded_OI[:, c]) / pass_II[c, c]
            work_OI[:, c + 1 : stop] -= error_O[:, None] * pass_II[c, c + 1 : stop]
            errors.append(error_O)
        work_OI[:, stop:] -= torch.stack(errors, 1) @ pass_II[start:stop, stop:]
    return form.coded(form.grouped(rounded_OI), torch.stack(scales, 1), torch.stack(offsets, 1), dtype, order_I)
