"""Fine-tuning in one call: rows in, a persona and a run folder out; everything it was told can be told again."""

import errno
import json
import math
import re
import shutil
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from small import ROW, told, write_rows

import deltaw
from deltaw.api import finetune as api, prepare as preparing
from deltaw.api.persona import load_base
from deltaw.api.prepare import load
from deltaw.cli.app import run as command
from deltaw.data.batch import steps
from deltaw.data.encode import encode
from deltaw.data.files import read
from deltaw.data.store import Rows
from deltaw.errors import Interrupted, UserError, WillNotFit
from deltaw.files.runs import Run
from deltaw.settings import Training
from deltaw.train import checkpoint
from deltaw.train.events import Evaluated, Sampled, Started, Stepped

QUICK = {"method": "full", "learning_rate": 0.01, "evaluations": 2}


def started(tiny_path, folder, *data, **settings):
    """What a run on these files would begin with."""
    return api.prepare([str(d) for d in data], told(tiny_path, folder, **settings))


def test_a_persona_comes_back_that_answers_as_it_was_taught(tiny_path, tmp_path, rows_file):
    heard = []
    persona = deltaw.finetune(rows_file, listen=[heard.append], **told(tiny_path, tmp_path, **QUICK, epochs=12))
    assert [persona.ask(f"say {i}") for i in range(6)] == [c * 3 for c in "abcdef"]
    assert isinstance(heard[0], Started)
    assert sum(isinstance(e, Stepped) for e in heard) == heard[-1].step
    again = deltaw.load("run", runs=tmp_path / "runs", dtype="float32")
    assert again.ask_all(["say 2", "say 5"]) == ["ccc", "fff"]


def test_an_unknown_keyword_is_refused_with_the_nearest_name(rows_file):
    with pytest.raises(UserError, match="Unknown setting 'lerning_rate'") as e:
        deltaw.finetune(rows_file, lerning_rate=0.1)
    assert e.value.remedy == "Did you mean 'learning_rate'?"
    with pytest.raises(UserError, match=r"rank = 0"):
        deltaw.finetune(rows_file, rank=0)


def test_a_run_that_is_stopped_says_how_to_go_on(tiny_path, tmp_path, rows_file, monkeypatch):
    def prepare(data, values, _stop):
        made = real(data, values)
        made.job.stop = lambda: True
        return made

    real = api.prepare
    monkeypatch.setattr(api, "prepare", prepare)
    with pytest.raises(Interrupted) as e:
        deltaw.finetune(rows_file, listen=[], **told(tiny_path, tmp_path))
    assert (e.value.code, e.value.remedy) == (130, f"deltaw train --resume run --runs {tmp_path}/runs")


def test_without_a_listener_the_run_is_shown(tiny_path, tmp_path, capsys):
    write_rows(tmp_path / "few.jsonl", *[ROW] * 5)
    persona = deltaw.finetune(tmp_path / "few.jsonl", **told(tiny_path, tmp_path, steps=1))
    out = capsys.readouterr().out
    assert "- No validation rows: 5 rows are too few to hold some out." in out
    assert re.search(r"^step 1/1  loss \d", out, re.M)
    assert len(repr(persona)) < 400  # and not all its layers
    deltaw.finetune(tmp_path / "few.jsonl", listen=[], **told(tiny_path, tmp_path / "quiet", steps=1))
    assert capsys.readouterr().out == ""


def test_an_adapter_that_could_not_be_written_is_no_persona(tiny_path, tmp_path, rows_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.adapters, "save", full)
    with pytest.raises(WillNotFit, match="The disk is full: the adapter could not be written") as e:
        deltaw.finetune(rows_file, listen=[], **told(tiny_path, tmp_path, steps=1))
    assert "deltaw train --resume run" in e.value.remedy


def test_ctrl_c_in_a_program_of_the_users_saves_and_is_told(tiny_path, tmp_path, rows_file):
    def press(event):
        if isinstance(event, Stepped) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        deltaw.finetune(rows_file, listen=[press], **told(tiny_path, tmp_path, steps=6))
    assert next(api.resume("run", tmp_path / "runs").events()).resumed_at == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_in_any_thread(tiny_path, tmp_path, rows_file):
    with ThreadPoolExecutor() as pool:
        made = pool.submit(deltaw.finetune, rows_file, listen=[], **told(tiny_path, tmp_path, steps=1))
    assert made.result().name == "run"


def test_a_files_weight_says_how_often_its_rows_are_seen(tiny_path, tmp_path):
    for name, count in (("a", 6), ("b", 4), ("c", 8)):
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", *rows)
    files = [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl", f"{tmp_path}/c.jsonl:0.5"]
    made = started(tiny_path, tmp_path, *files, batch_rows=1, epochs=2, val="0")
    assert made.job.weights == ((6, 3.0), (4, 1.0), (8, 0.5))
    assert made.job.steps == 2 * (6 * 3 + 4 + 4)
    order = steps(made.job.weights, 1, 0)
    seen = [next(order)[1][0] for _ in range(made.job.steps)]
    assert [seen.count(i) for i in range(18)] == [6] * 6 + [2] * 4 + [1] * 8


def test_validation_rows_are_a_share_held_out(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file, val="0.25")
    assert (len(made.job.rows), made.started.val_rows) == (36, 12)
    again = started(tiny_path, tmp_path / "again", rows_file, val="0.25")
    other = started(tiny_path, tmp_path / "other", rows_file, val="0.25", seed=1)
    held = [load([str(rows_file)], m.job.settings).parts[0].held for m in (made, again, other)]
    assert held[0] == held[1] != held[2]
    whole = read(rows_file)
    assert [e.where for e in load([str(rows_file)], made.job.settings).val] == [whole[i].where for i in sorted(held[0])]
    learnt = [encode(e, made.base.tokenizer).ids for i, e in enumerate(whole) if i not in held[0]]
    assert [row.ids for row in made.job.rows] == learnt


def test_by_default_a_twentieth_is_held_out_and_of_many_rows_no_more_than_a_thousand(
    tiny_path, tmp_path, rows_file, monkeypatch
):
    monkeypatch.setattr(preparing, "MOST_HELD", 3)
    settings = started(tiny_path, tmp_path, rows_file).job.settings
    assert len(load([str(rows_file)], settings).val) == 2
    write_rows(tmp_path / "many.jsonl", *[ROW] * 200)
    assert len(load([str(tmp_path / "many.jsonl")], settings).val) == 3
    assert len(load([str(tmp_path / "many.jsonl")], replace(settings, val="0.05")).val) == 10
    assert len(load([str(tmp_path / "many.jsonl")] * 3, settings).val) == 3  # of all files together


def test_ids_that_the_model_does_not_know_are_found_wherever_they_stand(tiny_path, tmp_path, rows_file):
    shutil.copytree(tiny_path, tmp_path / "base")
    told = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    told["added_tokens"].append({**told["added_tokens"][-1], "id": 260, "content": "<|extra|>"})
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(told))
    write_rows(tmp_path / "val.jsonl", {"prompt": "a <|extra|>", "completion": "x"})
    for more in ({"val": str(tmp_path / "val.jsonl")}, {"sample": "why <|extra|>?"}):
        with pytest.raises(UserError, match="does not belong to this model") as e:
            started(tmp_path / "base", tmp_path / "more", rows_file, **more)
        assert e.value.why == "It gives the id 260, and the model has 260 rows."


def test_a_file_that_changes_while_it_is_read_is_no_data(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file)
    loaded = load([str(rows_file)], made.job.settings)
    rows_file.write_text(rows_file.read_text() + json.dumps(ROW) + "\n")
    with pytest.raises(UserError, match="The data file changed while it was read") as e:
        preparing.encode(loaded, made.base, made.job.settings)
    assert e.value.why == "It had 48 rows, and now 49."


def test_data_is_encoded_in_constant_memory(tiny_path, tmp_path, monkeypatch):
    """Of 12 MB of tokens less than 4 are ever held, and none of the text."""
    file = tmp_path / "many.jsonl"
    with file.open("w") as f:
        for i in range(6000):
            f.write(json.dumps({"text": f"{i:06}" * 80}) + "\n")
    monkeypatch.setattr(preparing, "Rows", partial(Rows, in_memory=1 << 20))
    base = load_base(str(tiny_path), "float32", threads=1)
    settings = Training(train_on="all", runs=tmp_path / "runs")
    tracemalloc.start()
    encoded = preparing.encode(load([str(file)], settings), base, settings)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoded.rows.tokens == 5700 * 481
    assert most < 4 << 20


def test_validation_rows_are_a_file(tiny_path, tmp_path, rows_file):
    write_rows(tmp_path / "val.jsonl", *[{"prompt": "new", "completion": "x"}] * 3)
    made = started(tiny_path, tmp_path, rows_file, val=str(tmp_path / "val.jsonl"))
    assert (len(made.job.rows), made.started.val_rows, made.started.notices) == (48, 3, ())


def test_without_validation_rows_nothing_is_evaluated(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file, val="0", steps=2)
    kinds = {e.record()["event"] for e in made.events()}
    assert (made.started.val_rows, made.started.notices) == (0, ())
    assert "evaluated" not in kinds


def test_too_few_rows_to_split_are_all_learnt_and_it_is_said(tiny_path, tmp_path):
    write_rows(tmp_path / "few.jsonl", *[ROW] * 39)
    made = started(tiny_path, tmp_path, tmp_path / "few.jsonl", val="0.5")
    assert len(made.job.rows) == 39
    assert made.started.notices == ("No validation rows: 39 rows are too few to hold some out.",)


def test_validation_rows_that_are_trained_on_are_counted(tiny_path, tmp_path, rows_file):
    lines = rows_file.read_text().splitlines()
    new = json.dumps({"prompt": "new", "completion": "x"})
    write_rows(tmp_path / "val.jsonl", new, lines[0], lines[3])
    made = started(tiny_path, tmp_path, rows_file, val=str(tmp_path / "val.jsonl"))
    assert made.started.notices == (f"2 validation rows trained on too (the first: {tmp_path}/val.jsonl:2): "
                                    "the validation loss flatters.",)  # fmt: skip


@pytest.fixture
def ended(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file, **QUICK, steps=4, val="0.25", seed=3, sample="say 1")
    return made.job.run, list(made.events())


def test_a_run_folder_holds_everything(ended):
    run, events = ended
    assert {p.name for p in run.folder.iterdir()} == {
        ".lock", "config.yaml", "plan.json", "events.jsonl", "manifest.json", "tensorboard", "checkpoints", "adapter",
        "report.html", "MODEL_CARD.md"}  # fmt: skip
    assert [p.name for p in run.adapter.parent.iterdir()] == ["adapter.safetensors"]
    plan = json.loads(run.plan.read_text())
    assert (plan["steps"], plan["actual"]["reason"], plan["actual"]["step"]) == (4, "done", 4)
    assert plan["actual"]["predicted_seconds"] == plan["seconds"]
    manifest = json.loads(run.manifest.read_text())
    assert manifest.keys() == {"format", "base", "tokenizer", "template", "rendered", "data", "tokens", "settings"}
    assert [json.loads(line) for line in run.events.read_text().splitlines()] == [
        json.loads(json.dumps(e.record())) for e in events]  # fmt: skip
    assert "<svg" in (run.folder / "report.html").read_text()
    card = (run.folder / "MODEL_CARD.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["tags"], head["library_name"]) == (["deltaw", "full"], "deltaw")
    best = min((e for e in events if isinstance(e, Evaluated)), key=lambda e: e.loss)
    samples = [e.answer for e in events if isinstance(e, Sampled)]
    for said in (f"| loss of the held-out rows | {best.loss:.3f} (perplexity {math.exp(best.loss):.2f})",
                 manifest["base"], next(iter(manifest["data"].values())), "| steps | 4 (done) |", "| targets | all |",
                 "deltaw chat run", "> say 1", " ".join(samples[-1].split())[:20]):  # fmt: skip
        assert said in card, said
    assert len(list((run.folder / "tensorboard").iterdir())) == 1


def test_the_written_configuration_gives_the_same_run_again(ended, tmp_path, monkeypatch):
    run, _ = ended
    monkeypatch.chdir(tmp_path)
    assert command(["train", "--config", str(run.config)]) == 0
    (again,) = [Run(p) for p in run.folder.parent.iterdir() if p.name != run.name]
    assert again.adapter.read_bytes() == run.adapter.read_bytes()
    assert again.config.read_text() == run.config.read_text()


def test_the_written_configuration_says_what_was_chosen_for_the_machine(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file, dtype="auto", threads=None, learning_rate=None)
    config = made.job.run.read_config()
    assert (config["device"], config["dtype"]) == (str(made.base.model.device), made.started.dtype)
    assert (config["threads"], config["learning_rate"]) == (torch.get_num_threads(), made.job.learning_rate)


def test_few_long_rows_are_learnt_in_more_and_smaller_steps(tiny_path, tmp_path, rows_file):
    long = tmp_path / "long.jsonl"
    write_rows(long, *({"text": "ab" * 200} for _ in range(9)))
    short, few = (started(tiny_path, tmp_path / f"of-{file.stem}", file, train_on="all", val="0", epochs=2)
                  for file in (rows_file, long))  # fmt: skip
    assert (short.started.batch_rows, short.job.steps) == (8, 12)
    assert [len(row.ids) for row in few.job.rows] == [401] * 9
    assert (few.started.batch_rows, few.job.steps) == (5, 4)
    assert few.job.run.read_config()["batch_rows"] == 5
    told = started(tiny_path, tmp_path / "told", long, train_on="all", val="0", epochs=2, batch_rows=3)
    assert (told.started.batch_rows, told.job.steps) == (3, 6)


def test_without_a_name_runs_are_numbered(tiny_path, tmp_path, rows_file):
    names = [started(tiny_path, tmp_path, rows_file, name=None).job.run.name for _ in range(3)]
    assert names == ["rows-lora-1", "rows-lora-2", "rows-lora-3"]


def test_a_fault_in_the_data_leaves_no_run_folder(tiny_path, tmp_path, rows_file):
    with pytest.raises(UserError, match="names no layer"):
        started(tiny_path, tmp_path, rows_file, targets="nothing")
    with rows_file.open("a") as f:
        f.write("{\n")
    with pytest.raises(UserError, match="not JSON"):
        started(tiny_path, tmp_path, rows_file)
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_too_small_for_the_checkpoints_is_told_before_training(
    tiny_path, tmp_path, rows_file, monkeypatch
):
    monkeypatch.setattr(api, "free_disk", lambda path: 10_000)
    with pytest.raises(WillNotFit, match="Checkpoints need about") as e:
        started(tiny_path, tmp_path, rows_file)
    assert e.value.code == 3
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_default_rate_falls_with_the_models_width(tiny_path, tmp_path, rows_file, monkeypatch):
    made = started(tiny_path, tmp_path, rows_file, learning_rate=None)
    assert made.job.learning_rate == 1e-3  # width 32 is below 576
    monkeypatch.setattr(api, "RATE_WIDTH", 8)
    made = started(tiny_path, tmp_path / "wide", rows_file, learning_rate=None)
    assert made.job.learning_rate == pytest.approx(1e-3 * 8 / 32)


def test_the_global_threads_are_as_asked(tiny_path, tmp_path, rows_file):
    made = started(tiny_path, tmp_path, rows_file, threads=1)
    assert made.started.threads == torch.get_num_threads() == 1
