"""Keys and values of the tokens so far, of sequences of unequal length. It is an argument, never a layer's state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.models.config import ModelConfig
from deltaw.models.seen import Documents


class Cache:
    """Room for `room` tokens of each of B sequences in every layer: 2 * layers * B * room * K * E values."""

    def __init__(
        self, config: ModelConfig, prompts: Documents, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.prompts = prompts
        # A sequence's tokens in the flat row: its stem's, then its own. A span that others stem from is no sequence.
        stems = {(s.stem_start, s.stem_stop) for s in prompts.spans if s.stem_stop > s.stem_start}
        self.rows = [torch.tensor([*range(s.stem_start, s.stem_stop), *range(s.start, s.stop)], device=device)
                     for s in prompts.spans if (s.start, s.stop) not in stems]  # fmt: skip
        self.lengths_B = torch.tensor([len(row) for row in self.rows], device=device)
        shape = (config.layers, len(self.rows), config.kv_heads, max(map(len, self.rows)) + room, config.head_width)
        self.k_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.used = int(self.lengths_B.max())

    def prefill(self) -> Prefill:
        """What the prompts see, remembering every layer's keys and values."""
        return Prefill(self, 0)

    def next(self) -> Step:
        """What one more token of every sequence sees; makes room for it."""
        self.lengths_B = self.lengths_B + 1
        self.used = int(self.lengths_B.max())
        return Step(self, 0)

    def keep(self, alive_B: Tensor) -> None:
        """Forget the other sequences."""
        self.k_LBKSE, self.v_LBKSE = self.k_LBKSE[:, alive_B], self.v_LBKSE[:, alive_B]
        self.lengths_B = self.lengths_B[alive_B]

    def last_tokens(self) -> Tensor:
        """Index in the flat row of every prompt's last token."""
        return torch.stack([row[-1] for row in self.rows])


class Prefill:
    """Prompts laid flat; one layer's view."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def layer(self, index: int) -> Prefill:
        return Prefill(self.cache, index)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        for b, row in enumerate(self.cache.rows):
            self.cache.k_LBKSE[self.index, b, :, : len(row)] = k_TKE[row].transpose(0, 1)
            self.cache.v_LBKSE[self.index, b, :, : len(row)] = v_TKE[row].transpose(0, 1)
        return self.cache.prompts.attend(q_THE, k_TKE, v_TKE)


class Step:
    """One new token of every sequence; one layer's view."""

    def __init__(self, cache: Cache, index: int, mask_B11S: Tensor | None = None) -> None:
        self.cache, self.index = cache, index
        if mask_B11S is None:
            at_S = torch.arange(cache.used, device=cache.lengths_B.device)
            mask_B11S = (at_S < cache.lengths_B[:, None])[:, None, None]
        self.mask_B11S = mask_B11S

    def layer(self, index: int) -> Step:
        return Step(self.cache, index, self.mask_B11S)

    def attend(self, q_BHE: Tensor, k_BKE: Tensor, v_BKE: Tensor) -> Tensor:
        cache, each_B = self.cache, torch.arange(len(q_BHE), device=q_BHE.device)
        cache.k_LBKSE[self.index, each_B, :, cache.lengths_B - 1] = k_BKE
        cache.v_LBKSE[self.index, each_B, :, cache.lengths_B - 1] = v_BKE
        k_BKSE, v_BKSE = cache.k_LBKSE[self.index, :, :, : cache.used], cache.v_LBKSE[self.index, :, :, : cache.used]
        y_BH1E = F.scaled_dot_product_attention(
            q_BHE[:, :, None], k_BKSE, v_BKSE, attn_mask=self.mask_B11S, enable_gqa=q_BHE.shape[1] != k_BKE.shape[1]
        )
        return y_BH1E[:, :, 0]
