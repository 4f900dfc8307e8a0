"""GPTQ: each column is rounded when those after it have made up for all before, as a brute force does it."""

import pytest
import torch

from deltaw.errors import UserError
from deltaw.weights import grid as module
from deltaw.weights.grid import Grid, gptq


def drawn(o, i, tokens=200, seed=0):
    """A matrix, and inputs that go together."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, i, generator=rng) @ torch.randn(i, i, generator=rng) + torch.randn(1, i, generator=rng)
    return torch.randn(o, i, generator=rng), x


def brute_force(w_OI, products_II, form):
    """Settle a column, then choose all that are left anew by least squares, in fp64."""
    h = products_II.double()
    h = h + module.DAMPING * h.diag().mean() * torch.eye(len(h))
    first, now, done = w_OI.double(), w_OI.double().clone(), []
    scales, offsets = [], []
    for c in range(w_OI.shape[1]):
        if c % form.group == 0:
            scale, offset = form.spanned(now[:, c : c + form.group].float())
            scales.append(scale)
            offsets.append(offset)
        done.append(form.near(now[:, c].float(), scale, offset).double() * scale.double() + offset.double())
        settled = torch.stack(done, 1)
        rest = slice(c + 1, None)
        now[:, rest] = first[:, rest] - (settled - first[:, : c + 1]) @ h[: c + 1, rest] @ torch.linalg.inv(
            h[rest, rest]
        )
    return torch.stack(done, 1)


@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize(("width", "group"), [(4, 8), (3, 16), (2, 32)])
def test_it_is_the_brute_force(width, group, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    form = Grid(width, group)
    w_OI, x = drawn(6, 32)
    got = gptq(w_OI, x.t() @ x, form, torch.float32).dense()
    want = brute_force(w_OI, x.t() @ x, form).float()
    assert (
        (got - want).abs() < 1e-3
    ).float().mean() > 0.97  # what lies next to a middle may go either way, and pass it on
    off, best = ((w_OI - got) @ x.t()).norm(), ((w_OI - want) @ x.t()).norm()
    assert off <= 1.05 * best


@pytest.mark.parametrize("width", [2, 3, 4])
def test_what_layers_give_is_nearer_than_by_rounding_alone(width):
    form = Grid(width, 32)
    w_OI, x = drawn(64, 128)
    plain = form.pack(w_OI, torch.float32).dense()
    by_rows = gptq(w_OI, x.t() @ x, form, torch.float32).dense()
    assert ((w_OI - by_rows) @ x.t()).norm() < 0.8 * ((w_OI - plain) @ x.t()).norm()
    assert (w_OI - by_rows).norm() > (w_OI - plain).norm()


def test_inputs_that_have_nothing_to_do_with_each_other_change_nothing():
    form, (w_OI, _) = Grid(4, 32), drawn(16, 64)
    assert torch.equal(gptq(w_OI, 3 * torch.eye(64), form, torch.float32).codes, form.pack(w_OI, torch.float32).codes)


def test_inputs_that_were_never_seen_are_rounded_as_they_are():
    form, (w_OI, x) = Grid(4, 32), drawn(16, 64)
    x[:, 32:] = 0
    got, plain = gptq(w_OI, x.t() @ x, form, torch.float32), form.pack(w_OI, torch.float32)
    assert torch.equal(got.dense()[:, 32:], plain.dense()[:, 32:])


def test_rows_must_be_whole_groups():
    with pytest.raises(UserError, match="no whole number of groups of 32"):
        Grid(4, 32).pack(torch.randn(4, 48), torch.float32)


@pytest.mark.parametrize("width", [2, 3])
def test_the_largest_inputs_first_leaves_less_where_inputs_differ_much(width):
    """The order of a published option: act-order, or desc_act."""
    w_OI, x = drawn(64, 128)
    x = x * torch.logspace(0, 2, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    in_turn, largest_first = (gptq(w_OI, x.t() @ x, Grid(width, 32, ordered=o), torch.float32) for o in (False, True))
    off = [((w_OI - weight.dense()) @ x.t()).norm() for weight in (in_turn, largest_first)]
    assert off[1] < 0.9 * off[0]
    assert torch.equal(largest_first.order.long(), x.square().sum(0).argsort(descending=True))
    x_TI = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
    want = x_TI.double() @ largest_first.dense().double().t()
    assert (largest_first(x_TI) - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_no_numbers_are_refused(value):
    products_II = torch.eye(64)
    products_II[3, 3] = value
    with pytest.raises(UserError, match="no number, or too large"):
        gptq(torch.randn(8, 64), products_II, Grid(4, 32), torch.float32)
