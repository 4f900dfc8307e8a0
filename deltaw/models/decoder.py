"""One decoder for all families of `config.py`, for training and serving.

It owns no trainable parameter: its tensors are buffers, and what is trained belongs to an adapter in its slots. Module
names are those of the Hugging Face checkpoint, without the leading `model.`.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.errors import UserError
from deltaw.kernels.products import times
from deltaw.kernels.rows import gated, rotate
from deltaw.models.config import ModelConfig
from deltaw.models.fused import together
from deltaw.models.rope import Dynamic
from deltaw.models.seen import Score, Seen
from deltaw.models.slots import Attend, Embedding, Linear, Positions, RMSNorm, Slot
from deltaw.weights import Dense, Weight


def _linear(o: int, i: int, bias: bool) -> Linear:
    return Linear(Dense(torch.empty(o, i)), torch.empty(o) if bias else None)


def _norm(c: ModelConfig, width: int) -> RMSNorm:
    return RMSNorm(torch.empty(width), c.eps, c.family.unit_gain)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: ModelConfig, window: int) -> None:
        super().__init__()
        self.head_width, self.heads, self.kv_heads = c.head_width, c.heads, c.kv_heads
        self.fused, self.normed = c.family.fused, c.family.head_norms
        q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
        if self.fused:
            self.qkv_proj = _linear(q + 2 * kv, c.width, c.qkv_bias)
        else:
            self.q_proj, self.k_proj = _linear(q, c.width, c.qkv_bias), _linear(kv, c.width, c.qkv_bias)
            self.v_proj = _linear(kv, c.width, c.qkv_bias)
        self.o_proj = _linear(c.width, q, c.o_bias)
        if self.normed:
            self.q_norm, self.k_norm = _norm(c, c.head_width), _norm(c, c.head_width)
        score = Score(c.score_scale or 1 / math.sqrt(c.head_width), c.score_cap, window)
        self.attend = Attend(score, c.heads, c.kv_heads, c.head_width)

    def forward(self, x_TD: Tensor, turn: Tensor, seen: Seen) -> Tensor:
        q_THE, k_TKE, v_TKE = self._projected(x_TD)
        if self.normed:
            q_THE, k_TKE = self.q_norm(q_THE), self.k_norm(k_TKE)
        y_THE = self.attend(rotate(q_THE, *turn), rotate(k_TKE, *turn), v_TKE, seen)
        y_TD: Tensor = self.o_proj(y_THE.reshape(len(x_TD), -1))
        return y_TD

    def _projected(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        if self.fused:
            y_THE = self.qkv_proj(x_TD).view(len(x_TD), -1, self.head_width)
            return tuple(y_THE.split((self.heads, self.kv_heads, self.kv_heads), 1))
        three = together((self.q_proj, self.k_proj, self.v_proj), x_TD)
        return tuple(y_TO.view(len(x_TD), -1, self.head_width) for y_TO in three)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.fused, self.activation = c.family.fused, c.family.activation
        if self.fused:
            self.gate_up_proj = _linear(2 * c.hidden, c.width, c.mlp_bias)
        else:
            self.gate_proj = _linear(c.hidden, c.width, c.mlp_bias)
            self.up_proj = _linear(c.hidden, c.width, c.mlp_bias)
        self.down_proj = _linear(c.width, c.hidden, c.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fused:
            gate_TI, up_TI = (half.contiguous() for half in self.gate_up_proj(x_TD).chunk(2, -1))
        else:
            gate_TI, up_TI = together((self.gate_proj, self.up_proj), x_TD)
        y_TD: Tensor = self.down_proj(gated(gate_TI, up_TI, self.activation == "gelu_tanh"))
        return y_TD


class Layer(nn.Module):
    """Attention, then a gated feed-forward network, each around a residual."""

    def __init__(self, c: ModelConfig, window: int) -> None:
        super().__init__()
        self.sandwich, self.local = c.family.sandwich, window > 0 and c.local_rope is not None
        self.self_attn, self.mlp = Attention(c, window), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = _norm(c, c.width), _norm(c, c.width)
        if self.sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = _norm(c, c.width), _norm(c, c.width)

    def forward(self, x_TD: Tensor, turn: Tensor, seen: Seen) -> Tensor:
        y_TD = self.self_attn(self.input_layernorm(x_TD), turn, seen)
        if self.sandwich:
            x_TD = x_TD + self.post_attention_layernorm(y_TD)
            y_TD = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD)))
        else:  # the norm is named by where it stands: before the feed-forward network
            x_TD = x_TD + y_TD
            y_TD = self.mlp(self.post_attention_layernorm(x_TD))
        out_TD: Tensor = x_TD + y_TD
        return out_TD


class Decoder(nn.Module):
    """Token ids in, hidden states out; the head is applied by whoever needs logits, to the rows it needs."""

    vocabulary = slice(None)
    """The tokens whose logits it gives."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.positions = Positions(config.rope, config.context)
        scale = config.width**0.5 if config.family.scaled_embedding else 1.0
        self.embed_tokens = Embedding(torch.empty(config.vocab, config.width), scale)
        windows = config.windows or (0,) * config.layers
        self.layers = nn.ModuleList(Layer(config, window) for window in windows)
        self.norm = _norm(config, config.width)
        self.lm_head = None if config.tied else _linear(config.vocab, config.width, bias=False)

    def hidden(self, ids_T: Tensor, at_T: Tensor, seen: Seen, recompute: bool = False,
               depth: int | None = None) -> Tensor:  # fmt: skip
        """Hidden states h_TD before the head, for tokens at positions `at_T`.

        `recompute`: keep only each layer's input for the backward pass and run the layer again there
        (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174). `depth`: run only so many layers, as a measurement
        of what all of them would take.
        """
        try:
            x_TD: Tensor = self.embed_tokens(ids_T)
        except IndexError:
            raise UserError(f"The tokenizer gives the id {ids_T.max()}, and the model has {self.config.vocab} rows.",
                            why="Tokenizer and model do not belong together.") from None  # fmt: skip
        far, near = self.angles(at_T + self.before, seen)
        for i, layer in enumerate(self.layers[:depth]):
            around = (x_TD, near if layer.local else far, seen.layer(i))
            x_TD = checkpoint(layer, *around, use_reentrant=False) if recompute else layer(*around)
        h_TD: Tensor = self.norm(x_TD)
        return h_TD

    def angles(self, at_T: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """By what tokens at these positions are turned, in layers that see all and in local ones: 2 x T x 1 x E."""
        length_T, local = seen.lengths(at_T), self._config.local_rope
        far = self.positions(at_T, length_T, self.dtype)
        return far, far if local is None else torch.stack(local.turns(at_T, length_T, self.dtype))

    @property
    def config(self) -> ModelConfig:
        """Sizes and constants, as they are now: positions and biases may have been merged into.

        Attention, or the feed-forward networks, have biases as soon as one of their layers has one that is new.
        """
        given, biased = self._config, {name.split(".")[1] + "." * name.endswith("o_proj")
                                       for name, layer in self.layers.named_modules()
                                       if isinstance(layer, Linear) and layer.bias is not None}  # fmt: skip
        new = "self_attn." in biased or ("self_attn" in biased and not given.qkv_bias)
        return replace(given, rope=self.positions.rope, context=self.positions.context, mlp_bias="mlp" in biased,
                       qkv_bias=given.qkv_bias or new, o_bias=given.o_bias or new)  # fmt: skip

    @property
    def before(self) -> int:
        """How many tokens what is worn puts before the first."""
        worn = (module.delta for module in self.modules() if isinstance(module, Attend))
        return max((delta.before for delta in worn if delta is not None), default=0)

    @property
    def context(self) -> int:
        """How many tokens a document may have."""
        return int(self._reach.context) - self.before

    @property
    def _reach(self) -> Any:
        """The positions as they are worn: something with a `rope` and a `context`."""
        return self.positions.delta or self.positions

    def head_VD(self) -> Tensor:
        """The output matrix as the adapter left it (a tied one is the embedding's table), gradients included."""
        slot: Slot = self.embed_tokens if self.lm_head is None else self.lm_head
        name = "table" if self.lm_head is None else "weight"
        delta = slot.delta if slot.delta is not None and slot.delta.heads else None
        part: Any = getattr(slot, name) if delta is None else delta.merged(slot)[name]
        table_VD: Tensor = part.dense() if isinstance(part, Weight) else part
        return table_VD

    def logits(self, h_TD: Tensor) -> Tensor:
        """Logits of shape T x V."""
        logits_TV, cap = times(h_TD, self.head_VD()[self.vocabulary]), self._config.logit_cap
        return logits_TV.div(cap).tanh().mul(cap) if cap else logits_TV

    def shares(self, longest: int) -> bool:
        """Whether documents of up to so many tokens may share their beginnings: not where lengths change the angles."""
        scaling = self._reach.rope.scaling
        return not isinstance(scaling, Dynamic) or longest + self.before <= scaling.original_max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have."""
        return self.embed_tokens.table.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.embed_tokens.table.device
