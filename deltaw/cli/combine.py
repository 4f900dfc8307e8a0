"""`deltaw combine` and `deltaw search`: personas made of what was trained: of several, or of a GLoRA supernet.

The one adds them up, each times its weight; the other chooses what each layer trains, within a number of parameters.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaw.api import combine as several, search as supernet
from deltaw.api.evaluate import rows_of
from deltaw.api.merge import home
from deltaw.api.persona import load, load_all, locate
from deltaw.cli.show import Flat, busy, facts
from deltaw.errors import UserError
from deltaw.files.runs import Run, digest, fresh
from deltaw.settings import Machine, plain
from deltaw.words import size


def combine(*runs: str, out: Annotated[str, Parameter(name=["--out", "-o"])], base: str | None = None,
            folder: Annotated[Path, Parameter(name="--runs")] = Path("runs"), chosen: Flat[several.Combination] = None,
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
    names, weights = zip(*map(weighed, runs), strict=True) if runs else ((), ())
    if not names:
        raise UserError("There is nothing to combine.", remedy="deltaw combine poet:0.7 chef:0.3 -o both")
    with busy(json) as say:
        personas = load_all(names, folder, base, say=say, **plain(machine or Machine()))
        say("Combining")
        file, lost = several.write(personas, weights, chosen or several.Combination(), out, folder)
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
    with suppress(ValueError):
        if abs(weight := float(tail)) <= 1000:
            return name, weight
    raise UserError(f"'{tail}' is no weight.", where=said, remedy=f"For example: {name}:0.5")


def search(run: str, file: Path, /, *, out: Annotated[str, Parameter(name=["--out", "-o"])],
           chosen: Flat[supernet.Search] = None, base: str | None = None, runs: Path = Path("runs"),
           machine: Flat[Machine] = None, json: bool = False) -> None:  # fmt: skip
    """Find the best paths through a supernet within a budget, and keep them as a run; it goes on where it was stopped.

    Parameters
    ----------
    run
        A run of --method glora --supernet: its name or folder, or its adapter file.
    file
        Rows that decide: not those it was trained on, and not those it will be tested on.
    out
        Name of the run that is made.
    base
        The base model, if it is not where the adapter was trained on it.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    made, chosen = fresh(out, runs, "-o."), chosen or supernet.Search()
    name, path = locate(run, runs)
    folder = home(path)
    rows = digest(file)
    if Run(folder).manifest.exists() and rows in Run(folder).read_manifest().get("data", {}).values():
        raise UserError("These rows were trained on, or chose what was kept.", where=str(file),
                        remedy="Give rows of their own.")  # fmt: skip
    log = folder / f"search-{hashlib.sha256((rows + digest(path)).encode()).hexdigest()[:12]}.jsonl"
    found = []
    with busy(json) as say:
        persona = load(str(path), runs, base, **plain(machine or Machine()), say=say)
        for each in supernet.search(persona, rows_of(file, persona), chosen, log):
            found.append(each)
            best = min(found, key=lambda m: m.perplexity)
            say(f"{len(found)} of {chosen.evaluations}: best perplexity {best.perplexity:.4g}")
        adapter = supernet.write(persona, best.paths, made)
    begun = min(found[: chosen.population], key=lambda m: m.perplexity)
    facts("Search", {
        "paths of": f"{name}, {len(found)} of them measured on {file}",
        "first": f"{begun.perplexity:.4g}, the best of {min(len(found), chosen.population)} at random",
        "best": f"{best.perplexity:.4g}, {best.parameters:,} of {chosen.budget:,} numbers",
        "written": f"{adapter} ({size(adapter.stat().st_size)})", "measured": str(log),
    }, json, {"file": str(adapter), "perplexity": best.perplexity, "parameters": best.parameters,
              "first": begun.perplexity, "evaluations": len(found), "log": str(log)})  # fmt: skip
