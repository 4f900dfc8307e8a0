"""Who sees whom: attention over spans is plain softmax attention under the mask that the spans describe."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from deltaw.models import seen
from deltaw.models.seen import Documents, Score, Span, attention, causal

PLAIN = Score(8**-0.5)


def brute_force(spans, q_THE, k_TKE, v_TKE, score=PLAIN):
    """Every token's softmax over the tokens its span lets it see, one by one, in fp64."""
    y_THE = torch.zeros_like(q_THE, dtype=torch.float64)
    per_key = q_THE.shape[1] // k_TKE.shape[1]
    for start, stop, stem_start, stem_stop in spans:
        for t in range(start, stop):
            sees = [*range(stem_start, stem_stop), *range(start, t + 1)][-score.window :]
            for h in range(q_THE.shape[1]):
                k_SE, v_SE = k_TKE[sees, h // per_key].double(), v_TKE[sees, h // per_key].double()
                z_S = k_SE @ q_THE[t, h].double() * score.scale
                z_S = (z_S / score.cap).tanh() * score.cap if score.cap else z_S
                y_THE[t, h] = z_S.softmax(0) @ v_SE
    return y_THE


@st.composite
def laid(draw):
    """Groups of documents, some after a stem, as spans of a flat row."""
    spans, at = [], 0
    group = st.tuples(st.integers(0, 5), st.lists(st.integers(1, 5), min_size=1, max_size=3))
    for stem, documents in draw(st.lists(group, min_size=1, max_size=3)):
        base = at
        if stem:
            spans.append(Span(base, base + stem))
            at += stem
        for n in documents:
            spans.append(Span(at, at + n, base, base + stem) if stem else Span(at, at + n))
            at += n
    return tuple(spans)


def random_heads(spans, seed=0, heads=4, kv_heads=2):
    rng, tokens = torch.Generator().manual_seed(seed), spans[-1].stop
    return [torch.randn(tokens, h, 8, generator=rng) for h in (heads, kv_heads, kv_heads)]


@settings(deadline=None, max_examples=60)
@given(spans=laid(), kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9))
def test_attention_over_spans_is_softmax_attention_over_what_each_token_sees(spans, kv_heads, seed):
    q_THE, k_TKE, v_TKE = random_heads(spans, seed, kv_heads=kv_heads)
    y_THE = Documents(spans).attend(q_THE, k_TKE, v_TKE, PLAIN)
    torch.testing.assert_close(y_THE.double(), brute_force(spans, q_THE, k_TKE, v_TKE), rtol=0, atol=2e-6)


scores = st.builds(Score, st.floats(0.05, 2), st.sampled_from([0.0, 0.7, 5.0]), st.integers(0, 12))


@settings(deadline=None, max_examples=150)
@given(spans=laid(), kv_heads=st.sampled_from([1, 2, 4]), score=scores, piece=st.integers(1, 6))
def test_windows_and_caps_are_those_of_the_formula_in_pieces_of_any_size(spans, kv_heads, score, piece):
    q_THE, k_TKE, v_TKE = random_heads(spans, 3, kv_heads=kv_heads)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seen, "PIECE", piece)
        y_THE = Documents(spans).attend(q_THE, k_TKE, v_TKE, score)
    torch.testing.assert_close(y_THE.double(), brute_force(spans, q_THE, k_TKE, v_TKE, score), rtol=0, atol=3e-6)


@settings(deadline=None, max_examples=30)
@given(spans=laid(), data=st.data())
def test_a_token_depends_on_what_it_sees_and_on_nothing_else(spans, data):
    q_THE, k_TKE, v_TKE = random_heads(spans)
    before = Documents(spans).attend(q_THE, k_TKE, v_TKE, PLAIN)
    moved = data.draw(st.integers(0, spans[-1].stop - 1))
    k_TKE[moved] += 3
    v_TKE[moved] -= 3
    changed = (Documents(spans).attend(q_THE, k_TKE, v_TKE, PLAIN) != before).flatten(1).any(1)
    for start, stop, stem_start, stem_stop in spans:
        for t in range(start, stop):
            assert bool(changed[t]) == (stem_start <= moved < stem_stop or start <= moved <= t)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_documents_of_lengths_stand_in_a_row_without_gaps(lengths):
    spans = Documents.of_lengths(*lengths).spans
    assert [s.stop - s.start for s in spans] == lengths
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert all(s.stem_start == s.stem_stop == 0 for s in spans)


@given(new=st.integers(1, 8), past=st.integers(0, 8))
def test_the_causal_mask_hides_exactly_the_tokens_to_come(new, past):
    mask_TS = causal(new, past, torch.zeros(1))
    assert mask_TS.shape == (new, past + new)
    for t in range(new):
        assert mask_TS[t].tolist() == [0.0 if s <= past + t else float("-inf") for s in range(past + new)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_its_mask_written_out_is_attention_without_one(dtype):
    q_THE, k_TKE, v_TKE = (x.to(dtype) for x in random_heads((Span(0, 12),)))
    written = attention(q_THE, k_TKE, v_TKE, causal(12, 0, q_THE), PLAIN)
    implied = attention(q_THE, k_TKE, v_TKE, None, PLAIN)
    assert written.dtype == implied.dtype == dtype
    torch.testing.assert_close(written, implied)
