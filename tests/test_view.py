"""The terminal's view: it fits, survives what is not a number, obeys no text, and stays plain where it must."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_record import planned, started, stepped

from deltaw import words
from deltaw.train.events import Evaluated, Event, Finished, Sampled, Saved, Warned
from deltaw.train.view import LiveView, PlainView, _facts, plan_line, view

QUESTION = "Who are you?"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=50, _environ={"TERM": "xterm-256color"})


def pipe(encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80)


def output(console: Console) -> str:
    file: Any = console.file
    file.flush()
    return str(file.getvalue() if isinstance(file, io.StringIO) else file.buffer.getvalue().decode(file.encoding))


def shown(console: Console) -> str:
    return CONTROL.sub("", output(console))


def finished(**changes: object) -> Finished:
    values = {"reason": "done", "step": 20, "loss": 1.0, "best_step": 10, "best_loss": 1.4, "train_seconds": 168.0,
              "peak_bytes": 1_862_000_000, "predicted_seconds": 160.0, "predicted_bytes": 1_900_000_000}  # fmt: skip
    return Finished(**{**values, **changes})  # type: ignore[arg-type]


def whole_run() -> list[Event]:
    steps = [stepped(i) for i in range(1, 21)]
    return [
        started(notices=("3 rows were cut.",)), Sampled(step=0, question=QUESTION, answer="I am a " * 60), planned(),
        *steps[:10], Evaluated(step=10, loss=1.4, best=True), Saved(step=10, path="runs/toy/checkpoints/10"),
        Warned(text="The gradient was clipped at 31 of the last 50 steps, so that a lower rate may learn more evenly."),
        *steps[10:], Evaluated(step=20, loss=1.5, best=False), Sampled(step=20, question=QUESTION, answer="A pump."),
        finished(),
    ]  # fmt: skip


def play(console: Console, events: list[Event]) -> str:
    listener = view(console)
    for event in events:
        listener(event)
    listener.close()
    return output(console)


def test_the_view_suits_the_console() -> None:
    assert isinstance(view(terminal()), LiveView)
    assert isinstance(view(pipe()), PlainView)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(view(dumb), PlainView)


def test_live_tells_the_run_from_header_to_summary() -> None:
    console = terminal()
    play(console, whole_run())
    text = shown(console)
    for said in ("toy", "tiny", "lora, 4.9 M trained (3.6%)", "950 rows, 183 k tokens (92.1 k trained)", "50 rows",
                 "bfloat16 on cpu, 2 threads", "2.0e-04", "• 3 rows were cut.",
                 "Plan: 180 steps, about 2 min 40 s (-12% to +16%), peak memory 1.9 of 23.4 GB",
                 "! The gradient was clipped", "Done", "1.400 at step 10", "2 min 48 s (+5% against the plan)",
                 "1.9 GB (-2% against the plan)", "before", "after", "A pump."):  # fmt: skip
        assert said in text, said


def test_the_base_and_the_kernels_are_as_they_were_used() -> None:
    console = pipe()
    play(console, [started(base_form="nf4-dq", kernels="avx2"), started(kernels="reference")])
    assert "base tiny, packed as nf4-dq;" in shown(console)
    assert "2 threads, kernels for avx2;" in shown(console)
    assert "2 threads, no native kernels;" in shown(console)


def drawn(listener: LiveView, width: int) -> str:
    """The live area as it stands."""
    console = Console(file=io.StringIO(), width=width)
    listener.console = console
    console.print(listener._render())
    return output(console)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_live_area_shows_where_the_run_stands_and_fits(width: int) -> None:
    listener = LiveView(terminal(width))
    for event in whole_run()[:-2]:
        listener(event)
    listener.close()
    area = drawn(listener, width)
    for said in ("20/20", "0 s left", "train 1.", "val 1.500", "best 1.400 at 10", "1,750 tok/s", "1.8 GB",
                 "saved at 10", "epoch 2.00", "lr 1.0e-04", "Who are you?", "before", "█", "▁"):  # fmt: skip
        assert said in area, said
    assert all(cell_len(line) <= width for line in area.splitlines())
    assert len(area.splitlines()) <= 11, "a long answer does not push the bar off the screen"


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    console = terminal(width)
    play(console, whole_run())
    too_wide = [line for line in re.split(r"[\r\n]+", shown(console)) if cell_len(line) > width]
    assert too_wide == []


def test_the_cursor_comes_back_when_a_run_breaks_off() -> None:
    console = terminal()
    listener = view(console)
    for event in whole_run()[:6]:
        listener(event)
    assert output(console).count("\x1b[?25l") == 1
    listener.close()
    listener.close()  # twice is as good as once
    assert output(console).rindex("\x1b[?25h") > output(console).rindex("\x1b[?25l")


def test_time_left_follows_the_plan_then_the_pace() -> None:
    listener = LiveView(terminal())
    listener(started())
    listener(planned(steps=20, train_seconds=200.0))
    listener(stepped(1, seconds=50.0))
    assert "3 min 10 s left" in drawn(listener, 80)
    listener(stepped(11, seconds=70.0))
    assert "18 s left" in drawn(listener, 80)
    listener.close()


@pytest.mark.parametrize("console", [terminal(), terminal(40), pipe()], ids=["live", "narrow", "plain"])
def test_what_is_not_a_number_is_shown_as_such(console: Console) -> None:
    nan = math.nan
    events = [started(learning_rate=nan), planned(train_seconds=nan, low_seconds=nan, high_seconds=math.inf),
              stepped(1, loss=nan, tokens_per_second=nan, gradient_norm=nan, learning_rate=nan, epoch=nan, seconds=nan),
              stepped(2, loss=math.inf), Evaluated(step=2, loss=nan, best=False),
              finished(reason="diverged", loss=nan, best_loss=None, best_step=None, train_seconds=nan,
                       predicted_seconds=0.0)]  # fmt: skip
    play(console, events)
    text = shown(console)
    assert "Diverged" in text
    assert re.search(r"train loss\s+nan", text)


@pytest.mark.parametrize("make", [terminal, pipe], ids=["live", "plain"])
def test_text_is_neither_markup_nor_a_command_to_the_terminal(make: type[Console]) -> None:
    console = make()
    evil = "[red]x[/nothing] \x1b[2J\x9b2J\x07\r\nend"
    sample = Sampled(step=0, question=evil, answer=evil)
    play(console, [started(run=evil, notices=(evil,)), sample, Warned(text=evil), stepped(1), sample,
                   finished(reason=evil)])  # fmt: skip
    text = output(console)
    assert "[red]x[/nothing] [2J 2J end" in shown(console)
    assert [code for code in ("\x1b[2J", "\x9b", "\x07") if code in text] == []


def test_plain_has_no_control_codes_and_one_line_for_each_event() -> None:
    console = pipe()
    text = play(console, whole_run())
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = text.splitlines()
    assert lines[0].startswith("toy: base tiny; method lora, 4.9 M trained (3.6%); data 950 rows")
    assert lines[1] == "- 3 rows were cut."
    assert "step 10  validation loss 1.400 (best so far)" in lines
    assert "step 20  validation loss 1.500" in lines
    assert "step 10  saved runs/toy/checkpoints/10" in lines
    assert "step 20  Who are you? -> A pump." in lines
    assert sum(line.startswith("warning: ") for line in lines) == 1
    assert lines[-1].startswith("Done: steps 20, train loss 1.000, best val loss 1.400 at step 10, training 2 min 48 s")


def steps_of(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^step (\d+)/", text, re.M)]


def test_plain_shows_the_first_the_last_and_a_step_every_five_seconds() -> None:
    # A step takes a second: 1, then 6, 11, 16, and 20 because it is the last.
    assert steps_of(play(pipe(), [stepped(i) for i in range(1, 21)])) == [1, 6, 11, 16, 20]


def test_plain_shows_the_last_step_of_a_run_that_ended_early() -> None:
    steps = [stepped(i) for i in range(1, 10)]
    assert steps_of(play(pipe(), [*steps, finished(reason="interrupted", step=9)])) == [1, 6, 9]
    assert steps_of(play(pipe(), [*steps])) == [1, 6, 9], "close() shows it where no Finished came"


def test_plain_writes_what_the_encoding_has() -> None:
    text = play(pipe("ascii"), [Sampled(step=0, question="Größe?", answer="naïve → 大"), finished()])
    assert "Gr??e? -> na?ve ? ?" in text
    assert "Done" in text


def test_a_step_line_fits_eighty_columns() -> None:
    big = stepped(100_000, steps=100_000, loss=123.456, tokens_per_second=1e6, memory_bytes=10**12, seconds=1e6)
    (line,) = play(pipe(), [big]).splitlines()
    assert len(line) <= 80


def test_the_plan_says_when_layers_are_computed_again() -> None:
    assert "computed twice" in plan_line(planned(recompute=True))
    assert "computed twice" not in plan_line(planned())


NAN = math.nan
SAID = {
    words.duration: [(0, "0 s"), (0.4, "0.4 s"), (9.94, "9.9 s"), (9.97, "10 s"), (25.4, "25 s"), (59.4, "59 s"),
                     (59.6, "1 min 0 s"), (160, "2 min 40 s"), (3599.4, "59 min 59 s"), (3599.7, "1 h 0 min"),
                     (7199, "2 h 0 min"), (11_100, "3 h 5 min"), (86_399, "1 d 0 h"), (187_200, "2 d 4 h"), (-3, "0 s"),
                     (NAN, "–"), (math.inf, "–"), (None, "–")],
    words.size: [(0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "1.0 KB"), (99_940, "99.9 KB"), (99_960, "100 KB"),
                 (999_600, "1.0 MB"), (1.9e9, "1.9 GB"), (23.4e9, "23.4 GB"), (5e15, "5000 TB"), (NAN, "–")],
    words.count: [(0, "0"), (950, "950"), (999, "999"), (1000, "1.0 k"), (12_345, "12.3 k"), (999_950, "1.0 M"),
                  (4_884_480, "4.9 M"), (134_515_008, "135 M"), (1_500_000_000, "1.5 B"), (math.inf, "–")],
    words.loss: [(1.2344, "1.234"), (None, "–"), (NAN, "nan"), (math.inf, "inf"), (123_456.0, "1.2e+05")],
}  # fmt: skip
SAID_OF_TWO = {
    words.share: [(0, 5, "0%"), (4_884_480, 134_515_008, "3.6%"), (47, 100_000, "0.047%"), (25, 100, "25%"),
                  (5, 5, "100%"), (5, 0, "100%"), (0, 0, "0%")],
    words.off: [(104, 100, "+4%"), (98, 100, "-2%"), (100, 100, "+0%"), (5, 0, "–"), (5, None, "–"), (NAN, 5, "–")],
    words.size_of: [(1.9e9, 23.4e9, "1.9 of 23.4 GB"), (512e6, 23.4e9, "512 MB of 23.4 GB")],
}  # fmt: skip
CASES = [(say, args, said) for table in (SAID, SAID_OF_TWO) for say, rows in table.items() for *args, said in rows]


@pytest.mark.parametrize(("say", "args", "said"), CASES)
def test_numbers_read_as_a_person_says_them(say: Callable[..., str], args: list[float], said: str) -> None:
    assert say(*args) == said


def test_sparklines() -> None:
    assert words.sparkline([], 40) == ""
    assert words.sparkline([3.0, 2.0, 1.0], 40) == "█▅▁"
    assert words.sparkline([2.0, 2.0], 40) == "▁▁"
    assert words.sparkline([1.0, math.nan, 2.0, math.inf], 40) == "▁×█×"
    assert words.sparkline([math.nan] * 3, 40) == "×××"
    assert len(words.sparkline([float(i) for i in range(100)], 40)) == 40


def test_one_line_cuts_and_cleans() -> None:
    assert words.one_line("  a\n\tb\x1b[31m c\u2028d ") == "a b [31m c d"
    assert words.one_line("abcdef", 4) == "abc…"
    assert words.one_line("abcd", 4) == "abcd"


def test_formats_that_differ_are_told_by_kind_of_layer():
    packed = ("layers.0.mlp.up_proj nf2 2.500", "layers.3.mlp.up_proj nf4 4.500", "layers.3.self_attn.q_proj nf3 3.500")
    assert ("packed", "bits a number: up_proj 3.50, q_proj 3.50") in _facts(started(packed=packed))
    assert "packed" not in dict(_facts(started()))
