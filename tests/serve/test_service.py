"""An engine in its thread: asked by many at once, told to let go, broken in the middle, and closed."""

import queue
import threading
import time
from functools import partial

import pytest
from serve.integrity import check
from serve.test_engine import ENDS, GREEDY, prompt, ties

from deltaw.errors import UserError
from deltaw.serve.engine import Engine
from deltaw.serve.order import Busy
from deltaw.serve.sequence import Sequence
from deltaw.serve.service import Service
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served

PATIENCE = 30


@pytest.fixture
def service(tiny):
    with Service(Engine(tiny, 4 << 20)) as service:
        yield service
    assert not service.thread.is_alive()


def asking(seed=0, length=10, worn=()):
    heard = queue.SimpleQueue()
    sequence = Sequence(tuple(prompt(seed, length)), GREEDY, ENDS, worn, heard.put)
    sequence.events = heard
    return sequence


def answer(sequence):
    said = []
    while not isinstance(what := sequence.events.get(timeout=PATIENCE), str):
        said.append(what)
    return said, what


def test_many_ask_at_once_and_each_hears_its_own(service, tiny):
    sequences = [asking(seed) for seed in range(12)]
    threads = [threading.Thread(target=service.submit, args=(s,)) for s in sequences]
    for thread in threads:
        thread.start()
    assert all(answer(sequence)[0] == sequence.said for sequence in sequences)
    service.do(partial(check, service.engine)).result(PATIENCE)
    assert sum(ties(tiny, None, sequence) for sequence in sequences) <= 1


def test_who_is_let_go_hears_so_once_and_keeps_no_page(service):
    long = asking(length=400)
    service.submit(long)
    service.abort(long)
    assert answer(long)[1] == "abort"
    service.abort(long)
    service.do(lambda: None).result(PATIENCE)
    assert long.events.empty()
    assert service.do(lambda: sum(service.engine.arena.held.values())).result(PATIENCE) == 0


def test_what_fails_belongs_to_who_asked(service):
    with pytest.raises(UserError, match="no adapter 'x'"):
        service.do(lambda: service.engine.wardrobe.remove("x")).result(PATIENCE)


def test_a_step_that_fails_fails_those_who_run_and_the_next_are_answered(service, tiny, monkeypatch):
    forward = service.engine.forward

    def once(pieces):
        monkeypatch.setattr(service.engine, "forward", forward)
        raise ValueError("broken")

    monkeypatch.setattr(service.engine, "forward", once)
    first = asking()
    service.submit(first)
    assert answer(first)[1] == "error"
    assert "It could not be computed: broken." in first.fault
    second = asking(1)
    service.submit(second)
    assert answer(second)[0] == second.said
    service.do(partial(check, service.engine)).result(PATIENCE)
    assert ties(tiny, None, second) <= 1


def test_an_adapter_is_waited_for_without_anybody_asking_again(service, tiny):
    gate = threading.Event()
    entry = Entry("slow", b"slow", lambda: gate.wait() and (_ for _ in ()).throw(UserError("Damaged.")))
    sequence = asking(worn=((entry, 1.0),))
    service.submit(sequence)
    gate.set()
    assert answer(sequence)[1] == "refused"
    assert "Damaged." in sequence.fault


def test_closing_ends_whoever_is_not_answered(tiny):
    service, gate = Service(Engine(tiny, 4 << 20)), threading.Event()
    waits = asking(worn=((Entry("x", b"x", lambda: (gate.wait(), Served())[1]), 1.0),))
    service.submit(waits)
    service.do(lambda: None).result(PATIENCE)
    gate.set()
    service.close()
    assert answer(waits)[1] in ("abort", "refused")
    with pytest.raises(RuntimeError, match="closed"):
        service.submit(asking())
    service.close()


def test_who_is_told_to_come_again_is_told_by_what_is_returned(service, monkeypatch):
    monkeypatch.setattr(service.engine.waiting, "wait", lambda _: 3.0)
    with pytest.raises(Busy):
        service.submit(refused := asking(), within=2.0).result(PATIENCE)
    service.submit(taken := asking(), within=4.0).result(PATIENCE)
    assert answer(taken)[0]
    assert refused.events.empty()


def test_who_asks_while_it_closes_hears_so(tiny):
    service, gate, begun = Service(Engine(tiny, 4 << 20)), threading.Event(), threading.Event()
    service.engine.step = lambda: begun.set() or gate.wait(PATIENCE)
    service.submit(first := asking())
    begun.wait(PATIENCE)
    service.submit(last := asking(1))
    closing = threading.Thread(target=service.close)
    closing.start()
    while not service.closed:
        time.sleep(0.001)
    gate.set()
    assert [answer(each)[1] for each in (first, last)] == ["abort"] * 2
    closing.join()
