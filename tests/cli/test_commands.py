"""Every command on the tiny model, as plain text and as JSON; and how quickly help comes."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors import safe_open
from small import ROOT, TRAIN, stopping_at, write_rows

from deltaw.api import persona
from deltaw.cli.app import COMMANDS, run
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.scoring.text import MEANINGS, METRICS


@pytest.fixture
def shown(capsys):
    """A function that runs a command which must succeed, and gives what it writes to its standard output."""

    def shown(*arguments):
        capsys.readouterr()
        assert run([str(a) for a in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return shown


@pytest.fixture
def trained(here, shown):
    """`here` with a run called `mine` that answers three letters."""
    shown(*TRAIN, "--name=mine", "--method=full", "--learning-rate=0.01", "--steps=40")
    return here


@pytest.mark.parametrize("how", [["merged"], ["--base", "merged"]])
def test_a_merged_model_can_be_talked_to_as_a_persona_can(trained, shown, monkeypatch, how):
    shown("merge", "mine", "--out", "merged")
    said = []
    for arguments in (["mine"], how):
        monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n/personas\n"))
        said.append(shown("chat", *arguments, "--temperature", "0", "--dtype", "float32").splitlines())
    assert said[0][0] == said[1][0] != ""
    assert (said[0][1:], said[1][1:]) == (["  base", "* mine"], ["* base"])


def test_train_tells_its_course_line_by_line(here, shown):
    lines = shown(*TRAIN, "--steps", "2", "--name", "mine").splitlines()
    assert lines[0].startswith("runs/mine: base base; method lora, ")
    assert "- No validation rows: 12 rows are too few to hold some out." in lines
    assert any(line.startswith("Plan: 2 steps, about ") for line in lines)
    assert any(line.startswith("step 1/2  loss ") for line in lines)
    assert any(line.startswith("step 2/2  loss ") for line in lines)
    assert any(line.startswith("Done: steps 2, train loss ") for line in lines)
    assert lines[-1] == "Talk to it: deltaw chat mine"


def test_train_tells_its_course_in_json(here, shown):
    records = [json.loads(line) for line in shown(*TRAIN, "--steps", "2", "--name", "mine", "--json").splitlines()]
    assert [r["event"] for r in records] == [
        "started", "planned", "sampled", "saved", "stepped", "stepped", "saved", "sampled", "finished"]  # fmt: skip
    written = [json.loads(line) for line in (here / "runs" / "mine" / "events.jsonl").read_text().splitlines()]
    assert records == written
    assert records[0]["rows"] == 12
    assert all(math.isfinite(r["loss"]) for r in records if r["event"] == "stepped")


def test_train_goes_on_with_an_interrupted_run(here, shown, said, monkeypatch):
    from deltaw.cli import train

    def show(made, as_json):
        made.job.stop = stopping_at(2)
        return train_show(made, as_json)

    train_show = train._show
    with monkeypatch.context() as patch:
        patch.setattr(train, "_show", show)
        assert run([*TRAIN, "--steps", "4", "--name", "mine", "--batch-rows", "4"]) == 130
    assert [p.name for p in (here / "runs" / "mine" / "checkpoints").iterdir()] != []
    for flag in ("--rank=16", "--dropout=0", "--no-rslora", "--steps=4"):  # at their defaults, too
        assert "goes on with the settings it was begun with" in said("train", "mine", "--resume", flag)
    records = [json.loads(line) for line in shown("train", "mine", "--resume", "--json").splitlines()]
    assert records[0]["resumed_at"] == 1
    assert [r["step"] for r in records if r["event"] == "stepped"] == [2, 3, 4]


def test_generate_answers_questions_and_each_line_of_the_input(trained, shown, monkeypatch):
    assert shown("generate", "say 1") == "bbb\n"
    assert shown("generate", "say 1", "say 1", "--run", "mine") == "bbb\nbbb\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 1\n\nsay 1\n"))
    assert shown("generate") == "bbb\nbbb\n"
    assert shown("generate", "say 1", "--max-new-tokens", "2") == "bb\n"
    assert shown("generate", "say 1", "--base", "base", "--max-new-tokens", "4") != "bbb\n"


@pytest.mark.parametrize("penalty", ["--presence-penalty", "--frequency-penalty"])
def test_generate_lets_an_answer_repeat_itself_less_or_more(trained, shown, penalty):
    asked = ("generate", "say 1", "--base", "base", "--max-new-tokens", "40", penalty)
    assert shown(*asked, "2") != shown(*asked, "-2")


def test_generate_answers_in_json(trained, shown):
    said = shown("generate", "say 1", "--json")
    assert json.loads(said) == {"persona": "mine", "question": "say 1", "answer": "bbb", "whole": True}


def test_generate_without_a_question_is_a_mistake(trained, said, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "There is no question." in said("generate")


@pytest.mark.parametrize("command", [["generate", "say 1", "--run", "mine"], ["eval", "mine", "held.jsonl"],
                                     ["merge", "mine", "--dtype=float32"], ["chat", "mine"]])  # fmt: skip
def test_a_base_that_was_moved_is_missed_and_can_be_given(trained, shown, said, monkeypatch, command):
    write_rows(trained / "held.jsonl", {"prompt": "say 1", "completion": "bbb"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 1\n"))
    header = adapters.read_header(trained / "runs" / "mine" / "adapter" / "adapter.safetensors")
    assert header.base == str(trained / "base")
    moved = replace(header, base="/nowhere/base")
    monkeypatch.setattr(adapters, "read_header", lambda path: moved)
    text = said(*command)
    assert "The base model is not where this adapter was trained on it. where /nowhere/base" in text
    assert "--base PATH" in text
    assert "bbb" in shown(*command, "--base", "base") or command[0] in ("eval", "merge")


def test_an_answer_that_is_cut_is_said_to_be(trained, shown, capsys):
    assert run(["generate", "say 1", "--max-new-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "bb\n"
    assert err == "mine answers.\n1 of 1 answer cut after 2 tokens (--max-new-tokens).\n"
    assert json.loads(shown("generate", "say 1", "--max-new-tokens", "2", "--json"))["whole"] is False
    assert run(["generate", "say 1", "--run", "mine"]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_in_another_folder_is_named_with_it(here, shown):
    last = shown(*TRAIN, "--steps=1", "--name=mine", "--runs=my runs").splitlines()[-1]
    assert last == "Talk to it: deltaw chat mine --runs 'my runs'"


def test_chat_answers_lines_and_obeys_commands(trained, shown, monkeypatch):
    lines = ["say 1", "/personas", "/retry", "/persona nobody", "/nonsense", "/compare", "/save talk.jsonl",
             "/system Be short.", "/save talk.jsonl", "/base", "/persona mine", "/compare say 1", "/reset", "/retry",
             "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    out = shown("chat", "mine", "--max-new-tokens", "8", "--temperature", "0").splitlines()
    head, tail = out[:5], out[-5:]
    assert head == ["bbb", "  base", "* mine", "bbb", "There is no persona 'nobody' here. There are: base, mine."]
    assert out[5] == "There is no command /nonsense. /help lists what there is."
    at = out.index("What shall they answer? /compare QUESTION")
    saved, anew = "talk.jsonl has 1 row now.", "The conversation begins anew."
    there = ["There is no answer to save yet.", "base answers now.", "mine answers now."]
    assert out[at + 1 : at + 6] == [saved, anew, *there]
    assert any(line.startswith("base\tmine") for line in tail)
    assert tail[-2:] == ["The conversation begins anew.", "There is no answer to try again."]
    (row,) = [json.loads(line) for line in (trained / "talk.jsonl").read_text().splitlines()]
    assert row["messages"] == [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "bbb"}]


def test_eval_scores_a_persona_beside_its_base(trained, shown):
    write_rows(trained / "held.jsonl", *[{"prompt": "say 1", "completion": "bbb"}] * 3)
    plain = shown("eval", "mine", "held.jsonl", "--compare", "2", "--max-new-tokens", "5").splitlines()
    assert plain[0] == "question\tbase\tmine"
    assert [line.split("\t")[::2] for line in plain[1:3]] == [["say 1", "bbb"]] * 2
    assert plain[3] == "score on 3 rows\tbase\tmine"
    scores = {line.split("\t")[0]: line.split("\t")[1:] for line in plain[4:]}
    assert float(scores["perplexity"][1]) < float(scores["perplexity"][0])
    assert scores["exact_match"][1] == "1"


def test_eval_writes_json(trained, shown):
    write_rows(trained / "held.jsonl", *[{"prompt": "say 1", "completion": "bbb"}] * 3)
    said = json.loads(shown("eval", "mine", "held.jsonl", "--json", "--metrics", "exact_match", "--limit", "2"))
    assert (said["rows"], said["scores"]) == (2, {"mine": {"exact_match": 1.0}})
    said = json.loads(shown("eval", "base", "held.jsonl", "--json", "--metrics", "perplexity"))
    assert list(said["scores"]) == ["base"]
    assert said["scores"]["base"]["perplexity"] > 1


def test_merge_writes_a_model_that_is_inspected_and_answers_alike(trained, shown):
    lines = dict(line.split(": ", 1) for line in shown("merge", "mine", "--dtype", "float32").splitlines())
    assert lines["written"].startswith("runs/mine/merged (")
    assert float(lines["max |Δlogit|"]) < 1e-3
    assert lines["same first choice"] == "100.00%"
    said = json.loads(shown("merge", "mine", "--out", "plain", "--dtype", "float32", "--json"))
    assert said["folder"] == "plain"
    assert said["difference"]["top1_agreement"] == 1
    assert shown("generate", "say 1", "--base", "plain") == "bbb\n"


@pytest.mark.parametrize("name", ["base", "mine", "runs/mine", "runs/mine/adapter/adapter.safetensors"])
def test_inspect_says_what_a_thing_is(trained, shown, name):
    plain = dict(line.split(": ", 1) for line in shown("inspect", name).splitlines())
    said = json.loads(shown("inspect", name, "--json"))
    assert said.keys() == plain.keys()
    if name == "base":
        assert (said["path"], said["vocabulary"], said["context"]) == ("base", "260, tied to the output", "512 tokens")
        assert said["layers"] == "2, width 32, 4 heads, 2 for keys and values"
        return
    assert (said["method"], said["  targets"]) == ("full", "all")
    with safe_open(trained / "runs" / "mine" / "adapter" / "adapter.safetensors", "pt") as file:
        numbers = sum(file.get_tensor(n).numel() for n in file.keys())  # noqa: SIM118 (no mapping)
    assert said["numbers"] == f"{numbers / 1000:.1f} k"


def test_inspect_finds_a_damaged_model_that_was_written_here(trained, shown, said):
    shown("merge", "mine", "--out", "plain", "--dtype", "float32", "--json")
    assert "fingerprint" in shown("inspect", "plain")
    file = trained / "plain" / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 64  # of the exponent of the last number
    file.write_bytes(body)
    assert "The weights of this model are damaged" in said("inspect", "plain")


def test_doctor_says_what_the_machine_can_do(shown, monkeypatch):
    from deltaw.advise import machine

    whole = machine.Machine
    monkeypatch.setattr(machine, "Machine", lambda: whole(0.01))
    lines = dict(line.split(": ", 1) for line in shown("doctor").splitlines())
    assert {"system", "cores", "instructions", "memory", "disk", "matrix products", "GPU", "trains in"} <= lines.keys()
    said = json.loads(shown("doctor", "--json"))
    assert said["ram_bytes"] > said["available_bytes"] > 0
    assert min(said["fp32_gflops"], said["bf16_gflops"], said["disk_free_bytes"], said["cores"]) > 0


def test_help_names_every_command(shown):
    text = shown("--help")
    for name, sentence in COMMANDS.items():
        assert name in text
        assert sentence in text
    for name in COMMANDS:
        assert f"deltaw {name}" in shown(name, "--help")


def test_help_loads_nothing_that_takes_long():
    script = "import sys; from deltaw.cli.app import run; run(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1]
    assert "'deltaw.cli.app'" in loaded
    assert all(f"'{slow}'" not in loaded for slow in ("torch", "numpy", "scipy", "transformers", "gguf", "tensorboard"))
    assert "'transformers'" not in loaded


@pytest.mark.parametrize(("flag", "complaint"), [("--device=tpu", "There is no device 'tpu' here."),
                                                 ("--threads=100000", "100000 threads are too many"),
                                                 ("--dtype=bfloat16", "computes in bfloat16")])  # fmt: skip
@pytest.mark.parametrize("command", [["generate", "say 1"], ["chat"], ["eval", "mine", "rows.jsonl"], ["merge"]])
def test_every_command_computes_where_and_how_it_is_told(trained, said, capsys, monkeypatch, command, flag, complaint):
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def refuse(wanted, device):
        raise UserError(f"It computes in {wanted}.")

    monkeypatch.setattr(persona, "choose_dtype", refuse)
    assert complaint in said(*command, flag)


def test_a_terminal_is_told_what_each_score_is(trained, shown, monkeypatch):
    assert MEANINGS.keys() == {*METRICS, "perplexity"}
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    assert MEANINGS["exact_match"] in shown("eval", "mine", "rows.jsonl", "--metrics", "exact_match", "--limit", "2")


def test_a_lora_goes_to_peft_and_comes_back(here, shown, said):
    shown(*TRAIN, "--name=mine", "--learning-rate=0.05", "--steps=40")
    answer = shown("generate", "say 1")
    lines = dict(line.split(": ", 1) for line in shown("export", "mine", "--to=peft").splitlines())
    assert lines["written"].startswith("runs/mine/peft (")
    assert float(lines["max |Δlogit|"]) < 1e-5
    assert "talk to it: deltaw chat back" in shown("import", "runs/mine/peft", "--base=base", "--name=back")
    assert shown("generate", "say 1") == answer  # the newest persona is the imported one
    assert json.loads(shown("inspect", "back", "--json"))["method"] == "lora"
    assert "There is a run 'peft' already" not in said("export", "mine", "--to=peft")  # but a folder
    assert "It is there already" in said("export", "mine", "--to=peft")
    assert "adapter_config.json is missing" in said("import", "runs/mine", "--base=base", "--name=odd")
    told = json.loads(shown("export", "back", "--to=gguf-lora", "--out=back.gguf", "--json"))
    assert (told["path"], told["difference"]) == ("back.gguf", None)
    assert "This GGUF file is a LoRA, and no model" in said("inspect", "back.gguf")
    assert "was not trained here" in said("train", "--resume", "back")
    assert "This is no run. where runs/mine/peft remedy" in said("chat", "runs/mine/peft")
    assert "chat back --runs elsewhere" in shown("import", "runs/mine/peft", "--base=base", "--name=back",
                                                 "--runs=elsewhere")  # fmt: skip
    (here / "rows.jsonl").rename(here / "other.jsonl")
    assert "tokens of one sentence, as the run's own rows are not here" in shown("merge", "mine", "--out=one")
    assert "one sentence" not in shown("merge", "mine", "--out=two", "--check=other.jsonl")
