"""All layers as one native call: to the last bit what the layers do when each is asked."""

import pytest
import torch
from conftest import write_tiny
from oracles import scramble
from parity.test_families import VARIANTS
from serve.integrity import check

from deltaw.adapters.adapter import Adapter
from deltaw.decode.sampling import Sampling
from deltaw.kernels.library import REFERENCE, function
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.serve.engine import Engine
from deltaw.serve.layers import Layers
from deltaw.serve.sequence import Sequence
from deltaw.serve.wardrobe import Entry
from deltaw.serve.wearing import Served
from deltaw.weights import formats

WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
APART = {"phi3", "phi3: a window, part of a head turned", "gemma2"}
"""Weights of several layers in one, and scores that are bent."""
WORN = {"lora": {"rank": 6}, "dora": {"rank": 4}, "glora": {}, "prefix_tuning": {"tokens": 5}, "full": {}}


def loaded(folder, changes, dtype=torch.bfloat16):
    write_tiny(folder, {**changes, **WIDE})
    return checkpoint.load(folder, dtype)


def answers(model, asked, *, native):
    """What is said, and all scores, in steps of several sequences, with prompts in pieces."""
    engine = Engine(model, 1 << 21, most=6, chunk=40)
    assert engine.compute.layers or not native
    engine.compute.layers = engine.compute.layers if native else None
    own = Sampling(max_new_tokens=9)
    sequences = [Sequence(ids, own, frozenset(), worn, tops=5) for ids, worn in asked]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.step():
        check(engine)
    return [(s.said, s.scores) for s in sequences]


def prompts(count):
    draws = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(0, 256, (3 + 17 * i,), generator=draws).tolist()) for i in range(count)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_does_what_its_layers_do_or_is_left_to_them(variant, tmp_path):
    model = loaded(tmp_path, VARIANTS[variant])
    fits = function("program") is not None and variant not in APART
    asked = [(ids, ()) for ids in prompts(9)]
    assert answers(model, asked, native=fits) == answers(model, asked, native=False)


def test_what_is_worn_is_worn_in_it_too(tmp_path):
    model = loaded(tmp_path, {"attention_bias": True})
    kinds = [scramble(Adapter.build(method(name, **told), model, seed=i).eval(), seed=i)
             for i, (name, told) in enumerate(WORN.items())]  # fmt: skip
    entries = [Entry(str(i), bytes([i]), None, Served.of(kind, model)) for i, kind in enumerate(kinds)]
    worn = [(), *(((entry, 1.0),) for entry in entries), ((entries[0], 0.5), (entries[1], -0.3))]
    asked = [(ids, worn[i % len(worn)]) for i, ids in enumerate(prompts(2 * len(worn)))]
    got = answers(model, asked, native=function("program") is not None)
    assert got == answers(model, asked, native=False)
    assert len({str(each) for each in got}) == len(got)


def test_what_has_no_native_kernel_is_left_to_the_layers(tmp_path, choose):
    model = loaded(tmp_path, {})
    engine = Engine(model, 1 << 21)
    assert Layers.of(model, engine.arena, 8) is not None or function("program") is None
    assert Layers.of(model.float(), engine.arena, 8) is None
    packed = checkpoint.load(tmp_path, torch.bfloat16, form=formats.parse("int4-g32"))
    assert Layers.of(packed, Engine(packed, 1 << 21).arena, 8) is None
    choose(REFERENCE)
    assert Layers.of(model.bfloat16(), engine.arena, 8) is None
