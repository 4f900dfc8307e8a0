"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), its moments in memory or in a file, and how its rate goes.

The file is mapped into memory, after QLoRA's paged optimizer (arXiv:2305.14314, §3): where memory runs short the system
writes moments to disk, and reads them again when a step needs them. The numbers are those of AdamW, to the last bit.
"""

import math
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, WillNotFit
from deltaw.settings import Training

MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = bytes(1 << 20)


class PagedAdamW(torch.optim.AdamW):
    """`folder`: where the file is made. It has no name, and is gone with the process.

    Raises:
        UserError: parameters are on another device.
        WillNotFit: the disk has no room.
    """

    def __init__(self, groups: list[dict[str, Any]], folder: Path) -> None:
        trained = [p for group in groups for p in group["params"]]
        if any(p.device.type != "cpu" for p in trained):
            raise UserError("A paged optimizer is for the processor's memory.", remedy="Leave --optimizer out.")
        super().__init__(groups, lr=1.0, fused=True)
        sizes = [p.numel() for p in trained for _ in MOMENTS]
        parts = iter(torch.split(_mapped(sum(sizes), folder), sizes))
        self.moments = {p: {name: next(parts).view_as(p) for name in MOMENTS} for p in trained}
        for p, moments in self.moments.items():
            self.state[p] = {"step": torch.tensor(0.0), **moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, moments in self.moments.items():
            for name, mapped in moments.items():
                mapped.copy_(self.state[p][name]) if name in self.state[p] else mapped.zero_()
            self.state[p] = {"step": torch.tensor(0.0), **self.state[p], **moments}


def _mapped(count: int, folder: Path) -> Tensor:
    """So many zeros of fp32 in a file on disk.

    Raises:
        WillNotFit: the disk has no room for them, which must be said now: a page that cannot be written is a crash.
    """
    size = max(4 * count, 4)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for done in range(0, size, len(CHUNK)):
                    file.write(CHUNK[: size - done])
                file.flush()
        except OSError as e:
            remedy = f"Free {size / 1e9:.1f} GB there, or leave --optimizer paged_adamw out."
            raise WillNotFit("The disk has no room for Adam's moments.", where=str(folder), why=f"{e.strerror}.",
                             remedy=remedy) from None  # fmt: skip
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32)[:count]


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
