"""The command line: which command, and what a mistake looks like: one panel, one exit code, no traceback.

Commands are imported when they are called, so that help comes at once.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from cyclopts import App
from cyclopts.exceptions import CycloptsError, ValidationError
from pydantic import ValidationError as Invalid
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from deltaw import __version__
from deltaw.errors import Interrupted, UserError, WillNotFit
from deltaw.settings import complaint
from deltaw.words import one_line

TRACEBACK = "--debug"
BROKEN_PIPE = 141
LIMITS = {"what": 220, "where": 140, "why": 210, "remedy": 210}
"""Characters of each part of a panel: with 80 columns it has twelve lines at most."""

REFUSED = {errno.ENOENT: "Give a path that is there.", errno.EISDIR: "Give a file.", errno.ENOTDIR: "Give a folder.",
           errno.EEXIST: "Take another path."}  # fmt: skip
"""What to do where the system has no room for a path; anything else is a matter of rights."""

COMMANDS = {
    "train": "Fine-tune a model on your data.",
    "chat": "Talk with what you trained, and switch personas as you go.",
    "serve": "Let many personas answer over HTTP, as OpenAI's clients ask.",
    "key": "Make a key for the server, with personas and limits of its own.",
    "generate": "Answer questions given on the command line, or one a line.",
    "eval": "Measure a persona, beside its base if you like.",
    "merge": "Write base and adapter as one plain model, and check it.",
    "combine": "Make one persona out of several.",
    "search": "Choose what each layer of a GLoRA supernet trains.",
    "quantize": "Write a model with its matrices in fewer bits.",
    "export": "Write a persona for other tools, and check it.",
    "import": "Take in a LoRA that PEFT, mlx-lm or torchtune wrote.",
    "data": "Say what a model would learn from your data.",
    "inspect": "Say what a model, an adapter or a run is.",
    "doctor": "Say what this machine can do.",
}
HOMES = {"key": "serve:key", "generate": "chat:generate", "search": "combine:search", "quantize": "merge:quantize",
         "export": "exchange:export", "import": "exchange:bring", "doctor": "inspect:doctor"}  # fmt: skip
"""Where a command is that is not in a file of its name."""


def application(arguments: Sequence[str]) -> App:
    """The command line; `train` shows the flags of the method that the arguments name."""
    app = App(name="deltaw", version=__version__, result_action="return_value", suppress_keyboard_interrupt=False,
              help="Fine-tune a language model on your own data with the LoRA family, and talk to the result.",
              help_epilogue="Two commands to begin with: deltaw train my.jsonl, then deltaw chat. "
                            f"Add {TRACEBACK} to see a traceback.")  # fmt: skip
    for name, text in COMMANDS.items():
        if name == "data":
            inner = App(name=name, help=text)
            inner.command("deltaw.cli.data:check", name="check", help="Look at rows; nothing is trained.")
            app.command(inner)
        elif name != "train":
            app.command(f"deltaw.cli.{HOMES.get(name, f'{name}:{name}')}", name=name, help=text)
        elif list(arguments[:1]) == [name]:
            from deltaw.cli.train import register

            register(app, arguments)
        else:  # its flags depend on the method, and need torch: only its name is shown
            app.command(lambda: None, name=name, help=text)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns: 0, or 2 usage or data, 3 will not fit, 4 diverged, 130 interrupted.
    """
    errors = Console(stderr=True)
    debug = TRACEBACK in arguments
    arguments = [a for a in arguments if a != TRACEBACK]
    try:
        _load(arguments)
        done: Any = application(arguments)(arguments, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        return Interrupted.code
    except (BrokenPipeError, SystemExit) as e:
        if isinstance(e, SystemExit) and not isinstance(e.__context__, BrokenPipeError):  # rich says it so
            raise
        return _unread()
    except (UserError, CycloptsError, OSError) as e:
        if debug:
            errors.print_exception()
        told = _usage(e) if isinstance(e, CycloptsError) else _unwritable(e) if isinstance(e, OSError) else e
        errors.print(panel(told))
        return told.code
    return done if isinstance(done, int) else 0


def _load(arguments: Sequence[str]) -> None:
    """Import what takes long while Ctrl-C still ends the process at once; from then on it is a KeyboardInterrupt."""
    if arguments and arguments[0] in COMMANDS and not {"--help", "-h"} & {*arguments}:
        if arguments[0] == "serve":  # its clients need the cores too, for which OpenMP's threads would wait awake
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        import torch  # noqa: F401 (only so that it is loaded)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: Any) -> NoReturn:
    """Leave as the system would, but by way of what tidies up."""
    raise SystemExit(128 + signal.SIGTERM)


def _unread() -> int:
    """Nobody reads the output any more: say nothing, not even when Python flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def panel(error: UserError) -> Panel:
    """What happened, where, why, and what to do about it."""
    text = Text(one_line(error.what, LIMITS["what"]), style="bold")
    for label, part in (("where", error.where), ("why", error.why), ("remedy", error.remedy)):
        if part:
            text.append(f"\n{label:<7} ", style="dim").append(one_line(part, LIMITS[label]), style="not bold")
    return Panel(text, border_style="red", title=f"exit code {error.code}", title_align="right")


def _usage(error: CycloptsError) -> UserError:
    """A mistake in the flags, in our words."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, Invalid):
        cause = cause.__cause__
    ours = cause if isinstance(error, ValidationError) else None
    return UserError(complaint(ours) if ours else str(error).strip().splitlines()[0], remedy="See --help.")


def _unwritable(error: OSError) -> UserError:
    """What the system refused, in our words."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some, or take a folder on another disk." if full else REFUSED.get(
        error.errno or 0, "Take another place, or make it writable.")  # fmt: skip
    return (WillNotFit if full else UserError)(f"{error.strerror or error}.", where=os.fsdecode(error.filename or ""),
                                               remedy=remedy)  # fmt: skip
