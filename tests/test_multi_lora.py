"""§3, MultiLoRA: the sum over its parts, what moves first, what is trained, and how."""

import pytest
import torch
from oracles import our_logits, scramble
from test_lora import SMOLLM2

from deltaw.adapters.adapter import Adapter, Site
from deltaw.methods import method
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.settings import Training
from deltaw.train.optimizer import adamw
from deltaw.weights import Dense


def one(i=30, o=20, **chosen):
    """A slot with a random weight, and its delta away from its start."""
    rng = torch.Generator().manual_seed(0)
    slot, made = Linear(Dense(torch.randn(o, i, generator=rng))), method("multi_lora", **chosen)
    (site,) = made.plan([Site("q", slot)])
    return slot, scramble(made.build(site, rng), 0.3)


@pytest.mark.parametrize("scales", ["vector", "scalar"])
@torch.no_grad()
def test_the_output_is_the_sum_over_the_parts_each_behind_its_scale(scales):
    slot, delta = one(rank=3, parts=4, alpha=6.0, scales=scales)
    x_TI = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    want = x_TI.double() @ slot.weight.dense().double().t()
    for n in range(4):
        A_RI, B_OR = delta.A[3 * n : 3 * n + 3].double(), delta.B[:, 3 * n : 3 * n + 3].double()
        want += 6 / 3 * delta.g[n].double() * (x_TI.double() @ A_RI.t() @ B_OR.t())
    torch.testing.assert_close(delta(slot, x_TI).double(), want, rtol=0, atol=1e-4)


def test_one_part_behind_a_one_is_lora():
    slot, delta = one(rank=3, parts=1)
    (site,) = method("lora", rank=3).plan([Site("q", slot)])
    lora = method("lora", rank=3).build(site, torch.Generator())
    with torch.no_grad():
        delta.g.fill_(1)
        lora.A.copy_(delta.A)
        lora.B.copy_(delta.B)
    x_TI = torch.randn(5, 30)
    assert torch.equal(delta(slot, x_TI), lora(slot, x_TI))


def test_at_the_start_only_the_scales_have_a_gradient(tiny, ids):
    adapter = Adapter.build(method("multi_lora"), tiny)
    with adapter.on():
        torch.nn.functional.cross_entropy(our_logits(tiny, ids)[:-1], ids[1:]).backward()
    for name, p in adapter.named_parameters():
        assert bool(p.grad.any()) == name.endswith(".g"), name


@pytest.mark.parametrize(("scales", "numbers"), [("vector", 7_793_280), ("scalar", 7_793_280 - 3 * 155_520 + 3 * 210)])
def test_the_numbers_trained_are_those_of_the_specification(scales, numbers):
    """n (r (in + out) + out), or + 1: 7,793,280 on all linear layers of SmolLM2, whose outputs are 155,520 together."""
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    assert sum(site.slot.weight.shape[0] for site in method("lora").sites(model)) == 155_520
    assert Adapter.build(method("multi_lora", scales=scales), model).parameter_count == numbers


def test_weight_decay_leaves_the_scales_alone_and_they_learn_at_their_own_pace(tiny):
    adapter = Adapter.build(method("multi_lora", scale_pace=7.0, loraplus_lr_ratio=3.0), tiny)
    groups = adamw(adapter, Training(weight_decay=0.1)).param_groups
    found = {id(p): (group["pace"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {"A": (1.0, 0.1), "B": (3.0, 0.1), "g": (7.0, 0.0)}
    for name, p in adapter.named_parameters():
        assert found.pop(id(p)) == expected[name.rsplit(".", 1)[-1]], name
    assert not found
