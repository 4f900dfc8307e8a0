"""One step's pass through the model: everything that is told of it is numbers, so that other processes can be told."""

from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.kernels.attention import Run
from deltaw.kernels.worn import Rows, Wear
from deltaw.models.decoder import Decoder
from deltaw.serve.arena import Arena
from deltaw.serve.layers import Layers, Pieces
from deltaw.serve.wearing import Floor


class Step(NamedTuple):
    """Tokens of sequences, one after another, and after which of them logits are asked for.

    `at`: their places. Of each sequence: its `runs` of tokens, its pages in `tables`, how long it may become.
    """

    ids: list[int]
    at: list[int]
    runs: list[Run]
    tables: list[list[int]]
    lengths: list[int]
    ends: list[int]
    rows: list[Rows]


class Forward:
    """A model, computing steps of up to so many tokens; keys and values are kept in an arena."""

    def __init__(self, model: Decoder, arena: Arena, tokens: int) -> None:
        self.model, self.arena, self.floor = model, arena, Floor(model)
        self.layers = Layers.of(model, arena, tokens)

    def __call__(self, step: Step, alone: Adapter | None = None) -> Tensor:
        """Logits of shape N x V; `alone`: an adapter that all wear, which shares no batch."""
        ids_T, at_T = torch.tensor(step.ids), torch.tensor(step.at)
        seen, wear = Pieces(self.arena.books, step.runs, step.tables, step.lengths), Wear(step.rows)
        if self.layers is not None and alone is None:
            return self.model.logits(self.model.norm(self.layers.hidden(ids_T, at_T, seen, wear)[step.ends]))
        with self.floor.on(wear) if alone is None else alone.on():
            return self.model.logits(self.model.hidden(ids_T, at_T, seen)[step.ends])
