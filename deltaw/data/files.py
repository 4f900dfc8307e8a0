"""Read files of rows, one row at a time, and say of every fault in which file and line it stands.

`.jsonl` one JSON object a line; `.json` a list of them; `.csv` and `.tsv` with a line of column names; `.txt` one
document after another, divided by lines of `---`; `.parquet`, and `hf:owner/name` of the hub, through `datasets`. Any
other name is read as `.jsonl`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from deltaw.data.columns import HUB, rows
from deltaw.data.rows import KNOWN, SHAPES, Example, example
from deltaw.errors import UserError
from deltaw.words import some

DIVIDER = "---"
LEAST, MOST = 0.001, 1000
"""Weights of files."""
BLANK = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 20
"""Characters that are read at once of a JSON list."""
LISTED = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')
"""How a cell begins that holds a list of messages."""
LONGEST_WORD = 16
"""Characters of a number's, a word's or an escape's that the end of what is held may have cut off."""
LONGEST_CELL = 1 << 27
"""Characters in a cell of a table; Python's own limit is 131,072."""


def read(path: Path) -> list[Example]:
    """Read every row of a file; errors as of `stream`."""
    return list(stream(path))


def stream(path: Path) -> Iterator[Example]:
    """Read the rows of a file one after another, no more than one held.

    Raises:
        UserError: the file is missing or empty, or the row that is reached is in none of the known shapes.
    """
    row = None
    for row in each(path):
        if isinstance(row, UserError):
            raise row
        yield row
    if row is None:
        raise UserError("The data file has no rows.", where=str(path), remedy=f"A row looks like {SHAPES}")


def each(path: Path) -> Iterator[Example | UserError]:
    """The rows of a file or a data set on the hub, and in place of a faulty one its fault: all can be looked at.

    Raises:
        UserError: the file cannot be read on from here.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError("The data file is no regular file.", where=str(path),
                        why="It is read again when the run goes on.", remedy="Write its rows to a file.")  # fmt: skip
    if str(path).startswith(HUB):
        yield from _columns(path)
        return
    lines = _lines(path)
    match path.suffix.lower():
        case ".txt":
            yield from _documents(lines, path)
        case ".csv":
            yield from _table(lines, path, ",")
        case ".tsv":
            yield from _table(lines, path, "\t")
        case ".parquet":
            yield from _columns(path)
        case ".json":
            yield from _list(path)
        case _:
            yield from _rows(lines, path)


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


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, with their ends, split at line feeds only: JSON strings may hold other line breaks."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    yield f"{text[:-2]}\n" if text.endswith("\r\n") else text
                except UnicodeDecodeError:
                    raise UserError("This is not UTF-8 text.", where=f"{path}:{number}",
                                    why=_encoding(line), remedy="Save the file as UTF-8.") from None  # fmt: skip
    except OSError as e:
        raise UserError("The data file cannot be read.", where=str(path), why=str(e.strerror) + ".") from None


def _chunks(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while text := file.read(CHUNK):
                yield text
    except (OSError, UnicodeDecodeError):
        for _ in _lines(path):  # says what is wrong, and in which line
            pass
        raise


def _encoding(line: bytes) -> str:
    """What the bytes of a line that is no UTF-8 probably are."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or line.count(0) > len(line) // 4:
        return "It looks like UTF-16."
    return "It looks like an 8-bit encoding such as Latin-1 or Windows-1252."


def _columns(path: Path) -> Iterator[Example | UserError]:
    for number, row in enumerate(rows(str(path)), 1):
        yield _made(row, f"{path}:{number}")


def _documents(lines: Iterator[str], path: Path) -> Iterator[Example | UserError]:
    start, kept = 1, list[str]()
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip() != DIVIDER:
            if kept or line.strip():
                kept.append(line)
            else:
                start = number + 1  # blank lines before a document
            continue
        if body := "".join(kept).strip():
            yield Example((), body, f"{path}:{start}")
        start, kept = number + 1, []
    if body := "".join(kept).strip():
        yield Example((), body, f"{path}:{start}")


def _made(row: Any, where: str) -> Example | UserError:
    try:
        return example(row, where)
    except UserError as e:
        return e
    except RecursionError:
        return UserError("This row is nested too deeply.", where=where)


def _rows(lines: Iterator[str], path: Path) -> Iterator[Example | UserError]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except RecursionError:
            yield UserError("This row is nested too deeply.", where=where)
        except ValueError as e:
            column = getattr(e, "colno", 1)
            yield UserError(f"This line is not JSON (column {column}).", where=where, why=f"{getattr(e, 'msg', e)}.",
                            remedy="Each line is one JSON object.")  # fmt: skip
        else:
            yield _made(row, where)


def _list(path: Path) -> Iterator[Example | UserError]:
    """The rows of one JSON list; a file that begins otherwise holds one object a line."""
    text = _Values(path)
    if text.next() != "[":
        yield from _rows(_lines(path), path)
        return
    text.at += 1
    more = text.next() != "]"
    while more:
        text.next()
        where = f"{path}:{text.line}"
        try:
            row = text.value()
        except RecursionError:
            raise UserError("This row is nested too deeply.", where=where) from None
        except ValueError as e:
            raise text.fault(f"{getattr(e, 'msg', e)}.", getattr(e, "pos", text.at)) from None
        yield _made(row, where)
        if (mark := text.next()) not in (",", "]"):
            raise text.fault("A comma or ] is missing.", text.at)
        more = mark == ","
        text.at += more
    text.at += 1
    if text.next():
        raise UserError("Something follows the list of rows.", where=f"{path}:{text.line}",
                        why=f"It begins {text.held[text.at:][:40]!r}.")  # fmt: skip


class _Values:
    """The JSON values of a file one after another, of which no more is held than the longest needs."""

    def __init__(self, path: Path) -> None:
        self.path, self.held, self.at, self.line, self.counted = path, "", 0, 1, 0
        self.decoder, self.chunks = json.JSONDecoder(), _chunks(path)

    def next(self) -> str:
        """Pass over blanks; the character that follows, none at the end."""
        while True:
            self.at = BLANK.match(self.held, self.at).end()  # type: ignore[union-attr]  # it matches nothing at all, too
            if self.at < len(self.held) or not self._more():
                break
        self.line, self.counted = self.line + self.held.count("\n", self.counted, self.at), self.at
        return self.held[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.held, self.at)
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos + LONGEST_WORD > len(self.held)
                if not cut or not self._more():
                    raise
            else:
                return value

    def fault(self, why: str, at: int) -> UserError:
        """What is wrong at a place in what is held."""
        line = self.line + self.held.count("\n", self.counted, at)
        return UserError("This is not a JSON list of rows.", where=f"{self.path}:{line}", why=why)

    def _more(self) -> bool:
        """Hold twice as much of what follows, and nothing of what was read."""
        rest = self.held[self.at :]
        if not (new := "".join(islice(self.chunks, 1 + len(rest) // CHUNK))):
            return False
        self.line += self.held.count("\n", self.counted, self.at)
        self.held, self.at, self.counted = rest + new, 0, 0
        return True


def _table(lines: Iterator[str], path: Path, delimiter: str) -> Iterator[Example | UserError]:
    """A row for each line of a table; a cell may hold line breaks, so the line is that on which the row begins."""
    csv.field_size_limit(LONGEST_CELL)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in table:
            where, line = f"{path}:{line}", table.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                if "" in names:
                    raise UserError(f"Column {names.index('') + 1} has no name.", where=where)
                if double := next((name for name in names if names.count(name) > 1), None):
                    raise UserError(f"Two columns are called '{double}'.", where=where)
                continue
            if len(cells) != len(names):
                yield UserError(f"This row has {some(len(cells), 'cell')} in {len(names)} columns.", where=where,
                                why=f"The columns are: {', '.join(names)}.")  # fmt: skip
                continue
            yield _made({name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}, where)
    except csv.Error as e:
        raise UserError("This is no table of quoted cells.", where=f"{path}:{line}", why=f"{e}.",
                        remedy=f"Columns are {KNOWN}.") from None  # fmt: skip


def _cell(name: str, cell: str) -> Any:
    """A cell's text; lists are written as JSON."""
    if name in ("messages", "conversations", "history", "references", "facts") or LISTED.match(cell):
        try:
            return json.loads(cell) if cell.strip() else []
        except (ValueError, RecursionError):
            return cell
    return cell
