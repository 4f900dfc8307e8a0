"""A layer has a slot; a delta fills it. The contract between the frozen model and whatever adapts it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.kernels.rows import rms_norm
from deltaw.models.rope import Rope
from deltaw.models.seen import Score, Seen
from deltaw.weights import Weight

Parts = dict[str, Any]
"""Attributes of a slot by name, such as `weight` and `bias`."""


class CannotMerge(Exception):
    """No weights of the plain layer do what this delta does."""


class Affine(NamedTuple):
    """What a server needs to run a linear delta beside others: y = gain * (W x) + scale * B A x + bias."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0
    gain_O: Tensor | None = None
    bias_O: Tensor | None = None


class Before(NamedTuple):
    """What a server needs to run attention that sees something before the first token: keys and values."""

    k_PKE: Tensor
    v_PKE: Tensor


class Terms(NamedTuple):
    """What a linear layer does: y = gain * (W x) + scale * B A x + bias. In parts, neighbours are computed as one."""

    weight: Weight
    bias_O: Tensor | None = None
    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scale: float = 1.0
    gain_O: Tensor | None = None


class Delta(nn.Module):
    """What one adapter does at one slot. Its parameters are trained; its state dict is what is saved."""

    heads = True
    """Whether a head that shares an embedding's table follows what this does to it."""
    lasting = True
    """Whether this does anything outside of training."""
    before = 0
    """How many tokens this puts before the first of every document: positions begin after them."""
    pace: Mapping[str, float] = MappingProxyType({})
    """How many times the learning rate some parameters learn with."""
    undecayed: Collection[str] = ()
    """Parameters that weight decay leaves alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Called as `forward(slot, *args)`: the layer's output; `slot.run(*args)` is its frozen part."""
        raise NotImplementedError

    def merged(self, slot: Any) -> Parts:
        """Give the slot's own parts, changed so that the empty slot does the same. Pure: touches nothing.

        Raises:
            CannotMerge: no weights of the plain layer do what this delta does.
        """
        raise CannotMerge(f"{type(self).__name__} at {type(slot).__name__}")

    def terms(self, slot: "Linear") -> Terms | None:  # noqa: ARG002 (the contract's argument; some deltas need it)
        """Give what `forward` does now at a linear layer, if it is of this form; None: it is not."""
        return None

    def served(self, slot: Any) -> Affine | Before | None:  # noqa: ARG002 (the contract's argument; most deltas need it)
        """Give the form in which a server mixes this with other adapters in one batch; None: only worn by itself."""
        return None


class Slot(nn.Module):
    """A layer an adapter may change. Subclasses write `run`; nobody overrides `forward`."""

    delta: Delta | None = None

    def fill(self, delta: Delta | None) -> None:
        """Put a delta in, or take it out. It stays outside the module tree: the model never owns adapter weights."""
        object.__setattr__(self, "delta", delta)

    def swap(self, parts: Mapping[str, Any]) -> None:
        """Replace parts by name, without copying any."""
        for name, part in parts.items():
            setattr(self, name, part.detach() if isinstance(part, Tensor) else part)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the frozen layer's output."""
        raise NotImplementedError

    def forward(self, *args: Any) -> Tensor:
        """Compute the layer's output, through the delta if there is one."""
        y: Tensor = self.run(*args) if self.delta is None else self.delta(self, *args)
        return y


@contextmanager
def lent(parts: Iterable[tuple[object, str, Any]], put: Callable[[Any, str, Any], None] = setattr) -> Iterator[None]:
    """Let attributes (an owner, a name) be these for the length of a `with` block; then they are what they were."""
    before = [(owner, name, getattr(owner, name), part) for owner, name, part in parts]
    try:
        for owner, name, _, part in before:
            put(owner, name, part)
        yield
    finally:
        for owner, name, own, _ in before:
            put(owner, name, own)


def filled(deltas: Iterable[tuple[Slot, Delta | None]]) -> AbstractContextManager[None]:
    """Fill slots with these deltas for the length of a `with` block; what was worn before comes back afterwards."""
    return lent(((slot, "delta", delta) for slot, delta in deltas), object.__setattr__)


class Linear(Slot):
    """y = x W' + b."""

    weight: Weight
    bias: Tensor | None

    def __init__(self, weight: Weight, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias_O)

    def run(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self.weight(x_TI)
        return y_TO if self.bias is None else y_TO + self.bias

    def terms(self) -> Terms | None:
        """What this layer does, with what it wears; None: only calling it tells."""
        return Terms(self.weight, self.bias) if self.delta is None else self.delta.terms(self)


class RMSNorm(Slot):
    """x / rms(x) * gain, over the last dimension; with `unit`, the gain is one more (Gemma)."""

    gain: Tensor

    def __init__(self, gain_D: Tensor, eps: float, unit: bool = False) -> None:
        super().__init__()
        self.eps, self.unit = eps, unit
        self.register_buffer("gain", gain_D)

    def run(self, x: Tensor, gain_D: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.by(self.gain if gain_D is None else gain_D, x.dtype), self.eps)

    def by(self, gain_D: Tensor, dtype: torch.dtype) -> Tensor:
        """What x is multiplied with, for this gain."""
        return (1 + gain_D.float()).to(dtype) if self.unit else gain_D


class Embedding(Slot):
    """Row `id` of the table, times `scale`, for every id."""

    table: Tensor

    def __init__(self, table_VD: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("table", table_VD)

    def run(self, ids_T: Tensor, table_VD: Tensor | None = None) -> Tensor:
        x_TD = F.embedding(ids_T, self.table if table_VD is None else table_VD)
        # As in the reference, the factor has the type of the table.
        return x_TD if self.scale == 1 else x_TD * torch.tensor(self.scale, dtype=x_TD.dtype, device=x_TD.device)


PART = {Linear: "weight", RMSNorm: "gain", Embedding: "table"}
"""The attribute of a layer that is its tensor: what is trained of it as a whole, and `weight` in a checkpoint."""


class Positions(Slot):
    """Positions to angles, and how far they reach: cosine and sine, of shape 2 x T x 1 x E."""

    def __init__(self, rope: Rope, context: int) -> None:
        super().__init__()
        self.rope, self.context = rope, context

    def run(self, at_T: Tensor, length_T: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack(self.rope.turns(at_T, length_T, dtype))


class Attend(Slot):
    """Softmax attention of `heads` over keys and values of `kv_heads`; `seen` says which token sees which."""

    def __init__(self, score: Score, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.score, self.heads, self.kv_heads, self.head_width = score, heads, kv_heads, head_width

    def run(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, seen: Seen) -> Tensor:
        return seen.attend(q_THE, k_TKE, v_TKE, self.score)
