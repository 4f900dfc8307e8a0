"""`deltaw combine`: one persona out of several."""

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaw.api.combine import Combination, write
from deltaw.cli.show import Flat, busy, facts
from deltaw.errors import UserError
from deltaw.settings import Machine, plain
from deltaw.words import size


def combine(*runs: str, out: Annotated[str, Parameter(name=["--out", "-o"])], base: str | None = None,
            folder: Annotated[Path, Parameter(name="--runs")] = Path("runs"), chosen: Flat[Combination] = None,
            machine: Flat[Machine] = None, json: bool = False) -> None:  # fmt: skip
    """Make one persona out of several, each times its weight; the result is a run like any other.

    Parameters
    ----------
    runs
        Runs or adapter files and their weights, as in poet:0.7 chef:0.3 (1 if not said; less than 0 takes away).
    out
        Name of the run that is made.
    base
        The base model, if it is not where the adapters were trained on it.
    folder
        Folder of the run folders.
    json
        Print one JSON object.
    """
    from deltaw.api.persona import load_all

    names, weights = zip(*map(weighed, runs), strict=True) if runs else ((), ())
    if not names:
        raise UserError("There is nothing to combine.", remedy="deltaw combine poet:0.7 chef:0.3 -o both")
    with busy(json) as say:
        personas = load_all(names, folder, base, say=say, **plain(machine or Machine()))
        say("Combining")
        file, lost = write(personas, weights, chosen or Combination(), out, folder)
    parts = [f"{w:g} × {persona.name}" for persona, w in zip(personas, weights, strict=True)]
    facts("Combined", {"from": ", ".join(parts), "written": f"{file} ({size(file.stat().st_size)})",
                       "left out": f"{lost:.2%} of the update, for which the rank is too low" if lost else "nothing"},
          json, {"file": str(file), "from": list(zip(names, weights, strict=True)), "left_out": lost})  # fmt: skip


def weighed(said: str) -> tuple[str, float]:
    """Take `poet:0.7` apart: what it names, and its weight (1 if not said).

    Raises:
        UserError: the weight is no number.
    """
    name, colon, tail = said.rpartition(":")
    if not colon or Path(said).exists():
        return said, 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or abs(weight) > 1000:
        raise UserError(f"'{tail}' is no weight.", where=said, remedy=f"For example: {name}:0.5")
    return name, weight
