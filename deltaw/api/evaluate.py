"""Evaluate: a persona on rows with right answers, beside its base if asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from deltaw.api.persona import Persona
from deltaw.data import files as reading
from deltaw.data.batch import Batch, micro_batches
from deltaw.data.encode import Encoded, TrainOn, encode_all
from deltaw.data.rows import Example
from deltaw.decode.sampling import Sampling
from deltaw.evaluate.measure import grade, perplexity, prompt_ids
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
    rows: list[Encoded] = []
    notices: list[str] = []
    kinds: tuple[TrainOn, TrainOn] = ("answers", "all")
    for train_on in kinds:
        if some := [e for e in examples if bool(e.prompt) == (train_on == "answers")]:
            encoded, lost = encode_all(some, persona.base.tokenizer, train_on, context)
            rows += encoded
            notices += lost.notices(context)
    return rows, notices
