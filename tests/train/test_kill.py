"""A training process may be killed at any moment: no file is ever damaged, and the run goes on bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open
from small import ROOT, gone_on, losses, prepared, told

from deltaw.files.runs import Run


def command(*arguments):
    return [sys.executable, "-m", "deltaw.cli", "train", *map(str, arguments)]


def begun(arguments, run, steps):
    """A process that trains, and has written down this many steps more than it found."""
    log = run.events.read_text().count('"stepped"') if run.events.exists() else 0
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for _ in range(6000):
        if process.poll() is not None or (
            run.events.exists() and run.events.read_text().count('"stepped"') >= log + steps
        ):
            return process
        time.sleep(0.01)
    raise AssertionError("the process takes no steps")


def flags(values):
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


LONG = {"steps": 150, "dropout": 0.2, "micro_tokens": 128, "evaluations": 5, "patience": 0, "save_every": 7}


@pytest.fixture(scope="module")
def unbroken(tiny_path, tmp_path_factory):
    """The long run without any interruption: the bytes of its adapter, and its losses."""
    folder = tmp_path_factory.mktemp("unbroken")
    rows = folder / "rows.jsonl"
    with rows.open("w") as f:
        for i in range(48):
            turns = [{"role": "user", "content": f"say {i % 6}"}, {"role": "assistant", "content": "abcdef"[i % 6] * 3}]
            f.write(json.dumps({"messages": turns}) + "\n")
    made = prepared(rows, told(tiny_path, folder, **LONG))
    events = list(made.events())
    return rows, made.job.run.adapter.read_bytes(), dict(losses(events)[0])


def written_losses(run):
    """The last loss written down for each step."""
    records = map(json.loads, filter(None, run.events.read_text().split("\n")))
    return {r["step"]: r["loss"] for r in records if r["event"] == "stepped"}


def test_a_run_that_is_killed_again_and_again_loses_nothing(unbroken, tiny_path, tmp_path):
    rows, wanted, losses_by_step = unbroken
    values = told(tiny_path, tmp_path, **LONG)
    run, dice = Run(tmp_path / "runs" / "run"), random.Random(5)
    arguments = command(rows, *flags(values))
    for _ in range(4):
        process = begun(arguments, run, steps=dice.randrange(1, 25))
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        for file in run.folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118
        arguments = command("run", "--resume", "--runs", run.folder.parent)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run.adapter.read_bytes() == wanted
    assert written_losses(run) == losses_by_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_says_how_to_go_on(number, unbroken, tiny_path, tmp_path):
    rows, wanted, losses_by_step = unbroken
    run = Run(tmp_path / "runs" / "run")
    process = begun(command(rows, *flags(told(tiny_path, tmp_path, **LONG))), run, steps=3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Go on with: deltaw train --resume run" in out
    assert "Traceback" not in out + err
    at = int(run.checkpoints()[-1].stem.removeprefix("step-"))
    assert at == max(written_losses(run)) >= 3
    rest = list(gone_on(run.folder).events())
    assert rest[0].resumed_at == at
    assert run.adapter.read_bytes() == wanted
    assert written_losses(run) == losses_by_step


def test_the_second_signal_leaves_at_once(unbroken, tiny_path, tmp_path):
    rows, wanted, _ = unbroken
    run = Run(tmp_path / "runs" / "run")
    process = begun(command(rows, *flags(told(tiny_path, tmp_path, **LONG))), run, steps=3)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # both arrive before the next step
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with" not in out
    list(gone_on(run.folder).events())
    assert run.adapter.read_bytes() == wanted
