"""A GGUF file of each family: llama.cpp, transformers and we read the same model; what it cannot say is refused."""

import json

import llamacpp
import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits
from parity.test_families import LLAMA3, LONG, VARIANTS
from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.models import checkpoint
from deltaw.models.gguf import GGUF
from deltaw.models.gguf_write import write
from deltaw.models.tokenizer import Tokenizer

GEMMA3 = {**VARIANTS["gemma3: its vocabulary"], "query_pre_attn_scalar": 16, "vocab_size": 260, "num_hidden_layers": 7}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in PRINTED]
BYTES = {ALPHABET.index(chr(b)): b for b in PRINTED} | {ALPHABET.index(chr(256 + n)): b for n, b in enumerate(HIDDEN)}
"""The byte that each token of the byte-level alphabet (of GPT-2) stands for."""
WRITTEN = {
    "llama": {},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    "llama 3.2": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0}},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "gemma2": {**VARIANTS["gemma2"], "query_pre_attn_scalar": 16, "final_logit_softcapping": 25.0},
    "gemma3": {k: v for k, v in GEMMA3.items() if k != "rope_parameters"},
    **{name: VARIANTS[name] for name in ("mistral: none", "qwen2: biases", "qwen3: norms of heads", "phi3", "rope yarn",
                                         "rope linear", "phi3: a window, part of a head turned")},
}  # fmt: skip
UNREAD = ("phi3", "qwen3", "gemma", "rope yarn", "rope linear", "llama3", "llama 3.2", "biases")
"""Where transformers does not read from a GGUF file what llama.cpp does: caps, scaled RoPE, biases, heads' width."""


@pytest.fixture(params=WRITTEN, scope="module")
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    hf = write_tiny(folder, WRITTEN[request.param])
    hf.set_attn_implementation("eager")
    return request.param, hf, folder


def test_what_we_write_we_read_as_the_same_model(pair, tmp_path):
    name, hf, folder = pair
    ours, file = checkpoint.load(folder), tmp_path / "model.gguf"
    window = ("llama.cpp leaves out Phi-3's window of 30 tokens: longer texts differ.",)
    assert write(ours, Tokenizer.load(folder), file, "F32", "x") == (window if "phi3: a window" in name else ())
    again = checkpoint.load(file)
    for (key, w), (other, v) in zip(checkpoint.tensors(again), checkpoint.tensors(ours), strict=True):
        assert key == other
        torch.testing.assert_close(w, v, rtol=0, atol=2e-7)  # a norm of Gemma is stored with one added
    assert (our_logits(again, LONG) - hf_logits(hf, LONG)).abs().max() <= 1e-4


@pytest.mark.parametrize("pair", [name for name in WRITTEN if not name.startswith(UNREAD)], indirect=True)
def test_transformers_reads_the_same_model_from_it(pair, tmp_path):
    _, hf, folder = pair
    write(checkpoint.load(folder), Tokenizer.load(folder), tmp_path / "model.gguf", "F32", "x")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert (hf_logits(read, LONG) - hf_logits(hf, LONG)).abs().max() <= 1e-4


def test_llama_cpp_says_what_we_say(pair, tmp_path):
    name, _, folder = pair
    merging_tokenizer().save(str(tmp_path / "tokenizer.json"))  # llama.cpp wants a merge
    ours = checkpoint.load(folder)
    longest = 29 if name.startswith("phi3: a window") else 60  # llama.cpp has switched Phi-3's window off
    # It holds back half a character and what it knew of it, so the first token is to be ASCII.
    first_bytes = {n: BYTES.get(int(our_logits(ours, LONG[:n])[-1].argmax()), 255) for n in range(longest, 20, -1)}
    prompt = next(LONG[:n] for n, byte in first_bytes.items() if byte < 128)
    write(ours, Tokenizer.load(tmp_path), tmp_path / "model.gguf", "F32", "x")
    text, first = llamacpp.asked(tmp_path / "model.gguf", prompt.tolist(), 12)
    logp_V = our_logits(ours, prompt)[-1].log_softmax(-1)
    assert len(first) == 260
    assert max(abs(p - logp_V[i].item()) for i, p in first.items()) < 5e-3
    said = [t for step in generate(ours, [prompt.tolist()], Sampling(max_new_tokens=12), set()) for _, t in step]
    assert text == bytes(BYTES[t] for t in said).decode(errors="replace")


def merging_tokenizer():
    """The bytes, one merge, and three special tokens."""
    vocab = {c: i for i, c in enumerate([*ALPHABET, "11"])}
    fast = Fast(models.BPE(vocab=vocab, merges=[("1", "1")]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return fast


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    """llama.cpp wants the list to be there, and an empty one cannot be written."""
    write_tiny(tmp_path)
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["model"] |= {"merges": [], "vocab": {c: i for c, i in said["model"]["vocab"].items() if len(c) == 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"has no merges.*Take --to peft, or deltaw merge"):
        write(checkpoint.load(tmp_path), Tokenizer.load(tmp_path), tmp_path / "model.gguf", "F16", "x")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("packing", ["F16", "Q8_0", "Q4_1"])
def test_a_packing_is_that_of_the_gguf_package(packing, tmp_path):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    write_tiny(tmp_path)
    ours = checkpoint.load(tmp_path)
    write(ours, Tokenizer.load(tmp_path), tmp_path / "model.gguf", packing, "x")
    read, kind = dict(GGUF(tmp_path / "model.gguf").tensors()), GGMLQuantizationType[packing]
    assert GGUF(tmp_path / "model.gguf").packing == packing
    w = dict(checkpoint.tensors(ours))["layers.1.mlp.up_proj.weight"]
    assert torch.equal(
        read["layers.1.mlp.up_proj.weight"], torch.from_numpy(dequantize(quantize(w.numpy(), kind), kind))
    )


def test_rows_that_no_block_divides_are_counted_and_kept_in_half_precision(tmp_path):
    write_tiny(tmp_path, {"intermediate_size": 40})
    told = write(checkpoint.load(tmp_path), Tokenizer.load(tmp_path), tmp_path / "model.gguf", "Q8_0", "x")
    assert told == ("2 matrices are F16: their rows cannot be cut into blocks of Q8_0.",)
    assert (our_logits(checkpoint.load(tmp_path / "model.gguf"), LONG) - our_logits(checkpoint.load(tmp_path), LONG)
            ).abs().max() < 0.2  # fmt: skip


@pytest.mark.parametrize(("variant", "said"), [
    ("mistral: a window", "windows"), ("qwen2: a window in the last layer", "windows"), ("rope dynamic", "rope"),
    ("rope yarn, all told", "rope"), ("rope llama3", "no Llama 3 does"), ("gemma3", "windows|local_rope"),
    ("gemma2", "score_scale")])  # fmt: skip
def test_what_a_gguf_file_cannot_say_is_refused(variant, said, tmp_path):
    write_tiny(tmp_path, VARIANTS[variant])
    with pytest.raises(UserError, match=said):
        write(checkpoint.load(tmp_path), Tokenizer.load(tmp_path), tmp_path / "model.gguf", "F32", "x")


def test_the_tokenizer_reads_back_with_its_template_and_ends(tmp_path):
    write_tiny(tmp_path)
    ours = Tokenizer.load(tmp_path)
    write(checkpoint.load(tmp_path), ours, tmp_path / "model.gguf", "F16", "x")
    again, theirs = (
        Tokenizer.load(tmp_path / "model.gguf"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    assert (again.template, again.end_ids) == (ours.template, ours.end_ids)
    for text in ("Grüße, 日本 🙂 1234 they'LL\n\n", "<|im_start|>user\nhi<|im_end|>"):
        assert again.encode(text) == ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert again.decode(ours.encode(text)) == text
