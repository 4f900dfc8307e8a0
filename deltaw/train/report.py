"""The report: `events.jsonl` told as one self-contained page of HTML, with its plots drawn into it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import timedelta
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from deltaw.errors import UserError
from deltaw.files.atomic import write_text
from deltaw.train import svg
from deltaw.train.record import Run, fold, read

NONE = "–"
REASONS = {
    "done": ("Done", "good"),
    "no better": ("Stopped early: no better", "good"),
    "interrupted": ("Interrupted", "warn"),
    "diverged": ("Diverged", "bad"),
}
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #161a22; --muted: #5b6474; --grid: #e3e6eb;
  --series-1: #2f6fde; --series-2: #c8590a; --good: #18794e; --warn: #8a5a00; --bad: #c4292f }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171c24; --ink: #e7eaf0; --muted: #9ba5b4;
  --grid: #2b323d; --series-1: #74aaff; --series-2: #f5a15a; --good: #5fcf9a; --warn: #e9bd5b; --bad: #ff8085 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { font-size: 16px; margin: 0 0 14px }
header p { color: var(--muted); margin: 6px 0 24px }
.badge { font-size: 13px; font-weight: 600; padding: 3px 11px; border: 1px solid; border-radius: 99px;
  vertical-align: 4px; margin-left: 12px; letter-spacing: 0; white-space: nowrap }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
.card, .tiles > div { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 18px 20px }
.card { margin-top: 16px; overflow-x: auto }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 } .tiles > div { flex: 1 1 215px }
.tiles dt, .tiles .note, th, caption, .empty { color: var(--muted); font-size: 13px }
.tiles dd { margin: 0 } .tiles .value { font-size: 25px; font-weight: 650; letter-spacing: -.02em }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 16px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: 8px }
th, td { text-align: left; padding: 7px 16px 7px 0; border-top: 1px solid var(--grid); vertical-align: top;
  font-weight: 400; overflow-wrap: anywhere }
thead th { border-top: 0 }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 10px 0 0 }
.answers div { border: 1px solid var(--grid); border-radius: 8px; padding: 10px 14px }
.answers .after { border-color: var(--series-1) } .answers dt { color: var(--muted); font-size: 13px }
.answers dd, .question { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
.question { font-weight: 600 } .answers + .question { margin-top: 22px }
ul { margin: 0; padding-left: 20px } summary { cursor: pointer; font-weight: 600 } details table { margin-top: 12px }
"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder.

    Raises:
        UserError: there is no `events.jsonl`, or `config.yaml` or `plan.json` cannot be understood.
    """
    try:
        records = read(run_folder / "events.jsonl")
    except FileNotFoundError:
        raise UserError("This is no run's folder: it has no events.jsonl.", where=str(run_folder)) from None
    page = "".join(_page(run_folder, fold(records)))
    write_text(run_folder / "report.html", page.encode(errors="replace").decode())
    return run_folder / "report.html"


def _page(folder: Path, run: Run) -> Iterator[str]:
    name = escape(str(run.started.get("run", folder.name)))
    yield f"{HEAD}<title>{name} – deltaw</title><style>{STYLE}{svg.STYLE}</style></head><body><main>"
    yield from _head(run, name)
    yield f'<dl class="tiles">{"".join(_tiles(run))}</dl>'
    yield from _plots(run)
    yield from _plan(run)
    yield from _samples(run)
    if run.warnings or run.notices:
        items = "".join(f'<li class="warn">{escape(text)}</li>' for text in run.warnings)
        items += "".join(f"<li>{escape(text)}</li>" for text in run.notices)
        yield f'<section class="card"><h2>Notices and warnings</h2><ul>{items}</ul></section>'
    for file, title, shown in (("config.yaml", "Configuration", " open"), ("plan.json", "Plan in full", "")):
        if values := _values(folder / file):
            rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in values)
            yield (f'<section class="card"><details{shown}><summary>{title}</summary><table><caption>{file}</caption>'
                   f"<tbody>{rows}</tbody></table></details></section>")  # fmt: skip
    yield "</main></body></html>\n"


def _head(run: Run, name: str) -> Iterator[str]:
    reason = str(run.finished.get("reason", "Not finished"))
    words, color = REASONS.get(reason, (reason, "warn"))
    yield f'<header><h1>{name} <span class="badge {color}">{escape(words)}</span></h1><p>'
    if s := run.started:
        yield escape(f"{s['method']} on {s['base']} · {s['rows']:,} rows, {s['val_rows']:,} for validation · "
                     f"{s['trained_tokens']:,} of {s['tokens']:,} tokens trained · {s['dtype']} on {s['device']}, "
                     f"{s['threads']} thread{'s' * (s['threads'] != 1)}")  # fmt: skip
    yield "</p></header>"


def _tiles(run: Run) -> Iterator[str]:
    curve, best = run.curve("loss"), run.best()
    if best:
        latest = run.evaluations[max(run.evaluations)]
        for label, e in (("Best validation loss", best), ("Last validation loss", latest)):
            yield _tile(label, _text(e["loss"]), f"perplexity {_perplexity(e['loss'])}, step {e['step']:,}")
    elif curve:
        note = "smoothed" if run.evaluations else "smoothed; no validation"
        yield _tile("Last train loss", _text(svg.smooth([y for _, y in curve])[-1]), note)
    if curve:
        last = run.steps[max(run.steps)]
        yield _tile("Steps", f"{last['step']:,} of {last['steps']:,}", f"{last['epoch']:.2f} epochs")
    training = run.finished.get("train_seconds")
    yield _tile("Time", _clock(run.seconds), f"training {_clock(training)}" if training else "h:mm:ss")
    speeds = [y for _, y in run.curve("tokens_per_second") if y is not None]
    if speeds:
        yield _tile("Speed", f"{median(speeds):,.0f} tokens/s", "median over steps")
    if peak := _peak_bytes(run):
        available = run.planned.get("available_bytes")
        yield _tile("Peak memory", _gigabytes(peak), f"of {_gigabytes(available)} available" if available else "")
    if s := run.started:
        share = s["trained_parameters"] / max(1, s["base_parameters"])
        yield _tile("Trained parameters", f"{s['trained_parameters']:,}", f"{share:.2%} of {s['base_parameters']:,}")
        yield _tile("Learning rate", _rate(s["learning_rate"]), "at its peak")


def _tile(label: str, value: str, note: str) -> str:
    return (f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
            f'<dd class="note">{escape(note)}</dd></div>')  # fmt: skip


def _plots(run: Run) -> Iterator[str]:
    raw, best = run.curve("loss"), run.best()
    smoothed = list(zip([x for x, _ in raw], svg.smooth([y for _, y in raw]), strict=True))
    validated = [(step, run.evaluations[step]["loss"]) for step in sorted(run.evaluations)]
    series = [svg.Series(name="this step", points=raw, kind="faint"), svg.Series(name="train loss", points=smoothed)]
    series += [svg.Series(name="validation loss", points=validated, color=2, kind="points")] if validated else []
    mark = svg.Mark(x=best["step"], y=best["loss"], text=f"best {best['loss']:.3f}") if best else None
    chart = svg.line_chart(_aloud("Loss by step", smoothed), series, words="{:.4g}".format, mark=mark, width=1000)
    yield f'<section class="card"><h2>Loss</h2>{chart}</section><div class="plots">'
    for title, name, words in (("Learning rate", "learning_rate", _rate),
                               ("Tokens per second", "tokens_per_second", "{:,.0f}".format),
                               ("Memory", "memory_bytes", _gigabytes)):  # fmt: skip
        points = run.curve(name)
        curve = svg.Series(name=title.lower(), points=points)
        chart = svg.line_chart(_aloud(f"{title} by step", points), [curve], words=words, width=360, from_zero=True)
        yield f'<section class="card"><h2>{title}</h2>{chart}</section>'
    yield "</div>"


def _plan(run: Run) -> Iterator[str]:
    plan, end = run.planned, run.finished
    seconds, n_bytes = end.get("predicted_seconds"), end.get("predicted_bytes")
    if not plan and seconds is None and n_bytes is None:
        return
    whole = plan and seconds in (None, plan["train_seconds"])  # not when the plan was cut to the steps done
    spread = f" ({_clock(plan['low_seconds'])} to {_clock(plan['high_seconds'])})" if whole else ""
    # Off only by the run's own account: an unfinished run took less than planned, and that says nothing of the plan.
    rows = (("Training time, h:mm:ss", _clock(seconds or plan.get("train_seconds")) + spread,
             _clock(end.get("train_seconds")), _off(end.get("train_seconds"), seconds)),
            ("Peak memory", _gigabytes(n_bytes or plan.get("peak_bytes")), _gigabytes(_peak_bytes(run)),
             _off(end.get("peak_bytes"), n_bytes)))  # fmt: skip
    cells = [(name, "".join(f"<td>{escape(value)}</td>" for value in row)) for name, *row in rows]
    body = "".join(f'<tr><th scope="row">{name}</th>{values}</tr>' for name, values in cells)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("What", "Planned", "Actual", "Off by"))
    yield (f'<section class="card"><h2>Planned and actual</h2><table><thead><tr>{head}</tr></thead>'
           f"<tbody>{body}</tbody></table></section>")  # fmt: skip


def _samples(run: Run) -> Iterator[str]:
    if not run.samples:
        return
    yield '<section class="card"><h2>Sample answers</h2>'
    for question, answers in run.questions().items():
        first, last = answers[0], answers[-1]
        shown = [("Before training" if first["step"] == 0 else f"At step {first['step']:,}", "", first["answer"])]
        if last is not first:
            shown.append((f"After step {last['step']:,}", "after", last["answer"]))
        if last["expected"]:
            shown.append(("Expected", "", last["expected"]))
        cells = "".join(f'<div class="{kind}"><dt>{name}</dt><dd dir="auto">{escape(text) or NONE}</dd></div>'
                        for name, kind, text in shown)  # fmt: skip
        yield f'<p class="question" dir="auto">{escape(question)}</p><dl class="answers">{cells}</dl>'
    yield "</section>"


def _values(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        return list(_flat(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)))
    except (ValueError, yaml.YAMLError) as e:
        raise UserError("The file cannot be understood.", where=str(path), why=str(getattr(e, "problem", e))) from None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value) or NONE
    else:
        yield name, NONE if value is None else str(value)


def _peak_bytes(run: Run) -> float | None:
    measured = [y for _, y in run.curve("memory_bytes") if y is not None]
    return run.finished.get("peak_bytes") or max(measured, default=None)


def _aloud(title: str, points: list[svg.Point]) -> str:
    values = [y for _, y in points if y is not None]
    return f"{title}, from {values[0]:.4g} to {values[-1]:.4g}" if values else title


def _text(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.3f}"


def _perplexity(loss: float | None) -> str:
    return NONE if loss is None else f"{math.exp(loss):,.2f}" if loss < 20 else "over 10⁸"


def _clock(seconds: float | None) -> str:
    return NONE if seconds is None else str(timedelta(seconds=round(seconds)))


def _gigabytes(n_bytes: float | None) -> str:
    return NONE if n_bytes is None else f"{n_bytes / 1e9:.2f} GB"


def _rate(value: float | None) -> str:
    if not value:
        return NONE if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _off(actual: float | None, predicted: float | None) -> str:
    return NONE if not actual or not predicted else f"{actual / predicted - 1:+.1%}"
