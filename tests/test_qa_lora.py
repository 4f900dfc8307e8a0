"""§3.4 A1 to A10: what QA-LoRA adds is a change of offsets, to the last bit of the codes."""

from dataclasses import replace

import gguf
import pytest
import torch
import torch.nn.functional as F
from oracles import our_logits, scramble
from safetensors.torch import load_file, save_file

from deltaw.adapters.adapter import Adapter
from deltaw.api.exchange import export
from deltaw.api.merge import moved
from deltaw.api.persona import Base, Persona
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.kernels.packed import unpack
from deltaw.methods import method
from deltaw.methods.qa_lora import Pooled
from deltaw.models import checkpoint
from deltaw.models.gguf import half_split
from deltaw.models.slots import Linear
from deltaw.models.tokenizer import Tokenizer
from deltaw.weights.formats import parse
from deltaw.weights.grid import Grid, Gridded

POOLINGS = {"root": 32**-0.5, "sum": 1.0, "mean": 1 / 32}


@pytest.fixture
def model(tiny_path):
    return checkpoint.load(tiny_path, form=parse("int4-g32"))


def layer(o=24, i=96, group=32, width=4, seed=0):
    w_OI = torch.randn(o, i, generator=torch.Generator().manual_seed(seed))
    return Linear(Grid(width, group).pack(w_OI, torch.float32))


def pooled(slot, rank=3, group=32, share=1.0, scale=0.5, seed=1):
    rng, (o, i) = torch.Generator().manual_seed(seed), slot.weight.shape
    return Pooled(
        torch.randn(rank, i // group, generator=rng), torch.randn(o, rank, generator=rng), scale, 0.0, group, share
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_it_is_the_formula(pooling):
    slot = layer()
    delta, x = pooled(slot, share=POOLINGS[pooling]), torch.randn(5, 96)
    A_RG, B_OR, frozen = delta.A.double(), delta.B.double(), x.double() @ slot.weight.dense().double().t()
    sums = torch.stack([x.double()[:, g * 32 : g * 32 + 32].sum(1) for g in range(3)], 1) * POOLINGS[pooling]
    want = frozen + 0.5 * sums @ A_RG.t() @ B_OR.t()
    torch.testing.assert_close(delta(slot, x).double(), want, rtol=0, atol=1e-6 * want.abs().max().item())
    form = delta.served(slot)
    served = frozen + form.scale * x.double() @ form.A_RI.double().t() @ form.B_OR.double().t()
    torch.testing.assert_close(served, want, rtol=0, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_a1_a2_merging_moves_offsets_and_nothing_else(pooling, width):
    slot, x = layer(width=width), torch.randn(7, 96)
    delta = pooled(slot, share=POOLINGS[pooling])
    merged = delta.merged(slot)["weight"]
    assert isinstance(merged, Gridded)
    assert torch.equal(merged.codes, slot.weight.codes)
    assert torch.equal(merged.scale, slot.weight.scale)
    want = delta(slot, x)
    assert ((merged(x) - want).abs().max() / want.abs().max()).item() <= 2e-6
    moved = slot.weight.offset.double() + 0.5 * POOLINGS[pooling] * delta.B.double() @ delta.A.double()
    torch.testing.assert_close(merged.offset.double(), moved, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a3_two_are_merged_one_after_the_other_and_taken_out_again(model, ids):
    one, two = (scramble(Adapter.build(method("qa_lora", rank=2), model), 0.2, seed) for seed in (1, 2))
    before = our_logits(model, ids)
    offsets = [
        m.weight.offset.clone() for m in model.modules() if isinstance(m, Linear) and isinstance(m.weight, Gridded)
    ]
    one.merge()
    two.merge()
    both = [slot.weight.offset for slot, _ in one.items()]
    parts = [(d1.scale * d1.share * (d1.B @ d1.A), d2.scale * d2.share * (d2.B @ d2.A))
             for (_, d1), (_, d2) in zip(one.named_deltas(), two.named_deltas(), strict=True)]  # fmt: skip
    for offset, after, (a, b) in zip(offsets, both, parts, strict=True):
        torch.testing.assert_close(after, offset.float() + a + b, rtol=0, atol=1e-6)
    two.unmerge()
    one.unmerge()
    assert torch.equal(our_logits(model, ids), before)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"targets": "q,down"}])
def test_a5_as_llama_cpps_q4_1_it_keeps_its_codes(settings, model, tiny_path, ids, tmp_path):
    """Of the merged offsets 16 bits are left: a layer is as before to 1e-3, and nothing else is lost."""
    base = Base("tiny", tiny_path, model, Tokenizer.load(tiny_path), "")
    adapter = scramble(Adapter.build(method("qa_lora", rank=2, **settings), model), 0.2)
    slot = model.layers[1].self_attn.q_proj
    off_the_ends = slot.weight.codes & 0x77 | 0x11  # as rounding by calibration leaves them: no group reaches 0 and 15
    slot.weight.codes = off_the_ends
    eighth = gguf.quantize(model.embed_tokens.table.numpy(), gguf.GGMLQuantizationType.Q8_0)  # it is written so too
    model.embed_tokens.table = torch.from_numpy(gguf.dequantize(eighth, gguf.GGMLQuantizationType.Q8_0).copy())
    export(Persona("tuned", base, adapter), "gguf", tmp_path / "q.gguf", "Q4_1")
    found = next(t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == "blk.1.attn_q.weight")
    theirs = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    delta = dict(adapter.named_deltas())["layers.1.self_attn.q_proj"]
    want = delta.merged(slot)["weight"]
    torch.testing.assert_close(
        half_split(theirs, 4), want.dense(), rtol=0, atol=2**-10 * want.offset.abs().max().item()
    )
    codes = torch.from_numpy(found.data.copy()).view(*want.shape[:1], -1, 20)[:, :, 4:]
    codes = torch.cat([codes & 15, codes >> 4], 2).view(want.shape)
    assert torch.equal(half_split(codes, 4), unpack(off_the_ends, 4, codes.numel()).view(want.shape))
    read = checkpoint.load(tmp_path / "q.gguf")
    adapter.merge()
    for layer, _ in adapter.items():
        if isinstance(layer.weight, Gridded):
            layer.weight.offset = layer.weight.offset.half()
    torch.testing.assert_close(our_logits(read, ids), our_logits(model, ids), rtol=0, atol=1e-5)
    adapter.unmerge()
    for name, part in adapter.named_deltas():
        layer = model.get_submodule(name)
        x = torch.randn(40, layer.weight.shape[1])
        want = part(layer, x)
        assert (read.get_submodule(name)(x) - want).norm() / want.norm() < 1e-3


@torch.no_grad()
def test_a6_whole_zero_points_would_round_the_adapter_away():
    """What GPTQ's packing does to offsets: -scale times a whole number. This is why such bases are refused."""
    slot, x = layer(o=256, i=512), torch.randn(64, 512)
    scale = slot.weight.scale.float()
    whole = slot.weight.shifted((slot.weight.offset.float() / scale).round() * scale - slot.weight.offset.float())
    slot = Linear(whole)
    delta = pooled(slot, rank=4, share=32**-0.5)
    delta.B *= 0.1 * F.linear(x, slot.weight.dense()).norm() / (delta(slot, x) - slot.run(x)).norm()
    added = delta(slot, x) - slot.run(x)
    assert added.norm() / slot.run(x).norm() == pytest.approx(0.1, rel=1e-3)  # an adapter worth a tenth of the output
    exact = delta.merged(slot)["weight"]
    rounded = slot.weight.shifted((exact.offset / scale).round() * scale - slot.weight.offset)
    assert (exact(x) - slot.run(x) - added).norm() / added.norm() < 1e-4
    assert (rounded(x) - slot.run(x) - added).norm() / added.norm() > 0.5


def by_act_order(model, seed=3):
    rng = torch.Generator().manual_seed(seed)
    for slot in model.layers.modules():
        if isinstance(slot, Linear):
            order_I = torch.randperm(slot.weight.shape[1], generator=rng)
            slot.weight = Grid(4, 32, ordered=True).pack(slot.weight.dense(), torch.float32, order_I)
    return model


@pytest.mark.parametrize("tokens", [3, 20])
@torch.no_grad()
def test_a7_groups_in_another_order_are_pooled_in_it(tokens):
    order_I = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    w_OI, x = torch.randn(24, 96), torch.randn(tokens, 96)
    slot = Linear(Grid(4, 32, ordered=True).pack(w_OI, torch.float32, order_I))
    assert (slot.weight.dense() - w_OI).abs().max() < 0.4
    delta = pooled(slot, share=32**-0.5)
    delta.order = slot.weight.order
    group_of = torch.empty(96, dtype=torch.long)
    group_of[order_I] = torch.arange(96) // 32  # GPTQ's g_idx
    A_RI = (32**-0.5 * delta.A)[:, group_of]
    want = x.double() @ (slot.weight.dense() + 0.5 * delta.B @ A_RI).double().t()
    near = {"rtol": 0, "atol": 1e-6 * want.abs().max().item()}
    torch.testing.assert_close(delta(slot, x).double(), want, **near)
    merged = delta.merged(slot)["weight"]
    assert torch.equal(merged.codes, slot.weight.codes)
    assert torch.equal(merged.order, slot.weight.order)
    torch.testing.assert_close(merged(x).double(), want, **near)
    torch.testing.assert_close(delta.factors()[0], A_RI, rtol=0, atol=0)
    assert torch.equal(merged.repack(merged.dense()).codes, merged.codes)


@torch.no_grad()
def test_a7_a_model_rounded_by_act_order_is_merged_as_exactly_and_its_adapter_fits_no_other(tiny_path, ids, tmp_path):
    plain = checkpoint.load(tiny_path)
    checkpoint.save(by_act_order(checkpoint.load(tiny_path)), tmp_path)
    model, other = checkpoint.load(tmp_path), by_act_order(checkpoint.load(tiny_path), seed=4)
    adapter = scramble(Adapter.build(method("qa_lora", rank=2), model), 0.2)
    kept = adapters.state(adapter)
    with pytest.raises(UserError, match="do not fit"):
        adapters.put(Adapter.build(adapter.method, plain), kept, "here")
    told = Base("tiny", tiny_path, model, Tokenizer.load(tiny_path), ""), Base("x", tiny_path, plain, None, "")
    with pytest.raises(UserError, match="in the order of its own base's groups"):
        moved(Persona("tuned", told[0], adapter), replace(told[1], tokenizer=told[0].tokenizer))
    elsewhere = Persona("tuned", replace(told[1], tokenizer=told[0].tokenizer), Adapter.build(adapter.method, plain))
    with pytest.raises(UserError, match="in the order of its own base's groups"):  # nor does one without an order
        moved(elsewhere, told[0])
    third = replace(told[0], name="y", model=other)
    before = our_logits(other, ids)
    with pytest.raises(UserError, match="in the order of its own base's groups"):
        moved(Persona("tuned", told[0], adapter), third)
    assert torch.equal(our_logits(other, ids), before)
    again = Adapter.build(adapter.method, other)  # of another order, which is not that of the adapter
    adapters.put(again, kept, "here")
    for (_, ours), (_, theirs) in zip(adapter.named_deltas(), again.named_deltas(), strict=True):
        assert torch.equal(ours.factors()[0], theirs.factors()[0])
    with adapter.on():
        worn = our_logits(model, ids)
    codes = [slot.weight.codes.clone() for slot, _ in adapter.items()]
    adapter.merge()
    assert (our_logits(model, ids) - worn).abs().max() <= 2e-6 * worn.abs().max()
    assert all(torch.equal(slot.weight.codes, kept) for (slot, _), kept in zip(adapter.items(), codes, strict=True))
    assert str(checkpoint.form_of(model)) == "int4-g32-actorder-moved"


def test_a7_an_order_that_is_none_is_refused(tiny_path, tmp_path):
    checkpoint.save(by_act_order(checkpoint.load(tiny_path)), tmp_path)
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight.order"
    twice = whole[name].clone()
    twice[3] = twice[4]
    for tensors in (whole | {name: twice}, {key: t for key, t in whole.items() if key != name}):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="not what it is said to be"):
            checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="told by rows") as caught:
        checkpoint.load(tiny_path, form=parse("int4-g32-actorder"))
    assert "--calibrate" in caught.value.remedy


@torch.no_grad()
def test_a8_groups_of_one_are_lora():
    w_OI, x = torch.randn(6, 8), torch.randn(3, 8)
    slot = Linear(parse("fp32").pack(w_OI, torch.float32))
    delta = pooled(slot, group=1)
    torch.testing.assert_close(delta(slot, x), x @ w_OI.t() + 0.5 * x @ delta.A.t() @ delta.B.t(), rtol=0, atol=1e-5)


def test_a10_how_many_are_trained(model):
    adapter = Adapter.build(method("qa_lora", rank=5), model)
    shapes = [slot.weight.shape for slot, _ in adapter.items()]
    assert adapter.parameter_count == sum(5 * (i // 32 + o) for o, i in shapes)


@torch.no_grad()
def test_groups_may_be_multiples_of_the_bases_and_not_parts_of_it(tiny_path, ids):
    model = checkpoint.load(tiny_path, form=parse("int4-g16"))
    for group, exact in ((32, True), (8, False)):
        adapter = scramble(Adapter.build(method("qa_lora", rank=2, group=group, targets="down"), model), 0.2)
        with adapter.on():
            worn = our_logits(model, ids)
        adapter.merge()
        off = (our_logits(model, ids) - worn).abs().max()
        adapter.unmerge()
        assert (off < 1e-5) == exact
    with pytest.raises(UserError, match="no whole number of groups of 5"):
        Adapter.build(method("qa_lora", group=5), model)
