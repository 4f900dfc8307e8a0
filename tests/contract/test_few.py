"""Products of few rows with matrices as they lie: an explicit product in fp64, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from deltaw.kernels import library
from deltaw.kernels.products import summed, times

OFF = 8e-3
EDGES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 130, 192, 512, 513]
"""Numbers of rows around those where another way is taken."""


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def within(rows, columns, before=3, behind=5):
    """A table in the midst of what is no number."""
    table = torch.full((rows + 2, before + columns + behind), torch.nan, dtype=torch.bfloat16)
    part = table[1:-1, before : before + columns]
    return part.copy_(drawn(rows, columns, rows + columns))


def near(got, want):
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= OFF * want.abs().max()


def wanted(x, w):
    return x.double() @ w.double().t()


@pytest.mark.parametrize("rows", EDGES)
@pytest.mark.parametrize("shape", [(576, 192), (1536, 64), (64, 33), (31, 40), (100, 1)], ids=str)
def test_as_in_a_model_and_at_edges(path, rows, shape):
    inputs, outputs = shape
    x, w = drawn(rows, inputs, 1), drawn(outputs, inputs, 2)
    near(times(x, w), wanted(x, w))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200), st.integers(1, 140), st.integers(1, 100), st.integers(1, 3))
def test_any_sizes_any_number_of_threads_wherever_they_lie(rows, inputs, outputs, threads):
    torch.set_num_threads(threads)
    try:
        x, w = within(rows, inputs), within(outputs, inputs, 1, 2)
        near(times(x, w), wanted(x, w))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("way", ["new", "onto", "to"])
@pytest.mark.parametrize("depths", [(70,), (64, 16), (100, 48, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6, 16, 40])
def test_sums_of_what_is_worn(path, rows, depths, way):
    """Rounded once, however many they are; what lies beside is left alone."""
    parts = [(within(rows, k), within(50, k).t()) for k in depths]
    whole = within(rows, 50)
    before = whole.clone()
    want = sum(a.double() @ b.double() for a, b in parts) + (before.double() if way == "onto" else 0)
    got = summed(parts, **({} if way == "new" else {way: whole}))
    assert (got is whole) == (way != "new")
    near(got, want)
    assert whole._base[:, :3].isnan().all()
    assert whole._base[:, 53:].isnan().all()


def test_few_rows_are_rounded_once(path):
    for rows in (1, 8, 32):
        a, b = torch.ones(rows, 32, dtype=torch.bfloat16), torch.full((40, 32), 1024.0, dtype=torch.bfloat16).t()
        got = summed([(a, b), (a, torch.full((40, 32), 2**-6, dtype=torch.bfloat16).t()), (a, -b)])
        rounded = 0.0 if library.function("summed") is None else 0.5  # torch rounds each product
        assert torch.equal(got, torch.full_like(got, rounded))


@pytest.mark.parametrize("counts", [range(1, 9), range(9, 193, 13)], ids=["up to eight", "more"])
def test_a_row_is_the_same_among_any_others(path, counts):
    if library.function("product") is None:
        return  # torch's own
    x, w = drawn(192, 300, 0), drawn(70, 300, 1)
    most = times(x[: counts[-1]], w)
    for count in counts:
        assert torch.equal(times(x[:count], w), most[:count])
        assert torch.equal(times(x[counts[-1] - count : counts[-1]], w), most[counts[-1] - count :])


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row_and_column(path, rows, value):
    x, w = drawn(rows, 70, 0).abs() + 0.1, drawn(50, 70, 1).abs() + 0.1
    clean = times(x, w)
    x[rows - 1, 69] = value
    got = times(x, w)
    assert torch.equal(got[: rows - 1], clean[: rows - 1])
    assert torch.equal(got[rows - 1], torch.full_like(got[0], value)) or got[rows - 1].isnan().all()
    assert got[rows - 1].isnan().all() == (value != value)
    x[rows - 1, 69], w[49, 0] = 1, value
    got = times(x, w)
    assert got[:, :49].isfinite().all()
    assert not got[:, 49].isfinite().any()


def test_gradients_are_torchs(path):
    x, w = drawn(4, 40, 0).requires_grad_(), drawn(30, 40, 1).requires_grad_()
    times(x, w).float().square().sum().backward()
    ours = x.grad, w.grad
    x.grad = w.grad = None
    F.linear(x, w).float().square().sum().backward()
    assert torch.equal(ours[0], x.grad)
    assert torch.equal(ours[1], w.grad)


@pytest.mark.parametrize("shape", [(0, 8, 8), (4, 0, 8), (4, 8, 0)], ids=str)
def test_products_of_nothing(path, shape):
    n, k, m = shape
    assert torch.equal(times(drawn(n, k), drawn(m, k)), torch.zeros(n, m, dtype=torch.bfloat16))


def test_other_types_and_turned_tables_are_left_to_torch(path):
    x, w = drawn(4, 40, 0), drawn(30, 40, 1)
    assert torch.equal(times(x.float(), w.float()), F.linear(x.float(), w.float()))
    for a, b in ((drawn(40, 4).t(), w), (x, drawn(40, 30, 1).t())):
        assert torch.equal(times(a, b), F.linear(a, b))
