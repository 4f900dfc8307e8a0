"""`deltaw train`: flags, a configuration file and a method's own settings in, a run folder out."""

import json as json_text
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.config import Dict
from rich.console import Console

from deltaw.api.interrupt import interruptible
from deltaw.cli.show import Flat, busy, json_line
from deltaw.errors import Interrupted, UserError, WillNotFit
from deltaw.methods import find
from deltaw.settings import Training, check_file, names, plain, read_yaml
from deltaw.train.loop import DISK_FULL

EXIT = {"interrupted": Interrupted.code, DISK_FULL: WillNotFit.code}
"""What a run that ended for this reason leaves with; any other: 0."""
ELSEWHERE = ("device", "threads")
"""What may differ where a run goes on: where it computes, and not what."""


def register(app: App, arguments: Sequence[str]) -> None:
    """Add the command `train` to `app`, with the flags of the method that the arguments or their file name.

    Raises:
        UserError: there is no such method, or the configuration file is faulty.
    """
    config = _given("config", arguments)
    values = {} if config is None else read_yaml(Path(config))
    method = find(_given("method", arguments) or str(values.get("method", "lora")))
    if config is not None:
        check_file(Path(config), values, Training, method)
    data = values.pop("data", [])

    def train(*files: str, settings: Any = None, own: Any = None, config: Path | None = None,  # noqa: ARG001 (read before)
              resume: bool = False, json: bool = False) -> int:  # fmt: skip
        """Fine-tune a model on your data.

        Parameters
        ----------
        files
            Rows to learn from, as FILE or FILE:WEIGHT (2: each row is seen twice as often). With --resume: the run.
        config
            A YAML file with any of these settings, and `data`; flags come before it.
        resume
            Go on with an interrupted run: the newest, unless one is named.
        json
            Print events as JSON lines.
        """
        from deltaw.api import finetune
        from deltaw.models.ranks import Ranks

        settings, own = settings or Training(), own or method()
        if resume:
            _refuse_changes(arguments, (settings, Training()), (own, method()))
        if resume and len(files) > 1:
            raise UserError("Only one run is resumed at a time.", remedy=f"deltaw train --resume {files[0]}")
        if (ranks := Ranks.joined()).own:  # what several processes do together is shown once
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (until it ends)
        with interruptible() as stop:
            with busy(json) as say, ranks.once():
                if resume:
                    on = {key: getattr(settings, key) for key in ELSEWHERE
                          if getattr(settings, key) != getattr(Training(), key)}  # fmt: skip
                    prepared = finetune.resume(files[0] if files else None, settings.runs, stop, say, on)
                else:
                    named = files or tuple([data] if isinstance(data, str) else data)
                    prepared = finetune.prepare(named, {**plain(settings), **plain(own)}, stop, say)
            ranks.agreed(None)
            return _show(prepared, json)

    train.__annotations__ |= {"files": str, "settings": Flat[Training], "own": Flat[method],  # type: ignore[misc, valid-type]
                              "config": Path | None, "resume": bool, "json": bool}  # fmt: skip
    # A mapping's keys may hold dots, which cyclopts would take apart; as JSON they stay whole.
    said = {k: json_text.dumps(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    app.command(App(name="train", config=Dict(said, use_commands_as_keys=False, source=config)))
    app["train"].default(train)


def _refuse_changes(arguments: Sequence[str], *said: tuple[Any, Any]) -> None:
    """A run that goes on does so as it was begun: flags that would be ignored are refused, at their defaults too."""
    flags = {a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in arguments if a.startswith("--")}
    for given, default in said:
        for name in names(given):
            said_anew = name in flags or getattr(given, name) != getattr(default, name)
            if said_anew and name not in ("runs", *ELSEWHERE):
                raise UserError("A run goes on with the settings it was begun with.",
                                remedy=f"Leave --{name.replace('_', '-')} out, or train anew.")  # fmt: skip


def _show(prepared: Any, as_json: bool) -> int:
    console = Console()
    if as_json:
        reason = prepared.heard_by(lambda event: json_line(event.record()))
    else:
        reason = prepared.shown(console)
        said, verb = ("Go on with", "train --resume") if reason in EXIT else ("Talk to it", "chat")
        console.print(f"{said}: {prepared.job.run.command(verb)}", highlight=False, soft_wrap=True)
    return EXIT.get(reason, 0)


def _given(name: str, arguments: Sequence[str]) -> str | None:
    """The value of `--name` among unparsed arguments."""
    flag = f"--{name}"
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == flag or argument.startswith(f"{flag}="):
            return following if argument == flag else argument.partition("=")[2]
    return None
