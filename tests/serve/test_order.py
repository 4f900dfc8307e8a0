"""Whose turn is next: shares, priorities, what adapters cost, places, and who is told to come again."""

import random
import threading
from concurrent.futures import wait
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings as examples, strategies as st
from oracles import scramble
from serve.integrity import check
from serve.test_engine import ENDS, GREEDY, prompt, ties

from deltaw.adapters.adapter import Adapter
from deltaw.methods import method
from deltaw.serve import engine as engines, order as orders
from deltaw.serve.engine import Engine
from deltaw.serve.order import SAID, STARVED_SECONDS, Busy
from deltaw.serve.sequence import Sequence
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served

MEGABYTE = 1 << 20
NOBODY = frozenset()
"""Ends that never come: answers are as long as they may be."""


def asking(tenant="", seed=0, length=10, said=4, worn=(), **more):
    return Sequence(tuple(prompt(seed, length)), replace(GREEDY, max_new_tokens=said), NOBODY,
                    tuple((entry, 1.0) for entry in worn), tenant=tenant, **more)  # fmt: skip


def lora(model, name, seed=1, rank=4):
    """An adapter that is not there yet."""
    adapter = scramble(Adapter.build(method("lora", rank=rank), model, seed).eval(), seed=seed)
    return Entry(name, name.encode(), lambda: Served.of(adapter, model))


def begun(engine, sequences):
    """In what order they begin."""
    order = []
    while engine.waiting or engine.running:
        engine.step()
        check(engine)
        order += sorted((s for s in sequences if s.begun and s not in order), key=lambda s: s.begun)
    return [sequences.index(s) for s in order]


def submitted(engine, *sequences):
    for sequence in sequences:
        engine.submit(sequence)
    return sequences


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 12)), min_size=6, max_size=30))
def test_tenants_who_wait_are_given_the_same_within_the_bound_of_the_paper(tiny, asked):
    """VTC, theorem 4.4: between any two who wait all the while, at most twice the largest request or the batch."""
    engine = Engine(tiny, MEGABYTE, most=3, chunk=16)
    sequences = [asking("abc"[who], i, length, said) for i, (who, length, said) in enumerate(asked)]
    submitted(engine, *sequences)
    bound = 2 * max(max(length for _, length, _ in asked), 3 * SAID * max(said for *_, said in asked))

    def given_to(tenant):
        mine = [s for s in sequences if s.tenant == tenant]
        return sum(len(s.asked) * (s.begun is not None) + SAID * len(s.said) for s in mine)

    while engine.waiting or engine.running:
        engine.step()
        check(engine)
        waiting = {s.tenant for s in engine.waiting}
        spent = [given_to(tenant) for tenant in waiting]
        assert not spent or max(spent) - min(spent) <= bound
    assert all(len(s.said) == s.sampling.max_new_tokens for s in sequences)
    assert not engine.waiting.worn


def test_who_comes_late_has_saved_nothing_up(tiny):
    engine = Engine(tiny, MEGABYTE, most=1)
    early = submitted(engine, *(asking("early", i) for i in range(6)))
    while sum(s.begun is not None for s in early) < 4:
        engine.step()
    late = submitted(engine, *(asking("late", i) for i in range(6)))
    rest = [*early[4:], *late]
    assert begun(engine, rest)[:4] in ([0, 2, 1, 3], [2, 0, 3, 1], [2, 0, 1, 3], [0, 2, 3, 1])


def test_a_tenants_personas_have_equal_shares_too(tiny):
    engine = Engine(tiny, 4 * MEGABYTE, most=1)
    poet, chef = lora(tiny, "poet"), lora(tiny, "chef", 2)
    for entry in (poet, chef):
        submitted(engine, asking(worn=[entry], said=1))
    begun(engine, [])
    for entry in (poet, chef):
        entry.users += 1  # both are worn all the while, and cost no bytes
    sequences = submitted(engine, *(asking(seed=i, worn=[poet]) for i in range(5)), asking(seed=9, worn=[chef]))
    order = []
    while engine.waiting or engine.running:
        engine.step()
        order += [i for i, s in enumerate(sequences) if s.begun and i not in order]
    assert order.index(5) <= 1


def test_priority_goes_before_shares_and_urgency_only_among_a_tenants_own(tiny):
    engine = Engine(tiny, MEGABYTE, most=1)
    sequences = submitted(engine, *(asking("a", i, priority=1) for i in range(2)),
                          asking("b", 3, urgency=-5, priority=1), asking("b", 4, urgency=-9, priority=1),
                          asking("c", 5, priority=-1))  # fmt: skip
    order = begun(engine, list(sequences))
    assert order[0] == 4
    assert order.index(3) < order.index(2)
    assert order.index(0) < order.index(2)


@pytest.mark.parametrize(("waits", "first"), [(0.0, 1), (2 * STARVED_SECONDS, 0)])
def test_an_adapter_that_nobody_wears_costs_its_bytes_until_one_has_waited_for_it(tiny, waits, first):
    engine = Engine(tiny, 4 * MEGABYTE, most=2)
    known, fresh = lora(tiny, "known"), lora(tiny, "fresh", 2)
    for entry in (known, fresh):
        submitted(engine, asking(worn=[entry], said=1))
        begun(engine, [])
    assert fresh.size_bytes == known.size_bytes > 0
    submitted(engine, asking(worn=[known], said=40))
    engine.step()
    submitted(engine, asking("", 3, said=10))  # so that the second place is taken
    engine.step()
    spent = engine.waiting.worn[""].spent
    spent["fresh",] = spent["known",] = 0.0
    ago = orders.monotonic() - waits
    late = asking(seed=4, worn=[fresh], since=ago), asking(seed=5, worn=[known], since=ago + 1e-3)
    submitted(engine, *late)
    assert next(engine.waiting.turns()) is late[first]
    begun(engine, [])


def test_who_has_fewer_places_than_a_share_is_given_one_and_all_say_what_they_say_alone(tiny):
    engine = Engine(tiny, MEGABYTE, most=4)
    greedy = submitted(engine, *(asking("greedy", i, said=30) for i in range(12)))
    for _ in range(3):
        engine.step()
    assert {s.tenant for s in engine.running} == {"greedy"}
    modest = submitted(engine, *(asking("modest", 20 + i, said=5) for i in range(3)))
    engine.step()
    assert [s.tenant for s in engine.running].count("modest") == 2  # half of the places, and no more
    assert all(s.said for s in modest[:2])
    begun(engine, [])
    assert sum(ties_without_end(tiny, s) for s in [*greedy, *modest]) <= 1


def ties_without_end(model, sequence):
    sequence.end_ids = ENDS
    cut = next((i for i, token in enumerate(sequence.said) if token in ENDS), None)
    if cut is not None:
        del sequence.said[cut:]
    return ties(model, None, sequence)


def test_who_lacks_room_for_its_adapter_is_given_it_in_the_end(tiny, monkeypatch):
    """A large adapter, while small answers come all the time and leave no room for it."""
    now = [1000.0]
    monkeypatch.setattr(engines, "monotonic", lambda: now[0])
    engine = Engine(tiny, MEGABYTE // 2, most=8)
    large = lora(tiny, "large", rank=64)
    size = engine.arena.pages_for(large.read().size_bytes)
    assert engine.arena.count // 2 < size < engine.arena.count - 2
    pages = engine.arena.count // 8
    asks = [*submitted(engine, *(asking(seed=i, length=32 * pages - 40, said=30) for i in range(8)))]
    while len(engine.running) < 8:
        engine.step()
    wants = asking("other", seed=30, worn=[large])
    engine.submit(wants)
    while wants.passed is None:
        engine.step()
        fresh = [asking(seed=len(asks) + i, length=32 * pages - 40, said=30) for i in range(8 - len(engine.running))]
        asks += submitted(engine, *fresh)
    assert not wants.begun
    now[0] += STARVED_SECONDS + 1
    for _ in range(12):
        engine.step()
        check(engine)
    assert wants.said
    begun(engine, [])
    assert all(len(s.said) == 30 for s in asks)


def quick(engine, most=1000.0):
    """Its order, as if it had computed so many tokens in a second, and answers had fifty."""
    order = engine.waiting
    order.done, order.seconds, order.said = most, 1.0, 50.0
    return order


def test_who_would_wait_too_long_is_told_to_come_again(tiny):
    order = quick(Engine(tiny, MEGABYTE, most=4))
    assert order.wait(asking("a", length=100, said=50)) == 0  # where nobody waits, nobody is refused
    crowd = [asking("a", length=100, said=50) for _ in range(40)]
    order.enter(crowd, 1.0)  # what is asked at once is one request, and its first token is that of its first answer
    late = asking("a", length=100, said=50)
    # All are read; ten times four say fifty, and in one step more it begins.
    assert order.wait(late) == pytest.approx((41 * 100 + SAID * 4 * (10 * 50 + 1)) / 1000)
    with pytest.raises(Busy, match="again in 8 s") as told:
        order.enter([late], 1.0)
    assert told.value.seconds == 8  # 7.1 more than 1
    assert len(order) == 40
    assert late.promised < 0
    # Another tenant has its share: one of the crowd is read before it, and nobody's end is waited for.
    assert order.wait(asking("b", length=100, said=50)) == pytest.approx((200 + SAID * 4) / 1000)
    assert order.wait(asking("a", length=100, said=50, urgency=-1)) == 0


def test_who_runs_has_so_much_to_say_yet(tiny):
    engine = Engine(tiny, 4 * MEGABYTE, most=2)
    order = quick(engine)
    submitted(engine, asking("a", 1, length=10, said=30), asking("a", 2, length=10, said=40))
    for _ in range(5):
        engine.step()
    quick(engine)
    assert [len(s.said) for s in engine.running] == [5, 5]
    first, second = (asking("a", i, length=100, said=50) for i in (3, 4))
    assert order.wait(first) == pytest.approx((100 + SAID * 2 * (25 + 1)) / 1000)
    engine.submit(first, within=9.0)
    assert order.wait(second) == pytest.approx((200 + SAID * 2 * (35 + 1)) / 1000)
    order.said = 3.0  # they have said more than is usual: as many are expected again
    assert order.wait(second) == pytest.approx((200 + SAID * 2 * (3 + 1)) / 1000)


@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(-1, 1), st.integers(1, 30)), min_size=2,
                max_size=14))  # fmt: skip
def test_those_who_are_reckoned_to_be_before_one_are_those_who_begin_before_it(tiny, asked):
    engine = Engine(tiny, MEGABYTE, most=1)
    sequences = submitted(engine, *(asking("abc"[who], i, length, said=3, urgency=urgency)
                                    for i, (who, _, urgency, length) in enumerate(asked)))  # fmt: skip
    last, order = sequences[-1], engine.waiting
    aside = order._aside()
    before = [sequences.index(each) for each in aside._before(last)]
    assert len(order) == len(sequences)  # nothing came of it
    assert {tenant: order.tenants.spent[tenant] for tenant, _ in order.queues} == dict.fromkeys(order.tenants.there, 0)
    happened = begun(engine, list(sequences))
    assert happened[: len(before) + 1] == [*before, sequences.index(last)]


def test_promises_are_kept_however_wrong_the_reckoning_is(tiny):
    """It takes two to three and a half times as long as reckoned: after a while few promises are broken."""
    order, rng = quick(Engine(tiny, MEGABYTE, most=4)), random.Random(0)
    order.enter([asking(length=100, said=50) for _ in range(10)])
    reckoned = (11 * 100 + SAID * 4 * (2 * 50 + 1)) / 1000
    late = []
    for _ in range(600):
        sequence = asking(length=100, said=50)
        order.enter([sequence], 99.0)
        takes = reckoned * rng.uniform(2, 3.5)
        sequence.since, sequence.said = orders.monotonic() - takes, [1]
        late.append(takes > sequence.promised)
        order.spoken(sequence)
        sequence.said = []
        order.take(sequence)
        order.gone(sequence)
    assert sum(late[:10]) > 5
    assert 0 < sum(late[200:]) / 400 < 0.08
    assert order.margin < 3 * reckoned
    assert order.wait(asking("other", length=100, said=50)) == pytest.approx(
        (200 + SAID * 4) / 1000
    )  # it has its share


def test_however_late_others_were_some_are_let_in_of_whom_there_is_to_learn(tiny):
    order = quick(Engine(tiny, MEGABYTE, most=4))
    order.enter([asking(length=100, said=1) for _ in range(4)])
    order.margin = 50.0
    order.enter([asking(length=10, said=1)], 10.0)
    assert order.margin == 9.0
    with pytest.raises(Busy):
        order.enter([asking(length=600, said=1)], 10.0)


def test_who_was_promised_a_turn_goes_before_its_tenants_others_once_that_is_due(tiny):
    order = quick(Engine(tiny, MEGABYTE, most=1))
    order.enter([asking("a", length=100, said=50)])
    promised, other, fresh = asking("a", 1), asking("b", 2), asking("a", 3, worn=[lora(tiny, "fresh")])
    order.enter([promised], 99.0)
    assert promised.promised == pytest.approx((100 + 10 + SAID * 51) / 1000)
    order.enter([other])
    order.enter([fresh])
    order.worn["a"].spent[()] += 1  # the other persona was given less

    def ahead():
        return next(each for each in order.turns() if each.tenant == "a")

    assert ahead() is fresh
    order.take(next(iter(order)))
    promised.since = orders.monotonic() - promised.promised / 4 - 0.001
    assert ahead() is promised
    order.tenants.spent["a"] += 1
    assert next(order.turns()) is other  # among tenants, shares decide


def test_what_an_answer_is_expected_to_take_is_charged_when_it_is_begun(tiny):
    engine = Engine(tiny, MEGABYTE)
    order = quick(engine)
    order.said = 6.0
    _, long, ends = submitted(engine, asking("a", 1, said=4), asking("b", 2, said=9), asking("c", 3, said=9))
    engine.step()
    spent = order.tenants.spent
    assert spent == {"a": 10 + SAID * 4, "b": 10 + SAID * 6, "c": 10 + SAID * 6}
    for _ in range(2):
        engine.step()
    engine.end(ends, "abort")
    assert spent["c"] == 10 + SAID * 3  # what it has not said it is given back
    while len(engine.running) > 1 or len(long.said) < 8:
        engine.step()
    assert spent["a"] == 10 + SAID * 4
    assert spent["b"] == 10 + SAID * 8


@pytest.mark.parametrize(("lately", "saved"), [(0.0, 0.0), (60.0, 30.0)])
def test_a_tenant_that_asked_for_less_has_saved_no_more_than_its_share_of_lately(lately, saved):
    shares = orders.Shares()
    for who in ("much", "little"):
        shares.come(who, ())
    shares.spent |= {"much": 500.0, "little": 100.0}
    shares.come("little", {"much"}, lately / 2)
    assert shares.spent["little"] == 500 - saved
    shares.come("new", {"much", "little"}, lately / 2)
    assert shares.spent["new"] == 500 - saved  # the least of those who wait
    shares.level = 700.0
    shares.come("much", ())  # nobody waits: as the last whose turn came
    assert shares.spent["much"] == 700


def test_who_has_its_share_of_places_reads_a_little_at_a_time_while_others_are_there(tiny):
    engine = Engine(tiny, 4 * MEGABYTE, most=2, chunk=64)
    greedy = asking("greedy", 1, length=200, said=30)
    submitted(engine, greedy)
    engine.step()
    assert greedy.known == 64
    modest = asking("modest", 2, length=70, said=30)
    submitted(engine, modest)
    engine.step()
    assert (greedy.known, modest.known) == (64, 64)
    engine.step()
    assert modest.said
    before = greedy.known
    engine.step()
    assert greedy.known == before + 32


@pytest.mark.parametrize(("who", "urgency"), [("a", -1), ("b", 0)])
def test_a_prompt_that_is_half_read_goes_on_while_another_has_no_room(tiny, who, urgency):
    """Two prompts that together take more than all pages: one waits, and nobody for ever."""
    engine = Engine(tiny, 12 * 2 * 2 * 2 * 32 * 8 * 4, chunk=64)
    assert engine.arena.count == 12
    spoken = submitted(engine, asking("b", 1, length=4, said=20))
    engine.step()
    first = submitted(engine, asking("a", 2, length=340, said=4))
    engine.step()
    second = submitted(engine, asking(who, 3, length=340, said=4, urgency=urgency), asking("c", 4, said=3))
    for _ in range(200):
        engine.step()
        check(engine)
    assert [len(s.said) for s in (*spoken, *first, *second)] == [20, 4, 4, 3]


def test_two_adapters_that_have_no_room_together_take_turns(tiny, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(engines, "monotonic", lambda: now[0])
    engine = Engine(tiny, MEGABYTE // 2, most=4)
    entries = [lora(tiny, name, rank=96) for name in ("one", "two")]
    assert engine.arena.pages_for(entries[0].read().size_bytes) > engine.arena.count // 2
    asked = submitted(engine, *(asking(seed=i, said=60, worn=[entry]) for i, entry in enumerate(entries)))
    for _ in range(2000):
        engine.step()
        wait([entry.reading for entry in entries if entry.reading])
        now[0] += 0.1
        if not (engine.running or engine.waiting):
            break
    assert [len(s.said) for s in asked] == [60, 60]


def test_no_place_is_taken_for_who_cannot_begin(tiny):
    engine, gate = Engine(tiny, MEGABYTE, most=2), threading.Event()
    adapter = lora(tiny, "slow")
    slow = Entry("slow", b"slow", lambda: gate.wait(30) and adapter.read())
    greedy = submitted(engine, *(asking("greedy", i, said=40) for i in range(2)))
    engine.step()
    modest = submitted(engine, asking("modest", 9, worn=[slow]))[0]
    for _ in range(10):
        engine.step()
    assert [len(s.said) for s in greedy] == [11, 11]
    gate.set()
    begun(engine, [])
    assert modest.said


def test_speed_is_that_of_steps_that_were_full_and_forgets_old_ones(tiny):
    engine = Engine(tiny, MEGABYTE, most=2, chunk=8)
    submitted(engine, asking(length=3, said=3))
    begun(engine, [])
    assert engine.waiting.done == 0  # one answer alone tells nothing
    submitted(engine, *(asking(seed=i) for i in range(4)))
    begun(engine, [])
    assert engine.waiting.done > 0
    order = engine.waiting
    for _ in range(300):
        order.computed(7, 0.5)
    assert order.done / order.seconds == pytest.approx(14)


def test_who_makes_a_step_fail_ends_alone(tiny, monkeypatch):
    engine, forward, calls = Engine(tiny, MEGABYTE), tiny.hidden, []
    asked = submitted(engine, *(asking(seed=i, length=12 + i, said=6) for i in range(7)))
    guilty = asked[4]

    def hidden(ids_T, *more):
        calls.append(len(ids_T))
        if torch.equal(ids_T[: len(guilty.asked)], torch.tensor(guilty.asked)) or (
            len(ids_T) > len(guilty.asked) and str(list(guilty.asked))[1:-1] in str(ids_T.tolist())
        ):
            raise ValueError("poison")
        return forward(ids_T, *more)

    monkeypatch.setattr(tiny, "hidden", hidden)
    monkeypatch.setattr(engine.compute, "layers", None)
    heard = []
    guilty.heard = heard.append
    begun(engine, [])
    assert heard == ["error"]
    assert guilty.fault == "It could not be computed: poison."
    assert len(calls) < 6 + 7  # halves, and not each by itself
    monkeypatch.undo()
    assert sum(ties_without_end(tiny, s) for s in asked if s is not guilty) <= 1


class Broken:
    """A grammar that fails: `when` it is asked what may follow, or told what did."""

    def __init__(self, when):
        self.when = when

    def allowed(self):
        if self.when == "allowed":
            raise ValueError("no grammar")
        return torch.ones(260, dtype=torch.bool)

    def take(self, _):
        raise ValueError("no grammar")


@pytest.mark.parametrize("when", ["allowed", "take"])
def test_an_answers_own_form_that_fails_ends_it_alone(tiny, when):
    engine, heard = Engine(tiny, MEGABYTE), []
    well = submitted(engine, *(asking(seed=i) for i in range(3)))
    engine.submit(asking(seed=7, grammar=Broken(when), heard=heard.append))
    begun(engine, [])
    assert [what for what in heard if isinstance(what, str)] == ["error"]
    assert sum(ties_without_end(tiny, s) for s in well) <= 1
