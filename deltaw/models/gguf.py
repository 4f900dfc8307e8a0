"""Read a GGUF file (llama.cpp's one-file format): sizes, unpacked weights, tokenizer.

Its words are translated into those of a Hugging Face checkpoint and `config.json`, and from there on nothing knows the
difference. Three things are stored otherwise: Llama's q and k rows (rotary pairs are neighbours), Gemma's norms (one is
added), and Llama 3's stretch of RoPE (a tensor of divisors).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError, explained
from deltaw.models.config import ROWS, Family, ModelConfig, supported
from deltaw.models.rope import Llama3, plain

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""GGUF's words for the layers, and the checkpoint's."""
SANDWICH = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
FUSED = {"ffn_up": "mlp.gate_up_proj"}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys of a `config.json`, and GGUF's after the architecture's name."""
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
            "rms_norm_eps")  # fmt: skip
LARGE_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose scores alone are scaled by width / heads; the file does not say so."""
LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.2; all else is the same in both."""


def names(family: Family) -> dict[str, str]:
    """GGUF's words for the layers of a family, and the checkpoint's."""
    return {**NAMES, **(SANDWICH if family.sandwich else {}), **(FUSED if family.fused else {})}


class GGUF:
    """An opened GGUF file of a family that the decoder computes.

    Raises:
        UserError: not a GGUF file, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path

        class Reader(GGUFReader):  # type: ignore[misc]  # gguf has no types
            """Its own reads on for ever in a list that is longer than the file."""

            def _get(self, offset: int, dtype: Any, count: int = 1, **more: Any) -> Any:
                got = super()._get(offset, dtype, count, **more)
                if len(got) < count:
                    raise ValueError("it ends within a field")
                return got

        # The reader checks little.
        with explained("This is no readable GGUF file.", Exception, where=path, why="{error}.",
                       remedy="Fetch it anew."):  # fmt: skip
            self.reader: Any = Reader(str(path))
        with self._understood():
            kind, holds = self.field("general.architecture"), self.field("general.type")
        known = {row.gguf: row for row in reversed(ROWS)}
        if kind not in known:
            raise UserError(f"GGUF architecture '{kind}' is not supported.", where=str(path), remedy=supported(known))
        if holds == "adapter":
            raise UserError("This GGUF file is a LoRA, and no model.", where=str(path),
                            remedy="llama.cpp wears it with --lora, beside the base's own file.")  # fmt: skip
        self.family = known[kind]

    def field(self, name: str, default: Any = None) -> Any:
        """The metadata field of this name."""
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def _told(self, name: str) -> Any:
        return self.field(f"{self.family.gguf}.{name}")

    @property
    def packing(self) -> str:
        """The storage type of most of its weights, such as `Q4_1`."""
        return mode(str(t.tensor_type.name) for t in self.reader.tensors if t.data.ndim > 1)

    def config(self) -> ModelConfig:
        """The model's sizes.

        Raises:
            UserError: one is missing, or RoPE is scaled in a way that the decoder does not know.
        """
        with self._understood():
            tensors = {t.name: t for t in self.reader.tensors}
            told = {key: self._told(name) for key, name in SIZES.items()}
            told = {key: _decimal(value) for key, value in told.items() if value is not None}
            told |= {"model_type": self.family.name, "vocab_size": len(self.field("tokenizer.ggml.tokens"))}
            if missing := next((SIZES[key] for key in REQUIRED if key not in told), None):
                raise UserError(f"The GGUF file does not say {self.family.gguf}.{missing}.", where=str(self.path))
            width, heads = told["hidden_size"], told["num_attention_heads"]
            head_width = told.setdefault("head_dim", width // heads)
            told["tie_word_embeddings"] = "output.weight" not in tensors
            told["attention_bias"] = "blk.0.attn_output.bias" in tensors
            told["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
            told["partial_rotary_factor"] = (self._told("rope.dimension_count") or head_width) / head_width
            told.setdefault("sliding_window", None)
            if self.family.sandwich:
                large = LARGE_GEMMA[self.family.name] == told["num_hidden_layers"]
                told["query_pre_attn_scalar"] = width // heads if large else head_width
            told["rope_scaling"] = self._scaling()
            config = ModelConfig.from_hf(told, str(self.path))
            if "rope_freqs.weight" in tensors:
                scaling = self._llama3(tensors["rope_freqs.weight"], config)
                config = replace(config, rope=replace(config.rope, scaling=scaling))
            return config

    def _understood(self) -> AbstractContextManager[None]:
        return explained("This GGUF file cannot be understood.", ArithmeticError, TypeError, ValueError, LookupError,
                         RuntimeError, where=self.path, why="{kind}: {error}.", remedy="Fetch it anew.")  # fmt: skip

    def _scaling(self) -> dict[str, Any] | None:
        kind = self._told("rope.scaling.type")
        if kind in (None, "none"):
            return None
        factor, context = self._told("rope.scaling.factor"), self._told("rope.scaling.original_context_length")
        if factor is None:
            raise UserError(f"RoPE scaling '{kind}' of this GGUF file has no factor.", where=str(self.path))
        original = {} if context is None else {"original_max_position_embeddings": context}
        return {"rope_type": kind, "factor": _decimal(factor), **original}

    def _llama3(self, tensor: Any, config: ModelConfig) -> Llama3:
        stored = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        for factor in LLAMA3_FACTORS:
            scaling = Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=8192)  # fmt: skip
            freq = plain(config.rope.theta, config.rope.width, stored)
            divisors = freq / scaling.frequencies(config.rope.theta, config.rope.width, torch.zeros(1, 1))
            if divisors.shape == stored.shape and torch.allclose(divisors, stored, rtol=1e-3):
                return scaling
        raise UserError("This GGUF file stretches RoPE as no Llama 3 does.", where=str(self.path),
                        remedy="Take the safetensors folder of this model.")  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in a Hugging Face checkpoint, without the leading `model.`, and unpacked fp32 weights."""
        config = self.config()
        for tensor in self.reader.tensors:
            if tensor.name != "rope_freqs.weight":
                with self._understood():
                    name = self._renamed(tensor.name)
                    w = ordered(name, self._unpacked(tensor), config, back=True)
                yield name, w

    def _unpacked(self, tensor: Any) -> Tensor:
        from gguf.quants import dequantize

        with explained(f"'{tensor.name}' is packed as {tensor.tensor_type.name}, which cannot be unpacked.",
                       NotImplementedError, where=self.path, why=""):  # fmt: skip
            return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    def _renamed(self, name: str) -> str:
        parts, words = name.split("."), names(self.family)
        layer = f"layers.{parts[1]}." if parts[0] == "blk" else ""
        word, kind = parts[-2], parts[-1]
        if word not in words:
            raise UserError(f"The tensor '{name}' has no place in this decoder.", where=str(self.path))
        return f"{layer}{words[word]}.{kind}"


def half_split(w: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: neighbours (2e, 2e + 1) of each head go to (e, e + E/2)."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def ordered(name: str, w: Tensor, config: ModelConfig, back: bool = False) -> Tensor:
    """A weight as llama.cpp has it: rotary pairs as neighbours (Llama), one added to norms (Gemma); `back`: undone."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads and config.family.interleaved:
        neighbours = w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2)
        return half_split(w, heads) if back else neighbours.reshape(w.shape)
    if config.family.unit_gain and name.endswith("norm.weight"):
        return w - 1 if back else w + 1
    return w


def _decimal(value: Any) -> Any:
    """A number stored in fp32 as it was written: 1e-05, not 9.99999974e-06."""
    return float(np.format_float_positional(np.float32(value))) if isinstance(value, float) else value
