"""Rows of parquet files and of data sets on the Hugging Face hub, one after another, through `datasets` (an extra)."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.errors import explained

HUB = "hf:"
"""What the name of a data set on the hub begins with: `hf:owner/name`, `hf:owner/name/configuration@split`."""
OWNER_AND_NAME = 2


def each(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
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
