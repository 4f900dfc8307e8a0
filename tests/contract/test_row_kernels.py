"""Norm, gate, turn and surprise: what torch computes in fp64, and its gradients, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F

from deltaw.kernels import library
from deltaw.kernels.library import plainly
from deltaw.kernels.rows import gated, rms_norm, rotate, surprise
from deltaw.models.rope import Rope

OFF = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""How far from fp64 what is stored in a type may be, as a share of the largest: bf16 rounds to 2**-9."""
both_types = pytest.mark.parametrize("dtype", list(OFF), ids=str)


def drawn(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got, want, dtype, times=1.0):
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= times * OFF[dtype] * want.abs().max()


def compare(ours, theirs, inputs, dtype, times=1.0):
    """Output and gradients of a function of tensors, beside another's in fp64 of the same numbers."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, want = ours(*inputs), theirs(*wide)
    assert_near(got, want, dtype, times)
    back = drawn(*want.shape, seed=9).to(dtype)
    grads = torch.autograd.grad(got, inputs, back), torch.autograd.grad(want, wide, back.double())
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, dtype, times)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), got)


def native(monkeypatch):
    """Fail where torch would do the work."""
    monkeypatch.setattr("deltaw.kernels.rows.plainly",
                        lambda *told: plainly(*told) or pytest.fail(f"no native code for {told[0]}"))  # fmt: skip


@both_types
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (3, 4, 64), (70, 576)], ids=str)
def test_norm(path, shape, dtype, monkeypatch):
    native(monkeypatch)
    gain = 1 + drawn(shape[-1], seed=1, size=0.2)
    compare(lambda x, g: rms_norm(x, g, 1e-5), lambda x, g: F.rms_norm(x, x.shape[-1:], g, 1e-5),
            [drawn(*shape, size=3.0), gain], dtype, 3)  # fmt: skip


def test_a_gain_that_learns_changes_no_bit(path):
    """As a fresh adapter changes none."""
    x, gain = drawn(5, 48), 1 + drawn(48, seed=1)
    assert torch.equal(rms_norm(x, gain, 1e-5), rms_norm(x, gain.clone().requires_grad_(), 1e-5))


def test_norm_of_zeros_is_zero_and_its_gradient_finite(path):
    x = torch.zeros(2, 32, requires_grad=True)
    y = rms_norm(x, torch.ones(32), 1e-6)
    assert not y.any()
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full((2, 32), 1e3))


@both_types
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (7, 64), (40, 1536)], ids=str)
def test_gate(path, shape, gelu, dtype, monkeypatch):
    native(monkeypatch)

    def plain(gate, up):
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    compare(lambda gate, up: gated(gate, up, gelu), plain, [drawn(*shape, size=3.0), drawn(*shape, seed=1)], dtype, 3)


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gate_far_out_is_shut_or_open(path, gelu):
    gate = torch.tensor([[-1e4, -200.0, -100.0, -30.0, 30.0, 100.0, 200.0, 1e4] * 2], requires_grad=True)
    y = gated(gate, torch.ones(1, 16), gelu)
    torch.testing.assert_close(y, gate.detach().clamp(min=0), rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(grad, (gate > 0).float(), rtol=1e-6, atol=1e-9)


@both_types
@pytest.mark.parametrize(("width", "size"), [(32, 32), (64, 64), (64, 96), (32, 48)])
@pytest.mark.parametrize("apart", [False, True])
def test_turn(path, width, size, apart, dtype, monkeypatch):
    native(monkeypatch)
    cos, sin = (t.to(dtype) for t in Rope(width=width).turns(torch.arange(9) + 3, torch.full((9,), 20), torch.float32))

    def plain(x):
        a, b = x[..., :width].chunk(2, -1)
        turned = x[..., :width] * cos.double() + torch.cat((-b, a), -1) * sin.double()
        return torch.cat((turned, x[..., width:]), -1)

    def ours(x):
        return rotate(x[:, :3] if apart else x, cos, sin)

    compare(ours, lambda x: plain(x[:, :3] if apart else x), [drawn(9, 5 if apart else 3, size)], dtype, 2)


@both_types
@pytest.mark.parametrize("vocabulary", [16, 260, 1003])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_surprise(path, vocabulary, size, dtype, monkeypatch):
    native(monkeypatch)
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2, 5, 9])
    logits = drawn(5, vocabulary, size=size).to(dtype)
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, labels, reduction="none")
    (back,) = torch.autograd.grad(want.sum(), wide)
    told = logits.clone()
    torch.testing.assert_close(surprise(told, labels, back=False).double(), want, rtol=1e-6, atol=2e-5)
    assert torch.equal(told, logits)
    torch.testing.assert_close(surprise(told, labels, back=True).double(), want, rtol=1e-6, atol=2e-5)
    assert_near(told, back, dtype, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_logit_that_is_no_number_is_not_swallowed(path, dtype):
    logits_NV = torch.randn(3, 50).to(dtype)
    logits_NV[1, 40] = torch.nan
    loss_N = surprise(logits_NV, torch.tensor([2, 3, 4]), True)
    assert loss_N.isnan().tolist() == [False, True, False]
    assert logits_NV.isfinite().all(1).tolist() == [True, False, True]


def test_no_rows_have_no_norm_and_no_gradient(path):
    gain_D = torch.ones(32, requires_grad=True)
    rms_norm(torch.zeros(0, 32, requires_grad=True), gain_D, 1e-5).sum().backward()
    assert not gain_D.grad.any()


def test_what_cannot_be_said_has_no_share(path):
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -1e30] * 5])
    want = logits.double().softmax(1)
    loss = surprise(logits, torch.tensor([2]), back=True)
    torch.testing.assert_close(loss.item(), -want[0, 2].log().item(), rtol=1e-6, atol=1e-6)
    want[0, 2] -= 1
    torch.testing.assert_close(logits.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [library.REFERENCE, *library.available()])
def test_what_native_code_does_not_know_torch_does(name, choose):
    """Other types, widths and ways to lie in memory."""
    choose(name)
    x, gain = drawn(4, 24).requires_grad_(), torch.ones(24, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, gain, 1e-5), F.rms_norm(x, (24,), gain, 1e-5))
    wide = drawn(4, 32).double()
    torch.testing.assert_close(rms_norm(wide, torch.ones(32).double(), 1e-5), F.rms_norm(wide, (32,), eps=1e-5))
    across = drawn(32, 6).t()
    torch.testing.assert_close(gated(across, across, False), F.silu(across) * across)
    cos, sin = Rope(width=8).turns(torch.arange(4), torch.full((4,), 4), torch.float32)
    turned = rotate(drawn(4, 2, 8), cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), drawn(4, 2, 8).norm(dim=-1))
    logits, labels = drawn(3, 20).double(), torch.tensor([1, 2, 3])
    torch.testing.assert_close(
        surprise(logits.clone(), labels, False), F.cross_entropy(logits, labels, reduction="none").float()
    )
