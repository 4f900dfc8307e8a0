"""A step: what its tokens see, and all layers of a plain model as one native call where there are kernels for them.

Everything that is told of a step is numbers, so that other processes can be told.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.kernels.attention import Book, Run
from deltaw.kernels.library import LANES, function
from deltaw.kernels.worn import Calls, Rows, Wear
from deltaw.models.checkpoint import linears
from deltaw.models.decoder import Decoder
from deltaw.models.seen import Score, attention, causal
from deltaw.models.slots import Linear, RMSNorm
from deltaw.serve.arena import Arena
from deltaw.serve.wearing import Floor
from deltaw.weights import Dense


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


class Pieces:
    """What the new tokens of sequences see: their own sequence so far, in pages. One layer's view."""

    def __init__(self, books: Sequence[Book], step: Step) -> None:
        most = max(map(len, step.tables))
        self.table_NP = torch.tensor([[*pages, *[0] * (most - len(pages))] for pages in step.tables], dtype=torch.int32)
        self.spans_N3 = torch.tensor(step.runs)
        self.books, self.runs, self.planned, self.index = books, step.runs, step.lengths, 0

    def layer(self, index: int) -> "Pieces":
        view = copy(self)
        view.index = index
        return view

    def lengths(self, at_T: Tensor) -> Tensor:
        counts_N = self.spans_N3[:, 1] - self.spans_N3[:, 0]
        return torch.tensor(self.planned, dtype=at_T.dtype).repeat_interleave(counts_N)

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> "Pieces":  # noqa: ARG002 (they are in the pages)
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


class Layers:
    """The layers of a model whose slots are empty, for up to `rows` tokens: what flows has its places, made once.

    It does what `Decoder.hidden` does, number by number, and asks Python for nothing between.
    """

    def __init__(self, model: Decoder, arena: Arena, rows: int) -> None:
        c = model.config
        self.model, self.rows, self.calls = model, rows, Calls()
        self.numbers = {slot: i for i, (_, slot) in enumerate(linears(model))}
        size = c.head_width
        widths = c.width, c.width, c.hidden, c.heads * size, c.kv_heads * size, c.kv_heads * size
        self.x, self.h, self.u, self.q, self.k, self.v = (torch.empty(rows, w, dtype=model.dtype) for w in widths)
        self.g, self.inverse = torch.empty_like(self.u), torch.empty(rows * c.heads)
        self.out = torch.empty_like(self.q)
        for layer, book in zip(model.layers, arena.books, strict=True):
            self._attention(layer, book.pages)
            self._feed_forward(layer)

    @classmethod
    def of(cls, model: Decoder, arena: Arena, rows: int) -> "Layers | None":
        """The layers of a model; None: something in it has no native kernel, or not all of them are to be had."""
        c = model.config
        plain = all(isinstance(slot.weight, Dense) and slot.weight.dense().dtype == model.dtype == torch.bfloat16
                    and slot.weight.dense().is_contiguous() for _, slot in linears(model))  # fmt: skip
        fits = not c.family.fused and not c.score_cap and not c.head_width % (2 * LANES) and not c.width % LANES
        native = function("program") is not None and model.device.type == "cpu" and not c.hidden % LANES
        return cls(model, arena, rows) if plain and fits and native else None

    def hidden(self, ids_T: Tensor, at_T: Tensor, seen: Pieces, wear: Wear) -> Tensor:
        """What flows out of the last layer, before its norm: good until it is called again."""
        model, rows = self.model, len(ids_T)
        self.x[:rows] = model.embed_tokens(ids_T)
        far, near = model.angles(at_T, seen)
        self.calls.make(rows, (far, near), seen.told(), wear.told())
        return self.x[:rows]

    def _attention(self, layer: Any, pages: Tensor) -> None:
        own, tell = layer.self_attn, self.calls.tell
        self._norm(layer.input_layernorm, self.x, self.h)
        for slot, y in (own.q_proj, self.q), (own.k_proj, self.k), (own.v_proj, self.v):
            self._linear(slot, self.h, y)
        for y, heads, norm in (self.q, own.heads, "q_norm"), (self.k, own.kv_heads, "k_norm"):
            if own.normed:
                self._norm(getattr(own, norm), y, y, heads)
            tell("turn", y, sizes=(heads, own.head_width, int(layer.local)))
        scale, _, window = own.attend.score
        sizes = own.heads, own.kv_heads, own.head_width, window
        tell("paged", self.q, self.k, self.v, self.out, pages, sizes=sizes, number=scale)
        self._linear(own.o_proj, self.out, self.h)
        if layer.sandwich:
            self._norm(layer.post_attention_layernorm, self.h, self.h)
        tell("add", self.x, self.h, sizes=(self.x.shape[1], self.x.shape[1]))

    def _feed_forward(self, layer: Any) -> None:
        own, before = layer.mlp, layer.pre_feedforward_layernorm if layer.sandwich else layer.post_attention_layernorm
        self._norm(before, self.x, self.h)
        self._linear(own.gate_proj, self.h, self.g)
        self._linear(own.up_proj, self.h, self.u)
        self.calls.tell("gated", self.g, self.u, sizes=(self.g.shape[1], int(own.activation == "gelu_tanh")))
        self._linear(own.down_proj, self.g, self.h)
        if layer.sandwich:
            self._norm(layer.post_feedforward_layernorm, self.h, self.h)
        self.calls.tell("add", self.x, self.h, sizes=(self.x.shape[1], self.x.shape[1]))

    def _norm(self, norm: RMSNorm, x: Tensor, y: Tensor, heads: int = 1) -> None:
        gain_D = norm.by(norm.gain, x.dtype)
        self.calls.tell("norm", x, gain_D, y, self.inverse, sizes=(len(gain_D), heads), number=norm.eps)

    def _linear(self, slot: Linear, x: Tensor, y: Tensor) -> None:
        w_OI = slot.weight.dense()
        outputs, inputs = w_OI.shape
        self.calls.tell("product", x, w_OI, y, sizes=(outputs, inputs, inputs))
        if slot.bias is not None:
            self.calls.tell("add", y, slot.bias, sizes=(outputs, 0))
        self.calls.tell("wear", x, y, sizes=(self.numbers[slot], inputs, outputs))


class Forward:
    """A model, computing steps of up to so many tokens; keys and values are kept in an arena."""

    def __init__(self, model: Decoder, arena: Arena, tokens: int) -> None:
        self.model, self.arena, self.floor = model, arena, Floor(model)
        self.layers = Layers.of(model, arena, tokens)

    def __call__(self, step: Step, alone: Adapter | None = None) -> Tensor:
        """Logits of shape N x V; `alone`: an adapter that all wear, which shares no batch."""
        ids_T, at_T = torch.tensor(step.ids), torch.tensor(step.at)
        seen, wear = Pieces(self.arena.books, step), Wear(step.rows)
        if self.layers is not None and alone is None:
            return self.model.logits(self.model.norm(self.layers.hidden(ids_T, at_T, seen, wear)[step.ends]))
        with self.floor.on(wear) if alone is None else alone.on():
            return self.model.logits(self.model.hidden(ids_T, at_T, seen)[step.ends])
