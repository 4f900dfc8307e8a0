"""Which token is drawn from a row of logits, by one number (native/draw.cpp)."""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.library import AT, COUNT, PLAIN, WIDE, fields, function

COLD = 1e-3
"""Below this temperature only the likeliest token has any probability left."""


class Draw(NamedTuple):
    """How a token is drawn: from which tokens, and by which number of [0, 1)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.0


class Row(ctypes.Structure):
    """A row of logits and its draw, as C has it."""

    _fields_ = fields((AT, "logits"), (COUNT, "bf16 top_k"), (WIDE, "temperature top_p min_p number"), (COUNT, "token"))


def drawn(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
    """A token for each row of logits, all of one width; -1 where there is none: all are -inf, or one is NaN or +inf."""
    call = function("draw")
    if call is None or not all(r.dtype in PLAIN and r.device.type == "cpu" and r.is_contiguous() for r in rows):
        return [_drawn(logits_V, draw) for logits_V, draw in zip(rows, draws, strict=True)]
    told = (Row * len(rows))(*(
        Row(logits_V.data_ptr(), logits_V.dtype == torch.bfloat16, draw.top_k,
            0 if draw.temperature < COLD else draw.temperature, draw.top_p, draw.min_p, draw.number)
        for logits_V, draw in zip(rows, draws, strict=True)
    ))  # fmt: skip
    call(ctypes.byref(told), len(rows), len(rows[0]) if rows else 0, torch.get_num_threads())
    return [row.token for row in told]


def _drawn(logits_V: Tensor, draw: Draw) -> int:
    if not math.isfinite(logits_V.max()):
        return -1
    if draw.temperature < COLD:
        return int(logits_V.argmax())
    sums_V = likely(logits_V, draw).cumsum(0)
    return int(torch.searchsorted(sums_V, draw.number * sums_V[-1], right=True))


def likely(logits_V: Tensor, draw: Draw) -> Tensor:
    """The probabilities from which a token is drawn, in fp64: of those that are kept, and there is always one.

    Kept are tokens of which fewer than `top_k` are likelier, those having a probability below `top_p` together, and
    that have `min_p` of the likeliest one's. Of equals the one with the lower id counts as the likelier.
    """
    wide_V = logits_V.cpu().double()
    p_V = (wide_V / draw.temperature).softmax(0)
    keep_V = (wide_V - wide_V.max()).div(draw.temperature).exp() >= draw.min_p
    if draw.top_k or draw.top_p < 1:
        order_V = wide_V.sort(descending=True, stable=True).indices
        before_V = torch.cat((p_V.new_zeros(1), p_V[order_V].cumsum(0)[:-1]))
        within = draw.top_p if draw.top_p < 1 else math.inf  # a sum that is rounded would cut the tail
        keep_V[order_V[before_V >= within]] = False
        keep_V[order_V[draw.top_k or len(order_V) :]] = False
    p_V = p_V * keep_V
    return p_V / p_V.sum()
