"""Sums of products, natively and by torch: an explicit sum in fp64, on every instruction set."""

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from deltaw.kernels import library, products
from deltaw.kernels.products import across, summed

OFF = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def drawn(rows, columns, seed, dtype=torch.bfloat16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(rows, columns, depths, turned, dtype=torch.bfloat16, way="new"):
    parts = [(drawn(rows, k, i, dtype), drawn(columns, k, i + 9, dtype).t() if turned else drawn(k, columns, i, dtype))
             for i, k in enumerate(depths)]  # fmt: skip
    before = drawn(rows, columns, 99, dtype)
    want = sum(a.double() @ b.double() for a, b in parts) + (before.double() if way == "onto" else 0)
    got = summed(parts, **({} if way == "new" else {way: before}))
    assert got.dtype == dtype
    assert (got is before) == (way != "new")
    assert (got.double() - want).abs().max() <= OFF[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize("way", ["new", "onto", "to"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("depths", [(64,), (576, 16), (1024, 48, 5), (3000,)], ids=str)
def test_a_sum_as_large_as_in_a_model(path, depths, turned, way, dtype):
    compare(300, 200, depths, turned, dtype, way)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.lists(st.integers(1, 90), min_size=1, max_size=3), st.booleans(),
       st.sampled_from(["new", "onto", "to"]), st.integers(1, 3))  # fmt: skip
def test_any_sizes_any_number_of_threads(rows, columns, depths, turned, way, threads):
    torch.set_num_threads(threads)
    try:
        compare(rows, columns, depths, turned, way=way)
    finally:
        torch.set_num_threads(1)


def test_parts_of_larger_tables(path):
    """Rows lie apart, and begin anywhere."""
    a, b, c = drawn(70, 90, 0), drawn(90, 90, 1), torch.zeros(70, 80, dtype=torch.bfloat16)
    want = a[:, 7:40].double() @ b[3:36, 5:50].double() + a[:, 1:].double() @ b[:45, 1:].double().t()
    got = summed([(a[:, 7:40], b[3:36, 5:50]), (a[:, 1:], b[:45, 1:].t())], to=c[:, 11:56])
    assert (got.double() - want).abs().max() <= OFF[torch.bfloat16] * want.abs().max()
    assert not c[:, :11].any()
    assert not c[:, 56:].any()


def test_it_is_rounded_once(path):
    """What a large number that cancels in the end would take with it, had it been rounded, is there."""
    a, b = torch.ones(32, 32, dtype=torch.bfloat16), torch.full((32, 32), 1024.0, dtype=torch.bfloat16)
    got = summed([(a, b), (a, torch.full_like(b, 2**-6)), (a, -b)])
    rounded = 0.0 if library.function("summed") is None else 0.5  # torch rounds each product
    assert torch.equal(got, torch.full_like(b, rounded))


def test_what_it_is_not_written_for_is_left_to_torch(path, monkeypatch):
    monkeypatch.setattr(products, "Sum", None)
    compare(40, 40, (8,), False, torch.float32)
    compare(products.FEWEST_ROWS - 1, 40, (8,), False)
    a = drawn(8, 40, 0).t()  # whose rows are not rows in memory
    assert (summed([(a, drawn(8, 40, 1))]).double() - a.double() @ drawn(8, 40, 1).double()).abs().max() < 0.2


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize(("rows", "left", "right"), [(300, 48, 200), (70, 3, 40), (1, 16, 33), (0, 4, 4)])
def test_the_product_across_rows(path, rows, left, right, dtype):
    a, b = drawn(rows, left, 0, dtype), drawn(rows, right, 1, dtype)
    want = a.double().t() @ b.double()
    assert (across(a, b).double() - want).abs().max() <= OFF[dtype] * max(1, want.abs().max())


def test_any_number_of_rows_is_added_up_without_keeping_anything(path):
    """torch keeps code for every number of rows that it meets, megabytes each."""
    ours, process, held = library.function("summed") is not None, psutil.Process(), []
    for rows in range(100, 260):
        across(drawn(rows, 16, 0), drawn(rows, 1536, 1))
        held.append(process.memory_info().rss)
    assert (held[-1] - held[20] < 30e6) or not ours


@pytest.mark.parametrize("sizes", [(0, 8, 8), (40, 0, 8), (40, 8, 0)])
def test_sums_of_nothing(path, sizes):
    n, k, m = sizes
    assert torch.equal(summed([(drawn(n, k, 0), drawn(k, m, 1))]), torch.zeros(n, m, dtype=torch.bfloat16))
