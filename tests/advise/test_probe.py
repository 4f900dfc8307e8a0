"""Measured micro-steps: what they keep in memory, and how few layers and labels stand for many."""

from dataclasses import replace

import pytest
import torch
from conftest import write_tiny
from small import prepared, told
from torch.nn import functional as F

from deltaw.advise import probe
from deltaw.advise.probe import cost, counting, head_seconds, kept_bytes, micro_step, with_labels
from deltaw.data.batch import IGNORED, lay
from deltaw.scoring.loss import batch_loss


@pytest.fixture
def job(tiny_path, tmp_path, rows_file):
    return prepared(rows_file, told(tiny_path, tmp_path)).job


def test_kept_bytes_are_those_of_tensors_that_are_not_the_models():
    layer = torch.nn.Module()
    layer.register_buffer("w", torch.randn(5, 7))
    x = torch.randn(3, 5, requires_grad=True)
    with counting(layer) as count:
        y = F.silu(x @ layer.w)  # keeps y's argument (3 x 7); the product keeps w, which is the model's
        (y * y).sum()  # keeps y, once
    assert count() == 4 * (3 * 7 + 3 * 7)


def test_recomputed_layers_keep_less_and_a_longer_batch_keeps_more(job):
    short, long = lay(list(job.rows)[:4]), lay(list(job.rows)[:16])
    with job.adapter.on():
        kept = [kept_bytes(job, short), kept_bytes(job, long), kept_bytes(replace(job, recompute=True), long)]
    assert kept[0] < kept[1] > kept[2] > 0


def test_a_micro_step_through_some_layers_gives_gradients_to_no_others(job):
    with job.adapter.on():
        micro_step(job, lay(list(job.rows)[:2]), depth=1)
    trained = {name.split(".")[1] for name, d in job.adapter.named_deltas() if d.B.grad is not None}
    assert trained == {"0"}


@pytest.fixture
def thirty(job, monkeypatch):
    """A clock for thirty layers of 0.7 s each: a label takes 0.01 s, and the first whole pass 9 s more."""
    ran, peaks = [], iter(range(0, 10**6, 10))

    def timed(job, batch, depth=None):
        ran.append((depth, batch.targets))
        fetching = 9.0 if depth is None and (None, batch.targets) not in ran[:-1] else 0.0
        return 0.01 * batch.targets + 0.7 * (depth or 30) + fetching

    monkeypatch.setattr(probe, "micro_step", timed)
    monkeypatch.setattr(probe, "head_seconds", lambda job, targets: 0.01 * targets)
    monkeypatch.setattr(probe, "PROBED_LABELS", 5)
    monkeypatch.setattr(probe, "peak_bytes", lambda device: next(peaks))
    job.model._config = replace(job.model.config, layers=30)
    return ran


def test_a_micro_step_that_takes_long_is_told_from_two_layers_and_few_labels(job, thirty):
    batch = lay(list(job.rows)[:20])
    told = cost(job, batch)
    assert told.seconds == pytest.approx(0.01 * batch.targets + 0.7 * 30)
    assert (told.whole, thirty) == (False, [(2, 5)])


def test_a_micro_step_that_takes_seconds_is_run_whole_and_again_if_it_fetched_memory(job, thirty, monkeypatch):
    monkeypatch.setattr(probe, "LONG_SECONDS", 100.0)
    batch = lay(list(job.rows)[:20])
    told = cost(job, batch)
    assert told.seconds == pytest.approx(0.01 * batch.targets + 0.7 * 30)
    assert (told.whole, thirty) == (True, [(2, 5), (None, batch.targets), (None, batch.targets)])
    monkeypatch.setattr(probe, "peak_bytes", lambda device: 7)
    cost(job, batch)
    assert thirty[3:] == [(2, 5), (None, batch.targets)]


def test_fewer_labels_are_the_first_ones(job):
    batch = lay(list(job.rows)[:20])
    some = with_labels(batch, 5)
    labelled = (batch.labels_T != IGNORED).nonzero()[:5, 0]
    assert some.targets == 5 < batch.targets
    assert (some.labels_T != IGNORED).nonzero()[:, 0].tolist() == labelled.tolist()
    assert some.labels_T[labelled].tolist() == batch.labels_T[labelled].tolist()
    assert with_labels(batch, 10**6).labels_T.tolist() == batch.labels_T.tolist()
    with job.adapter.on():
        assert 0 < batch_loss(job.model, some) < batch_loss(job.model, batch)


def test_the_heads_time_is_that_of_so_many_labels_forward_and_backward(job, monkeypatch):
    seen, real = [], probe.cross_entropy

    def watched(h_ND, head_VD, labels_N, cap):
        loss = real(h_ND, head_VD, labels_N, cap)
        h_ND.register_hook(lambda grad: seen.append((len(labels_N), tuple(grad.shape))))
        return loss

    monkeypatch.setattr(probe, "cross_entropy", watched)
    assert head_seconds(job, 37) > 0
    assert seen == [(37, (37, job.model.config.width))]


@pytest.mark.parametrize("rows", [1, 20])
def test_the_beginning_of_a_batch_keeps_for_each_token_what_the_whole_keeps(job, rows):
    batch = lay(list(job.rows)[:rows], share=False)
    some = probe.beginning(batch)
    assert some.tokens == min(batch.tokens, 128)
    assert some.ids_T.tolist() == batch.ids_T[:128].tolist()
    with job.adapter.on():
        each = [kept_bytes(job, b) / b.tokens for b in (some, batch)]
    assert each[0] == pytest.approx(each[1], rel=0.1)


def test_kept_bytes_of_all_layers_are_those_of_a_pass_through_all(tmp_path, rows_file):
    (tmp_path / "deep").mkdir()
    write_tiny(tmp_path / "deep", {"num_hidden_layers": 5})
    job = prepared(rows_file, told(tmp_path / "deep", tmp_path)).job
    batch = lay(list(job.rows)[:8])
    with job.adapter.on(), counting(job.model, job.adapter) as count:
        micro_step(job, batch)
    with job.adapter.on():
        assert kept_bytes(job, batch) == count()


def test_what_the_adapter_owns_is_not_counted_as_kept(job):
    """Else a short beginning, scaled to a long row, would count the adapter once for every stretch of the row."""
    batch = lay(list(job.rows)[:1])
    with job.adapter.on(), counting(job.model) as with_adapter:
        micro_step(job, batch)
    with job.adapter.on(), counting(job.model, job.adapter) as without:
        micro_step(job, batch)
    owned = sum(p.nbytes for p in job.adapter.parameters())
    assert 0 < with_adapter() - without() <= owned
