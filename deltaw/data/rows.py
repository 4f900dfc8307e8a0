"""Read training rows, one JSON object a line, and say of every fault in which file and line it stands.

A row is a conversation, `{"messages": [{"role": "user", "content": "..."}, ...]}`, a pair `{"prompt": "...",
"completion": "..."}`, or plain text, `{"text": "..."}`. A `.txt` file is one document after another, divided by lines
of `---`. Beside these keys a row may carry `references` (more right answers) and `facts` (what a right answer must
name), which `eval` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SHAPES = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
DIVIDER = "---"
LEAST, MOST = 0.001, 1000
"""Weights of files."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation or a text, and where it stands (`train.jsonl:17`)."""

    messages: tuple[dict[str, str], ...]
    text: str = ""
    where: str = ""
    references: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """The system prompt; empty if there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The turns before the last answer."""
        return self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str:
        """The last answer; empty if the row ends with a question."""
        return self.messages[-1]["content"] if self.messages and self.messages[-1]["role"] == "assistant" else ""


def read(path: Path) -> list[Example]:
    """Read every row of a file.

    Raises:
        UserError: the file is missing or empty, or a row is not as described above.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError("The data file is no regular file.", where=str(path),
                        why="It is read again when the run goes on.", remedy="Write its rows to a file.")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError("The data file cannot be read.", where=str(path), why=str(e.strerror) + ".") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise UserError("This is not UTF-8 text.", where=f"{path}:{line}", remedy="Save the file as UTF-8.") from None
    examples = list(_documents(text, path) if path.suffix == ".txt" else _rows(text, path))
    if not examples:
        raise UserError("The data file has no rows.", where=str(path), remedy=f"A row looks like {SHAPES}")
    return examples


def split_weight(name: str) -> tuple[Path, float]:
    """Take `rows.jsonl:2` apart: the file, and how often each of its rows is seen per epoch (1 if not said).

    Raises:
        UserError: the weight is out of range, or the name is no text.
    """
    if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise UserError("The name of the data file is no text.", where=ascii(name), remedy="Rename it.")
    if Path(name).exists() or ":" not in name:
        return Path(name), 1.0
    file, _, tail = name.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return Path(name), 1.0
    if not LEAST <= weight <= MOST:
        raise UserError(f"The weight {tail} is not between {LEAST} and {MOST}.", where=name,
                        remedy=f"For example: {file}:2")  # fmt: skip
    return Path(file), weight


def _documents(text: str, path: Path) -> Iterator[Example]:
    start, kept = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), DIVIDER], 1):
        if line.strip() == DIVIDER:
            if body := "\n".join(kept).strip():
                yield Example((), body, f"{path}:{start}")
            start, kept = number + 1, []
        else:
            kept.append(line)


def _rows(text: str, path: Path) -> Iterator[Example]:
    # Not splitlines(): it also divides at characters such as U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = _example(json.loads(line), where)
        except RecursionError:
            raise UserError("This row is nested too deeply.", where=where) from None
        except ValueError as e:
            column = getattr(e, "colno", 1)
            raise UserError(f"This line is not JSON (column {column}).", where=where, why=f"{getattr(e, 'msg', e)}.",
                            remedy="Each line is one JSON object.") from None  # fmt: skip
        yield example


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise UserError("This row is not a JSON object.", where=where, remedy=f"A row looks like {SHAPES}")
    if (key := next((key for key, value in row.items() if _has_half_characters(value)), None)) is not None:
        raise UserError(f"'{key}' holds half a character (a lone surrogate).", where=where,
                        remedy="Write the character whole, or leave it out.")  # fmt: skip
    extras = _strings(row, "references", where), _strings(row, "facts", where)
    if "messages" in row:
        return Example(_messages(row["messages"], where), "", where, *extras)
    if "prompt" in row and "completion" in row:
        pair = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return Example(_messages(pair, where), "", where, *extras)
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise UserError("The text is empty.", where=where, remedy="Write some, or drop the row.")
        return Example((), row["text"], where, *extras)
    keys = ", ".join(map(str, row)) or "none"
    raise UserError(f"This row has none of the keys messages, prompt and completion, text (it has: {keys}).",
                    where=where, remedy=f"A row looks like {SHAPES}")  # fmt: skip


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError("'messages' is not a list of turns.", where=where, remedy=f"A row looks like {SHAPES}")
    turns = []
    for i, turn in enumerate(messages, 1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise UserError(f"Turn {i} has the role {role!r}.", where=where, remedy=f"Roles are: {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise UserError(f"Turn {i} ({role}) has no text: its content is {json.dumps(content)}.", where=where)
        if role == "assistant" and not content.strip():
            raise UserError(f"Turn {i} is an empty answer.", where=where, remedy="Write the answer, or drop the row.")
        turns.append({"role": str(role), "content": content})
    return tuple(turns)


def _has_half_characters(value: Any) -> bool:
    """Whether a text anywhere in a JSON value has a surrogate without its other half, which UTF-8 cannot write."""
    if isinstance(value, str):
        return not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_has_half_characters(part) for part in parts)


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"'{key}' is not a list of texts.", where=where)
    return tuple(value)
