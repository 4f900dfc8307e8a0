"""Cross entropy of the labelled tokens, in chunks: the logits of all tokens never exist at once.

The gradient towards the hidden states is computed in the forward pass, while a chunk's logits are at hand (as in
Liger's fused linear cross entropy, arXiv:2410.10989); with a frozen head nothing else is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.data.batch import IGNORED, Batch
from deltaw.kernels.products import summed
from deltaw.kernels.rows import surprise
from deltaw.models.decoder import Decoder

CHUNK_TOKENS = 256
"""Measured best on two cores: with fewer the head is read too often, with more their logits leave the cache."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over N of -log softmax(z)[label] with z = h W', or cap * tanh(h W' / cap)."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, cap: float) -> Tensor:
        wants_h, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if wants_h else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        room_NV = torch.empty(min(CHUNK_TOKENS, len(h_ND)), len(head_VD), dtype=h_ND.dtype, device=h_ND.device)
        for start in range(0, len(labels_N), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits_NV = summed([(h_ND[rows], head_VD.t())], to=room_NV[: len(h_ND[rows])])
            if cap:
                bent_NV = logits_NV.float().div_(cap).tanh_()
                logits_NV = bent_NV * cap
            total += surprise(logits_NV, labels_N[rows], wants_h or wants_head).sum()
            if dh_ND is None and dhead_VD is None:
                continue
            if cap:
                logits_NV *= 1 - bent_NV**2
            dlogits_NV = logits_NV.to(h_ND.dtype)
            if dh_ND is not None:
                summed([(dlogits_NV, head_VD)], to=dh_ND[rows])
            if dhead_VD is not None:
                dhead_VD += dlogits_NV.t() @ h_ND[rows]
        ctx.save_for_backward(dh_ND, None if dhead_VD is None else dhead_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if d is None else d * scale.to(d.dtype) for d in ctx.saved_tensors)
        return *gradients, None, None


def cross_entropy(h_TD: Tensor, head_VD: Tensor, labels_T: Tensor, cap: float = 0.0) -> Tensor:
    """Sum of -log p(label), in nats, over the tokens whose label is not -100; logits are bent below `cap`."""
    rows_N = (labels_T != IGNORED).nonzero()[:, 0]
    apply: Any = ChunkedCrossEntropy.apply
    loss: Tensor = apply(h_TD[rows_N], head_VD, labels_T[rows_N], cap)
    return loss


def batch_loss(model: Decoder, batch: Batch, recompute: bool = False, depth: int | None = None) -> Tensor:
    """Summed loss of a batch as the model is now; divide by the targets of the whole step, once."""
    h_TD = model.hidden(batch.ids_T, batch.at_T, batch.seen, recompute, depth)
    return cross_entropy(h_TD, model.head_VD(), batch.labels_T, model.config.logit_cap)
