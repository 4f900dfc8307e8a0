"""One of several processes that compute the models of a folder together; the first writes down what was said."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import torch
from oracles import scramble
from serve.integrity import check
from variants import CASES

from deltaw.adapters.adapter import Adapter
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.ranks import Ranks, part_of
from deltaw.serve.engine import Engine
from deltaw.serve.parallel import Leader, follow, joined
from deltaw.serve.sequence import Sequence
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served

SEVERAL = 3
"""Adapters of some names are blended, too."""


def personas(model):
    """An adapter of every kind that shares a batch, as it is served."""
    made = {}
    for i, case in enumerate(CASES):
        name, chosen = case.values
        try:
            adapter = scramble(Adapter.build(method(name, **chosen), model, seed=i).eval(), seed=i)
        except UserError as e:
            if not model.config.family.fused or "names no layer of this model" not in e.what:
                raise
            continue  # there is no q where there is one qkv
        if (served := Served.of(adapter, model)).alone is None:
            made[case.id] = served
    return made


def asking(served):
    """Sequences that wear none, each, and blends: some with prompts in pieces, some that begin alike."""
    worn = [
        (),
        *(((name, 1.0),) for name in served),
        (("lora-0", 0.7), ("dora-0", 0.4)),
        (("dora-0", 2.0), ("vera-0", 1)),
    ]
    for i, told in enumerate(worn):
        ids = torch.randint(0, 256, (20 + 9 * i % 70,), generator=torch.Generator().manual_seed(i % 5)).tolist()
        entries = tuple((Entry(name, name.encode(), None, served[name]), weight) for name, weight in told)
        yield Sequence(tuple(ids), Sampling(max_new_tokens=8), frozenset(), entries, tops=2)


def said(engine, served):
    """What each says, with scores."""
    asked = list(asking(served))
    for sequence in asked:
        engine.submit(sequence)
    while engine.step():
        check(engine)
    return [[sequence.said, [score.logprob for score in sequence.scores]] for sequence in asked]


class Counting(Ranks):
    """Which counts what is summed, in numbers."""

    sums: ClassVar[list[int]] = []
    fails = sys.maxsize
    """Sums after which the first process fails in the midst of a step."""

    def sum(self, t):
        self.sums.append(t.numel())
        if not self.own and len(self.sums) > self.fails:
            raise MemoryError("there is none left")
        return super().sum(t)


def counted(engine, entry):
    """What one pass over ten tokens sums."""
    Counting.sums.clear()
    engine.submit(Sequence(tuple(range(10)), Sampling(max_new_tokens=1), frozenset(), ((entry, 1.0),) if entry else ()))
    engine.step()
    return list(Counting.sums)


def main(folder, processes):
    torch.set_num_threads(1)
    with joined(processes) as found:
        ranks = Counting(found.own, found.count)
        for path in sorted(folder.iterdir()):
            model = checkpoint.load(path)
            if ranks.own:
                follow(lambda model=model: model, ranks)
                continue
            engine = Engine(part_of(model, ranks.part), 8 << 20, most=9, chunk=40)
            leader, whole = Leader(model, engine, ranks), personas(model)
            served = {name: leader.apart(each) for name, each in whole.items()}
            told = said(engine, served)
            told.append(counted(engine, None))
            told.append(counted(engine, Entry("all", b"all", None, served["qlora-0"])))
            assert not leader.unsent
            full = Served(alone=Adapter.build(method("full"), model))
            try:
                leader.apart(full)
            except UserError as e:
                told.append(e.what)
            ranks.agreed(None)
            (path / f"said-{processes}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    Counting.fails = int(*sys.argv[3:]) or sys.maxsize
    main(Path(sys.argv[1]), int(sys.argv[2]))
