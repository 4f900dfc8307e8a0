"""Native functions of plain tensors: when there is one, and how it is called."""

from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.library import function

PLAIN = (torch.float32, torch.bfloat16)
"""What plain numbers may be stored as."""
LANES = 16
"""Numbers that are taken at once: widths are whole numbers of them, or torch does the work."""


def plainly(name: str, *tensors: Tensor) -> Any:
    """A native function for tensors that lie whole in memory and are all of one plain type; None: torch does its work.

    It is called without its last two arguments: whether they are bf16, and the number of threads.
    """
    dtype = tensors[0].dtype
    fits = dtype in PLAIN and all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    found = function(name) if fits else None
    return found and (lambda *told: found(*told, int(dtype == torch.bfloat16), torch.get_num_threads()))
