"""Fine-tune: from files and settings to a run folder with an adapter in it, by way of a measured plan."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deltaw import methods
from deltaw.adapters.adapter import Adapter, Method
from deltaw.advise import plan as planning
from deltaw.advise.machine import free_disk
from deltaw.api.interrupt import interruptible
from deltaw.api.persona import Base, Persona, load_base
from deltaw.api.prepare import EncodedData, Loaded, begun, load, manifest, packed_by_layer, packing, question
from deltaw.data.batch import per_epoch, rows_per_step
from deltaw.data.files import HUB
from deltaw.errors import Diverged, Interrupted, UserError, WillNotFit, explained, nearest
from deltaw.files import runs
from deltaw.files.runs import Run
from deltaw.kernels.library import instruction_set
from deltaw.kernels.memory import is_full
from deltaw.models.checkpoint import count
from deltaw.models.ranks import Ranks
from deltaw.settings import Training, build, names, plain
from deltaw.train.checkpoint import guarded
from deltaw.train.events import Event, Finished, Job, Planned, Started, Warned
from deltaw.train.loop import DISK_FULL, Trainer
from deltaw.train.record import EventFile, TensorBoard
from deltaw.train.report import write_card, write_report
from deltaw.train.view import view
from deltaw.words import size

Listener = Callable[[Event], None]
RATE_WIDTH = 576
"""The model width for which methods give their `peak_rate`; wider models get less, in proportion."""
CHECKPOINTS = 4
"""Two kept, one being written, and the results."""


def finetune(*data: str | Path, listen: Sequence[Listener] | None = None, **settings: Any) -> Persona:
    """Fine-tune on data files, and return the persona. Keywords are those of `deltaw train`: `rank=8, epochs=2`.

    Each event of the run goes to every function in `listen`; without it, the run is shown as on the command line.

    Raises:
        UserError: wrong settings or data. WillNotFit: too little memory or disk. Diverged: the loss was not finite
        twice. Interrupted: Ctrl-C; what was trained is saved.
    """
    with interruptible() as stop:
        made = prepare([str(d) for d in data], settings, stop)
        reason = made.shown(Console()) if listen is None else made.heard_by(*listen)
    run = made.job.run
    if reason == "interrupted":
        raise Interrupted("Training was interrupted; it is saved.", remedy=run.command("train --resume"))
    if reason == DISK_FULL:
        raise WillNotFit("The disk is full: the adapter could not be written.", where=str(run.folder),
                         remedy=f"Free some, and go on: {run.command('train --resume')}")  # fmt: skip
    return Persona(run.name, made.base, made.job.adapter, made.job.header.system)


@dataclass
class Prepared:
    """A run that is ready to begin, or to go on."""

    base: Base
    job: Job
    started: Started
    plan: planning.Plan | None = None

    def heard_by(self, *listeners: Listener) -> str:
        """Go through all events, each told to every listener; why the run ended. Errors as of `events`."""
        reason = ""
        for event in self.events():
            for each in listeners:
                each(event)
            reason = event.reason if isinstance(event, Finished) else reason
        return reason

    def shown(self, console: Console) -> str:
        """Go through all events, each shown on a terminal or in a file; why the run ended. Errors as of `events`."""
        with closing(view(console)) as shown:
            return self.heard_by(shown)

    def events(self) -> Iterator[Event]:
        """Plan, train, and keep the run folder: every event is written down before it is passed on.

        Raises:
            WillNotFit: it needs more memory than there is. Diverged: the loss was not finite twice.
            UserError: another process is training this run.
        """
        run = self.job.run
        with run.held():
            try:
                yield from self._recorded()
            except (UserError, RuntimeError) as e:
                also = "" if self.job.recompute else ", or take --gradient-checkpointing on"
                full = WillNotFit(f"The memory of {self.job.model.device} was full.", where=str(run.folder),
                                  remedy=f"Cut rows with --max-tokens, lower --micro-tokens{also}.")  # fmt: skip
                told = full if isinstance(e, RuntimeError) and is_full(e) else e
                if type(told) in (UserError, WillNotFit) and not run.checkpoints():
                    run.remove()  # nothing was trained, and the name is free again
                raise told from None

    def _recorded(self) -> Iterator[Event]:
        run = self.job.run
        report = guarded(lambda: (write_report(run.folder), write_card(run.folder)),
                         "The disk is full: report.html was not written.")  # fmt: skip
        try:
            with closing(EventFile(run.events)) as log, closing(TensorBoard(run.folder / "tensorboard")) as board:
                for event in self._all():
                    log(event)
                    board(event)
                    yield event
                if lost := log.lost + board.lost:
                    yield Warned(text=f"The disk was full: {lost} events are missing in {run.name}'s records.")
        except Diverged:
            list(report)
            raise
        yield from report

    def _all(self) -> Iterator[Event]:
        trainer = Trainer(self.job)
        lost = trainer.resume()
        yield replace(self.started, resumed_at=trainer.progress.step, notices=(*self.started.notices, *lost))
        if self.plan is None:
            self.plan = self.job.ranks.agreed(planning.measure(self.job, self.job.settings.minutes))
            yield from self._write_plan({})
        told = self.plan
        self.job.steps, self.job.recompute = trainer.progress.steps or told.steps, told.recompute
        low, high = (told.seconds * (1 + by) for by in (-planning.SPREAD, planning.SPREAD))
        yield Planned(steps=told.steps, train_seconds=told.seconds, low_seconds=low, high_seconds=high,
                      peak_bytes=told.peak_bytes, available_bytes=told.available_bytes, recompute=told.recompute,
                      notices=told.notices)  # fmt: skip
        if self.job.ranks.count > 1:
            self.job.ranks.shard(self.job.model)
        for event in trainer.run():
            if isinstance(event, Finished):
                event = replace(event, predicted_seconds=self.plan.after(event.step),
                                predicted_bytes=self.plan.peak_bytes)  # fmt: skip
                yield from self._write_plan({"actual": event.record()})
            yield event

    def _write_plan(self, more: dict[str, Any]) -> Iterator[Event]:
        assert self.plan is not None
        run, values = self.job.run, {**asdict(self.plan), **more}
        yield from guarded(lambda: run.write_json(run.plan, values), "The disk is full: plan.json was not written.")


def prepare(data: Sequence[str], values: Mapping[str, Any], stop: Callable[[], bool] = lambda: False,
            say: Callable[[str], None] = lambda _: None) -> Prepared:  # fmt: skip
    """Check settings and data, bring the base into memory, make the adapter and the run folder.

    Raises:
        UserError: wrong settings or data. WillNotFit: too little disk.
    """
    settings, method = resolve(values)
    loaded = load(data, settings, stop)  # before the model: a fault in the data is found at once
    base = load_base(settings.base, settings.dtype, settings.device, settings.threads, say, packing(settings, method))
    adapter, encoded = begun(method, base, settings, loaded, stop)
    method = adapter.method
    settings = _resolved(settings, method, base, encoded)
    # Without the name, so that the file can be given back with --config.
    config = {"data": list(data), **plain(replace(settings, name=None)), **plain(method)}

    def made() -> Run:
        run = runs.create(settings.runs, settings.name, called(loaded.parts[0].path), settings.method)
        if (free := free_disk(run.folder)) < (need := CHECKPOINTS * 12 * adapter.parameter_count):
            run.folder.rmdir()
            raise WillNotFit(f"Checkpoints need about {size(need)} of disk; {size(free)} are free.",
                             where=str(settings.runs), remedy="Free some, or take --runs on another disk.")  # fmt: skip
        run.write_config(config)
        run.write_json(run.manifest, {**manifest(base, loaded, encoded), "settings": config})
        return run

    run = runs.for_all(Ranks.joined(), made)
    return Prepared(base, *_job(base, run, adapter, settings, loaded, encoded, stop))


def resume(name: str | None, folder: Path, stop: Callable[[], bool] = lambda: False,
           say: Callable[[str], None] = lambda _: None, on: Mapping[str, Any] | None = None) -> Prepared:  # fmt: skip
    """Make an interrupted run ready to go on where its newest checkpoint is; `on`: another `device`, or `threads`.

    Raises:
        UserError: there is no such run, it has ended or is still being trained, or its base or data are not what they
        were.
    """
    run = runs.for_all(Ranks.joined(), lambda: runs.find(
        name, folder, lambda run: bool(run.checkpoints()) and not run.adapter.exists() and not run.busy()))  # fmt: skip
    config = run.read_config()
    data = config.pop("data")
    if run.adapter.exists():
        raise UserError(f"The run '{run.name}' has ended.", where=str(run.folder), remedy=run.command("chat"))
    then = run.read_manifest()
    with run.held():  # said now, rather than after the model is loaded
        settings, method = resolve({**config, **(on or {})}, str(run.config))
    loaded = load(data, settings, stop)
    base = load_base(settings.base, settings.dtype, settings.device, settings.threads, say, packing(settings, method))
    with explained("The manifest does not say when the run was begun.", KeyError, TypeError, ValueError,
                   where=run.manifest, why="", remedy="Train anew."):  # fmt: skip
        base.tokenizer.now = datetime.datetime.fromisoformat(then["rendered"])
    adapter, encoded = begun(method, base, settings, loaded, stop, fresh=not run.checkpoints())
    now = manifest(base, loaded, encoded)
    if changed := [key for key in now if then.get(key) != now[key]]:
        raise UserError(f"The run '{run.name}' cannot go on: {', '.join(changed)} changed since it began.",
                        where=str(run.manifest), remedy="Put it back as it was, or train anew.")  # fmt: skip
    job, started = _job(base, run, adapter, settings, loaded, encoded, stop)
    moved = [f"It goes on with {key} {value}, and was begun with {config[key]}: losses may differ in the last digits."
             for key, value in (on or {}).items() if value != config[key]]  # fmt: skip
    if not run.checkpoints():
        moved.append("No checkpoint is left: the run begins anew.")
    prepared = Prepared(base, job, replace(started, notices=(*started.notices, *moved)))
    if run.plan.exists():
        prepared.plan = planning.Plan.read(run.plan)
    return prepared


def called(file: Path) -> str:
    """What a data file is called in a run's name: `village` for both village.jsonl and village/train.jsonl."""
    if str(file).startswith(HUB):
        return str(file).removeprefix(HUB).partition("@")[0].rpartition("/")[2]
    folder = file.resolve().parent.name
    return folder if file.stem in ("train", "data") and folder else file.stem


def _resolved(settings: Training, method: Method, base: Base, encoded: EncodedData) -> Training:
    """The settings with what was chosen here in the place of `auto` and nothing: what a resumed run goes by."""
    dtype: Any = str(base.model.dtype).removeprefix("torch.")
    rate = settings.learning_rate or type(method).peak_rate * min(1.0, RATE_WIDTH / base.model.config.width)
    rows = settings.batch_rows or rows_per_step(encoded.rows.mean_tokens)
    return replace(settings, dtype=dtype, device=str(base.model.device), threads=torch.get_num_threads(),
                   batch_rows=rows, learning_rate=rate)  # fmt: skip


def _job(base: Base, run: Run, adapter: Adapter, settings: Training, loaded: Loaded, encoded: EncodedData,
         stop: Callable[[], bool]) -> tuple[Job, Started]:  # fmt: skip
    with adapter.on():
        asked = question(loaded, base, settings)
    header, rate = base.header(adapter, loaded.system), settings.learning_rate or 0.0
    job = Job(run, base.model, base.tokenizer, adapter, header, settings, encoded.rows, encoded.weights, encoded.val,
              settings.steps or 0, rate, question=asked, stop=stop, ranks=(ranks := Ranks.joined()))  # fmt: skip
    job.steps = job.steps or max(1, round(settings.epochs * per_epoch(job.weights, job.batch_rows)))
    together = [f"{ranks.count} processes train together; the plan is that of one."] * (ranks.count > 1)
    notices = (*loaded.notices, *encoded.notices, *together)
    started = Started(
        run=str(run.folder), base=base.name, method=settings.method, trained_parameters=adapter.parameter_count,
        base_parameters=count(base.model), rows=len(encoded.rows), val_rows=encoded.val_rows,
        tokens=encoded.rows.tokens, trained_tokens=encoded.rows.targets, batch_rows=job.batch_rows,
        dtype=str(base.model.dtype).removeprefix("torch."), device=str(base.model.device),
        threads=torch.get_num_threads(), learning_rate=job.learning_rate, packed=packed_by_layer(adapter),
        base_form=base.form, kernels=instruction_set(), notices=notices)  # fmt: skip
    return job, started


def resolve(values: Mapping[str, Any], where: str = "") -> tuple[Training, Method]:
    """Divide flat settings into those of training and those of the method.

    Raises:
        UserError: an unknown setting, with the nearest known one, or a value that does not fit.
    """
    method = str(values.get("method", "lora"))
    known = [names(Training), names(methods.find(method))]
    if (odd := next((key for key in values if key not in chain(*known)), None)) is not None:
        raise UserError(f"Unknown setting '{odd}'.", where=where, remedy=nearest(odd, chain(*known)))
    rest, own = ({k: v for k, v in values.items() if k in some} for some in known)
    return build(Training, rest, where), methods.method(method, where, **own)
