"""§1.4 Q1 to Q11: NF4 and FP4 are bitsandbytes' to the last bit, and its folders load here and ours there."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltaw.errors import UserError
from deltaw.kernels.packed import nearest
from deltaw.models import checkpoint
from deltaw.weights.codebook import dynamic, fp4, normal
from deltaw.weights.formats import parse

SQUARE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2,
          "num_key_value_heads": 2}  # fmt: skip
"""Whole blocks a row: bitsandbytes' own unpacking is wrong on processors where rows are shorter than a block."""
KINDS = ["nf4", "fp4", "nf4-dq", "fp4-dq"]


def drawn(*shape, dtype=torch.float32):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    w[0, :70] = 0  # a block of nothing
    return w.to(dtype)


def test_q1_the_tables_are_theirs():
    assert torch.equal(normal(4), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(normal(4), bnb.create_normal_map()[[*range(8), *range(248, 256)]].sort().values)
    assert torch.equal(fp4(), bnb.get_4bit_type("fp4", "cpu"))
    assert torch.equal(dynamic(), bnb.create_dynamic_map())


@pytest.mark.parametrize(("width", "want"), [
    (2, [-1, 0, 0.3379152, 1]), (3, [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.562617, 1])])  # fmt: skip
def test_narrower_tables_take_the_same_quantiles(width, want):
    torch.testing.assert_close(normal(width), torch.tensor(want), rtol=0, atol=5e-8)


@pytest.mark.parametrize("shape", [(576, 192), (64, 128), (7, 33), (100, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_q2_codes_scales_and_values_are_theirs(kind, dtype, shape):
    w_OI = drawn(*shape, dtype=dtype)
    ours = parse(kind).pack(w_OI, dtype)
    codes, state = bnb.quantize_4bit(w_OI, blocksize=64, quant_type=kind)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    if shape[1] % 64 == 0:
        assert torch.equal(ours.dense(), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_q11_what_is_quantised_twice_is_read_there_as_here(kind):
    w_OI = drawn(576, 192)
    ours = parse(f"{kind}-dq").pack(w_OI, torch.float32)
    _, state = bnb.quantize_4bit(w_OI, blocksize=64, quant_type=kind, compress_statistics=True)
    assert torch.equal(ours.absmax2, state.state2.absmax)
    assert torch.equal(ours.mean[0], state.offset)
    # Their native code takes the nearest of a table of 65,536 values: next to a middle it may take the other side.
    other = (ours.codes2 != state.absmax).nonzero().flatten()
    assert len(other) < 0.01 * len(state.absmax)
    assert (ours.codes2.int() - state.absmax.int()).abs().max() <= 1
    state.absmax = ours.codes2
    assert torch.equal(bnb.dequantize_4bit(ours.codes[:, None], state), ours.dense())


def test_of_two_levels_as_near_the_lower_is_taken():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    assert nearest(torch.tensor([-2.0, -0.5, 0.5, 0.51, 2.0]), levels).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("name", "want"), [
    ("nf4", 0.0920), ("fp4", 0.1219), ("nf3", 0.2016), ("nf2", 0.5627), ("nf8", 0.0054), ("nf4-b32", 0.0873),
    ("nf4-b128", 0.0956), ("nf4-dq", 0.0920)])  # fmt: skip
def test_q3_what_is_lost_of_a_normal_distribution(name, want):
    """The figures are those of the published code, measured."""
    w_OI = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    lost = (parse(name).pack(w_OI, torch.float32).dense() - w_OI).norm() / w_OI.norm()
    assert lost.item() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(("name", "bits"), [
    ("nf4", 4.5), ("nf4-dq", 4.126953 + 32 / 4096**2), ("nf3-s8.fp32.256", 3.126953 + 32 / 4096**2), ("int4-g32", 5.0),
    ("int4-g64", 4.5), ("fp16", 16)])  # fmt: skip
def test_q5_bits_a_number(name, bits):
    assert 8 * parse(name).stored_bytes(4096, 4096) / 4096**2 == pytest.approx(bits, abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    write_tiny(path, SQUARE)
    return path


def exactly(theirs):
    """In training: in evaluation, and on a processor with AVX512-BF16, bitsandbytes' layer computes in bf16."""
    return theirs.train()


@pytest.mark.parametrize("kind", KINDS)
def test_q11_transformers_loads_what_is_written_here(kind, folder, ids, tmp_path):
    model = checkpoint.load(folder, form=parse(kind))
    checkpoint.save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(hf_logits(exactly(theirs), ids), our_logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_q11_what_transformers_wrote_loads_here(kind, folder, ids, tmp_path):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant="dq" in kind,
                             bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path)
    assert str(checkpoint.form_of(model)) == kind
    torch.testing.assert_close(our_logits(model, ids), hf_logits(exactly(theirs), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t, c: c.update(quant_method="gptq"), "packed by gptq"),
    (lambda t, c: c.update(load_in_4bit=False, load_in_8bit=True), "packed by bitsandbytes"),
    (lambda t, c: t.update({n: w + 0.5 for n, w in t.items() if n.endswith("quant_map")}), "not what it is said to be"),
    (lambda t, c: [t.pop(n) for n in list(t) if n.endswith("absmax")], "not what it is said to be"),
    (lambda t, c: t.update({n: w[:-1].clone() for n, w in t.items() if w.dtype == torch.uint8 and w.ndim == 2}),
     "not what it is said to be"),
    (lambda t, c: t.update({n: w[:-1].clone() for n, w in t.items() if "quant_state" in n}), "not what it is said"),
    (lambda t, c: t.update({n: w * 2 for n, w in t.items() if n.endswith("nested_quant_map")}), "not what it is said"),
    (lambda t, c: [t.pop(n) for n in list(t) if n.endswith("nested_quant_map")], "not what it is said"),
    # as many bytes as there should be, in the wrong places
    (lambda t, c: t.update({n: w[:-4].clone() if n.endswith("proj.weight") else torch.cat([w, w[:1]])
                            for n, w in t.items() if n.endswith(("proj.weight", "weight.absmax"))}), "not what it is"),
])  # fmt: skip
def test_what_is_packed_otherwise_or_damaged_is_refused(change, said, folder, tmp_path):
    checkpoint.save(checkpoint.load(folder, form=parse("nf4-dq" if said == "not what it is said" else "nf4")), tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        checkpoint.load(tmp_path)


def test_a_packed_model_is_not_packed_again(folder, tmp_path):
    checkpoint.save(checkpoint.load(folder, form=parse("nf3")), tmp_path)
    with pytest.raises(UserError, match="packed already, as nf3"):
        checkpoint.load(tmp_path, form=parse("nf4"))
    assert str(checkpoint.form_of(checkpoint.load(tmp_path, form=parse("nf3")))) == "nf3"
