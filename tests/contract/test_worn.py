"""Rows that wear different adapters in one batch: an explicit formula in fp64, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from deltaw.kernels import library
from deltaw.kernels.worn import Change, Rows, Slab, Wear

OFF = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 4e-3}  # float16 is torch's work


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(i, o, rank, seed, dtype, gain=False, bias=False):
    A_RI, B_RO = drawn(rank, i, seed=seed) / i**0.5, drawn(rank, o, seed=seed + 1) / max(1, rank) ** 0.5
    parts = A_RI, B_RO, drawn(o, seed=seed + 2) if gain else None, drawn(o, seed=seed + 3) if bias else None
    return Change(*(None if p is None else p.to(dtype) for p in parts))


def formula(x, y, worn, layer):
    """For one row."""
    out = y.clone()
    for changes, weight in worn:
        if (own := changes[layer]) is not None:
            A, B, gain, bias = (None if p is None else p.double() for p in own)
            out += weight * (B.t() @ (A @ x) + (0 if gain is None else gain * y) + (0 if bias is None else bias))
    return out


def compare(rows, adapters, i, o, dtype, layer=1, total=None):
    """`rows`: start, stop and (number of an adapter, weight) of each."""
    slabs = [Slab.of(changes, dtype) for changes in adapters]
    total = total or max(stop for _, stop, _ in rows)
    x, y = (drawn(total, n, seed=90 + n).to(dtype) for n in (i, o))
    want = y.double()
    for start, stop, worn in rows:
        for t in range(start, stop):
            pairs = [(adapters[n], weight) for n, weight in worn]
            want[t] = formula(x[t].double(), y[t].double(), pairs, layer)
    got = Wear([Rows(a, b, tuple((slabs[n], w) for n, w in worn)) for a, b, worn in rows]).onto(y, x, layer)
    assert got is y
    assert (got.double() - want).abs().max() <= OFF[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize(("i", "o"), [(576, 192), (64, 1536), (48, 40), (33, 7)])
def test_each_row_its_own(path, i, o, dtype):
    ranks = [4, 16, 64, 7, 1]
    adapters = [[None, change(i, o, r, 10 * r, dtype, gain=r == 7, bias=r in (7, 64))] for r in ranks]
    adapters.append([change(i, o, 4, 5, dtype), None])  # nothing at this layer
    rows = [(0, 1, [(0, 1.0)]), (1, 3, [(1, 1.0)]), (4, 5, [(2, 1.0)]), (5, 8, []), (10, 30, [(3, 1.0)]),
            (8, 10, [(3, 0.7), (4, -0.3), (2, 1.0)]), (30, 31, [(5, 1.0)]), (31, 60, [(2, 0.4), (3, 0.6)]),
            (60, 360, [(1, 0.5), (3, 0.6)])]  # fmt: skip
    compare(rows, adapters, i, o, dtype, total=364)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 70), st.integers(1, 70), st.sampled_from(list(OFF)), st.integers(1, 3))
def test_any_batch_any_number_of_threads(data, i, o, dtype, threads):
    kinds = data.draw(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=3))
    adapters = [[change(i, o, *kind[:1], 7 * n, dtype, *kind[1:])] for n, kind in enumerate(kinds)]
    rows, at = [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        at += data.draw(st.integers(0, 2))
        stop = at + data.draw(st.integers(1, 20))
        worn = data.draw(
            st.lists(st.tuples(st.integers(0, len(kinds) - 1), st.sampled_from([1.0, 0.5, -2.0])), max_size=3)
        )
        rows.append((at, stop, worn))
        at = stop
    torch.set_num_threads(threads)
    try:
        compare(rows, adapters, i, o, dtype, layer=0)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 256])
def test_what_is_no_number_stays_with_those_who_wear_it(path, rows):
    whole = change(64, 64, 4, 3, torch.bfloat16)
    broken = whole._replace(B_RO=torch.full_like(whole.B_RO, torch.nan))
    good, bad = (Slab.of([each], torch.bfloat16) for each in (whole, broken))
    x, y = drawn(3 * rows, 64).bfloat16(), torch.zeros(3 * rows, 64, dtype=torch.bfloat16)
    spans = [(i * rows, (i + 1) * rows) for i in range(3)]
    Wear([Rows(*span, ((slab, 1.0),)) for span, slab in zip(spans, (good, bad, good), strict=True)]).onto(y, x, 0)
    assert y[:rows].isfinite().all()
    assert y[rows : 2 * rows].isnan().all()
    assert y[2 * rows :].isfinite().all()


def test_without_native_code_torch_does_all(choose):
    choose(library.REFERENCE)
    compare(
        [(0, 1, [(0, 1.0)]), (1, 30, [(0, 0.5)])],
        [[None, change(8, 12, 2, 1, torch.float32, True, True)]],
        8,
        12,
        torch.float32,
    )
