"""AdamW whose moments lie in a file that is mapped into memory, after QLoRA's paged optimizer (arXiv:2305.14314, §3).

Where memory runs short the system writes them to disk, and reads them again when a step needs them. The numbers are
those of AdamW, to the last bit.
"""

import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import UserError, WillNotFit

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
        self.moments: dict[Tensor, dict[str, Tensor]] = {}
        numbers, at = _mapped(sum(p.numel() for p in trained) * len(MOMENTS), folder), 0
        for p in trained:
            self.moments[p] = {}
            for name in MOMENTS:
                self.moments[p][name] = numbers[at : at + p.numel()].view_as(p)
                at += p.numel()
            self.state[p] = {"step": torch.tensor(0.0), **self.moments[p]}

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
