"""Evaluating: sums over all tokens against transformers, grades against answers, and rows that cannot be measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import our_logits, scramble
from small import write_rows
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.api import evaluate as api
from deltaw.api.evaluate import difference, evaluate, label_logits, perplexity
from deltaw.api.persona import Persona, load_base
from deltaw.data.batch import lay, micro_batches
from deltaw.data.encode import encode_all
from deltaw.data.files import read
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.methods import method
from deltaw.models.slots import Slot

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture
def base(tiny_path):
    return load_base(str(tiny_path), "float32", threads=1)


@pytest.fixture
def persona(base):
    return Persona("odd", base, scramble(Adapter.build(method("lora"), base.model).eval()))


@pytest.fixture
def file(tmp_path):
    """Answers of very unequal length."""
    rows = [{"prompt": f"say {n}", "completion": "xyz " * n + "end"} for n in (1, 2, 30, 3)]
    write_rows(tmp_path / "held.jsonl", *rows)
    return tmp_path / "held.jsonl"


def brute_force(hf, rows):
    """Perplexity over all learnt tokens, each row run alone."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = hf(torch.tensor([row.ids])).logits[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
        total += each[torch.tensor(row.trained[1:])].sum().item()
        count += sum(row.trained[1:])
    return math.exp(total / count)


@pytest.mark.parametrize("micro_tokens", [1, 60, 4096])
def test_perplexity_is_the_one_of_transformers_however_rows_are_laid(base, tiny_path, file, micro_tokens):
    rows = encode_all(read(file), base.tokenizer, "answers", 512)[0]
    hf = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    ours = perplexity(base.model, micro_batches(rows, micro_tokens))
    assert ours == pytest.approx(brute_force(hf, rows), rel=1e-5)


def test_rows_that_ask_are_scored_on_their_answers_and_texts_on_everything(base, tiny_path, file, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    report = evaluate(Persona("base", base), file, ["perplexity"])
    rows = encode_all(read(file), base.tokenizer, "answers", 512)[0]
    assert report.scores == {"perplexity": pytest.approx(brute_force(hf, rows), rel=1e-5)}
    write_rows(tmp_path / "texts.jsonl", {"text": "one two three"}, {"text": "four"})
    report = evaluate(Persona("base", base), tmp_path / "texts.jsonl")
    rows = encode_all(read(tmp_path / "texts.jsonl"), base.tokenizer, "all", 512)[0]
    assert report.scores == {"perplexity": pytest.approx(brute_force(hf, rows), rel=1e-5)}
    assert report.graded == ()


def test_a_persona_is_measured_as_it_is_worn_and_its_base_without(persona, file):
    worn, bare = (evaluate(p, file, ["perplexity"]).scores for p in (persona, Persona("base", persona.base)))
    assert worn["perplexity"] != pytest.approx(bare["perplexity"], rel=0.01)
    with persona.on():  # whatever is worn around it
        assert evaluate(Persona("base", persona.base), file, ["perplexity"]).scores == bare
    assert all(slot.delta is None for slot in persona.base.model.modules() if isinstance(slot, Slot))


def test_answers_are_graded_against_any_of_the_right_ones(base, tmp_path, monkeypatch):
    write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completion": "red"},
        {"prompt": "b", "completion": "blue", "references": ["navy", "azure"]},
        {"prompt": "c", "completion": "green"},
    )
    asked = []

    def grade(model, tokenizer, examples, sampling):
        asked.append((len(examples), sampling))
        said = ["red", "azure", "grey"]
        return [api.Graded(a, e.references or (e.answer,), e.facts) for a, e in zip(said, examples, strict=False)]

    monkeypatch.setattr(api, "grade", grade)
    report = evaluate(Persona("base", base), tmp_path / "rows.jsonl", ["exact_match"], sampling=SHORT)
    assert report.scores == {"exact_match": pytest.approx(2 / 3)}
    assert [g.answer for g in report.graded] == ["red", "azure", "grey"]
    report = evaluate(Persona("base", base), tmp_path / "rows.jsonl", ["exact_match"], limit=2)
    assert (report.rows, report.scores) == (2, {"exact_match": 1.0})
    assert asked == [(3, SHORT), (2, Sampling())]


def test_given_answers_are_those_the_persona_gives(persona, file):
    report = evaluate(persona, file, sampling=SHORT)
    assert "perplexity" in report.scores
    assert len(report.scores) > 1
    assert [g.answer for g in report.graded] == [persona.ask(f"say {n}", max_new_tokens=4) for n in (1, 2, 30, 3)]


def test_perplexity_alone_generates_nothing(persona, file, monkeypatch):
    monkeypatch.setattr(api, "grade", None)
    assert evaluate(persona, file, ["perplexity"]).graded == ()


def test_an_unknown_metric_is_refused_with_the_nearest(persona, file):
    with pytest.raises(UserError, match="exact_match"):
        evaluate(persona, file, ["exact_mach"], sampling=SHORT)


def test_rows_that_ask_nothing_cannot_be_graded(base, tmp_path):
    write_rows(tmp_path / "texts.jsonl", {"text": "one two three"})
    with pytest.raises(UserError, match="This row asks nothing") as e:
        evaluate(Persona("base", base), tmp_path / "texts.jsonl", ["exact_match"])
    assert e.value.where == f"{tmp_path}/texts.jsonl:1"


def test_a_comparison_adds_up_over_batches_what_it_would_say_of_all(persona, file):
    rows = encode_all(read(file), persona.base.tokenizer, "answers", 512)[0]
    model = persona.base.model
    befores, afters = [], []
    for row in rows:
        before, labels = label_logits(model, lay([row]))
        with persona.on():
            after, _ = label_logits(model, lay([row]))
        befores.append((before, labels))
        afters.append(after)
        picked = torch.tensor([i for i, t in enumerate(row.trained[1:]) if t])
        torch.testing.assert_close(before, our_logits(model, row.ids)[picked], atol=1e-5, rtol=1e-5)
    each = [(before, after, labels) for (before, labels), after in zip(befores, afters, strict=True)]
    whole = difference(each)
    before, labels, after = torch.cat([b for b, _ in befores]), torch.cat([y for _, y in befores]), torch.cat(afters)
    assert whole.tokens == len(labels) == sum(row.targets for row in rows)
    assert whole.max_logit_difference == pytest.approx((before - after).abs().max().item())
    each += [(before, before.index_fill(0, torch.tensor([0]), torch.nan), labels), (before, before, labels)]
    assert math.isnan(difference(each).max_logit_difference)  # it is not lost among others
    assert whole.top1_agreement == pytest.approx((before.argmax(1) == after.argmax(1)).float().mean().item())
    assert whole.perplexity_before == pytest.approx(F.cross_entropy(before, labels).exp().item(), rel=1e-5)
    assert whole.perplexity_after == pytest.approx(F.cross_entropy(after, labels).exp().item(), rel=1e-5)
    assert whole.perplexity_change == pytest.approx(whole.perplexity_after / whole.perplexity_before - 1)


def test_what_is_cut_or_not_asked_is_counted(base, tmp_path):
    long = {"prompt": "say " + 200 * "much ", "completion": "x"}  # more than the 512 tokens that the model sees
    write_rows(tmp_path / "mixed.jsonl", *[{"prompt": "a", "completion": "b"}] * 3, {"text": "plain"}, long)
    report = evaluate(Persona("base", base), tmp_path / "mixed.jsonl", sampling=SHORT)
    assert (report.rows, len(report.examples), len(report.graded)) == (5, 3, 3)
    cut = sum(not g.whole for g in report.graded)
    assert report.notices == (
        "1 row without a question not asked.",
        "1 row not asked: longer than 512 tokens.",
        f"perplexity: 1 row left out: nothing to learn in their first 512 tokens (the first: {tmp_path}/mixed.jsonl:5)",
        *([f"{cut} of 3 answers cut after 4 tokens (--max-new-tokens)."] if cut else []),
    )


def test_personas_that_see_less_than_their_base_are_compared_on_what_both_see(base, tmp_path):
    prefixed = Persona("prefixed", base, Adapter.build(method("prefix_tuning", tokens=300), base.model).eval())
    write_rows(tmp_path / "held.jsonl", *[{"prompt": "a" * n, "completion": "b" * 9} for n in (250, 1, 100)])
    context = prefixed.context
    assert context == 512 - 300
    mine, theirs = (evaluate(p, tmp_path / "held.jsonl", sampling=SHORT, context=context)
                    for p in (prefixed, Persona("base", base)))  # fmt: skip
    assert [e.answer for e in mine.examples] == [e.answer for e in theirs.examples]
    assert len(mine.graded) == len(theirs.graded) == 2
    assert [n for n in mine.notices if "not asked" in n] == [n for n in theirs.notices if "not asked" in n] != []
    alone = evaluate(Persona("base", base), tmp_path / "held.jsonl", sampling=SHORT)
    assert len(alone.graded) == 3  # by itself it is asked all that it can see


def test_one_text_among_conversations_changes_no_score_of_the_conversations(base, tiny_path, tmp_path):
    asks = [{"prompt": f"say {i}", "completion": "b" * i} for i in range(1, 4)]
    write_rows(tmp_path / "mixed.jsonl", *asks, {"text": "plain"})
    report = evaluate(Persona("base", base), tmp_path / "mixed.jsonl", ["perplexity"])
    rows = read(tmp_path / "mixed.jsonl")
    encoded = [*encode_all(rows[:3], base.tokenizer, "answers", 512)[0],
               *encode_all(rows[3:], base.tokenizer, "all", 512)[0]]  # fmt: skip
    hf = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    assert report.scores == {"perplexity": pytest.approx(brute_force(hf, encoded), rel=1e-5)}


def test_an_answer_that_is_cut_is_counted(persona, file):
    whole = evaluate(persona, file, ["exact_match"], sampling=Sampling(max_new_tokens=400))
    short = evaluate(persona, file, ["exact_match"], sampling=Sampling(max_new_tokens=1))
    assert short.notices == ("4 of 4 answers cut after 1 token (--max-new-tokens).",)
    assert [g.whole for g in whole.graded] == [len(g.answer) < 400 for g in whole.graded]
