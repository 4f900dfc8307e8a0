"""A training process may be killed at any moment: no file is ever damaged, and the run goes on bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from gguf import GGUFReader
from parity.test_gguf_families import merging_tokenizer
from safetensors import safe_open
from small import ROOT, ROW, TRAIN, gone_on, losses, prepared, told, write_rows

from deltaw.cli import app
from deltaw.data.files import read
from deltaw.files import adapters, atomic, peft
from deltaw.files.runs import Run
from deltaw.models import checkpoint
from deltaw.models.tokenizer import Tokenizer


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


def merged(out):
    model = checkpoint.load(out)
    assert Tokenizer.load(out).template
    return model.config.layers == 2 and (out / "merge_report.json").exists()


def in_peft(out):
    return peft.read(out, checkpoint.load(Path("base")))


def in_ollama(out):
    return "FROM" in (out / "Modelfile").read_text() and checkpoint.load(out / "mine.gguf")


def brought(out):
    return adapters.load(out / "adapter" / "adapter.safetensors", checkpoint.load(Path("base")))


def fixed(out):
    return len(read(out)) == 2


WRITES = {
    "a merge": (["merge", "mine"], "merged", merged),
    "an export to PEFT": (["export", "mine", "--to", "peft"], "theirs", in_peft),
    "a GGUF file": (["export", "mine", "--to", "gguf"], "out.gguf", checkpoint.load),
    "a GGUF LoRA": (["export", "mine", "--to", "gguf-lora"], "lora.gguf", lambda out: GGUFReader(out).tensors),
    "a folder for Ollama": (["export", "mine", "--to", "ollama"], "ollama", in_ollama),
    "an import": (["import", "given", "--base", "base"], "runs/brought", brought),
    "a combination": (["combine", "mine:0.5"], "runs/both", brought),
    "a search": (["search", "super", "two.jsonl", "--evaluations", "2", "--population", "1"], "runs/found", brought),
    "rows that are mended": (["data", "check", "two.jsonl", "--base", "base"], "fixed.jsonl", fixed),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "name", "whole"), WRITES.values(), ids=WRITES)
def test_a_command_that_is_killed_at_any_write_leaves_all_of_it_or_nothing(arguments, name, whole, here):
    """Killed before each flush to the disk, and tried again with what that left beside."""
    own = here / "own"
    shutil.copytree(here / "base", own)
    merging_tokenizer().save(str(own / "tokenizer.json"))
    (here / "base").unlink()
    own.rename(here / "base")
    write_rows(here / "two.jsonl", ROW, {"prompt": "a", "completion": "b"}, ROW)
    assert app.run([*TRAIN, "--steps", "2", "--name", "mine", "--val", "0"]) == 0
    if "super" in arguments:
        supernet = ["--method", "glora", "--supernet", "--steps", "1", "--name", "super", "--val", "0"]
        assert app.run([*TRAIN, *supernet]) == 0
    out, kills = here / name, 0
    assert app.run(["export", "mine", "--to", "peft", "--out", "given"]) == 0
    told_where = {"fixed.jsonl": ["--fix", name], "runs/brought": ["--name", "brought"],
                  "runs/both": ["--out", "both"], "runs/found": ["--out", "found"]}  # fmt: skip
    arguments = [*arguments, *told_where.get(name, ["--out", name])]
    while killed(arguments, kills):
        kills += 1
        if out.exists():
            assert whole(out)
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
    assert whole(out)
    assert kills >= 2


def killed(arguments, after):
    """Run a command in a copy of this process that is killed before it flushes so many things; whether it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only runs the command, on one thread
        child = os.fork()
    if not child:
        flush, left = atomic._flush, iter(range(after))
        atomic._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL) if next(left, None) is None else flush(path)
        os._exit(app.run(arguments))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
