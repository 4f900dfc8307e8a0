"""From file names to encoded rows: read, hold some out, encode, and remember of what it was made."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.api.persona import Base
from deltaw.data import files as reading
from deltaw.data.batch import Batch, micro_batches
from deltaw.data.encode import Encoded, encode_all
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.files.runs import digest
from deltaw.settings import Training
from deltaw.train.job import SAMPLE_TOKENS, Question
from deltaw.words import some

FEWEST_TO_SPLIT = 40
"""Data sets with fewer rows are not split: too few would be left to learn from, or to measure with."""


@dataclass(frozen=True)
class Loaded:
    """Rows as read: one list for each file, and those held out."""

    files: tuple[tuple[Path, float], ...]
    train: tuple[tuple[Example, ...], ...]
    val: tuple[Example, ...]
    val_file: Path | None = None
    notices: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """The system prompt, if all training rows have the same."""
        said = {e.system for rows in self.train for e in rows}
        return said.pop() if len(said) == 1 else ""


@dataclass(frozen=True)
class EncodedData:
    """Rows as ids. `weights`: each file's number of rows, and how often each is seen per epoch."""

    rows: tuple[Encoded, ...]
    weights: tuple[tuple[int, float], ...]
    val: tuple[Batch, ...]
    val_rows: int
    notices: tuple[str, ...]


def load(data: Sequence[str], settings: Training) -> Loaded:
    """Read the training files and set validation rows aside.

    Raises:
        UserError: there is no data, or a fault in it.
    """
    if not data:
        raise UserError("There is no data to train on.", remedy="deltaw train FILE.jsonl")
    files = tuple(reading.split_weight(name) for name in data)
    read = [tuple(reading.read(path)) for path, _ in files]
    val_file, share = _validation(settings.val)
    notices = []
    if val_file is not None:
        val = tuple(reading.read(val_file))
    else:
        read, val = _held_out(read, share, settings.seed)
        if share and not val:
            notices.append(f"No validation rows: {some(sum(map(len, read)), 'row')} are too few to hold some out.")
    seen = {_content(e) for rows in read for e in rows}
    known = [e for e in val if _content(e) in seen]
    if known:
        notices.append(f"{some(len(known), 'validation row')} trained on too (the first: {known[0].where}): "
                       "the validation loss flatters.")  # fmt: skip
    return Loaded(files, tuple(read), val, val_file, tuple(notices))


def encode(loaded: Loaded, base: Base, settings: Training) -> EncodedData:
    """Encode what was loaded, with the base's tokenizer and template.

    Raises:
        UserError: rows longer than the model's context are asked for, or nothing is left to learn.
    """
    context = base.model.config.context
    limit = settings.max_tokens or context
    if limit > context:
        raise UserError(f"max_tokens is {limit:,}, but this model sees only {context:,} tokens.",
                        remedy=f"Take --max-tokens {context}.")  # fmt: skip
    parts = [encode_all(rows, base.tokenizer, settings.train_on, limit) for rows in loaded.train]
    notices = [line for part in parts for line in part.notices(limit)]
    val: tuple[Encoded, ...] = ()
    if loaded.val:
        held = encode_all(loaded.val, base.tokenizer, settings.train_on, limit)
        val, notices = held.rows, [*notices, *(f"Validation: {line}" for line in held.notices(limit))]
    weights = tuple((len(part.rows), weight) for part, (_, weight) in zip(parts, loaded.files, strict=True))
    batches = tuple(micro_batches(val, settings.micro_tokens, base.model.shares)) if val else ()
    return EncodedData(tuple(row for part in parts for row in part.rows), weights, batches, len(val), tuple(notices))


def question(loaded: Loaded, base: Base, settings: Training) -> Question | None:
    """What is asked to be looked at: what the user gave, or the first of the validation rows, or of the rows."""
    if base.tokenizer.template is None:
        return None
    if settings.sample is not None:
        turns: tuple[dict[str, str], ...] = ({"role": "user", "content": settings.sample},)
        expected = ""
    else:
        asked = next((e for e in (*loaded.val, *loaded.train[0]) if e.answer and len(e.prompt)), None)
        if asked is None:
            return None
        turns, expected = asked.prompt, asked.answer
    ids = base.tokenizer.encode(base.tokenizer.chat(turns, prompt=True))
    if len(ids) + SAMPLE_TOKENS > base.model.config.context:
        return None  # as long as this, it shows nothing at a glance
    return Question(turns[-1]["content"], tuple(ids), expected)


def manifest(base: Base, loaded: Loaded, encoded: EncodedData) -> dict[str, Any]:
    """Fingerprints of everything that decides what a run makes; `rendered`: the time that templates were told."""
    files = [path for path, _ in loaded.files] + ([loaded.val_file] if loaded.val_file else [])
    return {
        "base": base.fingerprint,
        "tokenizer": _sha256(base.tokenizer.fast.to_str()),
        "template": _sha256(base.tokenizer.template or ""),
        "rendered": base.tokenizer.now.isoformat(),
        "data": {str(path): digest(path) for path in files},
        "tokens": _sha256(repr([(row.ids, row.trained) for row in encoded.rows])),
    }


def _validation(said: str) -> tuple[Path | None, float]:
    try:
        share = float(said)
    except ValueError:
        return Path(said), 0.0
    if not 0 <= share < 1:
        raise UserError(f"val = {said}: a share is at least 0 and less than 1.", remedy="Give a share, or a file.")
    return None, share


def _held_out(
    read: list[tuple[Example, ...]], share: float, seed: int
) -> tuple[list[tuple[Example, ...]], tuple[Example, ...]]:
    """Take a share of every file's rows out at random, and none of a small file's."""
    kept, held = [], []
    for i, rows in enumerate(read):
        count = max(1, round(len(rows) * share)) if share and len(rows) >= FEWEST_TO_SPLIT else 0
        out = set(random.Random(f"val/{seed}/{i}").sample(range(len(rows)), count))
        held += [row for j, row in enumerate(rows) if j in out]
        kept.append(tuple(row for j, row in enumerate(rows) if j not in out))
    return kept, tuple(held)


def _content(example: Example) -> tuple[str, ...]:
    return (example.text, *(turn["content"] for turn in example.messages))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
