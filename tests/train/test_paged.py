"""AdamW with its moments in a file: the same numbers, none of them in memory that is not a page of the file."""

import copy
import errno
import os
import re
from pathlib import Path

import pytest
import torch
from small import end, losses, prepared, told

from deltaw.advise import plan
from deltaw.errors import UserError, WillNotFit
from deltaw.train import optimizer
from deltaw.train.optimizer import MOMENTS, PagedAdamW


def pair(count=3):
    made = [torch.nn.Parameter(torch.randn(5, i + 1, generator=torch.Generator().manual_seed(i))) for i in range(count)]
    return [{"params": made[:2], "weight_decay": 0.1}, {"params": made[2:], "weight_decay": 0.0}], made


def step(optimizer, parameters, seed):
    for i, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()


def test_it_is_adamw_to_the_last_bit_before_and_after_a_restart(tmp_path):
    (groups, mine), (plain, theirs) = pair(), pair()
    ours, reference = PagedAdamW(groups, tmp_path), torch.optim.AdamW(plain, lr=1.0, fused=True)
    for i in range(3):
        step(ours, mine, i)
        step(reference, theirs, i)
    (again, restarted) = pair()
    with torch.no_grad():
        for p, q in zip(restarted, mine, strict=True):
            p.copy_(q)
    resumed = PagedAdamW(again, tmp_path)
    resumed.load_state_dict(copy.deepcopy(reference.state_dict()))  # either's state is the other's
    step(resumed, restarted, 3)
    step(reference, theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(restarted, theirs, strict=True))
    for p, q in zip(restarted, theirs, strict=True):
        for name in MOMENTS:
            assert torch.equal(resumed.state[p][name], reference.state[q][name])
            assert resumed.state[p][name].data_ptr() == resumed.moments[p][name].data_ptr()


def test_a_state_from_before_the_first_step_is_zero(tmp_path):
    groups, parameters = pair()
    made = PagedAdamW(groups, tmp_path)
    step(made, parameters, 0)
    made.load_state_dict({**made.state_dict(), "state": {}})
    assert all(not made.state[p][name].any() for p in parameters for name in MOMENTS)
    assert all(made.state[p]["step"] == 0 for p in parameters)


def test_moments_are_pages_of_a_file_without_a_name(tmp_path):
    p = torch.nn.Parameter(torch.zeros(1 << 20))
    made = PagedAdamW([{"params": [p], "weight_decay": 0.0}], tmp_path)
    at = made.state[p]["exp_avg"].data_ptr()
    shared = re.finditer("^([0-9a-f]+)-([0-9a-f]+) rw-s.*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    maps = [m[0] for m in shared if int(m[1], 16) <= at < int(m[2], 16)]
    assert len(maps) == 1
    assert str(tmp_path) in maps[0]
    assert "(deleted)" in maps[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(optimizer.os, "posix_fallocate", full)
    with pytest.raises(WillNotFit, match="No space left"):
        PagedAdamW(pair()[0], tmp_path)


def test_on_another_device_it_is_refused(tmp_path):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))], "weight_decay": 0.0}]
    with pytest.raises(UserError, match="for the processor's memory"):
        PagedAdamW(groups, tmp_path)


def test_a_run_is_the_same_and_its_moments_need_no_memory(tiny_path, tmp_path, rows_file):
    runs = {}
    for name in ("adamw", "paged_adamw"):
        made = prepared(rows_file, told(tiny_path, tmp_path / name, steps=4, evaluations=2, optimizer=name))
        events = list(made.events())
        runs[name] = losses(events), made.job.run.adapter.read_bytes(), end(events).reason
        assert plan._moments_bytes(made.job) == (8 * made.job.adapter.parameter_count if name == "adamw" else 0)
    assert runs["adamw"][0] == runs["paged_adamw"][0]
    assert runs["adamw"][1:] == runs["paged_adamw"][1:]
