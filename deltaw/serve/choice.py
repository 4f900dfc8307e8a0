"""What each sequence says next, and what is told of it: how likely it was, what was likelier, and its text.

Text comes piece by piece: whole characters only, and nothing of what may turn out to be a stop string.
"""

from collections.abc import Sequence as Row
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.decode.sampling import picks
from deltaw.models.tokenizer import Tokenizer
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


PARTIAL = "\ufffd"
"""What the bytes of half a character decode to."""


class Speech:
    """One answer. A stop string behind its `least` tokens ends it, and is not a part of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Row[str] = (), least: int = 0) -> None:
        self.tokenizer, self.stop, self.least = tokenizer, [each for each in stop if each], least
        self.ids: list[int] = []
        self.context, self.read = 0, 0
        """Where the tokens begin that the next ones are decoded with, and how many are told in `held` or before."""
        self.held = ""
        """What may be the beginning of a stop string."""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one more token; returns the text that is certain by now."""
        self.ids.append(token)
        return self._told(whole=False)

    def rest(self) -> str:
        """What is left when there are no more tokens."""
        return self._told(whole=True)

    def _told(self, whole: bool) -> str:
        if self.stopped:
            return ""
        # With some tokens before them, as how a token is written may depend on whether it is the first.
        before = self.tokenizer.decode(self.ids[self.context : self.read], skip_special=True)
        after = self.tokenizer.decode(self.ids[self.context :], skip_special=True)
        if whole or (len(after) > len(before) and not after.endswith(PARTIAL)):
            self.held += after[len(before) :]
            self.context, self.read = self.read, len(self.ids)
        stop = self.stop if len(self.ids) + whole > self.least else []
        ends = [at for each in stop if (at := self.held.find(each)) >= 0]
        if ends:
            self.stopped, told = True, self.held[: min(ends)]
        else:
            told = self.held if whole else self.held[: len(self.held) - self._maybe(stop)]
        self.held = self.held[len(told) :]
        return told

    def _maybe(self, stop: Row[str]) -> int:
        """How many characters at the end begin a stop string."""
        lengths = (n for each in stop for n in range(len(each) - 1, 0, -1) if self.held.endswith(each[:n]))
        return max(lengths, default=0)
