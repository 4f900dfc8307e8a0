"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), and how its rate rises and falls."""

from __future__ import annotations

import math

import torch
from torch import nn

from deltaw.settings import Training


def adamw(module: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW over what the adapter trains; one group, so that the order of parameters is that of the adapter."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        # Once, and before the activations: gradients that come and go among them leave holes that no large tensor fits.
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=settings.weight_decay, fused=True)


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
