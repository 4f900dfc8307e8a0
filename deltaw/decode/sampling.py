"""Which token comes next: greedy, or drawn after temperature, top-k, top-p (Holtzman et al. 2019) and min-p."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaw.settings import Count, Seed, Share, settings

COLD = 1e-3
"""Below this temperature only the likeliest token has any probability left."""


@settings
class Sampling:
    """How answers are drawn."""

    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: always the likeliest token; 1: as likely as the model says; more: wilder."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw only from this many likeliest tokens (0: from all)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Draw only tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    """Make tokens that occurred less likely by this factor (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: Seed = 0
    """Seed of the draw; every answer in a batch has a stream of its own."""

    @property
    def likeliest(self) -> bool:
        """Whether it is always the token of the largest logit, whatever was said before."""
        return self.temperature < COLD and self.repetition_penalty == 1


@settings
class Talk(Sampling):
    """How answers are drawn in a conversation: a little freer, so that it does not go round in circles."""

    temperature: Annotated[float, Field(ge=0)] = 0.3
    """0: always the likeliest token; 1: as likely as the model says; more: wilder."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw only from the likeliest tokens that together have this probability."""


def pick(logits_V: Tensor, sampling: Sampling, rng: torch.Generator, said: list[int]) -> int:
    """Choose one token from one row of logits; `said` are the tokens before it."""
    if sampling.repetition_penalty > 1 and said:
        seen = torch.tensor(sorted(set(said)), device=logits_V.device)
        old, penalty = logits_V[seen], sampling.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(old > 0, old / penalty, old * penalty))
    if sampling.temperature < COLD:
        return int(logits_V.argmax())
    p_V = likely(logits_V.float() / sampling.temperature, sampling)
    return int(torch.multinomial(p_V.cpu(), 1, generator=rng))


def likely(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after top-k, top-p and min-p; they sum to 1, and the likeliest token is always left."""
    p_V, order_V = logits_V.softmax(-1).sort(descending=True)
    # At 1 the running sum, which is rounded, would cut the tail.
    keep_V = (p_V.cumsum(-1) - p_V < sampling.top_p) | (sampling.top_p == 1)
    keep_V &= p_V >= sampling.min_p * p_V[0]
    if sampling.top_k:
        keep_V[sampling.top_k :] = False
    keep_V[0] = True
    p_V = p_V * keep_V
    return torch.zeros_like(p_V).scatter_(0, order_V, p_V / p_V.sum())
