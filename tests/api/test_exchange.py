"""Personas go to other tools and come back: what is written is read by them, and says the same."""

from dataclasses import replace

import llamacpp
import pytest
import torch
from conftest import write_tiny
from gguf import GGUFReader
from oracles import our_logits, scramble
from parity.test_families import LONG
from parity.test_gguf_families import BYTES, merging_tokenizer

import deltaw
from deltaw.adapters.adapter import Adapter
from deltaw.api import exchange
from deltaw.api.exchange import bring, export
from deltaw.api.persona import Persona, load_base
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.gguf_write import write


@pytest.fixture(params=[{}, {"model_type": "qwen2"}, {"model_type": "phi3", "pad_token_id": 0}], ids=str)
def persona(request, tmp_path):
    """A LoRA that says something, on a base with a tokenizer that llama.cpp takes."""
    write_tiny(tmp_path / "base", request.param)
    merging_tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    base = load_base(str(tmp_path / "base"), "float32", threads=1)
    return Persona("odd", base, scramble(Adapter.build(method("lora", rank=3, alpha=5.0), base.model).eval(), 0.1))


def worn_logits(persona, ids):
    with torch.no_grad(), persona.on():
        return our_logits(persona.base.model, ids)


def prompt_for(persona):
    """Ids after which an ASCII character is likeliest: llama.cpp holds back halves of others, and what it knew."""
    ends = {n: BYTES.get(int(worn_logits(persona, LONG[:n])[-1].argmax()), 255) for n in range(60, 5, -1)}
    return next(LONG[:n] for n, byte in ends.items() if byte < 128)


def test_llama_cpp_says_of_the_merged_file_what_the_persona_says(persona, tmp_path):
    done = export(persona, "gguf", tmp_path / "out.gguf", "F32")
    assert done.difference.max_logit_difference < 1e-4
    assert done.size_bytes == (tmp_path / "out.gguf").stat().st_size
    prompt = prompt_for(persona)
    _, first = llamacpp.asked(tmp_path / "out.gguf", prompt.tolist(), 1)
    logp_V = worn_logits(persona, prompt)[-1].log_softmax(-1)
    assert max(abs(p - logp_V[i].item()) for i, p in first.items()) < 5e-3


def test_llama_cpp_puts_the_adapter_alone_onto_the_base(persona, tmp_path):
    base = persona.base
    write(base.model, base.tokenizer, tmp_path / "base.gguf", "F32", "base")
    assert export(persona, "gguf-lora", tmp_path / "lora.gguf").difference is None
    prompt = prompt_for(persona)
    _, first = llamacpp.asked(tmp_path / "base.gguf", prompt.tolist(), 1, tmp_path / "lora.gguf")
    logp_V = worn_logits(persona, prompt)[-1].log_softmax(-1)
    assert max(abs(p - logp_V[i].item()) for i, p in first.items()) < 5e-3
    _, plain = llamacpp.asked(tmp_path / "base.gguf", prompt.tolist(), 1)
    assert max(abs(p - logp_V[i].item()) for i, p in plain.items()) > 0.05  # else the adapter did nothing


def test_a_folder_for_ollama_holds_the_merged_file_and_how_it_is_talked_to(persona, tmp_path):
    persona = replace(persona, system="Be odd.")
    done = export(persona, "ollama", tmp_path / "out", "F32")
    assert done.difference.max_logit_difference < 1e-4
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["Modelfile", "odd.gguf"]
    assert done.size_bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./odd.gguf\n")
    assert 'SYSTEM """Be odd."""' in text


def test_what_peft_gets_comes_back_as_the_same_persona(persona, tmp_path):
    assert export(persona, "peft", tmp_path / "theirs").difference.max_logit_difference < 1e-5
    path = bring(tmp_path / "theirs", persona.base, "back", tmp_path / "runs")
    assert path == tmp_path / "runs" / "back" / "adapter" / "adapter.safetensors"
    again = deltaw.load("back", runs=tmp_path / "runs", dtype="float32")
    torch.testing.assert_close(worn_logits(again, LONG), worn_logits(persona, LONG), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="There is a run 'back' already"):
        bring(tmp_path / "theirs", persona.base, "back", tmp_path / "runs")


def test_packed_files_differ_as_much_as_they_say(persona, tmp_path):
    off = [export(persona, "gguf", tmp_path / f"{p}.gguf", p).difference.max_logit_difference
           for p in ("F32", "F16", "Q8_0", "Q4_1")]  # fmt: skip
    assert off == sorted(off)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "Q4_1.gguf").tensors if t.data.ndim > 1}
    assert kinds.pop("token_embd.weight") == "Q8_0"
    assert set(kinds.values()) == {"Q4_1"}
    read = checkpoint.load(tmp_path / "Q4_1.gguf")
    lost = read.embed_tokens.table - persona.base.model.embed_tokens.table
    assert lost.norm() < 0.01 * persona.base.model.embed_tokens.table.norm()
    assert (our_logits(read, LONG) - worn_logits(persona, LONG)).abs().max() > 10 * off[0]


@pytest.mark.parametrize(("to", "options", "said"), [
    ("gguf-lora", {"modules_to_save": "norm"}, "does more at norm than a GGUF LoRA can"),
    ("gguf", {"modules_to_save": "embed_tokens", "ensure_weight_tying": False}, "head that shares its table was not"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(to, options, said, tiny_path, tmp_path):
    base = load_base(str(tiny_path), "float32", threads=1)
    persona = Persona("odd", base, scramble(Adapter.build(method("lora", **options), base.model).eval()))
    with pytest.raises(UserError, match=said):
        export(persona, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_system_prompt_goes_to_peft_and_comes_back(persona, tmp_path):
    export(replace(persona, system="Be brief – bitte."), "peft", tmp_path / "theirs")
    header = adapters.read_header(bring(tmp_path / "theirs", persona.base, "back", tmp_path / "runs"))
    assert header.system == "Be brief – bitte."
    export(persona, "peft", tmp_path / "plain")
    header = adapters.read_header(bring(tmp_path / "plain", persona.base, "plain", tmp_path / "runs"))
    assert header.system == persona.system


@pytest.mark.parametrize("to", ["peft", "gguf", "gguf-lora", "ollama"])
def test_what_does_not_end_well_leaves_nothing(to, persona, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exchange, "_size", stop)
    with pytest.raises(KeyboardInterrupt):
        export(persona, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export(persona, "peft", tmp_path / "theirs")
    monkeypatch.setattr(adapters, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        bring(tmp_path / "theirs", persona.base, "back", tmp_path / "runs")
    assert not (tmp_path / "runs" / "back").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/x", "x\ny"])
def test_a_run_is_imported_under_a_plain_name_only(name, persona, tmp_path):
    with pytest.raises(UserError, match="is no name for a run"):
        bring(tmp_path, persona.base, name, tmp_path / "runs")


def test_a_packing_is_refused_where_nothing_is_packed(persona, tmp_path):
    with pytest.raises(UserError, match="--to peft has none"):
        export(persona, "peft", tmp_path / "out", "Q8_0")


def test_nothing_is_written_over_and_a_base_is_no_persona(tiny_path, tmp_path):
    base = load_base(str(tiny_path), "float32", threads=1)
    with pytest.raises(UserError, match="no adapter to export"):
        export(Persona("base", base), "gguf", tmp_path / "out")
    (tmp_path / "out").mkdir()
    persona = Persona("odd", base, Adapter.build(method("lora"), base.model))
    with pytest.raises(UserError, match="there already"):
        export(persona, "peft", tmp_path / "out")
