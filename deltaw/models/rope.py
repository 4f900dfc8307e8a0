"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.models.config import Llama3Scaling, ModelConfig


def turns(at_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for tokens at positions `at_T`, each of shape T x 1 x E."""
    half = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=at_T.device)
    freq = config.theta ** -(half / config.head_width)
    if config.scaling is not None:
        freq = _stretched(freq, config.scaling)
    angle = (at_T.float()[:, None] * freq).repeat(1, 2)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn every pair (x[e], x[e + E/2]) by its token's angle."""
    a, b = x_THE.chunk(2, -1)
    return x_THE * cos_T1E + torch.cat((-b, a), -1) * sin_T1E


def _stretched(freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow rotations are divided by `factor`, fast ones kept, those between blended (Llama 3.1's reference code)."""
    wavelength = 2 * math.pi / freq
    low, high, whole = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    keep = ((whole / wavelength - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling.factor
