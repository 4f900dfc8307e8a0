"""`deltaw eval`: scores of a persona on rows with right answers, and answers side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console

from deltaw.api.evaluate import ONLY_TEXT, Report, evaluate
from deltaw.api.persona import BASE, Persona, load_any
from deltaw.cli.show import Flat, busy, grid, json_line, notice
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.scoring.text import MEANINGS, Graded
from deltaw.settings import Count, Machine, plain, settings
from deltaw.words import some

NO_ANSWERS = UserError("These metrics need no answers, so there are none to compare.", remedy="Leave --metrics out.")


@settings
class Asked:
    """What is measured, and what is shown of it."""

    metrics: str = ""
    """Names, separated by commas: perplexity, facts, exact_match, bleu, chrf, rouge1, rouge2, rougeL, json_valid,
    intent, slot_f1, label_accuracy. By default: those that suit the rows."""
    compare: Annotated[int, Field(ge=0)] = 0
    """Show this many answers beside those of the base, and score the base too."""
    limit: Count | None = None
    """Only the first so many rows."""
    base: str | None = None
    """The base model, if it is not where the adapter was trained on it."""


def eval(run: str, file: Path, /, *, asked: Flat[Asked] = None, runs: Path = Path("runs"),  # noqa: A001 (its name)
         sampling: Flat[Sampling] = None, machine: Flat[Machine] = None, json: bool = False) -> None:  # fmt: skip
    """Measure a persona on rows with right answers.

    Parameters
    ----------
    run
        A run's name or folder, an adapter file, or a base model.
    file
        Rows to be measured on: never those it was trained on.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    asked = asked or Asked()
    with busy(json) as say:
        persona = load_any(run, runs, asked.base, say=say, **plain(machine or Machine()))
        personas = [Persona(BASE, persona.base), persona] if asked.compare and persona.adapter else [persona]
        names = [m.strip() for m in asked.metrics.split(",") if m.strip()]
        if asked.compare and names == [ONLY_TEXT]:
            raise NO_ANSWERS
        reports, context = [], min(each.context for each in personas)
        for each in personas:
            say(f"Measuring {each.name} on {file}")
            reports.append(evaluate(each, file, names, asked.limit, sampling or Sampling(), context))
    if json:
        json_line(_record(file, reports, asked.compare))
        return
    if asked.compare and not reports[0].graded:
        raise NO_ANSWERS
    if asked.compare:
        grid(["question", *(r.persona for r in reports)],
             [(reports[0].examples[i].prompt[-1]["content"], *(shortened(r.graded[i]) for r in reports))
              for i in _spread(len(reports[0].graded), asked.compare)])  # fmt: skip
    told = Console().is_terminal  # a pipe wants the numbers alone
    grid([f"score on {some(reports[0].rows, 'row')}", *(r.persona for r in reports), *["what it is"] * told],
         [[name, *(f"{r.scores[name]:.4g}" for r in reports), *[MEANINGS[name]] * told]
          for name in reports[0].scores])  # fmt: skip
    for report in reports:
        for line in report.notices:
            notice(f"{report.persona}: {line}")


def _record(file: Path, reports: Sequence[Report], compare: int) -> dict[str, object]:
    first = reports[0]
    answers = [{"question": e.prompt[-1]["content"], "expected": e.answer,
                **{r.persona: r.graded[i].answer for r in reports}}
               for i, e in enumerate(first.examples[:compare]) if first.graded]  # fmt: skip
    return {"file": str(file), "rows": first.rows, "scores": {r.persona: r.scores for r in reports},
            "notices": {r.persona: r.notices for r in reports if r.notices}, "answers": answers}  # fmt: skip


def shortened(graded: Graded) -> str:
    """The answer, with a mark where it was cut."""
    return graded.answer if graded.whole else f"{graded.answer} …"


def _spread(rows: int, count: int) -> list[int]:
    """Evenly spaced rows, so that neighbours on one topic are not all that is seen."""
    count = min(rows, count)
    return [i * rows // count for i in range(count)]
