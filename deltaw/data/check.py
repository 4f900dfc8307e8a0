"""What is wrong with data before anything is trained on it: faults, doubles, odd turns, rows too long, leakage."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from deltaw.data.encode import Encoded, TrainOn, encode, pieces
from deltaw.data.files import each, stream
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

SHOWN = 3
"""Places that are named of each finding."""
BINS = 24

FAULTY = "faulty rows"
"""Cannot be read: a train command would stop at the first."""
TWICE = "rows that stand twice"
CONTRADICTED = "questions with another answer elsewhere"
LEAKED = "rows that are validation rows too"
UNLEARNT = "rows with nothing to learn"
LONG = "rows too long, and cut"
ENDLESS = "answers without an end-of-turn token"
SPECIAL = "turns that hold special tokens of the model"
DISORDERED = "rows whose turns are out of order"
BLANK = "rows with an empty turn"
DROPPED = (FAULTY, TWICE, LEAKED, UNLEARNT)
"""What `--fix` leaves out."""


@dataclass
class Checked:
    """What was found in some rows. `places[finding]` says where; `lengths` are in tokens."""

    rows: int = 0
    trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    shown: list[Encoded] = field(default_factory=list)
    places: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unread: Counter[str] = field(default_factory=Counter)
    """Keys that are passed over, and in how many rows."""

    @property
    def tokens(self) -> int:
        """Of all rows, before any is cut."""
        return sum(self.lengths)

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        return sorted(self.lengths)[max(0, math.ceil(share * len(self.lengths)) - 1)] if self.lengths else 0

    def histogram(self) -> list[int]:
        """Rows in each of `BINS` equal stretches of length, up to the longest."""
        longest = max(self.lengths, default=1)
        bins = Counter(min(BINS - 1, n * BINS // (longest + 1)) for n in self.lengths)
        return [bins[i] for i in range(BINS)]


def check(files: Sequence[Path], val: Path | None, tokenizer: Tokenizer, train_on: TrainOn, max_tokens: int,
          keep: Callable[[Example], None] = lambda _: None) -> Checked:  # fmt: skip
    """Look at every row of the files; `keep` is given those that `--fix` writes.

    Raises:
        UserError: a file cannot be read on, or a validation row is faulty.
    """
    found = Checked()
    held = {_digest(_content(e)) for e in stream(val)} if val else set()
    seen: set[bytes] = set()
    special = [t.content for t in tokenizer.fast.get_added_tokens_decoder().values() if t.special]
    answers: dict[bytes, bytes] = {}
    for row in (row for file in files for row in each(file)):
        found.rows += 1
        if isinstance(row, UserError):
            found.places[FAULTY].append(f"{row.where}: {row.what}")
            continue
        found.unread.update(row.unread)
        content = _digest(_content(row))
        whole = _digest(f"{_content(row)}{row.silent}")
        dropped = {LEAKED: content in held, TWICE: whole in seen}
        seen.add(whole)
        if row.answer:
            answer = _digest(row.answer)
            if answers.setdefault(_digest(json.dumps(row.prompt)), answer) != answer:
                found.places[CONTRADICTED].append(row.where)
        for finding in _odd_turns(row, special):
            found.places[finding].append(row.where)
        try:
            ids = encode(row, tokenizer, train_on)
        except UserError as e:
            found.places[FAULTY].append(f"{row.where}: {e.what}")
            continue
        dropped[UNLEARNT] = not _measured(ids, found, tokenizer, max_tokens, bool(row.messages), train_on)
        for finding in (finding for finding, is_so in dropped.items() if is_so):
            found.places[finding].append(row.where)
        if not any(dropped.values()):
            keep(row)
    return found


def _odd_turns(row: Example, special: Sequence[str]) -> Iterator[str]:
    if any(not turn["content"].strip() for turn in row.messages):
        yield BLANK
    if any(token in turn["content"] for turn in row.messages for token in special):
        yield SPECIAL
    if row.messages and not in_order([turn["role"] for turn in row.messages]):
        yield DISORDERED


def in_order(roles: Sequence[str]) -> bool:
    """Whether a system prompt comes first if at all, users and assistants take turns, and an assistant ends."""
    turns = list(roles[1:] if roles and roles[0] == "system" else roles)
    # After a tool has answered, the assistant speaks again without a user between.
    alternate = all(a != b for a, b in pairwise(turns) if "tool" not in (a, b))
    return "system" not in turns and turns[:1] == ["user"] and turns[-1] == "assistant" and alternate


def _measured(ids: Encoded, found: Checked, tokenizer: Tokenizer, max_tokens: int, conversation: bool,
              train_on: TrainOn) -> bool:  # fmt: skip
    """Take in a row as ids; returns whether something is learnt from it."""
    found.lengths.append(len(ids.ids))
    divided = not conversation and train_on == "all"
    targets = sum(part.targets for part in pieces(ids, max_tokens, divided))
    found.trained_tokens += targets
    if len(ids.ids) > max_tokens and targets and not divided:
        found.places[LONG].append(ids.where)
    last = next((i for i in range(len(ids.ids) - 1, -1, -1) if ids.trained[i]), None)
    if conversation and train_on == "answers" and last is not None and ids.ids[last] not in tokenizer.end_ids:
        found.places[ENDLESS].append(ids.where)
    if len(found.shown) < SHOWN and targets:
        found.shown.append(ids)
    return targets > 0


def _content(row: Example) -> str:
    return json.dumps([row.messages, row.text])


def _digest(text: str) -> bytes:
    """Stands for a text, so that the texts of all rows need not be held."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
