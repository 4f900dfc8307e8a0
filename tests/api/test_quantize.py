"""Packed bases from end to end: written, trained on, worn, merged into plain numbers and into their own few bits."""

import json

import pytest
import torch
from conftest import write_tiny
from oracles import our_logits
from safetensors.torch import load_file, save_file
from small import ROW, write_rows

from deltaw.api.exchange import export, requantised
from deltaw.api.finetune import finetune
from deltaw.api.merge import folded, merge, quantize
from deltaw.api.persona import load, load_base
from deltaw.cli.app import run
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.models import checkpoint
from deltaw.models.slots import Linear
from deltaw.train.events import Started
from deltaw.weights import Packed
from deltaw.weights.formats import parse

SQUARE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2,
          "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    write_tiny(path, SQUARE)
    return path


@pytest.fixture
def rows(tmp_path):
    write_rows(tmp_path / "rows.jsonl", *[ROW] * 8)
    return tmp_path / "rows.jsonl"


def tuned(folder, rows, **chosen):
    return finetune(rows, base=folder, runs=rows.parent / "runs", name="run", dtype="float32", threads=1, steps=3,
                    val="0", learning_rate=0.02, sample="hi", **{"listen": ()} | chosen)  # fmt: skip


@pytest.mark.parametrize("form", ["nf4-dq", "nf3-b32-s4.fp16.64", "int4-g32"])
def test_a_packed_folder_is_a_base_as_any_other(form, folder, ids, tmp_path):
    done = quantize(str(folder), form, tmp_path / "packed")
    base, again = load_base(str(folder), "float32", base_format=form), load_base(str(tmp_path / "packed"), "float32")
    assert base.fingerprint == again.fingerprint
    assert torch.equal(our_logits(again.model, ids), our_logits(base.model, ids))
    assert again.tokenizer.encode("say 1") == base.tokenizer.encode("say 1")
    slots = [m for m in again.model.layers.modules() if isinstance(m, Linear)]
    assert all(isinstance(slot.weight, Packed) for slot in slots)
    assert done.packed_bytes == sum(slot.weight.stored_bytes for slot in slots)
    assert done.bits == 8 * done.packed_bytes / sum(slot.weight.shape[0] * slot.weight.shape[1] for slot in slots)
    assert done.size_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match="there already"):
        quantize(str(folder), form, tmp_path / "packed")


@pytest.mark.parametrize(("name", "form"), [("qlora", "nf4-dq"), ("qa_lora", "int4-g32"), ("lora", "nf3")])
def test_a_packed_folder_is_trained_on_as_it_is(name, form, folder, rows, ids, tmp_path):
    quantize(str(folder), form, tmp_path / "packed")
    made = tuned(tmp_path / "packed", rows, method=name, rank=2)
    with made.on():
        want = our_logits(made.base.model, ids)
    persona = load("run", rows.parent / "runs", dtype="float32")
    with persona.on():
        assert torch.equal(our_logits(persona.base.model, ids), want)
    with pytest.raises(UserError, match=f"packed already, as {form}"):
        load_base(str(tmp_path / "packed"), "float32", base_format="nf2")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_plain_numbers_are_written_in_their_own_type(kind, folder, tmp_path):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[kind]
    quantize(str(folder), name, tmp_path / name)
    kinds = {n: t.dtype for n, t in load_file(tmp_path / name / "model.safetensors").items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == kind
    assert kinds["model.embed_tokens.weight"] == torch.float32


@pytest.mark.parametrize("form", ["int3-g32", "int3-g32-actorder"])
def test_rounding_by_rows_brings_what_layers_give_nearer(form, folder, ids, tmp_path):
    write_rows(tmp_path / "rows.jsonl", *[{"text": "".join(map(chr, range(60, 120)))}] * 4)
    quantize(str(folder), "int3-g32", tmp_path / "plain")
    quantize(str(folder), form, tmp_path / "by_rows", tmp_path / "rows.jsonl")
    base = load_base(str(folder), "float32")
    text = torch.tensor(base.tokenizer.encode("".join(map(chr, range(60, 120)))))
    want = our_logits(base.model, text)
    off = {how: (our_logits(load_base(str(tmp_path / how), "float32").model, text) - want).norm()
           for how in ("plain", "by_rows")}  # fmt: skip
    assert off["by_rows"] < 0.8 * off["plain"], off
    with pytest.raises(UserError, match="Only whole numbers are rounded by rows, and nf4 has none"):
        quantize(str(folder), "nf4", tmp_path / "x", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("form", ["nf4-b16", "nf4-b48", "fp4-b16", "nf4-b8192-dq"])
def test_blocks_that_bitsandbytes_does_not_have_are_written_as_ours(form, folder, ids, tmp_path):
    quantize(str(folder), form, tmp_path / "packed")
    base, again = load_base(str(folder), "float32", base_format=form), load_base(str(tmp_path / "packed"), "float32")
    assert torch.equal(our_logits(again.model, ids), our_logits(base.model, ids))


@pytest.fixture
def spoilt(folder, tmp_path):
    """A function that writes the model with another number in one matrix."""

    def write(value):
        model = checkpoint.load(folder)
        model.layers[1].mlp.up_proj.weight.w_OI[3, 5] = value
        checkpoint.save(model, tmp_path / "spoilt")
        load_base(str(folder), "float32").tokenizer.save(tmp_path / "spoilt")
        return str(tmp_path / "spoilt")

    return write


@pytest.mark.parametrize(("value", "form"), [(torch.nan, "nf4"), (torch.inf, "int4-g32"), (torch.nan, "fp16"),
                                             (1e5, "fp16"), (1e7, "int4-g32")])  # fmt: skip
def test_a_matrix_that_a_format_cannot_hold_is_refused_by_name(value, form, spoilt, tmp_path):
    with pytest.raises(UserError, match="no numbers, or too large for this format") as e:
        quantize(spoilt(value), form, tmp_path / "packed")
    assert e.value.where.endswith("layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "packed").exists()


def test_what_cannot_be_rounded_by_rows_is_said_before_and_by_name(folder, spoilt, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "packed"
    write_rows(rows, {"text": "abc"})
    with pytest.raises(UserError, match="no numbers, or too large"):
        quantize(spoilt(torch.nan), "int4-g32", out, rows)
    with pytest.raises(UserError, match="Rows of 64 numbers are no whole number of groups of 48") as e:
        quantize(str(folder), "int4-g48", out, rows)
    assert e.value.where == "layers.0.self_attn.q_proj"
    quantize(str(folder), "int4-g32", out)
    with pytest.raises(UserError, match="packed already, as int4-g32"):
        quantize(str(out), "int2-g32", tmp_path / "again", rows)
    (out / "deltaw.json").write_text("{bad")
    assert run(["inspect", str(out)]) == 2
    assert "not what deltaw wrote" in capsys.readouterr().err


def test_weights_that_are_packed_where_none_may_be_are_refused_by_name(folder, tmp_path):
    quantize(str(folder), "nf4", tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.uint8)}, file)
    with pytest.raises(UserError, match="only those of linear layers") as e:
        load_base(str(tmp_path / "packed"), "float32")
    assert e.value.where.endswith("norm.weight")


@pytest.mark.parametrize(("chosen", "form"), [
    ({"method": "qlora"}, "nf4-dq"), ({"base_format": "nf3"}, "nf3"),
    ({"method": "dora", "base_format": "int8"}, "int8"), ({"method": "qa_lora"}, "int4-g32"),
    ({"method": "loftq", "format": "nf3"}, ""), ({"method": "lq_lora"}, "")], ids=str)  # fmt: skip
def test_what_was_trained_is_worn_and_merged_on_the_base_that_it_was_trained_on(
    chosen, form, folder, rows, ids, tmp_path
):
    made = tuned(folder, rows, rank=4, **chosen)
    header = adapters.read_header(rows.parent / "runs" / "run" / "adapter" / "adapter.safetensors")
    assert header.base_format == form
    with made.on():
        want = our_logits(made.base.model, ids)
    persona = load("run", rows.parent / "runs", dtype="float32")
    assert str(checkpoint.form_of(persona.base.model) or "").startswith(form)
    with persona.on():
        assert torch.equal(our_logits(persona.base.model, ids), want)
    merged = merge(persona, tmp_path / "merged")
    assert (merged.dtype, merged.difference.top1_agreement) == ("float32", 1)
    plain = checkpoint.load(tmp_path / "merged")
    assert checkpoint.form_of(plain) is None
    torch.testing.assert_close(our_logits(plain, ids), want, rtol=0, atol=1e-4)
    with persona.on():
        assert torch.equal(our_logits(persona.base.model, ids), want)


@pytest.mark.parametrize(("method", "said"), [
    ("qlora", "packed as nf4-dq, and says other things over plain matrices, as far as packing changed them. "
              "transformers packs so too: "
              "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)."),
    ("qa_lora", "deltaw merge writes one model of both."), ("lora", "")])  # fmt: skip
def test_who_takes_an_adapter_elsewhere_is_told_how_its_base_was_packed(method, said, folder, rows, ids, tmp_path):
    made = tuned(folder, rows, method=method, rank=4)
    for to in ("peft", "vllm", "gguf-lora") if method != "qa_lora" else ("peft",):
        told = export(made, to, tmp_path / to).notices
        assert [said in line for line in told] == [True] * bool(said)
    card = (rows.parent / "runs" / "run" / "MODEL_CARD.md").read_text()
    form = adapters.read_header(rows.parent / "runs" / "run" / "adapter" / "adapter.safetensors").base_format
    assert (f"packed as {form}" in card) == bool(form)
    assert run(["import", str(tmp_path / "peft"), "--base", str(folder), "--base-format", form, "--name", "again",
                "--runs", str(tmp_path), "--dtype", "float32"]) == 0  # fmt: skip
    again = load("again", tmp_path, dtype="float32")
    with made.on(), again.on():
        torch.testing.assert_close(
            our_logits(again.base.model, ids), our_logits(made.base.model, ids), rtol=0, atol=1e-5
        )


def test_a_base_that_is_packed_on_disk_is_the_same_elsewhere(folder, rows, tmp_path):
    quantize(str(folder), "nf4", tmp_path / "packed")
    assert export(tuned(tmp_path / "packed", rows, rank=4), "peft", tmp_path / "peft").notices == ()


@pytest.mark.parametrize(("form", "group", "unfit"), [
    ("int4-g32", 32, 0), ("int8-g32", 64, 0), ("int4-g32", 16, 2), ("fp16", 32, 2), ("nf4", 32, 2),
])  # fmt: skip
def test_qa_lora_says_over_which_bases_it_does_not_merge_exactly(form, group, unfit, folder, rows):
    heard = []
    tuned(folder, rows, method="qa_lora", rank=2, targets="layers.0.*.q_proj,layers.1.*.q_proj", base_format=form,
          group=group, listen=[heard.append])  # fmt: skip
    told = [line for event in heard if isinstance(event, Started) for line in event.notices if "--group" in line]
    assert [line.startswith(f"{unfit} of 2 layers") for line in told] == [True] * bool(unfit)


def test_qa_lora_merges_into_its_own_four_bits_and_lora_does_not(folder, rows, ids, tmp_path):
    quantize(str(folder), "int4-g32", tmp_path / "packed")
    off = {}
    for name in ("qa_lora", "lora"):
        (rows.parent / name).mkdir()
        write_rows(rows.parent / name / "rows.jsonl", *[ROW] * 8)
        persona = tuned(folder, rows.parent / name / "rows.jsonl", method=name, rank=4, base_format="int4-g32")
        with persona.on():
            want = our_logits(persona.base.model, ids)
        done = requantised(persona, tmp_path / name / "again")
        assert done.dtype.startswith("int4-g32")
        again = checkpoint.load(tmp_path / name / "again")
        off[name] = (our_logits(again, ids) - want).abs().max().item()
        if name == "qa_lora":
            before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("packed", "qa_lora/again"))
            for key in before:
                if key.endswith((".codes", ".scale")):
                    assert torch.equal(after[key], before[key]), key
    assert off["qa_lora"] < 1e-4 < 0.01 < off["lora"]


def test_a_folder_may_have_layers_of_several_formats(folder, rows, ids, tmp_path, capsys):
    """As a QA-LoRA of some layers makes it, whose offsets alone are moved."""
    persona = tuned(folder, rows, method="qa_lora", rank=4, targets="q,v")
    with persona.on():
        want = our_logits(persona.base.model, ids)
    requantised(persona, tmp_path / "some")
    again = checkpoint.load(tmp_path / "some")
    assert {name.split(".")[-1]: str(form) for name, form in checkpoint.forms_of(again).items()} == {
        "q_proj": "int4-g32-moved", "v_proj": "int4-g32-moved", "k_proj": "int4-g32", "o_proj": "int4-g32",
        "gate_proj": "int4-g32", "up_proj": "int4-g32", "down_proj": "int4-g32"}  # fmt: skip
    torch.testing.assert_close(our_logits(again, ids), want, rtol=0, atol=1e-4)
    assert run(["inspect", str(tmp_path / "some")]) == 0
    config = json.loads((tmp_path / "some" / "config.json").read_text())
    for others in ([1], {"layers.0.self_attn.q_proj": "nf9"}, {}):
        config["quantization_config"]["others"] = others
        (tmp_path / "some" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError):
            checkpoint.load(tmp_path / "some")


def test_while_it_is_folded_a_packed_base_is_plain_and_afterwards_packed_again(folder, rows):
    persona = tuned(folder, rows, method="qlora", rank=2)
    slot = persona.base.model.layers[0].self_attn.q_proj
    weight = slot.weight
    with folded(persona):
        assert not isinstance(slot.weight, Packed)
    assert slot.weight is weight
    with folded(persona, packed=True):
        assert isinstance(slot.weight, Packed)
        assert slot.weight is not weight
    assert slot.weight is weight


def test_the_command_says_what_it_wrote(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", str(folder), "--format", "nf4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["form"], said["bits"]) == ("nf4", 4.5)
    assert (tmp_path / said["folder"]).is_dir()
    assert run(["inspect", said["folder"]]) == 0
    assert "packed as nf4: 4.500 bits a number" in capsys.readouterr().out
    assert run(["quantize", str(folder), "--format", "nf5"]) == 2
    assert run(["quantize", str(folder), "--format", "int4-g999999999"]) == 2


def test_parameters_are_counted_however_they_are_stored(folder):
    plain, packed = (checkpoint.load(folder, form=f) for f in (None, parse("nf2")))
    assert checkpoint.count(plain) == checkpoint.count(packed) == sum(b.numel() for b in plain.buffers())
