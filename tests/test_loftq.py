"""§2.4 L1 to L7 and §4.6 G1 to G11: turns of packing and of the strongest directions, and formats under a budget."""

import itertools

import numpy as np
import pytest
import torch
from oracles import our_logits

from deltaw.adapters.adapter import Adapter
from deltaw.adapters.watch import importance
from deltaw.api.prepare import packed_by_layer
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.errors import UserError
from deltaw.methods import loftq, lq_lora, method
from deltaw.methods.loftq import Corrected, split
from deltaw.models.slots import Linear
from deltaw.scoring.loss import batch_loss
from deltaw.weights.formats import parse

FORMS = ["nf4", "nf3-dq", "nf2", "int3-g32", "nf3-b32-s4.fp16.64"]


def drawn(o=96, i=64, seed=0):
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed))


def left(w_OI, found):
    q, A, B = found
    return float((w_OI - q.dense() - B @ A).square().sum())


def rows(model, count=6):
    """A function that gives the losses of random rows, as the model is when they are asked for."""
    rng = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(0, 256, (20,), generator=rng).tolist()) for _ in range(count)]
    return lambda: (batch_loss(model, lay([Encoded(row, (True,) * 20)])) / 19 for row in ids)


def begun(name, model, losses=tuple, **chosen):
    made = method(name, **chosen)
    return made.begin(Adapter.build(made, model), model, None, losses)


@pytest.mark.parametrize("form", FORMS)
def test_l1_one_turn_leaves_what_the_strongest_directions_leave(form):
    w_OI = drawn()
    error = w_OI - parse(form).pack(w_OI, torch.float32).dense()
    want = error.square().sum() - torch.linalg.svdvals(error)[:8].square().sum()
    assert left(w_OI, split(w_OI, parse(form), 8, 1)) == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_l2_l4_more_turns_and_directions_leave_less(form):
    w_OI = drawn()
    alone = (w_OI - parse(form).pack(w_OI, torch.float32).dense()).square().sum().item()
    turns = [left(w_OI, split(w_OI, parse(form), 8, t)) for t in (1, 2, 5, 10)]
    assert turns == sorted(turns, reverse=True)
    assert turns[0] < alone
    ranks = [left(w_OI, split(w_OI, parse(form), r, 1)) for r in (1, 4, 16, 64)]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("form", ["nf4", "nf3", "nf2"])
def test_l6_what_was_saved_as_bfloat16_packs_into_the_same_codes(form):
    q = split(drawn(), parse(form), 8, 5)[0]
    assert torch.equal(q.repack(q.dense().bfloat16().float()).codes, q.codes)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 8.0, 16.0, 64.0])
@pytest.mark.parametrize("name", ["loftq", "lq_lora"])
def test_l3_g9_it_starts_as_near_whatever_alpha_is(name, alpha, tiny, ids):
    more = {"fisher": False} if name == "lq_lora" else {}
    adapter = begun(name, tiny, rank=8, alpha=alpha, format="nf3", **more)
    for layer, delta in adapter.named_deltas():
        w_OI = tiny.get_submodule(layer).weight.dense()
        first = name == "loftq"
        want = split(w_OI, parse("nf3"), 8, adapter.method.iterations, quantised_first=first)
        got = (delta.weight, delta.scale**0.5 * delta.A, delta.scale**0.5 * delta.B)
        assert left(w_OI, got) == pytest.approx(left(w_OI, want), rel=1e-4)
        form = delta.weight.dense() + delta.scale * delta.B @ delta.A
        x = torch.randn(3, w_OI.shape[1])
        torch.testing.assert_close(delta(Linear(tiny.get_submodule(layer).weight), x), x @ form.t(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_l5_it_starts_nearer_to_the_base_than_qlora(tiny, ids):
    base = our_logits(tiny, ids).log_softmax(1)

    def kl(adapter):
        with adapter.on():
            return (base.exp() * (base - our_logits(tiny, ids).log_softmax(1))).sum(1).mean().item()

    plain = Adapter.build(method("loftq", rank=8, format="nf3"), tiny)  # Q alone, as B is zero before it begins
    assert kl(begun("loftq", tiny, rank=8, format="nf3")) < 0.8 * kl(plain)


def test_l7_directions_that_are_searched_for_are_nearly_the_strongest(monkeypatch):
    w_OI = drawn(200, 150)
    exact = left(w_OI, split(w_OI, parse("nf3"), 16, 1))
    monkeypatch.setattr(loftq, "EXACT", 10)
    torch.manual_seed(0)
    searched = left(w_OI, split(w_OI, parse("nf3"), 16, 1))
    assert exact < searched <= 1.01 * exact


@torch.no_grad()
def test_formats_may_differ_by_layer_and_q_travels_with_the_adapter(tiny):
    adapter = begun("loftq", tiny, rank=2, format="nf2", format_pattern={"layers.0.*": "nf4-dq"})
    kinds = {name.split(".")[1]: str(delta.weight.form) for name, delta in adapter.named_deltas()}
    assert kinds == {"0": "nf4-dq", "1": "nf2"}
    assert any(name.endswith("weight.codes2") for name in adapter.state_dict())


@pytest.mark.parametrize("first", [True, False])
def test_g7_the_best_turn_is_kept(first):
    """The published LQ-LoRA ends with the turn that was worse."""
    w_OI, form = drawn(), parse("nf2")
    found = split(w_OI, form, 8, 40, quantised_first=first)
    every = [left(w_OI, split(w_OI, form, 8, t, quantised_first=first)) for t in range(1, 41)]
    assert left(w_OI, found) == pytest.approx(min(every), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_g11_what_is_left_is_less_than_without_directions(form):
    w_OI = drawn()
    alone = (w_OI - parse(form).pack(w_OI, torch.float32).dense()).square().sum().item()
    assert left(w_OI, split(w_OI, parse(form), 8, 8, quantised_first=False)) < alone


def test_g8_equal_weights_change_nothing_and_weights_of_rows_and_columns_are_met_exactly():
    w_OI, form = drawn(20, 16), parse("fp16")  # hardly any error: what counts is the first choice of directions
    even = split(w_OI, form, 4, 1, torch.full((20,), 3.0), torch.full((16,), 0.5), quantised_first=False)
    plain = split(w_OI, form, 4, 1, quantised_first=False)
    torch.testing.assert_close(even[2] @ even[1], plain[2] @ plain[1], rtol=0, atol=1e-4)
    by_O, by_I = torch.rand(20) + 0.1, torch.rand(16) + 0.1
    _, A, B = split(w_OI, form, 4, 1, by_O, by_I, quantised_first=False)
    got = (by_O[:, None] * (w_OI - B @ A) * by_I).square().sum().item()
    torch.manual_seed(0)
    best = np.inf
    for _ in range(3):
        a, b = (torch.randn(*s, requires_grad=True) for s in ((4, 16), (20, 4)))
        optimizer = torch.optim.LBFGS([a, b], max_iter=300, line_search_fn="strong_wolfe")

        def loss(a=a, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            off = (by_O[:, None] * (w_OI - b @ a) * by_I).square().sum()
            off.backward()
            return off

        optimizer.step(loss)
        best = min(best, loss().item())
    assert got <= best * 1.001


def test_importance_is_the_mean_squared_gradient_of_each_row_of_data(tiny):
    slots = {name: slot for name, slot in tiny.layers.named_modules() if isinstance(slot, Linear)}
    got = importance(slots, rows(tiny)())
    adapter = Adapter.build(method("full", targets="all-linear"), tiny)
    squares = dict.fromkeys(slots, 0.0)
    with adapter.on():
        for loss in rows(tiny)():
            adapter.zero_grad()
            loss.backward()
            for name, delta in adapter.named_deltas():
                squares[name.removeprefix("layers.")] += delta.value.grad.square()
    for name, square in squares.items():
        torch.testing.assert_close(got[name][0], square.mean(1).sqrt(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(got[name][1], square.mean(0).sqrt(), rtol=1e-3, atol=1e-6)
    assert all(slot.delta is None for slot in slots.values())


def test_what_never_matters_counts_little_and_not_nothing(tiny):
    slots = {"q": tiny.layers[0].self_attn.q_proj}
    by_O, by_I = importance(slots, [])["q"]
    assert bool((by_O == 1).all())
    assert bool((by_I == 1).all())


def table(rng, rows=3, columns=4):
    sizes = np.sort(rng.uniform(2, 8, (rows, columns)), 1)
    return np.sort(rng.uniform(0, 1, (rows, columns)), 1)[:, ::-1].copy(), sizes


@pytest.mark.parametrize("seed", range(8))
def test_g4_the_choice_is_the_brute_forces(seed):
    costs, sizes = table(np.random.default_rng(seed))
    for share in (0.1, 0.4, 0.9):
        most = sizes.min(1).sum() + share * (sizes.max(1).sum() - sizes.min(1).sum())

        def total(of, picks):
            return sum(of[i, c] for i, c in enumerate(picks))

        fitting = [p for p in itertools.product(range(4), repeat=3) if total(sizes, p) <= most]
        got = lq_lora.choose(costs, sizes, most)
        assert total(sizes, got) <= most * (1 + 1e-9)
        assert total(costs, got) == pytest.approx(min(total(costs, p) for p in fitting), rel=1e-3)


def test_g1_g2_g3_a_budget_is_kept_and_more_of_it_is_never_worse():
    costs, sizes = table(np.random.default_rng(0), 40, 30)
    numbers, before = 40.0, np.inf
    for each in (3.0, 4.0, 5.0, 6.0, 8.0):
        got = lq_lora.choose(costs, sizes, each * numbers)
        assert sum(sizes[i, c] for i, c in enumerate(got)) <= each * numbers * (1 + 1e-9)
        cost = sum(costs[i, c] for i, c in enumerate(got))
        bound = max(
            (costs + price * sizes).min(1).sum() - price * each * numbers for price in np.geomspace(1e-5, 10, 400)
        )
        assert bound - 1e-9 <= cost <= before + 1e-9
        assert cost - bound <= costs.max()  # no further from the bound than one choice
        before = cost


@pytest.mark.parametrize("most", [2.5, 3.0, 4.2])
def test_g6_the_packed_matrices_have_the_bits_that_were_asked_for(tiny, most):
    adapter = begun("lq_lora", tiny, rows(tiny), rank=2, bits=most, iterations=1)
    weights = [delta.weight for _, delta in adapter.named_deltas() if isinstance(delta, Corrected)]
    numbers = sum(w.shape[0] * w.shape[1] for w in weights)
    assert 0.9 * most < 8 * sum(w.stored_bytes for w in weights) / numbers <= most
    assert adapter.method.bits == most
    again = Adapter.build(adapter.method, tiny)  # as a file is read: nothing is chosen anew
    assert {n: str(d.weight.form) for n, d in again.named_deltas()} == {
        n: str(d.weight.form) for n, d in adapter.named_deltas()
    }


@torch.no_grad()
@pytest.mark.parametrize("turns", [1, 3])
def test_as_many_turns_are_taken_as_are_asked_for(tiny, turns):
    for layer, delta in begun("loftq", tiny, rank=4, format="nf2", iterations=turns).named_deltas():
        w_OI = tiny.get_submodule(layer).weight.dense()
        want = split(w_OI, parse("nf2"), 4, turns)
        assert left(w_OI, (delta.weight, delta.scale**0.5 * delta.A, delta.scale**0.5 * delta.B)) == pytest.approx(
            left(w_OI, want), rel=1e-4)  # fmt: skip
    assert left(drawn(), split(drawn(), parse("nf2"), 4, 1)) > left(drawn(), split(drawn(), parse("nf2"), 4, 3))


def test_weighted_by_rows_less_is_left_where_it_matters_and_more_elsewhere(tiny):
    slots = {name: slot for name, slot in tiny.named_modules() if isinstance(slot, Linear)}
    weights = importance(slots, rows(tiny)())
    off = {}
    for fisher in (True, False):
        adapter = begun("lq_lora", tiny, rows(tiny), rank=4, format="nf2", fisher=fisher)
        errors = {
            n: slots[n].weight.dense() - d.weight.dense() - d.scale * d.B @ d.A for n, d in adapter.named_deltas()
        }
        weighted = sum((weights[n][0][:, None] * e * weights[n][1]).square().sum().item() for n, e in errors.items())
        off[fisher] = weighted, sum(e.square().sum().item() for e in errors.values())
    assert off[True][0] < off[False][0]
    assert off[True][1] > off[False][1]


@torch.no_grad()
def test_where_packing_loses_nothing_it_starts_as_lora_and_can_learn(tiny):
    for _, delta in begun("loftq", tiny, rank=4, format="fp32").named_deltas():
        assert bool(delta.A.any(1).all())
        assert not delta.B.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["loftq", "lq_lora"])
def test_a_rank_above_what_a_matrix_has_leaves_the_rest_to_be_learnt(name, tiny):
    for layer, delta in begun(name, tiny, rows(tiny), rank=80, format="nf2").named_deltas():
        o, i = delta.weight.shape
        wide = min(o, i)
        assert bool(delta.A.any(1).all())
        assert delta.B[:, :wide].any(0).all()
        assert not delta.B[:, wide:].any()
        if name == "loftq" and wide < 80:  # all that is missing is there
            w_OI = tiny.get_submodule(layer).weight.dense()
            got = delta.weight.dense() + delta.scale * delta.B @ delta.A
            torch.testing.assert_close(got, w_OI, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("kind", ["any", "of rank 3", "zero"])
def test_directions_are_those_of_the_singular_values(shape, kind):
    w_OI = drawn(*shape) if kind == "any" else drawn(shape[0], 3) @ drawn(3, shape[1], 1)
    w_OI = 0 * w_OI if kind == "zero" else w_OI
    A, B = loftq.directions(w_OI, 8)
    u, s, vt = torch.linalg.svd(w_OI.double(), full_matrices=False)
    want = u[:, :8] * s[:8] @ vt[:8]
    torch.testing.assert_close((B @ A).double(), want, rtol=0, atol=1e-4 * max(1.0, s[0].item()))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-3)


def test_a_pattern_of_formats_that_fits_no_layer_is_refused(tiny):
    with pytest.raises(UserError, match="fits no adapted layer"):
        Adapter.build(method("loftq", format_pattern={"layers.9.*": "nf2"}), tiny)


def test_a_budget_and_formats_by_hand_do_not_go_together(tiny):
    with pytest.raises(UserError, match="A budget chooses the format of every layer"):
        begun("lq_lora", tiny, rows(tiny), rank=2, bits=3.0, format_pattern={"layers.0.*": "nf4"})
    with pytest.raises(UserError, match="Leave --bits or --budget out"):
        begun("lq_lora", tiny, rows(tiny), rank=2, bits=3.0, budget="1MB")


def test_a_budget_is_a_size_and_the_same_as_its_bits(tiny):
    by_bits = begun("lq_lora", tiny, rows(tiny), rank=2, bits=3.0, iterations=1)
    weights = [delta.weight for _, delta in by_bits.named_deltas()]
    numbers = sum(w.shape[0] * w.shape[1] for w in weights)
    by_size = begun("lq_lora", tiny, rows(tiny), rank=2, budget=f"{3.0 * numbers / 8e3}kB", iterations=1)
    assert by_size.method.format_pattern == by_bits.method.format_pattern
    told = packed_by_layer(by_size)
    assert [line.split()[0] for line in told] == [name for name, _ in by_size.named_deltas()]
    assert len({line.split()[1] for line in told}) > 1
    bits = sum(float(line.split()[2]) * w.shape[0] * w.shape[1] for line, w in zip(told, weights, strict=True))
    assert bits == pytest.approx(8 * sum(w.stored_bytes for w in weights), rel=1e-3)
    assert packed_by_layer(begun("loftq", tiny, rank=2)) == ()  # all alike: there is nothing to tell
    with pytest.raises(UserError, match=r"or --budget \d+kB"):
        begun("lq_lora", tiny, rows(tiny), rank=2, budget="1kB")


@pytest.mark.parametrize("said", ["60", "MB", "1.2.3MB", "-5MB", "60TB"])
def test_a_budget_that_is_no_size_is_refused(said, tiny):
    with pytest.raises(UserError, match="budget"):
        begun("lq_lora", tiny, rows(tiny), rank=2, budget=said)


def test_g5_too_few_bits_are_said_with_the_fewest_that_there_are(tiny):
    with pytest.raises(UserError, match=r"No formats have 1\.5 bits a number.*Take --bits 2\.\d\d or more"):
        begun("lq_lora", tiny, rows(tiny), rank=2, bits=1.5)
    plenty = begun("lq_lora", tiny, rows(tiny), rank=2, bits=32.0, iterations=1)
    assert {delta.weight.form.width for _, delta in plenty.named_deltas()} == {8}
