"""Numbers into codes (native/codes.cpp)."""

import torch
from torch import Tensor

from deltaw.kernels.library import function
from deltaw.kernels.plain import LANES

WIDTHS = {4: 2, 8: 3, 16: 4, 256: 8}
"""Bits of a code, by how many levels there are."""


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Which of the ascending levels is nearest to each value, as uint8; of two that are as near, the lower."""
    edges = (levels[1:] + levels[:-1]) / 2
    call, width = function("nearest"), WIDTHS.get(len(levels))
    if call is None or width is None or values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.bucketize(values, edges).to(torch.uint8)
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    edges = torch.nn.functional.pad(edges.contiguous(), (0, max(1, LANES - len(edges))))
    threads = torch.get_num_threads()
    call(values.data_ptr(), values.numel(), edges.data_ptr(), width, codes.data_ptr(), threads)
    return codes
