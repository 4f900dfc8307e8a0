"""The report: one page of well-formed HTML that asks for nothing, trusts no text, and stands up to unlucky runs."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from test_record import planned, started, stepped

from deltaw.errors import UserError
from deltaw.train import svg
from deltaw.train.events import Evaluated, Event, Finished, Sampled, Warned
from deltaw.train.record import EventFile
from deltaw.train.report import write_report
from deltaw.train.svg import FAINT

VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page read in: its tags with attributes, its text by tag, and whether every tag is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


def report(folder: Path, *events: Event) -> Page:
    file = EventFile(folder / "events.jsonl")
    for event in events:
        file(event)
    file.close()
    path = write_report(folder)
    assert path == folder / "report.html"
    assert sorted(p.suffix for p in folder.iterdir() if p.name.startswith("report")) == [".html"], (
        "no half file is left"
    )
    return Page(path.read_text(encoding="utf-8"))


def whole_run() -> list[Event]:
    steps = [stepped(i) for i in range(1, 21)]
    return [
        started(notices=("3 rows were cut.",)), Sampled(step=0, question="Who?", answer="I am"), planned(steps=20),
        *steps[:10], Evaluated(step=10, loss=1.4, best=True), *steps[10:], Evaluated(step=20, loss=1.5, best=False),
        Warned(text="The disk is nearly full."),
        Sampled(step=20, question="Who?", answer="A pump", expected="The pump"),
        Finished(seconds=40.0, reason="done", step=20, loss=1.0, best_step=10, best_loss=1.4, train_seconds=168.0,
                 peak_bytes=1_862_000_000, predicted_seconds=160.0, predicted_bytes=1_900_000_000),
    ]  # fmt: skip


def test_a_whole_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: lora\nlora: {rank: 16, targets: [q, v]}\nname: null\n")
    (tmp_path / "plan.json").write_text('{"predicted": {"micro_steps": 3}}')
    text = report(tmp_path, *whole_run()).text
    for said in ("toy", "Done", "1.400", "perplexity 4.06, step 10", "1.500", "20 of 20", "2.00 epochs", "40 s",
                 "1,750 tokens/s", "4,884,480", "3.63% of 134,515,008", "2 min 40 s (2 min 20 s to 3 min 5 s)",
                 "2 min 48 s", "+5%", "1.9 GB", "-2%", "I am", "A pump", "The pump", "3 rows were cut.",
                 "The disk is nearly full.", "best 1.400", "lora.rank", "16", "q, v",
                 "predicted.micro_steps"):  # fmt: skip
        assert said in text, said


def test_formats_that_differ_are_drawn_and_told_layer_by_layer(tmp_path: Path) -> None:
    packed = ("layers.0.mlp.up_proj nf2 2.500", "layers.3.mlp.up_proj nf4 4.500", "layers.3.self_attn.q_proj nf3 3.500")
    page = report(tmp_path, started(packed=packed), planned(), stepped(1))
    cells = [attributes for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "cell"]
    assert [float(cell["fill-opacity"]) for cell in cells] == [FAINT, 1.0, pytest.approx((1 + FAINT) / 2)]
    assert len({cell["x"] for cell in cells}) == len({cell["y"] for cell in cells}) == 2
    for said in ("Bits a number by layer, from 2.50 to 4.50", "layer 3, q_proj: nf3, 3.500 bits",
                 "layers.0.mlp.up_proj", "nf2 2.500"):  # fmt: skip
        assert said in page.text
    (tmp_path / "alike").mkdir()
    assert "Bits a number by layer" not in report(tmp_path / "alike", started(), planned(), stepped(1)).text


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    page = report(tmp_path, *whole_run())
    html = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:https?:)?//\w", html)
    assert not re.findall(r"url\(|@import|\bon\w+=", html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "base"}
        assert not {"src", "href", "srcset"} & attributes.keys()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</td></dd></title><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & \udc80"
    (tmp_path / "config.yaml").write_text('"<script>key": "<script>value"\n')
    events = [started(run=evil, base=evil, method=evil, notices=(evil,)), Warned(text=evil), stepped(1),
              Sampled(step=0, question=evil, answer=evil, expected=evil), Finished(reason=evil, step=1)]  # fmt: skip
    page = report(tmp_path, *events)
    assert page.count("script") == page.count("img") == 0
    shown = evil.replace("\udc80", "?")
    assert [data for tag, data in page.texts if tag == "dd" and data == shown] == [shown] * 2
    assert page.texts.count(("li", shown)) == 2
    assert ("th", "<script>key") in page.texts
    assert ("td", "<script>value") in page.texts


def test_it_is_read_aloud_and_by_table(tmp_path: Path) -> None:
    page = report(tmp_path, *whole_run())
    labels = [a["aria-label"] for t, a in page.tags if t == "svg" and a["role"] == "img"]
    assert labels[0] == "Loss by step, from 1.95 to 1.312"
    assert len(labels) == page.count("svg") == 4
    assert page.count("th", scope="col") == 4
    assert page.count("th", scope="row") == 2
    assert page.count("html", lang="en") == page.count("main") == page.count("h1") == 1


def test_dark_and_light_are_both_there(tmp_path: Path) -> None:
    report(tmp_path, *whole_run())
    html = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in html
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    light, dark = re.findall(r":root \{([^}]*)\}", html)
    for name in used:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name


def test_a_run_of_one_step_without_validation(tmp_path: Path) -> None:
    page = report(tmp_path, started(), stepped(1, steps=1), Finished(reason="done", step=1, loss=1.95))
    assert "smoothed; no validation" in page.text
    assert "validation loss" not in page.text
    points = {(a["cx"], a["cy"]) for t, a in page.tags if t == "circle"}
    assert len(points) == 4, "one step makes no line, so each plot shows it as a point"


def test_a_run_that_diverged(tmp_path: Path) -> None:
    losses = [2.0, 2.5, 40.0, math.nan, math.nan]
    events = [stepped(i, loss=loss, gradient_norm=math.inf) for i, loss in enumerate(losses, 1)]
    page = report(tmp_path, started(), *events, Evaluated(step=3, loss=math.nan, best=False),
                  Finished(reason="diverged", step=5, loss=math.nan))  # fmt: skip
    assert "Diverged" in page.text
    assert "step 4\nthis step not a number" in page.text
    assert "nan" not in page.text


def test_a_run_that_is_all_nan_or_still_running(tmp_path: Path) -> None:
    page = report(tmp_path, started(learning_rate=math.nan), stepped(1, loss=math.nan))
    assert "Not finished" in page.text
    assert "Loss by step: nothing was measured." in page.text


def test_a_run_that_broke_off_at_once(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert tmp_path.name in page.text
    assert "Not finished" in page.text


def test_an_interrupted_run_is_not_blamed_on_the_plan(tmp_path: Path) -> None:
    end = Finished(reason="interrupted", step=3, train_seconds=9.0, peak_bytes=1_000_000_000)
    page = report(tmp_path, started(), planned(), *map(stepped, (1, 2, 3)), end)
    assert "Interrupted" in page.text
    assert "3 of 20" in page.text
    assert "%" not in page.text.split("Planned and actual")[1]


def test_a_resumed_run_is_told_once(tmp_path: Path) -> None:
    before = [
        started(),
        *(stepped(i, loss=5.0) for i in range(1, 9)),
        Finished(seconds=18.0, reason="interrupted", step=8),
    ]
    after = [started(resumed_at=4), *(stepped(i, loss=1.0, seconds=i - 4.0) for i in range(5, 7))]
    page = report(tmp_path, *before, *after, Finished(seconds=3.0, reason="no better", step=6))
    assert "Stopped early" in page.text
    assert "6 of 20" in page.text
    assert "21 s" in page.text
    assert "step 4\nthis step 5" in page.text
    assert "step 5\nthis step 1" in page.text
    assert "step 7" not in page.text


def test_torn_lines_are_told(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "step')
    assert "could not be read and were left out: 1." in report(tmp_path, started(), stepped(1)).text


def test_what_is_missing_or_spoilt_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no events\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "events.jsonl").touch()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: The file cannot be understood"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: The file cannot be understood"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.31, 1.95), (0, 2e-4), (3, 12_345), (-2, 7), (0, 1.9e9), (5, 5.001)]
)
def test_ticks_are_round_few_and_cover(low: float, high: float) -> None:
    values = svg.ticks(low, high, 5, cover=True)
    assert values[0] <= low
    assert values[-1] >= high
    assert 3 <= len(values) <= 8
    strides = {f"{b - a:.6g}" for a, b in pairwise(values)}
    assert len(strides) == 1
    assert all(low <= v <= high for v in svg.ticks(low, high, 5))


def test_smoothing_starts_at_the_first_value_and_skips_gaps() -> None:
    assert svg.smooth([3.0, 3.0, None, math.nan, 3.0]) == [pytest.approx(3.0)] * 2 + [None, None, pytest.approx(3.0)]
    halves = svg.smooth([0.0, 1.0], weight=0.5)
    assert halves == [0.0, pytest.approx(2 / 3)]


def test_a_long_curve_is_thinned_but_keeps_its_spike() -> None:
    points = [(float(i), 100.0 if i == 7_777 else 1.0) for i in range(20_000)]
    chart = svg.line_chart("x", [svg.Series(name="loss", points=points)])
    path = re.search(r'<path class="s1 line" d="([^"]*)"', chart)
    assert path is not None
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path[1])]
    assert len(heights) <= svg.LINE_POINTS
    assert min(heights) == svg.TOP
    assert len(chart) < 120_000


@pytest.mark.parametrize("value", [0.0, 5.55274592488, -3.0, 1e-9, 1e9])
@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-12, 1e-9, 1e-7, 1e-5])
def test_values_that_hardly_differ_are_drawn_within_the_chart(value: float, apart: float) -> None:
    points = [(1.0, value), (2.0, value * (1 + apart))]
    chart = svg.line_chart("x", [svg.Series(name="loss", points=points)])
    (path,) = re.findall(r'<path class="s1 line" d="([^"]*)"', chart)
    assert all(0 <= float(y) <= svg.HEIGHT for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", path))


def test_a_gap_is_not_bridged() -> None:
    chart = svg.line_chart("x", [svg.Series(name="loss", points=[(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 2.0)])])
    path = re.search(r'<path class="s1 line" d="([^"]*)"', chart)
    assert path is not None
    assert [c for c in path[1] if c.isalpha()] == ["M", "L", "M", "L"]
