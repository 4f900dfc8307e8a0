"""What a technique is (`Method`), where it acts (`Site`), and what it makes: the deltas of one model (`Adapter`).

A method chooses sites and builds one delta for each. The adapter owns what is trained; the model never does.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, explained, nearest
from deltaw.models.slots import Affine, Before, Delta, Embedding, Linear, Parts, RMSNorm, Slot, filled
from deltaw.settings import settings

if TYPE_CHECKING:
    from deltaw.models.decoder import Decoder
    from deltaw.models.tokenizer import Tokenizer

Losses = Callable[[], Iterable[Tensor]]
"""Mean losses of some training rows, one after another, of the model as it is worn when each is asked for."""
ALL_LINEAR = "all-linear"
HEAD = "lm_head"


@dataclass(frozen=True)
class Site:
    """One slot that a method was asked to adapt."""

    name: str
    slot: Any
    rank: int = 0
    alpha: float = 0.0
    whole: bool = False
    """The layer's own tensor is trained, not something beside it."""
    shared: nn.Module = field(default_factory=nn.Module, compare=False, repr=False)
    """The adapter's place for what several sites have together: owned, trained and saved once."""
    shape: tuple[int, int] = (0, 0)
    """Outputs and inputs of a matrix that is shared by layers of several sizes."""
    context: int = 0
    """Tokens that the model is to see."""


@settings
class Method(ABC):
    """One fine-tuning technique: its fields are its settings, its two functions are its behaviour."""

    identity_at_start: ClassVar[bool] = True
    """Whether a fresh adapter leaves the model's outputs as they were."""
    kinds: ClassVar[tuple[type[Slot], ...]] = (Linear,)
    """The layers it knows how to adapt."""
    base_format: ClassVar[str] = ""
    """How the base's matrices are packed where the user does not say; empty: as they are."""
    peak_rate: ClassVar[float] = 1e-3
    """A learning rate that works for a model of width 576; wider ones get less."""

    targets: str = ALL_LINEAR
    """Layers to adapt: all-linear, short names such as q,v, full names, or patterns; separated by commas."""

    def plan(self, sites: list[Site]) -> list[Site]:
        """Choose what each site gets from all of them at once. By default: the same everywhere."""
        return sites

    @abstractmethod
    def build(self, site: Site, rng: torch.Generator) -> Delta:
        """Make the delta of one site; random numbers come from `rng`."""

    def begin(self, adapter: Adapter, model: Decoder, tokenizer: Tokenizer, losses: Losses) -> Adapter:  # noqa: ARG002 (hooks)
        """Set what a fresh adapter starts from, where that takes the whole model, or rows of data. By default: nothing.

        What comes back is what is trained: its method may have settled what the settings left open.
        """
        return adapter

    def notices(self, adapter: Adapter) -> tuple[str, ...]:  # noqa: ARG002 (a hook)
        """What whoever trains should know of these settings over this base, in sentences. By default: nothing."""
        return ()

    def finished(self, adapter: Adapter) -> Adapter:
        """What is kept of a trained adapter: by default, all of it."""
        return adapter

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the slots of `model` that `targets` names, in the model's order.

        Raises:
            UserError: a target that names no layer.
        """
        return self.named(model, self.targets, self.kinds)

    @staticmethod
    def named(model: nn.Module, targets: str, kinds: tuple[type[Slot], ...]) -> list[Site]:
        """Return the slots of these kinds that `targets` names, in the model's order.

        Raises:
            UserError: a target that names no layer.
        """
        slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, kinds)}
        wanted: set[str] = set()
        for target in filter(None, (t.strip() for t in targets.split(","))):
            found = {name for name in slots if chosen(target, name, slots[name])}
            if not found:
                short = {name.rsplit(".", 1)[-1] for name in slots}
                raise UserError(f"The target '{target}' names no layer of this model.", remedy=nearest(target, short))
            wanted |= found
        if not wanted:
            raise UserError("There are no targets to adapt.", remedy=f"Try --targets {ALL_LINEAR}.")
        return [Site(name, slot) for name, slot in slots.items() if name in wanted]


def held(t: Tensor, trained: bool, stored: bool = True) -> Tensor:
    """A tensor as a module has it: a parameter, or a buffer that is saved or is not."""
    return nn.Parameter(t) if trained else nn.Buffer(t, persistent=stored)


def chosen(target: str, name: str, slot: object) -> bool:
    """Whether `target` names this layer: `all`, `all-linear`, `q`, `q_proj`, its whole name, or a pattern of it."""
    if target == "all":
        return isinstance(slot, Linear | RMSNorm | Embedding)
    if target == ALL_LINEAR:
        return isinstance(slot, Linear) and name != HEAD
    last = name.rsplit(".", 1)[-1]
    return last in (target, f"{target}_proj") or matches(target, name)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern fits the whole name or a whole tail of it, as in PEFT's `rank_pattern`.

    Raises:
        UserError: the pattern is no regular expression.
    """
    with explained(f"'{pattern}' is no pattern.", re.error, why="{error}."):
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


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
    def build(cls, method: Method, model: nn.Module, seed: int = 0) -> Adapter:
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

    def like(self, method: Method, deltas: Mapping[str, Delta]) -> Adapter:
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
    def on(self) -> Iterator[Adapter]:
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
