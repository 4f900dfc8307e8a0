"""Layers that read the same input are one node: the same outputs and gradients, whatever they wear and are stored as.

The oracle is the explicit formula, left to autograd.
"""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import our_logits, scramble
from torch import nn

from deltaw.adapters.adapter import Adapter
from deltaw.methods import method
from deltaw.models.fused import joined, together
from deltaw.models.slots import Delta, Linear, Slot, Terms
from deltaw.weights import Dense
from deltaw.weights.formats import parse

FORMS = ["fp32", "nf4", "nf3-dq", "int4-g32"]
WIDE = 32


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(terms, x_TI):
    """The layer as it is written."""
    y = x_TI @ terms.weight.dense().t()
    if terms.gain_O is not None:
        y = y * terms.gain_O
    if terms.A_RI is not None:
        y = y + terms.scale * (x_TI @ terms.A_RI.t()) @ terms.B_OR.t()
    return y if terms.bias_O is None else y + terms.bias_O


def layer(o, rank, has, learns, seed):
    """Terms of which some are there, and some of those learn."""
    sizes = {"A": (rank, WIDE), "B": (o, rank), "gain": (o,), "bias": (o,)}
    there = has | ({"A", "B"} if "low" in has else set())
    made = {name: drawn(*size, seed=seed + i).requires_grad_(name in learns)
            for i, (name, size) in enumerate(sizes.items()) if name in there}  # fmt: skip
    parts = (made.get(name) for name in ("bias", "A", "B"))
    return Terms(Dense(drawn(o, WIDE, seed=seed + 9)), *parts, 0.7, made.get("gain"))


layers = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.sets(st.sampled_from(["low", "gain", "bias"])),
              st.sets(st.sampled_from(["A", "B", "gain", "bias"]))), min_size=1, max_size=3)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(layers, st.booleans(), st.integers(1, 7))
def test_outputs_and_gradients_are_those_of_the_formula(given, x_learns, count):
    terms = [layer(*each, seed=20 * k) for k, each in enumerate(given)]
    x = drawn(count, WIDE, seed=7).requires_grad_(x_learns)
    inputs = [t for each in terms for t in each[1:] if isinstance(t, torch.Tensor) and t.requires_grad]
    inputs += [x] * x_learns
    got, want = joined(terms, x), [formula(each, x) for each in terms]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if inputs:
        backs = [drawn(*y.shape, seed=i) for i, y in enumerate(want)]
        for a, b in zip(*(torch.autograd.grad(sum((y * g).sum() for y, g in zip(ys, backs, strict=True)), inputs)
                          for ys in (got, want)), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    else:
        assert not any(y.requires_grad for y in got)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(joined(terms, x), got, strict=True))


class Outside(Delta):
    """A delta of this test: gain and bias, and a B that reads through an A which stays as it is."""

    fused = True

    def __init__(self, o, i):
        super().__init__()
        self.register_buffer("A", drawn(3, i, dtype=torch.float32))
        self.B, self.gain = nn.Parameter(drawn(o, 3, seed=1).float()), nn.Parameter(1 + 0.1 * drawn(o, seed=2).float())
        self.shift = nn.Parameter(0.1 * drawn(o, seed=3).float())

    def terms(self, slot):
        bias = self.shift if slot.bias is None else slot.bias + self.shift
        return Terms(slot.weight, bias, self.A, self.B, 0.5, self.gain) if self.fused else None

    def forward(self, slot, x_TI):
        y = slot.weight(x_TI) * self.gain + 0.5 * (x_TI @ self.A.t()) @ self.B.t() + self.shift
        return y if slot.bias is None else y + slot.bias


def worn(model, ids, fused, form):
    """Gradients of all that learns: every linear layer wears `Outside`, and all documents begin with a prefix."""
    slots = [slot for slot in model.layers.modules() if isinstance(slot, Linear)]
    prefix = scramble(Adapter.build(method("prefix_tuning", tokens=3), model))
    deltas = nn.ModuleList()
    for slot in slots:
        slot.weight = parse(form).pack(slot.weight.dense(), torch.float32)
        deltas.append(Outside(*slot.weight.shape))
        deltas[-1].fused = fused
        slot.fill(deltas[-1])
    with prefix.on():
        loss = our_logits(model, ids).logsumexp(1).sum()
        loss.backward()
    return loss.detach(), [p.grad for p in (*deltas.parameters(), *prefix.parameters())]


@pytest.mark.parametrize("form", FORMS)
def test_a_delta_of_elsewhere_over_any_format_behind_a_prefix(form, tiny_path, ids):
    from deltaw.models import checkpoint

    (loss, got), (plain, want) = (worn(checkpoint.load(tiny_path), ids, fused, form) for fused in (True, False))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert all(g.any() for g in got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def kept(terms, x):
    """What is kept for the way back, but for what learns and the weights."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        joined(terms, x)
    own = {id(t) for each in terms for t in each}
    return [tuple(t.shape) for t in saved if id(t) not in own]


def test_x_is_kept_once_and_only_where_an_a_learns():
    x = drawn(11, WIDE).requires_grad_()
    three = [layer(o, 2, {"low"}, {"A", "B"}, seed=o) for o in (4, 5, 6)]
    assert kept(three, x) == [(11, WIDE), (11, 6)]
    fixed = [layer(o, 2, {"low"}, {"B"}, seed=o) for o in (4, 5, 6)]
    assert kept(fixed, x) == [(11, 6)]
    assert kept([layer(4, 2, {"low"}, {"A"}, seed=0)], x) == [(11, WIDE)]
    assert kept([layer(4, 2, set(), set(), seed=0)], x) == []
    assert kept([layer(4, 2, {"gain"}, {"gain"}, seed=0)], x) == [(11, 4)]


def test_what_is_worn_in_another_form_is_called(monkeypatch):
    class Doubled(Delta):
        def forward(self, slot, x_TI):
            return 2 * slot.run(x_TI)

    slots = [Linear(Dense(drawn(o, WIDE, seed=o))) for o in (3, 4, 5)]
    slots[1].fill(Doubled())
    x = drawn(6, WIDE)
    for k, (y, slot) in enumerate(zip(together(slots, x), slots, strict=True)):
        torch.testing.assert_close(y, (2 if k == 1 else 1) * x @ slot.weight.dense().t())


def test_bfloat16_rounds_as_often_as_the_layers_by_themselves():
    terms = [Terms(Dense(drawn(o, WIDE, seed=o).bfloat16()), None, *(t.float().requires_grad_() for t in (
        drawn(2, WIDE, seed=1), drawn(o, 2, seed=2))), 0.5) for o in (8, 9)]  # fmt: skip
    x = drawn(20, WIDE).bfloat16().requires_grad_()
    wide = [each._replace(weight=Dense(each.weight.dense().double()), A_RI=each.A_RI.double(), B_OR=each.B_OR.double())
            for each in terms]  # fmt: skip
    exact = [formula(each, x.double()) for each in wide]
    got = joined(terms, x)
    for y, want in zip(got, exact, strict=True):
        assert y.dtype == torch.bfloat16
        assert (y.double() - want).norm() / want.norm() < 5e-3
    inputs = [x, *(t for each in terms for t in (each.A_RI, each.B_OR))]
    for a, b in zip(torch.autograd.grad(sum(y.float().square().sum() for y in got), inputs),
                    torch.autograd.grad(sum(y.square().sum() for y in exact), inputs), strict=True):  # fmt: skip
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() / b.double().norm() < 1e-2


@pytest.mark.parametrize("name", ["lora", "lora_fa", "dora", "multi_lora", "tied_lora", "qa_lora", "loftq", "pissa"])
@torch.no_grad()
def test_terms_and_forward_of_a_technique_say_the_same(name, tiny):
    """Dropout of next to nothing takes the way of its own, which changes nothing."""
    rare = {} if name == "tied_lora" else {"dropout": 1e-30}
    adapter = scramble(Adapter.build(method(name, **rare), tiny)).train()
    x = drawn(5, 64, dtype=torch.float32)
    for path, delta in adapter.named_deltas():
        slot = tiny.get_submodule(path)
        x_TI = x[:, : slot.weight.shape[1]]
        apart = delta(slot, x_TI)
        delta.eval()
        torch.testing.assert_close(joined([delta.terms(slot)], x_TI)[0], apart, rtol=1e-4, atol=1e-4)
        assert isinstance(slot, Slot)
