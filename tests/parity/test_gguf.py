"""GGUF files read as the weights that were written, whatever their packing, and make the models transformers makes."""

import json

import numpy as np
import pytest
import torch
from conftest import write_tiny
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings, strategies as st
from oracles import hf_logits, our_logits
from transformers import AutoTokenizer

from deltaw.errors import UserError
from deltaw.models import checkpoint, source
from deltaw.models.gguf import GGUF, half_split
from deltaw.models.tokenizer import Tokenizer

WORDS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
PACKINGS = ["F32", "F16", "Q8_0", "Q4_1"]
TRICKY = ["1234567 and 3.14159", "two  spaces,   three", "Grüße, Ωmega, 日本語, 🙂🙂", "\n\n\tdef f():\n    return 0\n",
          " ", "<|im_start|>user\nhi<|im_end|>\n", "it's  they'LL", "a1b22c333", "１２ ٣٤", ""]  # fmt: skip


def permuted(w, heads):
    """The row order of llama.cpp, as in its convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, state, packing="F32", leave_out=(), **fields):
    """The tiny model as llama.cpp's converter writes it; `fields` are added or changed."""
    writer = GGUFWriter(str(path), fields.pop("architecture", "llama"))
    sizes = {"block_count": 2, "context_length": 512, "embedding_length": 32, "feed_forward_length": 64,
             "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}  # fmt: skip
    for name, value in sizes.items():
        if name not in leave_out:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    write_tokenizer(writer)
    for name, w in state.items():
        add_tensor(writer, name.removeprefix("model."), w.float().numpy(), packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer):
    """A byte-level tokenizer with one merge and four special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "11"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3 + [TokenType.NORMAL])
    writer.add_token_merges(["1 1"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")


def add_tensor(writer, name, w, packing):
    word, kind = name.rsplit(".", 1)
    layer = f"blk.{name.split('.')[1]}." if name.startswith("layers.") else ""
    word = word.split(".", 2)[2] if layer else word
    if word in ("self_attn.q_proj", "self_attn.k_proj"):
        w = permuted(w, 4 if word == "self_attn.q_proj" else 2)
    kind_of = GGMLQuantizationType[packing if w.ndim > 1 else "F32"]
    writer.add_tensor(f"{layer}{WORDS[word]}.{kind}", quantize(w, kind_of), raw_dtype=kind_of)


def stored(w, packing):
    """What a packing keeps of a matrix, by the gguf package."""
    kind = GGMLQuantizationType[packing if w.ndim > 1 else "F32"]
    return torch.from_numpy(np.array(dequantize(quantize(w.float().numpy(), kind), kind)))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def hf(request, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("hf"), {"tie_word_embeddings": request.param})


def weights_of(hf):
    state = hf.state_dict()
    if hf.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


@pytest.mark.parametrize("packing", PACKINGS)
def test_weights_and_logits_are_those_that_were_packed(packing, hf, tmp_path, ids):
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf), packing)
    model = checkpoint.load(path)
    kept = {name: stored(w, packing) for name, w in weights_of(hf).items()}
    if packing == "F32":
        assert all(torch.equal(kept[name], w) for name, w in weights_of(hf).items())
    read = dict(GGUF(path).tensors())
    assert read.keys() == {name.removeprefix("model.") for name in kept}
    for name, w in kept.items():
        assert torch.equal(read[name.removeprefix("model.")], w), name
    before = {name: w.clone() for name, w in hf.state_dict().items()}
    hf.load_state_dict(kept, strict=False)
    want = hf_logits(hf, ids)
    hf.load_state_dict(before)
    torch.testing.assert_close(our_logits(model, ids), want, rtol=0, atol=1e-4)
    assert GGUF(path).packing == packing


def test_the_sizes_are_those_that_were_written(hf, tmp_path):
    config = GGUF(write_gguf(tmp_path / "tiny.gguf", weights_of(hf))).config()
    assert (config.vocab, config.width, config.layers, config.heads, config.kv_heads) == (260, 32, 2, 4, 2)
    assert (config.head_width, config.hidden, config.context, config.rope.theta) == (8, 64, 512, 10000.0)
    assert config.eps == 1e-5  # though the file holds it as fp32
    assert config.tied == hf.config.tie_word_embeddings


def test_biases_are_read_and_put_in_order_too(tmp_path, ids):
    hf = write_tiny(tmp_path / "hf", {"attention_bias": True})
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf))
    torch.testing.assert_close(our_logits(checkpoint.load(path), ids), hf_logits(hf, ids), rtol=0, atol=1e-4)


@settings(deadline=None)
@given(heads=st.integers(1, 6), half=st.integers(1, 8), columns=st.integers(1, 4))
def test_half_split_undoes_llama_cpps_row_order(heads, half, columns):
    w = torch.arange(heads * half * 2 * columns).reshape(heads * half * 2, columns)
    assert torch.equal(half_split(torch.from_numpy(permuted(w.numpy(), heads).copy()), heads), w)
    assert torch.equal(half_split(torch.from_numpy(permuted(w[:, 0].numpy(), heads).copy()), heads), w[:, 0])


@pytest.mark.parametrize("architecture", ["qwen2moe", "gemma"])
def test_another_architecture_is_refused_with_the_supported_one(architecture, hf, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf), architecture=architecture)
    with pytest.raises(UserError, match=f"'{architecture}' is not supported.*Supported: .*llama"):
        checkpoint.load(path)


def test_rope_scaling_without_a_factor_is_refused(hf, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf), llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match="RoPE scaling 'yarn' of this GGUF file has no factor"):
        checkpoint.load(path)


@pytest.mark.parametrize("field", ["attention.head_count", "embedding_length", "context_length"])
def test_a_file_without_a_size_is_refused_by_a_sentence(field, hf, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf), leave_out=(field,))
    with pytest.raises(UserError, match=field):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", weights_of(hf), "Q8_0")
    return path.read_bytes()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_file_that_ends_early_is_refused_by_a_sentence(whole, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])  # the last tensor is padded to 32 bytes
    with pytest.raises(UserError, match=r"cut\.gguf"):
        checkpoint.load(path)


def test_a_file_of_another_kind_is_refused_by_a_sentence(tmp_path):
    for content in (b"", b"PK\x03\x04" + bytes(200), b"{}"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match="no readable GGUF"):
            checkpoint.load(tmp_path / "x.gguf")


def test_converting_keeps_weights_tokenizer_template_and_says_what_it_was(hf, tmp_path, ids):
    path = write_gguf(tmp_path / "tiny.gguf", weights_of(hf), "Q4_1")
    source.convert(path, tmp_path / "made", {"name": "tiny", "licence": "none"})
    noted = json.loads((tmp_path / "made" / "deltaw.json").read_text())
    assert noted == {"name": "tiny", "licence": "none", "file": "tiny.gguf", "packing": "Q4_1"}
    assert torch.equal(our_logits(checkpoint.load(tmp_path / "made"), ids), our_logits(checkpoint.load(path), ids))
    ours, theirs = Tokenizer.load(tmp_path / "made"), AutoTokenizer.from_pretrained(tmp_path / "made")
    assert ours.end_ids == {258}
    assert ours.chat([{"role": "user", "content": "11"}]) == "11<|im_end|>"
    for text in TRICKY:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False)["input_ids"]
            == Tokenizer.load(path).encode(text)
        )
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("111")) == 3  # a smollm tokenizer merges no digits


@pytest.mark.model
def test_the_default_model_says_how_it_was_packed(smollm2_path):
    assert source.note(smollm2_path)["packing"] == "Q4_1"
    assert source.note(smollm2_path)["sha256"] == source.KNOWN["smollm2-135m"].sha256


@pytest.mark.model
def test_the_default_models_tokenizer_is_the_same_here_and_in_transformers(smollm2_path):
    ours, theirs = Tokenizer.load(smollm2_path), AutoTokenizer.from_pretrained(smollm2_path)
    for text in TRICKY:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text == theirs.decode(ours.encode(text))
    assert len(ours.encode("20260214")) == 8
    assert ours.encode("<|im_end|>") == [2] == sorted(ours.end_ids)
