"""What every method must do, whatever it is. A new file in deltaw/methods is tested here without any edit."""

from contextlib import suppress
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from peft import PeftModel
from small import end, gone_on, stopping_at
from transformers import AutoModelForCausalLM
from variants import CASES, VARIANTS

from deltaw.adapters.adapter import Adapter, bare
from deltaw.api.merge import unpacked
from deltaw.errors import UserError
from deltaw.files import adapters, peft
from deltaw.methods import find, method, name_of, names
from deltaw.methods.full import Whole
from deltaw.models import checkpoint
from deltaw.models.seen import Documents
from deltaw.models.slots import Affine, Before, CannotMerge, Delta, Linear, Slot
from deltaw.settings import plain
from deltaw.weights.formats import parse

each_method = pytest.mark.parametrize(("name", "chosen"), CASES)


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, {"tie_word_embeddings": request.param, "attention_bias": not request.param})
    return folder


@pytest.fixture
def model(folder):
    return checkpoint.load(folder)


def fresh(name, chosen, model, seed=0):
    return Adapter.build(method(name, **chosen), model, seed).eval()


def loss_of(model, ids):
    return F.cross_entropy(our_logits(model, ids)[:-1], ids[1:])


def assert_same_bits(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@each_method
def test_a_fresh_adapter_leaves_the_model_as_it_was(name, chosen, model, ids):
    before = our_logits(model, ids)
    adapter = fresh(name, chosen, model)
    with adapter.on():
        if adapter.method.identity_at_start:
            assert torch.equal(our_logits(model, ids), before)
    assert torch.equal(our_logits(model, ids), before)


@each_method
@pytest.mark.parametrize("form", [None, "int4-g32"])
def test_an_adapter_has_memory_of_its_own(name, chosen, form, folder):
    """Else loading another state of it would change the base."""
    if name in ("qlora", "qa_lora", "loftq", "lq_lora", "prefix_tuning") or form is None:
        model = checkpoint.load(folder, form=form and parse(form))
        at = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        assert not at & {t.untyped_storage().data_ptr() for t in fresh(name, chosen, model).state_dict().values()}


@each_method
def test_training_moves_only_the_adapter_and_learns(name, chosen, model, ids):
    adapter = fresh(name, chosen, model).train()
    frozen = deepcopy(model.state_dict())
    assert not list(model.parameters())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    torch.manual_seed(0)
    with adapter.on():
        first = loss_of(model, ids).item()
        for step in range(30):
            loss_of(model, ids).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
            if step:  # at the start one factor of a product may be zero
                assert all(p.grad.any() for p in adapter.parameters())
            optimizer.step()
            optimizer.zero_grad()
        adapter.eval()
        assert loss_of(model, ids).item() < first - 0.1
    assert_same_bits(model, frozen)


@each_method
def test_merging_computes_the_same_and_unmerging_restores_every_bit(name, chosen, model, ids):
    adapter = scramble(fresh(name, chosen, model))
    before, bare_logits = deepcopy(model.state_dict()), our_logits(model, ids)
    with adapter.on():
        worn = our_logits(model, ids)
    try:
        adapter.merge()
    except CannotMerge:
        assert_same_bits(model, before)
        return
    merged = our_logits(model, ids)
    torch.testing.assert_close(merged, worn, rtol=0, atol=1e-4)
    assert not torch.allclose(merged, bare_logits, atol=1e-2)
    assert all(slot.delta is None for slot in model.modules() if isinstance(slot, Slot))
    adapter.unmerge()
    assert_same_bits(model, before)
    assert torch.equal(our_logits(model, ids), bare_logits)


@each_method
def test_merging_again_or_another_on_top_is_undone_in_turn(name, chosen, model):
    before = deepcopy(model.state_dict())
    one, two = scramble(fresh(name, chosen, model)), scramble(fresh("lora", {}, model), seed=8)
    for adapter in (one, one, two):
        with suppress(CannotMerge):
            adapter.merge()
    if two._aside and {slot for slot, *_ in one._aside} & {slot for slot, *_ in two._aside}:
        after = deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="unmerge that one first"):
            one.unmerge()
        assert_same_bits(model, after)
    two.unmerge()
    one.unmerge()
    assert_same_bits(model, before)


def test_an_adapter_of_which_a_part_cannot_be_merged_is_not_merged_at_all(model):
    adapter = scramble(fresh("lora", {}, model))
    last = list(adapter.deltas)[-1]
    adapter.deltas[last] = Delta()
    before = deepcopy(model.state_dict())
    with pytest.raises(CannotMerge):
        adapter.merge()
    assert_same_bits(model, before)
    adapter.unmerge()
    assert_same_bits(model, before)


@each_method
def test_asking_for_the_merged_form_changes_nothing(name, chosen, model, ids):
    adapter = scramble(fresh(name, chosen, model))
    before, own = deepcopy(model.state_dict()), deepcopy(adapter.state_dict())
    for slot, delta in adapter.items():
        with suppress(CannotMerge):
            delta.merged(slot)
        delta.served(slot)
    assert_same_bits(model, before)
    assert_same_bits(adapter, own)


@each_method
def test_the_served_form_computes_the_same(name, chosen, model):
    adapter = scramble(fresh(name, chosen, model))
    rng = torch.Generator().manual_seed(3)
    for slot, delta in adapter.items():
        form = delta.served(slot)
        if form is None:
            continue
        if isinstance(form, Before):  # its own keys and values, of some tokens that see nothing else before them
            q, *kv = (torch.randn(4, n, slot.head_width, generator=rng) for n in (slot.heads, *[slot.kv_heads] * 2))
            whole = [torch.cat(pair) for pair in zip(form, kv, strict=True)]
            filled = torch.cat((torch.zeros(len(form.k_PKE), *q.shape[1:]), q))
            want = slot.run(filled, *whole, Documents.of_lengths(len(filled)))[len(form.k_PKE) :]
            torch.testing.assert_close(delta(slot, q, *kv, Documents.of_lengths(4)), want, rtol=0, atol=1e-5)
            continue
        assert isinstance(form, Affine)
        x_TI = torch.randn(5, slot.weight.shape[1], generator=rng)
        y_TO = F.linear(x_TI, slot.weight.dense()) * (1 if form.gain_O is None else form.gain_O)
        y_TO = y_TO + form.scale * (x_TI @ form.A_RI.t() @ form.B_OR.t())
        bias = slot.bias if form.bias_O is None else form.bias_O
        torch.testing.assert_close(delta(slot, x_TI), y_TO if bias is None else y_TO + bias, rtol=0, atol=1e-5)


@each_method
def test_saving_and_loading_on_a_fresh_base_changes_no_bit(name, chosen, model, folder, ids, tmp_path):
    adapter = scramble(fresh(name, chosen, model))
    with adapter.on():
        want = our_logits(model, ids)
    header = adapters.Header.of(adapter, "tiny", checkpoint.fingerprint(model))
    adapters.save(adapter, header, tmp_path / "persona.safetensors")
    clean = checkpoint.load(folder)
    again = adapters.load(tmp_path / "persona.safetensors", clean)
    assert again.method == adapter.method
    with again.on():
        assert torch.equal(our_logits(clean, ids), want)


@each_method
def test_what_peft_can_take_is_the_same_there_and_when_it_comes_back(name, chosen, model, folder, ids, tmp_path):
    """And whatever is of low rank, with gains or without, it can take."""
    adapter = scramble(fresh(name, chosen, model))
    with adapter.on():
        want = our_logits(model, ids)
    every = adapter.forms()
    forms = [every[layer] for layer, delta in adapter.named_deltas()
             if delta.lasting and not isinstance(delta, Whole)]  # fmt: skip
    try:
        peft.write(adapter.method.finished(adapter), model, str(folder), tmp_path)
    except UserError:
        if forms and all(form is not None and form.bias_O is None for form in forms):
            raise
        return
    with peft.read(tmp_path, model).on():
        torch.testing.assert_close(our_logits(model, ids), want, rtol=0, atol=1e-4)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    torch.testing.assert_close(hf_logits(theirs, ids), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["nf4-dq", "nf3-b32-s4.fp16.64", "int4-g32", "int8"])
@pytest.mark.parametrize("name", names())
def test_any_method_works_over_a_packed_base(name, form, folder, ids):
    model = checkpoint.load(folder, form=parse(form))
    bare_logits, packed = our_logits(model, ids), deepcopy(model.state_dict())
    adapter = fresh(name, VARIANTS[name][0], model)
    if adapter.method.identity_at_start:
        with adapter.on():
            assert torch.equal(our_logits(model, ids), bare_logits)
    with adapter.train().on():
        loss_of(model, ids).backward()
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())
    scramble(adapter).eval()
    with adapter.on():
        worn = our_logits(model, ids)
    with unpacked(model):
        try:
            adapter.merge()
        except CannotMerge:
            pass
        else:
            torch.testing.assert_close(our_logits(model, ids), worn, rtol=0, atol=1e-4)
            adapter.unmerge()
    assert_same_bits(model, packed)
    assert torch.equal(our_logits(model, ids), bare_logits)


@pytest.mark.parametrize("name", names())
def test_a_run_that_was_stopped_ends_with_the_same_bits(name, ready, rows_file):
    chosen = {"method": name, "steps": 4, "evaluations": 2, "micro_tokens": 128, "learning_rate": 0.001}
    whole, broken = ready(**chosen), ready(stopping_at(6), **chosen)
    list(whole.events())
    assert end(list(broken.events())).reason == "interrupted"
    assert end(list(gone_on(broken.job.run.folder).events())).reason == "done"
    assert broken.job.run.adapter.read_bytes() == whole.job.run.adapter.read_bytes()


@each_method
def test_swapping_back_and_forth_leaves_no_trace(name, chosen, model, ids):
    one, two = scramble(fresh(name, chosen, model)), scramble(fresh("lora", {}, model), seed=8)
    before = our_logits(model, ids)
    with one.on():
        want = our_logits(model, ids)
    with two.on():
        assert not torch.equal(our_logits(model, ids), want)
    with one.on():
        assert torch.equal(our_logits(model, ids), want)
    assert torch.equal(our_logits(model, ids), before)


@each_method
def test_an_adapter_inside_another_gives_way_to_it_again(name, chosen, model, ids):
    outer, inner = scramble(fresh(name, chosen, model)), scramble(fresh("lora", {"targets": "q,up"}, model), seed=8)
    with outer.on():
        want = our_logits(model, ids)
        with inner.on():
            assert not torch.equal(our_logits(model, ids), want)
        assert torch.equal(our_logits(model, ids), want)
        with bare(model):
            nothing = our_logits(model, ids)
        assert torch.equal(our_logits(model, ids), want)
    assert torch.equal(our_logits(model, ids), nothing)


@each_method
def test_an_adapter_comes_off_when_the_work_under_it_fails(name, chosen, model, ids):
    before = our_logits(model, ids)
    with pytest.raises(ZeroDivisionError), scramble(fresh(name, chosen, model)).on():
        _ = 1 / 0
    assert torch.equal(our_logits(model, ids), before)


@each_method
def test_the_seed_decides_the_adapter_and_leaves_the_global_random_state_alone(name, chosen, model):
    state = torch.get_rng_state()
    one, again = fresh(name, chosen, model, 3).state_dict(), fresh(name, chosen, model, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert one.keys() == again.keys()
    assert all(torch.equal(one[k], again[k]) for k in one)


@each_method
def test_over_a_bf16_base_the_adapter_stays_fp32_and_the_outputs_bf16(name, chosen, folder, ids):
    model = checkpoint.load(folder, torch.bfloat16)
    before = our_logits(model, ids)
    adapter = fresh(name, chosen, model)
    with adapter.on():
        logits_TV = our_logits(model, ids)
        if adapter.method.identity_at_start:
            assert torch.equal(logits_TV, before)
        logits_TV.float().sum().backward()
    assert logits_TV.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())


@each_method
def test_settings_survive_being_written_down(name, chosen):
    made = method(name, **chosen)
    assert method(name, **plain(made)) == made
    assert name_of(made) == name
    with pytest.raises(UserError, match="Unknown setting 'rannk'"):
        method(name, rannk=3)


@pytest.mark.parametrize("name", names())
def test_targets_that_name_nothing_are_refused_with_the_nearest(name, model):
    there = find(name).kinds
    wrong, right = ("up_prol", "'up_proj'") if Linear in there else ("atend", "'attend'")
    with pytest.raises(UserError, match=rf"'{wrong}' names no layer.*{right}"):
        Adapter.build(method(name, targets=wrong), model)
    with pytest.raises(UserError, match="no targets"):
        Adapter.build(method(name, targets=" , "), model)


def test_there_is_no_method_but_those_in_the_folder():
    with pytest.raises(UserError, match=r"no method 'lorra'.*'lora'"):
        find("lorra")
    assert {"lora", "full"} <= set(names())
