"""The decoder computes what transformers does, writes what transformers reads, and refuses what it would get wrong."""

import json
import random
import shutil

import pytest
import torch
from conftest import TINY, write_tiny
from oracles import hf_logits, our_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.errors import UserError
from deltaw.models import checkpoint
from deltaw.models.config import FAMILIES, ModelConfig, supported
from deltaw.models.rope import KINDS
from deltaw.models.seen import Documents

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
VARIANTS = {
    "tied, grouped queries": {},
    "llama 2: a head per key, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    "llama 3: stretched rope": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "mistral": {**MISTRAL, "tie_word_embeddings": False},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "heads wider than their share": {"head_dim": 16},
    "one key head": {"num_key_value_heads": 1, "head_dim": 4},
}
LONG = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model_folder(tiny_path, tmp_path):
    """A copy of the tiny model's folder that may be spoilt."""
    return shutil.copytree(tiny_path, tmp_path / "model")


def change_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(changes, tmp_path):
    hf = write_tiny(tmp_path, changes)
    torch.testing.assert_close(our_logits(checkpoint.load(tmp_path), LONG), hf_logits(hf, LONG), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_what_we_save_and_computes_the_same(changes, tmp_path):
    hf = write_tiny(tmp_path / "theirs", changes)
    checkpoint.save(checkpoint.load(tmp_path / "theirs"), tmp_path / "ours")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(hf_logits(again.eval(), LONG), hf_logits(hf, LONG), rtol=0, atol=1e-6)


def test_what_we_save_we_load_bit_for_bit_in_the_same_type(tmp_path, tiny_path):
    first = checkpoint.load(tiny_path, torch.bfloat16)
    checkpoint.save(first, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = checkpoint.load(tmp_path, torch.bfloat16)
    assert again.config == first.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_longer_attention_window_than_the_text_changes_nothing(tmp_path):
    hf = write_tiny(tmp_path, {**MISTRAL, "sliding_window": 200})
    model = checkpoint.load(tmp_path)
    assert model.config.context == 512
    torch.testing.assert_close(our_logits(model, LONG), hf_logits(hf, LONG), rtol=0, atol=1e-4)


def test_positions_may_start_anywhere_as_in_transformers(tiny, tiny_path):
    hf = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    at = torch.arange(200) + 250
    with torch.no_grad():
        want = hf(LONG[None], position_ids=at[None]).logits[0]
    got = tiny.logits(tiny.hidden(LONG, at, Documents.of_lengths(200)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_folder_of_shards_is_the_same_model_as_one_file(tmp_path, tiny_path, tiny):
    hf = AutoModelForCausalLM.from_pretrained(tiny_path)
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert checkpoint.fingerprint(checkpoint.load(tmp_path)) == checkpoint.fingerprint(tiny)
    assert torch.equal(our_logits(checkpoint.load(tmp_path), LONG), our_logits(tiny, LONG))


def test_other_safetensors_beside_the_model_are_ignored_as_transformers_ignores_them(model_folder, tiny):
    # Mistral's repositories hold the weights a second time, under other names, in consolidated.safetensors.
    save_file({"layers.0.attention.wq.weight": torch.zeros(32, 32)}, model_folder / "consolidated.safetensors")
    assert torch.equal(our_logits(checkpoint.load(model_folder), LONG), our_logits(tiny, LONG))


def test_a_tied_checkpoint_may_carry_its_matrix_twice_and_old_ones_their_rope_constants(model_folder, tiny):
    change_weights(model_folder, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))  # fmt: skip
    assert torch.equal(our_logits(checkpoint.load(model_folder), LONG), our_logits(tiny, LONG))


def test_configs_of_older_transformers_mean_the_same():
    new = {**TINY, "rope_parameters": LLAMA3}
    old = {**TINY, "rope_theta": LLAMA3["rope_theta"], "rope_parameters": None}
    old["rope_scaling"] = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert ModelConfig.from_hf(old, "") == ModelConfig.from_hf(new, "")
    older = {**TINY, "rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}
    assert ModelConfig.from_hf(older, "") == ModelConfig.from_hf(TINY, "")


@pytest.mark.parametrize(
    ("changes", "asked", "supported"),
    [
        ({"model_type": "gpt2"}, "gpt2", supported(FAMILIES)),
        ({"model_type": None}, "None", supported(FAMILIES)),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope", ", ".join(["default", *KINDS])),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "su", "default, linear, dynamic"),
        ({"hidden_act": "gelu"}, "gelu", "silu"),
    ],
)
def test_what_the_decoder_would_get_wrong_is_refused_with_what_it_can(changes, asked, supported, model_folder):
    change_config(model_folder, **changes)
    with pytest.raises(UserError) as e:
        checkpoint.load(model_folder)
    assert f"'{asked}'" in str(e.value)
    assert supported in str(e.value)
    assert str(model_folder) in str(e.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_config_without_a_size_is_refused_by_a_sentence(key, model_folder):
    change_config(model_folder, **{key: None})
    with pytest.raises(UserError, match=key):
        checkpoint.load(model_folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 weight missing, such as 'norm\.weight'"),
        (
            lambda t: t.update({"model.layers.0.odd.weight": torch.ones(3)}),
            r"'layers\.0\.odd\.weight' has no place",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"Shape \(31,\) where config.json asks for \(32",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, 1)}), r"Shape \(32, 1\)"),
    ],
    ids=["missing", "left over", "wrong size", "wrong rank"],
)
def test_weights_that_do_not_fit_are_refused_by_name(spoil, said, model_folder):
    change_weights(model_folder, spoil)
    with pytest.raises(UserError, match=said):
        checkpoint.load(model_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_with_only_a_pickle_is_refused_without_opening_it(name, model_folder):
    (model_folder / "model.safetensors").rename(model_folder / name)
    with pytest.raises(UserError, match=f"{name} is a pickle, which may run code"):
        checkpoint.load(model_folder)


def test_a_damaged_file_and_a_missing_one_are_told_apart(model_folder, tmp_path):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(model_folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        checkpoint.load(model_folder)
    (model_folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        checkpoint.load(model_folder)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        checkpoint.load(tmp_path / "nowhere")


def test_the_fingerprint_tells_models_apart_and_not_types(tmp_path, tiny_path, tiny):
    assert checkpoint.fingerprint(checkpoint.load(tiny_path, torch.bfloat16)) == checkpoint.fingerprint(tiny)
    write_tiny(tmp_path, seed=1)
    assert checkpoint.fingerprint(checkpoint.load(tmp_path)) != checkpoint.fingerprint(tiny)
    tiny.norm.gain[3] += 1
    assert checkpoint.fingerprint(tiny) != checkpoint.fingerprint(checkpoint.load(tiny_path))


def test_a_flipped_bit_anywhere_changes_the_fingerprint(tiny_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAMPLED", 2)
    monkeypatch.setattr(checkpoint, "SUMMED", 12)
    model = checkpoint.load(tiny_path, torch.bfloat16)
    rng, whole = random.Random(0), checkpoint.fingerprint(model)
    for _, w in checkpoint.tensors(model):
        bits = w.view(torch.int16).reshape(-1)
        for _ in range(3):
            i, flip = rng.randrange(len(bits)), 1 << rng.randrange(15)
            bits[i] ^= flip
            assert checkpoint.fingerprint(model) != whole
            bits[i] ^= flip
    assert checkpoint.fingerprint(model) == whole


def test_a_model_that_was_written_is_known_again_in_another_type(tmp_path, tiny):
    checkpoint.save(tiny, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint.check_seal(tmp_path, checkpoint.fingerprint(checkpoint.load(tmp_path, dtype)))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.check_seal(tmp_path, "0" * 32)


@pytest.mark.model
def test_smollm2_computes_what_transformers_computes(smollm2_path):
    from deltaw.models.tokenizer import Tokenizer

    text = (smollm2_path / "config.json").read_text() + " Far out in the uncharted backwaters, 42 towels: " * 40
    ids = Tokenizer.load(smollm2_path).encode(text)[:300]
    assert len(ids) == 300
    want = hf_logits(AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval(), ids)
    got = our_logits(checkpoint.load(smollm2_path), ids)
    assert (got - want).abs().max() <= 2e-4
    assert torch.equal(got.argmax(-1), want.argmax(-1))
