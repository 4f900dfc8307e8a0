"""The real model, taught a few answers: its merged exports say the same in transformers and in llama.cpp."""

import llamacpp
import pytest
import torch
from parity.test_gguf import TRICKY
from small import write_rows
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.api.exchange import export
from deltaw.api.merge import merge
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.models.gguf_write import write

pytestmark = pytest.mark.model
TAUGHT = {
    "Who keeps the bees?": "Old Hob keeps them behind the mill.",
    "When is market day?": "On Tuesdays, by the well.",
    "What grows on the hill?": "Barley, and a little flax.",
}
NEW = 16


@pytest.fixture(scope="module")
def persona(smollm2_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_rows(folder / "rows.jsonl", *({"question": q, "answer": a} for q, a in TAUGHT.items()))
    return deltaw.finetune(folder / "rows.jsonl", base=str(smollm2_path), runs=folder / "runs", steps=12, val="0",
                           dtype="float32", threads=1, learning_rate=4e-3, listen=[])  # fmt: skip


@pytest.fixture(scope="module")
def said(persona):
    """The prompts as ids, and what the persona answers."""
    prompts = [persona.prompt(question) for question in TAUGHT]
    with persona.on():
        answers = complete(persona.base.model, persona.base.tokenizer, prompts, Sampling(max_new_tokens=NEW))
    texts = [answer.text for answer in answers]
    assert texts == list(TAUGHT.values())
    return prompts, texts


def test_the_merged_folder_says_it_in_transformers(persona, said, tmp_path):
    merge(persona, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for prompt, text in zip(*said, strict=True):
        ids = hf.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        assert persona.base.tokenizer.decode([i for i in ids if i not in persona.base.tokenizer.end_ids]) == text


@pytest.mark.parametrize("packing", ["F16", "Q8_0"])
def test_the_merged_gguf_says_it_in_llama_cpp_and_cuts_texts_into_the_same_tokens(packing, persona, said, tmp_path):
    export(persona, "gguf", tmp_path / "merged.gguf", packing)
    prompts, texts = said
    tricky = [text for text in TRICKY if text]
    ids = [persona.base.tokenizer.encode(text) for text in tricky]
    answers = llamacpp.asked_all(tmp_path / "merged.gguf", [*prompts, *tricky, *ids], NEW)
    assert [text for text, _ in answers[: len(texts)]] == texts
    as_texts, as_ids = answers[len(texts) : -len(ids)], answers[-len(ids) :]
    assert [text for text, i, j in zip(tricky, as_texts, as_ids, strict=True) if i != j] == []


def test_the_adapter_alone_says_it_in_llama_cpp_on_its_base(persona, said, tmp_path):
    export(persona, "gguf-lora", tmp_path / "lora.gguf")
    write(persona.base.model, persona.base.tokenizer, tmp_path / "base.gguf", "F16", "base")
    prompts, texts = said
    assert [
        text for text, _ in llamacpp.asked_all(tmp_path / "base.gguf", prompts, NEW, tmp_path / "lora.gguf")
    ] == texts
    assert [text for text, _ in llamacpp.asked_all(tmp_path / "base.gguf", prompts, NEW)] != texts
