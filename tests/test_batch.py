"""Rows laid flat: nothing is lost, nobody sees a stranger, a shared stem changes no result, every row gets its turn."""

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import our_logits, scramble

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import IGNORED, lay, micro_batches, per_epoch, rows_per_step, steps
from deltaw.data.encode import Encoded
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.scoring.loss import batch_loss

few = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def model(tiny_path):
    return checkpoint.load(tiny_path)


@st.composite
def rows(draw, most=6):
    """Rows of which many begin alike, with any marks on what is learnt."""
    begin = draw(st.lists(st.integers(0, 255), max_size=12))
    made = []
    for _ in range(draw(st.integers(1, most))):
        ids = begin[: draw(st.integers(0, len(begin)))] + draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
        silent = draw(st.integers(0, len(ids)))
        marks = draw(st.lists(st.booleans(), min_size=len(ids) - silent, max_size=len(ids) - silent))
        made.append(Encoded(tuple(ids), (False,) * silent + tuple(marks)))
    return made


def places(batch):
    """Indices in the flat row of every document, its stem included, in the order of their spans."""
    stems = {(s.stem_start, s.stem_stop) for s in batch.seen.spans if s.stem_stop > s.stem_start}
    return [[*range(s.stem_start, s.stem_stop), *range(s.start, s.stop)]
            for s in batch.seen.spans if (s.start, s.stop) not in stems]  # fmt: skip


def wanted_labels(row):
    return [*(i if t else IGNORED for i, t in zip(row.ids[1:], row.trained[1:], strict=True)), IGNORED]


def batch_logits(model, batch):
    return model.logits(model.hidden(batch.ids_T, batch.at_T, batch.seen))


@few
@given(rows=rows(), share=st.booleans(), ordered=st.booleans())
def test_every_row_stands_in_the_batch_with_its_positions_and_labels(rows, share, ordered):
    rows = sorted(rows, key=lambda r: r.ids) if ordered else rows
    batch = lay(rows, share)
    found = places(batch)
    assert len(found) == len(rows)
    for at, row in zip(found, rows, strict=True):
        assert batch.ids_T[at].tolist() == list(row.ids)
        assert batch.at_T[at].tolist() == list(range(len(row.ids)))
        assert batch.labels_T[at].tolist() == wanted_labels(row)
    assert batch.targets == sum(r.targets for r in rows) == int((batch.labels_T != IGNORED).sum())
    assert batch.row_tokens == sum(len(r.ids) for r in rows)
    assert len(batch.at_T) == len(batch.labels_T) == batch.tokens <= batch.row_tokens
    assert share or batch.tokens == batch.row_tokens


@few
@given(rows=rows())
def test_spans_cover_the_flat_row_without_gap_or_overlap(rows):
    batch = lay(rows)
    assert [t for s in batch.seen.spans for t in range(s.start, s.stop)] == list(range(batch.tokens))


def test_rows_that_begin_alike_share_their_beginning():
    stem = tuple(range(100))
    batch = lay([Encoded((*stem, i, 7), (False,) * 101 + (True,)) for i in range(200, 210)])
    assert batch.tokens == 100 + 10 * 2
    assert batch.row_tokens == 10 * 102


@few
@given(rows=rows(), micro=st.integers(1, 40), share=st.booleans())
def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_allowed(rows, micro, share):
    batches = micro_batches(rows, micro, lambda longest: share)
    held = [(tuple(b.ids_T[at].tolist()), tuple(b.labels_T[at].tolist())) for b in batches for at in places(b)]
    assert Counter(held) == Counter((r.ids, tuple(wanted_labels(r))) for r in rows)
    for batch in batches:
        assert batch.row_tokens <= micro or len(places(batch)) == 1


@few
@given(rows=rows(), share=st.booleans())
def test_a_row_in_a_batch_has_the_logits_it_has_alone(model, rows, share):
    batch = lay(rows, share)
    logits_TV = batch_logits(model, batch)
    for at, row in zip(places(batch), rows, strict=True):
        torch.testing.assert_close(logits_TV[at], our_logits(model, row.ids), rtol=0, atol=1e-5)


@few
@given(rows=rows(most=4), data=st.data())
def test_changing_one_row_changes_no_other(model, rows, data):
    before = batch_logits(model, lay(rows))
    changed = data.draw(st.integers(0, len(rows) - 1))
    other = list(rows)
    other[changed] = Encoded(tuple((i + 1) % 256 for i in rows[changed].ids), rows[changed].trained)
    after = batch_logits(model, lay(other))
    for i, (was, now) in enumerate(zip(places(lay(rows)), places(lay(other)), strict=True)):
        if i != changed:
            torch.testing.assert_close(after[now], before[was], rtol=0, atol=1e-5)
        else:
            assert not torch.allclose(after[now], before[was], atol=1e-3)


@few
@given(rows=rows(), micro=st.integers(8, 60))
def test_loss_and_gradient_are_the_same_with_and_without_stems_and_in_any_pieces(model, rows, micro):
    adapter = scramble(Adapter.build(method("lora", rank=2, targets="q,v,down"), model))

    def loss_and_gradient(batches):
        adapter.zero_grad()
        with adapter.on():
            losses = [batch_loss(model, batch) for batch in batches]
            torch.stack(losses).sum().backward()
        return sum(loss.item() for loss in losses), [p.grad.clone() for p in adapter.parameters()]

    loss, gradient = loss_and_gradient([lay([row], share=False) for row in rows])
    for batches in ([lay(rows)], [lay(sorted(rows, key=lambda r: r.ids))], micro_batches(rows, micro)):
        again, grads = loss_and_gradient(batches)
        assert again == pytest.approx(loss, rel=1e-5, abs=1e-5)
        for got, want in zip(grads, gradient, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))


@few
@given(rows=rows(), share=st.booleans())
def test_pairs_are_the_tokens_that_tokens_see(rows, share):
    batch = lay(rows, share)
    seen = sum(
        (s.stem_stop - s.stem_start) + (t - s.start + 1) for s in batch.seen.spans for t in range(s.start, s.stop)
    )
    assert batch.pairs == seen


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([10] * 30, 8),
        ([256] * 3, 8),
        ([257] * 3, 7),
        ([1024] * 5, 2),
        ([2048] * 16, 1),
        ([9000], 1),
        ([60] * 40 + [8000], 8),
    ],
)
def test_a_step_has_eight_rows_or_as_many_as_make_two_thousand_tokens(lengths, expected):
    assert rows_per_step(sum(lengths) / len(lengths)) == expected


def drawn(weights, batch_rows, seed, epochs):
    """Rows of each of the first epochs, step by step."""
    made = [[] for _ in range(epochs)]
    for epoch, some in steps(weights, batch_rows, seed):
        if epoch > epochs:
            return made
        made[math.ceil(epoch) - 1].append(some)
    raise AssertionError("steps() ends")


@given(n=st.integers(1, 40), batch_rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_row_is_seen_once_an_epoch_in_full_steps(n, batch_rows, seed):
    for epoch in drawn([(n, 1.0)], batch_rows, seed, 3):
        assert sorted(i for step in epoch for i in step) == list(range(n))
        assert all(len(step) == batch_rows for step in epoch[:-1])
        assert 0 < len(epoch[-1]) <= batch_rows
        assert len(epoch) == per_epoch([(n, 1.0)], batch_rows)


@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 9))
def test_weights_hold_exactly_over_the_epochs_in_which_they_come_out_even(n, m, seed):
    rows = [i for epoch in drawn([(n, 2.0), (m, 0.5)], 4, seed, 4) for step in epoch for i in step]
    counts = Counter(rows)
    assert set(counts) == set(range(n + m))
    assert all(counts[i] == 8 for i in range(n))
    assert all(counts[i] == 2 for i in range(n, n + m))


@given(n=st.integers(1, 20), weight=st.floats(0.1, 3), seed=st.integers(0, 9))
def test_no_row_of_a_file_is_ahead_of_another_by_more_than_one_whatever_the_weight(n, weight, seed):
    # In the order of drawing; within an epoch the order is shuffled, so it is looked at after each epoch.
    counts = Counter(range(n))
    for e, epoch in enumerate(drawn([(n, weight)], 4, seed, 4), 1):
        counts.update(i for step in epoch for i in step)
        seen = [counts[i] - 1 for i in range(n)]
        assert max(seen) - min(seen) <= 1
        assert abs(sum(seen) - e * n * weight) <= 1 + 1e-6


@given(weights=st.lists(st.tuples(st.integers(1, 15), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=3),
       seed=st.integers(0, 99))  # fmt: skip
def test_the_seed_decides_the_order(weights, seed):
    first, again = (list(islice(steps(weights, 4, seed), 30)) for _ in range(2))
    assert first == again
    epochs = [e for e, _ in first]
    assert epochs == sorted(epochs)


def test_another_seed_and_another_epoch_give_another_order():
    one, two = drawn([(50, 1.0)], 50, 0, 2)
    assert one != two
    assert drawn([(50, 1.0)], 50, 1, 1)[0] != one
