"""LoRA: W + s B A, with A random and B zero (Hu et al. 2021, arXiv:2106.09685)."""

from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from deltaw.adapters.adapter import Method, Site, matches
from deltaw.errors import UserError
from deltaw.methods.full import Whole
from deltaw.models.fused import joined
from deltaw.models.slots import PART, Affine, Delta, Linear, Parts, Terms
from deltaw.settings import Count, Rank, settings
from deltaw.weights import Weight


class Product(Delta):
    """y = W x + scale * B (A dropout(x)), whatever A and B are made of; fp32, and computed with in the type of x."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_RI and B_OR."""
        raise NotImplementedError

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        if terms := self.terms(slot):
            return joined([terms], x_TI)[0]
        y_TO = self.dropped(slot, x_TI)
        return y_TO if slot.bias is None else y_TO + slot.bias

    def dropped(self, slot: Linear, x_TI: Tensor) -> Tensor:
        """What comes out before the bias while some of what goes in is dropped."""
        A_RI, B_OR = (t.to(x_TI.dtype) for t in self.factors())
        y_TO: Tensor = self.frozen(slot)(x_TI)
        return y_TO.addmm_(self.down(x_TI, A_RI), B_OR.t(), alpha=self.scale)

    def down(self, x_TI: Tensor, A_RI: Tensor) -> Tensor:
        """A x, with dropout."""
        return F.linear(F.dropout(x_TI, self.dropout), A_RI)

    def terms(self, slot: Linear) -> Terms | None:
        if self.training and self.dropout:
            return None
        return Terms(self.frozen(slot), slot.bias, *self.affine(slot)[:4])

    def frozen(self, slot: Linear) -> Weight:
        """The matrix that B A stands beside."""
        return slot.weight

    def merged(self, slot: Linear) -> Parts:
        form, w_OI = self.affine(slot), self.frozen(slot).dense().float()
        # Summed in fp32 and rounded once, to the type of the base.
        w_OI = w_OI if form.gain_O is None else form.gain_O[:, None] * w_OI
        return {"weight": slot.weight.repack(torch.addmm(w_OI, form.B_OR, form.A_RI, alpha=form.scale))}

    def affine(self, slot: Linear) -> Affine:  # noqa: ARG002 (the same at every slot)
        """What it does beside the frozen matrix, without dropout."""
        return Affine(*self.factors(), self.scale)

    def served(self, slot: Linear) -> Affine | None:
        return self.affine(slot)


class LowRank(Product):
    """A and B are what is trained."""

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A, self.B = nn.Parameter(A_RI), nn.Parameter(B_OR)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


Alpha = Annotated[float, Field(gt=0, le=1e6)]


@settings
class LoRA(Method):
    """Train two thin matrices beside each frozen one."""

    peak_rate: ClassVar[float] = 1e-3
    """BLEU 35.2, 41.7, 37.0 at 3e-4, 1e-3, 3e-3 (benchmarks/table.py --set minutes=null steps=30)."""

    rank: Rank = 16
    """Rank R of the update."""
    alpha: Alpha | None = None
    """The update is scaled by alpha / rank. By default: twice the rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks learn as fast (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is zeroed in training."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: uniform in ±1/sqrt(in) as in the authors' code, or normal with deviation 1/rank."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Other ranks for some layers, by pattern of their names: {"layers[.]0[.].*": 32}."""
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)
    """Other alphas for some layers, by pattern of their names."""
    modules_to_save: str = ""
    """Layers that are trained whole beside, such as embed_tokens,norm; named as targets are."""
    ensure_weight_tying: bool = True
    """Whether a head that shares the embedding's table follows it, when the embedding is trained whole."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """B learns so many times as fast as A, as in LoRA+ (Hayou et al. 2024, arXiv:2402.12354), which takes 16."""

    def __post_init__(self) -> None:
        if self.alpha is None:  # written down as a number, so that no reader of an adapter has to know the default
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    def patterns(self) -> list[str]:
        """Every pattern of layers' names that is said; each has to fit one."""
        return [*self.rank_pattern, *self.alpha_pattern]

    def plan(self, sites: list[Site]) -> list[Site]:
        for pattern in self.patterns():
            if not any(matches(pattern, site.name) for site in sites):
                raise UserError(f"The pattern '{pattern}' fits no adapted layer.",
                                why=f"Adapted layers have names such as {sites[0].name}.")  # fmt: skip
        return [s if s.whole else replace(s, rank=first(self.rank_pattern, s.name, self.rank),
                        alpha=first(self.alpha_pattern, s.name, self.alpha)) for s in sites]  # fmt: skip

    def sites(self, model: nn.Module) -> list[Site]:
        if not self.modules_to_save:
            return super().sites(model)
        whole = {site.name: replace(site, whole=True) for site in self.named(model, self.modules_to_save, tuple(PART))}
        low = [site for site in super().sites(model) if site.name not in whole]
        return [*low, *whole.values()]

    def build(self, site: Site, rng: torch.Generator) -> Delta:
        if site.whole:
            return Whole(site.slot, self.ensure_weight_tying)
        delta = self.pair(site, rng)
        delta.pace = {"B": self.loraplus_lr_ratio, **delta.pace}
        return delta

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        """A and B of a site, and how they are used."""
        return LowRank(*self.start(site, rng), self.scale(site), self.dropout)

    def start(self, site: Site, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B of a site, as they start."""
        o, i = site.slot.weight.shape
        return self.drawn(site.rank, i, rng), torch.zeros(o, site.rank)

    def drawn(self, rank: int, i: int, rng: torch.Generator) -> Tensor:
        """A, as it starts."""
        A_RI = torch.empty(rank, i)
        if self.init == "gaussian":
            return A_RI.normal_(0, 1 / rank, generator=rng)
        return A_RI.uniform_(-(i**-0.5), i**-0.5, generator=rng)

    def scale(self, site: Site) -> float:
        """What the product of a site's B and A is multiplied by."""
        return site.alpha / (site.rank**0.5 if self.rslora else site.rank)


def first(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits a layer's name."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), otherwise)
