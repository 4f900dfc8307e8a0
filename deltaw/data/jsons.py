"""The text of data files, and the values of JSON ones, each with its place: no more is held at a time than one needs.

JSON is one object a line, or a list of them. What is no JSON is told in words that say what to do: the parser's own
name the character it stumbled on.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from deltaw.data.rows import shape_of
from deltaw.errors import UserError, explained, located

ENDED = re.compile(r"[^\r]*\r|[^\r]+")
PIECE = 1 << 20
"""Characters that are read at once."""
Placed = tuple[Any, str]
"""A value, and where it stands."""
BLANK = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16
"""Characters of a number's, a word's or an escape's that the end of what is held may have cut off."""
SLIPS = {
    "/": ("A comment begins there.", "JSON has no comments: leave them out."),
    "#": ("A comment begins there.", "JSON has no comments: leave them out."),
    "'": ("Texts stand in single quotes.", "Write rows with json.dumps, not as Python shows them."),
    "]": (TRAILING := ("A comma stands before the end.", "Leave the last comma out.")),
    "}": TRAILING,
}
"""What people write that is no JSON, by the character at which the parser stops."""


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


def each(path: Path) -> Iterator[Placed | UserError]:
    """The values of a list, or of each line, and in place of a faulty one its fault.

    Raises:
        UserError: the file cannot be read on.
    """
    yield from _each_item(path) if _begin(path) == "[" else _each_line(path)


def _begin(path: Path) -> str:
    """The first character that is no blank."""
    with suppress(OSError), path.open("rb") as file:  # an error is said where lines are read
        while piece := file.read(PIECE):
            if begun := piece.lstrip(b" \t\r\n\xef\xbb\xbf"):
                return chr(begun[0])
    return ""


def _each_line(path: Path) -> Iterator[Placed | UserError]:
    first = True
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except UserError as e:
            e.where = where
            yield e
        except RecursionError:
            yield UserError("This row is nested too deeply.", where=where)
        except ValueError as e:
            if first:
                _refuse_spread(path)
            at = getattr(e, "pos", 0)
            why, remedy = _slip(line.rstrip(), at, e, "Each line is one JSON object, whole.")
            yield UserError(f"This line is not JSON (column {at + 1}).", where=where, why=why, remedy=remedy)
        else:
            if first:
                _refuse_wrapped(value, path, False)
            yield value, where
        first = False


def _each_item(path: Path) -> Iterator[Placed | UserError]:
    text = _Values(path)
    text.next()
    text.at += 1
    more = text.next() != "]"
    while more:
        text.next()
        where = f"{path}:{text.line}"
        try:
            with located(where), explained("This row is nested too deeply.", RecursionError, where=where, why=""):
                value = text.value()
        except ValueError as e:
            raise text.fault(getattr(e, "pos", text.at), e) from None
        yield value, where
        if (mark := text.next()) not in (",", "]"):
            raise text.fault(text.at, ValueError("A comma or ] is missing"))
        more = mark == ","
        text.at += more
    text.at += 1
    if text.next():
        raise UserError("Something follows the list of rows.", where=f"{path}:{text.line}",
                        why=f"It begins {text.held[text.at:][:40]!r}.",
                        remedy="Leave it out, or put all rows into one list.")  # fmt: skip


class _Values:
    """The JSON values of a file one after another, of which no more is held than the longest needs."""

    def __init__(self, path: Path) -> None:
        self.path, self.held, self.at, self.line, self.counted = path, "", 0, 1, 0
        self.decoder, self.pieces = json.JSONDecoder(object_pairs_hook=_object), pieces(path)

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
                return value
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos + LONGEST_WORD > len(self.held)
                if not cut or not self._more():
                    raise

    def fault(self, at: int, error: ValueError) -> UserError:
        """What is wrong at a place in what is held."""
        line = self.line + self.held.count("\n", self.counted, at)
        why, remedy = _slip(self.held, at, error, "A list of rows is [{...}, {...}].")
        return UserError("This is not a JSON list of rows.", where=f"{self.path}:{line}", why=why, remedy=remedy)

    def _more(self) -> bool:
        """Hold twice as much of what follows, and nothing of what was read."""
        rest = self.held[self.at :]
        if not (new := "".join(islice(self.pieces, 1 + len(rest) // PIECE))):
            return False
        self.line += self.held.count("\n", self.counted, self.at)
        self.held, self.at, self.counted = rest + new, 0, 0
        return True


def _refuse_wrapped(value: Any, path: Path, spread: bool) -> None:
    """One object that holds the rows, or objects over several lines, are no list, and no objects line by line."""
    parts = {} if not isinstance(value, dict) or shape_of(value) else value
    inner = [key for key, part in parts.items() if isinstance(part, list) and part
             and isinstance(part[0], dict) and shape_of(part[0])]  # fmt: skip
    written = f"{shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-lines.jsonl')}"
    if inner:
        names = "', '".join(inner)
        raise UserError(f"The rows stand in '{names}' of one object.", where=str(path),
                        remedy="jq -c " + shlex.quote(f'.["{inner[0]}"][]') + f" {written}")  # fmt: skip
    if spread:
        raise UserError("An object is written over several lines.", where=str(path),
                        why="A file holds one list of rows, or one row a line.",
                        remedy=f"jq -c . {written}")  # fmt: skip


def _refuse_spread(path: Path) -> None:
    """Where the first line is no JSON by itself, it may be so with those that follow."""
    text = _Values(path)
    try:
        value = (text.next(), text.value())[1]
    except (UserError, ValueError, RecursionError):
        return
    _refuse_wrapped(value, path, True)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"The key '{twice}' stands twice.", remedy="Leave one of them out.")
    return made


def _slip(text: str, at: int, error: ValueError, usual: str) -> tuple[str, str]:
    """Why this is no JSON, and what to do."""
    said = getattr(error, "msg", str(error))
    if at >= len(text) or said.startswith("Unterminated string"):
        return "It ends in the midst of a value.", f"It was cut off, or goes on where it must not. {usual}"
    if said.startswith("Invalid control character"):
        return "A tab or a line break stands in a text as it is.", "Write it as \\t or \\n."
    if said.startswith("Illegal trailing comma"):  # since Python 3.13
        return TRAILING
    if text[at] in "]}" and not text[:at].rstrip().endswith(","):
        return f"{said}.", usual
    return SLIPS.get(text[at], (f"{said}.", usual))
