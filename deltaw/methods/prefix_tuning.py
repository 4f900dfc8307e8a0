"""Prefix-tuning: keys and values that every layer sees before the first token (Li & Liang 2021, arXiv:2101.00190).

They start as those of a real text, since nothing else is near to what the model knows: a fresh prefix *is* that text.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaw.adapters.adapter import Adapter, Losses, Method, Site, bare, held
from deltaw.errors import UserError
from deltaw.models.decoder import Decoder
from deltaw.models.seen import Documents, Seen, attention
from deltaw.models.slots import Attend, Before, CannotMerge, Delta, Parts, Positions, Slot, filled
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import settings

DEVIATION = 0.02
"""Of what starts at random."""


class Points(nn.Module):
    """What all layers' prefixes are made of while they are trained through a projection: tanh(points down' + shift)."""

    def __init__(self, points_PD: Tensor, down_MD: Tensor) -> None:
        super().__init__()
        self.points, self.down = nn.Parameter(points_PD), nn.Parameter(down_MD)
        self.shift = nn.Parameter(torch.zeros(len(down_MD)))

    def forward(self) -> Tensor:
        return torch.addmm(self.shift, self.points, self.down.t()).tanh()


class Prefix(Delta):
    """P keys and values of one layer, keys as RoPE leaves them at positions 0 to P - 1; text begins at position P.

    With `points` they are what they started as, and what a matrix makes of those; the paper's way to train them.
    `gate_H`: attended to by themselves, and added behind a number for each head, zero at first (Zhang et al. 2023,
    arXiv:2303.16199).
    """

    def __init__(self, k_PKE: Tensor, v_PKE: Tensor, gate_H: Tensor | None, points: Points | None = None) -> None:
        super().__init__()
        self.k, self.v = (held(t, trained=points is None) for t in (k_PKE, v_PKE))
        self.before = len(k_PKE) if gate_H is None else 0
        self._points = (points,)  # in a tuple, so that it is not registered here
        if gate_H is not None:
            self.gate = nn.Parameter(gate_H)
        if points is not None:
            out = 2 * k_PKE[0].numel()
            self.up, self.lift = nn.Parameter(torch.zeros(out, len(points.shift))), nn.Parameter(torch.zeros(out))

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, of shape P x K x E."""
        (points,) = self._points
        if points is None:
            return self.k, self.v
        k, v = torch.addmm(self.lift, points(), self.up.t()).chunk(2, 1)
        return self.k + k.view_as(self.k), self.v + v.view_as(self.v)

    def forward(self, slot: Attend, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, seen: Seen) -> Tensor:
        k_PKE, v_PKE = (t.to(k_TKE.dtype) for t in self.pair())
        if self.before:
            return slot.run(q_THE, k_TKE, v_TKE, seen.after(k_PKE, v_PKE))
        open_TP = q_THE.new_zeros(len(q_THE), len(k_PKE))
        alone_THE = attention(q_THE, k_PKE, v_PKE, open_TP, slot.score)
        return slot.run(q_THE, k_TKE, v_TKE, seen) + self.gate.tanh().to(q_THE.dtype)[:, None] * alone_THE

    def served(self, slot: Attend) -> Before | None:  # noqa: ARG002 (the same at every slot)
        return Before(*self.pair()) if self.before else None

    def merged(self, slot: Any) -> Parts:  # noqa: ARG002 (whatever the slot)
        raise CannotMerge("A prefix is something to attend to, and no weight.")


class _Listening(Delta):
    """Keeps what a layer attends to."""

    def forward(self, slot: Attend, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, seen: Seen) -> Tensor:
        self.heard = k_TKE, v_TKE
        return slot.run(q_THE, k_TKE, v_TKE, seen)


@settings
class PrefixTuning(Method):
    """Train what every layer sees before the first token, and no weight."""

    identity_at_start: ClassVar[bool] = False
    kinds: ClassVar[tuple[type[Slot], ...]] = (Attend,)
    peak_rate: ClassVar[float] = 3e-2
    """BLEU 34.0, 40.3 at 5e-3, 3e-2 (benchmarks/table.py --rows 60 --set minutes=null steps=30)."""

    targets: str = "attend"
    """The layers' attention: all of them."""
    tokens: Annotated[int, Field(ge=1, le=65536)] = 16
    """How many keys and values stand before the first token of every document."""
    init: Literal["text", "random"] = "text"
    """What they start as: those of a text, or noise."""
    init_text: str = "Answer the question below as well as you can, in the words and the form that are asked for."
    """The text they start as: as many of its tokens, again and again if it is short."""
    projection: Annotated[int, Field(ge=0, le=65536)] = 0
    """Train them as what two matrices of this inner width make of learnt points, and drop those at the end; 0: not."""
    gate: bool = False
    """Attend to them apart, behind a number for each head that starts at zero: a fresh adapter changes nothing."""

    def sites(self, model: nn.Module) -> list[Site]:
        found, (positions,) = super().sites(model), self.named(model, "positions", (Positions,))
        if self.tokens >= positions.slot.context:
            raise UserError(f"A prefix of {self.tokens:,} tokens fills the context of {positions.slot.context:,}.",
                            remedy="Take fewer --tokens.")  # fmt: skip
        if len(found) < sum(isinstance(slot, Attend) for slot in model.modules()):
            raise UserError("Every layer has a prefix, or none has.", remedy="Leave --targets out.")
        return found

    def build(self, site: Site, rng: torch.Generator) -> Prefix:
        slot, width = site.slot, site.slot.kv_heads * site.slot.head_width
        if self.projection and not hasattr(site.shared, "points"):
            drawn = (torch.randn(n, width, generator=rng) * width**-0.5 for n in (self.tokens, self.projection))
            site.shared.add_module("points", Points(*drawn))
        k, v = (DEVIATION * torch.randn(self.tokens, slot.kv_heads, slot.head_width, generator=rng) for _ in range(2))
        return Prefix(k, v, torch.zeros(slot.heads) if self.gate else None, getattr(site.shared, "points", None))

    @torch.no_grad()
    def begin(self, adapter: Adapter, model: Decoder, tokenizer: Tokenizer, losses: Losses) -> Adapter:  # noqa: ARG002 (no rows)
        if self.init == "random":
            return adapter
        ids = tokenizer.encode(self.init_text)
        if not ids:
            raise UserError("The text that a prefix starts as is empty.", remedy="Give --init-text, or --init random.")
        ids_T = torch.tensor(ids).repeat(-(-self.tokens // len(ids)))[: self.tokens].to(model.device)
        ears = [(slot, delta, _Listening()) for slot, delta in adapter.items()]
        with bare(model), filled((slot, ear) for slot, _, ear in ears):
            model.hidden(ids_T, torch.arange(self.tokens, device=model.device), Documents.of_lengths(self.tokens))
        for _, delta, ear in ears:
            assert isinstance(delta, Prefix)
            delta.k.copy_(ear.heard[0])
            delta.v.copy_(ear.heard[1])
        return adapter

    @torch.no_grad()
    def finished(self, adapter: Adapter) -> Adapter:
        if not self.projection:
            return adapter
        kept: dict[str, Delta] = {}
        for name, delta in adapter.named_deltas():
            assert isinstance(delta, Prefix)
            k, v = (t.clone() for t in delta.pair())
            kept[name] = Prefix(k, v, delta.gate.clone() if self.gate else None)
        return adapter.like(replace(self, projection=0), kept)
