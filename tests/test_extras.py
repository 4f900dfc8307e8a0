"""§8: DoRA is PEFT's, PiSSA begins as W's strongest part and leaves the base alone, LoRA+ is right for vectors."""

import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter, Site
from deltaw.methods import method
from deltaw.methods.pissa import principal
from deltaw.models import checkpoint
from deltaw.models.slots import Linear
from deltaw.settings import Training
from deltaw.train.optimizer import adamw
from deltaw.weights import Dense

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def both(tmp_path):
    """A function that gives PEFT's model with this configuration, and ours of the same base."""
    write_tiny(tmp_path, {"attention_bias": True})

    def both(**config):
        hf = AutoModelForCausalLM.from_pretrained(tmp_path)
        return get_peft_model(hf, LoraConfig(target_modules=ALL, **config)), checkpoint.load(tmp_path)

    return both


def test_dora_computes_what_peft_computes_and_learns_as_it_does(both, ids):
    theirs, model = both(r=4, lora_alpha=6, use_dora=True)
    theirs.eval()
    adapter = scramble(Adapter.build(method("dora", rank=4, alpha=6.0), model)).eval()
    with torch.no_grad():
        for name, delta in adapter.named_deltas():
            layer = theirs.get_submodule(f"base_model.model.model.{name}")
            layer.lora_A["default"].weight.copy_(delta.A)
            layer.lora_B["default"].weight.copy_(delta.B)
            layer.lora_magnitude_vector["default"].weight.copy_(delta.m)
    with adapter.on():
        ours_TV = our_logits(model, ids)
        theirs_TV = theirs(ids[None]).logits[0]
        torch.testing.assert_close(ours_TV, theirs_TV, rtol=0, atol=1e-4)
        for logits_TV in (ours_TV, theirs_TV):
            torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:]).backward()
    for name, delta in adapter.named_deltas():
        layer = theirs.get_submodule(f"base_model.model.model.{name}")
        for mine, its in ((delta.A, layer.lora_A), (delta.B, layer.lora_B), (delta.m, layer.lora_magnitude_vector)):
            torch.testing.assert_close(mine.grad, its["default"].weight.grad, rtol=1e-3, atol=1e-6)


def test_the_norm_of_dora_follows_every_way_in_which_a_and_b_change(tiny, ids):
    adapter = Adapter.build(method("dora", rank=4), tiny)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        adapter.train()
        with adapter.on():
            torch.nn.functional.cross_entropy(our_logits(tiny, ids)[:-1], ids[1:]).backward()
        optimizer.step()
        adapter.eval()
        for change in (lambda: None, lambda: scramble(adapter)):
            change()
            for slot, delta in adapter.items():
                w_OI = slot.weight.dense() + delta.scale * delta.B @ delta.A
                torch.testing.assert_close(delta.gain(slot), delta.m / w_OI.norm(dim=1), rtol=1e-5, atol=1e-6)
                assert delta.gain(slot) is not None


def test_a_dora_that_has_answered_can_be_asked_for_gradients(tiny, ids):
    adapter = Adapter.build(method("dora", rank=4), tiny).eval()
    with adapter.on():
        with torch.inference_mode():
            our_logits(tiny, ids)
        our_logits(tiny, ids).square().sum().backward()
    assert all(delta.m.grad.any() for _, delta in adapter.named_deltas())


def test_weight_decay_leaves_doras_lengths_alone(tiny):
    adapter = Adapter.build(method("dora"), tiny)
    groups = adamw(adapter, Training(weight_decay=0.1)).param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {(name.rsplit(".", 1)[-1], found[id(p)]) for name, p in adapter.named_parameters()} == {
        ("A", 0.1), ("B", 0.1), ("m", 0.0)}  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 40), (40, 12)])
@pytest.mark.parametrize("niter", [0, 4])
def test_pissa_begins_as_the_best_part_of_low_rank(shape, niter):
    """Eckart and Young: no other part of this rank is nearer to W than that of its decomposition."""
    rng = torch.Generator().manual_seed(0)
    w_OI = torch.randn(shape, generator=rng)
    u, s, vt = torch.linalg.svd(w_OI.double(), full_matrices=False)
    A_RI, B_OR = principal(w_OI, 5, niter, rng)
    best = u[:, :5] * s[:5] @ vt[:5]
    far = (w_OI.double() - best).norm()
    assert (w_OI.double() - B_OR.double() @ A_RI.double()).norm() <= far * 1.005
    torch.testing.assert_close(A_RI.norm(dim=1), s[:5].sqrt().float(), rtol=0.02, atol=0)
    if niter == 0:
        torch.testing.assert_close(B_OR.double() @ A_RI.double(), best, rtol=0, atol=1e-5)


def test_pissa_begins_and_goes_on_as_pefts_does(both, ids):
    """Its base is changed and ours is not, and both compute the same, also once B has moved."""
    theirs, model = both(r=4, lora_alpha=6, init_lora_weights="pissa")
    theirs.eval()
    adapter = Adapter.build(method("pissa", rank=4, alpha=6.0, niter=0), model).eval()
    before = our_logits(model, ids)
    torch.testing.assert_close(hf_logits(theirs, ids), before, rtol=0, atol=1e-3)
    with torch.no_grad():
        for name, delta in adapter.named_deltas():
            layer = theirs.get_submodule(f"base_model.model.model.{name}")
            A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(delta.B @ delta.A, B_OR @ A_RI, rtol=0, atol=1e-5)
            turn_RR = torch.linalg.lstsq(B_OR, delta.B).solution  # which sign each direction has is not said
            B_OR += 0.1
            delta.B += 0.1 * torch.ones_like(B_OR) @ turn_RR
    with adapter.on():
        ours = our_logits(model, ids)
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(ours, hf_logits(theirs, ids), rtol=0, atol=1e-3)


def test_pissa_loses_nothing_on_a_bf16_base():
    """A has moved by less than bf16 tells apart: what counts is the difference, taken before it is rounded."""
    rng = torch.Generator().manual_seed(0)
    slot = Linear(Dense(torch.randn(40, 48, generator=rng).bfloat16()))
    (site,) = method("pissa", rank=4).plan([Site("q", slot)])
    delta = method("pissa", rank=4).build(site, rng)
    with torch.no_grad():
        for p in (delta.A, delta.B):
            p += 1e-3 * torch.randn(p.shape, generator=rng).sign()
        A_RI, B_OR = delta.factors()
        exact = delta.scale * (delta.B.double() @ delta.A.double() - delta.B0.double() @ delta.A0.double())
        low = delta.scale * B_OR.bfloat16().double() @ A_RI.bfloat16().double()
    assert (low - exact).norm() / exact.norm() < 0.01


def test_dora_follows_the_weight_it_is_worn_on_and_bears_a_row_of_zeros(tiny, ids):
    lora, adapter = scramble(Adapter.build(method("lora"), tiny), 0.2), Adapter.build(method("dora", rank=4), tiny)
    slot, delta = next(iter(adapter.items()))
    assert torch.equal(delta.eval().gain(slot), torch.ones(len(delta.m)))
    lora.merge()
    torch.testing.assert_close(delta.gain(slot), delta.m / slot.weight.dense().norm(dim=1), rtol=1e-5, atol=0)
    lora.unmerge()
    w_OI = slot.weight.dense().clone()
    w_OI[3] = 0
    slot.swap({"weight": slot.weight.repack(w_OI)})
    before = our_logits(tiny, ids)
    with Adapter.build(method("dora"), tiny).on():
        assert torch.equal(our_logits(tiny, ids), before)


def test_pissa_serves_twice_the_rank_on_the_base_as_it_is():
    rng = torch.Generator().manual_seed(0)
    slot = Linear(Dense(torch.randn(20, 30, generator=rng)))
    (site,) = method("pissa", rank=3).plan([Site("q", slot)])
    delta = method("pissa", rank=3).build(site, rng)
    served = delta.served(slot)
    assert (served.A_RI.shape, served.B_OR.shape) == ((6, 30), (20, 6))
    assert (served.B_OR @ served.A_RI).abs().max() < 1e-5


def test_lora_plus_gives_b_the_higher_rate_as_pefts_does_and_vectors_and_whole_layers_the_lower(both):
    theirs, model = both(r=4)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    at = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    want = {name.split("lora_")[1][0]: at[id(p)] / 0.01 for name, p in theirs.named_parameters() if "lora_" in name}
    adapter = Adapter.build(method("lora", rank=4, loraplus_lr_ratio=16, modules_to_save="norm,embed_tokens"), model)
    groups = adamw(adapter, Training()).param_groups
    found = {id(p): group["pace"] for group in groups for p in group["params"]}
    kinds = {(name.rsplit(".", 1)[-1], found[id(p)]) for name, p in adapter.named_parameters()}
    assert kinds == {("A", want["A"]), ("B", want["B"]), ("value", 1.0)}
    assert want == {"A": 1.0, "B": 16.0}


def test_a_run_with_another_pace_for_b_moves_it_so_much_farther(ready):
    """Adam's first step is the rate, whatever the gradient."""
    moved = []
    for ratio in (1.0, 4.0):
        made = ready(steps=1, evaluations=0, val="0", warmup=0, learning_rate=0.001, loraplus_lr_ratio=ratio, clip=0)
        list(made.events())
        moved.append([float(delta.B.detach().abs().max()) for _, delta in made.job.adapter.named_deltas()])
    for one, four in zip(*moved, strict=True):
        assert four == pytest.approx(4 * one, rel=1e-3)
