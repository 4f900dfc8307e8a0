"""Attention of documents laid flat, natively: a brute force in fp64, and its gradients, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from deltaw.kernels import library
from deltaw.kernels.attention import attend

OFF = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(q, k, v, spans, scale, window):
    """A table of all scores, with what is not seen left out."""
    t, h, _ = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    seen = torch.zeros(t, t, dtype=torch.bool)
    for start, stop, stem, stem_stop in spans:
        keys = [*range(stem, stem_stop), *range(start, stop)]
        for i in range(start, stop):
            past = keys[: keys.index(i) + 1]
            seen[i, past[-window:] if window else past] = True
    scores = torch.einsum("ihe,jhe->hij", q, k).mul(scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhe->ihe", scores.softmax(-1), v)


def laid(families):
    """Documents of these lengths, family after family: the first of several is what the others begin with."""
    spans, at = [], 0
    for family in families:
        stem = (at, at + family[0]) if len(family) > 1 else (0, 0)
        for i, length in enumerate(family):
            spans.append((at, at + length, *(stem if i else (0, 0))))
            at += length
    return spans


def compare(families, heads, kv_heads, size, window, dtype):
    spans = laid(families)
    t = spans[-1][1]
    inputs = [drawn(t, n, size, seed=i).to(dtype).requires_grad_() for i, n in enumerate((heads, kv_heads, kv_heads))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, want = attend(*inputs, spans, size**-0.5, window), brute(*wide, spans, size**-0.5, window)
    back = drawn(*want.shape, seed=9).to(dtype)
    for a, b in zip((got, *torch.autograd.grad(got, inputs, back)),
                    (want, *torch.autograd.grad(want, wide, back.double())), strict=True):  # fmt: skip
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= OFF[dtype] * (b.norm() + back.norm())  # of one token dq is zero
        assert (a.double() - b).abs().max() <= 4 * OFF[dtype] * (b.abs().max() + 1)


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize("window", [0, 1, 20, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 64), (4, 4, 32), (9, 3, 64), (8, 1, 128)])
def test_documents_with_and_without_a_stem(path, heads, kv_heads, size, window, dtype):
    compare([[70, 9, 1], [1], [130], [17, 64, 65]], heads, kv_heads, size, window, dtype)


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "window"), [(2, 2, 32, 0), (6, 2, 64, 140), (5, 1, 256, 0)])
def test_documents_longer_than_what_is_looked_at_together(path, heads, kv_heads, size, window, dtype):
    compare([[300], [200, 150, 33], [129]], heads, kv_heads, size, window, dtype)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3),
       st.sampled_from([(2, 1), (2, 2), (6, 2)]), st.integers(0, 50), st.integers(1, 3),
       st.sampled_from(list(OFF)))  # fmt: skip
def test_any_documents_any_window_any_number_of_threads(families, heads, window, threads, dtype):
    torch.set_num_threads(threads)
    try:
        compare(families, *heads, 32, window, dtype)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
def test_large_scores_do_not_overflow(path, dtype):
    spans, x = laid([[40]]), (30 * drawn(40, 2, 32)).to(dtype)
    want = brute(x.double(), x.double(), x.double(), spans, 1.0, 0)
    rtol, atol = (1e-4, 1e-3) if dtype == torch.float32 else (1e-2, 0.1)
    torch.testing.assert_close(attend(x, x, x, spans, 1.0, 0).double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
def test_nothing_of_what_is_not_seen_gets_through(path, dtype):
    """Numbers that are none stand in all other documents, and others after the token."""
    spans = laid([[30], [50], [40]])
    q, k, v = (drawn(120, 2, 32, seed=i).to(dtype) for i in range(3))
    want = attend(q, k, v, spans, 0.2, 0)[30:60]
    for x in (q, k, v):
        x[:30] = x[80:] = torch.nan
    k[60:80], v[60:80] = drawn(20, 2, 32, seed=5), drawn(20, 2, 32, seed=6)
    assert torch.equal(attend(q, k, v, spans, 0.2, 0)[30:60], want)


@pytest.mark.parametrize("name", [library.REFERENCE, *library.available()])
def test_what_there_is_no_native_code_for_is_left_to_torch(name, choose):
    choose(name)
    assert (attend(*[drawn(4, 2, 32)] * 3, [(0, 4, 0, 0)], 1.0, 0) is None) == (name == library.REFERENCE)
    assert attend(*[drawn(4, 2, 24)] * 3, [(0, 4, 0, 0)], 1.0, 0) is None
    assert attend(*[drawn(4, 2, 32).double()] * 3, [(0, 4, 0, 0)], 1.0, 0) is None
    q, odd = drawn(4, 4, 32), [drawn(4, 2, 32).bfloat16(), drawn(4, 3, 32)]
    assert all(attend(q, x, x, [(0, 4, 0, 0)], 1.0, 0) is None for x in odd)
    assert attend(*[drawn(0, 2, 32)] * 3, [], 1.0, 0) is None


@pytest.mark.parametrize("dtype", list(OFF), ids=str)
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("bits", [0x7FC0_0000, 0x7FFF_FFFF, 0x7F80_0000])
def test_what_is_no_number_is_not_swallowed(path, bits, at, dtype):
    """In a query, a key, or a value; infinity in a query or key too."""
    tensors = [drawn(40, 2, 32, seed=i).to(dtype) for i in range(3)]
    tensors[at][5, 0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(dtype)
    got = attend(*tensors, [(0, 40, 0, 0)], 0.2, 0)
    want = brute(*(t.double() for t in tensors), [(0, 40, 0, 0)], 0.2, 0)
    assert torch.equal(got.isfinite().all(-1), want.isfinite().all(-1))
