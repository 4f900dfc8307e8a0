"""Adapters that come and go while they are asked for: read beside, in the same pages as tokens, never mixed up."""

import threading
from dataclasses import replace

import pytest
import torch
from oracles import our_logits, scramble
from serve.integrity import check
from serve.test_engine import ENDS, GREEDY, prompt, ties

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.serve.engine import Engine
from deltaw.serve.sequence import Sequence
from deltaw.serve.wearing import Served, served

SIZE = 3
"""Pages of each adapter here."""


@pytest.fixture
def engine(tiny):
    probe = Engine(tiny, 0).arena.page_bytes
    return Engine(tiny, 10 * probe)


@pytest.fixture
def made(tiny, engine):
    """A function that makes an adapter of a seed which takes SIZE pages."""

    def make(seed):
        adapter = scramble(Adapter.build(method("lora", rank=4), tiny, seed).eval(), seed=seed)
        assert -(-Served.of(adapter, tiny).size_bytes // engine.arena.page_bytes) == SIZE
        return adapter

    return make


def add(engine, name, adapter, model):
    return engine.wardrobe.add(name, name.encode(), lambda: Served.of(adapter, model))


def asking(entry, seed=0, length=20, **more):
    return Sequence(tuple(prompt(seed, length)), replace(GREEDY, **more), ENDS, ((entry, 1.0),))


def through(engine, *sequences):
    """Let the engine answer, whatever it waits for."""
    for sequence in sequences:
        engine.submit(sequence)
    while engine.waiting or engine.running:
        engine.step()
        check(engine)


def test_adapters_are_read_when_they_are_asked_for_and_those_unused_the_longest_make_room(tiny, engine, made):
    personas = {name: made(seed) for seed, name in enumerate("abcd")}
    entries = {name: add(engine, name, adapter, tiny) for name, adapter in personas.items()}
    assert {entry.state for entry in entries.values()} == {"known"}
    for name in "abcad":
        sequence = asking(entries[name])
        through(engine, sequence)
        assert ties(tiny, personas[name], sequence) <= 1
    assert [entries[name].state for name in "abcd"] == ["ready", "known", "ready", "ready"]
    assert len(engine.arena.given) == 3 * SIZE


def test_who_waits_for_an_adapter_keeps_nobody_else_waiting(tiny, engine, made):
    gate, adapter = threading.Event(), made(1)

    def read():
        gate.wait()
        return Served.of(adapter, tiny)

    slow = asking(engine.wardrobe.add("slow", b"slow", read))
    other = Sequence(tuple(prompt(1, 20)), GREEDY, ENDS)
    engine.submit(slow)
    engine.submit(other)
    while engine.step():
        check(engine)
    assert (slow.said, slow.worn[0][0].state) == ([], "reading")
    assert ties(tiny, None, other) <= 1
    gate.set()
    through(engine)
    assert ties(tiny, adapter, slow) <= 1


def test_another_adapter_under_an_old_name_is_another_and_the_old_one_is_worn_to_the_end(tiny, engine, made):
    old, new = made(1), made(2)
    first = asking(add(engine, "x", old, tiny))
    engine.submit(first)
    while not first.said:
        engine.step()
    again = engine.wardrobe.add("x", b"new", lambda: Served.of(new, tiny))
    assert engine.wardrobe.entries["x"] is again
    second = asking(again)
    through(engine, second)
    assert ties(tiny, old, first) <= 1
    assert ties(tiny, new, second) <= 1
    assert second.said != first.said
    assert first.worn[0][0].state == "known"
    assert len(engine.arena.given) == SIZE
    engine.wardrobe.remove("x")
    assert not engine.arena.given
    with pytest.raises(UserError, match="There is no adapter 'x'"):
        engine.wardrobe.remove("x")
    check(engine)


def test_a_damaged_adapter_fails_who_asks_for_it_until_it_is_added_anew(tiny, engine, made):
    def read():
        raise UserError("It is damaged.")

    for _ in range(2):
        sequence = asking(engine.wardrobe.add("x", b"bad" if not _ else b"bad2", read))
        through(engine, sequence)
        assert "cannot be worn. It is damaged." in sequence.fault
    adapter = made(3)
    sequence = asking(engine.wardrobe.add("x", b"bad2", lambda: Served.of(adapter, tiny)))
    through(engine, sequence)
    assert ties(tiny, adapter, sequence) <= 1


def test_what_is_larger_than_all_room_is_said_and_not_waited_for(tiny, engine):
    large = Adapter.build(method("lora", rank=64), tiny)
    sequence = asking(add(engine, "large", large, tiny))
    through(engine, sequence)
    assert "more than all there is room for" in sequence.fault


def test_sequences_and_adapters_make_room_for_one_another(tiny, engine, made):
    """Ten pages: two adapters leave four, and a long answer takes them from an adapter that nobody wears."""
    one, two = (add(engine, str(seed), made(seed), tiny) for seed in (1, 2))
    through(engine, asking(one))
    through(engine, asking(two))
    assert len(engine.arena.given) == 2 * SIZE
    long = Sequence(tuple(prompt(4, 150)), replace(GREEDY, max_new_tokens=30), ENDS)
    through(engine, long)
    assert ties(tiny, None, long) <= 1
    assert [one.state, two.state] == ["known", "ready"]
    through(engine, asking(one), asking(two, seed=5))
    assert [one.state, two.state] == ["ready", "ready"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_laid_into_a_file_once_and_mapped_from_there(dtype, tiny_path, tmp_path, ids, made):
    model = checkpoint.load(tiny_path, dtype)
    print_of = checkpoint.fingerprint(model)
    adapter = scramble(Adapter.build(method("dora", rank=4), model).eval())
    adapters.save(adapter, adapters.Header.of(adapter, "tiny", print_of), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    first = served(lambda: adapters.load(path, model, print_of), model, tmp_path / "kept" / "a.slab")
    (tmp_path / "a.safetensors").unlink()
    again = served(lambda: adapters.load(path, model, print_of), model, tmp_path / "kept" / "a.slab")
    want = Served.of(adapter, model).slab
    for slab in first.slab, again.slab:
        assert torch.equal(slab.memory, want.memory)
        assert slab.memory.data_ptr() % 64 == 0
    engine = Engine(model, 1 << 20)
    sequence = asking(engine.wardrobe.add("a", b"a", lambda: again))
    through(engine, sequence)
    if dtype == torch.float32:
        assert ties(model, adapter, sequence) <= 1
    with adapter.on():
        assert int(our_logits(model, sequence.asked)[-1].argmax()) == sequence.said[0]


@pytest.mark.parametrize("name", ["prefix_tuning", "full"])
def test_what_is_worn_otherwise_is_read_as_it_is(name, tiny, tmp_path):
    print_of = checkpoint.fingerprint(tiny)
    adapter = scramble(Adapter.build(method(name), tiny).eval())
    adapters.save(adapter, adapters.Header.of(adapter, "tiny", print_of), tmp_path / "a.safetensors")
    got = served(lambda: adapters.load(tmp_path / "a.safetensors", tiny, print_of), tiny, tmp_path / "a.slab")
    assert got.slab is None
    assert bool(got.before) == (name == "prefix_tuning")
    assert got.size_bytes == sum(t.nbytes for t in adapter.state_dict().values())
    assert not (tmp_path / "a.slab").exists()


def test_who_waits_for_an_adapter_that_is_taken_down_gets_it_nevertheless(tiny, made):
    """Its pages are known by what it wears: they must hold nothing that was computed without it."""
    engine, adapter = Engine(tiny, 1 << 20, most=1), made(1)
    entry = add(engine, "x", adapter, tiny)
    through(engine, asking(entry))
    busy = Sequence(tuple(prompt(4, 30)), GREEDY, ENDS)
    waits, again = (asking(entry, length=90) for _ in range(2))
    engine.submit(busy)
    engine.submit(waits)
    engine.step()
    engine.wardrobe.remove("x")
    through(engine, again)
    assert not waits.fault
    assert ties(tiny, adapter, waits) + ties(tiny, adapter, again) <= 1
    assert not engine.arena.given


def test_a_blend_of_more_than_all_room_is_refused_and_others_are_not_kept_waiting(tiny, engine, made):
    entries = [add(engine, str(seed), made(seed), tiny) for seed in range(4)]
    assert len(entries) * SIZE > engine.arena.count
    blend = Sequence(tuple(prompt(1, 20)), GREEDY, ENDS, tuple((entry, 0.5) for entry in entries))
    through(engine, blend, other := asking(entries[0]))
    assert "Together these adapters take more than all there is room for" in blend.fault
    assert ties(tiny, made(0), other) <= 1


def test_a_failure_that_may_pass_fails_only_who_met_it(tiny, engine, made):
    adapter, faults = made(2), [OSError("No space left on device")]

    def read():
        if faults:
            raise faults.pop()
        return Served.of(adapter, tiny)

    entry = engine.wardrobe.add("x", b"x", read)
    through(engine, first := asking(entry))
    assert "cannot be read now. No space left on device" in first.fault
    through(engine, second := asking(entry))
    assert ties(tiny, adapter, second) <= 1


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "zeros"])
def test_a_laid_file_that_was_damaged_is_laid_anew(damage, tiny, tmp_path, made):
    kept, adapter = tmp_path / "a.slab", made(1)
    want = served(lambda: adapter, tiny, kept).slab.memory.clone()
    whole = kept.read_bytes()
    kept.write_bytes({"bit": bytes([*whole[:5000], whole[5000] ^ 4, *whole[5001:]]), "cut": whole[: len(whole) // 2],
                      "empty": b"", "zeros": bytes(len(whole))}[damage])  # fmt: skip
    assert torch.equal(served(lambda: adapter, tiny, kept).slab.memory, want)
    assert kept.read_bytes() == whole
