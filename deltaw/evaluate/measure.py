"""Perplexity of the right answers, grades of the given ones, and how far two models differ on the same rows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from deltaw.data.batch import IGNORED, Batch
from deltaw.data.rows import Example
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.models.decoder import Decoder
from deltaw.models.tokenizer import Tokenizer
from deltaw.scoring.loss import batch_loss
from deltaw.scoring.text import Graded


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
def label_logits(model: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the labelled tokens, shape N x V, and their labels."""
    rows_N = (batch.labels_T != IGNORED).nonzero()[:, 0]
    h_TD = model.hidden(batch.ids_T, batch.at_T, batch.seen)
    return model.logits(h_TD[rows_N]).float(), batch.labels_T[rows_N]


def difference(said: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Difference:
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
