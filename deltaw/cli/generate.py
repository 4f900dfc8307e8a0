"""`deltaw generate`: answers to given questions, for scripts and pipes."""

import sys
from pathlib import Path

from deltaw.cli.show import Flat, busy, json_line, notice
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.settings import Machine, plain
from deltaw.words import some


def generate(*questions: str, run: str | None = None, base: str | None = None, runs: Path = Path("runs"),
             sampling: Flat[Sampling] = None, machine: Flat[Machine] = None, json: bool = False) -> None:  # fmt: skip
    """Answer questions given on the command line, or one a line on the standard input.

    Parameters
    ----------
    questions
        What is asked.
    run
        The persona that answers: a run's name or folder, or an adapter file. By default: the newest run.
    base
        Answer with this base model alone; beside --run: the run's base, if it is not where it was trained on it.
    runs
        Folder of the run folders.
    json
        Print one JSON object a line.
    """
    from deltaw.api.persona import load, load_any

    asked = list(questions) or [line.strip() for line in sys.stdin if line.strip()]
    if not asked:
        raise UserError("There is no question.", remedy='deltaw generate "What grows in the north field?"')
    sampling, how = sampling or Sampling(), plain(machine or Machine())
    with busy() as say:
        alone = base is not None and run is None
        persona = load_any(str(base), **how, say=say) if alone else load(run, runs, base, **how, say=say)
    if run is None:
        notice(f"{persona.name} answers.")
    answers = persona.answer_all(asked, sampling)
    for question, answer in zip(asked, answers, strict=True):
        if json:
            json_line({"persona": persona.name, "question": question, "answer": answer.text, "whole": answer.whole})
        else:
            sys.stdout.write(answer.text + "\n")
    if cut := sum(not answer.whole for answer in answers):
        limit = some(sampling.max_new_tokens, "token")
        notice(f"{cut} of {some(len(answers), 'answer')} cut after {limit} (--max-new-tokens).")
