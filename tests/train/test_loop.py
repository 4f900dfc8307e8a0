"""The training loop: what decides a step, and what is kept when something goes wrong."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from small import end, gone_on, losses, write_contrary
from transformers import AutoModelForCausalLM

from deltaw.data import files as reading
from deltaw.data.batch import steps
from deltaw.data.encode import encode_all
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.files import adapters
from deltaw.settings import Training
from deltaw.train import loop
from deltaw.train.events import Evaluated, Finished, Job, Question, Sampled, Saved, Stepped
from deltaw.train.loop import Trainer, validation_loss
from deltaw.train.optimizer import adamw, rate


def trained(made):
    """The events of a run, and the adapter it leaves in memory."""
    return list(made.events()), adapters.state(made.job.adapter)


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.mark.parametrize(("method", "learning_rate", "share"), [("full", 0.01, 0.02), ("lora", 0.003, 0.9)])
def test_training_lowers_the_loss(ready, method, learning_rate, share):
    """Every weight trained learns the rows by heart; two thin matrices cannot do much with a head of random numbers."""
    events, _ = trained(ready(method=method, epochs=15, val="0", learning_rate=learning_rate))
    course = [loss for _, loss in losses(events)[0]]
    assert sum(course[-6:]) / 6 < share * course[0]


def test_the_first_loss_is_the_token_weighted_mean_that_transformers_gives(ready, tiny_path):
    made = ready(steps=1, val="0")
    job = made.job
    hf = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    (first,) = [e for e in made.events() if isinstance(e, Stepped)]
    _, picked = next(steps(job.weights, job.batch_rows, job.settings.seed))
    assert first.loss == pytest.approx(brute_force(hf, [job.rows[i] for i in picked]), abs=1e-5)
    assert first.trained_tokens == sum(job.rows[i].targets for i in picked)
    assert first.tokens == sum(len(job.rows[i].ids) for i in picked)


def test_the_validation_loss_is_the_token_weighted_mean_that_transformers_gives(ready, tiny_path, tmp_path, tokenizer):
    file = tmp_path / "val.jsonl"  # answers of very unequal length, so that a mean of means would be another number
    file.write_text("".join(f'{{"prompt": "say {n}", "completion": "{"xyz " * n}"}}\n' for n in (1, 2, 30)))
    job = ready(steps=1, val=str(file), micro_tokens=64).job
    hf = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    rows = encode_all(reading.read(file), tokenizer, "answers", 512)[0]
    with job.adapter.on():
        assert validation_loss(job) == pytest.approx(brute_force(hf, rows), abs=1e-5)


def brute_force(hf, rows):
    """Mean over all learnt tokens, each row run alone."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = hf(torch.tensor([row.ids])).logits[0, :-1].float()
        each = F.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
        total += each[torch.tensor(row.trained[1:])].sum().item()
        count += sum(row.trained[1:])
    return total / count


@pytest.mark.parametrize("micro_tokens", [1, 64, 100])
def test_many_small_micro_batches_are_one_big_one(ready, micro_tokens):
    big, weights = trained(ready(steps=6, evaluations=2, micro_tokens=4096))
    small, same = trained(ready(steps=6, evaluations=2, micro_tokens=micro_tokens))
    for a, b in zip(losses(big), losses(small), strict=True):
        assert [x[1] for x in a] == pytest.approx([x[1] for x in b], abs=1e-6)
    assert_close(weights, same, atol=2e-4)  # Adam divides a gradient by its size: where it is near zero, noise shows


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(ready):
    first, again, other = (trained(ready(steps=5, dropout=0.2, seed=seed)) for seed in (3, 3, 4))
    assert losses(first[0]) == losses(again[0]) != losses(other[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_recomputed_layers_give_the_same_losses(ready):
    on, weights = trained(ready(steps=5, gradient_checkpointing="on", dropout=0.2))
    off, same = trained(ready(steps=5, gradient_checkpointing="off", dropout=0.2))
    assert losses(on) == losses(off)
    assert_close(weights, same, atol=1e-7)


SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_in_the_warm_up_and_falls_by_its_formula(schedule, warmup):
    settings, total, peak = Training(schedule=schedule, warmup=warmup), 37, 0.02
    rising = math.ceil(warmup * total)
    for step in range(total):
        wanted = (step + 1) / rising if step < rising else SCHEDULES[schedule]((step - rising) / (total - rising))
        assert rate(step, total, peak, settings) == pytest.approx(peak * wanted, rel=1e-12)
        assert rate(step, total, peak, settings) > 0


def test_each_step_is_taken_with_the_rate_of_the_schedule(ready):
    made = ready(steps=7, warmup=0.3, learning_rate=0.004)
    events, _ = trained(made)
    said = [e.learning_rate for e in events if isinstance(e, Stepped)]
    assert said == [rate(i, 7, 0.004, made.job.settings) for i in range(7)]


def test_a_gradient_longer_than_the_limit_is_clipped_to_it(ready):
    made = ready(clip=0.01)
    trainer = Trainer(made.job)
    with made.job.adapter.on():
        before = {n: p.detach().clone() for n, p in made.job.adapter.named_parameters()}
        stepped = trainer._step(0.0, list(range(8)))
    grads = torch.cat([p.grad.flatten() for p in made.job.adapter.parameters()])
    assert stepped.gradient_norm > 0.1
    assert grads.norm().item() == pytest.approx(0.01, rel=1e-3)
    # Adam's first step is as long as the rate wherever there is a gradient, whatever its size.
    moved = max((p - before[n]).abs().max().item() for n, p in made.job.adapter.named_parameters())
    assert moved == pytest.approx(stepped.learning_rate, rel=1e-2)


def test_without_a_limit_the_gradient_stays_as_it_is(ready):
    made = ready(clip=0)
    trainer = Trainer(made.job)
    with made.job.adapter.on():
        stepped = trainer._step(0.0, list(range(8)))
    grads = torch.cat([p.grad.flatten() for p in made.job.adapter.parameters()])
    assert grads.norm().item() == pytest.approx(stepped.gradient_norm, rel=1e-5)


def test_weight_decay_shrinks_what_has_no_gradient(ready):
    made = ready(weight_decay=0.5)
    optimizer = adamw(made.job.adapter, made.job.settings)
    before = {n: p.detach().clone() for n, p in made.job.adapter.named_parameters()}
    for parameter in made.job.adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in made.job.adapter.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(("patience", "steps"), [(1, None), (2, None), (0, 16)])
def test_training_stops_after_as_many_worse_evaluations_as_patience_allows(ready, tmp_path, patience, steps):
    val = write_contrary(tmp_path)
    events, _ = trained(ready(steps=16, evaluations=16, patience=patience, val=val))
    course = [loss for _, loss, _ in losses(events)[1]]
    best, worse, stop = math.inf, 0, 16
    for i, loss in enumerate(course, 1):
        best, worse = (loss, 0) if loss < best else (best, worse + 1)
        if patience and worse == patience:
            stop = i
            break
    assert end(events).step == len(course) == stop == (steps or stop)
    assert end(events).reason == ("done" if patience == 0 else "no better")
    assert stop < 16 or patience == 0


def test_a_better_evaluation_begins_the_count_of_worse_ones_anew(ready, monkeypatch):
    course = iter([3.0, 3.1, 2.9, 3.0, 3.05, 1.0])
    monkeypatch.setattr(loop, "validation_loss", lambda job: next(course))
    events, _ = trained(ready(steps=6, evaluations=6, patience=2))
    assert (end(events).reason, end(events).step, end(events).best_step) == ("no better", 5, 3)


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_run_ends_with_the_best_adapter_or_the_last(ready, tmp_path, keep_best):
    made = ready(steps=16, evaluations=16, patience=3, keep_best=keep_best, val=write_contrary(tmp_path))
    events, weights = trained(made)
    course = {step: loss for step, loss, _ in losses(events)[1]}
    best = min(course, key=course.get)
    assert end(events).best_step == best < end(events).step
    assert end(events).best_loss == course[best]
    written = adapters.read(made.job.run.adapter)[1]
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    with made.job.adapter.on():
        assert validation_loss(made.job) == course[best if keep_best else end(events).step]


def test_the_last_two_checkpoints_and_the_best_are_kept(ready):
    made = ready(steps=7, save_every=2, evaluations=7, patience=0)
    events, _ = trained(made)
    assert [e.step for e in events if isinstance(e, Saved)] == [0, 2, 4, 6, 7]
    kept = sorted(p.name for p in (made.job.run.folder / "checkpoints").iterdir())
    assert kept == ["best.safetensors", "step-0000006.safetensors", "step-0000007.safetensors"]


@given(steps=st.integers(1, 300), evaluations=st.integers(0, 40))
def test_there_are_as_many_evaluations_as_asked_evenly_spread_and_the_last_at_the_end(steps, evaluations):
    said = SimpleNamespace(settings=SimpleNamespace(evaluations=evaluations), steps=steps, val=["some"])
    said.evaluations = Job.evaluations.fget(said)
    at = [step for step in range(1, steps + 1) if Job.evaluates(said, step)]
    assert len(at) == said.evaluations == min(evaluations, steps)
    assert at[-1:] == ([steps] if evaluations else [])
    gaps = [b - a for a, b in pairwise([0, *at])]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("told", [{"val": "0"}, {"val": "0.25", "evaluations": 2}, {"val": "0.25", "patience": 1}])
def test_the_question_is_asked_before_training_and_of_what_is_left_at_the_end(ready, told):
    made = ready(steps=6, **told)
    made.job.question = Question("say 1", tuple(made.base.tokenizer.encode("say 1")))
    events, _ = trained(made)
    asked = [e for e in events if isinstance(e, Sampled)]
    assert asked[0].step == 0
    assert len(asked) >= 2
    with made.job.adapter.on():
        (said,) = complete(made.job.model, made.job.tokenizer, [made.job.question.ids], Sampling(max_new_tokens=48))
    assert asked[-1].answer == (said.text if said.whole else f"{said.text} …")


def test_epochs_are_counted_to_the_end_of_each_step(ready):
    events, _ = trained(ready(val="0", batch_rows=10, epochs=1))
    assert [e.epoch for e in events if isinstance(e, Stepped)] == [10 / 48, 20 / 48, 30 / 48, 40 / 48, 1.0]


def test_time_does_not_run_backwards_when_a_run_goes_on(ready):
    made = ready(lambda: True, steps=3)
    (broken,) = [e for e in made.events() if isinstance(e, Finished)]
    again = gone_on(made.job.run.folder)
    assert all(e.seconds >= broken.train_seconds for e in again.events() if isinstance(e, Stepped | Finished))


def test_without_save_every_a_checkpoint_follows_each_evaluation(ready):
    events, _ = trained(ready(steps=6, evaluations=3, patience=0))
    assert [e.step for e in events if isinstance(e, Evaluated)] == [2, 4, 6]
    assert sorted({e.step for e in events if isinstance(e, Saved)}) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"epochs": 2}, 12), ({"epochs": 0.5}, 3), ({"epochs": 9, "steps": 4}, 4), ({"epochs": 1, "batch_rows": 46}, 1)],
)
def test_steps_come_from_epochs_unless_they_are_given(ready, settings, steps):
    events, _ = trained(ready(**settings))  # 46 rows are learnt, 2 are held out
    assert end(events).step == steps
    stepped = [e for e in events if isinstance(e, Stepped)]
    assert [e.step for e in stepped] == list(range(1, steps + 1))
    rows = settings.get("batch_rows", 8)
    assert stepped[0].epoch == pytest.approx(min(rows, 46) / 46)
    assert stepped[-1].epoch == pytest.approx(min(settings["epochs"], rows * steps / 46), abs=rows / 46)


def test_the_sample_question_is_answered_before_training_and_at_each_evaluation(ready):
    made = ready(steps=2, evaluations=1, sample="say 1")
    made.job.question = Question("say 1", (1, 2, 3), "b")
    events, _ = trained(made)
    assert [(e.step, e.question, e.expected) for e in events if isinstance(e, Sampled)] == [
        (0, "say 1", "b"),
        (2, "say 1", "b"),
    ]
