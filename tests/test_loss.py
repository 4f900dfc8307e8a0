"""The chunked loss is cross entropy, value and gradients, at every edge of a chunk, and keeps nothing as wide as V."""

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from hypothesis import given, settings, strategies as st
from torch.autograd.graph import saved_tensors_hooks

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import IGNORED, lay
from deltaw.data.encode import Encoded
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.scoring.loss import CHUNK_TOKENS, batch_loss, cross_entropy
from deltaw.weights import Dense

D, V = 16, 37


def problem(labelled, unlabelled=5, seed=0, dtype=torch.float32):
    """Hidden states, a head and labels of which so many count, strewn among the others."""
    rng = torch.Generator().manual_seed(seed)
    tokens = labelled + unlabelled
    labels_T = torch.full((tokens,), IGNORED)
    labels_T[torch.randperm(tokens, generator=rng)[:labelled]] = torch.randint(0, V, (labelled,), generator=rng)
    h_TD, head_VD = (torch.randn(n, D, generator=rng) for n in (tokens, V))
    return h_TD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), labels_T


def exact(h_TD, head_VD, labels_T, scale=1.0, cap=0.0):
    """Loss and gradients by torch in fp64."""
    h, head = (x.detach().double().requires_grad_() for x in (h_TD, head_VD))
    z = F.linear(h, head)
    z = cap * (z / cap).tanh() if cap else z
    loss = F.cross_entropy(z, labels_T, reduction="sum", ignore_index=IGNORED)
    (loss * scale).backward()
    return loss.detach(), h.grad, head.grad


@pytest.mark.parametrize("cap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("labelled", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7])
def test_loss_and_gradients_are_those_of_cross_entropy(labelled, cap):
    h_TD, head_VD, labels_T = problem(labelled)
    want, dh_TD, dhead_VD = exact(h_TD, head_VD, labels_T, scale=0.3, cap=cap)
    loss = cross_entropy(h_TD, head_VD, labels_T, cap)
    (loss * 0.3).backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h_TD.grad.double(), dh_TD, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(head_VD.grad.double(), dhead_VD, rtol=1e-5, atol=1e-5)


def test_without_labels_the_loss_is_zero_and_so_are_its_gradients():
    h_TD, head_VD, labels_T = problem(0)
    loss = cross_entropy(h_TD, head_VD, labels_T)
    loss.backward()
    assert loss == 0
    assert not h_TD.grad.any()
    assert not head_VD.grad.any()


@settings(deadline=None, max_examples=40)
@given(labelled=st.integers(0, 2 * CHUNK_TOKENS), unlabelled=st.integers(0, 20), seed=st.integers(0, 99))
def test_what_is_not_labelled_counts_nothing(labelled, unlabelled, seed):
    h_TD, head_VD, labels_T = problem(labelled, unlabelled, seed)
    whole = cross_entropy(h_TD, head_VD, labels_T)
    whole.backward()
    counted = labels_T != IGNORED
    assert not h_TD.grad[~counted].any()
    torch.testing.assert_close(whole, cross_entropy(h_TD[counted], head_VD, labels_T[counted]), rtol=0, atol=0)


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 300), seed=st.integers(0, 9))
def test_the_loss_of_the_whole_is_the_sum_of_its_parts(cut, seed):
    h_TD, head_VD, labels_T = problem(290, 10, seed)
    parts = [cross_entropy(h_TD[s], head_VD, labels_T[s]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), cross_entropy(h_TD, head_VD, labels_T), rtol=1e-5, atol=1e-4)


def test_in_bf16_the_sum_is_fp32_and_the_gradient_as_good_as_bf16_allows():
    h_TD, head_VD, labels_T = problem(300, dtype=torch.bfloat16)
    loss = cross_entropy(h_TD, head_VD, labels_T)
    loss.backward()
    assert loss.dtype == torch.float32
    assert h_TD.grad.dtype == head_VD.grad.dtype == torch.bfloat16
    want, dh_TD, dhead_VD = exact(h_TD, head_VD, labels_T)
    torch.testing.assert_close(loss.double(), want, rtol=2e-3, atol=0)
    for got, exactly in ((h_TD.grad, dh_TD), (head_VD.grad, dhead_VD)):
        assert (got.double() - exactly).norm() <= 0.01 * exactly.norm()


def test_large_logits_do_not_overflow():
    h_TD, head_VD, labels_T = problem(10)
    with torch.no_grad():
        h_TD *= 1000
    loss = cross_entropy(h_TD, head_VD, labels_T)
    loss.backward()
    torch.testing.assert_close(loss.double(), exact(h_TD, head_VD, labels_T)[0], rtol=1e-5, atol=0)
    assert h_TD.grad.isfinite().all()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf = write_tiny(folder, {"tie_word_embeddings": request.param})
    return checkpoint.load(folder), hf


def row(n=150):
    ids = torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(2)).tolist()
    return Encoded(tuple(ids), (False,) * 10 + (True,) * (n - 10))


def test_the_loss_of_a_batch_and_all_its_gradients_are_those_of_transformers(model):
    ours, hf = model
    batch = lay([row()])
    adapter = Adapter.build(method("full"), ours)
    with adapter.on():
        loss = batch_loss(ours, batch)
        (loss / batch.targets).backward()
    hf.zero_grad()
    labels = torch.tensor([i if t else IGNORED for i, t in zip(row().ids, row().trained, strict=True)])
    theirs = hf(torch.tensor(row().ids)[None], labels=labels[None]).loss
    theirs.backward()
    assert loss.item() / batch.targets == pytest.approx(theirs.item(), abs=1e-5)
    wanted = {name.removeprefix("model."): p.grad for name, p in hf.named_parameters()}
    got = {f"{name}.weight": delta.value.grad for name, delta in adapter.named_deltas()}
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_recomputing_layers_gives_the_same_loss_and_gradients(model):
    ours, _ = model
    adapter = Adapter.build(method("lora", rank=2), ours)
    grads = []
    for recompute in (False, True):
        adapter.zero_grad()
        with adapter.on():
            loss = batch_loss(ours, lay([row()]), recompute)
            loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in adapter.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def wide_tensors_kept(model, loss_of_hidden):
    """Shapes of the tensors with a vocabulary-wide side, other than the head, that are saved for the backward pass."""
    adapter = Adapter.build(method("lora", rank=2), model)
    batch, kept = lay([row()]), []
    with adapter.on(), saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss_of_hidden(model.hidden(batch.ids_T, batch.at_T, batch.seen), batch.labels_T).backward()
    head = model.head_VD().data_ptr()
    return [t.shape for t in kept if t.ndim > 1 and model.config.vocab in t.shape and t.data_ptr() != head]


def test_with_a_frozen_head_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass(model):
    ours, _ = model
    assert wide_tensors_kept(ours, lambda h_TD, labels_T: F.cross_entropy(ours.logits(h_TD), labels_T))
    assert not wide_tensors_kept(ours, lambda h_TD, labels_T: cross_entropy(h_TD, ours.head_VD(), labels_T))


def test_a_second_derivative_is_refused_and_not_wrong():
    h_TD, head_VD = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    (first,) = torch.autograd.grad(cross_entropy(h_TD, head_VD, torch.arange(4)) ** 2, h_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    x_TI = torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad((Dense(head_VD)(x_TI) ** 2).sum(), x_TI, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
