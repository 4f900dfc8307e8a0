"""How surprising a label is, by its row of logits: log sum exp(z) - z[label], and what that asks of the logits."""

import torch
from torch import Tensor

from deltaw.kernels.plain import plainly


def surprise(logits_NV: Tensor, labels_N: Tensor, back: bool) -> Tensor:
    """The loss of each row, in nats and fp32. With `back`, logits become its gradient, softmax(z) - onehot(label)."""
    call, labels_N = plainly("surprise", logits_NV), labels_N.contiguous()
    if call is not None:
        loss_N = torch.empty(len(labels_N))
        call(logits_NV.data_ptr(), labels_N.data_ptr(), loss_N.data_ptr(), *logits_NV.shape, back)
        return loss_N
    wide_NV, label_N1 = logits_NV.float(), labels_N[:, None]
    lse_N1 = wide_NV.logsumexp(1, keepdim=True)
    loss_N = (lse_N1 - wide_NV.gather(1, label_N1))[:, 0]
    if back:
        shares_NV = (wide_NV - lse_N1).exp_()
        logits_NV.copy_(shares_NV.scatter_add_(1, label_N1, torch.full_like(lse_N1, -1.0)))
    return loss_N
