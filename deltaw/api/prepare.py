"""What a run begins with: rows read, some held out, encoded; a fresh adapter; and of what all that was made."""

import hashlib
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.adapters.adapter import Adapter, Method
from deltaw.advise.machine import existing
from deltaw.api.evaluate import prompt_ids
from deltaw.api.interrupt import heeding
from deltaw.api.persona import Base
from deltaw.data import files as reading
from deltaw.data.batch import Batch, lay, micro_batches
from deltaw.data.encode import Encoded, Lost, encode_all, encode_each
from deltaw.data.rows import Example
from deltaw.data.store import Rows
from deltaw.errors import UserError
from deltaw.files.runs import FORMAT, digest
from deltaw.scoring.loss import batch_loss
from deltaw.settings import Training
from deltaw.train.events import SAMPLE_TOKENS, Question
from deltaw.weights import Packed
from deltaw.words import some

FEWEST_TO_SPLIT = 40
"""Data sets with fewer rows are not split: too few would be left to learn from, or to measure with."""
HELD_SHARE, MOST_HELD = 0.05, 1000
"""Validation rows where the user says nothing: a share of the training rows, and no more than so many."""
CALIBRATION = 40
"""Training rows that tell a method what matters, where it asks."""


@dataclass(frozen=True)
class Part:
    """One training file: how often each of its rows is seen per epoch, and which of them are held out.

    Its rows are read again each time they are asked for, and never held all at once.
    """

    path: Path
    weight: float
    count: int
    held: frozenset[int]

    def rows(self, held: bool = False) -> Iterator[Example]:
        """The rows that are learnt, or those held out.

        Raises:
            UserError: the file is not what it was.
        """
        count = 0
        for i, row in enumerate(reading.stream(self.path)):
            count += 1
            if (i in self.held) == held:
                yield row
        if count != self.count:
            raise UserError("The data file changed while it was read.", where=str(self.path),
                            why=f"It had {self.count:,} rows, and now {count:,}.")  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """What was found in a first reading.

    `system`: the system prompt, if all training rows have the same; `asked`: the first row with a question and answer.
    """

    parts: tuple[Part, ...]
    val: tuple[Example, ...]
    system: str
    asked: Example | None
    val_file: Path | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedData:
    """Rows as ids. `weights`: each file's number of rows, and how often each is seen per epoch."""

    rows: Rows
    weights: tuple[tuple[int, float], ...]
    val: tuple[Batch, ...]
    val_rows: int
    notices: tuple[str, ...]


def load(data: Sequence[str], settings: Training, stop: Callable[[], bool] = lambda: False) -> Loaded:
    """Read the training files once, so that faults are found, and set validation rows aside.

    Raises:
        UserError: there is no data, or a fault in it. Interrupted: `stop` says so.
    """
    if not data:
        raise UserError("There is no data to train on.", remedy="deltaw train FILE.jsonl")
    val_file, share, most = _validation(settings.val)
    most = max(1, most // len(data))
    val = tuple(reading.stream(val_file)) if val_file else ()
    parts, hashes, systems, notices = [], [], set[str](), []
    asked: Example | None = None
    unread = Counter[str]()
    for f, (path, weight) in enumerate(reading.split_weight(name) for name in data):
        contents = array("q")  # eight bytes a row
        for row in heeding(reading.stream(path), stop):
            contents.append(_content(row))
            unread.update(row.unread)
            systems |= {row.system} if len(systems) < 2 else set()
            asked = asked or (row if row.answer and row.prompt else None)
        n = len(contents)
        count = min(most, max(1, round(n * share))) if share and n >= FEWEST_TO_SPLIT else 0
        held = frozenset(random.Random(f"val/{settings.seed}/{f}").sample(range(n), count))
        parts.append(Part(path, weight, n, held))
        hashes.append(contents)
    if share:
        val = tuple(row for part in parts if part.held for row in part.rows(held=True))
        if not val:
            total = some(sum(part.count for part in parts), "row")
            notices.append(f"No validation rows: {total} are too few to hold some out.")
    known = {_content(row) for row in val}
    learnt = {content for part, contents in zip(parts, hashes, strict=True) for i, content in enumerate(contents)
              if content in known and i not in part.held}  # fmt: skip
    if leaked := [row for row in val if _content(row) in learnt]:
        notices.append(f"{some(len(leaked), 'validation row')} trained on too (the first: {leaked[0].where}): "
                       "the validation loss flatters.")  # fmt: skip
    if unread:
        keys = ", ".join(f"{key} ({some(n, 'row')})" for key, n in unread.most_common())
        notices.append(f"Keys that are passed over: {keys}.")
    system = systems.pop() if len(systems) == 1 else ""
    return Loaded(tuple(parts), val, system, asked, val_file, tuple(notices))


def encode(loaded: Loaded, base: Base, settings: Training, stop: Callable[[], bool] = lambda: False) -> EncodedData:
    """Encode what was loaded, with the base's tokenizer and template, for what the base wears.

    Raises:
        UserError: rows longer than the model's context are asked for, or nothing is left to learn. Interrupted: `stop`
        says so.
    """
    context = base.model.context
    limit = settings.max_tokens or context
    if limit > context:
        raise UserError(f"max_tokens is {limit:,}, but this model sees only {context:,} tokens.",
                        remedy=f"Take --max-tokens {context}.")  # fmt: skip
    rows, weights, notices = Rows(existing(settings.runs)), [], list[str]()
    for part in loaded.parts:
        before, lost = len(rows), Lost()
        for row in encode_each(heeding(part.rows(), stop), base.tokenizer, settings.train_on, limit, lost):
            _check_ids(row.ids, base, row.where)
            rows.append(row)
        weights.append((len(rows) - before, part.weight))
        notices += lost.notices(limit)
    val: list[Encoded] = []
    if loaded.val:
        val, lost = encode_all(loaded.val, base.tokenizer, settings.train_on, limit)
        notices += (f"Validation: {line}" for line in lost.notices(limit))
    for row in val:
        _check_ids(row.ids, base, row.where)
    batches = tuple(micro_batches(val, settings.micro_tokens, base.model.shares))
    return EncodedData(rows, tuple(weights), batches, len(val), tuple(notices))


def _check_ids(ids: Sequence[int], base: Base, where: str) -> None:
    if (largest := max(ids)) >= (vocab := base.model.config.vocab):
        raise UserError("The tokenizer does not belong to this model.", where=where,
                        why=f"It gives the id {largest:,}, and the model has {vocab:,} rows.",
                        remedy="Take the tokenizer that came with the model.")  # fmt: skip


def question(loaded: Loaded, base: Base, settings: Training) -> Question | None:
    """What is asked to be looked at: what the user gave, or the first of the validation rows, or of the rows."""
    if base.tokenizer.template is None:
        return None
    asked = next((row for row in loaded.val if row.answer and row.prompt), loaded.asked)
    if settings.sample is not None:
        asked = Example(({"role": "user", "content": settings.sample},))
    if asked is None:
        return None
    ids = prompt_ids(asked, base.tokenizer)
    _check_ids(ids, base, "")
    if len(ids) + SAMPLE_TOKENS > base.model.context:
        return None  # as long as this, it shows nothing at a glance
    return Question(asked.prompt[-1]["content"], tuple(ids), asked.answer)


def packing(settings: Training, method: Method) -> str:
    """How the base's matrices are packed."""
    return type(method).base_format if settings.base_format is None else settings.base_format


def begun(method: Method, base: Base, settings: Training, loaded: Loaded, stop: Callable[[], bool],
          fresh: bool = True) -> tuple[Adapter, EncodedData]:  # fmt: skip
    """The adapter that a run begins with, and the rows as the model sees them that wears it.

    `fresh`: it starts from what its method sets; else it is filled from a checkpoint, which has all of that.
    """
    adapter = Adapter.build(method, base.model, settings.seed).to(base.model.device)
    if not adapter.parameter_count:
        raise UserError("These settings leave nothing to train.", remedy="See the page of the method, docs/methods.")
    with adapter.on():
        encoded = encode(loaded, base, settings, stop)
    encoded = replace(encoded, notices=(*encoded.notices, *method.notices(adapter)))
    if not fresh:
        return adapter, encoded

    def losses() -> Iterator[Tensor]:
        count = len(encoded.rows)
        for i in heeding(random.Random(settings.seed).sample(range(count), min(CALIBRATION, count)), stop):
            batch = lay([encoded.rows[i]]).to(base.model.device)
            yield batch_loss(base.model, batch) / batch.targets

    return method.begin(adapter, base.model, base.tokenizer, losses), encoded


def packed_by_layer(adapter: Adapter) -> tuple[str, ...]:
    """Name, format and bits a number of the matrices that are an adapter's own; nothing where all are alike."""
    own = {name: part for name, delta in adapter.named_deltas() for part in delta.modules() if isinstance(part, Packed)}
    if len({str(weight.form) for weight in own.values()}) < 2:
        return ()
    return tuple(f"{name} {w.form} {8 * w.stored_bytes / (w.shape[0] * w.shape[1]):.3f}" for name, w in own.items())


def manifest(base: Base, loaded: Loaded, encoded: EncodedData) -> dict[str, Any]:
    """Fingerprints of everything that decides what a run makes; `rendered`: the time that templates were told."""
    files = [part.path for part in loaded.parts] + ([loaded.val_file] if loaded.val_file else [])
    return {
        "format": FORMAT,
        "base": base.fingerprint,
        "tokenizer": _sha256(base.tokenizer.fast.to_str()),
        "template": _sha256(base.tokenizer.template or ""),
        "rendered": base.tokenizer.now.isoformat(),
        "data": {str(path): digest(path) for path in files if path.exists()},
        "tokens": encoded.rows.fingerprint,
    }


def _validation(said: str | None) -> tuple[Path | None, float, int]:
    """The file of validation rows, or the share of the training rows that are held out, and how many at most."""
    if said is None:
        return None, HELD_SHARE, MOST_HELD
    try:
        share = float(said)
    except ValueError:
        return Path(said), 0.0, 0
    if not 0 <= share < 1:
        raise UserError(f"val = {said}: a share is at least 0 and less than 1.", remedy="Give a share, or a file.")
    return None, share, sys.maxsize


def _content(row: Example) -> int:
    """Stands for what a row says, so that the texts of all rows need not be held."""
    return hash((row.text, *(turn["content"] for turn in row.messages)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
