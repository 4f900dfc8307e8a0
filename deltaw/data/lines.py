"""The text of a data file, in lines or in pieces, and what is said of one that is no UTF-8."""

import re
from collections.abc import Iterator
from pathlib import Path

from deltaw.errors import UserError, explained

ENDED = re.compile(r"[^\r]*\r|[^\r]+")
PIECE = 1 << 20
"""Characters that are read at once."""


def lines(path: Path) -> Iterator[str]:
    """The file's lines, with their ends: line feeds, carriage returns, both. JSON strings may hold other line breaks.

    Raises:
        UserError: the file cannot be read, or a line is no UTF-8.
    """
    with (explained("The data file cannot be read.", OSError, where=path, why="{error.strerror}.",
                    remedy="A path counts from the folder in which the command is given."),
          path.open("rb") as file):  # fmt: skip
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                text = f"{text[:-2]}\n" if text.endswith("\r\n") else text
                yield from ENDED.findall(text) if "\r" in text else (text,)
            except UnicodeDecodeError:
                raise UserError("This is not UTF-8 text.", where=f"{path}:{number}", why=_encoding(line),
                                remedy="Save the file as plain UTF-8 text.") from None  # fmt: skip


def pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces of `PIECE` characters; errors as of `lines`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while text := file.read(PIECE):
                yield text
    except (OSError, UnicodeDecodeError):
        for _ in lines(path):  # says what is wrong, and in which line
            pass
        raise


def _encoding(line: bytes) -> str:
    """What the bytes of a line that is no UTF-8 probably are."""
    if line.startswith(b"\x1f\x8b"):
        return "It is compressed by gzip."
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or line.count(0) > len(line) // 4:
        return "It looks like UTF-16."
    return "It looks like an 8-bit encoding such as Latin-1 or Windows-1252."
