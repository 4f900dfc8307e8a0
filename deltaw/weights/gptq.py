"""GPTQ: round column by column, and let those to come make up for the error (Frantar et al. 2023, arXiv:2210.17323).

What is kept small is |(W - Q) x| over the inputs x that were seen, not |W - Q|. A format with act-order takes the
largest inputs first, while all others can still make up for them, and groups them so.
"""

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.weights.grid import Grid, Gridded

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
