"""An interrupted run goes on bit for bit: stopped at any micro-step, or cut off at any write; or says why it cannot."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import write_tiny
from safetensors import safe_open
from safetensors.torch import save_file
from small import ROOT, end, gone_on, losses, prepared, stopping_at, told, write_contrary

from deltaw.api.finetune import prepare, resume
from deltaw.errors import Interrupted, UserError
from deltaw.files import adapters
from deltaw.files.adapters import sealed
from deltaw.files.runs import Run
from deltaw.train import checkpoint
from deltaw.train.events import Evaluated, Planned, Warned

CASES = {
    "accumulation, dropout, validation": {"micro_tokens": 64, "dropout": 0.3, "steps": 4, "evaluations": 2},
    "one micro-batch a step, decay": {"weight_decay": 0.1, "steps": 6, "evaluations": 3, "schedule": "linear"},
    "early stopping": {"steps": 16, "evaluations": 16, "patience": 2, "save_every": 4},
    "recomputed layers, dropout": {"gradient_checkpointing": "on", "dropout": 0.5, "steps": 3, "micro_tokens": 128},
    "paged moments": {"optimizer": "paged_adamw", "steps": 3, "evaluations": 1},
    "every weight trained": {"method": "full", "learning_rate": 0.001, "steps": 3, "micro_tokens": 128},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_at_any_micro_step_ends_with_the_same_bits(case, tiny_path, tmp_path, rows_file):
    asked, chosen = [], dict(CASES[case])
    if case == "early stopping":
        chosen["val"] = write_contrary(tmp_path)
    whole = prepared(rows_file, told(tiny_path, tmp_path / "whole", **chosen), lambda: bool(asked.append(1)))
    unbroken = list(whole.events())
    wanted = whole.job.run.adapter.read_bytes()
    assert end(unbroken).reason == ("no better" if case == "early stopping" else "done")
    for at in range(1, len(asked) + 1):
        values = told(tiny_path, tmp_path / str(at), **chosen)
        broken = prepared(rows_file, values, stopping_at(at))
        first = list(broken.events())
        assert end(first).reason == "interrupted"
        assert not broken.job.run.adapter.exists()
        rest = list(gone_on(broken.job.run.folder).events())
        assert losses(first + rest) == losses(unbroken), at
        assert (end(rest).reason, end(rest).best_step) == (end(unbroken).reason, end(unbroken).best_step)
        assert broken.job.run.adapter.read_bytes() == wanted, at


def test_a_run_may_be_stopped_again_and_again(tiny_path, tmp_path, rows_file):
    case = {"micro_tokens": 64, "dropout": 0.3, "steps": 4, "evaluations": 2}
    whole = prepared(rows_file, told(tiny_path, tmp_path / "whole", **case))
    unbroken = list(whole.events())
    broken = prepared(rows_file, told(tiny_path, tmp_path / "broken", **case), stopping_at(3))
    events = list(broken.events())
    for _ in range(50):
        if end(events).reason != "interrupted":
            break
        # Five micro-steps: enough for one optimizer step of about four, and then it is stopped within the next.
        events += gone_on(broken.job.run.folder, stopping_at(5)).events()
    assert end(events).reason == "done"
    assert losses(events) == losses(unbroken)
    assert broken.job.run.adapter.read_bytes() == whole.job.run.adapter.read_bytes()


class PowerCut(BaseException):
    """What no handler catches."""


def dying(save, writes):
    """A writer of files that gives up when `writes` has no more to give."""

    def cut(*arguments, **keywords):
        if next(writes, None) is None:
            raise PowerCut
        return save(*arguments, **keywords)

    return cut


def test_a_run_cut_off_between_any_two_writes_goes_on_the_same(tiny_path, tmp_path, rows_file, monkeypatch):
    """Whichever file was the last that came to the disk: a checkpoint, the best adapter or the result."""
    case = {"steps": 16, "evaluations": 16, "patience": 2, "val": write_contrary(tmp_path)}
    written = []
    with monkeypatch.context() as patch:
        for place in (checkpoint, adapters):
            patch.setattr(place, "save_file", lambda *a, save=place.save_file, **k: (written.append(1), save(*a, **k)))
        whole = prepared(rows_file, told(tiny_path, tmp_path / "whole", **case))
        unbroken = list(whole.events())
    assert len(written) > 8
    for count in range(1, len(written)):
        broken = prepared(rows_file, told(tiny_path, tmp_path / str(count), **case))
        writes = iter(range(count))
        with monkeypatch.context() as patch:
            for place in (checkpoint, adapters):
                patch.setattr(place, "save_file", dying(place.save_file, writes))
            with pytest.raises(PowerCut):
                list(broken.events())
        rest = list(gone_on(broken.job.run.folder).events())
        assert losses(rest)[0] == [(step, loss) for step, loss in losses(unbroken)[0] if step > rest[0].resumed_at]
        assert end(rest).reason == end(unbroken).reason == "no better", count
        assert broken.job.run.adapter.read_bytes() == whole.job.run.adapter.read_bytes(), count


@pytest.fixture
def interrupted(tiny_path, tmp_path, rows_file):
    """A run that was stopped in its fourth step, on a base of its own."""
    base = shutil.copytree(tiny_path, tmp_path / "base")
    made = prepared(rows_file, told(base, tmp_path, steps=6, save_every=1), stopping_at(4))
    list(made.events())
    return made.job.run


def test_without_a_name_the_newest_run_goes_on(interrupted):
    assert resume(None, interrupted.folder.parent).job.run == interrupted


def test_a_run_that_is_being_trained_is_left_to_its_process(interrupted, tmp_path, rows_file):
    folder = interrupted.folder.parent
    first, second = gone_on(interrupted.folder), gone_on(interrupted.folder)
    events = first.events()
    next(events)
    with pytest.raises(UserError, match="is being trained by another process"):
        next(second.events())
    with pytest.raises(UserError, match="is being trained by another process"):
        resume("run", folder)
    with pytest.raises(UserError, match="The run 'run' is still being trained"):
        resume(None, folder)
    events.close()  # stopped in any way, it can be taken again
    assert resume(None, folder).job.run == interrupted


def test_another_processs_lock_holds_as_long_as_it_lives(interrupted):
    script = (
        "from deltaw.files.runs import Run; from pathlib import Path; import time\n"
        f"with Run(Path({str(interrupted.folder)!r})).held(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert interrupted.busy()
        holder.kill()
        holder.wait()
    assert not interrupted.busy()


def test_a_template_that_writes_the_date_writes_the_same_when_the_run_goes_on(tiny_path, tmp_path, rows_file):
    base = shutil.copytree(tiny_path, tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text("{{ strftime_now('%H:%M:%S.%f') }}\n" + template)
    made = prepared(rows_file, told(base, tmp_path, steps=6), stopping_at(4))
    list(made.events())
    again = gone_on(made.job.run.folder)
    assert list(again.job.rows) == list(made.job.rows)
    manifest = json.loads(made.job.run.manifest.read_text())
    made.job.run.manifest.write_text(json.dumps({**manifest, "rendered": "2001-01-01T00:00:00"}))
    with pytest.raises(UserError, match="tokens changed since it began"):
        gone_on(made.job.run.folder)


def test_a_run_may_go_on_elsewhere_and_it_is_said(interrupted):
    config = interrupted.read_config()
    interrupted.write_config({**config, "device": "cuda:7", "threads": 1})
    with pytest.raises(UserError, match=r"no device 'cuda:7' here"):
        resume("run", interrupted.folder.parent)
    made = resume("run", interrupted.folder.parent, on={"device": "cpu", "threads": 1})
    assert [n for n in made.started.notices if "cuda" in n or "threads" in n] == [
        "It goes on with device cpu, and was begun with cuda:7: losses may differ in the last digits."]  # fmt: skip


def test_random_numbers_of_a_gpu_are_left_alone_where_there_is_none(interrupted):
    path = interrupted.checkpoints()[-1]
    with safe_open(path, "pt") as file:
        tensors, said = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    tensors["random.device"] = torch.zeros(16, dtype=torch.uint8)
    progress = {k: v for k, v in json.loads(said["progress"]).items() if k != "sha256"}
    save_file(tensors, path, metadata=sealed("progress", progress, tensors))
    assert end(list(gone_on(interrupted.folder).events())).reason == "done"


def test_an_ended_run_does_not_go_on(interrupted):
    list(gone_on(interrupted.folder).events())
    with pytest.raises(UserError, match="The run 'run' has ended") as e:
        resume("run", interrupted.folder.parent)
    assert e.value.remedy == f"deltaw chat run --runs {interrupted.folder.parent}"


def test_a_run_whose_data_changed_does_not_go_on(interrupted, rows_file):
    with rows_file.open("a") as f:
        f.write(json.dumps({"prompt": "one", "completion": "more"}) + "\n")
    with pytest.raises(UserError, match="'run' cannot go on: data, tokens changed since it began"):
        resume("run", interrupted.folder.parent)


def test_a_run_whose_base_changed_does_not_go_on(interrupted, tmp_path):
    write_tiny(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="'run' cannot go on: base changed since it began"):
        resume("run", interrupted.folder.parent)


def test_a_run_whose_template_changed_does_not_go_on(interrupted, tmp_path):
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="'run' cannot go on: template, tokens changed since it began"):
        resume("run", interrupted.folder.parent)


def test_a_run_that_is_not_there_is_said_to_be_missing_with_the_nearest_name(interrupted):
    with pytest.raises(UserError, match=r"There is no run 'runn'.*Did you mean 'run'"):
        resume("runn", interrupted.folder.parent)


def test_a_folder_with_a_broken_configuration_says_so(interrupted):
    interrupted.config.write_text("rank: [")
    with pytest.raises(UserError, match=r"no readable config\.yaml"):
        resume("run", interrupted.folder.parent)


@pytest.mark.parametrize("keep", [0, 100, -50])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_serves(keep, interrupted, tmp_path):
    before = shutil.copytree(interrupted.folder, tmp_path / "copies" / "run")
    list(gone_on(before).events())
    newest = interrupted.checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:keep])
    events = list(gone_on(interrupted.folder).events())
    assert any(newest.name in notice and "goes on from the one before" in notice for notice in events[0].notices)
    assert events[0].resumed_at == int(newest.stem[-7:]) - 1
    assert newest.with_suffix(".damaged").stat().st_size < Run(before).checkpoints()[-1].stat().st_size
    assert interrupted.adapter.read_bytes() == Run(before).adapter.read_bytes()


def test_the_steps_are_those_it_was_begun_with_whatever_the_plan_says(interrupted):
    plan = json.loads(interrupted.plan.read_text())
    interrupted.plan.write_text(json.dumps({**plan, "steps": 99}))
    assert end(list(gone_on(interrupted.folder).events())).step == 6


def test_a_plan_made_anew_changes_no_schedule(tiny_path, tmp_path, rows_file):
    made = prepared(rows_file, told(tiny_path, tmp_path, minutes=0.02, save_every=1), stopping_at(3))
    steps = next(e.steps for e in list(made.events()) if isinstance(e, Planned))
    made.job.run.plan.unlink()
    assert end(list(gone_on(made.job.run.folder).events())).step == steps


def test_a_run_without_any_checkpoint_says_that_it_begins_anew(interrupted):
    shutil.rmtree(interrupted.folder / "checkpoints")
    first = next(iter(gone_on(interrupted.folder).events()))
    assert (first.resumed_at, "No checkpoint is left: the run begins anew." in first.notices) == (0, True)


@pytest.mark.parametrize("keep", [None, 100])
def test_where_the_best_adapter_is_lost_the_last_is_kept_and_it_is_said(keep, tiny_path, tmp_path, rows_file):
    values = told(tiny_path, tmp_path, steps=6, evaluations=6, patience=0, val=write_contrary(tmp_path))
    made = prepared(rows_file, values)
    for event in made.events():
        if isinstance(event, Evaluated) and event.step == 6:
            best = made.job.run.best
            best.write_bytes(best.read_bytes()[:keep]) if keep else best.unlink()
        if isinstance(event, Warned):
            assert "is gone or damaged: this is the one of step 6" in event.text
            break
    else:
        pytest.fail("nothing was said")
    list(gone_on(made.job.run.folder).events())
    assert made.job.run.adapter.exists()


def test_where_every_checkpoint_is_damaged_it_is_said(interrupted):
    for path in interrupted.checkpoints():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"The checkpoint is damaged.*train anew"):
        list(gone_on(interrupted.folder).events())


@pytest.mark.parametrize(("key", "value"), [("rank", 8), ("learning_rate", 0.5), ("epochs", 9), ("data", ["a.jsonl"])])
def test_settings_that_were_edited_are_named(key, value, interrupted):
    config = yaml.safe_load(interrupted.config.read_text())
    interrupted.write_config({**config, key: value})
    with pytest.raises(UserError, match=f"'{key}' is not what the run 'run' was begun with") as e:
        resume("run", interrupted.folder.parent)
    assert e.value.why == f"It is {value}, and was {config[key]}."
    interrupted.write_config(dict(reversed(config.items())))
    resume("run", interrupted.folder.parent)


@pytest.mark.parametrize(("text", "remedy"), [
    ("{}", "deltaw train --config"), ("[]", "deltaw train --config"), ("5", "deltaw train --config"),
    ("{", "deltaw train --config"), ('{"format": 0}', "deltaw train --config"), ('{"format": 99}', "Update deltaw"),
])  # fmt: skip
def test_a_manifest_of_another_kind_is_told_with_a_remedy(text, remedy, interrupted):
    interrupted.manifest.write_text(text)
    with pytest.raises(UserError, match=r"manifest|format") as e:
        resume("run", interrupted.folder.parent)
    assert remedy in e.value.remedy


def test_a_plan_that_is_no_object_may_be_removed(interrupted):
    interrupted.plan.write_text("[]")
    with pytest.raises(UserError, match=r"not a JSON object.*planned anew"):
        resume("run", interrupted.folder.parent)


def test_who_stops_while_the_data_is_read_leaves_nothing_behind(tiny_path, tmp_path, rows_file):
    with pytest.raises(Interrupted, match="nothing was changed"):
        prepare([str(rows_file)], told(tiny_path, tmp_path), lambda: True)
    assert not (tmp_path / "runs").exists()


def test_the_written_configuration_holds_every_setting_and_the_data(interrupted, rows_file):
    config = yaml.safe_load(interrupted.config.read_text())
    assert config["data"] == [str(rows_file)]
    assert (config["steps"], config["save_every"], config["dtype"], config["rank"]) == (6, 1, "float32", 16)
