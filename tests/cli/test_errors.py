"""A mistake gets one panel: what, where, why, what to do; at most twelve lines, an exit code, and never a traceback."""

import errno
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import write_tiny
from safetensors.torch import save_file
from small import ROOT, TRAIN

from deltaw.advise import plan
from deltaw.cli.app import run
from deltaw.train import loop


def test_an_unknown_option(here, said):
    text = said(*TRAIN, "--learning-rat", "0.1")
    assert "--learning-rat" in text
    assert re.search(r"[Dd]id you mean .{0,3}--learning-rate\b", text)


def test_an_unknown_command(here, said):
    text = said("trian", "rows.jsonl")
    assert "trian" in text
    assert re.search(r"[Dd]id you mean .?train", text)


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--epochs", "-1", "epochs = '-1': input should be greater than 0."),
        ("--learning-rate", "2", "learning_rate = '2': input should be less than 1."),
        ("--batch-rows", "0", "batch_rows = '0': input should be greater than or equal to 1."),
        ("--rank", "0", "rank = '0': input should be greater than or equal to 1."),
        ("--dropout", "1", "dropout = '1': input should be less than 1."),
        ("--warmup", "2", "warmup = '2': input should be less than or equal to 1."),
        ("--epochs", "many", "epochs"),
        ("--schedule", "cosin", "cosine"),
        ("--device", "tpu", "There is no device 'tpu' here."),
        ("--name", "a/b", "'a/b' is no name for a run."),
        ("--rows.jsonl", "1", "--rows.jsonl"),
    ],
)
def test_a_value_that_does_not_fit(here, said, flag, value, complaint):
    assert complaint in said(*TRAIN, f"{flag}={value}")


def test_an_unknown_key_of_a_configuration_file(here, said):
    (here / "c.yaml").write_text("# mine\nepochs: 2\nlerning_rate: 0.1\n")
    text = said(*TRAIN, "--config", "c.yaml")
    assert "Unknown setting 'lerning_rate'. where c.yaml:3 remedy Did you mean 'learning_rate'?" in text


def test_a_bad_value_in_a_configuration_file(here, said):
    (here / "c.yaml").write_text("epochs: -2\n")
    assert "epochs = -2: input should be greater than 0. where c.yaml:1" in said(*TRAIN, "--config", "c.yaml")


def test_a_configuration_file_that_is_no_yaml_or_no_mapping_or_not_there(here, said):
    (here / "c.yaml").write_text("epochs: 2\nrank: [1\nbase: x\n")
    assert "This is not YAML. where c.yaml:3" in said(*TRAIN, "--config", "c.yaml")
    (here / "c.yaml").write_text("- epochs\n")
    assert "A configuration file is a mapping of settings to values. where c.yaml" in said(*TRAIN, "--config", "c.yaml")
    assert "The configuration file cannot be read. where no.yaml" in said(*TRAIN, "--config=no.yaml")


@pytest.mark.parametrize("data", ["", "3", "[]", "[1]", "{a: b}", "[a.jsonl, ]\nepochs: 2\ndata: 1"])
def test_data_in_a_configuration_file_that_is_no_file(here, said, data):
    (here / "c.yaml").write_text(f"rank: 4\ndata: {data}\n")
    text = said("train", "--config", "c.yaml")
    assert re.search(r"'data' is not a file or a list of files\. where c\.yaml:\d", text)


def test_an_unknown_method(here, said):
    assert "There is no method 'lorra'. remedy Did you mean 'lora'?" in said(*TRAIN, "--method", "lorra")


def test_an_unknown_target(here, said):
    text = said(*TRAIN, "--targets", "q_pro")
    assert "The target 'q_pro' names no layer of this model. remedy Did you mean 'q_proj'?" in text


def test_an_unknown_model(here, said):
    text = said("train", "rows.jsonl", "--base", "smollm2-135")
    assert "There is no model 'smollm2-135'. why Did you mean 'smollm2-135m'?" in text


def test_a_model_of_another_family(here, said):
    shutil.copytree(here / "base", here / "other")
    config = json.loads((here / "other" / "config.json").read_text())
    (here / "other" / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
    text = said("train", "rows.jsonl", "--base", "other")
    assert (
        "model_type 'rwkv' is not supported. where other remedy Supported: llama (Llama 2 and 3, SmolLM2), mistral"
        in text
    )


def test_a_model_that_is_a_pickle(here, said):
    shutil.copytree(here / "base", here / "other")
    (here / "other" / "model.safetensors").rename(here / "other" / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which may run code: convert it first." in said(
        "train", "rows.jsonl", "--base=other"
    )


def test_a_run_of_this_name_is_there(here, said, capsys):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    capsys.readouterr()
    text = said(*TRAIN, "--name", "mine")
    assert "There is a run 'mine' already. where runs/mine" in text
    assert "deltaw train --resume mine" in text
    text = said("generate", "say 1", "--run", "mien")
    assert "There is no run 'mien'. where runs remedy Did you mean 'mine'?" in text


def test_no_run_yet(here, said):
    for command in (["chat"], ["generate", "say 1"], ["merge"], ["train", "--resume"]):
        assert "There is no run yet. where runs remedy Train one: deltaw train FILE" in said(*command)


def test_a_run_without_a_result(here, said, capsys):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    (here / "runs" / "mine" / "adapter" / "adapter.safetensors").unlink()
    capsys.readouterr()
    text = said("generate", "say 1", "--run", "mine")
    assert "There is no adapter here. where runs/mine/adapter/adapter.safetensors" in text
    assert "deltaw train --resume goes on with it" in text


def test_an_adapter_of_another_base(here, said, capsys):
    assert run([*TRAIN, "--steps", "1", "--name", "mine"]) == 0
    (here / "base").unlink()
    (here / "base").mkdir()
    write_tiny(here / "base", seed=1)
    capsys.readouterr()
    text = said("generate", "say 1", "--run", "mine")
    assert "This adapter was made for another base model. where runs/mine/adapter/adapter.safetensors" in text
    assert re.search(r"why It was trained on '.+' \(\w{8}\); this base is \w{8}, another one or damaged since\.", text)
    assert "remedy Take --base " in text


def test_files_that_are_no_adapters(here, said):
    save_file({"x": torch.zeros(3)}, here / "a.safetensors")
    assert "This safetensors file is no deltaw adapter. where a.safetensors" in said("inspect", "a.safetensors")
    (here / "b.safetensors").write_bytes(b"nothing")
    assert "The adapter file is damaged. where b.safetensors" in said("inspect", "b.safetensors")


def test_memory_that_does_not_suffice_has_the_exit_code_3(here, said, monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda device: 400_000)
    assert "remedy Cut rows with --max-tokens" in said(*TRAIN, "--gradient-checkpointing", "off", code=3)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1000)
    assert "take a lower --rank, or fewer --targets, or --optimizer paged_adamw." in said(
        *TRAIN, "--name=mine", code=3)  # fmt: skip
    assert "or fewer --targets." in said(*TRAIN, "--name=third", "--optimizer=paged_adamw", code=3)
    assert list((here / "runs").iterdir()) == []


def test_memory_that_runs_out_on_the_way_has_the_exit_code_3_and_leaves_the_name_free(here, said, monkeypatch):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(plan, "measure", raising(error))
            text = said(*TRAIN, "--name", "mine", code=3)
        assert "The memory of cpu was full. where runs/mine" in text
        assert "lower --micro-tokens, or take --gradient-checkpointing on" in text
        assert not (here / "runs" / "mine").exists()
    monkeypatch.setattr(plan, "measure", raising(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run([*TRAIN, "--name", "mine"])


def raising(error):
    def measure(*_):
        raise error

    return measure


def test_what_the_system_refuses_is_told_in_a_panel(here, said, monkeypatch):
    for error, code in ((PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2),
                        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 3)):  # fmt: skip
        monkeypatch.setattr(plan, "measure", raising(error))
        assert f"{error.strerror}. where runs/x" in said(*TRAIN, code=code)


def test_a_run_that_diverges_has_the_exit_code_4(here, capsys, monkeypatch):
    real = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *arguments: real(*arguments) * float("nan"))
    assert run(list(TRAIN)) == 4
    out, err = capsys.readouterr()
    assert "The loss of step 1 is not finite" in out
    assert "The loss was not finite twice." in err
    assert "Traceback" not in out + err


def test_a_traceback_is_shown_to_whoever_asks_for_it(here, capsys):
    assert run(["train", "nothing.jsonl", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "The data file cannot be read." in err


def test_a_process_leaves_with_the_exit_code_and_a_clean_output(here):
    command = [sys.executable, "-m", "deltaw.cli", "train", "nothing.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_instruction_set_is_told_before_a_run_has_a_folder(here, said, choose):
    choose("avx1024")
    assert "DELTAW_ISA=avx1024 is not to be had" in said("train", "rows.jsonl", "--base", "base", "--name", "one")
    assert not (here / "runs" / "one").exists()
