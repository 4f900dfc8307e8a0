"""Every setting is a flag, a YAML key and a keyword in Python, and means the same each time; help tells it."""

import ast
import inspect
import json
import re

import pytest
import yaml

from deltaw import methods, settings
from deltaw.adapters.adapter import Method
from deltaw.api import finetune
from deltaw.cli.app import run
from deltaw.errors import UserError
from deltaw.methods import lora
from deltaw.settings import Training, names

TRAINING = {
    "base": "base", "base_format": "nf4", "method": "full", "name": "mine", "val": 0.25, "train_on": "all",
    "max_tokens": 77, "epochs": 1.5,
    "steps": 9, "minutes": 2.5, "batch_rows": 3, "micro_tokens": 99, "learning_rate": 2e-4, "schedule": "linear",
    "warmup": 0.5, "optimizer": "paged_adamw", "weight_decay": 0.01, "clip": 0.0, "gradient_checkpointing": "on",
    "evaluations": 0, "patience": 0,
    "keep_best": False, "save_every": 5, "sample": "Who: are you? [x] no", "seed": 7, "dtype": "bfloat16",
    "device": "cpu", "threads": 1,
}  # fmt: skip
LORA = {"targets": "q,v", "rank": 4, "alpha": 8.5, "rslora": True, "dropout": 0.1, "init": "gaussian",
        "rank_pattern": {"layers.0.*": 2}, "alpha_pattern": {"mlp.up_proj": 3.5},
        "modules_to_save": "norm", "ensure_weight_tying": False, "loraplus_lr_ratio": 4.0}  # fmt: skip
CASES = [*TRAINING.items(), ("runs", "elsewhere"), *LORA.items()]


class Enough(Exception):
    """Raised once the settings are known."""


@pytest.fixture
def resolved(here, monkeypatch):
    """A function that gives the settings with which a run would begin, by flags, by file or by keywords."""
    known = []

    def prepare(data, values, *_):
        known.append((list(data), *finetune.resolve(values)))
        raise Enough

    monkeypatch.setattr(finetune, "prepare", prepare)

    def resolved(*arguments, **keywords):
        with pytest.raises(Enough):
            finetune.finetune(*arguments, **keywords) if keywords else run(["train", *arguments])
        return known.pop()

    return resolved


def flag(name, value):
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return f"--{name.replace('_', '-')}={text}"


def test_every_setting_is_tried_below():
    assert {*TRAINING, "runs"} == set(names(Training))
    assert set(LORA) == set(names(lora.LoRA))
    for name, value in {**TRAINING, **LORA}.items():
        assert value != getattr(Training(), name, getattr(lora.LoRA(), name, None)), f"{name} is tried with its default"


@pytest.mark.parametrize(("name", "value"), CASES, ids=[name for name, _ in CASES])
def test_a_setting_means_the_same_as_flag_key_and_keyword(resolved, here, name, value):
    by_keyword = resolved("rows.jsonl", **{name: value})
    said = getattr(by_keyword[1], name, getattr(by_keyword[2], name, None))
    assert said == value or str(said) == str(value)
    assert resolved("rows.jsonl", flag(name, value)) == by_keyword
    (here / "c.yaml").write_text(yaml.safe_dump({name: value, "data": "rows.jsonl"}))
    assert resolved("--config", "c.yaml") == by_keyword
    assert resolved("rows.jsonl", "--config=c.yaml") == by_keyword


def test_a_flag_comes_before_the_file(resolved, here):
    (here / "c.yaml").write_text("epochs: 7\nrank: 5\ndata: [other.jsonl, more.jsonl:2]\n")
    data, training, method = resolved("--config", "c.yaml", "--rank", "6")
    assert (data, training.epochs, method.rank) == (["other.jsonl", "more.jsonl:2"], 7, 6)
    assert resolved("rows.jsonl", "--config", "c.yaml", "--epochs", "2")[0] == ["rows.jsonl"]


def test_an_empty_value_in_the_file_is_the_default(resolved, here):
    (here / "c.yaml").write_text("learning_rate:\nsteps: null\ndata: rows.jsonl\n")
    assert resolved("--config", "c.yaml") == resolved("rows.jsonl")


def test_nothing_said_gives_the_defaults(resolved):
    assert resolved("rows.jsonl") == (["rows.jsonl"], Training(), lora.LoRA())


def test_paths_are_taken_as_keywords(resolved, here):
    _, training, _ = resolved(here / "rows.jsonl", base=here / "base", val=here / "val.jsonl", runs=here / "runs")
    assert (training.base, training.val) == (str(here / "base"), str(here / "val.jsonl"))


@pytest.mark.parametrize("where", ["flag", "key", "keyword"])
def test_a_setting_of_another_method_is_refused(here, where, said):
    if where == "flag":
        assert "--rank" in said("train", "rows.jsonl", "--method=full", "--rank=4")
    elif where == "key":
        (here / "c.yaml").write_text("method: full\nrank: 4\n")
        assert "Unknown setting 'rank'. where c.yaml:2" in said("train", "rows.jsonl", "--config=c.yaml")
    else:
        with pytest.raises(UserError, match=r"Unknown setting 'rank'"):
            finetune.finetune("rows.jsonl", method="full", rank=4)


def sentences(module, cls):
    """The sentence under each field, from the source."""
    (node,) = [n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef) and n.name == cls]
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            yield field.target.id, " ".join(after.value.value.split())


@pytest.mark.parametrize("name", methods.names())
def test_the_help_of_train_tells_each_settings_sentence(here, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "500")
    assert run(["train", "--method", name, "--help"]) == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split()).replace("`", "")
    told = dict(sentences(settings, "Training"))
    for cls in reversed(methods.find(name).__mro__):  # a subclass may say it otherwise
        if issubclass(cls, Method):
            told |= dict(sentences(inspect.getmodule(cls), cls.__name__))
    for field, sentence in told.items():
        assert f"--{field.replace('_', '-')}" in text
        assert sentence.replace("`", "") in text, field
