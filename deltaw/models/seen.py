"""Who sees whom: documents laid flat, one after another, each seeing itself and, if it has one, its stem.

A model of ours knows no batch dimension. It gets T tokens of any number of documents in a row, their positions, and a
`Seen`. So nothing is padded, and no document ever sees another. Documents that begin with the same tokens (a system
prompt, a template) may share them as a *stem*: causal attention makes those hidden states equal, so they are computed
once, and the gradients of all documents meet there by themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.attention import attend

PIECE = 512
"""Tokens that are attended from together where they see a window only."""


class Score(NamedTuple):
    """How a layer scores what a token sees: q k' * scale, bent below `cap`, in the last `window` tokens (0: in all)."""

    scale: float
    cap: float = 0.0
    window: int = 0


class Seen(Protocol):
    """What attention needs to know of the tokens around each token."""

    def layer(self, index: int) -> "Seen":
        """What the layer of this index works with: the same, but where something is remembered per layer."""

    def lengths(self, at_T: Tensor) -> Tensor:
        """How long the document of each token is, or is going to be."""

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> "Seen":
        """The same, but every document sees these keys and values before its first token."""

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, score: Score) -> Tensor:
        """Softmax attention of every token over those it sees; the result has the shape of `q_THE`."""


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
    before: tuple[Tensor, Tensor] | None = None
    """Keys and values that every document sees before its first token."""

    @classmethod
    def of_lengths(cls, *lengths: int) -> "Documents":
        """Documents of these lengths in a row, with no stems."""
        return cls(tuple(Span(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)))

    def layer(self, index: int) -> "Documents":  # noqa: ARG002 (nothing is remembered)
        return self

    def lengths(self, at_T: Tensor) -> Tensor:
        length_T = torch.empty_like(at_T)
        for span in self.spans:
            length_T[span.start : span.stop] = at_T[span.stop - 1] + 1
        return length_T

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> "Documents":
        return Documents(self.spans, (k_PKE, v_PKE))

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, score: Score) -> Tensor:
        if self.before is None and not score.cap:
            y_THE = attend(q_THE, k_TKE, v_TKE, self.spans, score.scale, score.window)
            if y_THE is not None:
                return y_THE
        return torch.cat([y for own in self.apart(q_THE, k_TKE, v_TKE) for y in self._one(*own, score)])

    def apart(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each document's queries, and the keys and values of its stem and its own.

        They are split, not sliced: on the way back a slice is as much as all documents, with zeros around it.
        """
        lengths = [span.stop - span.start for span in self.spans]
        q, k, v = (torch.split(x, lengths) for x in (q_THE, k_TKE, v_TKE))
        first = {span.start: i for i, span in enumerate(self.spans)}
        for i, span in enumerate(self.spans):
            if span.stem_start == span.stem_stop:
                yield q[i], k[i], v[i]
            else:
                stem = first[span.stem_start]
                yield q[i], torch.cat((k[stem], k[i])), torch.cat((v[stem], v[i]))

    def _one(self, q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, score: Score) -> Iterator[Tensor]:
        """A document's tokens; where they see a window only, in pieces, so that far pairs cost nothing."""
        if self.before is not None:
            k_SKE, v_SKE = torch.cat((self.before[0], k_SKE)), torch.cat((self.before[1], v_SKE))
        count, stem, window = len(q_THE), len(k_SKE) - len(q_THE), score.window
        piece = PIECE if 0 < window < len(k_SKE) else count
        for at in range(0, count, piece):
            q_PHE = q_THE[at : at + piece]
            last = stem + at + len(q_PHE)
            first = max(0, stem + at + 1 - window) if window else 0
            past = last - first - len(q_PHE)
            mask_PS = causal(len(q_PHE), past, q_PHE, window) if past or 0 < window < last - first else None
            yield attention(q_PHE, k_SKE[first:last], v_SKE[first:last], mask_PS, score)


def causal(new: int, past: int, like: Tensor, window: int = 0) -> Tensor:
    """Additive mask of `new` tokens after `past` others, which they see within `window`; shape (new, past + new)."""
    mask_TS = torch.full((new, past + new), float("-inf"), dtype=like.dtype, device=like.device)
    mask_TS.triu_(past + 1)
    if window:
        mask_TS += torch.full_like(mask_TS, float("-inf")).tril_(past - window)
    return mask_TS


def attention(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, mask_TS: Tensor | None, score: Score) -> Tensor:
    """Softmax attention of T queries over S keys; causal with T = S when there is no mask."""
    q_1HTE, k_1KSE, v_1KSE = (x.transpose(0, 1)[None] for x in (q_THE, k_SKE, v_SKE))
    return attention_batch(q_1HTE, k_1KSE, v_1KSE, mask_TS, score)[0].transpose(0, 1)


def attention_batch(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, score: Score) -> Tensor:
    """The same of B sequences; the mask is added, and broadcast to B x H x T x S."""
    if not score.cap:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, scale=score.scale,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )  # fmt: skip
    if mask is None:
        mask = causal(q_BHTE.shape[2], 0, q_BHTE)
    k_BHSE, v_BHSE = (x.repeat_interleave(q_BHTE.shape[1] // x.shape[1], 1) for x in (k_BKSE, v_BKSE))
    score_BHTS = (q_BHTE @ k_BHSE.mT).mul(score.scale / score.cap).tanh().mul(score.cap) + mask
    return score_BHTS.softmax(-1, dtype=torch.float32).to(v_BHSE.dtype) @ v_BHSE
