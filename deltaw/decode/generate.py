"""The generation loop: prompts in, answers out, token by token. It knows ids, and no conversation.

Keys and values of the tokens so far, of sequences of unequal length, lie in a cache: an argument, no layer's state.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode.sampling import Sampling, picks
from deltaw.errors import UserError
from deltaw.models.decoder import Decoder
from deltaw.models.seen import Documents, Score, attention_batch
from deltaw.models.tokenizer import Tokenizer

BATCH = 32
"""Prompts that are answered together."""
PARTIAL = "\ufffd"
"""What the bytes of half a character decode to."""


class Cache:
    """Room for B prompts and `rooms[b]` more tokens of each, in every layer: 2 * layers * B * S * K * E values.

    What the model wears may put `before` tokens before the first; S counts them, lengths do not.
    """

    def __init__(self, model: Decoder, prompts: Documents, rooms: Sequence[int]) -> None:
        config, device = model.config, model.device
        self.prompts, self.before = prompts, model.before
        # A sequence's tokens in the flat row: its stem's, then its own. A span that others stem from is no sequence.
        stems = {(s.stem_start, s.stem_stop) for s in prompts.spans if s.stem_stop > s.stem_start}
        self.rows = [torch.tensor([*range(s.stem_start, s.stem_stop), *range(s.start, s.stop)], device=device)
                     for s in prompts.spans if (s.start, s.stop) not in stems]  # fmt: skip
        self.lengths_B = torch.tensor([len(row) for row in self.rows], device=device)
        self.planned_B = self.lengths_B + torch.tensor(rooms, device=device)
        most = self.before + int(self.planned_B.max())
        shape = (2, config.layers, len(self.rows), config.kv_heads, most, config.head_width)
        self.kv_2LBKSE = torch.zeros(shape, dtype=model.dtype, device=device)
        self.used = self.before + int(self.lengths_B.max())
        self.masks: dict[int, Tensor] = {}
        self.last_tokens = torch.stack([row[-1] for row in self.rows])
        """Index in the flat row of every prompt's last token."""

    def next(self) -> "Step":
        """What one more token of every sequence sees; makes room for it."""
        self.lengths_B = self.lengths_B + 1
        self.used = self.before + int(self.lengths_B.max())
        self.masks = {}
        return Step(self, 0)

    def mask(self, window: int) -> Tensor:
        """What is added to the scores of every sequence's last token, of shape B x 1 x 1 x S."""
        if window not in self.masks:
            at_S = torch.arange(self.used, device=self.lengths_B.device)
            length_B1 = self.before + self.lengths_B[:, None]
            seen_BS = (at_S < length_B1) & (at_S >= length_B1 - (window or self.used))
            hidden_BS = torch.zeros(seen_BS.shape, dtype=self.kv_2LBKSE.dtype, device=at_S.device)
            self.masks[window] = hidden_BS.masked_fill_(~seen_BS, float("-inf"))[:, None, None]
        return self.masks[window]

    def keep(self, alive_B: Tensor) -> None:
        """Forget the other sequences."""
        self.kv_2LBKSE = self.kv_2LBKSE[:, :, alive_B]
        self.lengths_B, self.planned_B = self.lengths_B[alive_B], self.planned_B[alive_B]


class View:
    """What one layer sees of a cache."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.kv_2BKSE, self.prompts = cache, cache.kv_2LBKSE[:, index], cache.prompts

    def layer(self, index: int) -> Self:
        return type(self)(self.cache, index)


class Prefill(View):
    """Prompts laid flat: what they see, remembering every layer's keys and values."""

    def lengths(self, at_T: Tensor) -> Tensor:
        """As they are going to be, so that angles that depend on them are the same for all tokens of a sequence."""
        length_T = torch.zeros_like(at_T)
        for row, planned in zip(self.cache.rows, self.cache.planned_B, strict=True):
            length_T[row] = planned + self.cache.before
        return length_T

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> "Prefill":
        self.kv_2BKSE[:, :, :, : len(k_PKE)] = torch.stack((k_PKE, v_PKE)).transpose(1, 2)[:, None]
        self.prompts = self.prompts.after(k_PKE, v_PKE)
        return self

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, score: Score) -> Tensor:
        first, kv_2KTE = self.cache.before, torch.stack((k_TKE, v_TKE)).transpose(1, 2)
        for b, row in enumerate(self.cache.rows):
            self.kv_2BKSE[:, b, :, first : first + len(row)] = kv_2KTE[:, :, row]
        return self.prompts.attend(q_THE, k_TKE, v_TKE, score)


class Step(View):
    """One new token of every sequence."""

    def lengths(self, at_T: Tensor) -> Tensor:  # noqa: ARG002 (they were planned)
        return self.cache.planned_B + self.cache.before

    def after(self, k_PKE: Tensor, v_PKE: Tensor) -> "Step":  # noqa: ARG002 (the cache has them)
        return self

    def attend(self, q_BHE: Tensor, k_BKE: Tensor, v_BKE: Tensor, score: Score) -> Tensor:
        cache, each_B = self.cache, torch.arange(len(q_BHE), device=q_BHE.device)
        self.kv_2BKSE[:, each_B, :, cache.before + cache.lengths_B - 1] = torch.stack((k_BKE, v_BKE), 1)
        k_BKSE, v_BKSE = self.kv_2BKSE[:, :, :, : cache.used]
        return attention_batch(q_BHE[:, :, None], k_BKSE, v_BKSE, cache.mask(score.window), score)[:, :, 0]


@dataclass(frozen=True)
class Answer:
    """What was said; `whole`: the model ended it itself, it was not cut at the longest length there was room for."""

    text: str
    whole: bool


def room(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens the answer to this prompt may have.

    Raises:
        UserError: the prompt fills the model's context.
    """
    context = model.context
    if len(prompt) >= context:
        raise UserError(f"The conversation is {len(prompt):,} tokens long, and this model sees {context:,}.",
                        remedy="Say less at a time; in a chat, /reset begins anew.")  # fmt: skip
    return min(sampling.max_new_tokens, context - len(prompt))


def generate(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: set[int],
             heard: Callable[[], bool] | None = None, streams: Sequence[int] | None = None
             ) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Answer all prompts at once; yield after each step who said what, as (prompt, token). End tokens are not yielded.

    `heard`: asked before each step; false stops everybody. `streams`: which stream of random numbers each prompt draws
    from; by default that of its place.

    Raises:
        UserError: a prompt fills the model's context, or logits are no numbers.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    rooms = [room(model, prompts[i], sampling) for i in order]
    share = model.shares(max(len(prompts[i]) + more for i, more in zip(order, rooms, strict=True)))
    batch = lay([Encoded(tuple(prompts[i]), (False,) * len(prompts[i])) for i in order], share).to(model.device)
    asked, said = [prompts[i] for i in order], [list[int]() for _ in order]
    streams = range(len(prompts)) if streams is None else streams
    draws = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + streams[i]) for i in order]
    with torch.inference_mode():
        cache = Cache(model, batch.seen, rooms)
        h_TD = model.hidden(batch.ids_T, batch.at_T, Prefill(cache, 0))[cache.last_tokens]
        alive = list(range(len(order)))
        for step in range(max(rooms)):
            logits_BV = model.logits(h_TD)
            picked = picks(logits_BV, [sampling] * len(alive), [draws[b] for b in alive], [asked[b] for b in alive],
                           [said[b] for b in alive])  # fmt: skip
            if -1 in picked:
                raise UserError("What was computed is no number: the values of the adapter or the model are too large.")
            going = [b for b, token in enumerate(picked) if token not in end_ids]
            if going:
                yield [(order[alive[b]], picked[b]) for b in going]
                going = [b for b in going if step + 1 < rooms[alive[b]]]
            if not going or (heard is not None and not heard()):
                return
            if len(going) < len(alive):
                cache.keep(torch.tensor(going, device=model.device))
                alive, picked = [alive[b] for b in going], [picked[b] for b in going]
            for b, token in zip(alive, picked, strict=True):
                said[b].append(token)
            ids_B = torch.tensor(picked, device=model.device)
            seen = cache.next()
            h_TD = model.hidden(ids_B, cache.lengths_B - 1, seen)


def complete(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling
             ) -> list[Answer]:  # fmt: skip
    """Answer many prompts, some at a time.

    Raises:
        UserError: a prompt fills the model's context.
    """
    said: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), BATCH):
        some = by_length[start : start + BATCH]
        for step in generate(model, [prompts[i] for i in some], sampling, tokenizer.end_ids, streams=some):
            for row, token in step:
                said[some[row]].append(token)
    return [Answer(tokenizer.decode(ids, skip_special=True), len(ids) < room(model, prompt, sampling))
            for ids, prompt in zip(said, prompts, strict=True)]  # fmt: skip


def stream(model: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling,
           heard: Callable[[], bool] | None = None) -> Generator[str, None, bool]:  # fmt: skip
    """Answer one prompt, yielding text as soon as it is whole characters; returns whether the answer is whole.

    Raises:
        UserError: the prompt fills the model's context.
    """
    speech = Speech(tokenizer)
    for step in generate(model, [prompt], sampling, tokenizer.end_ids, heard):
        for _, token in step:
            yield speech.add(token)
    yield speech.rest()
    return len(speech.ids) < room(model, prompt, sampling)


class Speech:
    """The text of one answer, piece by piece: whole characters, and nothing of what may turn out to be a stop string.

    A stop string behind its `least` tokens ends it, and is not a part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), least: int = 0) -> None:
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

    def _maybe(self, stop: Sequence[str]) -> int:
        """How many characters at the end begin a stop string."""
        lengths = (n for each in stop for n in range(len(each) - 1, 0, -1) if self.held.endswith(each[:n]))
        return max(lengths, default=0)
