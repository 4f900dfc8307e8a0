"""What people read of a run: `events.jsonl` told as one self-contained page of HTML, and the model card.

The report has its plots drawn into it. The card says what a persona is, what it was made from, and the figures that
were measured; none that were not.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from deltaw import __version__
from deltaw.errors import explained
from deltaw.files.atomic import write_text
from deltaw.train import events, svg
from deltaw.train.record import Run, fold, read
from deltaw.words import UNKNOWN, off, size

SHOWN_SETTINGS = ("targets", "rank", "alpha", "rslora", "dropout", "modules_to_save", "learning_rate", "schedule",
                  "epochs", "steps", "minutes", "batch_rows", "max_tokens", "train_on", "seed", "dtype")  # fmt: skip


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder.

    Raises:
        UserError: there is no `events.jsonl`, or `config.yaml` or `plan.json` cannot be understood.
    """
    with explained("This is no run's folder: it has no events.jsonl.", FileNotFoundError, where=run_folder, why=""):
        run = fold(read(run_folder / "events.jsonl"))
    words, color = events.told(str(run.finished.get("reason", "Not finished")))
    told = (f"{s['method']} on {s['base']} · {s['rows']:,} rows, {s['val_rows']:,} for validation · "
            f"{s['trained_tokens']:,} of {s['tokens']:,} tokens trained · {s['dtype']} on {s['device']}, "
            f"{s['threads']} thread{'s' * (s['threads'] != 1)}") if (s := run.started) else ""  # fmt: skip
    loss, *charts = _plots(run)
    packed = run.started.get("packed", ())
    layers = svg.placed(packed)
    shown = ("config.yaml", "Configuration", " open"), ("plan.json", "Plan in full", "")
    files = [(file, title, opened, _values(run_folder / file)) for file, title, opened in shown]
    files.append(("name, format, bits a number", "Formats in full", "", [tuple(line.split(" ", 1)) for line in packed]))
    page = svg.rendered(
        "report.html", run=run, name=run.started.get("run", run_folder.name), words=words, color=color, told=told,
        smoothed=svg.smooth([y for _, y in run.curve("loss")] or [None])[-1], median=median,
        peak=run.finished.get("peak_bytes") or max(run.measured("memory_bytes"), default=None),
        speeds=run.measured("tokens_per_second"), figure=_text, perplexity=_perplexity,
        rate=_rate, off=off, loss=loss[1], charts=charts, heat=[svg.heat(layers)] if layers else [], files=files,
        style=(svg.HERE / "report.css").read_text(encoding="utf-8"))  # fmt: skip
    write_text(run_folder / "report.html", page.encode(errors="replace").decode())
    return run_folder / "report.html"


def _plots(run: Run) -> Iterator[tuple[str, str]]:
    raw, best = run.curve("loss"), run.best()
    smoothed = list(zip([x for x, _ in raw], svg.smooth([y for _, y in raw]), strict=True))
    validated = [(step, run.evaluations[step]["loss"]) for step in sorted(run.evaluations)]
    series = [svg.Series(name="this step", points=raw, kind="faint"), svg.Series(name="train loss", points=smoothed)]
    series += [svg.Series(name="validation loss", points=validated, color=2, kind="points")] if validated else []
    mark = (best["step"], best["loss"], f"best {best['loss']:.3f}") if best else None
    yield "Loss", svg.line_chart(_aloud("Loss by step", smoothed), series, words="{:.4g}".format, mark=mark, width=1000)
    for title, name, words in (("Learning rate", "learning_rate", _rate),
                               ("Tokens per second", "tokens_per_second", "{:,.0f}".format),
                               ("Memory", "memory_bytes", size)):  # fmt: skip
        points = run.curve(name)
        curve, spoken = svg.Series(name=title.lower(), points=points), _aloud(f"{title} by step", points)
        yield title, svg.line_chart(spoken, [curve], words=words, width=360, from_zero=True)


def _values(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    with explained("The file cannot be understood.", ValueError, yaml.YAMLError, where=path,
                   why=lambda error: getattr(error, "problem", error)):  # fmt: skip
        text = path.read_text(encoding="utf-8")
        return list(_flat(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value) or UNKNOWN
    else:
        yield name, UNKNOWN if value is None else str(value)


def _aloud(title: str, points: list[svg.Point]) -> str:
    values = [y for _, y in points if y is not None]
    return f"{title}, from {values[0]:.4g} to {values[-1]:.4g}" if values else title


def _known(words: Callable[[float], str], none: str = UNKNOWN) -> Callable[[float | None], str]:
    """The words for a number, and those for none."""
    return lambda value: none if value is None else words(value)


_text = _known("{:.3f}".format, "not a number")
_perplexity = _known(lambda loss: f"{math.exp(loss):,.2f}" if loss < 20 else "over 10⁸")


def _rate(value: float | None) -> str:
    if not value:
        return UNKNOWN if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def write_card(folder: Path) -> Path:
    """Write `MODEL_CARD.md` into a run's folder, in the form that the Hugging Face hub reads."""
    run = fold(read(folder / "events.jsonl"))
    config = yaml.safe_load(_whole(folder / "config.yaml")) or {}
    manifest = json.loads(_whole(folder / "manifest.json") or "{}")
    base, method = Path(run.started["base"]), run.started["method"]
    called = base.name if base.is_absolute() else run.started["base"]
    head = {"base_model": called, "library_name": "deltaw", "pipeline_tag": "text-generation",
            "tags": ["deltaw", method]}  # fmt: skip
    text = svg.rendered(
        "card.md", name=folder.name, version=__version__, head=yaml.safe_dump(head, sort_keys=False).strip(),
        base=called, fingerprint=manifest.get("base", "unknown"), run=run, started=run.started, finished=run.finished,
        best=run.best(), files=[(Path(file).name, sha) for file, sha in manifest.get("data", {}).items()],
        settings={key: config[key] for key in SHOWN_SETTINGS if config.get(key) not in (None, "", False)},
    )  # fmt: skip
    write_text(folder / "MODEL_CARD.md", text.encode(errors="replace").decode())
    return folder / "MODEL_CARD.md"


def _whole(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
