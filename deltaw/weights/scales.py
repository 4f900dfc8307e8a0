"""How the scales of blocks are stored: as they are, or quantised once more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.packed import nearest
from deltaw.weights import TYPES
from deltaw.weights.bits import pack, stored_bytes, unpack
from deltaw.weights.levels import dynamic

Parts = Mapping[str, Tensor]
"""Tensors by name, as they are stored."""


@dataclass(frozen=True)
class Plain:
    """One fp32 number a block."""

    exact = True
    """Whether numbers are divided by the scale itself, or by what is left of it."""

    def store(self, scale_N: Tensor) -> Parts:
        """What is kept of the scales."""
        return {"absmax": scale_N}

    def read(self, kept: Parts, count: int) -> Tensor:  # noqa: ARG002 (others need it)
        """The scales again, in fp32."""
        return kept["absmax"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:
        """What native code reads them from, by the names of `Layout`."""
        return {"scale": self.read(kept, count)}

    def size(self, count: int) -> int:
        """Bytes that so many scales take."""
        return 4 * count

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Double:
    """QLoRA's double quantisation, as bitsandbytes has it: the mean taken away, then 8-bit dynamic codes in blocks."""

    exact = True
    BLOCK = 256

    def store(self, scale_N: Tensor) -> Parts:
        mean = scale_N.mean()
        blocks, count = _blocks(scale_N - mean, self.BLOCK), len(scale_N)
        most = blocks.abs().amax(1)
        codes = nearest((blocks / most.clamp(min=1e-38)[:, None]).clamp(-1, 1), dynamic().to(scale_N.device))
        return {"codes2": codes.flatten()[:count], "absmax2": most, "mean": mean.view(1)}

    def read(self, kept: Parts, count: int) -> Tensor:
        values = dynamic().to(kept["codes2"].device)[kept["codes2"].int()]
        return (_blocks(values, self.BLOCK) * kept["absmax2"][:, None]).flatten()[:count] + kept["mean"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:  # noqa: ARG002 (others need it)
        return {"scale": kept["codes2"], "nested": dynamic(), "most": kept["absmax2"], "mean": kept["mean"]}

    def size(self, count: int) -> int:
        return count + 4 * -(-count // self.BLOCK) + 4

    def __str__(self) -> str:
        return "-dq"


@dataclass(frozen=True)
class TwoLevel:
    """LQ-LoRA's: the least scale taken away, then unsigned integers in blocks whose maxima have a type of their own.

    The published code needs whole blocks, and fails where all scales of one are equal; here either is stored.
    """

    width: int = 8
    kind: str = "fp32"
    block: int = 256
    exact = False

    def store(self, scale_N: Tensor) -> Parts:
        least, top = scale_N.min(), (1 << self.width) - 1
        blocks = _blocks(scale_N - least, self.block)
        most = blocks.amax(1).to(TYPES[self.kind])
        codes = (blocks * top / most.float().clamp(min=1e-38)[:, None]).round().clamp(0, top)
        return {"codes2": pack(codes.flatten()[: len(scale_N)].to(torch.uint8), self.width), "most": most,
                "least": least.view(1)}  # fmt: skip

    def read(self, kept: Parts, count: int) -> Tensor:
        codes = _blocks(unpack(kept["codes2"], self.width, count).float(), self.block)
        step = kept["most"].float()[:, None] / ((1 << self.width) - 1)
        return (codes * step).flatten()[:count] + kept["least"]

    def laid(self, kept: Parts, count: int) -> Mapping[str, Any]:
        return {"scale": self.read(kept, count), "lasting": False}

    def size(self, count: int) -> int:
        return stored_bytes(count, self.width) + TYPES[self.kind].itemsize * -(-count // self.block) + 4

    def __str__(self) -> str:
        return f"-s{self.width}.{self.kind}.{self.block}"


Scales = Plain | Double | TwoLevel


def _blocks(values_N: Tensor, block: int) -> Tensor:
    """Rows of one block each, the last filled up with zeros."""
    return torch.nn.functional.pad(values_N, (0, -len(values_N) % block)).view(-1, block)
