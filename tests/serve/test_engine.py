"""Personas of all techniques in one batch: each says what it says by itself, whatever else is there."""

import pytest
import torch
from conftest import write_tiny
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracles import our_logits, scramble
from serve.integrity import check
from variants import CASES

from deltaw.adapters.adapter import Adapter
from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.slots import Linear
from deltaw.serve.engine import Engine
from deltaw.serve.sequence import Sequence
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served

TIE = 1e-4
"""Logits nearer than this may change places, as sums are rounded in another order."""
ENDS = frozenset({257})
GREEDY = Sampling(max_new_tokens=12)
MEGABYTE = 1 << 20
TIGHT = 12 * (2 * 2 * 32 * 32 * 4)
"""Twelve pages."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose heads are wide enough for native code."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def personas(model):
    """An adapter of every kind, and none."""
    made = {"base-0": None}
    for i, case in enumerate(CASES):
        name, chosen = case.values
        made[case.id] = scramble(Adapter.build(method(name, **chosen), model, seed=i).eval(), seed=i)
    return made


@pytest.fixture(scope="module")
def served(model, personas):
    return {name: Served.of(adapter, model) for name, adapter in personas.items() if adapter is not None}


def prompt(seed, length):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def entry(name, served):
    """One that is there already."""
    return Entry(name, name.encode(), None, served)


def asking(ids, name, served, sampling=GREEDY):
    return Sequence(tuple(ids), sampling, ENDS, ((entry(name, served[name]), 1.0),) if name in served else ())


def alone(model, adapter, ids, sampling=GREEDY):
    """What is said without a server."""
    with model_as(model, adapter):
        return [token for step in generate(model, [ids], sampling, set(ENDS)) for _, token in step]


def model_as(model, adapter):
    return torch.no_grad() if adapter is None else adapter.on()


def ties(model, adapter, sequence):
    """0: the tokens are those that are said without a server; 1: but for one that was as likely; else an error."""
    want, got = alone(model, adapter, list(sequence.asked), sequence.sampling), sequence.said
    if want == got:
        return 0
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    with model_as(model, adapter), torch.no_grad():
        best, second = our_logits(model, [*sequence.asked, *want[:at]])[-1].topk(2).values
    assert best - second < TIE, (want, got)
    return 1


def run(engine):
    while engine.step():
        check(engine)
    assert not engine.arena.held
    assert not engine.running
    assert not engine.waiting


@pytest.mark.parametrize(("budget", "most", "chunk"), [(8 * MEGABYTE, 80, 256), (8 * MEGABYTE, 9, 7), (TIGHT, 80, 64)])
def test_all_techniques_in_one_batch_say_what_each_says_alone(model, personas, served, budget, most, chunk):
    """Together; a few, with prompts in pieces; and with too little room, so that some are sent back to wait."""
    engine, names, sent = Engine(model, budget, most, chunk), [*personas] * 2, set()
    asked = [asking(prompt(i % 5, 20 + 9 * i % 70), name, served) for i, name in enumerate(names)]
    for sequence in asked:
        engine.submit(sequence)
    while engine.step():
        check(engine)
        sent.update(sequence for sequence in engine.waiting if sequence.said)
    run(engine)
    assert sum(ties(model, personas[name], s) for name, s in zip(names, asked, strict=True)) <= 3
    assert bool(sent) == (budget == TIGHT)
    assert len({tuple(s.said) for s in asked}) > 20


def test_most_techniques_share_a_batch_and_the_others_are_worn_by_themselves(served):
    apart = {name for name, each in served.items() if each.alone is not None}
    never = {"full", "loftq", "lq_lora", "long_lora"}
    assert {name.rsplit("-", 1)[0] for name in apart} >= never
    assert {name for name in apart if name.rsplit("-", 1)[0] not in never} == {
        "lora_fa-3",  # trains a norm beside
        "glora-1",  # W times a matrix
        "prefix_tuning-2",  # behind a gate
    }


def test_a_step_goes_through_the_model_once_for_all_who_share_and_once_for_each_who_does_not(
    model, served, monkeypatch
):
    engine, rows = Engine(model, 8 * MEGABYTE), []
    forward = engine.model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids_T, *more: rows.append(len(ids_T)) or forward(ids_T, *more))
    for name in ("base-0", "lora-0", "dora-0", "prefix_tuning-0", "full-0", "loftq-0"):
        engine.submit(asking(prompt(1, 10), name, served))
    engine.step()
    assert sorted(rows) == [10, 10, 40]


def test_who_begins_alike_shares_pages_and_who_wears_something_else_does_not(model, personas, served):
    engine, ids = Engine(model, 8 * MEGABYTE), prompt(3, 100)
    first = asking(ids, "lora-0", served)
    engine.submit(first)
    run(engine)
    again, other = asking(ids[:70], "lora-0", served), asking(ids, "dora-0", served)
    for sequence in again, other:
        engine.submit(sequence)
    engine.plan()
    assert (again.known, other.known) == (64, 0)
    engine.end(again, "abort"), engine.end(other, "abort")
    exact = asking(ids[:64], "lora-0", served)  # of which all is known, but the last token's outputs are needed
    engine.submit(exact)
    run(engine)
    assert ties(model, personas["lora-0"], exact) <= 1


@pytest.mark.parametrize("tokens", [5, 32, 40])
@pytest.mark.parametrize("chunk", [7, 30, 256])
def test_a_prefix_takes_places_wherever_pages_and_pieces_end(model, tokens, chunk):
    adapter = scramble(Adapter.build(method("prefix_tuning", tokens=tokens), model).eval(), 0.5)
    served, engine = {"p": Served.of(adapter, model)}, Engine(model, 8 * MEGABYTE, chunk=chunk)
    asked = [asking(prompt(3, n), "p", served) for n in (1, 24, 27, 59, 60, 61)]
    for sequence in asked:
        engine.submit(sequence)
    run(engine)
    assert sum(ties(model, adapter, sequence) for sequence in asked) <= 1
    again = asking(asked[-1].asked, "p", served)
    engine.submit(again)
    engine.plan()
    assert again.known >= tokens // 32 * 32 + 32
    engine.end(again, "abort")


@pytest.mark.parametrize(("worn", "said"), [
    ({"lora-0": 1.0, "full-0": 1.0}, "cannot be blended"),
    ({"prefix_tuning-0": 1.0, "prefix_tuning-1": 1.0}, "cannot be blended"),
    ({"full-0": 0.5}, "Only what is added to layers has a weight"), ({"prefix_tuning-0": 2.0}, "Only what is added"),
    ({"lora-0": 0.5, "dora-0": 3.0, "prefix_tuning-0": 1.0}, "")])  # fmt: skip
def test_what_cannot_be_worn_together_is_refused(model, served, worn, said):
    engine, heard = Engine(model, 8 * MEGABYTE), []
    sequence = Sequence((1, 2), GREEDY, ENDS, tuple((entry(n, served[n]), w) for n, w in worn.items()), heard.append)
    engine.submit(sequence)
    run(engine)
    assert said in sequence.fault
    assert (heard[-1] == "refused") == bool(said) == bool(sequence.fault)


@pytest.mark.parametrize(("budget", "length", "name", "seen"), [
    ("tight", 373, "base-0", 384), ("tight", 370, "prefix_tuning-0", 379), ("wide", 501, "base-0", 512),
    ("tight", 372, "base-0", 0), ("wide", 500, "base-0", 0)])  # fmt: skip
def test_what_has_no_room_is_refused(model, served, budget, length, name, seen):
    engine = Engine(model, TIGHT if budget == "tight" else 8 * MEGABYTE)
    sequence = asking(prompt(0, length), name, served)
    engine.submit(sequence)
    run(engine)
    assert (f"tokens and an answer of 12 have no room: {seen} are seen" in sequence.fault) == bool(seen)
    assert bool(sequence.said) == (not seen)


def test_a_blend_adds_what_each_does_times_its_weight(model, personas, served, ids):
    weights = {"lora-0": 0.7, "dora-0": 0.5, "glora-3": -0.4}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear) and name.startswith("layers")}
    before = {name: (slot.weight, slot.bias) for name, slot in linears.items()}
    asked = [ids.tolist(), prompt(8, 50)]
    worn = tuple((entry(name, served[name]), weight) for name, weight in weights.items())
    got = [Sequence(tuple(x), GREEDY, ENDS, worn) for x in asked]
    engine = Engine(model, 8 * MEGABYTE)
    for sequence in got:
        engine.submit(sequence)
    run(engine)
    change = {name: [0.0, 0.0] for name in linears}
    for persona, by in weights.items():
        for name, delta in personas[persona].named_deltas():
            parts, slot = delta.merged(linears[name]), linears[name]
            change[name][0] += by * (parts["weight"].dense() - slot.weight.dense())
            if parts.get("bias") is not None:
                change[name][1] += by * (parts["bias"] - (0 if slot.bias is None else slot.bias))
    try:
        for name, slot in linears.items():
            weight, bias = change[name]
            slot.weight = slot.weight.repack(slot.weight.dense() + weight)
            if isinstance(bias, torch.Tensor):
                slot.bias = bias + (0 if slot.bias is None else slot.bias)
        assert sum(ties(model, None, sequence) for sequence in got) <= 1
        assert [s.said for s in got] != [alone(model, personas["lora-0"], x) for x in asked]
    finally:
        for name, slot in linears.items():
            slot.weight, slot.bias = before[name]


def test_the_same_seed_says_the_same_whoever_else_is_there(model, served):
    drawn = Sampling(max_new_tokens=20, temperature=1.0, seed=5)
    texts = []
    for others in ((), ("lora-1", "base-0", "prefix_tuning-0")):
        engine = Engine(model, 8 * MEGABYTE)
        sequence = asking(prompt(2, 30), "dora-0", served, drawn)
        for name in others:
            engine.submit(asking(prompt(4, 17), name, served))
        engine.submit(sequence)
        run(engine)
        texts.append(sequence.said)
    assert texts[0] == texts[1]
    other = asking(prompt(2, 30), "dora-0", served, Sampling(max_new_tokens=20, temperature=1.0, seed=6))
    engine.submit(other)
    run(engine)
    assert other.said != texts[0]


def test_everyone_draws_as_asked(model, personas, served):
    ways = [{"temperature": 1.5, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 2.0, "min_p": 0.2},
            {"repetition_penalty": 1.4}, {"presence_penalty": 1.5}, {"temperature": 1.0, "frequency_penalty": -1.0},
            {"temperature": 1e-4}, {}]  # fmt: skip
    engine, names = Engine(model, 8 * MEGABYTE), ("base-0", "lora-0")
    asked = [
        asking(prompt(6, 30), name, served, Sampling(max_new_tokens=16, seed=3, **way))
        for way in ways
        for name in names
    ]
    for sequence in asked:
        engine.submit(sequence)
    run(engine)
    assert sum(ties(model, personas[name], s) for name, s in zip(names * len(ways), asked, strict=True)) <= 1
    assert len({tuple(s.said) for s in asked[::2]}) == len(ways) - 1  # at next to no temperature, the likeliest


def test_what_is_no_number_ends_the_request_that_wears_it_and_no_other(model, personas):
    bad = scramble(Adapter.build(method("lora"), model).eval())
    with torch.no_grad():
        next(bad.parameters()).fill_(torch.nan)
    heard = []
    engine = Engine(model, 8 * MEGABYTE)
    guilty = asking(prompt(0, 40), "bad", {"bad": Served.of(bad, model)})
    guilty.heard = heard.append
    good = asking(prompt(1, 40), "base-0", {})
    engine.submit(guilty), engine.submit(good)
    run(engine)
    assert heard == ["error"]
    assert ties(model, None, good) <= 1
    again = asking(prompt(0, 40), "base-0", {})  # in the very pages that were given back
    engine.submit(again)
    run(engine)
    assert ties(model, None, again) <= 1


class Serving(RuleBasedStateMachine):
    """Requests come, are given up and are answered, in any order, with too little room for all."""

    @initialize()
    def begin(self):
        self.engine = Engine(MACHINE["model"], TIGHT, most=4, chunk=33)
        self.asked, self.ended = [], {}

    @rule(name=st.sampled_from(["base-0", "lora-0", "glora-3", "prefix_tuning-0", "full-0"]), seed=st.integers(0, 2),
          length=st.sampled_from([1, 31, 32, 33, 70]))  # fmt: skip
    def ask(self, name, seed, length):
        sequence = asking(prompt(seed, length), name, MACHINE["served"])
        sequence.heard = lambda what: self.ended.__setitem__(sequence, what) if isinstance(what, str) else None
        self.asked.append((name, sequence))
        self.engine.submit(sequence)

    @precondition(lambda self: self.engine.running or self.engine.waiting)
    @rule(at=st.integers(0, 100))
    def give_up(self, at):
        there = [*self.engine.running, *self.engine.waiting]
        self.engine.end(there[at % len(there)], "abort")

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.engine.step()

    @invariant()
    def everything_is_in_its_place(self):
        check(self.engine)

    def teardown(self):
        run(self.engine)
        for name, sequence in self.asked:
            if self.ended[sequence] != "abort":
                ties(MACHINE["model"], MACHINE["personas"][name], sequence)


MACHINE = {}


def test_any_order_of_requests(model, personas, served):
    MACHINE.update(model=model, personas=personas, served=served)
    case = Serving.TestCase()
    case.settings = settings(max_examples=30, stateful_step_count=25, deadline=None,
                             suppress_health_check=list(HealthCheck))  # fmt: skip
    case.runTest()


def test_no_end_is_kept_back_where_there_is_none(model):
    sequence = Sequence((1, 2, 3), GREEDY, frozenset(), least=4)
    engine = Engine(model, 8 * MEGABYTE)
    engine.submit(sequence)
    run(engine)
    assert (len(sequence.said), sequence.fault) == (12, "")


@pytest.mark.parametrize("name", ["base-0", "prefix_tuning-0"])
def test_where_no_end_was_asked_for_an_answer_has_what_room_there_is(model, served, name):
    engine, asked = Engine(model, TIGHT), asking(prompt(0, 300), name, served, Sampling(max_new_tokens=500))
    asked.open, asked.end_ids = True, frozenset()
    engine.submit(asked)
    run(engine)
    assert not asked.fault
    assert asked.most == 12 * 32
    assert len(asked.said) == asked.sampling.max_new_tokens


def test_what_another_left_in_a_page_is_not_seen_behind_a_prefix(model):
    adapter = scramble(Adapter.build(method("prefix_tuning", tokens=5), model).eval(), 0.5)
    engine = Engine(model, 8 * MEGABYTE)
    engine.arena.pages.fill_(torch.nan)
    asked = asking(prompt(3, 20), "p", {"p": Served.of(adapter, model)})
    engine.submit(asked)
    run(engine)
    assert ties(model, adapter, asked) <= 1
