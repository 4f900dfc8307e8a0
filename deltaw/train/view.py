"""A run on the terminal: a live area where there is a terminal, and one line for each event where there is none."""

import math
from typing import Any

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltaw import words
from deltaw.kernels.library import REFERENCE
from deltaw.train.events import Evaluated, Event, Finished, Planned, Sampled, Saved, Started, Stepped, Warned, told
from deltaw.train.svg import placed, smooth

SPARKS = 40
BETWEEN_SECONDS = 5.0
COLORS = {"good": "green", "warn": "yellow", "bad": "red"}


def view(console: Console) -> "LiveView | PlainView":
    """The view that suits the console: live on a capable terminal, plain lines in a file or a pipe."""
    capable = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
    return LiveView(console) if capable else PlainView(console)


class LiveView:
    """Shows a run in place: a bar, the course of the loss, and answers before and after."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = dict[type[Event], Any]()
        """Of each kind of event."""
        self._first: Stepped | None = None
        self._losses: list[float | None] = []
        self._best: Evaluated | None = None
        self._samples: list[Sampled] = []
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __call__(self, event: Event) -> None:
        self._last[type(event)] = event
        match event:
            case Started():
                self.console.print(_panel(event.run, _facts(event), "cyan"))
                self._notices(event.notices)
                self._live.start()
            case Planned():
                self.console.print(Text(plan_line(event)))
                self._notices(event.notices)
            case Stepped():
                self._first = self._first or event
                self._losses = [*self._losses, event.loss][-10 * SPARKS :]
            case Evaluated(best=True):
                self._best = event
            case Sampled():
                self._samples.append(event)
            case Warned():
                self.console.print(Text(f"! {words.one_line(event.text)}", style="yellow"))
            case Finished():
                self.close()
                reason, kind = told(event.reason)
                for text in (*_answers(self._samples, limit=600), _panel(reason, _outcome(event), COLORS[kind])):
                    self.console.print(text)

    def close(self) -> None:
        """Stop the live area, and give the cursor back."""
        self._live.stop()

    def _notices(self, notices: tuple[str, ...]) -> None:
        for notice in notices:
            self.console.print(Text(f"• {words.one_line(notice)}", style="dim"))

    def _render(self) -> RenderableType:
        if (step := self._last.get(Stepped)) is None:
            return Text("Starting …" if Planned in self._last else "Measuring this machine …", style="dim")
        width = self.console.width
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(max(1, step.steps), step.step), f"{step.step}/{step.steps}  {self._eta(step)}")
        saved = f"saved at {self._last[Saved].step}" if Saved in self._last else ""
        pace = [(f"{step.tokens_per_second:,.0f} tok/s", ""), (words.size(step.memory_bytes), ""), (saved, "dim"),
                (f"epoch {step.epoch:.2f}", "dim"), (f"lr {step.learning_rate:.1e}", "dim")]  # fmt: skip
        answers = _answers(self._samples, limit=max(40, 2 * width))
        return Group(bar, _flow(self._course(step, width), width), _flow(pace, width), *answers)

    def _course(self, step: Stepped, width: int) -> list[tuple[str, str]]:
        means = smooth(self._losses)
        sparks = words.sparkline([math.nan if mean is None else mean for mean in means], min(SPARKS, 2 * width // 5))
        now = step.loss if means[-1] is None else means[-1]
        val = f"val {words.loss(self._last[Evaluated].loss)}" if Evaluated in self._last else ""
        best = f"best {words.loss(self._best.loss)} at {self._best.step}" if self._best else ""
        return [(sparks, "cyan"), (f"train {words.loss(now)}", "bold"), (val, "bold"), (best, "green")]

    def _eta(self, step: Stepped) -> str:
        assert self._first is not None
        left, done = max(0, step.steps - step.step), step.step - self._first.step
        if done:
            return f"{words.duration(left * (step.seconds - self._first.seconds) / done)} left"
        if (plan := self._last.get(Planned)) and plan.steps:
            return f"{words.duration(left * plan.train_seconds / plan.steps)} left"
        return ""


class PlainView:
    """Writes a line for each event; for steps at most one every five seconds of the run, and the first and the last."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown_seconds: float | None = None
        self._waiting: Stepped | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            shown, self._waiting = self._shown_seconds, event
            if shown is None or event.seconds - shown >= BETWEEN_SECONDS or event.step >= event.steps:
                self._show_step()
            return
        if isinstance(event, Finished):
            self._show_step()  # the last one, wherever the run ended
        for line in _lines(event):
            self._say(line)

    def close(self) -> None:
        """Show the last step, if it was not."""
        self._show_step()

    def _show_step(self) -> None:
        if event := self._waiting:
            self._waiting, self._shown_seconds = None, event.seconds
            rate, pace = f"lr {event.learning_rate:.1e}", f"{event.tokens_per_second:,.0f} tok/s"
            spent = f"{words.size(event.memory_bytes)}  {words.duration(event.seconds)}"
            self._say(f"step {event.step}/{event.steps}  loss {words.loss(event.loss)}  {rate}  {pace}  {spent}")

    def _say(self, line: str) -> None:
        # A model may answer in letters that the console's encoding does not have.
        line = words.one_line(line).encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(Text(line), soft_wrap=True)


def plan_line(plan: Planned) -> str:
    """What a run will take, in one line."""
    how = ", layers computed twice to save memory" if plan.recompute else ""
    low, high = (words.off(seconds, plan.train_seconds) for seconds in (plan.low_seconds, plan.high_seconds))
    return (f"Plan: {plan.steps} steps, about {words.duration(plan.train_seconds)} ({low} to {high}), "
            f"peak memory {words.size_of(plan.peak_bytes, plan.available_bytes)}{how}")  # fmt: skip


def _lines(event: Event) -> list[str]:
    match event:
        case Started():
            lines = [f"{event.run}: " + "; ".join(f"{name} {value}" for name, value in _facts(event))]
            return lines + [f"- {notice}" for notice in event.notices]
        case Planned():
            return [plan_line(event), *(f"- {notice}" for notice in event.notices)]
        case Evaluated():
            return [f"step {event.step}  validation loss {words.loss(event.loss)}{' (best so far)' * event.best}"]
        case Sampled():
            return [f"step {event.step}  {words.one_line(event.question, 60)} -> {words.one_line(event.answer, 200)}"]
        case Saved():
            return [f"step {event.step}  saved {event.path}"]
        case Warned():
            return [f"warning: {event.text}"]
        case Finished():
            return [f"{told(event.reason)[0]}: " + ", ".join(f"{name} {value}" for name, value in _outcome(event))]
    return []


def _facts(event: Started) -> list[tuple[str, str]]:
    share = words.share(event.trained_parameters, event.base_parameters)
    tokens, trained_tokens = words.count(event.tokens), words.count(event.trained_tokens)
    batch = words.some(event.batch_rows, "row")
    native = f", kernels for {event.kernels}" if event.kernels != REFERENCE else ", no native kernels"
    kernels = native if event.kernels and event.device == "cpu" else ""
    return [
        ("base", event.base + (f", packed as {event.base_form}" if event.base_form else "")),
        ("method", f"{event.method}, {words.count(event.trained_parameters)} trained ({share})"),
        ("data", f"{event.rows:,} rows, {tokens} tokens ({trained_tokens} trained), {batch} a step"),
        ("validation", f"{event.val_rows:,} rows"),
        ("compute", f"{event.dtype} on {event.device}, {words.some(event.threads, 'thread')}" + kernels),
        *([("packed", _packed(event))] if event.packed else []),
        ("rate", f"{event.learning_rate:.1e}"),
        *([("resumed", f"at step {event.resumed_at}")] if event.resumed_at else []),
    ]


def _packed(event: Started) -> str:
    """The mean bits of each kind of layer."""
    kinds = {kind: [bits for _, bits in row.values()] for kind, row in placed(event.packed).items()}
    return "bits a number: " + ", ".join(f"{kind} {sum(b) / len(b):.2f}" for kind, b in kinds.items())


def _outcome(event: Finished) -> list[tuple[str, str]]:
    best = f"{words.loss(event.best_loss)} at step {event.best_step}" if event.best_loss is not None else ""
    ended = event.reason == "done"  # of a part of a run, its beginning takes more than its share
    seconds, size = (event.predicted_seconds, event.predicted_bytes) if ended else (None, None)
    training = words.duration(event.train_seconds) + _against(event.train_seconds, seconds)
    memory = words.size(event.peak_bytes) + _against(event.peak_bytes, size)
    rows = [("steps", str(event.step)), ("train loss", words.loss(event.loss)), ("best val loss", best)]
    return [(name, value) for name, value in [*rows, ("training", training), ("memory", memory)] if value]


def _against(actual: float, predicted: float | None) -> str:
    return f" ({words.off(actual, predicted)} against the plan)" if predicted else ""


def _panel(title: str, rows: list[tuple[str, str]], color: str) -> Panel:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(words.one_line(value)))
    heading = Text(words.one_line(title), style=f"bold {color}")
    return Panel(grid, box=ROUNDED, title=heading, title_align="left", border_style=color)


def _flow(parts: list[tuple[str, str]], width: int) -> Text:
    """Styled words side by side, on a new line where the next would not fit: none is broken at its own spaces."""
    text, room = Text(), width
    for phrase, style in (part for part in parts if part[0]):
        if text and room < len(phrase) + 2:
            text, room = text.append("\n"), width
        elif text:
            text, room = text.append("  "), room - 2
        text, room = text.append(phrase, style), room - len(phrase)
    return text


def _answers(samples: list[Sampled], limit: int) -> list[RenderableType]:
    if not samples:
        return []
    first, last = samples[0], samples[-1]
    label = f"at step {first.step}" if first.step else "before"  # a run that goes on was asked before it stopped
    grid = Table.grid(padding=(0, 2, 0, 0))
    shown = [(first, label, "dim"), *([(last, "after", "green")] if last is not first else [])]
    for sample, said, style in shown:
        grid.add_row(Text(said, style=style), Text(words.one_line(sample.answer, limit)))
    return [Text(words.one_line(first.question, limit), style="bold"), grid]
