"""What goes wrong in a run, losses that are no numbers or a full disk: nothing good is lost, nothing bad is kept."""

import errno
import json
import math

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import end, gone_on, losses, stopping_at

from deltaw.api import finetune as api
from deltaw.errors import Diverged
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.train import checkpoint, loop
from deltaw.train.events import Evaluated, Finished, Question, Saved, Stepped, Warned
from deltaw.train.loop import Trainer
from deltaw.train.optimizer import rate

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    # As safetensors 0.8 says it: no OSError, and no errno.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.fixture
def spoil(monkeypatch):
    """A function that makes the losses of these training steps no numbers, counted from 1."""
    real = loop.batch_loss

    def spoil(*steps, value=math.nan):
        count = iter(range(1, 10**9))

        def batch_loss(*arguments):
            loss = real(*arguments)
            return loss * value if torch.is_grad_enabled() and next(count) in steps else loss

        monkeypatch.setattr(loop, "batch_loss", batch_loss)

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_loss_that_is_no_number_is_skipped_and_halves_the_rate(ready, spoil, value):
    spoil(3, value=value)
    made = ready(steps=6)
    events = list(made.events())
    (warned,) = [e for e in events if isinstance(e, Warned)]
    assert warned.text == "The loss of step 3 is not finite: the step is skipped, the rate halved."
    rates = {e.step: e.learning_rate for e in events if isinstance(e, Stepped)}
    assert rates == {i + 1: rate(i, 6, 0.01, made.job.settings) * (1 if i < 2 else 0.5) for i in (0, 1, 3, 4, 5)}
    assert end(events).reason == "done"
    assert all(t.isfinite().all() for t in load_file(made.job.run.adapter).values())


def test_a_question_that_gets_no_number_for_an_answer_is_told_and_ends_no_run(ready):
    made = ready(steps=2, val="0")
    made.job.question = Question("say 1", tuple(made.base.tokenizer.encode("say 1")))
    with torch.no_grad():
        next(made.job.adapter.parameters()).fill_(math.nan)
    trainer = Trainer(made.job)
    with made.job.adapter.on():
        (warned,) = trainer._sample()
    assert warned.text.startswith("Nothing can be said after step 0. What was computed is no number")


def test_a_skipped_step_moves_nothing(ready, spoil):
    made = ready(steps=6)
    trainer = Trainer(made.job)
    with made.job.adapter.on():
        trainer._step(0.0, list(range(8)))
        before = {n: p.detach().clone() for n, p in made.job.adapter.named_parameters()}
        spoil(1)
        assert isinstance(trainer._step(0.0, list(range(8))), Warned)
    assert all(torch.equal(p, before[n]) for n, p in made.job.adapter.named_parameters())
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def test_a_gradient_that_is_no_number_is_skipped_though_the_loss_is_one(ready, monkeypatch):
    real, count = loop.batch_loss, iter(range(1, 10**9))

    def batch_loss(*arguments):
        loss = real(*arguments)
        if torch.is_grad_enabled() and next(count) == 2:
            loss.register_hook(lambda g: g * math.inf)
        return loss

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    made = ready(steps=4)
    events = list(made.events())
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 3, 4]
    assert all(t.isfinite().all() for t in load_file(made.job.run.adapter).values())


def diverged(made):
    """The events of a run that ends with `Diverged`, and the error."""
    events = []
    with pytest.raises(Diverged) as e:
        events.extend(made.events())
    written = made.job.run.events.read_text().splitlines()
    return [json.loads(line) for line in written], e.value


def test_the_second_ends_the_run_with_the_best_adapter(ready, spoil, tmp_path):
    spoil(5, 8)
    made = ready(steps=9, evaluations=9, patience=0)
    records, error = diverged(made)
    assert (error.code, error.where) == (4, str(made.job.run.folder))
    course = {r["step"]: r["loss"] for r in records if r["event"] == "evaluated"}
    best = min(course, key=course.get)
    assert error.why == f"The adapter as it was at step {best} is saved."
    assert float(error.remedy.split("--learning-rate ")[1]) < made.job.learning_rate / 2
    assert (records[-1]["event"], records[-1]["reason"]) == ("finished", "diverged")
    written = adapters.read(made.job.run.adapter)[1]
    assert all(t.isfinite().all() for t in written.values())
    kept = adapters.read(made.job.run.best)[1]
    assert all(torch.equal(kept[name], t) for name, t in written.items())


def test_the_second_ends_a_run_without_validation_with_the_newest_checkpoint(ready, spoil):
    spoil(4, 6)
    made = ready(steps=9, val="0", save_every=2)
    _, error = diverged(made)
    assert error.why == "The adapter as it was at step 4 is saved."
    held = load_file(made.job.run.checkpoints()[-1])
    written = adapters.read(made.job.run.adapter)[1]
    assert all(torch.equal(held[f"adapter.{name}"], t) and t.isfinite().all() for name, t in written.items())


def test_a_skipped_step_is_remembered_over_an_interruption(ready, spoil):
    spoil(2)
    made = ready(stopping_at(4), steps=9, val="0")
    assert end(list(made.events())).reason == "interrupted"
    spoil(3)
    records, _ = diverged(gone_on(made.job.run.folder))
    assert [r["text"][:22] for r in records if r["event"] == "warned"] == ["The loss of step 2 is "]


@pytest.mark.parametrize("kept", ["weights", "moments"])
def test_what_is_no_number_is_never_written(ready, kept):
    made = ready(steps=2)
    list(made.events())
    job, trainer = made.job, Trainer(made.job)
    trainer.resume()
    before = {p: p.read_bytes() for p in job.run.folder.rglob("*.safetensors")}
    parameter = next(job.adapter.parameters())
    spoilt = parameter.data if kept == "weights" else trainer.optimizer.state[parameter]["exp_avg"]
    spoilt.view(-1)[0] = math.nan
    with pytest.raises(Diverged, match="nothing was written"):
        checkpoint.save(
            job.run, job.adapter, trainer.optimizer, trainer.progress, checkpoint.get_random(job.model.device)
        )
    if kept == "weights":
        with pytest.raises(Diverged, match="nothing was written"):
            adapters.save(job.adapter, job.header, job.run.adapter)
    assert {p: p.read_bytes() for p in job.run.folder.rglob("*.safetensors")} == before


def failing(save, error, times):
    """A writer of files that fails in the calls of these numbers, counted from 1."""
    count = iter(range(1, 10**9))

    def fails(*arguments, **keywords):
        if next(count) in times:
            raise error
        return save(*arguments, **keywords)

    return fails


@pytest.mark.parametrize("error", FULL, ids=["no space", "quota", "safetensors"])
def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_can(ready, monkeypatch, error):
    calm = ready(steps=6, save_every=1)
    unbroken = list(calm.events())
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, error, {2, 3, 4}))
    made = ready(steps=6, save_every=1)
    events = list(made.events())
    warned = [e.text for e in events if isinstance(e, Warned)]
    assert warned == ["The disk is full: nothing was saved. Training goes on, and saving is tried again."]
    assert sorted({e.step for e in events if isinstance(e, Saved)}) == [0, 4, 5, 6]
    assert losses(events) == losses(unbroken)
    assert made.job.run.adapter.read_bytes() == calm.job.run.adapter.read_bytes()
    assert [p.name for p in made.job.run.folder.rglob(".*")] == [".lock"]


def test_a_best_adapter_that_found_no_room_is_not_said_to_be_there(ready, monkeypatch):
    losses_by_call = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(loop, "validation_loss", lambda job: next(losses_by_call))
    monkeypatch.setattr(adapters, "save_file", failing(adapters.save_file, FULL[0], {2}))
    made = ready(steps=4, evaluations=4, patience=0)
    events = list(made.events())
    assert [e.loss for e in events if isinstance(e, Evaluated)] == [3.0, 2.0, 2.5, 2.6]
    assert (end(events).best_step, end(events).best_loss) == (3, 2.5)
    assert made.job.run.adapter.read_bytes() == made.job.run.best.read_bytes()


def test_any_other_fault_of_the_disk_ends_the_run(ready, monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, error, {2}))
    with pytest.raises(PermissionError):
        list(ready(steps=4, save_every=1).events())


def test_a_disk_that_is_full_at_the_end_costs_the_report_and_not_the_adapter(ready, monkeypatch):
    def full(*_):
        raise FULL[0]

    monkeypatch.setattr(api, "write_report", full)
    monkeypatch.setattr(Run, "write_json", lambda run, path, values: full() if "actual" in values else None)
    made = ready(steps=2)
    events = list(made.events())
    assert [e.text for e in events if isinstance(e, Warned)] == [
        "The disk is full: plan.json was not written.", "The disk is full: report.html was not written."]  # fmt: skip
    assert [e.reason for e in events if isinstance(e, Finished)] == ["done"]
    assert made.job.run.adapter.exists()


def test_a_run_that_diverges_on_a_full_disk_still_says_so(ready, spoil, monkeypatch):
    spoil(1, 2)
    monkeypatch.setattr(adapters, "save_file", failing(adapters.save_file, FULL[0], range(100)))
    _, error = diverged(ready(steps=6, val="0"))
    assert (error.code, error.why) == (4, "The disk is full.")
