"""Attention over pages, natively and by torch: a brute force in fp64 over whole sequences, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from deltaw.kernels import library
from deltaw.kernels.attention import SIDE, Book, Run

OFF = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(q, k, v, scale, window):
    """A sequence's whole table of scores."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    far = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (far >= 0) & (far < (window or len(q)))
    scores = torch.einsum("ihe,jhe->hij", q, k).mul(scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhe->ihe", scores.softmax(-1), v)


def book(pages, kv_heads, size, dtype):
    """Pages full of what is no number, as memory that was used before may be."""
    return Book(torch.full((pages, 2 * kv_heads, SIDE * size), torch.nan, dtype=dtype), size)


def tables(lengths, seed=0):
    """Pages of each sequence, wherever they may lie, and how many there are."""
    counts = [-(-n // SIDE) for n in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [[order.pop() for _ in range(n)] for n in counts]
    return torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows], dtype=torch.int32), sum(counts)


def steps(cuts):
    """What each step brings of each sequence, whose tokens come in pieces of these lengths."""
    for at in range(max(map(len, cuts))):
        yield [(b, sum(pieces[:at]), sum(pieces[: at + 1])) for b, pieces in enumerate(cuts) if at < len(pieces)]


def compare(cuts, heads, kv_heads, size, window, dtype, native=True):
    lengths = [sum(pieces) for pieces in cuts]
    x = [[drawn(n, h, size, seed=10 * i + b).to(dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]
         for b, n in enumerate(lengths)]  # fmt: skip
    table_NP, count = tables(lengths)
    pages, got = book(count, kv_heads, size, dtype), [[] for _ in cuts]
    for step in steps(cuts):
        runs, at = [], 0
        for _, past, end in step:
            runs.append(Run(at, at + end - past, past))
            at += end - past
        q, k, v = (torch.cat([x[b][i][past:end] for b, past, end in step]) for i in range(3))
        rows = table_NP[[b for b, *_ in step]].contiguous()
        y = (
            pages.attend(q, k, v, torch.tensor(runs), rows, size**-0.5, window)
            if native
            else by_torch(pages, q, k, v, runs, rows, window)
        )
        assert y.dtype == dtype
        for (b, *_), run in zip(step, runs, strict=True):
            got[b].append(y[run.start : run.stop])
    for b in range(len(cuts)):
        want = brute(*(t.double() for t in x[b]), size**-0.5, window)
        assert (torch.cat(got[b]).double() - want).abs().max() <= 4 * OFF[dtype]
        for kept, put in zip(pages.read(table_NP[b], lengths[b]), x[b][1:], strict=True):
            assert torch.equal(kept, put)


def by_torch(pages, q, k, v, runs, rows, window):
    out = []
    for (start, stop, past), row in zip(runs, rows, strict=True):
        pages.write(row, past, k[start:stop], v[start:stop])
        seen = pages.read(row, past + stop - start)
        whole_q = torch.cat((q.new_zeros(past, *q.shape[1:]), q[start:stop]))
        out.append(brute(whole_q.double(), *(t.double() for t in seen), q.shape[-1] ** -0.5, window)[past:].to(q.dtype))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize("window", [0, 1, 20, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 64), (4, 4, 32), (9, 3, 64), (8, 1, 128), (48, 1, 32)])
def test_prompts_in_chunks_beside_sequences_that_go_on(path, heads, kv_heads, size, window, dtype):
    cuts = [[100, 1, 1, 1], [1] * 4, [31, 1, 1], [32, 33, 1], [64, 64], [7, 90, 3, 1]]
    compare(cuts, heads, kv_heads, size, window, dtype)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=4),
       st.sampled_from([(2, 1), (2, 2), (6, 2)]), st.integers(0, 50), st.integers(1, 3),
       st.sampled_from(list(OFF)), st.booleans())  # fmt: skip
def test_any_pieces_any_window_any_number_of_threads(cuts, heads, window, threads, dtype, native):
    torch.set_num_threads(threads)
    try:
        compare(cuts, *heads, 32, window, dtype, native)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", [library.REFERENCE, *library.available()])
def test_what_there_is_no_native_code_for_is_left_to_torch(name, choose):
    choose(name)
    table_NP = torch.zeros(1, 1, dtype=torch.int32)
    for size, dtype, native in (32, torch.float32, True), (24, torch.float32, False), (32, torch.float64, False):
        x = drawn(4, 1, size).to(dtype)
        got = book(1, 1, size, dtype).attend(x, x, x, torch.tensor([Run(0, 4, 0)]), table_NP, 1.0, 0)
        assert (got is not None) == (native and name != library.REFERENCE)
