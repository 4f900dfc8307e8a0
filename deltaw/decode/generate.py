"""The generation loop: prompts in, answers out, token by token. It knows ids, and no conversation."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode.cache import Cache
from deltaw.decode.sampling import Sampling, picks
from deltaw.errors import UserError
from deltaw.models.decoder import Decoder
from deltaw.models.tokenizer import Tokenizer

BATCH = 32
"""Prompts that are answered together."""


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
        h_TD = model.hidden(batch.ids_T, batch.at_T, cache.prefill())[cache.last_tokens()]
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
    ids: list[int] = []
    shown = ""
    for step in generate(model, [prompt], sampling, tokenizer.end_ids, heard):
        ids += [token for _, token in step]
        text = tokenizer.decode(ids, skip_special=True)
        if not text.endswith("\ufffd"):  # the bytes of a character may be spread over tokens
            yield text[len(shown) :]
            shown = text
    if rest := tokenizer.decode(ids, skip_special=True)[len(shown) :]:
        yield rest
    return len(ids) < room(model, prompt, sampling)
