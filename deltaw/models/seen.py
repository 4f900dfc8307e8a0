"""Who sees whom: documents laid flat, one after another, each seeing itself and, if it has one, its stem.

A model of ours knows no batch dimension. It gets T tokens of any number of documents in a row, their positions, and a
`Seen`. So nothing is padded, and no document ever sees another. Documents that begin with the same tokens (a system
prompt, a template) may share them as a *stem*: causal attention makes those hidden states equal, so they are computed
once, and the gradients of all documents meet there by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Seen(Protocol):
    """What attention needs to know of the tokens around each token."""

    def layer(self, index: int) -> Seen:
        """What the layer of this index works with: the same, but where something is remembered per layer."""
        ...

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Softmax attention of every token over those it sees; the result has the shape of `q_THE`."""
        ...


class Span(NamedTuple):
    """Tokens `start:stop` of the flat row see each other causally, and all of `stem_start:stem_stop`."""

    start: int
    stop: int
    stem_start: int = 0
    stem_stop: int = 0


@dataclass(frozen=True)
class Documents:
    """Whole documents, as in training and scoring: nothing is remembered afterwards."""

    spans: tuple[Span, ...]

    @classmethod
    def of_lengths(cls, *lengths: int) -> Documents:
        """Documents of these lengths in a row, with no stems."""
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        return cls(tuple(Span(end - n, end) for n, end in zip(lengths, ends, strict=True)))

    def layer(self, index: int) -> Documents:  # noqa: ARG002 (nothing is remembered)
        return self

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        return torch.cat([self._one(span, q_THE, k_TKE, v_TKE) for span in self.spans])

    @staticmethod
    def _one(span: Span, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        start, stop, stem_start, stem_stop = span
        k_SKE, v_SKE, mask_TS = k_TKE[start:stop], v_TKE[start:stop], None
        if stem := stem_stop - stem_start:
            k_SKE = torch.cat((k_TKE[stem_start:stem_stop], k_SKE))
            v_SKE = torch.cat((v_TKE[stem_start:stem_stop], v_SKE))
            mask_TS = causal(stop - start, stem, q_THE)
        return attention(q_THE[start:stop], k_SKE, v_SKE, mask_TS)


def causal(new: int, past: int, like: Tensor) -> Tensor:
    """Additive mask of `new` tokens after `past` ones that all of them see; shape (new, past + new)."""
    mask_TS = torch.full((new, past + new), float("-inf"), dtype=like.dtype, device=like.device)
    return mask_TS.triu_(past + 1)


def attention(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, mask_TS: Tensor | None) -> Tensor:
    """Softmax attention of T queries over S keys; causal with T = S when there is no mask."""
    y_BHTE = F.scaled_dot_product_attention(
        q_THE.transpose(0, 1)[None],
        k_SKE.transpose(0, 1)[None],
        v_SKE.transpose(0, 1)[None],
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        enable_gqa=q_THE.shape[1] != k_SKE.shape[1],
    )
    return y_BHTE[0].transpose(0, 1)
