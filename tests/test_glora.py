"""§6, GLoRA: every path is the formula and merges exactly, new biases are loaded, a supernet is all of its paths."""

import itertools

import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from test_lora import SMOLLM2
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.methods import method
from deltaw.methods.glora import CHOICES, LARGEST, General, Path, drawn, read_path
from deltaw.models import checkpoint
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.weights import Dense

OUT, IN, R, T = 6, 5, 3, 4
PATHS = [Path(*choices) for choices in itertools.product(*CHOICES)]


def layer(path, bias=True, seed=0):
    """A layer and its terms away from their start, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    slot = Linear(Dense(torch.randn(OUT, IN, generator=rng, dtype=torch.float64)),
                  torch.randn(OUT, generator=rng, dtype=torch.float64) if bias else None)  # fmt: skip
    return slot, scramble(General(OUT, IN, R, path, rng).double(), 0.5, seed)


def formula(slot, delta, path):
    """W' and b', term by term as the specification has them."""
    p = dict(delta.named_parameters())
    wide = {
        "lora": lambda x: p[f"{x}_down"] @ p[f"{x}_up"],
        "vector": lambda x: p[f"{x}_down"][:, :1].expand(OUT, IN),
        "constant": lambda x: p[f"{x}_down"][0, 0].expand(OUT, IN),
        "none": lambda _: torch.zeros(OUT, IN, dtype=torch.float64),
    }
    W, b = slot.weight.dense(), torch.zeros(OUT, dtype=torch.float64) if slot.bias is None else slot.bias
    C = {
        "lora": lambda: p["C_down"] @ p["C_up"],
        "vector": lambda: p["C_down"][:, :1],
        "none": lambda: torch.zeros(IN, 1),
    }
    flat = {"vector": lambda x: p[x], "constant": lambda x: p[x][0].expand(OUT), "none": lambda _: torch.zeros(OUT)}
    new = W + W * wide[path.a]("A") + wide[path.b]("B")
    return new, b + b * flat[path.d]("D") + flat[path.e]("E") + (W @ C[path.c]().double()).flatten()


@torch.no_grad()
def test_every_one_of_the_432_paths_is_the_formula_and_merges_exactly():
    assert len(PATHS) == 432
    for path in PATHS:
        slot, delta = layer(path)
        new, bias = formula(slot, delta, path)
        x = torch.randn(T, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        want = x @ new.T + bias
        torch.testing.assert_close(delta(slot, x), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(delta(slot, x[:1]), want[:1], rtol=0, atol=1e-12)  # the factored form
        assert delta.merged(slot)["weight"].dense().dtype == torch.float64
        assert sum(t.numel() for t in delta.parameters()) == path.numbers(OUT, IN, R)
        served = delta.served(slot)
        assert (served is None) == (path.a == "lora")


@torch.no_grad()
def test_what_is_merged_is_the_formula_with_a_bias_or_without():
    for path in PATHS:
        for has in (True, False) if path.d == "none" else (True,):
            slot, delta = layer(path, has)
            new, bias = formula(slot, delta, path)
            parts = delta.merged(slot)
            torch.testing.assert_close(parts["weight"].dense(), new, rtol=0, atol=1e-6)  # summed in fp32
            if "bias" in parts:
                torch.testing.assert_close(parts["bias"], bias, rtol=0, atol=1e-12)
            else:
                assert not has
                assert not bias.any()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_supernet_by_a_path_is_that_path_and_a_path_taken_out_of_it_too(bias):
    slot, whole = layer(LARGEST if bias else LARGEST._replace(d="none"), bias)
    x = torch.randn(T, IN, dtype=torch.float64)
    for path in PATHS:
        if path.d != "none" and not bias:
            continue
        whole.path = path
        alone = whole.along(path).double()
        torch.testing.assert_close(alone(slot, x), whole(slot, x), rtol=0, atol=1e-6)
        new, offset = formula(slot, whole, path)
        torch.testing.assert_close(whole(slot, x), x @ new.T + offset, rtol=0, atol=1e-12)


def test_a_supernet_draws_every_path_in_training_and_none_outside(tiny, ids):
    rng = torch.Generator().manual_seed(0)
    assert {drawn(rng) for _ in range(8000)} == set(PATHS)
    adapter = scramble(Adapter.build(method("glora", supernet=True), tiny)).train()
    with adapter.on():
        torch.manual_seed(1)
        first, second = our_logits(tiny, ids), our_logits(tiny, ids)
        torch.manual_seed(1)
        assert torch.equal(our_logits(tiny, ids), first)
        assert not torch.equal(first, second)
        adapter.eval()
        assert torch.equal(our_logits(tiny, ids), our_logits(tiny, ids))


def test_a_supernet_learns_and_all_of_it_learns(ready):
    made = ready(method="glora", supernet=True, steps=30, evaluations=0, val="0")
    before = {name: p.detach().clone() for name, p in made.job.adapter.named_parameters()}
    losses = [e.loss for e in made.events() if type(e).__name__ == "Stepped"]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(p, before[name]) for name, p in made.job.adapter.named_parameters())


def test_the_numbers_of_a_supernet_are_those_of_the_specification():
    """3,353,160 with rank 4 on all linear layers of SmolLM2; without D, as it has no biases, 155,520 less."""
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    sites = method("glora", supernet=True).sites(model)
    shapes = [site.slot.weight.shape for site in sites]
    assert sum(LARGEST.numbers(*shape, 4) for shape in shapes) == 3_353_160
    assert Adapter.build(method("glora", supernet=True), model).parameter_count == 3_353_160 - 155_520


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", "layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"])
def test_biases_that_were_made_are_loaded_by_transformers(tmp_path, ids, targets):
    """One layer with a new bias is enough: its like get zeros, and config.json says so."""
    write_tiny(tmp_path / "base")
    model = checkpoint.load(tmp_path / "base")
    adapter = scramble(Adapter.build(method("glora", a="lora", c="vector", e="vector", targets=targets), model)).eval()
    with adapter.on():
        worn = our_logits(model, ids)
    adapter.merge()
    checkpoint.save(model, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(hf_logits(hf, ids), worn, rtol=0, atol=1e-4)
    again = checkpoint.load(tmp_path / "merged")
    checkpoint.check_seal(tmp_path / "merged", checkpoint.fingerprint(again))
    torch.testing.assert_close(our_logits(again, ids), worn, rtol=0, atol=1e-4)
    adapter.unmerge()
    assert not model.config.mlp_bias
    assert not model.config.o_bias


def test_a_family_without_a_place_for_a_bias_says_so(tmp_path):
    write_tiny(tmp_path, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    model = checkpoint.load(tmp_path)
    for chosen, fits in (({"e": "vector"}, False), ({}, True)):
        adapter = scramble(Adapter.build(method("glora", **chosen), model))
        adapter.merge()
        if fits:
            checkpoint.save(model, tmp_path / "merged")
        else:
            with pytest.raises(UserError, match=r"no place in a mistral model.*--e none"):
                checkpoint.save(model, tmp_path / "merged")
        adapter.unmerge()


def test_paths_are_read_layer_by_layer_and_what_is_none_is_refused(tiny):
    path = "none/vector/none/none/constant"
    adapter = Adapter.build(method("glora", paths={"layers.0.mlp.up_proj": path}), tiny)
    deltas = dict(adapter.named_deltas())
    assert "/".join(deltas["layers.0.mlp.up_proj"].path) == path
    assert deltas["layers.1.mlp.up_proj"].path == Path("vector", "lora", "none", "none", "none")
    for wrong in ("vector/lora", "lora/lora/constant/none/none", "x/lora/none/none/none"):
        with pytest.raises(UserError, match="is no path"):
            read_path(wrong)
    with pytest.raises(UserError, match="no adapted layer"):
        Adapter.build(method("glora", paths={"layers.9.mlp.up_proj": path}), tiny)


def test_small_scales_act_on_a_bf16_base_too(tiny_path, ids):
    """1.003 in bf16 is 1: what is added to one must not be rounded with it."""
    model = checkpoint.load(tiny_path, torch.bfloat16)
    bare = our_logits(model, ids)
    for name, part, chosen in (("glora", "A_down", {"a": "vector", "b": "none"}), ("dora", "m", {})):
        adapter = Adapter.build(method(name, **chosen), model).eval()
        with torch.no_grad():
            for _, delta in adapter.named_deltas():
                p = getattr(delta, part)
                p.copy_(p * 1.003 if part == "m" else p + 0.003)
        with adapter.on():
            assert not torch.equal(our_logits(model, ids), bare), name


def test_the_head_is_a_matrix_without_biases(tmp_path, ids):
    write_tiny(tmp_path, {"tie_word_embeddings": False})
    model = checkpoint.load(tmp_path)
    adapter = Adapter.build(method("glora", c="vector", e="vector", targets="q,lm_head"), model)
    assert dict(adapter.named_deltas())["lm_head"].path == Path("vector", "lora", "none", "none", "none")
    scramble(adapter).eval()
    with adapter.on():
        worn = our_logits(model, ids)
    adapter.merge()
    checkpoint.save(model, tmp_path / "merged")
    torch.testing.assert_close(our_logits(checkpoint.load(tmp_path / "merged"), ids), worn, rtol=0, atol=1e-4)


def test_what_trains_nothing_or_contradicts_itself_is_refused(tiny, ready):
    with pytest.raises(UserError, match="leave nothing to train"):
        ready(method="glora", a="none", b="none")
    for chosen in ({"a": "none"}, {"paths": {"layers.0.mlp.up_proj": "none/lora/none/none/none"}}):
        with pytest.raises(UserError, match="A supernet trains every term"):
            Adapter.build(method("glora", supernet=True, **chosen), tiny)


def test_outside_of_training_a_supernet_takes_a_path_like_those_it_draws(tiny):
    paths = [delta.path for _, delta in Adapter.build(method("glora", supernet=True), tiny, 1).named_deltas()]
    assert paths == [delta.path for _, delta in Adapter.build(method("glora", supernet=True), tiny, 2).named_deltas()]
    assert len(set(paths)) > len(paths) // 2
    assert {path.d for path in paths} == {"none"}


def test_llama_cpp_has_no_place_for_biases_of_other_families(tmp_path, tokenizer):
    from deltaw.models.gguf_write import write

    write_tiny(tmp_path, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8})
    model = checkpoint.load(tmp_path)
    scramble(Adapter.build(method("glora", e="vector", targets="q"), model)).merge()
    with pytest.raises(UserError, match=r"llama\.cpp has no place for such biases in a qwen3 model"):
        write(model, tokenizer, tmp_path / "out.gguf", "F16", "x")
    assert not (tmp_path / "out.gguf").exists()
