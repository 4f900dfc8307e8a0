"""The protocol that every fine-tuning technique follows: choose sites, build one delta per site."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, explained, nearest
from deltaw.models.slots import Delta, Embedding, Linear, RMSNorm, Slot
from deltaw.settings import settings

if TYPE_CHECKING:
    from deltaw.adapters.adapter import Adapter
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


def hold(owner: nn.Module, name: str, t: Tensor, trained: bool, stored: bool = True) -> None:
    """Give a module a tensor: a parameter, or a buffer that is saved or is not."""
    if trained:
        owner.register_parameter(name, nn.Parameter(t))
    else:
        owner.register_buffer(name, t, persistent=stored)


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
