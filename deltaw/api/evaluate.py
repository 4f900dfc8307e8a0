"""Evaluate: a persona on rows with right answers, beside its base if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.api.persona import Persona
from deltaw.data import rows as reading
from deltaw.data.batch import micro_batches
from deltaw.data.encode import encode_all
from deltaw.data.rows import Example
from deltaw.decode.sampling import Sampling
from deltaw.evaluate.measure import grade, perplexity
from deltaw.scoring.text import Graded, score

MICRO_TOKENS = 2048
ONLY_TEXT = "perplexity"
"""The one metric that needs no answer to be generated."""


@dataclass(frozen=True)
class Report:
    """Scores by name, and the answers they were given for."""

    persona: str
    rows: int
    scores: dict[str, float]
    examples: tuple[Example, ...]
    graded: tuple[Graded, ...]


def evaluate(persona: Persona, file: str | Path, metrics: Sequence[str] = (), limit: int | None = None,
             sampling: Sampling | None = None) -> Report:  # fmt: skip
    """Score a persona on a file's rows (the first `limit`); without `metrics`, those that suit the rows.

    Raises:
        UserError: a fault in the data, or a metric these rows cannot give.
    """
    examples = tuple(reading.read(Path(file))[:limit])
    scores: dict[str, float] = {}
    graded: tuple[Graded, ...] = ()
    asks = all(e.prompt for e in examples)
    with persona.on():
        model, tokenizer = persona.base.model, persona.base.tokenizer
        if not metrics or ONLY_TEXT in metrics:
            encoded = encode_all(examples, tokenizer, "answers" if asks else "all", model.config.context)
            scores[ONLY_TEXT] = perplexity(model, micro_batches(encoded.rows, MICRO_TOKENS))
        named = [m for m in metrics if m != ONLY_TEXT]
        if named or (not metrics and asks):
            graded = tuple(grade(model, tokenizer, examples, sampling or Sampling()))
            scores |= score(graded, named or None)
    return Report(persona.name, len(examples), scores, examples, graded)
