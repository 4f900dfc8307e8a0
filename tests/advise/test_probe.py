"""Measured micro-steps: what they keep in memory, how few layers stand for many, and the most memory that was held."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import write_tiny
from small import prepared, told
from torch.nn import functional as F

from deltaw.advise import probe
from deltaw.advise.probe import cost, counting, highest, kept_bytes, micro_step
from deltaw.data.batch import lay


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
    short, long = lay(job.rows[:4]), lay(job.rows[:16])
    with job.adapter.on():
        kept = [kept_bytes(job, short), kept_bytes(job, long), kept_bytes(replace(job, recompute=True), long)]
    assert kept[0] < kept[1] > kept[2] > 0


def test_a_micro_step_through_some_layers_gives_gradients_to_no_others(job):
    with job.adapter.on():
        micro_step(job, lay(job.rows[:2]), depth=1)
    trained = {name.split(".")[1] for name, d in job.adapter.named_deltas() if d.B.grad is not None}
    assert trained == {"0"}


def test_a_micro_step_that_takes_long_is_told_from_one_layer_and_four(job, monkeypatch):
    asked, per_layer, fetching = [], 0.7, 9.0

    def timed(job, batch, depth=None):
        asked.append(depth)
        return 2.0 + per_layer * (depth or 30) + fetching * (depth is None)

    monkeypatch.setattr(probe, "micro_step", timed)
    job.model.config = replace(job.model.config, layers=30)
    batch = lay(job.rows[:2])
    assert cost(job, batch).seconds == pytest.approx(2.0 + per_layer * 30)
    assert asked == [1, 4]
    monkeypatch.setattr(probe, "LONG_SECONDS", 100.0)
    assert cost(job, batch).seconds == pytest.approx(2.0 + per_layer * 30)  # what fetching memory takes is left out
    assert asked == [1, 4, 1, 4, None]
    fetching = -9.0
    assert cost(job, batch).seconds == pytest.approx(2.0 + per_layer * 30 - 9)


@pytest.mark.parametrize("rows", [1, 20])
def test_the_beginning_of_a_batch_keeps_for_each_token_what_the_whole_keeps(job, rows):
    batch = lay(job.rows[:rows], share=False)
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
    batch = lay(job.rows[:8])
    with job.adapter.on(), counting(job.model) as count:
        micro_step(job, batch)
    with job.adapter.on():
        assert kept_bytes(job, batch) == count()


def test_the_most_memory_that_was_held_is_seen_though_it_was_given_back():
    with highest() as most:
        big = torch.ones(50_000_000)  # 200 MB
        before = probe.resident_bytes()
        time.sleep(0.05)
        del big
    assert most() >= before - 20_000_000
