"""A run's lasting record: `events.jsonl`, one JSON object a line, and TensorBoard's files. A full disk stops no run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.files.atomic import disk_is_full
from deltaw.train.events import Evaluated, Event, Sampled, Started, Stepped, is_event

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


Record = dict[str, Any]


class EventFile:
    """Appends events to a file; `lost` counts the lines for which the disk had no room."""

    def __init__(self, path: Path) -> None:
        self.lost = 0
        # Unbuffered: a line is on its way to the disk when the call returns, and none waits to fail in close().
        self._file = path.open("ab", buffering=0)
        self._whole_bytes = self._file.seek(0, 2)
        if self._whole_bytes and not path.read_bytes().endswith(b"\n"):
            self._write(b"\n")  # The last process died in the middle of a line: begin a new one.

    def __call__(self, event: Event) -> None:
        # A lone surrogate becomes \udXXX, which is how JSON writes it anyway.
        if not self._write(json_text(event.record()).encode(errors="backslashreplace") + b"\n"):
            self.lost += 1

    def _write(self, line: bytes) -> bool:
        rest = line
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            if not disk_is_full(e):
                raise
            if len(rest) < len(line):
                self._file.truncate(self._whole_bytes)  # Half a line would spoil the next one.
            return False
        self._whole_bytes += len(line)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes the curves and sample answers for TensorBoard; `lost` counts the events for which the disk had no room."""

    def __init__(self, folder: Path) -> None:
        self.lost = 0
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started(resumed_at=step):
                # What an earlier process wrote after the checkpoint is about to be trained again.
                self._purge_step = step + 1 if step else None
            case Stepped():
                self._scalars(event.step, {
                    "train/loss": event.loss, "train/learning_rate": event.learning_rate,
                    "train/gradient_norm": event.gradient_norm, "train/tokens_per_second": event.tokens_per_second,
                    "memory/bytes": event.memory_bytes})  # fmt: skip
            case Evaluated():
                self._scalars(event.step, {"val/loss": event.loss})
            case Sampled():
                # Indented: Markdown shows it as it is.
                text = "\n".join(f"    {line}" for line in f"{event.question}\n\n{event.answer}".splitlines())
                self._guarded(lambda writer: writer.add_text("sample", text, event.step))

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self._guarded(lambda writer: [writer.add_scalar(tag, value, step) for tag, value in values.items()])

    def _guarded(self, write: Callable[[SummaryWriter], object]) -> None:
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # a second or two, so only when there is a use

                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            write(self._writer)
        except OSError as e:
            if not disk_is_full(e):
                raise
            self.lost += 1

    def close(self) -> None:
        """Write what waits and close the file."""
        if self._writer is not None:
            self._guarded(lambda writer: writer.close())


def read(path: Path) -> list[Record | None]:
    """Read `events.jsonl` back; None stands for a line that is no event: torn by a crash or a full disk."""
    return [_event(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def _event(line: bytes) -> Record | None:
    with suppress(ValueError):  # not JSON, or not even UTF-8
        record: Record = json.loads(line)
        return record if is_event(record) else None
    return None


@dataclass
class Run:
    """What events tell of a run, each step once: what a resumption trained again replaces what was there."""

    started: Record = field(default_factory=dict)
    planned: Record = field(default_factory=dict)
    finished: Record = field(default_factory=dict)
    steps: dict[int, Record] = field(default_factory=dict)
    evaluations: dict[int, Record] = field(default_factory=dict)
    samples: dict[tuple[int, str], Record] = field(default_factory=dict)
    notices: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    seconds: float = 0.0
    """How long all its processes worked on it."""

    def best(self) -> Record | None:
        """The evaluation with the lowest loss."""
        measured = [e for e in self.evaluations.values() if e["loss"] is not None]
        return min(measured, key=lambda e: float(e["loss"]), default=None)

    def measured(self, name: str) -> list[float]:
        """The values of all steps that were numbers."""
        return [y for _, y in self.curve(name) if y is not None]

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """One value of every step; None where it was not a number."""
        return [(step, self.steps[step][name]) for step in sorted(self.steps)]

    def questions(self) -> dict[str, list[Record]]:
        """The sample answers by question, in the order of steps."""
        asked: dict[str, list[Record]] = {}
        for _, sample in sorted(self.samples.items()):
            asked.setdefault(sample["question"], []).append(sample)
        return asked


def fold(records: Sequence[Record | None]) -> Run:
    """Tell a run from its events."""
    run, latest_seconds = Run(), 0.0
    for record in filter(None, records):
        match record["event"]:
            case "started":
                _rewind(run, record["resumed_at"])
                run.started, latest_seconds = record, 0.0
            case "planned" | "finished" as kind:
                setattr(run, kind, record)
            case "stepped":
                run.steps[record["step"]] = record
            case "evaluated":
                run.evaluations[record["step"]] = record
            case "sampled":
                run.samples[record["step"], record["question"]] = record
            case "warned":
                run.warnings[record["text"]] = None
        run.notices.update(dict.fromkeys(record.get("notices", ())))
        run.seconds += max(0.0, record["seconds"] - latest_seconds)
        latest_seconds = max(latest_seconds, record["seconds"])
    if lost := records.count(None):
        run.warnings[f"Lines of events.jsonl that could not be read and were left out: {lost}."] = None
    return run


def _rewind(run: Run, step: int) -> None:
    run.finished = {}
    run.steps = {at: record for at, record in run.steps.items() if at <= step}
    run.evaluations = {at: record for at, record in run.evaluations.items() if at <= step}
    run.samples = {at: record for at, record in run.samples.items() if at[0] <= step}


def json_text(value: Mapping[str, Any]) -> str:
    """An object as JSON on one line, with null for every float that JSON has no word for."""
    plain = json.loads(json.dumps(dict(value), default=str), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False)
