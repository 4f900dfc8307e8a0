"""The model card: what a persona is, what it was made from, and the figures that were measured; none that were not."""

import json
from pathlib import Path

import yaml

from deltaw import __version__
from deltaw.files.atomic import write_text
from deltaw.train.record import fold, read
from deltaw.train.templates import rendered

SHOWN_SETTINGS = ("targets", "rank", "alpha", "rslora", "dropout", "modules_to_save", "learning_rate", "schedule",
                  "epochs", "steps", "minutes", "batch_rows", "max_tokens", "train_on", "seed", "dtype")  # fmt: skip


def write_card(folder: Path) -> Path:
    """Write `MODEL_CARD.md` into a run's folder, in the form that the Hugging Face hub reads."""
    run = fold(read(folder / "events.jsonl"))
    config = yaml.safe_load(_text(folder / "config.yaml")) or {}
    manifest = json.loads(_text(folder / "manifest.json") or "{}")
    base, method = Path(run.started["base"]), run.started["method"]
    called = base.name if base.is_absolute() else run.started["base"]
    head = {"base_model": called, "library_name": "deltaw", "pipeline_tag": "text-generation",
            "tags": ["deltaw", method]}  # fmt: skip
    text = rendered(
        "card.md", name=folder.name, version=__version__, head=yaml.safe_dump(head, sort_keys=False).strip(),
        base=called, fingerprint=manifest.get("base", "unknown"), run=run, started=run.started, finished=run.finished,
        best=run.best(), files=[(Path(file).name, sha) for file, sha in manifest.get("data", {}).items()],
        settings={key: config[key] for key in SHOWN_SETTINGS if config.get(key) not in (None, "", False)},
    )  # fmt: skip
    write_text(folder / "MODEL_CARD.md", text.encode(errors="replace").decode())
    return folder / "MODEL_CARD.md"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
