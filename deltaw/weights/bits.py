"""Codes of 2, 3, 4 or 8 bits in bytes, the first code in the highest bits, as bitsandbytes has it.

Three bits are stored as two and one, each packed by itself, so that no code lies across a byte's border.
"""

import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Of how many bits the pieces of a code are, the lowest first; each divides a byte."""


def stored_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return sum(-(-count * piece // 8) for piece in PLANES[width])


def pack(codes_N: Tensor, width: int) -> Tensor:
    """Put codes below 2**width, as uint8, together; what is left of the last byte is zero."""
    planes, low = [], 0
    for piece in PLANES[width]:
        part_N, per = codes_N >> low & (1 << piece) - 1, 8 // piece
        if over := -len(part_N) % per:
            part_N = torch.nn.functional.pad(part_N, (0, over))
        part_N = part_N.view(-1, per)
        planes.append(sum((part_N[:, i] << 8 - piece * (i + 1) for i in range(1, per)), part_N[:, 0] << 8 - piece))
        low += piece
    return torch.cat(planes)


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The codes again, as uint8."""
    whole, low, start = torch.zeros(count, dtype=torch.uint8, device=packed.device), 0, 0
    for piece in PLANES[width]:
        size, per = -(-count * piece // 8), 8 // piece
        plane = packed[start : start + size]
        parts = torch.stack([plane >> 8 - piece * (i + 1) & (1 << piece) - 1 for i in range(per)], 1)
        whole |= parts.flatten()[:count] << low
        low, start = low + piece, start + size
    return whole
