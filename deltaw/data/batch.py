"""Which rows make a step, and how they are laid flat: no padding, and what several rows begin with is computed once."""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import Tensor

from deltaw.data.encode import Encoded
from deltaw.models.seen import Documents, Span

MOST_ROWS, STEP_TOKENS = 8, 2048
"""Of a step, where the user says nothing: few long rows are learnt in more and smaller steps, each soon done."""
IGNORED = -100
"""Label of a token from which nothing is learnt."""


@dataclass(frozen=True)
class Batch:
    """Rows laid flat. `labels_T[t]` is the token that is to follow token t, or -100."""

    ids_T: Tensor
    at_T: Tensor
    labels_T: Tensor
    seen: Documents
    targets: int
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed: less than `row_tokens` where stems are shared."""
        return len(self.ids_T)

    @property
    def pairs(self) -> int:
        """Pairs of a token and one it sees: what attention costs grow with."""
        return sum((n := s.stop - s.start) * (n + 1) // 2 + n * (s.stem_stop - s.stem_start) for s in self.seen.spans)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        ids_T, at_T, labels_T = self.ids_T.to(device), self.at_T.to(device), self.labels_T.to(device)
        return replace(self, ids_T=ids_T, at_T=at_T, labels_T=labels_T)


def steps(weights: Sequence[tuple[int, float]], batch_rows: int, seed: int) -> Iterator[tuple[float, list[int]]]:
    """Endless steps: how many epochs are done after each, and its rows.

    `weights` gives each file's number of rows and how often each is seen in an epoch; rows are numbered through all
    files. Every row of a file is seen once before any of it is seen again, whatever the weight.
    """
    decks = [_deck(sum(n for n, _ in weights[:f]), n, f"{seed}/{f}") for f, (n, _) in enumerate(weights)]
    owed = [0.0] * len(weights)
    for epoch in count():
        drawn = array("I")
        for f, (n, weight) in enumerate(weights):
            owed[f] += n * weight
            drawn.extend(islice(decks[f], int(owed[f])))
            owed[f] -= int(owed[f])
        random.Random(f"{seed}/{epoch}").shuffle(drawn)
        for start in range(0, len(drawn), batch_rows):
            rows = drawn[start : start + batch_rows]
            yield epoch + (start + len(rows)) / len(drawn), rows.tolist()


def per_epoch(weights: Sequence[tuple[int, float]], batch_rows: int) -> int:
    """Steps in an epoch."""
    return max(1, -(-sum(int(n * weight) for n, weight in weights) // batch_rows))


def rows_per_step(mean_tokens: float) -> int:
    """How many rows of this length make a step that is neither too small to learn from nor long in coming."""
    return max(1, min(MOST_ROWS, int(STEP_TOKENS / mean_tokens)))


def micro_batches(rows: Sequence[Encoded], micro_tokens: int, shares: Callable[[int], bool] = lambda _: True
                  ) -> list[Batch]:  # fmt: skip
    """Lay rows flat in as few batches of at most `micro_tokens` tokens as a greedy pass finds; a longer row goes alone.

    `shares`: whether rows up to a length let what neighbours begin with be computed once; see `Decoder.shares`.
    """
    batches, room = list[list[Encoded]](), 0
    for row in sorted(rows, key=lambda row: row.ids):  # neighbours share the longest beginnings
        if not batches or len(row.ids) > room:
            batches.append([])
            room = micro_tokens
        batches[-1].append(row)
        room -= len(row.ids)
    return [lay(batch, shares(max(len(row.ids) for row in batch))) for batch in batches]


def lay(rows: Sequence[Encoded], share: bool = True) -> Batch:
    """Lay rows one after another, a shared stem before those that begin with it."""
    ids, at, labels, spans = list[int](), list[int](), list[int](), list[Span]()
    for group, stem in _groups(rows) if share else [([row], 0) for row in rows]:
        base = len(ids)
        if stem:
            ids += group[0].ids[:stem]
            at += range(stem)
            labels += [IGNORED] * stem
            spans.append(Span(base, base + stem))
        for row in group:
            start = len(ids)
            follow = zip(row.ids[stem + 1 :], row.trained[stem + 1 :], strict=True)
            ids += row.ids[stem:]
            at += range(stem, len(row.ids))
            labels += [*(i if t else IGNORED for i, t in follow), IGNORED]
            spans.append(Span(start, len(ids), base, base + stem) if stem else Span(start, len(ids)))
    return Batch(torch.tensor(ids), torch.tensor(at), torch.tensor(labels), Documents(tuple(spans)),
                 sum(row.targets for row in rows), sum(len(row.ids) for row in rows))  # fmt: skip


def _groups(rows: Sequence[Encoded]) -> list[tuple[list[Encoded], int]]:
    """Neighbours that share a stem, and its length; a row joins if the group then saves no less than before."""
    groups = list[tuple[list[Encoded], int]]()
    for row in rows:
        group, stem = groups[-1] if groups else ([], 0)
        common = _common(group[-1], row, stem if len(group) > 1 else None) if group else 0
        if group and len(group) * common > (len(group) - 1) * stem:
            group.append(row)
            groups[-1] = group, common
        else:
            groups.append(([row], 0))
    return groups


def _common(a: Encoded, b: Encoded, limit: int | None) -> int:
    """Tokens that both begin with, short of what either learns: a stem's hidden states belong to no single row."""
    longest = min(_first_target(a) - 1, _first_target(b) - 1, *([] if limit is None else [limit]))
    return next((i for i in range(longest) if a.ids[i] != b.ids[i]), max(longest, 0))


def _first_target(row: Encoded) -> int:
    return next((i for i, t in enumerate(row.trained) if t and i), len(row.ids))


def _deck(start: int, n: int, seed: str) -> Iterator[int]:
    shuffler = random.Random(seed)
    while True:
        cards = array("I", range(start, start + n))
        shuffler.shuffle(cards)
        yield from reversed(cards)
