"""What a layer's inputs are like, and how much its weights matter: measured by deltas that change nothing.

Both need a few rows of data to pass through the model; nothing of the size of the weights is kept.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from deltaw.models.slots import Delta, Linear, filled


class Importance(Delta):
    """Sums over rows of data of the squared gradient of W, by outputs and by inputs: Fisher's diagonal.

    Each row of data must be passed backward by itself: squares are of its whole gradient.
    """

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.rows_O, self.columns_I = torch.zeros(o), torch.zeros(i)
        self.awake = nn.Parameter(torch.zeros(()))
        """Asks for a backward pass where nothing before this layer is trained."""

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        y_TO = slot.run(x_TI) + self.awake
        y_TO.register_hook(partial(self.weigh, x_TI.detach()))  # type: ignore[no-untyped-call]  # torch's
        return y_TO

    def weigh(self, x_TI: Tensor, dy_TO: Tensor) -> None:
        """Take in the gradient of W by a row of data, from that of what came out."""
        squares_OI = (dy_TO.float().t() @ x_TI.float()).square()
        self.rows_O += squares_OI.sum(1).cpu()
        self.columns_I += squares_OI.sum(0).cpu()


class Inputs(Delta):
    """Sum of x x' over all tokens, I x I, in fp32."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.products_II = torch.zeros(i, i)

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        self.products_II += (x_TI.float().t() @ x_TI.float()).cpu()
        return slot.run(x_TI)


def importance(slots: Mapping[str, Linear], losses: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """How much outputs and inputs of each layer matter: roots of the mean squared gradients, by layer name.

    `losses`: of one row of data each, computed as they are asked for. No root is zero: dead outputs count little.
    """
    watched = {name: Importance(*slot.weight.shape) for name, slot in slots.items()}
    with filled((slot, watched[name]) for name, slot in slots.items()), torch.enable_grad():
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return {name: (_root(w.rows_O / len(w.columns_I)), _root(w.columns_I / len(w.rows_O)))
            for name, w in watched.items()}  # fmt: skip


def _root(means_N: Tensor) -> Tensor:
    """Of each, at least a thousandth of what is usual."""
    root_N = means_N.sqrt()
    usual = root_N.mean()
    return root_N.clamp(min=1e-3 * float(usual)) if usual > 0 else torch.ones_like(root_N)
