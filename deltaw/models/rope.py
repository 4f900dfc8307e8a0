"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama checkpoints.

What a configuration calls RoPE scaling stretches the angles so that longer texts fit; each way is one class here, whose
fields are the configuration's keys.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Linear:
    """All rotations are slowed (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float
    magnitude = 1.0

    def frequencies(self, theta: float, width: int, length_T1: Tensor) -> Tensor:
        return plain(theta, width, length_T1) / self.factor


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A document longer than those of pre-training gets a larger theta, by its length (NTK-aware scaling)."""

    factor: float
    original_max_position_embeddings: int
    magnitude = 1.0

    def frequencies(self, theta: float, width: int, length_T1: Tensor) -> Tensor:
        over_T1 = length_T1.clamp(min=self.original_max_position_embeddings) / self.original_max_position_embeddings
        theta_T1 = theta * (self.factor * over_T1 - (self.factor - 1)) ** (width / (width - 2))
        return theta_T1 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=length_T1.device) / width)


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Slow rotations are slowed further, fast ones kept, those between blended (Llama 3.1's reference code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    magnitude = 1.0

    def frequencies(self, theta: float, width: int, length_T1: Tensor) -> Tensor:
        freq = plain(theta, width, length_T1)
        turns = self.original_max_position_embeddings * freq / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / self.factor


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """As Llama 3's, blended over the pair's number, and with sharper attention (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharper(self.mscale) / self._sharper(self.mscale_all_dim)
        return self._sharper(1.0)

    def frequencies(self, theta: float, width: int, length_T1: Tensor) -> Tensor:
        freq = plain(theta, width, length_T1)
        low, high = (self._pair(rotations, theta, width) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        pair = torch.arange(width // 2, dtype=torch.float32, device=freq.device)
        slowed = ((pair - low) / (high - low or 0.001)).clamp(0, 1)
        return freq * (1 - slowed) + freq / self.factor * slowed

    def _sharper(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _pair(self, rotations: float, theta: float, width: int) -> float:
        """The pair that turns so many times over the original context."""
        turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))


Scaling = Linear | Dynamic | Llama3 | Yarn
KINDS: dict[str, type[Scaling]] = {"linear": Linear, "dynamic": Dynamic, "llama3": Llama3, "yarn": Yarn}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions become angles: of the first `width` numbers of every head."""

    width: int
    theta: float = 1e4
    scaling: Scaling | None = None

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], head_width: int, context: int, where: str) -> "Rope":
        """Read what a configuration calls `rope_parameters`, or `rope_scaling` with a theta.

        Raises:
            UserError: a way of scaling that is none of these.
        """
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        width = int(head_width * float(rope.get("partial_rotary_factor") or 1))
        theta = float(rope.get("rope_theta") or 1e4)
        if kind == "default":
            return cls(width=width, theta=theta)
        if kind not in KINDS:
            raise UserError(f"RoPE scaling '{kind}' is not supported.", where=where,
                            remedy=f"Supported: default, {', '.join(KINDS)}.")  # fmt: skip
        told = {"original_max_position_embeddings": context, **rope}
        values = {f.name: told[f.name] for f in fields(KINDS[kind]) if told.get(f.name) is not None}
        if odd := next((name for name, v in values.items() if not float(v) > 0 and name != "truncate"), None):
            raise UserError("config.json stretches RoPE by numbers that are not positive.", where=where,
                            why=f"{odd} is {values[odd]}.")  # fmt: skip
        return cls(width=width, theta=theta, scaling=KINDS[kind](**values))

    def to_hf(self, head_width: int) -> dict[str, Any]:
        """What a configuration calls `rope_parameters`."""
        kind = next((name for name, k in KINDS.items() if type(self.scaling) is k), "default")
        part = {"partial_rotary_factor": self.width / head_width} if self.width < head_width else {}
        told = {} if self.scaling is None else {k: v for k, v in asdict(self.scaling).items() if v is not None}
        return {"rope_type": kind, "rope_theta": self.theta, **part, **told}

    def turns(self, at_T: Tensor, length_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for tokens at positions `at_T` of documents that are `length_T` long; both T x 1 x E."""
        if self.scaling is None:
            freq, magnitude = plain(self.theta, self.width, at_T), 1.0
        else:
            freq = self.scaling.frequencies(self.theta, self.width, length_T[:, None])
            magnitude = self.scaling.magnitude
        angle = (at_T.float()[:, None] * freq).repeat(1, 2)[:, None]
        return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)


def plain(theta: float, width: int, like: Tensor) -> Tensor:
    """Angle per position of each rotary pair, not stretched."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
