"""Merging writes a plain model that says the same as the base wearing its adapter, and leaves the base alone."""

import json

import pytest
import torch
from oracles import our_logits, scramble
from small import told, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.adapters.adapter import Adapter
from deltaw.api.merge import merge
from deltaw.api.persona import Persona, load_base
from deltaw.data.files import read
from deltaw.errors import UserError
from deltaw.methods import method, names
from deltaw.methods.lora import LowRank
from deltaw.models import checkpoint
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


@pytest.mark.parametrize("name", names())
def test_transformers_computes_the_merged_folder_as_we_the_adapter(base, tmp_path, ids, name):
    persona = worn(base, name)
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
    each = len(persona.prompt("say 1")) + len("bbb") + 1 + 1  # the end of the turn, and the template's line break
    assert merged.difference.tokens == 32 * (each - 1)  # the first 32 rows; the first token of each is not predicted
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["difference"] == vars(merged.difference)
    assert (report["persona"], report["folder"], report["dtype"]) == ("odd", "merged", "float32")
    assert report["size_bytes"] == (tmp_path / "merged" / "model.safetensors").stat().st_size


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
