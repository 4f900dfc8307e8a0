"""LoRA-FA: LoRA whose A stays as it was drawn, so that x is not kept for the backward pass, but A x alone.

Zhang et al. 2023, arXiv:2308.03303. The projected gradient is that of their later version (huggingface/peft#2468).
"""

import zlib
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from deltaw.adapters.adapter import Site
from deltaw.errors import UserError
from deltaw.methods.lora import LoRA, LowRank
from deltaw.settings import settings


class FrozenA(LowRank):
    """y = W x + scale * B dropout(A x), with A a buffer; `stored`: whether A is saved beside B.

    Dropout acts on A x: on x it would keep a mask of x's size, and with it what freezing A saves.
    """

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float, stored: bool) -> None:
        super().__init__(A_RI, B_OR, scale, dropout)
        del self.A
        self.register_buffer("A", A_RI, persistent=stored)

    def down(self, x_TI: Tensor, A_RI: Tensor) -> Tensor:
        return F.dropout(F.linear(x_TI, A_RI), self.dropout)

    def project(self) -> None:
        """From now on B's gradient is the one whose step comes nearest to that of W's: G A' (A A')^-1 / scale.

        It is what minimises |scale * g_B A - G| over g_B, for the gradient G of W, of which scale * G A' is known.
        """

        def projected(grad_OR: Tensor) -> Tensor:
            gram_RR = (self.A @ self.A.t()).double() * self.scale**2
            nearest_RO: Tensor = torch.linalg.solve(gram_RR, grad_OR.t().double())
            return nearest_RO.t().to(grad_OR.dtype)

        # On what each pass adds, whatever was added before and whichever optimizer takes it.
        self.B.register_hook(projected)  # type: ignore[no-untyped-call]  # of torch's


@settings
class LoRAFA(LoRA):
    """Train B alone: half the numbers of LoRA, and less memory, for what A's random rows let through."""

    peak_rate: ClassVar[float] = 4e-3

    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"  # type: ignore[assignment]  # it is only read
    """How A is drawn: uniform in ±1/sqrt(in), normal with deviation 1/rank, or with orthonormal rows."""
    a_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Draw A from this seed, and anew whenever the adapter is read: files then hold B alone."""
    project: bool = False
    """Turn B's gradient into the one that comes nearest to a step of W itself."""

    def pair(self, site: Site, rng: torch.Generator) -> LowRank:
        o, i = site.slot.weight.shape
        drawn = int(torch.randint(1 << 31, (), generator=rng))
        seed = drawn if self.a_seed is None else zlib.crc32(f"{self.a_seed}/{site.name}".encode())
        A_RI = _draw(self.init, site, i, seed)
        delta = FrozenA(A_RI, torch.zeros(o, site.rank), self.scale(site), self.dropout, self.a_seed is None)
        if self.project:
            delta.project()
        return delta


def _draw(init: str, site: Site, i: int, seed: int) -> Tensor:
    """A of a site. NumPy promises that this generator gives the same numbers for ever, as torch does not."""
    rng = np.random.RandomState(seed)
    if init == "kaiming":
        return torch.from_numpy(rng.uniform(-(i**-0.5), i**-0.5, (site.rank, i)).astype(np.float32))
    normal_IR = rng.normal(0, 1 / site.rank, (i, site.rank))
    if init == "orthogonal":
        if site.rank > i:
            raise UserError(f"{site.rank} rows of {i} numbers cannot be orthogonal.", where=site.name,
                            remedy="Take a lower --rank, or --init kaiming.")  # fmt: skip
        normal_IR = np.linalg.qr(normal_IR)[0]
    return torch.from_numpy(np.ascontiguousarray(normal_IR.T).astype(np.float32))
