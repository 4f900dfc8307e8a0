"""The plan: measured without leaving a trace, counted as torch counts, and true to the memory there is."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, strategies as st
from small import ROW, end, gone_on, losses, stopping_at, told, write_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deltaw.advise import machine, plan as planning
from deltaw.advise.plan import Plan, measure, operations, through
from deltaw.advise.probe import Cost, kept_bytes
from deltaw.api.finetune import prepare
from deltaw.data.batch import lay
from deltaw.errors import UserError, WillNotFit
from deltaw.models.slots import Slot
from deltaw.scoring.loss import batch_loss
from deltaw.train.loop import Trainer


@pytest.fixture
def unequal(tiny_path, tmp_path):
    """A run over one long row and many short ones, as it would be begun."""
    write_rows(tmp_path / "unequal.jsonl", *[ROW] * 20, {"prompt": "say much", "completion": "b" * 400})

    def unequal(**settings):
        return prepare([str(tmp_path / "unequal.jsonl")], told(tiny_path, tmp_path, name=None, val="0", **settings)).job

    return unequal


def test_planning_leaves_no_trace(ready):
    made = ready(dropout=0.3, val="0.25")
    job, trainer = made.job, Trainer(made.job)
    weights = {n: p.detach().clone() for n, p in job.adapter.named_parameters()}
    frozen = {n: (b, b.clone()) for n, b in job.model.named_buffers()}
    random, before = torch.get_rng_state(), dataclasses.replace(job)
    plan = measure(job)
    assert torch.equal(torch.get_rng_state(), random)
    assert job == before
    for name, parameter in job.adapter.named_parameters():
        assert parameter.grad is None or not parameter.grad.any()
        assert torch.equal(parameter, weights[name])
    assert all(b is frozen[n][0] and torch.equal(b, frozen[n][1]) for n, b in job.model.named_buffers())
    assert all(slot.delta is None for slot in job.model.modules() if isinstance(slot, Slot))
    assert trainer.optimizer.state == {}
    assert plan.steps == job.steps
    assert min(plan.seconds, plan.step_seconds, plan.fixed_seconds, plan.peak_bytes, plan.available_bytes) > 0
    assert not plan.recompute


def test_a_run_is_the_same_with_and_without_a_plan(ready):
    planned = ready(dropout=0.3, steps=5)
    events = list(planned.events())
    blind = ready(dropout=0.3, steps=5)
    blind.plan = Plan(5, 1.0, 0.2, 0.0, 1, 1, recompute=False)
    assert losses(list(blind.events())) == losses(events)
    assert planned.job.run.adapter.read_bytes() == blind.job.run.adapter.read_bytes()


def test_a_plan_reads_back_as_it_was_written(ready):
    made = ready(steps=2)
    list(made.events())
    assert Plan.read(made.job.run.plan) == made.plan
    assert made.plan.after(1) == pytest.approx(made.plan.seconds / 2)


@pytest.fixture
def slow(monkeypatch):
    """Every micro-step takes half a second, and evaluations take six together."""
    monkeypatch.setattr(planning, "cost", lambda *a, **k: Cost(0.5, whole=True))
    monkeypatch.setattr(planning, "kept_bytes", lambda *a: 1000)
    monkeypatch.setattr(planning, "_evaluation_seconds", lambda job: 6.0)


@pytest.mark.parametrize(("minutes", "steps"), [(1, 108), (2, 228), (0.11, 1), (60, 7188)])
def test_minutes_become_as_many_steps_as_they_allow(ready, slow, minutes, steps):
    plan = measure(ready(epochs=3).job, minutes)
    assert (plan.steps, plan.step_seconds, plan.fixed_seconds) == (steps, 0.5, 6.0)
    assert plan.seconds == pytest.approx(6 + steps / 2, rel=0.01)


def test_minutes_and_steps_together_are_both_kept_to(ready, slow):
    assert measure(ready(steps=50).job, 1).steps == 50
    assert measure(ready(steps=500).job, 1).steps == 108


def test_too_few_minutes_are_refused_with_how_many_it_takes(ready, slow):
    with pytest.raises(UserError, match=r"0\.1 minutes are too few: one step, evaluations and samples take 0\.1") as e:
        measure(ready().job, 0.1)
    assert "--minutes 1 or more" in e.value.remedy
    assert measure(ready().job, 1).steps > 0


def test_a_run_that_is_refused_by_its_plan_leaves_its_name_free(ready, slow):
    made = ready(minutes=0.1)
    with pytest.raises(UserError, match="too few"):
        list(made.events())
    assert not made.job.run.folder.exists()


def test_without_minutes_the_steps_stay(ready, slow):
    plan = measure(ready(epochs=2).job)
    assert plan.steps == 12
    assert plan.seconds == pytest.approx(6 + 12 / 2, rel=0.01)


def test_a_step_of_many_micro_batches_takes_the_sum_of_them(ready, slow):
    job = ready(micro_tokens=1).job  # each row alone
    plan = measure(job)
    assert plan.step_seconds == pytest.approx(46 / 6 * 0.5)  # 46 rows in six steps


def test_a_run_that_fits_minutes_keeps_its_schedule_when_it_goes_on(ready, slow):
    whole = ready(minutes=0.2)
    unbroken = list(whole.events())
    assert end(unbroken).step == whole.plan.steps == 12
    broken = ready(stopping_at(5), minutes=0.2)
    first = list(broken.events())
    rest = list(gone_on(broken.job.run.folder).events())
    assert losses(first + rest) == losses(unbroken)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_memory_of_a_step_that_was_not_run_whole_is_counted(unequal, monkeypatch, whole, recompute):
    job = unequal(gradient_checkpointing="on" if recompute else "off", micro_tokens=1)
    monkeypatch.setattr(planning, "cost", lambda *a, **k: Cost(0.5, whole))
    monkeypatch.setattr(planning, "kept_bytes", lambda job, batch: 1000 * batch.tokens)
    monkeypatch.setattr(planning, "resident_bytes", lambda: 70_000_000)
    monkeypatch.setattr(planning, "peak_bytes", lambda device: 70_000_001)
    tokens, c = max(len(row.ids) for row in job.rows), job.model.config
    inputs = c.layers * tokens * c.width * 4
    need = planning.HELD_PER_KEPT * (inputs + 2 * 1000 * tokens / c.layers if recompute else 1000 * tokens)
    held = 70_000_001 if whole else 70_000_000 + need
    assert measure(job).peak_bytes == pytest.approx(held + 8 * job.adapter.parameter_count, abs=2)


def short_of(monkeypatch, n_bytes):
    monkeypatch.setattr(planning, "available_bytes", lambda device: n_bytes)


def test_layers_are_recomputed_only_where_memory_is_short(unequal, monkeypatch):
    job = unequal(gradient_checkpointing="auto", rank=1)
    short_of(monkeypatch, 10**9)
    assert (measure(job).recompute, measure(job).notices) == (False, ())
    with job.adapter.on():
        kept = kept_bytes(job, lay(list(job.rows)[:1]))  # far too little for the long row, as the next line shows
    short_of(monkeypatch, 5 * kept)
    with pytest.raises(WillNotFit):
        measure(dataclasses.replace(job, settings=dataclasses.replace(job.settings, gradient_checkpointing="off")))
    for wanted in ("on", "off"):
        short_of(monkeypatch, 10**9)
        chosen = dataclasses.replace(job, settings=dataclasses.replace(job.settings, gradient_checkpointing=wanted))
        assert (measure(chosen).recompute, measure(chosen).notices) == (wanted == "on", ())


def test_auto_recomputes_between_what_both_ways_need(unequal, monkeypatch):
    job = unequal(gradient_checkpointing="auto", rank=1)
    job.model._config = dataclasses.replace(job.model.config, layers=20)  # recomputing saves little with two layers
    monkeypatch.setattr(planning, "cost", lambda *a, **k: Cost(0.5, whole=True))
    chosen = []
    for n_bytes in sorted({int(10 ** (4.5 + i / 10)) for i in range(40)}, reverse=True):
        short_of(monkeypatch, n_bytes)
        try:
            plan = measure(job)
        except WillNotFit:
            chosen.append("none")
            continue
        chosen.append("recompute" if plan.recompute else "keep")
        said = [n for n in plan.notices if re.fullmatch(r"Layers are computed twice to save memory: .*", n)]
        assert len(said) == (1 if plan.recompute else 0)
    assert [c for i, c in enumerate(chosen) if i == 0 or c != chosen[i - 1]] == ["keep", "recompute", "none"]


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
def test_what_will_not_fit_is_refused_with_a_length_that_would(unequal, monkeypatch, wanted):
    monkeypatch.setattr(planning, "MOMENTS_BYTES", 0)  # a tiny model's activations weigh less than its adapter's state
    long = max(len(row.ids) for row in unequal().rows)
    free = next(
        n for n in range(4_000_000, 0, -20_000) if refused(monkeypatch, unequal(gradient_checkpointing=wanted), n)
    )
    with pytest.raises(WillNotFit) as e:
        measure(unequal(gradient_checkpointing=wanted))
    assert e.value.code == 3
    assert "longest micro-batch" in e.value.what
    cut = int(re.search(r"--max-tokens (\d+)", e.value.remedy)[1])
    assert 0 < cut < long
    assert ("--gradient-checkpointing on" in e.value.remedy) == (wanted == "off")
    short_of(monkeypatch, free)
    assert measure(unequal(gradient_checkpointing=wanted, max_tokens=cut, micro_tokens=cut)).steps > 0


def refused(monkeypatch, job, n_bytes):
    short_of(monkeypatch, n_bytes)
    try:
        measure(job)
    except WillNotFit:
        return True
    return False


ALSO = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
"""Products that torch would not count: those that are added where the sum lies."""


@pytest.mark.parametrize("rows", [range(1), range(5), range(0, 40, 7)])
@pytest.mark.parametrize("share", [True, False])
def test_operations_are_those_that_torch_counts(ready, rows, share):
    """Gains alone are trained, so that no adapter's arithmetic (small, and left out) is counted.

    Torch counts scores that are masked, and the plain backward pass; the fused one computes the scores once more.
    """
    job = ready(method="full", targets="input_layernorm").job
    batch, c = lay([job.rows[i] for i in rows], share), job.model.config
    with job.adapter.on(), FlopCounterMode(display=False, custom_mapping=ALSO) as counter, sdpa_kernel(SDPBackend.MATH):
        (batch_loss(job.model, batch) / batch.targets).backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    scores = sum(n for op, n in counted.items() if "bmm" in op)
    products = sum(counted.values()) - scores
    full = sum((s.stop - s.start) * (s.stop - s.start + s.stem_stop - s.stem_start) for s in batch.seen.spans)
    assert scores == 12 * c.layers * c.heads * c.head_width * full
    assert operations(batch, job) == products + scores / 12 * 14 * batch.pairs / full


points = st.lists(st.tuples(st.floats(1, 1e12), st.floats(1e-6, 1e3)), min_size=1, max_size=5, unique_by=lambda p: p[0])


@given(points, st.floats(0, 1e13), st.floats(0, 1e13))
def test_more_work_never_takes_less_and_measured_work_takes_what_was_measured(measured, a, b):
    work = through({operations: Cost(seconds, whole=True) for operations, seconds in measured})
    low, high = sorted((a, b))
    assert work(low) <= work(high) * (1 + 1e-9)
    for x, _ in measured:
        assert work(x) == pytest.approx(max(s for p, s in measured if p <= x), rel=1e-9)
    top, slowest = (max(values) for values in zip(*measured, strict=True))
    assert work(3 * top) == pytest.approx(3 * slowest, rel=1e-9)


def test_the_machine_is_described_in_sane_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "not" / "there"))
    m = machine.Machine(0.01)
    assert 0 < m.available_bytes <= m.ram_bytes
    assert m.cores >= 1
    assert m.threads == torch.get_num_threads()
    assert all(math.isfinite(g) and g > 0 for g in (m.fp32_gflops, m.bf16_gflops))
    assert m.torch == torch.__version__
    assert (m.gpu is None) == (m.gpu_bytes == 0) == (not torch.cuda.is_available())
    assert (m.models, m.cache) == ((), str(tmp_path / "not" / "there"))
    assert m.disk_free_bytes == pytest.approx(machine.free_disk(tmp_path), rel=0.05)
    assert not (tmp_path / "not").exists()


def test_limits_of_groups_within_a_container_count_too(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    groups = {"": ("max", 10), "outer": (9000, 1000), "outer/inner": ("max", 500)}
    for group, (limit, used) in groups.items():
        (tmp_path / "fs" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "fs" / group / "memory.current").write_text(f"{used}\n")
    assert machine._cgroup_room(tmp_path / "fs", own) == 8000
    (tmp_path / "fs" / "outer" / "inner" / "memory.max").write_text("700\n")
    assert machine._cgroup_room(tmp_path / "fs", own) == 200
    assert machine._cgroup_room(tmp_path / "none", tmp_path / "none") == machine.UNBOUNDED


def test_a_limit_of_addresses_counts(monkeypatch):
    import resource

    used = machine.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 10**9, -1))
    assert 0 < machine.available_bytes(torch.device("cpu")) <= 1.1e9


def test_available_memory_is_no_more_than_a_containers_limit_leaves(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < machine.available_bytes(cpu) <= machine.psutil.virtual_memory().total
    monkeypatch.setattr(machine, "_cgroup_room", lambda: 12_345)
    assert machine.available_bytes(cpu) == 12_345
