"""One adapter out of several: their updates added up, by themselves or after what each is trimmed to.

Whatever lowers to B A can be combined. TIES is Yadav et al. 2023 (arXiv:2306.01708), DARE is Yu et al. 2023
(arXiv:2311.03099), both on the whole update, not on A and B apart.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.api.persona import Pair, Persona
from deltaw.errors import UserError
from deltaw.files.adapters import filled
from deltaw.files.runs import fresh, kept
from deltaw.methods import method
from deltaw.models.decoder import Decoder
from deltaw.settings import Count, Seed, settings

MOST = 8192
"""The largest rank of a LoRA here."""
CANCELLED = 1e-10
"""Share of the squares of all updates below which their sum is rounding."""


@settings
class Combination:
    """How updates become one."""

    how: Literal["sum", "ties", "dare"] = "sum"
    """Add them up; or keep of each the largest numbers, and where they contradict the stronger side's mean (ties);
    or drop numbers at random, and make up for it (dare)."""
    rank: Count | None = None
    """Rank of the result. By default: of a sum the ranks together, which is exact; else the largest of them."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each update's numbers that ties and dare keep. By default: half."""
    seed: Seed = 0
    """Seed of what dare drops."""


@torch.no_grad()
def combine(personas: Sequence[Persona], weights: Sequence[float], chosen: Combination) -> tuple[Adapter, float]:
    """Combine the personas' adapters, each times its weight; and the share of the result that its rank cannot hold.

    That share is the norm of what is left out beside the norm of all, over all layers.

    Raises:
        UserError: an adapter does more than add B A, or they cancel out.
    """
    if chosen.how == "sum" and chosen.density is not None:
        raise UserError("A sum keeps every number.", remedy="Leave --density out, or take --how ties or dare.")
    if chosen.how != "dare" and chosen.seed:
        raise UserError("Nothing is drawn at random here.", remedy="Leave --seed out, or take --how dare.")
    density = chosen.density or 0.5
    low = [persona.pairs("combine", "add a product of thin matrices",
                         "Only such can be combined: LoRA and what is like it.") for persona in personas]  # fmt: skip
    rng = torch.Generator().manual_seed(chosen.seed)
    pairs: dict[str, Pair] = {}
    lost = whole = given = 0.0
    for name in dict.fromkeys(name for each in low for name in each):
        found = [(each[name], weight) for each, weight in zip(low, weights, strict=True) if name in each]
        if chosen.how == "sum":
            pair = torch.cat([A for (A, _), _ in found]), torch.cat([w * B for (_, B), w in found], 1)
            most = chosen.rank or min(len(pair[0]), MOST)
        else:
            trimmed = [(B @ A, w) for (A, B), w in found]
            mixed_OI = _ties(trimmed, density) if chosen.how == "ties" else _dare(trimmed, density, rng)
            pair, most = (torch.eye(mixed_OI.shape[1]), mixed_OI), chosen.rank or max(len(A) for (A, _), _ in found)
        pairs[name], squares = _within(pair, most) if most < len(pair[0]) else (pair, torch.zeros(1))
        given += sum(w * w * float((B @ A).square().sum()) for (A, B), w in found)
        kept = pairs[name][1] @ pairs[name][0]
        lost, whole = lost + float(squares.sum()), whole + float(squares.sum() + kept.square().sum())
    if whole <= CANCELLED * given:
        raise UserError("Nothing is left: the updates and their weights cancel out.")
    return built(pairs, personas[0].base.model), (lost / whole) ** 0.5


def write(personas: Sequence[Persona], weights: Sequence[float], chosen: Combination, name: str, runs: Path
          ) -> tuple[Path, float]:  # fmt: skip
    """Combine, and save the result as the run `name`: its file, and the share that was lost.

    Raises:
        UserError: as for `combine`, or there is such a run already.
    """
    run, base = fresh(name, runs, "-o."), personas[0].base
    adapter, lost = combine(personas, weights, chosen)
    systems = {persona.system for persona in personas}
    system = systems.pop() if len(systems) == 1 else ""
    return kept(adapter, base.header(adapter, system), run), lost


def built(pairs: Mapping[str, Pair], model: Decoder) -> Adapter:
    """A LoRA with these matrices, and no scale."""
    rank = Counter(len(A_RI) for A_RI, _ in pairs.values()).most_common(1)[0][0]
    other = {re.escape(name): len(A_RI) for name, (A_RI, _) in pairs.items() if len(A_RI) != rank}
    lora = method("lora", targets=",".join(map(re.escape, pairs)), rank=rank, alpha=rank, rank_pattern=other,
                  alpha_pattern=other)  # fmt: skip
    tensors = {f"{name}.{part}": t for name, pair in pairs.items() for part, t in zip("AB", pair, strict=True)}
    return filled(lora, model, tensors, "")


def _within(pair: Pair, rank: int) -> tuple[Pair, Tensor]:
    """The nearest product of this rank (Eckart & Young 1936), and the squares of the singular values left out."""
    (qa_IR, ra_RR), (qb_OR, rb_RR) = torch.linalg.qr(pair[0].t().double()), torch.linalg.qr(pair[1].double())
    u_RR, s_R, vt_RR = torch.linalg.svd(rb_RR @ ra_RR.t(), full_matrices=False)
    root_R = s_R[:rank].sqrt()
    A_RI, B_OR = (root_R[:, None] * vt_RR[:rank]) @ qa_IR.t(), (qb_OR @ u_RR[:, :rank]) * root_R
    return (A_RI.float().contiguous(), B_OR.float().contiguous()), s_R[rank:].square()


def _ties(updates: Sequence[tuple[Tensor, float]], density: float) -> Tensor:
    """Trim each to its largest numbers, elect a sign for every number by their sum, take the mean of those of it."""
    trimmed = torch.stack([_largest(update, density) for update, _ in updates])
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    weighted = trimmed * torch.tensor([w for _, w in updates])[:, None, None] * agrees
    mean: Tensor = weighted.sum(0) / (agrees & (trimmed != 0)).sum(0).clamp(min=1)
    return mean


def _largest(update: Tensor, density: float) -> Tensor:
    flat = update.flatten()
    kept = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(update)


def _dare(updates: Sequence[tuple[Tensor, float]], density: float, rng: torch.Generator) -> Tensor:
    """Drop numbers at random and divide the others by the share that is kept, so that the sum stays as expected."""
    return sum((w / density * update * (torch.rand(update.shape, generator=rng) < density)
                for update, w in updates), torch.zeros_like(updates[0][0]))  # fmt: skip
