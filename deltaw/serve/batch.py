"""Some tokens of many sequences as one row of tokens, whose keys and values go to pages."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from deltaw.kernels.attention import Book, Run
from deltaw.models.seen import Score, attention, causal


class Pieces:
    """What the new tokens of sequences see: their own sequence so far, in pages. One layer's view."""

    def __init__(self, books: Sequence[Book], runs: Sequence[Run], tables: Sequence[Sequence[int]],
                 lengths: Sequence[int], index: int = 0) -> None:  # fmt: skip
        most = max(map(len, tables))
        self.table_NP = torch.tensor([[*pages, *[0] * (most - len(pages))] for pages in tables], dtype=torch.int32)
        self.spans_N3 = torch.tensor(runs)
        self.books, self.runs, self.planned, self.index = books, runs, lengths, index

    def layer(self, index: int) -> Pieces:
        view = copy(self)
        view.index = index
        return view

    def lengths(self, at_T: Tensor) -> Tensor:
        length_T = torch.empty_like(at_T)
        for run, length in zip(self.runs, self.planned, strict=True):
            length_T[run.start : run.stop] = length
        return length_T

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> Pieces:  # noqa: ARG002 (they are in the pages)
        return self

    def told(self) -> dict[str, int]:
        """What a native call is told of them."""
        return self.books[0].told(self.spans_N3, self.table_NP)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, score: Score) -> Tensor:
        book, table_NP = self.books[self.index], self.table_NP
        if not score.cap:
            y_THE = book.attend(q_THE, k_TKE, v_TKE, self.spans_N3, table_NP, score.scale, score.window)
            if y_THE is not None:
                return y_THE
        out = []
        for run, row in zip(self.runs, table_NP, strict=True):
            own = slice(run.start, run.stop)
            book.write(row, run.past, k_TKE[own], v_TKE[own])
            new = run.stop - run.start
            k_SKE, v_SKE = book.read(row, run.past + new)
            out.append(attention(q_THE[own], k_SKE, v_SKE, causal(new, run.past, q_THE, score.window), score))
        return torch.cat(out)
