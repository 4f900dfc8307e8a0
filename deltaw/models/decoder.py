"""A Llama-family decoder: SmolLM2, Llama 2 and 3, Mistral. One class for training and serving.

It owns no trainable parameter: its tensors are buffers, and what is trained belongs to an adapter in its slots. Module
names are those of the Hugging Face checkpoint, without the leading `model.`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.errors import UserError
from deltaw.models.config import ModelConfig
from deltaw.models.rope import rotate, turns
from deltaw.models.seen import Seen
from deltaw.models.slots import Attend, Embedding, Linear, RMSNorm, Slot
from deltaw.weights import Weight
from deltaw.weights.dense import Dense


def _linear(o: int, i: int, bias: bool) -> Linear:
    return Linear(Dense(torch.empty(o, i)), torch.empty(o) if bias else None)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_width = c.head_width
        q, kv, bias = c.heads * c.head_width, c.kv_heads * c.head_width, c.attention_bias
        self.q_proj, self.k_proj = _linear(q, c.width, bias), _linear(kv, c.width, bias)
        self.v_proj, self.o_proj = _linear(kv, c.width, bias), _linear(c.width, q, bias)
        self.attend = Attend()

    def forward(self, x_TD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, seen: Seen) -> Tensor:
        T = x_TD.shape[0]
        q_THE = rotate(self.q_proj(x_TD).view(T, -1, self.head_width), cos_T1E, sin_T1E)
        k_TKE = rotate(self.k_proj(x_TD).view(T, -1, self.head_width), cos_T1E, sin_T1E)
        v_TKE = self.v_proj(x_TD).view(T, -1, self.head_width)
        y_TD: Tensor = self.o_proj(self.attend(q_THE, k_TKE, v_TKE, seen).reshape(T, -1))
        return y_TD


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(c.hidden, c.width, c.mlp_bias)
        self.up_proj = _linear(c.hidden, c.width, c.mlp_bias)
        self.down_proj = _linear(c.width, c.hidden, c.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


class Layer(nn.Module):
    """Attention, then a gated feed-forward network, each around a residual."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(torch.empty(c.width), c.eps)
        self.post_attention_layernorm = RMSNorm(torch.empty(c.width), c.eps)

    def forward(self, x_TD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, seen: Seen) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_T1E, sin_T1E, seen)
        y_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return y_TD


class Decoder(nn.Module):
    """Token ids in, hidden states out; the head is applied by whoever needs logits, to the rows it needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(torch.empty(config.vocab, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(torch.empty(config.width), config.eps)
        self.lm_head = None if config.tied else _linear(config.vocab, config.width, bias=False)

    def hidden(
        self, ids_T: Tensor, at_T: Tensor, seen: Seen, recompute: bool = False, depth: int | None = None
    ) -> Tensor:
        """Hidden states h_TD before the head, for tokens at positions `at_T`.

        `recompute`: keep only each layer's input for the backward pass and run the layer again there
        (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174). `depth`: run only so many layers, as a measurement
        of what all of them would take.
        """
        try:
            x_TD: Tensor = self.embed_tokens(ids_T)
        except IndexError:
            raise UserError(
                f"The tokenizer gives the id {int(ids_T.max())}, and the model has {self.config.vocab} rows.",
                why="Tokenizer and model do not belong together.",
            ) from None
        cos_T1E, sin_T1E = turns(at_T, self.config, x_TD.dtype)
        for i, layer in enumerate(self.layers[:depth]):
            around = (x_TD, cos_T1E, sin_T1E, seen.layer(i))
            x_TD = checkpoint(layer, *around, use_reentrant=False) if recompute else layer(*around)
        h_TD: Tensor = self.norm(x_TD)
        return h_TD

    def head_VD(self) -> Tensor:
        """The output matrix as the adapter left it (a tied one is the embedding's table), gradients included."""
        slot: Slot = self.embed_tokens if self.lm_head is None else self.lm_head
        name = "table" if self.lm_head is None else "weight"
        part: Any = getattr(slot, name) if slot.delta is None else slot.delta.merged(slot)[name]
        table_VD: Tensor = part.dense() if isinstance(part, Weight) else part
        return table_VD

    def logits(self, h_TD: Tensor) -> Tensor:
        """Logits of shape T x V."""
        return F.linear(h_TD, self.head_VD())

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have."""
        return self.embed_tokens.table.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.embed_tokens.table.device
