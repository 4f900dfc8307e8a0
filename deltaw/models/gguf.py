"""Read a GGUF file (llama.cpp's one-file format): sizes, unpacked weights, tokenizer.

llama.cpp stores the rows of q and k so that rotary pairs are neighbours; they are put back into the half-split order of
Hugging Face checkpoints here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.models.config import ModelConfig
from deltaw.models.rope import Rope

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's words for the layers, and the checkpoint's."""

# What each tokenizer calls a word, by llama.cpp's name for it (`tokenizer.ggml.pre`).
GPT2_DIGITS = ("smollm",)


class GGUF:
    """An opened GGUF file of the Llama architecture.

    Raises:
        UserError: not a GGUF file, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self.reader: Any = GGUFReader(str(path))
        except (ValueError, OSError, IndexError) as e:
            raise UserError("This is no readable GGUF file.", where=str(path), why=str(e)) from e
        if (kind := self.field("general.architecture")) != "llama":
            raise UserError(f"GGUF architecture '{kind}' is not supported.", where=str(path),
                            remedy="Supported: llama (Llama 2 and 3, SmolLM2, Mistral).")  # fmt: skip

    def field(self, name: str, default: Any = None) -> Any:
        """The metadata field of this name."""
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def _size(self, name: str) -> int:
        value = self.field(f"llama.{name}")
        if value is None:
            raise UserError(f"The GGUF file does not say llama.{name}.", where=str(self.path))
        return int(value)

    @property
    def packing(self) -> str:
        """The storage type of most of its weights, such as `Q4_1`."""
        kinds = [str(t.tensor_type.name) for t in self.reader.tensors if t.data.ndim > 1]
        return max(set(kinds), key=kinds.count)

    def config(self) -> ModelConfig:
        """The model's sizes."""
        heads, width = self._size("attention.head_count"), self._size("embedding_length")
        head_width = int(self.field("llama.rope.dimension_count", width // heads))
        names = {t.name for t in self.reader.tensors}
        if "rope_freqs.weight" in names or self.field("llama.rope.scaling.type", "none") != "none":
            raise UserError("GGUF files with RoPE scaling are not supported yet.", where=str(self.path),
                            remedy="Take the safetensors folder of this model.")  # fmt: skip
        return ModelConfig(
            vocab=len(self.field("tokenizer.ggml.tokens")),
            width=width,
            layers=self._size("block_count"),
            heads=heads,
            kv_heads=int(self.field("llama.attention.head_count_kv", heads)),
            head_width=head_width,
            hidden=self._size("feed_forward_length"),
            context=self._size("context_length"),
            eps=float(np.format_float_positional(np.float32(self.field("llama.attention.layer_norm_rms_epsilon")))),
            rope=Rope(width=head_width, theta=float(self.field("llama.rope.freq_base", 1e4))),
            tied="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            o_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_up.bias" in names,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in a Hugging Face checkpoint, without the leading `model.`, and unpacked fp32 weights."""
        from gguf.quants import dequantize

        config = self.config()
        for tensor in self.reader.tensors:
            name = _renamed(tensor.name, str(self.path))
            w = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            if name.endswith(("q_proj.weight", "q_proj.bias")):
                w = half_split(w, config.heads)
            elif name.endswith(("k_proj.weight", "k_proj.bias")):
                w = half_split(w, config.kv_heads)
            yield name, w


def half_split(w: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: neighbours (2e, 2e + 1) of each head go to (e, e + E/2)."""
    pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
    return pairs.transpose(1, 2).reshape(w.shape)


def _renamed(name: str, where: str) -> str:
    parts = name.split(".")
    layer = f"layers.{parts[1]}." if parts[0] == "blk" else ""
    word, kind = parts[-2], parts[-1]
    if word not in NAMES:
        raise UserError(f"The tensor '{name}' has no place in a Llama decoder.", where=where)
    return f"{layer}{NAMES[word]}.{kind}"
