"""What a decoder needs to know of itself, read from a Hugging Face `config.json` or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.errors import UserError

FAMILIES = ("llama", "mistral")
"""`model_type`s that this decoder computes: Llama 2 and 3, SmolLM2, Mistral and whatever shares their layout."""

LARGEST = 1e12
"""No size or constant of a model is as large as this."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the slow rotations (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a Llama-family decoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    context: int
    eps: float = 1e-5
    theta: float = 1e4
    scaling: Llama3Scaling | None = None
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Read a parsed `config.json`.

        Raises:
            UserError: a family or an option that this decoder does not compute.
        """
        family = str(config.get("model_type"))
        if family not in FAMILIES:
            raise UserError(f"model_type '{family}' is not supported.", where=where,
                            remedy=f"Supported: {', '.join(FAMILIES)} (Llama 2 and 3, SmolLM2, Mistral).")  # fmt: skip
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise UserError(f"hidden_act '{act}' is not supported, only 'silu'.", where=where)
        sizes = ("num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size")
        if missing := [name for name in sizes if not isinstance(config.get(name), int)]:
            raise UserError(f"config.json does not say {missing[0]}.", where=where)
        try:
            read = cls._read(config, where)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
            raise UserError("config.json cannot be understood.", where=where, why=f"{type(e).__name__}: {e}.") from None
        sized = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "context", "eps", "theta")
        if odd := next((name for name in sized if not 0 < getattr(read, name) < LARGEST), None):
            raise UserError(f"config.json gives the model {getattr(read, odd)} as its {odd}.", where=where)
        if read.scaling is not None and min(vars(read.scaling).values()) <= 0:
            raise UserError("config.json stretches RoPE by factors that are not positive.", where=where)
        return read

    @classmethod
    def _read(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        context = int(config.get("max_position_embeddings", 2048))
        return cls(
            vocab=int(config["vocab_size"]),
            width=width,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or width // heads),
            hidden=int(config["intermediate_size"]),
            # Within its window a sliding-window model computes plain attention; beyond it this decoder would be wrong.
            context=min(context, int(config.get("sliding_window") or context)),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            theta=float(rope.get("rope_theta") or config.get("rope_theta") or 1e4),
            scaling=_scaling(rope, where),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """Write the `config.json` from which `transformers` builds the same model."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        if self.scaling is not None:
            rope = {**rope, "rope_type": "llama3", **vars(self.scaling)}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.hidden,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


def _scaling(rope: Mapping[str, Any], where: str) -> Llama3Scaling | None:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"RoPE scaling '{kind}' is not supported.", where=where, remedy="Supported: default, llama3.")
    return Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
