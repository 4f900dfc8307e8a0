"""`deltaw eval`: scores of a persona on rows with right answers, and answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaw.cli.show import busy, grid, json_line
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError


def eval(run: str, file: Path, *, metrics: str = "", compare: int = 0,  # noqa: A001 (the command's name)
         limit: int | None = None, runs: Path = Path("runs"),
         sampling: Annotated[Sampling | None, Parameter(name="*")] = None, json: bool = False) -> None:  # fmt: skip
    """Measure a persona on rows with right answers.

    Parameters
    ----------
    run
        A run's name or folder, an adapter file, or a base model.
    file
        Rows to be measured on: never those it was trained on.
    metrics
        Names, separated by commas: perplexity, facts, exact_match, bleu, chrf, rouge1, rouge2, rougeL, json_valid,
        intent, slot_f1, label_accuracy. By default: those that suit the rows.
    compare
        Show this many answers beside those of the base, and score the base too.
    limit
        Only the first so many rows.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    from deltaw.api.evaluate import evaluate
    from deltaw.api.persona import Persona, load, load_base
    from deltaw.models.source import KNOWN

    with busy(json) as say:
        if run in KNOWN or (Path(run) / "config.json").exists() or run.endswith(".gguf"):
            personas = [Persona("base", load_base(run, say=say))]
        else:
            persona = load(run, runs, say=say)
            personas = [Persona("base", persona.base), persona] if compare else [persona]
        names = [m.strip() for m in metrics.split(",") if m.strip()]
        reports = []
        for each in personas:
            say(f"Measuring {each.name} on {file}")
            reports.append(evaluate(each, file, names, limit, sampling or Sampling()))
    if json:
        json_line({"file": str(file), "rows": reports[0].rows, "scores": {r.persona: r.scores for r in reports},
                   "answers": [{"question": e.prompt[-1]["content"], "expected": e.answer,
                                **{r.persona: r.graded[i].answer for r in reports}}
                               for i, e in enumerate(reports[0].examples[:compare]) if reports[0].graded]})  # fmt: skip
        return
    if compare and not reports[0].graded:
        raise UserError("These metrics need no answers, so there are none to compare.", remedy="Leave --metrics out.")
    if compare:
        picked = _spread(reports[0].rows, compare)
        rows = [(reports[0].examples[i].prompt[-1]["content"], *(r.graded[i].answer for r in reports)) for i in picked]
        grid(["question", *(r.persona for r in reports)], rows)
    grid([f"score on {reports[0].rows} rows", *(r.persona for r in reports)],
         [[name, *(f"{r.scores[name]:.4g}" for r in reports)] for name in reports[0].scores])  # fmt: skip


def _spread(rows: int, count: int) -> list[int]:
    """Evenly spaced rows, so that neighbours on one topic are not all that is seen."""
    count = min(rows, count)
    return [i * rows // count for i in range(count)]
