"""A place for one plain matrix at a time: fresh memory for each may cost more than unpacking it."""

import math
import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """One buffer for each thread, as large as the largest matrix so far."""

    held = torch.empty(0, dtype=torch.uint8)

    def of(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory for a matrix, until the next is asked for."""
        size = math.prod(shape) * dtype.itemsize
        if len(self.held) < size:
            self.held = torch.empty(size, dtype=torch.uint8)
        return self.held[:size].view(dtype).view(shape)


SCRATCH = Scratch()
