"""Adapters of PEFT are read with its logits, ours are read by PEFT with ours, and nothing is passed over in silence."""

import json
import shutil

import peft
import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from parity.test_families import VARIANTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.files import peft as files
from deltaw.files.foreign import CONFIG, WEIGHTS
from deltaw.methods import method
from deltaw.models import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""PEFT warns of trained embeddings and heads, which are what is tested."""
IDS = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(1))
MLP, QV = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
EMBEDS = {"modules_to_save": ["embed_tokens", "input_layernorm", "norm"]}
UNTIED = {"tie_word_embeddings": False}
THEIRS = {
    "plain": ({}, {"r": 4, "lora_alpha": 12, "target_modules": QV}),
    "all linear layers": ({}, {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": ({}, {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": MLP}),
    "patterns": ({}, {"r": 4, "lora_alpha": 8, "target_modules": QV, "rank_pattern": {"layers.0.self_attn.q_proj": 7},
                      "alpha_pattern": {"layers.1.*v_proj": 3, "^model.layers.0.self_attn.v_proj": 5}}),
    "one layer only": ({}, {"r": 4, "target_modules": QV, "layers_to_transform": [1]}),
    "the head too": (UNTIED, {"r": 4, "target_modules": [*QV, "lm_head"]}),
    "saved modules, untied": (UNTIED, {"r": 4, "target_modules": QV, **EMBEDS}),
    "saved embeddings and head, untied": (UNTIED, {"r": 4, "target_modules": QV,
                                                   "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved modules, the tied head left": ({}, {"r": 4, "target_modules": QV, **EMBEDS}),
    "saved modules, the tied head following": ({}, {"r": 4, "target_modules": QV, **EMBEDS,
                                                    "ensure_weight_tying": True}),
    "fused projections": ({"model_type": "phi3", "pad_token_id": 0}, {"r": 4, "target_modules": ["qkv_proj", *MLP[2:],
                                                                                                "gate_up_proj"]}),
    "dora": ({}, {"r": 4, "target_modules": "all-linear", "use_dora": True, "rank_pattern": {"layers.0.*": 7},
                  **EMBEDS}),
    "dora, fused projections": ({"model_type": "phi3", "pad_token_id": 0},
                                {"r": 3, "lora_alpha": 5, "use_rslora": True, "use_dora": True,
                                 "target_modules": ["qkv_proj", "o_proj"]}),
    "gemma3": (VARIANTS["gemma3"], {"r": 4, "target_modules": "all-linear", **EMBEDS}),
}  # fmt: skip


@pytest.fixture(params=THEIRS, scope="module")
def theirs(request, tmp_path_factory):
    """A base's folder, an adapter's folder as PEFT wrote it, and the logits of both."""
    folder = tmp_path_factory.mktemp("theirs")
    base, options = THEIRS[request.param]
    hf = write_tiny(folder / "base", base)
    hf.set_attn_implementation("eager")
    options.setdefault("lora_alpha", 8)
    model = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder / "adapter")
    return folder, hf_logits(model.eval(), IDS)


def peft_logits(base, adapter):
    hf = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return hf_logits(peft.PeftModel.from_pretrained(hf, adapter).eval(), IDS)


def test_an_adapter_of_peft_has_its_logits_here(theirs):
    folder, want = theirs
    model = checkpoint.load(folder / "base")
    with files.read(folder / "adapter", model).on():
        torch.testing.assert_close(our_logits(model, IDS), want, rtol=0, atol=1e-4)
    assert not torch.allclose(our_logits(model, IDS), want, atol=1e-2)


def test_what_was_read_and_written_again_is_the_same_to_peft(theirs, tmp_path):
    folder, want = theirs
    model = checkpoint.load(folder / "base")
    files.write(files.read(folder / "adapter", model), model, str(folder / "base"), tmp_path)
    torch.testing.assert_close(peft_logits(folder / "base", tmp_path), want, rtol=0, atol=1e-4)
    before, after = load_file(folder / "adapter" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    once = 1e-5 if any("magnitude" in key for key in before) else 0  # gains are worked out, and become lengths again
    for key in after:
        torch.testing.assert_close(after[key], before[key], rtol=once, atol=once)
    assert after.keys() <= before.keys()
    assert {key for key in before if "lora_" in key} <= after.keys()


@pytest.mark.parametrize("options", [
    {}, {"rank": 3, "alpha": 4.0, "rslora": True}, {"targets": "layers.0.self_attn.q_proj,down"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 7}}, {"modules_to_save": "embed_tokens,norm"},
    {"modules_to_save": "embed_tokens", "ensure_weight_tying": False}])  # fmt: skip
def test_an_adapter_of_ours_has_our_logits_in_peft(options, tiny, tiny_path, tmp_path):
    adapter = scramble(Adapter.build(method("lora", **options), tiny).eval(), 0.1)
    files.write(adapter, tiny, str(tiny_path), tmp_path)
    with adapter.on():
        torch.testing.assert_close(peft_logits(tiny_path, tmp_path), our_logits(tiny, IDS), rtol=0, atol=1e-4)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.inference_mode) == (str(tiny_path), True)


@pytest.fixture
def ours(tiny, tiny_path, tmp_path):
    """A folder that `write` made and a test may spoil, with the model."""
    files.write(
        scramble(Adapter.build(method("lora", rank=2, targets="q,v"), tiny)), tiny, str(tiny_path), tmp_path / "a"
    )
    return tmp_path / "a", tiny


def change(folder, tensors=None, **config):
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(told | config))
    if tensors:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file(stored, folder / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("tensors", "config", "said"), [
    (None, {"peft_type": "IA3"}, "the kind IA3"),
    (None, {"use_dora": True}, "q_proj has A and B in place of A and B and m"),
    (None, {"bias": "all"}, "Biases of the base were trained"),
    (None, {"init_lora_weights": "pissa_niter_4"}, "began by pissa_niter_4, which changed the base"),
    (None, {"trainable_token_indices": [1, 2]}, "Single tokens were trained"),
    (None, {"r": 5}, "says rank 5 of .*, and its A has 2 rows"),
    (lambda t: t.update({Q0.replace("q_proj", "w_proj") + ".lora_A.weight": torch.ones(2, 32)}), {},
     r"The base has no layer for 1 tensor of this adapter, such as '.*w_proj\.lora_A\.weight'"),
    (lambda t: t.pop(Q0 + ".lora_A.weight"), {}, r"q_proj has B in place of A and B"),
    (lambda t: t[Q0 + ".lora_B.weight"].zero_(), {}, "B is all zero at 1 of 4 layers"),
    (lambda t: t.update({Q0 + ".lora_A.weight": torch.ones(2, 31)}), {}, "shape"),
    (lambda t: t.clear(), {}, "no LoRA matrices"),
])  # fmt: skip
def test_what_is_no_plain_lora_of_this_base_is_refused(tensors, config, said, ours):
    folder, model = ours
    change(folder, tensors, **config)
    with pytest.raises(UserError, match=f"(?i){said}"):
        files.read(folder, model)


def test_a_pickle_a_damaged_file_and_an_empty_folder_are_told_apart(ours, tmp_path):
    folder, model = ours
    shutil.copytree(folder, tmp_path / "pickle")
    (tmp_path / "pickle" / WEIGHTS).rename(tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which may run code"):
        files.read(tmp_path / "pickle", model)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:50])
    with pytest.raises(UserError, match="damaged"):
        files.read(folder, model)
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        files.read(tmp_path, model)
    with pytest.raises(UserError, match="There is no such folder"):
        files.read(tmp_path / "nowhere", model)


def test_an_adapter_with_nothing_of_low_rank_is_not_written(tiny, tmp_path):
    with pytest.raises(UserError, match="nothing of low rank"):
        files.write(Adapter.build(method("full", targets="norm"), tiny), tiny, "x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dora_goes_to_peft_and_not_to_vllm_and_an_output_that_is_switched_off_to_neither(tiny, tmp_path):
    adapter = scramble(Adapter.build(method("dora", rank=2, targets="q"), tiny), 0.1).eval()
    with pytest.raises(UserError, match="vLLM loads no DoRA"):
        files.write(adapter, tiny, "x", tmp_path, uniform=True)
    next(iter(adapter.named_deltas()))[1].m.data[3] = 0
    with pytest.raises(UserError, match=r"does more at layers\.0\.self_attn\.q_proj than PEFT's LoRA can"):
        files.write(adapter, tiny, "x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_for_vllm_ranks_and_scales_are_one_and_the_logits_the_same(tiny, tiny_path, tmp_path):
    options = {"rank": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.*": 7}, "rslora": True}
    adapter = scramble(Adapter.build(method("lora", **options), tiny).eval(), 0.1)
    files.write(adapter, tiny, str(tiny_path), tmp_path, uniform=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    assert {t.shape[0] for n, t in load_file(tmp_path / WEIGHTS).items() if "lora_A" in n} == {5}
    with adapter.on():
        torch.testing.assert_close(peft_logits(tiny_path, tmp_path), our_logits(tiny, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("options", "said"), [
    ({"modules_to_save": "norm"}, "no layers that were trained whole, such as norm"),
    ({"targets": "q,lm_head"}, "no LoRA of the head"), ({"targets": "q", "rank": 513}, "ranks up to 512")])  # fmt: skip
def test_what_vllm_does_not_load_is_refused(options, said, tmp_path):
    write_tiny(tmp_path / "base", UNTIED)
    model = checkpoint.load(tmp_path / "base")
    with pytest.raises(UserError, match=said):
        files.write(Adapter.build(method("lora", **options), model), model, "x", tmp_path / "out", uniform=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_mlx_lm_adds_its_scale_times_its_transposed_product(tiny, tmp_path):
    """y = W x + scale * (x a) b (mlx_lm/tuner/lora.py), in fp64, by a merged copy of the weights."""
    rng = torch.Generator().manual_seed(3)
    stored, merged = {}, {}
    weights = dict(checkpoint.tensors(tiny))
    for name, rank in (
        ("layers.0.self_attn.q_proj", 3),
        ("layers.1.mlp.down_proj", 3),
        ("layers.1.self_attn.q_proj", 3),
    ):
        o, i = weights[f"{name}.weight"].shape
        a, b = torch.randn(i, rank, generator=rng), torch.randn(rank, o, generator=rng)
        stored |= {f"model.{name}.lora_a": a, f"model.{name}.lora_b": b}
        merged[name] = (weights[f"{name}.weight"].double() + 0.7 * (a.double() @ b.double()).t()).float()
    save_file(stored, tmp_path / "adapters.safetensors")
    told = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 0.7, "dropout": 0.0}}
    (tmp_path / CONFIG).write_text(json.dumps(told))
    with files.read(tmp_path, tiny).on():
        got = our_logits(tiny, IDS)
    for name, w in merged.items():
        tiny.get_submodule(name).swap({"weight": tiny.get_submodule(name).weight.repack(w)})
    torch.testing.assert_close(got, our_logits(tiny, IDS), rtol=0, atol=1e-4)
    other = {**told, "lora_parameters": {**told["lora_parameters"], "rank": 4}}
    (tmp_path / CONFIG).write_text(json.dumps(other))
    with pytest.raises(UserError, match=f"The rank of .* is 3, and {CONFIG} says 4"):
        files.read(tmp_path, tiny)
    (tmp_path / CONFIG).write_text(json.dumps(told | {"fine_tune_type": "dora"}))
    with pytest.raises(UserError, match="'dora' adapter of mlx-lm"):
        files.read(tmp_path, tiny)


def test_an_adapter_of_torchtune_adds_its_scaled_product(tiny, tmp_path):
    """y = W x + alpha / r * B A x, in fp64: its folder has PEFT's names, few of its keys, and a pickle beside."""
    rng = torch.Generator().manual_seed(4)
    stored, merged = {}, {}
    weights = dict(checkpoint.tensors(tiny))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        for layer in range(2):
            o, i = weights[f"layers.{layer}.{name}.weight"].shape
            a, b = torch.randn(3, i, generator=rng), torch.randn(o, 3, generator=rng)
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            stored |= {f"{key}A.weight": a, f"{key}B.weight": b}
            merged[f"layers.{layer}.{name}"] = (
                weights[f"layers.{layer}.{name}.weight"] + (7 / 3 * b.double() @ a.double()).float()
            )
    save_file(stored, tmp_path / WEIGHTS)
    (tmp_path / "adapter_model.pt").write_bytes(b"\x80\x02")
    (tmp_path / CONFIG).write_text(json.dumps({"r": 3, "lora_alpha": 7, "peft_type": "LORA",
                                               "target_modules": ["q_proj", "o_proj", "down_proj"]}))  # fmt: skip
    with files.read(tmp_path, tiny).on():
        got = our_logits(tiny, IDS)
    for name, w in merged.items():
        tiny.get_submodule(name).swap({"weight": tiny.get_submodule(name).weight.repack(w)})
    torch.testing.assert_close(got, our_logits(tiny, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_rank_or_an_alpha_that_is_not_said_is_not_guessed(key, ours):
    folder, model = ours
    change(folder, **{key: None})
    with pytest.raises(UserError, match=f"does not say {key}"):
        files.read(folder, model)


DAMAGED = {
    "no alpha": {"lora_alpha": "abc"}, "a list for alpha": {"lora_alpha": []}, "an endless alpha": {"lora_alpha": 1e30},
    "an alpha of zero": {"alpha_pattern": {"q_proj": 0}}, "an alpha of none": {"alpha_pattern": {"q_proj": None}},
    "an alpha that is none": {"alpha_pattern": {"q_proj": float("nan")}}, "a list of ranks": {"rank_pattern": [1]},
    "a broken pattern": {"rank_pattern": {"(": 8}}, "another broken one": {"alpha_pattern": {"*": 8}},
    "a text for a truth": {"use_rslora": "false"}, "a text for dropout": {"lora_dropout": "x"},
    "a layer without tensors": {"target_modules": ["q_proj", "k_proj"]},
    "a saved layer without one": {"modules_to_save": ["norm"]},
}  # fmt: skip


@pytest.mark.parametrize("config", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration_is_refused_by_a_sentence(config, ours):
    folder, model = ours
    change(folder, **config)
    with pytest.raises(UserError):
        files.read(folder, model)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda t: t.update({"layers.0.self_attn.q_proj.lora_A.weight": t[Q0 + ".lora_A.weight"] * 5}), "is there twice"),
    (lambda t: t.update({Q0 + ".lora_A.weight": torch.ones(2, 32, dtype=torch.int32)}), "int32 of 2 dimensions"),
    (lambda t: t.update({Q0 + ".lora_A.weight": torch.tensor(1.0)}), "float32 of 0 dimensions"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(260, 32)}), "The base has no layer"),
])  # fmt: skip
def test_tensors_that_would_be_lost_or_mistaken_are_refused(spoil, said, ours):
    folder, model = ours
    change(folder, spoil)
    with pytest.raises(UserError, match=said):
        files.read(folder, model)


def test_a_scale_that_mlx_lm_did_not_say_is_not_guessed(ours):
    folder, model = ours
    save_file({"model.norm.weight": torch.ones(32)}, folder / "adapters.safetensors")
    for parameters in (None, [1], {"rank": 2}, {"scale": "x"}):
        (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters}))
        with pytest.raises(UserError, match="does not say the scale"):
            files.read(folder, model)


def test_a_saved_module_that_did_not_move_is_still_there(ours):
    folder, model = ours
    change(folder, lambda t: t.update({"base_model.model.model.norm.weight": model.norm.gain.clone()}),
           modules_to_save=["norm"])  # fmt: skip
    assert "norm" in dict(files.read(folder, model).named_deltas())


def test_a_name_that_fits_no_layer_of_the_model_is_no_loss(ours):
    folder, model = ours
    change(folder, target_modules=["q_proj", "v_proj", "query_key_value"])
    assert len(dict(files.read(folder, model).named_deltas())) == 4
