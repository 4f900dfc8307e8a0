"""What every storage format promises, whichever it is: the list below is all that a new one needs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from oracles import our_logits, scramble

from deltaw.adapters.adapter import Adapter
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.slots import Linear
from deltaw.weights.codebook import Codebook
from deltaw.weights.formats import parse
from deltaw.weights.grid import Grid

FORMATS = ["nf4", "nf4-dq", "nf4-b128", "fp4", "fp4-dq", "nf3", "nf3-dq", "nf2", "nf8", "nf3-b32-s4.fp16.64",
           "nf2-b16-s2.bf16.16", "nf8-b64-s8.fp32.256", "int2-g32", "int3-g64", "int4-g32", "int4-g32-actorder",
           "int8-g32", "fp16", "bf16", "fp32"]  # fmt: skip
SHAPES = [(64, 192), (7, 64), (100, 320)]
each_format = pytest.mark.parametrize("name", FORMATS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(form, w_OI, dtype=torch.float32):
    """Packed, in some order of the inputs where the format asks for one."""
    if not getattr(form, "ordered", False):
        return form.pack(w_OI, dtype)
    return form.pack(w_OI, dtype, torch.randperm(w_OI.shape[1], generator=torch.Generator().manual_seed(9)))


def loaded(folder, form):
    """The model with its layers packed so."""
    if not getattr(form, "ordered", False):
        return checkpoint.load(folder, form=form)
    model = checkpoint.load(folder)
    for slot in model.layers.modules():
        if isinstance(slot, Linear):
            slot.weight = pack(form, slot.weight.dense())
    return model


def bound(form, w_OI):
    """The largest error of each number: half the widest gap of the levels, or half a step, and what scales lose."""
    if isinstance(form, Codebook):
        flat = torch.nn.functional.pad(w_OI.flatten(), (0, -w_OI.numel() % form.block)).view(-1, form.block)
        kept = form.scales.store(flat.abs().amax(1))
        scale = form.scales.read(kept, len(flat))
        gap = form.levels(torch.device("cpu")).sort().values.diff().max() / 2
        # Beyond the outermost level, a number is cut; where scales are rounded, levels move with them.
        off = (flat.abs().amax(1) - scale).abs()
        most = gap * torch.maximum(scale, flat.abs().amax(1)) + off
        return most[:, None].expand_as(flat).flatten()[: w_OI.numel()].view_as(w_OI)
    if isinstance(form, Grid):
        if form.ordered:  # of whichever inputs a group is
            low, high = w_OI.amin(1, keepdim=True), w_OI.amax(1, keepdim=True)
            return ((high - low) / (2**form.width - 1) / 2 + 2**-9 * w_OI.abs().amax(1, keepdim=True)).expand_as(w_OI)
        groups = form.grouped(w_OI)
        step = (groups.amax(2) - groups.amin(2)) / (2**form.width - 1)
        return (step / 2 + 2**-9 * groups.abs().amax(2))[..., None].expand_as(groups).reshape(w_OI.shape)
    return w_OI.abs() * {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8}[str(form)] + 1e-7


@each_shape
@each_format
def test_q4_what_is_unpacked_is_near_what_was_packed(name, shape):
    form, w_OI = parse(name), drawn(*shape)
    off = (pack(form, w_OI).dense() - w_OI).abs()
    assert bool((off <= bound(form, w_OI) * 1.001 + 1e-6).all())
    assert off.max() > 0 or name == "fp32"


@each_shape
@each_format
def test_q6_packing_again_what_was_unpacked_changes_nothing_more(name, shape):
    """Scales that are stored exactly give every bit again; those that were rounded move once more, by as little."""
    packed = pack(parse(name), drawn(*shape))
    once = packed.dense()
    rounded = any(part in name for part in ("-s", "-dq", "int"))
    torch.testing.assert_close(packed.repack(once).dense(), once, rtol=0, atol=0.01 * once.abs().max().item() * rounded)


@each_shape
@each_format
def test_bytes_are_those_of_the_formula(name, shape):
    form = parse(name)
    assert pack(form, drawn(*shape)).stored_bytes == form.stored_bytes(*shape)
    assert str(parse(str(form))) == str(form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_format
def test_q7_products_and_gradients_are_those_of_the_unpacked_matrix_and_nothing_of_it_is_kept(name, dtype):
    packed, x = pack(parse(name), drawn(64, 192), dtype), drawn(20, 192, seed=1, dtype=dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = packed(x)
    assert kept == []
    y.backward(dy := drawn(20, 64, seed=2, dtype=dtype))
    w_OI = packed.dense()
    assert w_OI.dtype == dtype
    assert torch.equal(y, F.linear(x, w_OI))
    assert torch.equal(x.grad, dy @ w_OI)
    assert list(packed.parameters()) == []
    few = drawn(3, 192, seed=3, dtype=dtype).requires_grad_()
    dy = drawn(3, 64, seed=4, dtype=dtype)
    (y := packed(few)).backward(dy)
    want = F.linear(few, w_OI).float()
    assert (y.float() - want).norm() / want.norm() < (5e-3 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(few.grad, dy @ w_OI)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose sides are whole groups and blocks."""
    path = tmp_path_factory.mktemp("square")
    write_tiny(path, {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2,
                      "num_key_value_heads": 2})  # fmt: skip
    return path


@each_format
def test_q9_a_model_is_written_and_read_again_to_the_last_bit_after_an_evaluation_too(name, folder, ids, tmp_path):
    model = loaded(folder, parse(name))
    adapter = scramble(Adapter.build(method("lora", rank=2), model))

    def merged():
        adapter.merge()
        try:
            return [slot.weight.dense().clone() for slot, _ in adapter.items()]
        finally:
            adapter.unmerge()

    before = merged()
    with torch.no_grad(), adapter.eval().on():
        our_logits(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(merged(), before, strict=True))
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert torch.equal(our_logits(again, ids), our_logits(model, ids))
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(model)
    checkpoint.check_seal(tmp_path, checkpoint.fingerprint(again))


@each_format
def test_q8_training_goes_on_after_an_evaluation_as_if_there_had_been_none(name, folder, ids):
    """bitsandbytes' layer fails it on processors with AVX512-BF16."""
    model = loaded(folder, parse(name))
    adapter = scramble(Adapter.build(method("lora", rank=2), model))

    def gradients():
        adapter.train().zero_grad()
        with adapter.on():
            our_logits(model, ids).square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    before = gradients()
    stored = [b.clone() for b in model.buffers()]
    with torch.no_grad(), adapter.eval().on():
        our_logits(model, ids)
    for a, b in zip(gradients(), before, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stored, strict=True))


@each_format
def test_q10_a_fresh_adapter_changes_nothing(name, folder, ids):
    model = loaded(folder, parse(name))
    alone = our_logits(model, ids)
    with torch.no_grad(), Adapter.build(method("lora"), model).eval().on():
        assert torch.equal(our_logits(model, ids), alone)
