"""Linear layers that read the same input, with what they wear, as one node of the graph.

Each says its `Terms`: which technique they are of, and how its weight is stored, is not known here. All A are one
matrix, so that x is read once for them; what goes back to x is summed in place; x is kept only where an A learns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.products import across, summed
from deltaw.models.slots import Linear, Terms
from deltaw.weights import Weight


def together(slots: Sequence[Linear], x_TI: Tensor) -> list[Tensor]:
    """The outputs y_TO of layers that read the same x; those that are worn in another form are computed apart."""
    terms = [slot.terms() for slot in slots]
    joint = iter(joined([each for each in terms if each is not None], x_TI))
    return [slot(x_TI) if each is None else next(joint) for slot, each in zip(slots, terms, strict=True)]


def joined(terms: Sequence[Terms], x_TI: Tensor) -> tuple[Tensor, ...]:
    """The outputs y_TO of layers by their terms."""
    if not torch.is_grad_enabled():
        return _outputs(terms, x_TI)[0]
    plain = [(each.weight, each.scale) for each in terms]
    parts = [part for each in terms for part in (each.A_RI, each.B_OR, each.gain_O, each.bias_O)]
    return Joined.apply(x_TI, plain, *parts)  # type: ignore[no-any-return, no-untyped-call]  # torch's


class Joined(torch.autograd.Function):
    """y = gain * (W x) + scale * B (A x) + bias for each layer; W is frozen, whatever else there is may learn."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, plain: list[tuple[Weight, float]], *parts: Tensor | None) -> tuple[Tensor, ...]:
        ys, down_TR, products = _outputs(_whole(plain, parts), x_TI)
        ctx.plain, learns = plain, ctx.needs_input_grad[2:]
        ctx.save_for_backward(x_TI if any(learns[0::4]) else None, down_TR if any(learns[1::4]) else None,
                              *products, *parts)  # fmt: skip
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x_TI, down_TR, *saved = ctx.saved_tensors
        products, parts = saved[: len(dys)], saved[len(dys) :]
        terms, learns = _whole(ctx.plain, parts), ctx.needs_input_grad[2:]
        worn = [k for k, each in enumerate(terms) if each.A_RI is not None]
        ddowns = [summed([(dys[k], _scaled(terms[k], dys[k].dtype))]) for k in worn]
        ddown_TR: Any = torch.cat(ddowns, 1) if worn else None
        ranks = [len(parts[4 * k]) for k in worn]
        grads: list[Any] = [None] * len(parts)
        if x_TI is not None:
            for k, dA_RI in zip(worn, torch.split(across(ddown_TR, x_TI), ranks), strict=True):
                grads[4 * k] = dA_RI
        if down_TR is not None:
            for k, own_TR in zip(worn, down_TR.split(ranks, 1), strict=True):
                grads[4 * k + 1] = across(own_TR, dys[k]).t().mul(terms[k].scale)
        for k, (dy_TO, product_TO) in enumerate(zip(dys, products, strict=True)):
            grads[4 * k + 2] = None if product_TO is None else (dy_TO * product_TO).sum(0)
            grads[4 * k + 3] = dy_TO.sum(0) if learns[4 * k + 3] else None
        grads = [None if g is None else g.to(part.dtype) for g, part in zip(grads, parts, strict=True)]
        return _back(terms, dys, ddown_TR) if ctx.needs_input_grad[0] else None, None, *grads


def _whole(plain: Sequence[tuple[Weight, float]], parts: Sequence[Tensor | None]) -> list[Terms]:
    """Terms of their weights and scales, and of each A, B, gain and bias."""
    fours = zip(*[iter(parts)] * 4, strict=True)
    return [Terms(weight, bias_O, A_RI, B_OR, scale, gain_O)
            for (weight, scale), (A_RI, B_OR, gain_O, bias_O) in zip(plain, fours, strict=True)]  # fmt: skip


def _stacked(terms: Sequence[Terms], dtype: torch.dtype) -> Tensor | None:
    """All A, one under another."""
    all_A = [each.A_RI for each in terms if each.A_RI is not None]
    return torch.cat(all_A).to(dtype) if all_A else None


def _scaled(term: Terms, dtype: torch.dtype) -> Tensor:
    """B, times the scale."""
    assert term.B_OR is not None
    return (term.B_OR * term.scale).to(dtype)


def _outputs(terms: Sequence[Terms], x_TI: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor | None]]:
    """All y, all A x side by side, and the W x that a gain's gradient needs."""
    A_RI = _stacked(terms, x_TI.dtype)
    down_TR = None if A_RI is None else summed([(x_TI, A_RI.t())])
    ys, products, at = list[Tensor](), list[Tensor | None](), 0
    for each in terms:
        worn = []
        if each.A_RI is not None and down_TR is not None:
            worn = [(down_TR[:, at : at + len(each.A_RI)], _scaled(each, x_TI.dtype).t())]
            at += len(each.A_RI)
        y_TO = each.weight.product(x_TI, *(worn if each.gain_O is None else ()))
        products.append(None if each.gain_O is None else y_TO)
        if each.gain_O is not None:  # which would be rounded to one
            y_TO = torch.addcmul(y_TO, y_TO, (each.gain_O - 1).to(y_TO.dtype))
            y_TO = summed(worn, onto=y_TO) if worn else y_TO
        if each.bias_O is not None:
            y_TO += each.bias_O.to(y_TO.dtype)
        ys.append(y_TO)
    return tuple(ys), down_TR, products


def _back(terms: Sequence[Terms], dys: Sequence[Tensor], ddown_TR: Tensor | None) -> Tensor:
    """What goes back to x: one sum, as far as the weights it reads stand side by side."""
    dx_TI: Tensor | None = None
    products: list[tuple[Tensor, Tensor]] = []
    for each, dy_TO in zip(terms, dys, strict=True):
        if products and not each.weight.stands:
            dx_TI, products = summed(products, onto=dx_TI), []
        dbase_TO = dy_TO if each.gain_O is None else dy_TO * each.gain_O.to(dy_TO.dtype)
        products.append((dbase_TO, each.weight.lent()))
    A_RI = _stacked(terms, dys[0].dtype)
    if A_RI is not None and ddown_TR is not None:
        products.append((ddown_TR, A_RI))
    return summed(products, onto=dx_TI)
