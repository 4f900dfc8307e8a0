"""`deltaw chat` and `deltaw generate`: talk, switch personas, compare them, save what was said as training data.

And answers to given questions, for scripts and pipes.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from deltaw.api.chat import Chat, personas_of
from deltaw.api.interrupt import interruptible
from deltaw.api.persona import BASE, load, load_all, load_any
from deltaw.cli.show import Flat, busy, grid, json_line, notice
from deltaw.decode.sampling import Sampling, Talk
from deltaw.errors import UserError
from deltaw.settings import KEY, Machine, plain
from deltaw.words import one_line, some


def chat(*runs: str, base: str | None = None, url: str | None = None,
         folder: Annotated[Path, Parameter(name="--runs")] = Path("runs"),
         sampling: Flat[Talk] = None,
         machine: Flat[Machine] = None) -> None:  # fmt: skip
    """Talk with one or more personas; the base is loaded once.

    Parameters
    ----------
    runs
        Names or folders of runs, adapter files, or one model by itself. By default: the newest run.
    base
        Without runs: talk with this model alone; beside them: the base, if it is not where they were trained on it.
    url
        Talk with the personas of a server there, by their names; DELTAW_API_KEY is the key that it asks for.
    folder
        Folder of the run folders.
    """
    alone = runs[0] if len(runs) == 1 else base if not runs else None
    with busy() as say:
        how = {**plain(machine or Machine()), "say": say}
        if url is not None:
            session = Chat(personas_of(url, runs, os.environ.get(KEY, "")), sampling or Talk())
        else:
            personas = [load_any(alone, folder, base, **how)] if alone else load_all(runs, folder, base, **how)
            session = Chat(personas, sampling or Talk())
    console = Console(highlight=False)
    if console.is_terminal:
        home = session.personas[session.current].home
        console.print(f"[bold]{session.current}[/] on {home}. /help lists what you can do.")
        _tell_system(session, console)
    for line in _lines(session, console):
        try:
            if line.startswith("/"):
                if _command(session, console, line) is False:
                    break
            elif line.strip():
                _answer(session, console, line)
        except UserError as e:
            console.print(str(e), style="red", markup=False)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.print("\nStopped.", style="dim")


def _lines(session: Chat, console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401 (only so that it is loaded)
    while True:
        try:
            yield input(f"\n{session.current}> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D leaves.", style="dim")


def _command(session: Chat, console: Console, line: str) -> bool | None:
    """Do what a line with a slash says; false: leave."""
    word, _, rest = line.partition(" ")
    known = {usage.partition(" ")[0]: act for usage, (_, act) in COMMANDS.items()}
    if (act := known.get("/quit" if word == "/exit" else word)) is None:
        raise UserError(f"There is no command {word}.", remedy="/help lists what there is.")
    return act(session, console, rest.strip())


def _persona(session: Chat, console: Console, name: str) -> None:
    if not name:
        return _personas(session, console, name)
    session.switch(name)
    seen = " It sees the conversation so far; /reset begins anew." if session.begun else ""
    console.print(f"{name} answers now.{seen}", style="dim", markup=False, soft_wrap=True)
    return _tell_system(session, console)


def _tell_system(session: Chat, console: Console) -> None:
    if (system := session.personas[session.current].system) and not session.turns:
        console.print(f"Its system prompt: {one_line(system, 200)}", style="dim", markup=False)


def _personas(session: Chat, console: Console, _: str) -> None:
    console.print("\n".join(("* " if n == session.current else "  ") + n for n in session.personas), markup=False)


def _compare(session: Chat, _: Console, question: str) -> None:
    if not question:
        raise UserError("What shall they answer?", remedy="/compare QUESTION")
    with _heard() as heard:
        said = session.compare(question, heard)
    grid(list(said), [list(said.values())])


def _system(session: Chat, console: Console, text: str) -> None:
    session.system(text)
    console.print("The conversation begins anew.", style="dim")


def _retry(session: Chat, console: Console, _: str) -> None:
    if (question := session.retry()) is None:
        raise UserError("There is no answer to try again.")
    _answer(session, console, question)


def _save(session: Chat, console: Console, name: str) -> None:
    path = Path(name or "chat.jsonl")
    console.print(f"{path} has {some(session.save(path), 'row')} now.", style="dim", markup=False)


def _help(_: Chat, console: Console, __: str) -> None:
    console.print("\n".join(f"{usage:<15} {text}" for usage, (text, _) in COMMANDS.items()), markup=False)


COMMANDS: dict[str, tuple[str, Callable[[Chat, Console, str], bool | None]]] = {
    "/persona NAME": ("let another persona answer", _persona),
    "/personas": ("who there is", _personas),
    "/base": ("let the base answer", lambda session, console, _: _persona(session, console, BASE)),
    "/compare TEXT": ("everybody answers", _compare),
    "/system TEXT": ("begin anew, with this system prompt", _system),
    "/reset": ("begin anew", lambda session, console, _: _system(session, console, "")),
    "/retry": ("answer the last question once more, in another way", _retry),
    "/save FILE": ("add the conversation to a file of training rows", _save),
    "/help": ("this", _help),
    "/quit": ("leave, as Ctrl-D does; Ctrl-C stops an answer", lambda *_: False),
}
"""How each is asked for, what it does, and what does it with what follows its name: false leaves."""


def _answer(session: Chat, console: Console, question: str) -> None:
    with _heard() as heard:
        for piece in session.ask(question, heard):
            console.out(piece, end="")
    console.out("")
    if session.cut:
        limit = some(session.sampling.max_new_tokens, "token")
        console.print(f"(cut after {limit}: --max-new-tokens)", style="dim", highlight=False)


@contextmanager
def _heard() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether the answer is still wanted. Ctrl-C ends it; once more, and it is dropped."""
    with interruptible(hint="", again=signal.default_int_handler, signals=(signal.SIGINT,)) as stop:
        yield lambda: not stop()
    if stop() and not sys.stdin.isatty():
        raise KeyboardInterrupt  # nobody is there to ask something else


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
