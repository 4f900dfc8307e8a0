"""Evaluate: how good a persona is on rows that it did not learn, and how far two models differ on the same rows.

Perplexity is that of the right answers; those that are given are graded by `scoring/text.py`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from deltaw.api.persona import Persona
from deltaw.data import files as reading
from deltaw.data.batch import IGNORED, Batch, micro_batches
from deltaw.data.encode import Encoded, TrainOn, encode_all
from deltaw.data.rows import Example
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.models.decoder import Decoder
from deltaw.models.tokenizer import Tokenizer
from deltaw.scoring.loss import batch_loss
from deltaw.scoring.text import Graded, check, score
from deltaw.words import some

MICRO_TOKENS = 2048
ONLY_TEXT = "perplexity"
"""The one metric that needs no answer to be generated."""


@dataclass(frozen=True)
class Report:
    """Scores by name, and the rows that were asked with the answers they got; `notices`: what was left out or cut."""

    persona: str
    rows: int
    scores: dict[str, float]
    examples: tuple[Example, ...]
    graded: tuple[Graded, ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """Two models on the same labelled tokens: logits, choices, and perplexities."""

    max_logit_difference: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    tokens: int

    @property
    def perplexity_change(self) -> float:
        """Relative change: 0.01 is one per cent worse."""
        return self.perplexity_after / self.perplexity_before - 1


def evaluate(persona: Persona, file: str | Path, metrics: Sequence[str] = (), limit: int | None = None,
             sampling: Sampling | None = None, context: int | None = None) -> Report:  # fmt: skip
    """Score a persona on a file's rows (the first `limit`); without `metrics`, those that suit the rows.

    Of a conversation its answers count, of a plain text every token; only conversations are asked. `context`: how much
    of a row counts at most, in tokens; personas that see more or less than others are compared on what all of them see.

    Raises:
        UserError: a fault in the data, or a metric these rows cannot give.
    """
    examples = tuple(islice(reading.stream(Path(file)), limit))
    sampling, context = sampling or Sampling(), min(context or persona.context, persona.context)
    scores: dict[str, float] = {}
    graded: tuple[Graded, ...] = ()
    named = [m for m in metrics if m != ONLY_TEXT]
    check(named)  # before anything is computed
    with persona.on():
        asked, notices = _askable(examples, persona, context) if named or not metrics else ((), [])
        model, tokenizer = persona.base.model, persona.base.tokenizer
        if not metrics or ONLY_TEXT in metrics:
            rows, lost = _encoded(examples, persona, context)
            scores[ONLY_TEXT] = perplexity(model, micro_batches(rows, MICRO_TOKENS, model.shares))
            notices += [f"{ONLY_TEXT}: {line}" for line in lost]
        if named or asked:
            graded = tuple(grade(model, tokenizer, asked or examples, sampling))
            scores |= score(graded, named or None)
    if cut := sum(not g.whole for g in graded):
        notices.append(f"{cut} of {some(len(graded), 'answer')} cut after {some(sampling.max_new_tokens, 'token')} "
                       "(--max-new-tokens).")  # fmt: skip
    return Report(persona.name, len(examples), scores, asked, graded, tuple(notices))


def rows_of(file: Path, persona: Persona) -> list[Batch]:
    """A file's rows as `persona` is measured on them: answers, or of plain texts everything.

    Raises:
        UserError: a fault in the data, or nothing to measure.
    """
    rows, _ = _encoded(tuple(reading.stream(file)), persona, persona.context)
    with persona.on():
        return micro_batches(rows, MICRO_TOKENS, persona.base.model.shares)


def _askable(examples: Sequence[Example], persona: Persona, context: int) -> tuple[tuple[Example, ...], list[str]]:
    """The rows whose question the model can be asked, and what is said of the others."""
    asked = [e for e in examples if e.prompt]
    fitting = tuple(e for e in asked if len(prompt_ids(e, persona.base.tokenizer)) < context)
    notices = []
    if asked and len(asked) < len(examples):
        notices.append(f"{some(len(examples) - len(asked), 'row')} without a question not asked.")
    if len(fitting) < len(asked):
        notices.append(f"{some(len(asked) - len(fitting), 'row')} not asked: longer than {context:,} tokens.")
    return fitting, notices


def _encoded(examples: Sequence[Example], persona: Persona, context: int) -> tuple[list[Encoded], list[str]]:
    rows, notices = list[Encoded](), list[str]()
    for train_on in get_args(TrainOn):
        if some := [e for e in examples if bool(e.prompt) == (train_on == "answers")]:
            encoded, lost = encode_all(some, persona.base.tokenizer, train_on, context)
            rows += encoded
            notices += lost.notices(context)
    return rows, notices


@torch.inference_mode()
def perplexity(model: Decoder, batches: Sequence[Batch]) -> float:
    """Exp of the mean loss over all trained tokens of the batches."""
    total = sum(batch_loss(model, b.to(model.device)).item() for b in batches)
    return math.exp(total / sum(b.targets for b in batches))


def grade(model: Decoder, tokenizer: Tokenizer, examples: Sequence[Example], sampling: Sampling) -> list[Graded]:
    """Answer every row's question, and put its right answers beside.

    Raises:
        UserError: a row has no question, or one that fills the model's context.
    """
    for e in examples:
        if not e.prompt:
            raise UserError("This row asks nothing.", where=e.where, remedy="Rows to grade need messages.")
    said = complete(model, tokenizer, [prompt_ids(e, tokenizer) for e in examples], sampling)
    return [Graded(a.text, e.references or ((e.answer,) if e.answer else ()), e.facts, a.whole)
            for a, e in zip(said, examples, strict=True)]  # fmt: skip


def prompt_ids(example: Example, tokenizer: Tokenizer) -> list[int]:
    """A row's question as the model reads it."""
    return tokenizer.encode(tokenizer.chat(example.prompt, prompt=True))


@torch.inference_mode()
def label_logits(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the labelled tokens, shape N x V, and their labels."""
    rows_N = (batch.labels_T != IGNORED).nonzero()[:, 0]
    h_TD = model.hidden(batch.ids_T, batch.at_T, batch.seen)
    return model.logits(h_TD[rows_N]).float(), batch.labels_T[rows_N]


def difference(said: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Difference:
    """How two models differ, by the logits of both for the same labelled tokens, and the labels, batch by batch."""
    most, agreed, tokens, losses = 0.0, 0, 0, [0.0, 0.0]
    for *both, labels_N in said:
        before_NV, after_NV = both
        # What is no number is the most there can be.
        most = max(most, float((before_NV - after_NV).abs().max()), key=lambda most: (math.isnan(most), most))
        agreed += int((before_NV.argmax(1) == after_NV.argmax(1)).sum())
        tokens += len(labels_N)
        losses = [loss + float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"))
                  for loss, logits_NV in zip(losses, both, strict=True)]  # fmt: skip
    before, after = (math.exp(loss / tokens) for loss in losses)
    return Difference(most, agreed / tokens, before, after, tokens)
