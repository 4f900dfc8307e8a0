"""Adapter arithmetic: a sum is the sum, a rank is the nearest, TIES is PEFT's, DARE is right on average."""

import json

import pytest
import torch
from conftest import write_tiny
from oracles import our_logits, scramble
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.api import combine as api
from deltaw.api.combine import Combination, combine
from deltaw.api.persona import Base, Persona, load
from deltaw.cli.app import run
from deltaw.cli.combine import weighed
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.methods import method


def persona(model, seed, name="lora", **chosen):
    adapter = scramble(Adapter.build(method(name, **chosen), model, seed), 0.1, seed).eval()
    return Persona(f"p{seed}", Base("tiny", None, model, None, "0"), adapter)


def updates(persona_or_adapter):
    """Each layer's whole update, in fp64."""
    adapter = getattr(persona_or_adapter, "adapter", persona_or_adapter)
    return {name: form.scale * (form.B_OR.double() @ form.A_RI.double()) for name, form in adapter.low_rank().items()}


@pytest.fixture
def three(tiny):
    """Of other ranks, scales, layers and techniques."""
    return [
        persona(tiny, 1, rank=3, alpha=5.0, rank_pattern={"mlp.*": 2}),
        persona(tiny, 2, "tied_lora", targets="q,up"),
        persona(tiny, 3, "pissa", rank=2, targets="q,k,down"),
    ]


@torch.no_grad()
def test_a_sum_is_the_sum_with_its_weights_and_negative_ones_take_away(three, tiny, ids):
    weights = [0.7, -0.4, 1.5]
    adapter, lost = combine(three, weights, Combination())
    want: dict = {}
    for each, w in zip(three, weights, strict=True):
        for name, update in updates(each).items():
            want[name] = want.get(name, 0) + w * update
    got = updates(adapter)
    assert got.keys() == want.keys()
    assert lost == 0
    for name, update in got.items():
        torch.testing.assert_close(update, want[name], rtol=0, atol=1e-6)
    alone, _ = combine(three[:1], [1.0], Combination())
    with three[0].on():
        worn = our_logits(tiny, ids)
    with alone.on():
        torch.testing.assert_close(our_logits(tiny, ids), worn, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_within_a_rank_it_is_the_nearest_and_what_is_left_out_is_told(three, rank):
    adapter, lost = combine(three, [1.0, 1.0, 1.0], Combination(rank=rank))
    exact, got = updates(combine(three, [1.0, 1.0, 1.0], Combination())[0]), updates(adapter)
    off = whole = 0.0
    for name, update in exact.items():
        s = torch.linalg.svdvals(update)
        torch.testing.assert_close((update - got[name]).square().sum(), s[rank:].square().sum(), rtol=1e-4, atol=1e-8)
        off, whole = off + float(s[rank:].square().sum()), whole + float(s.square().sum())
        assert torch.linalg.matrix_rank(got[name], rtol=1e-5) <= rank
    assert lost == pytest.approx((off / whole) ** 0.5, rel=1e-3)


@torch.no_grad()
def test_ties_is_what_peft_computes(tmp_path, ids):
    from deltaw.models import checkpoint

    write_tiny(tmp_path)
    model = checkpoint.load(tmp_path)
    two = [persona(model, seed, rank=4, alpha=4.0, targets="q,down") for seed in (1, 2)]
    theirs = None
    for i, each in enumerate(two):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
        if theirs is None:
            theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config, "0")
        else:
            theirs.add_adapter(str(i), config)
        for name, delta in each.adapter.named_deltas():
            layer = theirs.get_submodule(f"base_model.model.model.{name}")
            layer.lora_A[str(i)].weight.copy_(delta.A)
            layer.lora_B[str(i)].weight.copy_(delta.B)
    theirs.add_weighted_adapter(["0", "1"], [0.8, 0.5], "both", combination_type="ties_svd", svd_rank=32, density=0.3)
    adapter, _ = combine(two, [0.8, 0.5], Combination(how="ties", density=0.3, rank=32))
    for name, update in updates(adapter).items():
        layer = theirs.get_submodule(f"base_model.model.model.{name}")
        want = layer.get_delta_weight("both").double()
        torch.testing.assert_close(update, want, rtol=0, atol=1e-5)
        assert want.abs().max() > 1e-3


@torch.no_grad()
def test_dare_is_right_on_average_drops_what_it_says_and_follows_its_seed(tiny):
    one = [persona(tiny, 1, rank=2, targets="q")]
    want = updates(one[0])

    def drawn(seed, density):
        return updates(combine(one, [2.0], Combination(how="dare", density=density, seed=seed, rank=32))[0])

    name = next(iter(want))
    assert torch.equal(drawn(3, 0.4)[name], drawn(3, 0.4)[name])
    assert not torch.equal(drawn(3, 0.4)[name], drawn(4, 0.4)[name])
    torch.testing.assert_close(drawn(0, 1.0)[name], 2 * want[name], rtol=0, atol=1e-6)
    some = [drawn(seed, 0.4)[name] for seed in range(300)]
    kept = torch.stack([s.abs() > 1e-6 for s in some]).double().mean()
    assert kept == pytest.approx(0.4, abs=0.02)
    far = (torch.stack(some).mean(0) - 2 * want[name]).norm() / (2 * want[name]).norm()
    assert far < 3 * (0.6 / 0.4 / 300) ** 0.5


@pytest.mark.parametrize(
    ("name", "chosen"), [("dora", {}), ("lora", {"modules_to_save": "norm"}), ("prefix_tuning", {})]
)
def test_what_is_no_product_is_refused_with_its_layer(tiny, name, chosen):
    with pytest.raises(UserError, match="p1' does more at"):
        combine([persona(tiny, 1, name, **chosen)], [1.0], Combination())


def test_the_command_makes_a_run_that_can_be_asked(here, capsys):
    for name, seed in (("poet", 1), ("chef", 2)):
        assert run(["train", "rows.jsonl", "--base", "base", "--dtype", "float32", "--threads", "1", "--steps", "2",
                    "--name", name, "--seed", str(seed), "--learning-rate", "0.01"]) == 0  # fmt: skip
    capsys.readouterr()
    assert run(["combine", "poet:0.7", "chef:0.3", "-o", "both", "--rank", "20", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["from"] == [["poet", 0.7], ["chef", 0.3]]
    assert 0 < said["left_out"] < 0.5
    poet, chef, both = (load(name, dtype="float32") for name in ("poet", "chef", "both"))
    want, _ = combine([poet, chef], [0.7, 0.3], Combination(rank=20))
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), both.adapter.parameters(), strict=True))
    assert both.ask("say 1", max_new_tokens=2) is not None
    assert run(["combine", "poet", "-o", "both"]) == 2
    assert "There is a run 'both' already." in capsys.readouterr().err
    assert run(["combine", "poet:1", "poet:-1", "-o", "none"]) == 2
    assert "cancel out" in capsys.readouterr().err
    assert not Run(here / "runs" / "none").folder.exists()
    assert adapters.read_header(Run(here / "runs" / "both").adapter).method == "lora"


def test_a_density_that_does_nothing_is_refused(tiny):
    with pytest.raises(UserError, match="A sum keeps every number"):
        combine([persona(tiny, 1)], [1.0], Combination(density=0.2))


@pytest.mark.parametrize("how", ["sum", "ties"])
def test_a_seed_that_does_nothing_is_refused(tiny, how):
    with pytest.raises(UserError, match="Nothing is drawn at random"):
        combine([persona(tiny, 1)], [1.0], Combination(how=how, seed=1))


def test_weights_are_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weighed("poet") == ("poet", 1.0)
    assert weighed("poet:-0.5") == ("poet", -0.5)
    (tmp_path / "a:2").touch()
    assert weighed("a:2") == ("a:2", 1.0)
    for said in ("poet:x", "poet:nan", "poet:1e9", "poet:"):
        with pytest.raises(UserError, match="is no weight"):
            weighed(said)
    assert api.Combination().how == "sum"
