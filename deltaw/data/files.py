"""Read files of rows, one row at a time, and say of every fault in which file and line it stands.

`.jsonl` one JSON object a line; `.json` a list of them; `.csv` and `.tsv` with a line of column names; `.txt` one
document after another, divided by lines of `---`; `.parquet`, and `hf:owner/name` of the hub, through `datasets`. Any
other name is read as `.jsonl`.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from deltaw.data import jsons
from deltaw.data.jsons import Placed, lines
from deltaw.data.rows import KNOWN, SHAPES, Example, example
from deltaw.errors import UserError, explained
from deltaw.words import some

HUB = "hf:"
"""What the name of a data set on the hub begins with: `hf:owner/name`, `hf:owner/name/configuration@split`."""
OWNER_AND_NAME = 2
DIVIDER = "---"
LEAST, MOST = 0.001, 1000
"""Weights of files."""
LISTED = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')
"""How a cell begins that holds a list of messages."""
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
    kinds: Mapping[str, Callable[[Path], Iterator[Placed | UserError]]] = {
        ".txt": _documents, ".csv": _table, ".tsv": _table, ".parquet": _hub_or_parquet
    }  # fmt: skip
    kind = ".parquet" if str(path).startswith(HUB) else path.suffix.lower()
    for row in kinds.get(kind, jsons.each)(path):
        yield row if isinstance(row, UserError) else _made(*row)


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


def _made(row: Any, where: str) -> Example | UserError:
    try:
        return example(row, where)
    except UserError as e:
        return e
    except RecursionError:
        return UserError("This row is nested too deeply.", where=where)


def _documents(path: Path) -> Iterator[Placed]:
    start, kept = 1, list[str]()
    for number, line in enumerate(chain(lines(path), [DIVIDER]), 1):
        if line.strip() == DIVIDER:
            if body := "".join(kept).strip():
                yield {"text": body}, f"{path}:{start}"
            start, kept = number + 1, []
        elif kept or line.strip():
            kept.append(line)
        else:
            start = number + 1  # blank lines before a document


def _table(path: Path) -> Iterator[Placed | UserError]:
    """A row for each line of a table; a cell may hold line breaks, so the line is that on which the row begins."""
    csv.field_size_limit(LONGEST_CELL)
    table = csv.reader(lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in table:
            where, line = f"{path}:{line}", table.line_num + 1
            empty = not any(cell.strip() for cell in cells)
            if empty and (names is None or len(cells) < 2):  # a blank line
                continue
            if names is None:
                names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]  # as pandas' index has none
                if double := next((name for name in names if names.count(name) > 1), None):
                    raise UserError(f"Two columns are called '{double}'.", where=where)
            elif len(cells) != len(names):
                yield UserError(f"This row has {some(len(cells), 'cell')} in {len(names)} columns.", where=where,
                                why=f"The columns are: {', '.join(names)}.")  # fmt: skip
            elif empty:
                yield UserError("This row is empty.", where=where, why=f"Nothing stands in its {len(cells)} cells.",
                                remedy="Delete it, or let deltaw data check --fix leave it out.")  # fmt: skip
            else:
                yield {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}, where
    except csv.Error as e:
        raise UserError("This is no table of quoted cells.", where=f"{path}:{line}", why=f"{e}.",
                        remedy=f"Columns are {KNOWN}.") from None  # fmt: skip


def _cell(name: str, cell: str) -> Any:
    """A cell's text; lists are written as JSON."""
    listed = name in ("messages", "conversations", "history", "references", "facts")
    if listed and not cell.strip():
        return None
    with suppress(ValueError, RecursionError):
        if listed or LISTED.match(cell):
            value = json.loads(cell)
            return value if listed or all(isinstance(turn, dict) and "content" in turn for turn in value) else cell
    return cell


def _hub_or_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a parquet file, or of a data set on the hub (its split `train` if none is said), and their places.

    Raises:
        UserError: `datasets` is not installed, or cannot read it.
    """
    name = str(path)
    with explained("Parquet files and data sets of the hub need `datasets`.", ImportError, where=name, why="",
                   remedy="pip install datasets"):  # fmt: skip
        from datasets import load_dataset
        from pyarrow.parquet import ParquetFile  # which datasets needs
    remedy = "On the hub: hf:owner/name/configuration@split." if name.startswith(HUB) else "Fetch or write it anew."
    with explained("This data set cannot be read.", Exception, where=name, remedy=remedy,
                   why=lambda error: (str(error).strip() or type(error).__name__).splitlines()[0]):  # fmt: skip
        if not name.startswith(HUB) and Path(name).is_file() and not ParquetFile(name).metadata.num_rows:
            return
        for number, row in enumerate(load_dataset(**_asked(name), streaming=True), 1):
            yield {column: _turns(value) for column, value in row.items()}, f"{name}:{number}"


def _asked(name: str) -> dict[str, Any]:
    if not name.startswith(HUB):
        if not Path(name).is_file():
            raise FileNotFoundError("There is no such file.")
        return {"path": "parquet", "data_files": glob.escape(name), "split": "train"}
    where, _, split = name.removeprefix(HUB).partition("@")
    parts = where.split("/")
    folder = Path(where)
    if not all(parts[:1]) or parts[0] in (".", "..") or Path(*parts[:OWNER_AND_NAME]).is_dir() or folder.is_dir():
        if not folder.is_dir() or not where:
            raise FileNotFoundError("There is no such folder, and no name of the hub begins so.")
        return {"path": where, "name": None, "split": split or "train"}
    configuration = "/".join(parts[OWNER_AND_NAME:]) or None
    return {"path": "/".join(parts[:OWNER_AND_NAME]), "name": configuration, "split": split or "train"}


def _turns(value: Any) -> Any:
    """A list of turns that was stored column by column, as a list of turns."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
