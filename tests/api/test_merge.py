"""Merging writes a plain model that says the same as the base wearing its adapter, and leaves the base alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_tiny
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from oracles import our_logits, scramble
from parity.test_gguf_families import merging_tokenizer
from small import told, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.adapters.adapter import Adapter
from deltaw.api.exchange import requantised
from deltaw.api.merge import FALLBACK, merge
from deltaw.api.persona import Persona, load_base
from deltaw.cli.app import run
from deltaw.data.files import read
from deltaw.errors import UserError
from deltaw.methods import method, names
from deltaw.methods.lora import LowRank
from deltaw.models import checkpoint
from deltaw.models.gguf_write import write
from deltaw.models.slots import CannotMerge, Slot


@pytest.fixture
def base(tiny_path):
    return load_base(str(tiny_path), "float32", threads=1)


@pytest.fixture
def persona(base):
    return worn(base, "lora")


def worn(base, name):
    """A persona with an adapter that says something."""
    adapter = Adapter.build(method(name), base.model).eval()
    scramble(adapter)
    return Persona("odd", base, adapter)


NO_WEIGHT = {"prefix_tuning"}


@pytest.mark.parametrize("name", names())
def test_transformers_computes_the_merged_folder_as_we_the_adapter(base, tmp_path, ids, name):
    persona = worn(base, name)
    if name in NO_WEIGHT:
        with pytest.raises(UserError, match="cannot be merged"):
            merge(persona, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merged = merge(persona, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad(), persona.on():
        wanted = our_logits(base.model, ids)
        plain = hf(ids[None]).logits[0]
    torch.testing.assert_close(plain, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (our_logits(base.model, ids) - wanted).abs().max() > 0.01  # else nothing was merged
    assert merged.difference.max_logit_difference < 1e-4
    assert merged.difference.top1_agreement == 1
    assert abs(merged.difference.perplexity_change) < 1e-4


def test_the_base_in_memory_keeps_every_bit_and_every_tensor(base, persona, tmp_path):
    before = {name: (t, t.clone()) for name, t in base.model.named_buffers()}
    with persona.on():
        worn_by = [slot.delta for slot in base.model.modules() if isinstance(slot, Slot)]
        merge(persona, tmp_path / "merged")
        assert [slot.delta for slot in base.model.modules() if isinstance(slot, Slot)] == worn_by
    for name, t in base.model.named_buffers():
        assert t is before[name][0], name
        assert torch.equal(t, before[name][1]), name


def test_the_tokenizer_and_the_template_come_along(persona, tmp_path, tokenizer):
    merge(persona, tmp_path / "merged")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "say 1"}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.chat(turns, prompt=True)
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_the_report_says_what_was_compared(persona, tmp_path):
    write_rows(tmp_path / "check.jsonl", *[{"prompt": "say 1", "completion": "bbb"}] * 40)
    examples = read(tmp_path / "check.jsonl")
    merged = merge(persona, tmp_path / "merged", examples)
    assert merged.difference.tokens == 32 * (len("bbb") + 1)  # the first 32 answers, and the end of their turns
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["difference"] == vars(merged.difference)
    assert (report["persona"], report["folder"], report["dtype"]) == ("odd", "merged", "float32")
    assert report["size_bytes"] == (tmp_path / "merged" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("rows", [
    [{"prompt": "why " * 300, "completion": "b"}, {"prompt": "say 1", "completion": "bbb"}],
    [{"prompt": "why " * 300, "completion": "b"}] * 2,
    [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "say 1", "completion": "bbb"}],
], ids=["one", "all", "no answer"])  # fmt: skip
def test_answers_beyond_what_is_compared_are_passed_over(rows, persona, tmp_path):
    write_rows(tmp_path / "check.jsonl", *rows)
    merged = merge(persona, tmp_path / "merged", read(tmp_path / "check.jsonl"))
    answers = sum(len(row["completion"]) + 1 for row in rows if len(row.get("prompt", "x" * 99)) < 99)
    assert merged.difference.tokens == (answers or len(persona.base.tokenizer.encode(FALLBACK)) - 1)
    assert merged.difference.max_logit_difference < 1e-4


def test_the_merged_model_is_as_large_as_the_base_and_reads_as_many_bytes(base, persona, tmp_path):
    merge(persona, tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged")
    held = [sum(b.nbytes for b in model.buffers()) for model in (base.model, merged)]
    assert held[0] == held[1]
    assert all(slot.delta is None for slot in merged.modules() if isinstance(slot, Slot))
    assert answer(tmp_path / "merged") == persona.ask("say 1", max_new_tokens=8)


def answer(folder):
    """What the model in this folder answers without any adapter."""
    return Persona("merged", load_base(str(folder), "float32")).ask("say 1", max_new_tokens=8)


def test_bfloat16_is_rounded_once(tiny_path, tmp_path):
    base = load_base(str(tiny_path), "bfloat16")
    persona = worn(base, "lora")
    merged = merge(persona, tmp_path / "merged")
    assert merged.dtype == "bfloat16"
    exact = worn(load_base(str(tiny_path), "float32"), "lora")
    written = checkpoint.load(tmp_path / "merged", torch.bfloat16)
    for name, delta in exact.adapter.named_deltas():
        w_OI = base.model.get_submodule(name).weight.dense().float()
        want = torch.addmm(w_OI, delta.B, delta.A, alpha=delta.scale).bfloat16()
        assert torch.equal(written.get_submodule(name).weight.dense(), want), name


def test_a_folder_that_is_not_empty_is_left_alone(persona, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="there already, and not empty") as e:
        merge(persona, tmp_path / "mine")
    assert e.value.where == str(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(persona, tmp_path):
    (tmp_path / "mine").mkdir()
    assert merge(persona, tmp_path / "mine").folder == tmp_path / "mine"


def test_a_base_alone_is_not_merged(base, tmp_path):
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(Persona("base", base), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_method_that_cannot_be_merged_leaves_nothing_behind(base, persona, tmp_path, monkeypatch):
    def refuse(self, slot):
        raise CannotMerge("it is no matrix")

    monkeypatch.setattr(LowRank, "merged", refuse)
    before = {name: t.clone() for name, t in base.model.named_buffers()}
    with pytest.raises(UserError, match=r"cannot be merged into plain weights.*it is no matrix"):
        merge(persona, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert all(torch.equal(t, before[name]) for name, t in base.model.named_buffers())


def test_told_settings_train_what_is_then_merged(tiny_path, tmp_path, rows_file):
    persona = deltaw.finetune(rows_file, listen=[], **told(tiny_path, tmp_path, method="full", epochs=12))
    merge(persona, tmp_path / "merged")
    assert answer(tmp_path / "merged") == "bbb"


@pytest.fixture
def original(tiny_path, tmp_path):
    """The base, with a tokenizer that a GGUF file can hold."""
    shutil.copytree(tiny_path, tmp_path / "original")
    merging_tokenizer().save(str(tmp_path / "original" / "tokenizer.json"))
    return load_base(str(tmp_path / "original"), "float32", threads=1)


@pytest.fixture
def quantised(original, tmp_path):
    """A persona on a copy of the base that was packed with four bits."""
    write(original.model, original.tokenizer, tmp_path / "base.gguf", "Q4_1", "base")
    return worn(load_base(str(tmp_path / "base.gguf"), "float32", threads=1), "lora")


def test_into_another_base_the_adapter_is_added_to_its_weights(quantised, original, tmp_path):
    merged = merge(quantised, tmp_path / "merged", into=original)
    written = checkpoint.load(tmp_path / "merged")
    for name, delta in quantised.adapter.named_deltas():
        want = original.model.get_submodule(name).weight.dense() + delta.scale * delta.B @ delta.A
        torch.testing.assert_close(written.get_submodule(name).weight.dense(), want, rtol=0, atol=1e-6)
    assert torch.equal(written.norm.gain, original.model.norm.gain)
    assert 1e-3 < merged.difference.max_logit_difference < 10  # what the four bits had taken
    exact = merge(quantised, tmp_path / "exact").difference.max_logit_difference
    assert exact < 1e-4
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert (report["base"], report["trained_on"]) == (original.name, quantised.base.name)


@pytest.mark.parametrize(
    ("change", "said"), [({"intermediate_size": 96}, "hidden is 96, not 64"), ({}, "another vocabulary")]
)
def test_into_a_base_that_does_not_fit_nothing_is_merged(change, said, persona, tmp_path):
    write_tiny(tmp_path / "other", change)
    if not change:
        told = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        told["model"]["vocab"] = {token: 255 - i for token, i in told["model"]["vocab"].items()}
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError) as e:
        merge(persona, tmp_path / "merged", into=load_base(str(tmp_path / "other"), "float32"))
    assert said in str(e.value)
    assert not (tmp_path / "merged").exists()


def test_into_the_quantised_base_matrices_are_rounded_again(quantised, tmp_path):
    merged = requantised(quantised, tmp_path / "merged.gguf")
    assert merged.dtype == "Q4_1"
    written, kind = checkpoint.load(tmp_path / "merged.gguf"), GGMLQuantizationType.Q4_1
    for name, delta in quantised.adapter.named_deltas():
        sum_OI = (quantised.base.model.get_submodule(name).weight.dense() + delta.scale * delta.B @ delta.A).detach()
        again = torch.from_numpy(dequantize(quantize(sum_OI.numpy(), kind), kind))
        # A sum that rounds to the neighbour in the last bit may fall into the next of sixteen steps.
        differs = (written.get_submodule(name).weight.dense() - again).abs() > 1e-5
        assert differs.float().mean() < 0.01, name
    assert merged.difference.max_logit_difference > 1e-3


def test_a_base_of_plain_numbers_cannot_be_quantised_again(persona, tmp_path):
    with pytest.raises(UserError, match="plain numbers: they cannot be quantised again"):
        requantised(persona, tmp_path / "merged.gguf")


def test_the_command_merges_into_what_it_is_told(here, original, capsys):
    write(original.model, original.tokenizer, here / "packed.gguf", "Q4_1", "base")
    assert (
        run(["train", "rows.jsonl", "--base", "packed.gguf", "--name", "mine", "--steps", "1", "--threads", "1"]) == 0
    )
    capsys.readouterr()
    assert run(["merge", "mine", "--into", "quantised", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "written: runs/mine/merged.gguf" in out
    assert "into: Q4_1 again" in out
    assert run(["merge", "mine", "--into", "base", "--out", "plain", "--dtype", "float32"]) == 0
    assert "into:" not in capsys.readouterr().out
    assert run(["merge", "mine", "--into", "original", "--out", "other", "--dtype", "float32"]) == 0
    assert "on which it was not trained" in capsys.readouterr().out
    plain, other = (checkpoint.load(here / name).layers[0].mlp.down_proj.weight.dense() for name in ("plain", "other"))
    assert not torch.equal(plain, other)


def test_a_mistral_that_became_a_llama_in_gguf_is_the_same_shape(tiny_path, tmp_path):
    """llama.cpp writes Mistral as llama, and fills the vocabulary up with names of its own."""
    write_tiny(tmp_path / "mistral", {"model_type": "mistral", "sliding_window": None})
    other = load_base(str(tmp_path / "mistral"), "float32")
    merged = merge(worn(load_base(str(tiny_path), "float32"), "lora"), tmp_path / "merged", into=other)
    assert json.loads((merged.folder / "config.json").read_text())["model_type"] == "mistral"


def test_layers_trained_whole_are_not_put_into_another_base(base, original, tmp_path):
    with pytest.raises(UserError, match="would take the place of the other base's"):
        merge(worn(base, "full"), tmp_path / "merged", into=original)


@pytest.mark.parametrize("named", ["empty", "link", "."])
def test_a_folder_that_is_there_and_empty_is_filled(named, persona, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    where = Path() if named == "." else tmp_path / named
    inode = (tmp_path / "empty").stat().st_ino
    merge(persona, where)
    assert (tmp_path / "empty").stat().st_ino == inode
    assert checkpoint.load(tmp_path / "empty").config == persona.base.model.config
    assert [p.name for p in (tmp_path / "empty").iterdir() if p.name.startswith(".")] == []
