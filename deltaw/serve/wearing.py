"""Adapters as a server has them: one piece of memory each, for rows of one batch to wear side by side.

y = W x + b becomes gain * (W x) + scale * B A x + bias, so that what is added to y is (gain - 1) y + scale * B A x and
the rest of the bias.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import time_ns

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.files.atomic import replacing
from deltaw.kernels.worn import Change, Slab, Wear
from deltaw.models.checkpoint import linears
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Affine, Attend, Before, Delta, Linear, filled


@dataclass(frozen=True)
class Served:
    """What an adapter is to a server: `slab` and `before` share a batch with others'; else it is worn `alone`."""

    slab: Slab | None = None
    before: tuple[Before, ...] = ()
    alone: Adapter | None = None
    digest: bytes = b""
    """Of what its files hold, if it came from any."""

    @classmethod
    def of(cls, adapter: Adapter, model: Decoder) -> "Served":
        """An adapter in the form that shares a batch, if there is one."""
        forms, slots = adapter.forms(), dict(linears(model))
        affine = {name: form for name, form in forms.items() if isinstance(form, Affine) and name in slots}
        befores = {name: form for name, form in forms.items() if isinstance(form, Before)}
        if len(affine) + len(befores) < len(forms):
            return cls(alone=adapter)
        changes = [_change(affine[name], slot) if name in affine else None for name, slot in slots.items()]
        layers = [name for name, module in model.named_modules() if isinstance(module, Attend)] if befores else []
        return cls(Slab.of(changes, model.dtype) if affine else None, tuple(befores[name] for name in layers))

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        tensors = [t for before in self.before for t in before]
        if self.slab is not None:
            tensors.append(self.slab.memory)
        if self.alone is not None:
            tensors += self.alone.state_dict().values()
        return sum(t.nbytes for t in tensors)


def served(read: Callable[[], Adapter], model: Decoder, kept: Path) -> Served:
    """The adapter that is read, as it is served. What shares a batch is laid into the file `kept`, once, and mapped.

    `kept` is a place for this adapter on this base in this type, and for no other.

    Raises:
        UserError: no adapter of this base.
    """
    layers = sum(1 for _ in linears(model))
    slab = Slab.mapped(kept, layers, model.dtype)
    if slab is not None:
        os.utime(kept, ns=(time_ns(), kept.stat().st_mtime_ns))  # it is of use
    else:
        made = Served.of(read(), model)
        if made.slab is None or made.before:
            return made
        with replacing(kept) as scratch:
            made.slab.save(scratch)
        slab = Slab.mapped(kept, layers, model.dtype) or made.slab
    return Served(slab)


@torch.no_grad()
def _change(form: Affine, slot: Linear) -> Change:
    gain_O = None if form.gain_O is None else form.gain_O.float() - 1
    bias_O = form.bias_O
    if slot.bias is not None and (bias_O is not None or gain_O is not None):
        own_O = slot.bias.float()
        bias_O = (own_O if bias_O is None else bias_O) - own_O - (0 if gain_O is None else gain_O * own_O)
    return Change(form.A_RI, form.scale * form.B_OR.t(), gain_O, bias_O)


class Mixed(Delta):
    """Every row of a batch as it wears, at the layer of this number."""

    def __init__(self, floor: "Floor", layer: int) -> None:
        super().__init__()
        self.floor, self.layer = floor, layer

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        return self.floor.wear.onto(slot.run(x_TI), x_TI, self.layer)


class Floor:
    """Where rows wear what they do: it fills the layers of a model while a batch goes through it."""

    def __init__(self, model: Decoder, kind: type[Mixed] = Mixed) -> None:
        self.wear = Wear(())
        self.items = [(slot, kind(self, i)) for i, (_, slot) in enumerate(linears(model))]

    def on(self, wear: Wear) -> AbstractContextManager[None]:
        """Let the rows of a batch wear this for the length of a `with` block; what was worn before comes back."""
        self.wear = wear
        return filled(self.items)
