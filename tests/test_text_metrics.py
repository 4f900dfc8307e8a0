"""Metrics over answers against sacrebleu, rouge_score, counts by hand and brute force."""

from __future__ import annotations

import json
import re
import sys
from itertools import permutations

import pytest
import sacrebleu
from hypothesis import given, settings, strategies as st
from rouge_score.rouge_scorer import RougeScorer

from deltaw.errors import UserError
from deltaw.scoring.text import METRICS, Graded, score, suits

CATS = [
    Graded("the cat sat on a mat today", ("the cat sat on the mat", "a cat was sitting on a mat today")),
    Graded("it is raining in the hills", ("it rains in the hills of the north",)),
    Graded("no idea what this is about", ("who knows what this is", "no idea", "nobody knows what it is about")),
]
NONE_PADDED = [
    [CATS[0].references[0], CATS[1].references[0], CATS[2].references[0]],
    [CATS[0].references[1], None, CATS[2].references[1]],
    [None, None, CATS[2].references[2]],
]
TOP = {name: 100 if name in ("bleu", "chrf") else 1 for name in METRICS}


def graded(answer: str, *references: str, facts: tuple[str, ...] = ()) -> Graded:
    return Graded(answer, references, facts)


def one(name: str, answer: str, *references: str, facts: tuple[str, ...] = ()) -> float:
    return score([graded(answer, *references, facts=facts)], [name])[name]


def test_bleu_and_chrf_are_sacrebleus_corpus_scores() -> None:
    got, answers = score(CATS, ["bleu", "chrf"]), [row.answer for row in CATS]
    bleu, chrf = sacrebleu.corpus_bleu(answers, NONE_PADDED), sacrebleu.corpus_chrf(answers, NONE_PADDED)
    assert got == pytest.approx({"bleu": bleu.score, "chrf": chrf.score}, abs=1e-12)
    assert all(10 < value < 90 for value in got.values())
    assert one("bleu", "a b c d e", "a b c d e") == 100 < sacrebleu.corpus_bleu(["a b c d e"], [["a b c d e"]]).score


@pytest.mark.parametrize("row", CATS)
def test_one_row_agrees_with_the_sentence_scores(row: Graded) -> None:
    bleu = sacrebleu.sentence_bleu(row.answer, list(row.references), use_effective_order=False)
    chrf = sacrebleu.sentence_chrf(row.answer, list(row.references))
    assert score([row], ["bleu", "chrf"]) == pytest.approx({"bleu": bleu.score, "chrf": chrf.score}, abs=1e-12)


def test_a_missing_reference_is_neither_an_empty_one_nor_a_repeated_neighbour() -> None:
    rows = [graded("a b c d", "a b c d e f g h"), graded("k l m n o", "k l m n p", "k l x n o p q")]
    # The same reference twice is the padding that cannot change a score; an empty one is nearer to the answer's length.
    doubled = [graded("a b c d", *2 * rows[0].references), rows[1]]
    emptied = [graded("a b c d", *rows[0].references, ""), rows[1]]
    assert score(rows, ["bleu", "chrf"]) == score(doubled, ["bleu", "chrf"])
    assert score(rows, ["bleu"])["bleu"] < score(emptied, ["bleu"])["bleu"] - 1


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_the_best_f_measures(kind: str) -> None:
    scorer = RougeScorer([kind], use_stemmer=False)
    best = [max(scorer.score(ref, row.answer)[kind].fmeasure for ref in row.references) for row in CATS]
    assert score(CATS, [kind])[kind] == pytest.approx(sum(best) / 3, abs=1e-15)
    assert 0 < sum(best) < 3


def test_rouge_by_hand_and_without_a_stemmer() -> None:
    got = score([graded("a b c x", "a b c d")], ["rouge1", "rouge2", "rougeL"])
    assert got == pytest.approx({"rouge1": 3 / 4, "rouge2": 2 / 3, "rougeL": 3 / 4})
    assert one("rouge1", "walking", "walked") == 0


@pytest.mark.parametrize(("fact", "answer"), [
    ("ten", "Often, but only ten times"), ("ten", "TEN."), ("ten|10", "There are 10 of them"), ("C++", "C++ and more"),
    ("6:30", "We open at 6:30."), ("St. Ann's", "by ST. ANN'S"), ("St. Ann's", "St.\n Ann's church"), ("(a)", "f(a)b"),
    ("straße", "in der STRASSE"), ("Ёлка", "это ёлка!"), ("caf\u00e9", "the cafe\u0301 there"), ("कल", "कल मिलेंगे"),
])  # fmt: skip
def test_a_fact_that_occurs(fact: str, answer: str) -> None:
    assert one("facts", answer, facts=(fact,)) == 1


@pytest.mark.parametrize(("fact", "answer"), [
    ("ten", "It happens often."), ("ten", "tens"), ("ten", "ten_years"), ("ten | 10", "There are 100"), ("a.c", "abc"),
    ("6:30", "We open at 16:30."), ("6:30", "at 6:300."), ("St. Ann's", "Sta Ann's"), ("St. Ann's", "West. Ann's"),
    ("straße", "in der BERGSTRASSE"), ("cafe", "the cafe\u0301 there"), ("कल", "कला"), ("x", ""),
])  # fmt: skip
def test_a_fact_that_does_not_occur(fact: str, answer: str) -> None:
    assert one("facts", answer, facts=(fact,)) == 0


def test_every_fact_must_occur() -> None:
    rows = [graded("Anna and Bo at nine", facts=("anna|anne", "bo", "9|nine")), graded("Anna", facts=("anna", "bo"))]
    assert score(rows, ["facts"]) == {"facts": 1 / 2}


@given(st.text("aA1_ .", max_size=12), st.from_regex(r"[a1_]([a1_ .]{0,2}[a1_])?", fullmatch=True))
def test_facts_agree_with_a_regular_expression(answer: str, fact: str) -> None:
    spaced = r"\s+".join(map(re.escape, fact.split()))
    found = re.search(rf"(?<!\w){spaced}(?!\w)", answer, re.IGNORECASE) is not None
    assert one("facts", answer, facts=(fact,)) == found


def test_json_valid() -> None:
    good = ['{"a": 1}', " [] \n", '{"a": {"b": [null, true, 1.5e3]}}']
    bad = ["1", '"a"', "null", "", '{"a": 1', '{"a": NaN}', "[-Infinity]", "{} and more", "[" * 100_000]
    assert [one("json_valid", answer) for answer in good + bad] == [1] * len(good) + [0] * len(bad)


def test_deep_nesting_never_stops_the_scoring() -> None:
    for depth in [*range(900, 1010), 100_000]:
        for left, right in (("[", "]"), ('{"a":', "}")):
            assert one("slot_f1", '{"a": ' + left * depth + "1" + right * depth + "}", '{"a": 1}') == 0


def test_slot_f1_by_hand_and_by_the_closest_reference() -> None:
    rows = [
        # 2 hits of 3 said and 2 asked: case, white space, a number as text; the intent is no slot
        graded('{"intent": "x", "city": " BERLIN ", "n": "2", "z": 1}', '{"intent": "y", "city": "Berlin", "n": 2}'),
        # 1 hit of 2 said and 3 asked: nested values do not depend on the order of keys
        graded('{"t": {"b": [1], "a": 2}, "u": [1, 2]}', '{"t": {"a": 2, "b": [1]}, "u": [2, 1], "v": null}'),
        # nothing said: unparsable, or an array; 1 asked each
        graded("city = Rome", '{"city": "Rome"}'),
        graded('["city"]', '{"city": "city"}'),
    ]
    precision, recall = 3 / 5, 3 / 7
    assert score(rows, ["slot_f1"])["slot_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert one("slot_f1", '{"a": 1, "b": 2}', '{"a": 1}', '{"a": 1, "b": 2}', '{"a": 3}') == 1
    assert one("slot_f1", '{"a": 1, "b": 2}', '{"a": 1, "c": 3}', '{"a": 1}') == pytest.approx(2 / 3)


OBJECTS = st.dictionaries(st.sampled_from(["intent", "a", "b", "c"]), st.sampled_from(["x", "X ", "y", 1, None, ["x"]]))


@given(st.lists(st.tuples(OBJECTS, OBJECTS), min_size=1, max_size=6))
def test_slot_f1_agrees_with_brute_force(pairs: list[tuple[dict[str, object], dict[str, object]]]) -> None:
    rows = [graded(json.dumps(said), json.dumps(asked)) for said, asked in [*pairs, ({"a": "x"}, {"a": "x"})]]
    hits, false, missed = 1, 0, 0
    for said, asked in pairs:
        for key in ("a", "b", "c"):
            told, wanted = (str(side[key]).strip().lower() if key in side else None for side in (said, asked))
            hits += told is not None and told == wanted
            false += told is not None and told != wanted
            missed += wanted is not None and told != wanted
    assert score(rows, ["slot_f1"])["slot_f1"] == pytest.approx(hits / (hits + (false + missed) / 2))


def test_intent() -> None:
    right = [('{"intent": "a", "x": 1}', '{"intent": "a"}'), ('{"intent": "b"}', '{"intent": "a"}', '{"intent": "b"}')]
    wrong = [('{"intent": "A"}', '{"intent": "a"}'), ('{"x": 1}', '{"intent": null}'), ("a", '{"intent": "a"}')]
    assert [one("intent", *case) for case in right + wrong] == [1, 1, 0, 0, 0]


def test_exact_match_and_label_accuracy() -> None:
    cases = [(" of course\n", "yes", "of course "), ("yes.", "Yes"), ("Yes .", "YES"), ("yes..", "yes"), ("no", "yes")]
    assert [one("exact_match", *case) for case in cases] == [1, 0, 0, 0, 0]
    assert [one("label_accuracy", *case) for case in cases] == [1, 1, 1, 0, 0]


def labels(count: int, *names: str) -> list[Graded]:
    return [graded("?", names[i % len(names)]) for i in range(count)]


@pytest.mark.parametrize(("rows", "names"), [
    (CATS[:2], "exact_match bleu chrf rougeL"),
    ([*CATS[:2], graded("?", "Yes.")], "exact_match bleu chrf rougeL"),
    ([*CATS[:2], graded("?", "Yes."), graded("?", "No.")], "exact_match"),
    ([graded("?", "в лесу родилась ёлочка зимой")], "exact_match bleu chrf"),
    ([graded("?", "just three words")], "exact_match"),
    ([graded("?", "a", facts=("x",))], "facts exact_match"),
    ([graded("?", "a", facts=("x",)), graded("?", "a")], "exact_match"),
    ([graded("?", facts=("x",))], "facts"),
    ([graded("?", '{"intent": "a", "b": 1}')], "exact_match json_valid slot_f1 intent"),
    ([graded("?", '{"a": 1, "b": 2, "c": "d e"}')], "exact_match json_valid slot_f1"),
    ([graded("?", '{"intent": "a"}')], "exact_match json_valid intent"),
    ([graded("?", '{"a": 1}'), graded("?", "[1, 2, 3, 4]")], "exact_match"),
    (labels(20, *"abcde", "so so maybe"), "exact_match label_accuracy"), (labels(20, *"abcdefg"), "exact_match"),
    (labels(19, "good", "bad"), "exact_match"), (labels(20, "good", "not so very bad"), "exact_match"),
])  # fmt: skip
def test_suits(rows: list[Graded], names: str) -> None:
    assert suits(rows) == list(score(rows)) == names.split()


def test_nothing_to_score_or_to_score_by_or_no_such_metric() -> None:
    assert suits([]) == []
    with pytest.raises(UserError, match="no answers"):
        score([])
    with pytest.raises(UserError, match="nothing to score"):
        score([graded("a", "b"), graded("a", facts=("x",))])
    with pytest.raises(UserError, match=r"'blue'.*Did you mean 'bleu'"):
        score(CATS, ["blue"])
    with pytest.raises(UserError, match="only the letters a to z"):
        score([graded("да", "да")], ["rouge1"])
    with pytest.raises(UserError, match="beside the intent"):
        score([graded("{}", '{"intent": "a"}')], ["slot_f1"])


@pytest.mark.parametrize(("name", "bad", "why"), [
    ("facts", graded("a", "b"), "names no facts"), ("facts", graded("a", facts=("x", " | ")), "names no facts"),
    ("slot_f1", graded("a", "b"), "no JSON object"), ("slot_f1", graded("a", '{"a": 1}', "[1]"), "no JSON object"),
    ("intent", graded("a", '{"a": 1}'), "intent"), *[(n, graded("a"), "no reference") for n in ("bleu", "rougeL")],
])  # fmt: skip
def test_a_row_that_cannot_give_a_metric_is_named(name: str, bad: Graded, why: str) -> None:
    good = graded("a", '{"intent": "i", "a": 1}', facts=("x",))
    assert list(score([good], [name])) == [name]
    with pytest.raises(UserError, match=f"'{name}'.*Row 2 .*{why}"):
        score([good, bad], [name])


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu"), ("rouge2", "rouge_score.rouge_scorer")])
def test_a_missing_package_has_a_remedy(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=module) as error:
        score(CATS, [name])
    assert error.value.remedy == "pip install sacrebleu rouge-score"
    assert score(CATS, ["exact_match"]) == {"exact_match": 0}


SENTENCES = st.lists(st.sampled_from(["the", "Ten", "6:30", "Ёлка", "yes", "x."]), min_size=1, max_size=7).map(" ".join)
REFERENCES = st.sampled_from([(SENTENCES, 1), (OBJECTS.map(json.dumps), 1), (st.sampled_from(["yes", "No."]), 20)])


@settings(deadline=None)
@given(st.data())
def test_perfect_answers_score_the_maximum(data: st.DataObject) -> None:
    texts, least = data.draw(REFERENCES)
    rows = []
    for references in data.draw(st.lists(st.lists(texts, min_size=1, max_size=3), min_size=least, max_size=least + 5)):
        answer = data.draw(st.sampled_from(references))
        rows.append(graded(answer, *references, facts=(data.draw(st.sampled_from(answer.split())), answer)))
    got = score(rows)
    assert {"facts", "exact_match"} <= set(got)
    assert got == pytest.approx({name: TOP[name] for name in got}, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(SENTENCES, st.text(max_size=9)), OBJECTS, OBJECTS), min_size=1, max_size=3))
def test_range_and_order_of_rows(cases: list[tuple[str, dict[str, object], dict[str, object]]]) -> None:
    rows = [graded('{"a": 1}', '{"intent": 1, "a": 1}', facts=("x",))]
    for i, (text, said, asked) in enumerate(cases):
        answer, reference = text if i % 2 else json.dumps(said), json.dumps({"intent": 0, **asked})
        rows.append(graded(answer, reference, facts=("ten", "6:30|the")))
    got = score(rows, list(METRICS))
    assert all(0 <= got[name] <= TOP[name] for name in METRICS)
    for mixed in permutations(rows):
        assert (score(mixed, list(METRICS)), suits(mixed)) == (got, suits(rows))
