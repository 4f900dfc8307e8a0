"""Every block type that the gguf package unpacks, one by one: llama.cpp says with it what we say."""

import llamacpp
import numpy as np
import pytest
import torch
from conftest import write_tiny
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from oracles import our_logits
from parity.test_gguf import WORDS, write_tokenizer

from deltaw.errors import UserError
from deltaw.models import checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
BLOCKS = sorted((kind for kind in quants._type_traits if kind != GGMLQuantizationType.BF16), key=lambda kind: kind.name)
LARGEST = 0.4


def blocks(kind, count, rng):
    """Random bytes that are blocks of small numbers: scales can be anything, so most are thrown away."""
    size, width = GGML_QUANT_SIZES[kind]
    kept, tries = np.empty((0, width), np.uint8), 0
    while len(kept) < 200:
        tries += 1
        assert tries < 400
        made = rng.integers(0, 256, (2000, width), np.uint8)
        with np.errstate(all="ignore"):
            values = quants.dequantize(made, kind).reshape(-1, size)
        spread = np.nan_to_num(np.abs(values).max(1), nan=np.inf)
        kept = np.concatenate([kept, made[(spread < LARGEST) & (spread > LARGEST / 40)]])
    return kept[rng.integers(0, len(kept), count)]


def write(path, hf, kind):
    """The tiny model's norms, and matrices of random blocks; the embedding stays plain."""
    rng, writer = np.random.default_rng(0), GGUFWriter(str(path), "llama")
    sizes = {"block_count": 1, "context_length": 512, "embedding_length": 256, "feed_forward_length": 256,
             "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 64}  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    write_tokenizer(writer)
    for name, w in hf.state_dict().items():
        word, part = name.removeprefix("model.").removeprefix("layers.0.").rsplit(".", 1)
        place = f"{'blk.0.' if 'layers' in name else ''}{WORDS[word]}.{part}"
        if word == "lm_head":
            continue
        if w.ndim == 1 or word == "embed_tokens":
            writer.add_tensor(place, w.float().numpy())
            continue
        size, width = GGML_QUANT_SIZES[kind]
        rows, columns = w.shape
        packed = blocks(kind, rows * columns // size, rng).reshape(rows, columns // size * width)
        writer.add_tensor(place, packed, raw_shape=packed.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("wide"), SIZES)


@pytest.mark.parametrize("kind", BLOCKS, ids=[kind.name for kind in BLOCKS])
def test_llama_cpp_says_what_we_say(kind, hf, tmp_path):
    write(tmp_path / "packed.gguf", hf, kind)
    ours = checkpoint.load(tmp_path / "packed.gguf")
    letters = torch.arange(40, 90)  # it holds back half a character, so the first token is to be ASCII
    first_ids = {n: int(our_logits(ours, letters[:n])[-1].argmax()) for n in range(4, 50)}
    prompt = next(letters[:n] for n, i in first_ids.items() if i < 90)
    _, first = llamacpp.asked(tmp_path / "packed.gguf", prompt.tolist(), 1)
    logp_V = our_logits(ours, prompt)[-1].log_softmax(-1)
    theirs = torch.tensor([first[i] for i in range(260)])
    assert logp_V.std() > 0.1
    # It rounds activations to eight bits before it multiplies; other weights would differ by more than the spread.
    assert (theirs - logp_V).abs().max() < 0.25 * logp_V.std()


def test_a_type_that_cannot_be_unpacked_is_refused(hf, tmp_path, monkeypatch):
    kind = GGMLQuantizationType.Q4_0
    write(tmp_path / "packed.gguf", hf, kind)
    monkeypatch.delitem(quants._type_traits, kind)
    with pytest.raises(UserError, match="packed as Q4_0, which cannot be unpacked"):
        checkpoint.load(tmp_path / "packed.gguf")
