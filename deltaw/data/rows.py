"""A row of data, in whichever of the field's shapes it was written: conversation, pair, instruction or text.

    {"messages": [{"role": "user", "content": "..."}, ...]}                     as OpenAI, TRL, mlx-lm
    {"conversations": [{"from": "human", "value": "..."}, ...]}                 as ShareGPT
    {"prompt": "...", "completion": "..."}                                      texts, or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}                     as Alpaca, with or without `history`
    {"question": "...", "answer": "..."}
    {"text": "..."}

Beside these keys a row may carry `references` (more right answers) and `facts` (what a right answer must name), which
`eval` reads, and `system`; a turn may carry `weight`, 0 where it is not to be learnt, as in OpenAI's shape.
"""

import json
from dataclasses import dataclass
from typing import Any

from deltaw.errors import UserError, explained

ROLES = ("system", "user", "assistant", "tool")
SPOKEN = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
          "model": "assistant", "function": "tool", "observation": "tool"}  # fmt: skip
"""Names of roles in ShareGPT's shape, beside the usual ones."""
KNOWN = "messages, conversations, prompt and completion, instruction and output, question and answer, text"
READ = (("messages",), ("conversations",), ("prompt", "completion"), ("question", "answer"),
        ("instruction", "output", "input", "history"), ("text",))  # fmt: skip
"""The keys of each shape, in the order in which they are looked for."""
BESIDE = {"references", "facts", "system", "weight"}
IN_TURNS = {"role", "content", "weight", "from", "value"}
SHAPES = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Example:
    """One row: a conversation or a text, and where it stands (`train.jsonl:17`)."""

    messages: tuple[dict[str, str], ...]
    text: str = ""
    where: str = ""
    references: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    silent: tuple[int, ...] = ()
    """Turns that are read and not learnt."""
    unread: tuple[str, ...] = ()
    """Keys of the row and, as `messages.name`, of its turns that are passed over."""

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


def example(row: Any, where: str) -> Example:
    """Make sense of one row.

    Raises:
        UserError: it is of none of the shapes above, or something in it is missing or empty.
    """
    if not isinstance(row, dict):
        raise UserError("This row is not a JSON object.", where=where, remedy=f"A row looks like {SHAPES}")
    given = {key: value for key, value in row.items() if value is not None}
    row = given if shape_of(given) else row  # a table has every column in every row
    _refuse(row, where)
    extras = _strings(row, "references", where), _strings(row, "facts", where)
    turns, system = _turns(row, where), row.get("system")
    if turns is not None:
        if system and system.strip() and isinstance(turns, list):
            turns = [{"role": "system", "content": system}, *turns]
        messages = _messages(turns, where)
        silent = tuple(i for i, turn in enumerate(turns) if turn.get("weight") == 0)
        return Example(messages, "", where, *extras, silent, _unread(row))
    if "text" in row:
        if not isinstance(row["text"], str):
            raise UserError("'text' is no text.", where=where, why=f"It is {_shown(row['text'])}.")
        if system:
            raise UserError("A text has no system prompt.", where=where, remedy="Leave 'system' out.")
        if not row["text"].strip():
            raise UserError("The text is empty.", where=where, remedy="Write some, or drop the row.")
        return Example((), row["text"], where, *extras, (), _unread(row))
    keys = ", ".join(f"{key}: null" if value is None else str(key) for key, value in row.items()) or "none"
    raise UserError(f"This row has none of the keys {KNOWN} (it has: {keys}).", where=where,
                    remedy=f"A row looks like {SHAPES}")  # fmt: skip


def _refuse(row: dict[str, Any], where: str) -> None:
    """What no row of any shape may have."""
    if (key := next((key for key, value in row.items() if _has_half_characters(value)), None)) is not None:
        raise UserError(f"'{key}' holds half a character (a lone surrogate).", where=where,
                        remedy="Write the character whole, or leave it out.")  # fmt: skip
    if str(row.get("weight", 1)) not in ("1", "1.0", "", "None"):
        raise UserError("A weight of single rows is not read.", where=where,
                        remedy="Put the rows into a file of their own, and name it FILE:WEIGHT.")  # fmt: skip
    for key in ("system", "input"):
        if not isinstance(row.get(key, ""), str | None):
            raise UserError(f"'{key}' is no text.", where=where)


def _turns(row: dict[str, Any], where: str) -> Any:
    """The row's conversation as a list of turns, not yet checked; None: it has none."""
    match row:
        case {"messages": turns}:
            return turns
        case {"conversations": list(turns)}:
            return [_spoken(turn) for turn in turns]
        case {"prompt": list(asked), "completion": list(answered)}:
            return [*asked, *answered]
        case {"prompt": asked, "completion": answered} | {"question": asked, "answer": answered}:
            return _pair(asked, answered)
        case {"instruction": str(asked), "output": answered}:
            more = row.get("input") or ""
            before = [turn for pair in _history(row, where) for turn in _pair(*pair)]
            return [*before, *_pair(f"{asked}\n\n{more}" if more.strip() else asked, answered)]
    return None


def _pair(asked: Any, answered: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _history(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    with explained("'history' is no list of pairs.", TypeError, ValueError, where=where, why="",
                   remedy='For example: [["a question", "its answer"]]'):  # fmt: skip
        past = row.get("history") or []
        if not isinstance(past, list) or not all(isinstance(pair, list) for pair in past):
            raise TypeError
        return [(asked, answered) for asked, answered in past]


def _spoken(turn: Any) -> Any:
    """A turn of ShareGPT's shape as one of ours."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    said = turn["from"]
    role = SPOKEN.get(said, said) if isinstance(said, str) else said
    return {"role": role, "content": turn.get("value"), "weight": turn.get("weight")}


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError("'messages' is not a list of turns.", where=where, remedy=f"A row looks like {SHAPES}")
    turns = []
    for i, turn in enumerate(messages, 1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"Turn {i} has the role {role!r}.", where=where, remedy=f"Roles are: {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise UserError(f"Turn {i} ({role}) has no text: its content is {_shown(content)}.", where=where,
                            remedy="Write the text, or drop the row.")  # fmt: skip
        if role == "assistant" and not content.strip():
            raise UserError(f"Turn {i} is an empty answer.", where=where, remedy="Write the answer, or drop the row.")
        if turn.get("weight") not in (None, 0, 1):
            raise UserError(f"Turn {i} has the weight {turn['weight']!r}.", where=where,
                            remedy="A turn is learnt (1, or nothing said) or not (0).")  # fmt: skip
        turns.append({"role": str(role), "content": content})
    return tuple(turns)


def shape_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The keys that are read of a row; none: it is in no known shape."""
    return next((keys for keys in READ if row.keys() >= {*keys[:2]}), ())


def _unread(row: dict[str, Any]) -> tuple[str, ...]:
    known = shape_of(row)
    turns = {f"{key}.{name}" for key in known if isinstance(row.get(key), list)
             for turn in row[key] if isinstance(turn, dict) for name in turn.keys() - IN_TURNS}  # fmt: skip
    return (*(key for key in row if key not in known and key not in BESIDE), *sorted(turns))


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr)


def _has_half_characters(value: Any) -> bool:
    """Whether a text anywhere in a JSON value has a surrogate without its other half, which UTF-8 cannot write."""
    if isinstance(value, str):
        return not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_has_half_characters(part) for part in parts)


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = [] if row.get(key) is None else row[key]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"'{key}' is not a list of texts.", where=where)
    return tuple(value)
