"""Continuous batching (Orca, Yu et al. 2022): in each step every sequence gets a token, or a piece of its prompt."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, groupby, islice
from math import inf
from time import monotonic

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.kernels.attention import SIDE, Run
from deltaw.kernels.worn import Rows
from deltaw.models.decoder import Decoder
from deltaw.serve.arena import Arena
from deltaw.serve.choice import allowed, choose, scores
from deltaw.serve.layers import Forward, Step
from deltaw.serve.order import SAID, STARVED_SECONDS, Order
from deltaw.serve.sequence import End, Sequence
from deltaw.serve.wardrobe import Wardrobe
from deltaw.words import some

log = logging.getLogger(__name__)
Piece = tuple[Sequence, int]
"""A sequence and how many of its tokens a step computes."""
Compute = Callable[[Step, Adapter | None], Tensor]


class Engine:
    """One model for all. `most` sequences run at once; a step computes at most `chunk` tokens of prompts."""

    def __init__(self, model: Decoder, budget_bytes: int, most: int = 32, chunk: int = 256) -> None:
        self.model, self.arena = model, Arena(model, budget_bytes)
        self.wardrobe = Wardrobe(self.arena)
        self.compute: Compute = Forward(model, self.arena, chunk + most)
        self.most, self.chunk = most, chunk
        self.running: list[Sequence] = []
        self.waiting = Order(self.arena, most, self.running)
        self.stepped: Callable[[int], None] = lambda _: None
        """Told after each step how many distinct adapters were worn in it."""

    def submit(self, *sequences: Sequence, within: float = inf) -> None:
        """Let sequences of one request wait for their turns.

        Raises:
            Busy: in that case the first token would not be there within so many seconds.
        """
        self.waiting.enter(sequences, within)

    def end(self, sequence: Sequence, why: End, fault: str = "") -> None:
        """Let go of a sequence that runs or waits; its pages are free at once."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.take(sequence)
        self.waiting.gone(sequence)
        sequence.fault = fault
        sequence.heard(why)

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute one step; returns whether there was anything to compute."""
        began, planned = monotonic(), self.plan()
        planned.sort(key=lambda piece: (id(piece[0].alone), piece[0].root))
        said = sum(sequence.pending == 1 for sequence, _ in planned)
        read = sum(count for _, count in planned) - said
        for _, pieces in groupby(planned, key=lambda piece: id(piece[0].alone)):
            self._compute(list(pieces))
        if planned:
            self.stepped(len({entry for sequence, _ in planned for entry in sequence.entries}))
        if 2 * read >= self.chunk or said + bool(read) >= self.most:
            self.waiting.computed(read + SAID * said, monotonic() - began)
        return bool(planned)

    def plan(self) -> list[Piece]:
        """Who computes how many tokens, with pages for them: one of each answer, and of prompts as their turns come."""
        planned, read, blocked = dict[Sequence, int](), 0, False
        for sequence in [each for each in self.running if each.pending == 1]:
            if sequence in self.running and self._room(sequence, 1):  # or it was sent back to wait
                planned[sequence] = 1
        share, places = self.waiting.share, Counter(each.tenant for each in self.running)
        for sequence in self.waiting.turns([each for each in self.running if each.pending > 1]):
            # Who has its share of places reads a little at a time: others who come wait for the step under way.
            sated = places[sequence.tenant] >= share < self.most
            left = (self.chunk // 2 or 1 if sated else self.chunk) - read
            if left > 0 and sequence not in planned and (not blocked or sequence in self.running):
                if count := self._part(sequence, left):
                    planned[sequence] = count
                    read += count
                blocked |= count is None
        for sequence in islice(self.waiting.turns(), self.most):  # one of each tenant and of what it wears
            self.wardrobe.fetch(sequence.entries)
        return [piece for piece in planned.items() if piece[0] in self.running]

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a sequence that waits can be begun, and wears what it does; one that never can be is let go of."""
        worn = False
        try:
            if worn := self.wardrobe.ready(sequence.entries):
                sequence.dress()
                self._check_length(sequence)
            elif sequence.passed is None and all(entry.state in ("ready", "waiting") for entry in sequence.entries):
                sequence.passed = monotonic()
        except UserError as e:
            if worn:
                self.wardrobe.unwear(sequence.entries)
            self.end(sequence, "refused", str(e))
            return False
        return worn

    def _check_length(self, sequence: Sequence) -> None:
        with nullcontext() if sequence.alone is None else sequence.alone.on():
            context, shared = self.model.context, self.model.shares(sequence.most)
        room = min(context, (self.arena.count - len({p for e in sequence.entries for p in e.given})) * SIDE)
        if sequence.open:
            left = max(1, room - sequence.prefix - len(sequence.asked))
            sequence.sampling = replace(sequence.sampling, max_new_tokens=min(sequence.sampling.max_new_tokens, left))
        if sequence.most > room:
            more = ", or serve with more --budget-gb" if room < context else ""
            raise UserError(f"A question of {some(len(sequence.asked), 'token')} and an answer of "
                            f"{sequence.sampling.max_new_tokens:,} have no room: {room - sequence.prefix:,} are seen.",
                            remedy=f"Ask for less, or let the answer be shorter{more}.")  # fmt: skip
        if not shared:  # angles depend on how long it may become
            sequence.root = sequence.root[:16] + sequence.most.to_bytes(4, "little")

    def _place(self, sequence: Sequence) -> bool:
        """Whether one more may run. If not, who has most of the places gives one to whoever has less than a share."""
        if len(self.running) < self.most:
            return True
        share = self.waiting.share
        places = Counter(each.tenant for each in self.running if share < self.most)  # one tenant has all of them
        most, taken = (places.most_common(1) or [("", 0)])[0]
        there = all(entry.state in ("ready", "waiting") for entry in sequence.entries)
        if taken <= share or places[sequence.tenant] + 1 > share or not there:
            return False
        self._send_back([each for each in self.running if each.tenant == most][-1])
        return True

    def _part(self, sequence: Sequence, most: int) -> int | None:
        """How many tokens of a prompt are computed in this step; None: nobody else's are, so that it has room soon."""
        if sequence in self.running:
            count = min(sequence.pending, most)
            return count if self._room(sequence, count) else 0
        if not self._place(sequence):
            return 0
        if not self._ready(sequence):
            starved = sequence.passed is not None and monotonic() - sequence.passed > STARVED_SECONDS
            if not starved or not self.running:
                return 0  # others need not wait for its adapter
            self._send_back(self.running[-1])
            return None
        sequence.begin(self.arena)
        count = min(sequence.pending, most)
        if not self._freed(sequence.missing(count)):
            sequence.leave(self.arena)
            self.wardrobe.unwear(sequence.entries)
            return None
        self.waiting.begin(sequence)
        self.running.append(sequence)
        sequence.extend(self.arena, count)
        return count

    def _freed(self, pages: int) -> bool:
        """Whether there are so many pages, once adapters that nobody wears are forgotten."""
        while self.arena.available < pages:
            if not self.wardrobe.evict():
                return False
        return True

    def _room(self, sequence: Sequence, count: int) -> bool:
        """Take the pages that are missing; where there are none, the youngest waits, and is computed anew later."""
        while not self._freed(sequence.missing(count)):
            youngest = max(self.running, key=lambda each: (each.priority, self.running.index(each)))
            self._send_back(youngest)
            if youngest is sequence:
                return False
        sequence.extend(self.arena, count)
        return True

    def _send_back(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.waiting.put(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.wardrobe.unwear(sequence.entries)
        sequence.leave(self.arena)

    def _compute(self, pieces: list[Piece]) -> None:
        """Compute some tokens of sequences. If that fails, halves of them, until who makes it fail ends alone."""
        try:
            due, logits_NV = self.forward(pieces)
        except Exception as e:
            log.exception("A step of %d sequences failed.", len(pieces))
            if len(pieces) == 1:
                return self.end(pieces[0][0], "error", f"It could not be computed: {e}.")
            self._compute(pieces[: len(pieces) // 2])
            return self._compute(pieces[len(pieces) // 2 :])
        self._score(pieces, logits_NV[len(due) :])
        for sequence, count in pieces:
            sequence.advance(self.arena, count)
        return self._choose(due, logits_NV)

    def forward(self, pieces: list[Piece]) -> tuple[list[Sequence], Tensor]:
        """Compute some tokens of sequences.

        Returns: those whose last token is among them; the logits after each of these, then after tokens to be scored.
        """
        runs, ids, places, at = list[Run](), list[int](), list[int](), 0
        for sequence, count in pieces:
            runs.append(Run(at, at + count, sequence.known))
            places += range(sequence.known, sequence.known + count)
            ids += sequence.ids[sequence.known : sequence.known + count]
            at += count
        due = [i for i, (sequence, count) in enumerate(pieces) if count == sequence.pending]
        echoed = [range(run.start, run.start + s.unscored(count)) for (s, count), run in zip(pieces, runs, strict=True)]
        ends = [*(runs[i].stop - 1 for i in due), *chain(*echoed)]
        tables, lengths = [s.pages for s, _ in pieces], [s.most for s, _ in pieces]
        step = Step(ids, places, runs, tables, lengths, ends, self._rows(pieces, runs))
        return [pieces[i][0] for i in due], self.compute(step, pieces[0][0].alone)

    def _choose(self, sequences: list[Sequence], logits_NV: Tensor) -> None:
        """Say the next token of each; what makes that fail is one's own."""
        rows = list[tuple[Sequence, Tensor, Tensor]]()
        for sequence, logits_V in zip(sequences, logits_NV, strict=False):
            with self._own(sequence):
                rows.append((sequence, logits_V, allowed(sequence, logits_V)))
        for (sequence, *_), token in zip(rows, choose(rows), strict=True):
            with self._own(sequence):
                if token < 0:
                    raise ValueError("what was computed is no number, the adapter's values are too large")
                self._say(sequence, token)

    @contextmanager
    def _own(self, sequence: Sequence) -> Iterator[None]:
        """What fails here ends only this sequence."""
        try:
            yield
        except Exception as e:
            log.exception("A sequence failed.")
            self.end(sequence, "error", f"It could not be computed: {e}.")

    def _score(self, pieces: list[Piece], logits_NV: Tensor) -> None:
        """Score tokens that were asked, by the logits of those before them."""
        at = 0
        for sequence, count in pieces:
            if fresh := sequence.unscored(count):
                first = len(sequence.echoed) + 1
                ids, tops = sequence.asked[first : first + fresh], [sequence.tops or 0] * fresh
                sequence.echoed += scores(logits_NV[at : at + fresh], ids, tops)
                at += fresh

    def _rows(self, pieces: list[Piece], runs: list[Run]) -> list[Rows]:
        """What each row wears, where it shares its batch."""
        rows = list[Rows]()
        for (sequence, _), run in zip(pieces, runs, strict=True):
            worn = tuple((served.slab, weight) for served, weight in sequence.served if served.slab is not None)
            if rows and rows[-1].worn == worn:
                rows[-1] = rows[-1]._replace(stop=run.stop)
            else:
                rows.append(Rows(run.start, run.stop, worn))
        return rows

    def _say(self, sequence: Sequence, token: int) -> None:
        if token in sequence.end_ids:
            sequence.ended = token
            return self.end(sequence, "stop")
        sequence.said.append(token)
        self.waiting.spoken(sequence)
        sequence.heard(token)
        more = sequence.grammar is None or sequence.grammar.take(token)
        if not more or len(sequence.said) == sequence.sampling.max_new_tokens:
            self.end(sequence, "length" if more else "stop")
        return None
