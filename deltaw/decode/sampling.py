"""Which token comes next: greedy, or drawn after penalties, temperature, top-k, top-p (Holtzman et al. 2019) and min-p.

A draw takes one number of the answer's own stream, whatever else is drawn beside it: `kernels/draw.py` says of what.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaw.kernels.draw import COLD, Draw, drawn
from deltaw.settings import Count, Seed, Share, settings

Penalty = Annotated[float, Field(ge=-2, le=2)]


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
    presence_penalty: Penalty = 0.0
    """Lower the logits of tokens that occurred in the answer by this much; what was asked does not count."""
    frequency_penalty: Penalty = 0.0
    """Lower the logits of tokens by this much for each time they occurred in the answer."""
    seed: Seed = 0
    """Seed of the draw; every answer in a batch has a stream of its own."""

    @property
    def penalises(self) -> bool:
        """Whether logits depend on what was said before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@settings
class Talk(Sampling):
    """How answers are drawn in a conversation: a little freer, so that it does not go round in circles."""

    temperature: Annotated[float, Field(ge=0)] = 0.3
    """0: always the likeliest token; 1: as likely as the model says; more: wilder."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw only from the likeliest tokens that together have this probability."""


def picks(logits_NV: Iterable[Tensor], samplings: Sequence[Sampling], rngs: Sequence[torch.Generator],
          asked: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> list[int]:  # fmt: skip
    """Choose one token from each row of logits, for each as `pick` does; -1 where what was computed is no number."""
    rows, draws = list[Tensor](), list[Draw]()
    for logits_V, sampling, rng, before, answer in zip(logits_NV, samplings, rngs, asked, said, strict=True):
        cold = sampling.temperature < COLD
        number = 0.0 if cold else float(torch.rand((), dtype=torch.float64, generator=rng))
        rows.append(penalised(logits_V, sampling, before, answer))
        draws.append(Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, number))
    return drawn(rows, draws)


def penalised(logits_V: Tensor, sampling: Sampling, asked: Sequence[int], said: Sequence[int]) -> Tensor:
    """Logits after all penalties, in fp32; the same tensor where there are none."""
    if not sampling.penalises or not (asked or said):
        return logits_V
    logits_V = logits_V.float()  # in bfloat16 a small penalty would be rounded away
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*asked, *said}), device=logits_V.device)
        old, by = logits_V[seen], sampling.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(old > 0, old / by, old * by))
    if said and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, times = torch.tensor(list(Counter(said).items()), device=logits_V.device).t()
        less = sampling.presence_penalty + sampling.frequency_penalty * times
        logits_V = logits_V.index_add(0, seen, less, alpha=-1)
    return logits_V
