"""The sample data keeps its promises: enough rows, paraphrases that are never trained on, facts that answers name."""

import json
import re

import pytest
from conftest import VILLAGE

from deltaw.data.files import read
from deltaw.scoring.text import Graded, score

TRAIN, VAL = (read(VILLAGE / f"{name}.jsonl") for name in ("train", "val"))


def plain(question):
    return re.sub(r"[^\w ]", "", question.lower()).split()


def test_there_are_enough_rows_and_every_fact_asked_about_is_taught():
    assert len(TRAIN) >= 300
    taught = {e.facts for e in TRAIN}
    assert all(e.facts in taught for e in VAL)
    assert len(VAL) >= 100


def test_no_validation_row_is_trained_on_not_even_in_other_spelling():
    asked = {tuple(plain(e.prompt[-1]["content"])) for e in TRAIN}
    assert not [e.where for e in VAL if tuple(plain(e.prompt[-1]["content"])) in asked]
    lines = set((VILLAGE / "train.jsonl").read_text().splitlines())
    assert not lines & set((VILLAGE / "val.jsonl").read_text().splitlines())


def test_a_validation_question_is_a_paraphrase_and_no_copy_with_a_word_changed():
    by_fact = {}
    for e in TRAIN:
        by_fact.setdefault(e.facts, []).append(set(plain(e.prompt[-1]["content"])))
    for e in VAL:
        words = set(plain(e.prompt[-1]["content"]))
        assert max(len(words & w) / len(words | w) for w in by_fact[e.facts]) < 0.7, e.where


@pytest.mark.parametrize("rows", [TRAIN, VAL], ids=["train", "val"])
def test_answers_name_their_facts_and_questions_do_not(rows):
    assert score([Graded(e.answer, (e.answer,), e.facts) for e in rows], ["facts"]) == {"facts": 1.0}
    for e in rows:
        for fact in e.facts:
            named = score([Graded(e.prompt[-1]["content"], (e.answer,), (fact,))], ["facts"])["facts"]
            assert named == 0, f"{e.where}: {fact}"


def test_rows_hold_nothing_but_messages_and_facts():
    for name in ("train", "val"):
        for line in (VILLAGE / f"{name}.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == {"messages", "facts"}
