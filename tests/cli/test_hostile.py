"""What nobody types on purpose: closed streams, bytes that are no text, numbers without end, files half written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import ROOT, ROW, TRAIN, prepared, stopping_at, write_rows

from deltaw.cli.app import run
from deltaw.errors import UserError
from deltaw.files.runs import Run
from deltaw.models.config import ModelConfig
from deltaw.models.tokenizer import Tokenizer

SAID_FIRST = ["-c", "print(flush=True); from deltaw.cli.__main__ import main; main()"]
"""Says that Python itself is up: what it does with a signal before, this project has no part in."""


def started(*arguments, cwd, module=("-m", "deltaw.cli"), **options):
    """A process of the command line in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, *module, *arguments], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


@pytest.mark.parametrize("after", [0.1, 0.3, 0.6, 1.0, 1.5])
def test_ctrl_c_while_modules_load_ends_the_process(here, after):
    with started(*TRAIN, "--steps", "100000", cwd=here, module=SAID_FIRST) as process:
        try:
            process.stdout.readline()
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Error" not in err


@pytest.mark.parametrize(
    "command",
    [
        ("data", "check", "rows.jsonl", "--base=base", "--fix=new/x.jsonl"),
        ("merge", "--out=new/m", "--base=base"),
        ("export", "--to=gguf", "--out=new/x.gguf", "--base=base"),
        ("export", "--to=peft", "--out=new/x", "--base=base"),
    ],
)
def test_a_process_that_is_asked_to_end_tidies_up(here, command, monkeypatch):
    values = {"base": "base", "dtype": "float32", "threads": 1, "name": "run", "steps": 1, "val": "0"}
    list(prepared("rows.jsonl", values).events())
    before = signal.getsignal(signal.SIGTERM)

    def end(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("deltaw.cli.data.looked_at", end)
    monkeypatch.setattr("deltaw.api.merge.compared", end)
    monkeypatch.setattr("deltaw.api.exchange.compared", end)
    try:
        with pytest.raises(SystemExit) as e:
            run(list(command))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert e.value.code == 143
    assert not (here / "new").exists()


def test_a_pipe_that_is_closed_ends_the_command_quietly(here):
    with started(*TRAIN, "--steps", "3", cwd=here) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("command", [["generate"], ["chat"]])
def test_closed_standard_streams_are_empty_ones(here, command):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    process = started(*command, cwd=here, preexec_fn=lambda: os.close(0))
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert process.returncode == (2 if command == ["generate"] else 0)


def test_any_letter_can_be_written_to_any_terminal(here):
    write_rows(here / "ünï💥.jsonl", *[ROW] * 3)
    process = started("train", "ünï💥.jsonl", *TRAIN[2:], "--steps=1", cwd=here, env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"Talk to it: deltaw chat" in out


def test_bytes_that_are_no_text_are_named_and_not_answered(here, said):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    assert "bytes that are no UTF-8" in said("generate", "caf\udce9", "--run", "mine")
    (here / "rows.jsonl").rename(here / "caf\udce9.jsonl")
    assert "The name of the data file is no text." in said("train", "caf\udce9.jsonl", *TRAIN[2:])
    assert "is no text" in said("train", "a\0b", *TRAIN[2:])


def test_a_pipe_instead_of_a_file_is_refused_rather_than_waited_for(here, said):
    os.mkfifo(here / "pipe")
    assert "The data file is no regular file. where pipe" in said("train", "pipe", *TRAIN[2:])


@pytest.mark.parametrize("weight", ["0", "-1", "1e-300", "1e9", "nan", "inf"])
def test_weights_without_bounds_are_refused(here, said, weight):
    assert "is not between 0.001 and 1000" in said("train", f"rows.jsonl:{weight}", *TRAIN[2:])


@pytest.mark.parametrize("flag", ["--rank=1000000", "--steps=99999999999999999999", "--alpha=1e300", "--threads=100000",
                                  "--device=meta", "--batch-rows=99999999999"])  # fmt: skip
def test_numbers_without_bounds_are_refused(here, said, flag):
    said(*(a for a in TRAIN if not flag.startswith(a)), flag)
    assert not (here / "runs").exists()


def test_a_temperature_next_to_nothing_is_nothing(here, capsys):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    told = []
    for temperature in ("0", "1e-300"):
        capsys.readouterr()
        assert run(["generate", "say 1", "--run=mine", "--max-new-tokens=5", f"--temperature={temperature}"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_a_panel_has_twelve_lines_whatever_is_in_it(here, said):
    write_rows(here / "rows.jsonl", {"messages": [{"role": "x" * 5000, "content": "a"}]})
    said(*TRAIN)
    write_rows(here / "rows.jsonl", {f"key {i}": i for i in range(3000)})
    said(*TRAIN)
    (here / "base").unlink()
    said(*TRAIN, "--base", "y" * 3000)


def test_a_row_nested_without_end(here, said):
    for depth in (900, 100_000):
        write_rows(here / "rows.jsonl", '{"text": "a", "x": ' + "[" * depth + "]" * depth + "}")
        assert "rows.jsonl:1" in said(*TRAIN)


@pytest.mark.parametrize("text", ["x: 9999-99-99", "x: " + 5000 * "[", "epochs: 2000-01-01"])
def test_yaml_that_python_cannot_hold(here, said, text):
    (here / "c.yaml").write_text(text)
    said(*TRAIN, "--config", "c.yaml")


@pytest.fixture
def interrupted(here):
    values = {"base": "base", "dtype": "float32", "threads": 1, "name": "run", "steps": 6, "val": "0"}
    list(prepared("rows.jsonl", values, stopping_at(3)).events())
    return Run(here / "runs" / "run")


@pytest.mark.parametrize("text", ["{}", "[]", "data: 5", "data: [rows.jsonl]\nrank: x", "5"])
def test_a_run_with_a_damaged_configuration_does_not_go_on(interrupted, said, text):
    interrupted.config.write_text(text)
    said("train", "--resume", "run")


@pytest.mark.parametrize("change", [{"rendered": None}, {"rendered": "x"}, {"rendered": 5}, {"base": 3}])
def test_a_run_with_a_damaged_manifest_does_not_go_on(interrupted, said, change):
    manifest = json.loads(interrupted.manifest.read_text())
    interrupted.manifest.write_text(json.dumps({**manifest, **change}))
    assert "manifest" in said("train", "--resume", "run")


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": "x"}, {"seconds": None}, {"notices": 5}])
def test_a_run_with_a_damaged_plan_does_not_go_on_until_it_is_removed(interrupted, said, change):
    plan = json.loads(interrupted.plan.read_text())
    interrupted.plan.write_text(json.dumps({**plan, **change}))
    assert "plan.json" in said("train", "--resume", "run")
    interrupted.plan.unlink()
    assert run(["train", "--resume", "run"]) == 0


def test_files_that_are_not_ours_among_the_checkpoints_are_left_alone(interrupted):
    (interrupted.folder / "checkpoints" / "step-abc.safetensors").write_bytes(b"")
    assert run(["train", "--resume", "run"]) == 0


def test_weights_that_grow_beyond_numbers_end_the_run_at_the_last_good_checkpoint(here, said, monkeypatch):
    text = said(*TRAIN, "--weight-decay", "1e308", "--learning-rate", "0.9", "--name=mine", code=4)
    assert "where runs/mine" in text
    assert "--learning-rate" in text
    assert (here / "runs" / "mine" / "adapter" / "adapter.safetensors").exists()


CONFIG = json.loads("""{"model_type": "llama", "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "intermediate_size": 64}""")


@pytest.mark.parametrize("change", [
    {"max_position_embeddings": None}, {"max_position_embeddings": -1}, {"rms_norm_eps": None}, {"rms_norm_eps": -1},
    {"rms_norm_eps": [1]}, {"rope_parameters": "x"}, {"rope_parameters": [1]}, {"rope_theta": "x"},
    {"rope_parameters": {"rope_type": "llama3"}}, {"hidden_size": -3}, {"vocab_size": 10**30},
        {"model_type": "mistral", "sliding_window": -1},
    {"rope_parameters": {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4,
                         "original_max_position_embeddings": 8192}}, {"num_attention_heads": 0}])  # fmt: skip
def test_a_model_configuration_of_odd_values_is_refused(change):
    assert ModelConfig.from_hf(CONFIG, "x").width == 32
    with pytest.raises(UserError, match=r"config\.json") as e:
        ModelConfig.from_hf({**CONFIG, **change}, "x")
    assert e.value.where == "x"


@pytest.mark.parametrize(("file", "text"), [
    ("tokenizer_config.json", "5"), ("tokenizer_config.json", "null"), ("generation_config.json", "[1]"),
    ("chat_template.jinja", b"\xff"), ("tokenizer_config.json", '{"eos_token": 5}'),
    ("tokenizer_config.json", '{"eos_token": {"a": 1}}'), ("generation_config.json", '{"eos_token_id": "x"}'),
    ("generation_config.json", '{"eos_token_id": [[1]]}')])  # fmt: skip
def test_tokenizer_files_of_odd_values_are_refused(tiny_path, tmp_path, file, text):
    folder = tmp_path / "base"
    folder.mkdir()
    for part in tiny_path.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError):
        Tokenizer.load(folder)


def test_a_tokenizer_that_knows_more_than_the_model_is_said_not_to_belong_to_it(tiny):
    with pytest.raises(UserError, match="gives the id 300, and the model has 260 rows"):
        tiny.hidden(torch.tensor([1, 300]), torch.arange(2), None)
