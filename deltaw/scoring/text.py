"""Metrics over generated answers: what they mean, which of them suit given rows, and their values."""

import importlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

from deltaw.errors import UserError, explained, nearest

INTENT = "intent"
SHORT = 3  # words: a label has at most as many, prose has more
LABEL_ROWS = 20
ROUGE_READS = re.compile("[A-Za-z0-9]")


@dataclass(frozen=True)
class Graded:
    """One generated answer and what it is judged by."""

    answer: str
    references: tuple[str, ...]
    facts: tuple[str, ...] = ()
    """What a right answer names; alternatives within a fact are separated by `|`."""
    whole: bool = True
    """Whether the model ended the answer itself; false: it was cut at the longest length allowed."""


def share(right: Callable[[Graded], bool]) -> Callable[[Sequence[Graded]], float]:
    """The metric that is the share of answers that are right, 0 to 1."""
    return lambda rows: sum(map(right, rows)) / len(rows)


def facts(row: Graded) -> bool:
    """Whether all facts occur in the answer as whole words, whatever their case (`5` occurs in `5:30`)."""
    text = f" {_folded(row.answer)} "
    return all(any(_occurs(words, text) for words in _alternatives(fact)) for fact in row.facts)


def exact_match(row: Graded) -> bool:
    """Whether the answer equals a reference but for white space around them."""
    return row.answer.strip() in {r.strip() for r in row.references}


def sacrebleu(kind: str, rows: Sequence[Graded]) -> float:
    """Corpus `bleu` (Papineni et al. 2002) or `chrf` (Popović 2015) with sacrebleu's defaults (Post 2018), 0 to 100.

    Raises:
        UserError: sacrebleu is not installed.
    """
    # One stream holds the rows' first references, the next their second ones, ...; sacrebleu leaves out a None.
    streams = list(zip_longest(*(row.references for row in rows)))
    quiet = {"force": True} if kind == "bleu" else {}  # no warning about answers that look tokenized
    found = getattr(_optional("sacrebleu"), f"corpus_{kind}")([row.answer for row in rows], streams, **quiet)
    return min(100.0, float(found.score))  # a perfect BLEU can round to a hair above 100


def rouge(kind: str, rows: Sequence[Graded]) -> float:
    """Mean over rows of the best reference's ROUGE F-measure, without stemming, 0 to 1 (Lin 2004).

    Raises:
        UserError: rouge-score is not installed.
    """
    scorer = _optional("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)
    best = (scorer.score_multi(row.references, row.answer)[kind].fmeasure for row in rows)
    return math.fsum(best) / len(rows)


def json_valid(row: Graded) -> bool:
    """Whether the answer is a JSON object or array and nothing else."""
    return _parsed(row.answer) is not None


def slot_f1(rows: Sequence[Graded]) -> float:
    """Micro-averaged F1 over the (key, value) pairs but the intent, each row against its closest reference, 0 to 1."""
    hits = pairs = 0
    for row in rows:
        said = _pairs(row.answer)
        counts = [(len(said & asked), len(said) + len(asked)) for asked in map(_pairs, row.references)]
        best = max(counts, key=lambda count: _f1(*count))
        hits, pairs = hits + best[0], pairs + best[1]
    return _f1(hits, pairs)


def intent(row: Graded) -> bool:
    """Whether the answer's JSON `intent` is that of a reference."""
    told = _object(row.answer)
    return INTENT in told and told[INTENT] in [_object(text).get(INTENT) for text in row.references]


def label_accuracy(row: Graded) -> bool:
    """Whether the answer equals a reference but for case, white space around them and a final period."""
    return _label(row.answer) in {_label(r) for r in row.references}


class Metric(NamedTuple):
    """A score, what it says in a few words, and what it asks of each right answer of a row, or of each fact."""

    of: Callable[[Sequence[Graded]], float]
    says: str
    asks: Callable[[str], object] = lambda _: True
    lack: str = "has no reference"
    """What is said of a row that does not have it."""


METRICS = {
    "facts": Metric(share(facts), "share of answers with all the right facts", lambda fact: _alternatives(fact),
                    "names no facts, or an empty one"),
    "exact_match": Metric(share(exact_match), "share of answers that are a right one"),
    "bleu": Metric(partial(sacrebleu, "bleu"), "likeness to right answers, 0 to 100"),
    "chrf": Metric(partial(sacrebleu, "chrf"), "likeness in letters, 0 to 100"),
    **{kind: Metric(partial(rouge, kind), "likeness to right answers, 0 to 1")
       for kind in ("rouge1", "rouge2", "rougeL")},
    "json_valid": Metric(share(json_valid), "share of answers that are JSON"),
    "slot_f1": Metric(slot_f1, "slots found and right, 0 to 1", lambda text: _is_object(text),
                      "has no reference, or one that is no JSON object"),
    "intent": Metric(share(intent), "share of answers with the right intent", lambda text: INTENT in _object(text),
                     "has no reference, or one that is no JSON with an intent"),
    "label_accuracy": Metric(share(label_accuracy), "share of answers with the right label"),
}  # fmt: skip
MEANINGS = {"perplexity": "of the right answers; lower is better",
            **{name: metric.says for name, metric in METRICS.items()}}  # fmt: skip


def suits(rows: Sequence[Graded]) -> list[str]:
    """Name the metrics that make sense for these rows by default, in the order of `METRICS`; `score` can give each."""
    wanted = {"facts", "exact_match", "slot_f1", "intent"}
    if 2 * sum(_judged(row.references, _is_prose) for row in rows) > len(rows):
        wanted |= {"bleu", "chrf"}
        if all(_judged(row.references, ROUGE_READS.search) for row in rows):
            wanted.add("rougeL")
    if all(_judged(row.references, _is_object) for row in rows):
        wanted.add("json_valid")
    labels = {_label(text) for row in rows for text in row.references}
    few = len(rows) >= LABEL_ROWS and 3 * len(labels) <= len(rows)
    if few and all(len(text.split()) <= SHORT for text in labels):
        wanted.add("label_accuracy")
    return [name for name in METRICS if rows and name in wanted and not _obstacle(name, rows)]


def score(rows: Sequence[Graded], names: Sequence[str] | None = None) -> dict[str, float]:
    """Compute the named metrics, or those that suit the rows: shares in 0 to 1, BLEU and chrF in 0 to 100.

    Raises:
        UserError: no rows, an unknown metric, one that these rows cannot give, or one whose package is not installed.
    """
    if not rows:
        raise UserError("There are no answers to score.")
    chosen = suits(rows) if names is None else names
    if not chosen:
        raise UserError("There is nothing to score these answers by.",
                        why="Every row needs references, or every row facts.")  # fmt: skip
    check(chosen)
    for name in chosen:
        if why := _obstacle(name, rows):
            raise UserError(f"These rows cannot give the metric '{name}'.", why=why)
    return {name: METRICS[name].of(rows) for name in chosen}


def check(names: Sequence[str]) -> None:
    """Refuse names of metrics that there are not.

    Raises:
        UserError: an unknown metric, with the nearest known one.
    """
    if (odd := next((name for name in names if name not in METRICS), None)) is not None:
        raise UserError(f"There is no metric '{odd}'.", remedy=nearest(odd, MEANINGS))


def _obstacle(name: str, rows: Sequence[Graded]) -> str:
    """Why these rows cannot give a metric; empty if they can."""
    if name == "json_valid":
        return ""
    for number, row in enumerate(rows, 1):
        if not _judged(row.facts if name == "facts" else row.references, METRICS[name].asks):
            return f"Row {number} {METRICS[name].lack}."
    references = [text for row in rows for text in row.references]
    if name == "slot_f1" and not any(map(_pairs, references)):
        return "No reference has a key beside the intent."
    if name.startswith("rouge") and not any(map(ROUGE_READS.search, references)):
        return "ROUGE reads only the letters a to z and digits, and the references have none."
    return ""


def _judged(judges: Sequence[str], test: Callable[[str], object]) -> bool:
    return bool(judges) and all(map(test, judges))


def _f1(hits: int, pairs: int) -> float:
    return 2 * hits / pairs if pairs else 1.0  # nothing asked and nothing said is right


def _optional(module: str) -> Any:
    with explained("This metric's package is missing.", ImportError, why="{error}.",
                   remedy="pip install sacrebleu rouge-score"):  # fmt: skip
        return importlib.import_module(module)


def _parsed(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that the whole text is, or None."""
    try:
        value = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which are no JSON
    except (ValueError, RecursionError):  # a model that repeats itself can nest thousands of brackets
        return None
    return value if isinstance(value, dict | list) else None


def _object(text: str) -> dict[str, Any]:
    value = _parsed(text)
    return value if isinstance(value, dict) else {}


def _pairs(text: str) -> set[tuple[str, str]]:
    return {(key, _value(value)) for key, value in _object(text).items() if key != INTENT}


def _value(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)).strip().lower()


def _label(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def _alternatives(fact: str) -> list[str]:
    return [words for words in map(_folded, fact.split("|")) if words]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def _occurs(words: str, text: str) -> bool:
    """Whether `words` occur in a text with spaces around it, and no end of theirs cuts a word of the text."""
    places = (found.span(1) for found in re.finditer(f"(?=({re.escape(words)}))", text))
    return any(not any(_inside_word(text[end - 1 : end + 1]) for end in place) for place in places)


def _inside_word(two: str) -> bool:
    # Marks count: regular expressions see a word's end before each vowel sign of Hindi or Thai.
    return all(c.isalnum() or c == "_" or unicodedata.category(c).startswith("M") for c in two)


def _is_object(text: str) -> bool:
    return isinstance(_parsed(text), dict)


def _is_prose(text: str) -> bool:
    return len(text.split()) > SHORT and _parsed(text) is None
