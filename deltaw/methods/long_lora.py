"""LongLoRA: longer contexts, with attention in shifted groups while training, and embedding and norms trained whole.

Chen et al. 2024 (ICLR), arXiv:2309.12307. Positions are interpolated; outside of training attention is whole.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaw.adapters.adapter import Site
from deltaw.errors import UserError
from deltaw.methods.lora import LoRA
from deltaw.models.rope import KINDS, Dynamic, Linear, Rope, Yarn
from deltaw.models.seen import Documents, Seen, attention, causal
from deltaw.models.slots import Attend, Delta, Parts, Positions
from deltaw.settings import Count, Rank, settings


class Grouped(Delta):
    """In training, tokens of a document see their group of `group` tokens: token t is of group t // group.

    For the upper half of the heads groups begin half a group earlier, so that what is learnt crosses their borders: the
    first and the last are half groups. Nobody sees a later token; the authors' code without flash attention lets the
    first half group see the last (JIA-Lab-research/LongLoRA#15). Layers with a window stay as they are.
    """

    lasting = False

    def __init__(self, group: int, shift: bool) -> None:
        super().__init__()
        self.group, self.shift = group, shift

    def forward(self, slot: Attend, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, seen: Seen) -> Tensor:
        if not self.training or slot.score.window or not isinstance(seen, Documents):
            return slot.run(q_THE, k_TKE, v_TKE, seen)
        seen_by = []
        for first, last in pieces(slot):
            early = self.group // 2 if self.shift and first >= slot.heads // 2 else 0
            of = slice(first * slot.kv_heads // slot.heads, (last - 1) * slot.kv_heads // slot.heads + 1)
            q, k, v = q_THE[:, first:last], k_TKE[:, of], v_TKE[:, of]
            seen_by.append(torch.cat([self._one(slot, *own, early) for own in seen.apart(q, k, v)]))
        return torch.cat(seen_by, 1)

    def _one(self, slot: Attend, q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, by: int) -> Tensor:
        """A document, group after group; its first tokens may be a stem, which it shares."""
        seen, stem = [], len(k_SKE) - len(q_THE)
        for first, last in borders(len(k_SKE), self.group, by):
            if (begin := max(first, stem)) < last:
                asked = q_THE[begin - stem : last - stem]
                mask = causal(len(asked), begin - first, asked) if begin > first else None
                seen.append(attention(asked, k_SKE[first:last], v_SKE[first:last], mask, slot.score))
        return torch.cat(seen)

    def merged(self, slot: Any) -> Parts:  # noqa: ARG002 (a way to train, no change to what was trained)
        return {}


def pieces(slot: Attend) -> Iterator[tuple[int, int]]:
    """Heads of one half that have whole keys of their own, or one together, so that no key has to be repeated."""
    each, half = slot.heads // slot.kv_heads, slot.heads // 2
    return pairwise(sorted({0, half // each * each, half, -(-half // each) * each, slot.heads}))


def borders(length: int, group: int, by: int) -> Iterator[tuple[int, int]]:
    """The groups of a document of this length, each its first token and the one after its last."""
    return pairwise((0, *range(group - by, length, group), length))


class Stretched(Delta):
    """Positions that reach farther."""

    def __init__(self, slot: Positions, rope: Rope, context: int) -> None:
        super().__init__()
        self.rope, self.context, self.lasting = rope, context, (rope, context) != (slot.rope, slot.context)

    def forward(self, slot: Positions, at_T: Tensor, length_T: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (own)
        return torch.stack(self.rope.turns(at_T, length_T, dtype))

    def merged(self, slot: Positions) -> Parts:  # noqa: ARG002 (whatever the slot)
        return {"rope": self.rope, "context": self.context}


def stretched(slot: Positions, context: int, kind: str) -> Stretched:
    """Positions for this context: what they are scaled by already is scaled further, in its own way.

    Raises:
        UserError: they are scaled in another way.
    """
    old, factor = slot.rope.scaling, float(math.ceil(context / slot.context))
    own = next((name for name, cls in KINDS.items() if type(old) is cls), None)
    if factor == 1:
        return Stretched(slot, slot.rope, context)
    if isinstance(old, Dynamic):
        raise UserError("The positions of this model stretch with the length already.", remedy="Leave --context out.")
    if own is not None and own != kind:
        raise UserError(f"The positions of this model are scaled already, by '{own}'.", remedy=f"Take --rope {own}.")
    if old is None and kind == "llama3":
        raise UserError("Only a model that is scaled by 'llama3' already is scaled by it.", remedy="Take --rope yarn.")
    fresh = Linear(factor=1) if kind == "linear" else Yarn(factor=1, original_max_position_embeddings=slot.context)
    scaling = replace(old or fresh, factor=(old or fresh).factor * factor)
    return Stretched(slot, replace(slot.rope, scaling=scaling), context)


@settings
class LongLoRA(LoRA):
    """Train LoRA, embedding and norms for a longer context, with attention in groups."""

    targets: str = "q,k,v,o"
    """Layers that get a LoRA: all-linear, short names such as q,v, full names, or patterns; separated by commas."""
    rank: Rank = 8
    """Rank R of the update."""
    modules_to_save: str = "embed_tokens,.*norm.*"
    """Layers that are trained whole beside; without them long contexts are learnt badly. Named as targets are."""
    context: Count | None = None
    """Tokens that the model is to see; positions are interpolated. By default: as many as it sees."""
    rope: Literal["linear", "yarn", "llama3"] = "linear"
    """How positions are interpolated: linear as in the paper, or another way, such as that of a model that has one."""
    group: Annotated[int, Field(ge=0)] = 0
    """Tokens of a group that see one another in training, an even number. 0: a quarter of the context."""
    shift: bool = True
    """Whether the groups of half of the heads begin half a group earlier."""
    grouped: bool = True
    """Whether attention is in groups in training, or whole."""

    def sites(self, model: nn.Module) -> list[Site]:
        (positions,) = self.named(model, "positions", (Positions,))
        context = self.context or positions.slot.context
        if context < positions.slot.context:
            raise UserError(f"This model sees {positions.slot.context:,} tokens already.",
                            remedy="Leave --context out.")  # fmt: skip
        attends = self.named(model, "attend", (Attend,)) if self.grouped else []
        return [*super().sites(model), *(replace(site, context=context) for site in (positions, *attends))]

    def build(self, site: Site, rng: torch.Generator) -> Delta:
        if isinstance(site.slot, Positions):
            return stretched(site.slot, site.context, self.rope)
        if isinstance(site.slot, Attend):
            if self.group % 2:
                raise UserError(f"A group of {self.group} tokens has no half.", remedy="Take an even --group.")
            return Grouped(self.group or max(2, site.context // 8 * 2), self.shift)
        return super().build(site, rng)
