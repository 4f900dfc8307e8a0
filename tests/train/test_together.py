"""Several processes that train together learn what one learns, and go on where one, or more, stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT, end, gone_on, losses, prepared, stopping_at, told, write_contrary
from variants import VARIANTS

from deltaw.api import finetune
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.models.ranks import ALONE
from deltaw.train.events import Evaluated, Sampled, Stepped

PATIENCE = 300
SMALL = {"steps": 4, "batch_rows": 5, "micro_tokens": 40, "evaluations": 2, "patience": 0, "save_every": 1}
"""Of five rows, one process has three and the other two, in different numbers of micro-batches."""


def cases():
    """The first settings of every method, and the last where they are others, without dropout."""
    for method, settings in VARIANTS.items():
        for i, own in {0: settings[0], len(settings) - 1: settings[-1]}.items():
            yield f"{method}-{i}", {"method": method, **{k: v for k, v in own.items() if k != "dropout"}}
    yield "checkpointed", {"method": "lora", "gradient_checkpointing": "on"}
    yield "packed", {"method": "lora", "base_format": "nf4-dq"}
    yield "few", {"method": "lora", "batch_rows": 1}
    yield "asking", {"method": "lora", "asks": True}


@pytest.fixture(scope="module")
def folder(tiny_path, tmp_path_factory):
    """Runs of all cases by two processes, of which one was stopped; and how they go on with what one began."""
    folder = tmp_path_factory.mktemp("together")
    with (folder / "rows.jsonl").open("w") as f:
        for i in range(48):
            turns = [
                {"role": "user", "content": f"say {i % 6} " * (1 + i % 5)},
                {"role": "assistant", "content": "abcdef"[i % 6] * (1 + i % 4)},
            ]
            f.write(json.dumps({"messages": turns}) + "\n")
    values = told(tiny_path, folder, **SMALL)
    fresh = {name: {**values, "name": name, **own} for name, own in cases()}
    fresh["stopped-by-two"] = {**values, "name": "stopped-by-two", "method": "lora", "stop": 8}
    stopped = {**values, "name": "stopped-by-one", "method": "lora"}
    contrary = {"val": write_contrary(folder), "steps": 12, "evaluations": 6, "patience": 1}
    fresh["full"] = {**values, "name": "full", "method": "lora", **contrary, "full": True}
    assert end(list(prepared(folder / "rows.jsonl", stopped, stopping_at(8)).events())).reason == "interrupted"
    (folder / "fresh.json").write_text(json.dumps(fresh))
    (folder / "begun.json").write_text(json.dumps(["stopped-by-one"]))
    together(2, str(Path(__file__).parent / "train_ranks.py"), str(folder))
    return folder


def together(ranks, *command, cwd=None, code=0):
    """What several processes print."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=PATIENCE)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr * bool(code)


def alone(folder, name, values):
    """What one process does with the same settings, in a folder of its own."""
    values = {**values, "runs": str(folder / "alone"), "name": name}
    asks = values.pop("asks", False)
    made = finetune.prepare([str(folder / "rows.jsonl")], values) if asks else prepared(folder / "rows.jsonl", values)
    return list(made.events()), made


def close(got, want):
    (steps, evaluated), (expected, measured) = got, want
    assert [step for step, *_ in steps] == [step for step, *_ in expected]
    for pairs, others in ((steps, expected), (evaluated, measured)):
        torch.testing.assert_close(torch.tensor([p[1] for p in pairs]), torch.tensor([p[1] for p in others]),
                                   rtol=2e-4, atol=2e-5)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, _ in cases()])
def test_two_processes_have_the_losses_of_one(folder, tiny_path, name):
    values = told(tiny_path, folder, **{**SMALL, **dict(cases())[name]})
    events, made = alone(folder, name, values)
    got = json.loads((folder / f"{name}.json").read_text())
    close(got["losses"], losses(events))
    assert got["reason"] == "done"
    assert got["said"] == [event.answer for event in events if isinstance(event, Sampled)]
    assert bool(got["said"]) == (name == "asking")
    (_, mine), (_, theirs) = (adapters.read(run.adapter) for run in (made.job.run, Run(folder / "runs" / name)))
    assert mine.keys() == theirs.keys()
    for key, t in mine.items():
        torch.testing.assert_close(theirs[key].float(), t.float(), rtol=0.02, atol=0.02)
    if name == "lora-0":
        layers = sum(t.numel() for t in made.job.model.layers.buffers() if t.dim() == 2)
        assert got["held"] == layers // 2


@pytest.fixture(scope="module")
def unbroken(folder, tiny_path):
    """What one process does that nobody stops."""
    return losses(alone(folder, "unbroken", {**told(tiny_path, folder, **SMALL), "method": "lora"})[0])


def test_what_one_began_two_go_on_with(folder, unbroken):
    assert 0 < len(json.loads((folder / "stopped-by-one.json").read_text())["losses"][0]) < len(unbroken[0])
    close(losses(recorded(folder / "runs" / "stopped-by-one")), unbroken)


def test_what_two_began_one_goes_on_with_though_only_the_second_was_asked_to_stop(folder, unbroken):
    stopped = json.loads((folder / "stopped-by-two.json").read_text())
    assert stopped["reason"] == "interrupted"
    assert 0 < len(stopped["losses"][0]) < len(unbroken[0])
    assert end(list(gone_on(folder / "runs" / "stopped-by-two").events())).reason == "done"
    close(losses(recorded(folder / "runs" / "stopped-by-two")), unbroken)


def test_where_the_disk_of_one_is_full_no_process_has_a_best_adapter_that_another_lacks(folder):
    """Else one would give up before the other, which would wait for it."""
    told = json.loads((folder / "full.json").read_text())
    assert (told["reason"], len(told["losses"][0])) == ("done", 12)
    assert [best for *_, best in told["losses"][1]] == [True] * 6


def recorded(folder):
    """The steps and evaluations that a run wrote down."""
    lines = map(json.loads, Run(folder).events.read_text().splitlines())
    return [Stepped(**told) if kind == "stepped" else Evaluated(**told) for line in lines
            for kind, told in [(line.pop("event"), line)] if kind in ("stepped", "evaluated")]  # fmt: skip


def test_the_command_line_shows_a_run_once(folder, tiny_path, tmp_path):
    command = ["-m", "deltaw.cli", "train", str(folder / "rows.jsonl"), "--base", str(tiny_path), "--steps", "3",
               "--name", "shown"]  # fmt: skip
    shown = together(2, *command, cwd=tmp_path)
    assert len(re.findall("Talk to it: deltaw chat shown", shown)) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["shown"]
    assert "2 processes train together" in shown


@pytest.mark.parametrize("fault", [UserError("wrong"), RuntimeError("no memory"), RecursionError("deep")])
def test_what_fails_in_the_first_process_or_in_one_alone_is_never_passed_over(fault):
    with pytest.raises(type(fault), match=str(fault)), ALONE.once():
        raise fault


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["rows.jsonl", "--name", "taken"], "There is a run 'taken' already."),
    (["--resume", "nobody"], "There is no run 'nobody'."),
    (["bad.jsonl"], "This line is not JSON"),
])  # fmt: skip
def test_what_is_wrong_is_told_once_and_ends_all(folder, tiny_path, tmp_path, arguments, complaint):
    """Whether only the first finds it, or all do: the others neither say it again nor wait until they are ended."""
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    base = [] if "--resume" in arguments else ["--base", str(tiny_path)]
    shown = together(2, "-m", "deltaw.cli", "train", *arguments, *base, cwd=tmp_path, code=1)
    assert shown.count(complaint) == 1
    assert "[rank1]" not in shown  # as a traceback is
    assert "forcefully" not in shown
