"""Which token each sequence says next, and what is told of it: how likely it was, and what was likelier."""

from collections.abc import Sequence as Row
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.decode.sampling import picks
from deltaw.serve.sequence import Sequence


class Score(NamedTuple):
    """The log-probability of a token as the model has it, whatever was allowed; `tops`: the likeliest and theirs."""

    logprob: float
    tops: list[tuple[int, float]]


def choose(rows: Row[tuple[Sequence, Tensor, Tensor]]) -> list[int]:
    """The next token of each sequence, by its logits as they are and as they are `allowed`; -1: they are no numbers."""
    sequences = [sequence for sequence, _, _ in rows]
    chosen = picks([logits_V for _, _, logits_V in rows], [s.sampling for s in sequences], [s.draws for s in sequences],
                   [s.asked for s in sequences], [s.said for s in sequences])  # fmt: skip
    told = [n for n, each in enumerate(sequences) if each.tops is not None and chosen[n] >= 0]
    if told:
        logits_NV = torch.stack([rows[n][1] for n in told])
        found = scores(logits_NV, [chosen[n] for n in told], [sequences[n].tops or 0 for n in told])
        for n, score in zip(told, found, strict=True):
            sequences[n].scores.append(score)
    return chosen


def scores(logits_NV: Tensor, ids: Row[int], tops: Row[int]) -> list[Score]:
    """What is told of the token that follows each row of logits, with so many of the likeliest."""
    if not ids:
        return []
    logp_NV = logits_NV.float().log_softmax(1)
    own = logp_NV.gather(1, torch.tensor(ids, device=logp_NV.device)[:, None])[:, 0].tolist()
    top_NT, id_NT = (t.tolist() for t in logp_NV.topk(min(max(tops), logp_NV.shape[1])))
    return [Score(p, list(zip(id_NT[n][:most], top_NT[n][:most], strict=True)))
            for n, (p, most) in enumerate(zip(own, tops, strict=True))]  # fmt: skip


def allowed(sequence: Sequence, logits_V: Tensor) -> Tensor:
    """Logits of which only those are left that the sequence may say."""
    if sequence.free:
        return logits_V
    if sequence.grammar is not None:
        logits_V = logits_V.masked_fill(~sequence.grammar.allowed(), -torch.inf)
    if len(sequence.said) < sequence.least:
        logits_V = logits_V.index_fill(0, torch.tensor(sorted(sequence.end_ids), dtype=torch.long), -torch.inf)
    return logits_V
