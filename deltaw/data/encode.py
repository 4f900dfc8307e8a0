"""A row as ids, with a mark on the tokens that are learnt.

Answers are found by rendering the conversation with the model's own template, up to each answer and past it: what was
added is the answer with its end-of-turn token, and the tokenizer's offsets say which tokens that is. No template needs
to mark its answers, and the mark is checked by decoding.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from deltaw.data.rows import Example
from deltaw.errors import UserError, located
from deltaw.models.tokenizer import Message, Tokenizer
from deltaw.words import some

TrainOn = Literal["answers", "all"]


@dataclass(frozen=True)
class Encoded:
    """Ids of one row; `trained[t]`: the model learns to say token t."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    where: str = ""

    @property
    def targets(self) -> int:
        """How many tokens are learnt; the first has nothing before it to be said from."""
        return sum(self.trained[1:])


class Lost:
    """What is not learnt of some rows as it stands: how many were cut, divided and left out, and the first of each."""

    SAID: ClassVar = {"cut": ("row", "cut to {} tokens"), "divided": ("document", "divided into pieces of {} tokens"),
                      "dropped": ("row", "left out: nothing to learn in their first {} tokens")}  # fmt: skip

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def note(self, what: str, where: str) -> None:
        """Count a row."""
        self.rows[what] += 1
        self.first.setdefault(what, where)

    def notices(self, limit: int) -> list[str]:
        """What a user should know of it, in words."""
        return [f"{some(self.rows[what], noun)} {done.format(f'{limit:,}')} (the first: {self.first[what]})"
                for what, (noun, done) in self.SAID.items() if self.rows[what]]  # fmt: skip


def encode_each(examples: Iterable[Example], tokenizer: Tokenizer, train_on: TrainOn, max_tokens: int, lost: Lost
                ) -> Iterator[Encoded]:  # fmt: skip
    """Encode rows one after another; of those over `max_tokens` documents are divided, and conversations cut.

    Rows that then teach nothing are left out. What becomes of rows is noted in `lost`.

    Raises:
        UserError: no row teaches anything, or an answer cannot be found in what the template rendered.
    """
    first, learnt, longer = "", False, False
    for example in examples:
        first = first or example.where
        with located(example.where):  # a template that refuses a row does not know where it stood
            row = encode(example, tokenizer, train_on)
        over = len(row.ids) > max_tokens
        divided = over and not example.messages and train_on == "all"
        parts = pieces(row, max_tokens, divided)
        if over or not parts:
            lost.note("divided" if divided else "cut" if parts else "dropped", row.where)
        yield from parts
        learnt, longer = learnt or bool(parts), longer or (over and not divided)
    if not learnt:
        within = f" in its first {max_tokens:,} tokens" * longer
        remedy = "Shorten what is asked." if longer else "Rows need an assistant's answer, or take --train-on all."
        raise UserError(f"No row has a token to learn{within}.", where=first, remedy=remedy)


def encode_all(examples: Iterable[Example], tokenizer: Tokenizer, train_on: TrainOn, max_tokens: int
               ) -> tuple[list[Encoded], Lost]:  # fmt: skip
    """All of `encode_each` at once, and what was lost on the way."""
    lost = Lost()
    return list(encode_each(examples, tokenizer, train_on, max_tokens, lost)), lost


def pieces(row: Encoded, max_tokens: int, divided: bool) -> list[Encoded]:
    """A row as stretches of so many tokens, or the first of them; a last one of a single token teaches nothing."""
    parts = [Encoded(row.ids[i : i + max_tokens], row.trained[i : i + max_tokens], row.where)
             for i in range(0, len(row.ids) if divided else 1, max_tokens)]  # fmt: skip
    return [part for part in parts if part.targets]


def encode(example: Example, tokenizer: Tokenizer, train_on: TrainOn = "answers") -> Encoded:
    """Encode one row.

    Raises:
        UserError: an answer cannot be found in what the template rendered.
    """
    if train_on == "all" and example.silent:
        raise UserError(f"Turn {example.silent[0] + 1} is of weight 0, and every token is to be learnt.",
                        where=example.where, remedy="Take --train-on answers, or no weight.")  # fmt: skip
    if train_on == "all" or not example.messages:
        ids = (tokenizer.encode(tokenizer.chat(example.messages)) if example.messages else
               [*tokenizer.begin_ids, *tokenizer.encode(example.text), *_end_of(tokenizer, example.where)])  # fmt: skip
        return Encoded(tuple(ids), (train_on == "all",) * len(ids), example.where)
    text, spans = answer_spans(example, tokenizer)
    ids, offsets = tokenizer.encode_with_offsets(text)
    across = any(a < edge < b for a, b in offsets for span in spans for edge in span)
    trained = [any(start <= a and b <= stop and a < b for start, stop in spans) for a, b in offsets]
    learnt = tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
    if across or learnt != "".join(text[start:stop] for start, stop in spans):
        # Where a token lies across an answer's edge: in use the prompt is encoded alone, so the row is too.
        return _in_pieces(text, spans, tokenizer, example.where)
    return Encoded(tuple(ids), tuple(trained), example.where)


def answer_spans(example: Example, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Render the conversation, and say where its answers stand in it, each with its end-of-turn token."""
    whole = tokenizer.chat(example.messages)
    spans: list[tuple[int, int]] = []
    for i, turn in enumerate(example.messages):
        if turn["role"] != "assistant" or i in example.silent:
            continue
        before = tokenizer.chat(example.messages[:i], prompt=True)
        after = tokenizer.chat(example.messages[: i + 1])
        if whole.startswith(before) and whole.startswith(after):
            start, stop = len(before), _turn_end(after, len(before), tokenizer)
        else:  # the template renders earlier turns in another way once there are later ones
            start, stop = _searched(whole, example.messages, i, tokenizer)
        if start < 0 or turn["content"].strip() not in whole[start:stop]:
            raise UserError(f"The answer in turn {i + 1} is not in what the model's template renders.",
                            where=example.where, remedy="Take --train-on all, or another model.")  # fmt: skip
        spans.append((start, stop))
    return whole, spans


def _turn_end(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Where the turn's end-of-turn token stops: what follows it (a line break, as a rule) is never said in use."""
    ends = [text.rfind(end, start) + len(end) for end in _end_texts(tokenizer) if text.rfind(end, start) >= 0]
    return max(ends, default=len(text))


def _searched(whole: str, messages: Sequence[Message], i: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Where turn i stands in the rendered whole: render once more with a mark in its place, and compare."""
    mark = "\ue000answer\ue001"
    other = tokenizer.chat([*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]])
    start = other.find(mark)
    stop = len(whole) - (len(other) - start - len(mark))
    if start < 0 or whole[:start] != other[:start] or whole[stop:] != other[start + len(mark) :]:
        return -1, -1
    following = next((end for end in _end_texts(tokenizer) if whole.startswith(end, stop)), "")
    return start, stop + len(following)


def _in_pieces(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer, where: str) -> Encoded:
    ids, trained = list[int](), list[bool]()
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for i, (a, b) in enumerate(pairwise(edges)):
        piece = tokenizer.encode(text[a:b])
        if i % 2 and tokenizer.decode(piece) != text[a:b]:
            raise UserError("An answer changes when it is encoded and decoded.", where=where,
                            why=f"It reads {text[a:b][:40]!r}.")  # fmt: skip
        ids += piece
        trained += [i % 2 == 1] * len(piece)
    return Encoded(tuple(ids), tuple(trained), where)


def _end_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([i]) for i in sorted(tokenizer.end_ids)]


def _end_of(tokenizer: Tokenizer, where: str) -> list[int]:
    if not tokenizer.end_ids:
        raise UserError("This model's tokenizer has no end-of-text token.", where=where)
    eos = tokenizer.specials.get("eos_token")
    ids = [] if eos is None else tokenizer.encode(eos)
    return ids if len(ids) == 1 else [min(tokenizer.end_ids)]
