"""An adapter: the deltas of one method on one model. It owns what is trained; the model never does."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import nn

from deltaw.adapters.protocol import Method
from deltaw.models.slots import Affine, Before, Delta, Parts, Slot, filled


class Adapter(nn.Module):
    """Deltas by slot name. Attaching, merging and going back are pointer writes; no weight is ever subtracted."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.deltas = nn.ModuleDict()
        self.shared = nn.Module()
        """Tensors that several deltas have together; they refer to it, and it alone owns them."""
        self._slots: dict[str, Slot] = {}
        self._aside: list[tuple[Slot, Parts, Parts]] = []
        """Slots that were merged into: what stood there before, and what was put in its place."""

    @classmethod
    def build(cls, method: Method, model: nn.Module, seed: int = 0) -> "Adapter":
        """Make a fresh adapter of `method` for `model`; the same seed gives the same adapter.

        Raises:
            UserError: the method's targets name no layer of this model.
        """
        self = cls(method)
        rng = torch.Generator().manual_seed(seed)
        for site in method.plan(method.sites(model)):
            delta = method.build(replace(site, shared=self.shared), rng)
            self.deltas[site.name.replace(".", "/")] = delta
            self._slots[site.name] = site.slot
        return self

    def like(self, method: Method, deltas: Mapping[str, Delta]) -> "Adapter":
        """An adapter of another method at the same slots."""
        other = Adapter(method)
        other.deltas.update({name.replace(".", "/"): delta for name, delta in deltas.items()})
        other._slots = self._slots
        return other

    def named_deltas(self) -> Iterator[tuple[str, Delta]]:
        """Slot names and the deltas made for them."""
        for name, delta in self.deltas.items():
            assert isinstance(delta, Delta)
            yield name.replace("/", "."), delta

    def items(self) -> Iterator[tuple[Slot, Delta]]:
        """Slots and the deltas made for them."""
        for name, delta in self.named_deltas():
            yield self._slots[name], delta

    def forms(self) -> dict[str, Affine | Before | None]:
        """What every lasting delta does, in the form in which a server mixes it with others, by slot name, or None."""
        return {name: delta.served(self._slots[name]) for name, delta in self.named_deltas() if delta.lasting}

    def low_rank(self) -> dict[str, Affine | None]:
        """What every lasting delta adds as scale * B A, by slot name; None where it does more than that."""
        return {name: f if isinstance(f, Affine) and f.gain_O is None and f.bias_O is None else None
                for name, f in self.forms().items()}  # fmt: skip

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    @contextmanager
    def on(self) -> "Iterator[Adapter]":
        """Wear this adapter for the length of a `with` block; what was worn before comes back afterwards."""
        with filled(self.items()):
            yield self

    @torch.no_grad()
    def merge(self) -> None:
        """Fold every delta into its layer; the frozen weights are put aside, not overwritten.

        Raises:
            CannotMerge: a delta has no merged form; then nothing was changed.
        """
        for slot, parts in [(slot, delta.merged(slot)) for slot, delta in self.items()]:
            before = {name: getattr(slot, name) for name in parts}
            slot.swap(parts)
            self._aside.append((slot, before, {name: getattr(slot, name) for name in parts}))
            slot.fill(None)

    def unmerge(self) -> None:
        """Put the frozen weights back, bit for bit.

        Raises:
            RuntimeError: another adapter was merged into the same layers since; it has to be taken out first.
        """
        newest = {(slot, name): part for slot, _, after in self._aside for name, part in after.items()}
        if any(getattr(slot, name) is not part for (slot, name), part in newest.items()):
            raise RuntimeError("Another adapter was merged on top of this one: unmerge that one first.")
        while self._aside:
            slot, before, _ = self._aside.pop()
            slot.swap(before)


def bare(model: nn.Module) -> AbstractContextManager[None]:
    """The base model without any adapter, for the length of a `with` block."""
    return filled((slot, None) for slot in model.modules() if isinstance(slot, Slot))
