"""`deltaw generate`: answers to given questions, for scripts and pipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deltaw.cli.show import busy, json_line
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError


def generate(*questions: str, run: str | None = None, base: str | None = None, runs: Path = Path("runs"),
             sampling: Annotated[Sampling | None, Parameter(name="*")] = None, json: bool = False) -> None:  # fmt: skip
    """Answer questions given on the command line, or one a line on the standard input.

    Parameters
    ----------
    questions
        What is asked.
    run
        The persona that answers: a run's name or folder, or an adapter file. By default: the newest run.
    base
        Answer with this base model alone, without an adapter.
    runs
        Folder of the run folders.
    json
        Print one JSON object a line.
    """
    from deltaw.api.persona import Persona, load, load_base

    asked = list(questions) or [line.strip() for line in sys.stdin if line.strip()]
    if not asked:
        raise UserError("There is no question.", remedy='deltaw generate "What grows in the north field?"')
    if base is not None and run is not None:
        raise UserError("--base answers without an adapter, --run with one.", remedy="Give one of them.")
    with busy() as say:
        persona = load(run, runs, say=say) if base is None else Persona("base", load_base(base, say=say))
    for question, answer in zip(asked, persona.ask_all(asked, **vars(sampling or Sampling())), strict=True):
        if json:
            json_line({"persona": persona.name, "question": question, "answer": answer})
        else:
            sys.stdout.write(answer + "\n")
