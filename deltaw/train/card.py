"""The model card: what a persona is, what it was made from, and the figures that were measured; none that were not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deltaw import __version__
from deltaw.files.atomic import write_text
from deltaw.train.record import Run, fold, read
from deltaw.words import duration, loss, one_line, size

SHOWN_SETTINGS = ("targets", "rank", "alpha", "rslora", "dropout", "modules_to_save", "learning_rate", "schedule",
                  "epochs", "steps", "minutes", "batch_rows", "max_tokens", "train_on", "seed", "dtype")  # fmt: skip


def write_card(folder: Path) -> Path:
    """Write `MODEL_CARD.md` into a run's folder, in the form that the Hugging Face hub reads."""
    run = fold(read(folder / "events.jsonl"))
    config = yaml.safe_load(_text(folder / "config.yaml")) or {}
    manifest = json.loads(_text(folder / "manifest.json") or "{}")
    text = "\n".join(_lines(folder.name, run, config, manifest)) + "\n"
    write_text(folder / "MODEL_CARD.md", text.encode(errors="replace").decode())
    return folder / "MODEL_CARD.md"


def _lines(name: str, run: Run, config: dict[str, Any], manifest: dict[str, Any]) -> Iterator[str]:
    started, finished = run.started, run.finished
    base = Path(started["base"]).name if Path(started["base"]).is_absolute() else started["base"]
    head = {"base_model": base, "library_name": "deltaw", "pipeline_tag": "text-generation",
            "tags": ["deltaw", started["method"]]}  # fmt: skip
    yield f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---"
    yield f"\n# {name}\n"
    yield (f"{base}, fine-tuned by deltaw {__version__} with {started['method']}: "
           f"{started['trained_parameters']:,} trained numbers beside {started['base_parameters']:,}.")  # fmt: skip
    yield "\n## Made from\n"
    yield f"{started['rows']:,} rows, {started['tokens']:,} tokens, of which {started['trained_tokens']:,} were learnt."
    yield (
        f"{started['val_rows']:,} rows were held out, and measured." if started["val_rows"] else "No row was held out."
    )
    yield "\n| file | SHA-256 |\n|---|---|"
    for file, digest in manifest.get("data", {}).items():
        yield f"| {_cell(Path(file).name)} | `{digest}` |"
    packed = f", packed as {form}" if (form := started.get("base_form")) else ""
    yield f"\nBase: `{base}`, fingerprint `{manifest.get('base', 'unknown')}`{packed}."
    yield from (f"- {_cell(notice)}" for notice in run.notices)
    yield "\n## Settings\n\n| setting | value |\n|---|---|"
    for key in SHOWN_SETTINGS:
        if config.get(key) not in (None, "", False):
            yield f"| {key} | {_cell(config[key])} |"
    yield "\n## Measured\n\n| | |\n|---|---|"
    yield f"| steps | {finished.get('step', len(run.steps)):,} ({finished.get('reason', 'not ended')}) |"
    yield f"| loss of the last step | {loss(finished.get('loss'))} |"
    if best := run.best():
        yield (f"| loss of the held-out rows | {loss(best['loss'])} (perplexity {math.exp(best['loss']):.2f}), "
               f"step {best['step']:,} |")  # fmt: skip
    if finished:
        yield f"| time | {duration(finished['train_seconds'])} on {started['device']}, {started['threads']} threads |"
        yield f"| memory, at most | {size(finished['peak_bytes'])} |"
    for question, answers in run.questions().items():
        yield f"\n> {one_line(question)}\n"
        yield f"- before: {one_line(answers[0]['answer'], 400)}"
        yield f"- after: {one_line(answers[-1]['answer'], 400)}"
    yield "\n## Not measured\n"
    yield ("Anything else: other questions than those of the data, other languages, harm, what the base knew before. "
           "`deltaw eval` measures answers; the base's own limits and licence hold for this model too.")  # fmt: skip
    yield f"\n## Use\n\n```\ndeltaw chat {name}\n```"


def _cell(value: object) -> str:
    return one_line(str(value)).replace("|", "\\|")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
