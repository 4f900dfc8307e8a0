"""§2, LoRA-FA: A stays, x is not kept, the projected gradient is the least-squares one, files may hold B alone."""

from copy import deepcopy

import pytest
import torch
from conftest import write_tiny
from oracles import our_logits, scramble
from peft import PeftModel
from safetensors import safe_open
from test_lora import SMOLLM2
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter, Site
from deltaw.errors import UserError
from deltaw.files import adapters, peft
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear
from deltaw.weights import Dense

T, D, HIDDEN, LAYERS = 24, 32, 64, 2


def fresh(name, model, **chosen):
    return Adapter.build(method(name, **chosen), model, 3)


def loss(model, ids):
    return torch.nn.functional.cross_entropy(our_logits(model, ids)[:-1], ids[1:])


def kept_bytes(model, adapter, ids):
    """Bytes of all that one pass keeps for its way back, each storage once, without weights."""
    held = {t.untyped_storage().data_ptr() for t in (*model.buffers(), *adapter.parameters(), *adapter.buffers())}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no other takes its place
        return t

    with adapter.on(), saved_tensors_hooks(keep, lambda t: t):
        out = loss(model, ids)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), out


@pytest.mark.parametrize(
    ("targets", "per_layer"), [("all-linear", 3 * D + HIDDEN), ("q,v", D), ("up", D), ("o", D), ("down", HIDDEN)]
)
def test_what_is_kept_falls_by_the_inputs_of_the_adapted_layers(targets, per_layer, tiny, ids):
    """q, k and v share an input, gate and up another; o's is laid flat anew from what attention keeps."""
    whole, _ = kept_bytes(tiny, fresh("lora", tiny, targets=targets, rank=4), ids)
    frozen, _ = kept_bytes(tiny, fresh("lora_fa", tiny, targets=targets, rank=4), ids)
    assert whole - frozen == LAYERS * T * 4 * per_layer


def test_dropout_keeps_no_mask_of_the_inputs(tiny, ids):
    plain, _ = kept_bytes(tiny, fresh("lora_fa", tiny, rank=4), ids)
    dropped, _ = kept_bytes(tiny, fresh("lora_fa", tiny, rank=4, dropout=0.5).train(), ids)
    sites = 7 * LAYERS
    assert 0 < dropped - plain <= sites * T * 4 * (4 + 1)


def test_a_stays_as_it_was_drawn_and_b_learns(tiny, ids):
    adapter = fresh("lora_fa", tiny).train()
    before = deepcopy(adapter.state_dict())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    with adapter.on():
        for _ in range(10):
            loss(tiny, ids).backward()
            optimizer.step()
    for name, t in adapter.state_dict().items():
        assert torch.equal(t, before[name]) == name.endswith("A"), name
    assert {name.rsplit(".", 1)[-1] for name, _ in adapter.named_parameters()} == {"B"}


def test_the_numbers_trained_are_those_of_b():
    """1,244,160 with rank 8 on SmolLM2, as the specification counts; and half and more of LoRA's go."""
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    sites = method("lora_fa").sites(model)
    assert sum(8 * site.slot.weight.shape[0] for site in sites) == 1_244_160


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("alpha", [4.0, 24.0])
def test_the_projected_gradient_is_the_least_squares_one(init, alpha):
    """g minimises |scale * g A - G|, with G the gradient of W itself; also when several passes are added up."""
    rng = torch.Generator().manual_seed(1)
    W_OI = torch.randn(20, 30, generator=rng)
    slot = Linear(Dense(W_OI))
    made = method("lora_fa", rank=6, alpha=alpha, init=init, project=True)
    (site,) = made.plan([Site("q", slot)])
    delta = made.build(site, rng)
    slot.fill(delta)
    whole = W_OI.double().requires_grad_()
    for _ in range(3):
        x_TI, out_TO = torch.randn(11, 30, generator=rng), torch.randn(11, 20, generator=rng)
        (slot(x_TI) * out_TO).sum().backward()
        ((x_TI.double() @ whole.t()) * out_TO).sum().backward()
    scaled_RI = delta.scale * delta.A.double()
    want = torch.linalg.lstsq(scaled_RI.t(), whole.grad.t()).solution.t()
    torch.testing.assert_close(delta.B.grad.double(), want, rtol=1e-5, atol=1e-5)


def test_two_projected_adapters_on_one_model_do_not_meddle(tiny, ids):
    alone = fresh("lora_fa", tiny, project=True)
    with alone.on():
        loss(tiny, ids).backward()
    one, two = fresh("lora_fa", tiny, project=True), fresh("lora_fa", tiny, project=True, rank=5)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    for adapter in (two, one):
        with adapter.on():
            loss(tiny, ids).backward()
    for a, b in zip(alone.parameters(), one.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    optimizer.step()
    assert all(p.detach().any() for p in (*one.parameters(), *two.parameters()))


def test_with_a_seed_files_hold_b_alone_and_a_comes_back(tiny, tiny_path, ids, tmp_path):
    adapter = scramble(fresh("lora_fa", tiny, a_seed=5)).eval()
    header = adapters.Header.of(adapter, "tiny", checkpoint.fingerprint(tiny))
    adapters.save(adapter, header, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert {name.rsplit(".", 1)[-1] for name in file.keys()} == {"B"}  # noqa: SIM118 (safe_open is no mapping)
    again = adapters.load(tmp_path / "b.safetensors", checkpoint.load(tiny_path))
    for (_, one), (_, two) in zip(adapter.named_deltas(), again.named_deltas(), strict=True):
        assert torch.equal(one.A, two.A)
    drawn = [tuple(delta.A.flatten()[:4].tolist()) for _, delta in again.named_deltas()]
    assert len(set(drawn)) == len(drawn)  # every layer has its own


def test_rows_of_a_are_orthonormal_where_that_is_asked_for(tiny):
    for _, delta in fresh("lora_fa", tiny, init="orthogonal", rank=8).named_deltas():
        torch.testing.assert_close(delta.A @ delta.A.t(), torch.eye(8), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="33 rows of 32 numbers cannot be orthogonal"):
        fresh("lora_fa", tiny, init="orthogonal", rank=33)


def test_peft_computes_what_we_do(tmp_path, ids):
    write_tiny(tmp_path / "base")
    model = checkpoint.load(tmp_path / "base")
    adapter = scramble(fresh("lora_fa", model, rank=3, alpha_pattern={"mlp.*": 7.0})).eval()
    with adapter.on():
        want = our_logits(model, ids)
    (tmp_path / "theirs").mkdir()
    peft.write(adapter, model, str(tmp_path / "base"), tmp_path / "theirs")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        got = PeftModel.from_pretrained(hf, tmp_path / "theirs")(ids[None]).logits[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
