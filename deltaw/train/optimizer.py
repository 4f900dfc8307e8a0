"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), and how its rate rises and falls."""

import math
from pathlib import Path

import torch
from torch import nn

from deltaw.settings import Training
from deltaw.train.paged import PagedAdamW


def adamw(module: nn.Module, settings: Training, folder: Path = Path()) -> torch.optim.AdamW:
    """AdamW over what the adapter trains, in groups of one `pace` (times the rate) and one weight decay.

    Which those are is said by the delta that owns a parameter. Within a group the order is that of the adapter.
    `folder`: where a paged one has its file.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for owner in module.modules():
        pace, undecayed = getattr(owner, "pace", {}), getattr(owner, "undecayed", ())
        for name, p in owner.named_parameters(recurse=False):
            # Once, and before the activations: gradients that come and go among them leave holes that none fits.
            p.grad = torch.zeros_like(p)
            groups.setdefault((pace.get(name, 1.0), name not in undecayed), []).append(p)
    told = [{"params": parameters, "pace": pace, "weight_decay": settings.weight_decay if decays else 0.0}
            for (pace, decays), parameters in groups.items()]  # fmt: skip
    if settings.optimizer == "paged_adamw":
        return PagedAdamW(told, folder)
    return torch.optim.AdamW(told, lr=1.0, fused=True)


def rate(step: int, steps: int, peak: float, settings: Training) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: up to `peak`, then down to zero after the last."""
    rising = math.ceil(settings.warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    match settings.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
