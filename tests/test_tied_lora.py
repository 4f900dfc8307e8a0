"""§5, Tied-LoRA: one pair for all layers, owned, trained and saved once; its counts, its gradients; TL2 is VeRA."""

import peft
import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from test_lora import SMOLLM2
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter, Site
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.settings import Training
from deltaw.train.optimizer import adamw
from deltaw.weights import Dense


def count(layers, **chosen):
    with torch.device("meta"):
        model = Decoder(ModelConfig(**{**vars(SMOLLM2), "layers": layers}))
    return Adapter.build(method(chosen.pop("name", "tied_lora"), **chosen), model).parameter_count


@pytest.mark.parametrize(("variant", "numbers"), [("tl5", 12_288), ("tl6", 41_328), ("tl2", 29_040)])
def test_the_numbers_trained_are_those_of_the_specification(variant, numbers):
    assert count(30, targets="q,k,v", variant=variant) == numbers
    assert count(30, name="lora", rank=8, targets="q,k,v") == 645_120


@pytest.mark.parametrize(("variant", "a_layer"), [("tl5", 0), ("tl6", 8 + 960), ("tl2", 8 + 960)])
def test_with_more_layers_only_the_vectors_become_more(variant, a_layer):
    """u is one for q, k and v, which have 576 + 192 + 192 outputs."""
    assert count(30, targets="q,k,v", variant=variant) - count(2, targets="q,k,v", variant=variant) == 28 * a_layer


def test_without_tying_every_layer_has_its_own():
    assert count(30, targets="q,k,v", variant="vbua") == 30 * (8 * (576 + 960) + 8 + 960)


def test_vera_trains_two_vectors_a_layer():
    """38,400 with rank 256 on q and v of SmolLM2."""
    assert count(30, name="vera", rank=256, targets="q,v") == 38_400


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tl6", "tl5", "tl2", "vbua"])
def test_the_update_is_v_b_u_a(tiny, variant):
    adapter = scramble(Adapter.build(method("tied_lora", variant=variant, rank=4), tiny), 0.2)
    parts = adapters.state(adapter)
    at = "layers.1.self_attn." if variant == "vbua" else "self_attn."
    delta = dict(adapter.named_deltas())["layers.1.self_attn.k_proj"]
    slot = tiny.layers[1].self_attn.k_proj
    A_RI, B_OR = parts[f"shared.{at}qkv.A"].double(), parts[f"shared.{at}k_proj.B"].double()
    u_R, v_O = parts["shared.layers.1.self_attn.qkv.u"].double(), parts["layers.1.self_attn.k_proj.v"].double()
    want = slot.weight.dense().double() + v_O[:, None] * (B_OR @ (u_R[:, None] * A_RI))
    torch.testing.assert_close(delta.merged(slot)["weight"].dense().double(), want, rtol=0, atol=1e-5)


def test_matrices_are_owned_once_and_saved_once_and_given_to_the_optimizer_once(tiny):
    adapter = Adapter.build(method("tied_lora"), tiny)
    saved = adapters.state(adapter)
    matrices = [name for name, t in saved.items() if t.ndim == 2]
    assert sorted(matrices) == sorted(
        [f"shared.self_attn.{n}" for n in ("qkv.A", "q_proj.B", "k_proj.B", "v_proj.B", "o_proj.A", "o_proj.B")]
        + [f"shared.mlp.{n}" for n in ("gate_up.A", "gate_proj.B", "up_proj.B", "down_proj.A", "down_proj.B")]
    )
    given = [p for group in adamw(adapter, Training()).param_groups for p in group["params"]]
    assert len({id(p) for p in given}) == len(given) == len(saved)
    first, second = (dict(adapter.named_deltas())[f"layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert first.factors()[0].data_ptr() == second.factors()[0].data_ptr()


def test_the_gradient_of_a_tied_matrix_is_the_sum_of_those_of_its_copies(tiny, ids):
    tied, alone = (scramble(Adapter.build(method("tied_lora", variant=v), tiny)) for v in ("tl6", "vbua"))
    mine = adapters.state(tied)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            key = name.removeprefix("deltas.").replace("/", ".")
            p.copy_(mine[key if key in mine else key.replace("layers.0.", "").replace("layers.1.", "")])
    for adapter in (tied, alone):
        with adapter.on():
            torch.nn.functional.cross_entropy(our_logits(tiny, ids)[:-1], ids[1:]).backward()
    of = {name.removeprefix("shared."): p.grad for name, p in alone.shared.named_parameters()}
    checked = 0
    for name, p in tied.shared.named_parameters():
        if not name.endswith("u"):
            summed = of[f"layers/0/{name}"] + of[f"layers/1/{name}"]
            torch.testing.assert_close(p.grad, summed, rtol=1e-5, atol=1e-7)
            checked += 1
    assert checked == 11


def test_layers_of_different_sizes_are_refused():
    made, shared = method("tied_lora", rank=2), torch.nn.Module()
    rng = torch.Generator()
    made.build(Site("layers.0.mlp.up_proj", Linear(Dense(torch.zeros(6, 4))), shared=shared), rng)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: .*different sizes"):
        made.build(Site("layers.1.mlp.up_proj", Linear(Dense(torch.zeros(7, 4))), shared=shared), rng)


def test_vera_computes_what_peft_computes_with_its_tensors(tmp_path, ids):
    """And TL2 is the same, with u as its lambda_d and v as its lambda_b."""
    write_tiny(tmp_path)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path),
        peft.VeraConfig(r=6, target_modules=["o_proj", "down_proj"], init_weights=False, projection_prng_key=5),
    ).eval()
    model = checkpoint.load(tmp_path)
    adapter = Adapter.build(method("vera", rank=6, targets="o,down"), model).eval()
    base = theirs.base_model
    with torch.no_grad():
        adapter.shared.A.copy_(base.vera_A["default"])
        adapter.shared.B.copy_(base.vera_B["default"])
        for name, delta in adapter.named_deltas():
            layer = theirs.get_submodule(f"base_model.model.model.{name}")
            layer.vera_lambda_b["default"].uniform_(-1, 1)
            layer.vera_lambda_d["default"].uniform_(-1, 1)
            delta.v.copy_(layer.vera_lambda_b["default"])
            getattr(adapter.shared, name.replace(".", "/") + "/u").copy_(layer.vera_lambda_d["default"])
    with adapter.on():
        torch.testing.assert_close(our_logits(model, ids), hf_logits(theirs, ids), rtol=0, atol=1e-4)
    assert set(map(type, (base.vera_A, base.vera_B))) == {peft.tuners._buffer_dict.BufferDict}


def test_the_random_matrices_of_vera_are_drawn_from_their_seed_and_not_saved(tiny):
    one, same, other = (Adapter.build(method("vera", rank=5, projection_prng_key=k), tiny, seed)
                        for k, seed in ((1, 0), (1, 9), (2, 0)))  # fmt: skip
    assert torch.equal(one.shared.A, same.shared.A)
    assert not torch.equal(one.shared.A, other.shared.A)
    assert one.shared.A.shape == (5, 64)
    assert one.shared.B.shape == (64, 5)
    assert all(t.ndim == 1 for t in adapters.state(one).values())
    bound = (6 / 64) ** 0.5
    assert bound * 0.95 < one.shared.A.abs().max() <= bound
    assert all((u == 0.1).all() for u in one.shared.parameters())
