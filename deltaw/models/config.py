"""What a decoder needs to know of itself, read from a Hugging Face `config.json` or GGUF metadata.

What sets model families apart is data: a family is a row of a table, and the decoder asks the row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaw.errors import UserError, explained
from deltaw.models.rope import Dynamic, Rope, Yarn

LARGEST, MOST_LAYERS = 1e12, 1000
"""No size or constant of a model is as large as this, and none has so many layers."""
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
"""What we call them, and a configuration."""
SIZES = {"heads": "num_attention_heads", "width": "hidden_size", "vocab": "vocab_size", "layers": "num_hidden_layers",
         "hidden": "intermediate_size"}  # fmt: skip
"""What every configuration says: our names, and its keys."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders; the first row, Llama, is what all defaults say."""

    name: str
    """`model_type` in a Hugging Face `config.json`."""
    architecture: str
    shown: str
    """Its models, in words."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    """Queries, keys and values have biases, whatever `attention_bias` says of the whole attention."""
    biases: tuple[str, ...] = ()
    """Which biases `transformers` has a place for: those of `attention`, those of the `mlp`."""
    head_norms: bool = False
    """Queries and keys are normalised per head before they are rotated."""
    sandwich: bool = False
    """Attention and feed-forward network are normalised before and after."""
    fused: bool = False
    """One matrix makes queries, keys and values, and one gate and up."""
    unit_gain: bool = False
    """A norm's gain is one plus its weight."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the width."""
    tied: bool = False
    """The head is the embedding's table unless the configuration says otherwise."""
    gguf: str = ""
    """llama.cpp's name of the architecture."""
    interleaved: bool = False
    """llama.cpp stores the rows of q and k so that rotary pairs are neighbours."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What `transformers` takes for keys that a configuration leaves out."""


GEMMA: dict[str, Any] = {
    "biases": ("attention",), "activation": "gelu_tanh", "sandwich": True, "unit_gain": True,
    "scaled_embedding": True, "tied": True,
}  # fmt: skip
HEADS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
ROPES = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
ROWS = (
    Family(name="llama", architecture="LlamaForCausalLM", shown="Llama 2 and 3, SmolLM2", gguf="llama",
           interleaved=True, biases=("attention", "mlp")),
    Family(name="mistral", architecture="MistralForCausalLM", shown="Mistral", gguf="llama",
           interleaved=True, defaults={"sliding_window": 4096}),
    Family(name="qwen2", architecture="Qwen2ForCausalLM", shown="Qwen2, Qwen2.5", qkv_bias=True, gguf="qwen2"),
    Family(name="qwen3", architecture="Qwen3ForCausalLM", shown="Qwen3", head_norms=True, gguf="qwen3",
           biases=("attention",), defaults={"head_dim": 128}),
    Family(name="gemma2", architecture="Gemma2ForCausalLM", shown="Gemma 2", gguf="gemma2", defaults=HEADS | CAPS,
           **GEMMA),
    Family(name="gemma3_text", architecture="Gemma3ForCausalLM", shown="Gemma 3, text", head_norms=True, gguf="gemma3",
           defaults=HEADS | ROPES, **GEMMA),
    Family(name="phi3", architecture="Phi3ForCausalLM", shown="Phi-3", fused=True, gguf="phi3"),
)  # fmt: skip
FAMILIES = {row.name: row for row in ROWS}


def supported(known: Mapping[str, Family]) -> str:
    """The families by such names, for a refusal."""
    return f"Supported: {', '.join(f'{name} ({row.shown})' for name, row in known.items())}."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder. Zero stands for "there is none" in windows and caps."""

    family: Family = FAMILIES["llama"]
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    context: int
    eps: float = 1e-5
    rope: Rope
    windows: tuple[int, ...] = ()
    """How many tokens each layer sees back, its own included; 0: all of them."""
    local_rope: Rope | None = None
    """Of the layers that see a window, where it is another."""
    score_scale: float = 0.0
    """What attention scores are multiplied by; 0: one over the root of a head's width."""
    score_cap: float = 0.0
    logit_cap: float = 0.0
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read a parsed `config.json`.

        Raises:
            UserError: a family or an option that this decoder does not compute.
        """
        name = str(config.get("model_type"))
        if name not in FAMILIES:
            raise UserError(f"model_type '{name}' is not supported.", where=where, remedy=supported(FAMILIES))
        # Early Gemma 2 configurations say "gelu" in `hidden_act`, and mean the tanh form: that key is not read there.
        key = "hidden_activation" if FAMILIES[name].sandwich else "hidden_act"
        wanted = ACTIVATIONS[FAMILIES[name].activation]
        if (act := config.get(key) or wanted) != wanted:
            raise UserError(f"{key} '{act}' is not supported, only '{wanted}'.", where=where)
        if missing := [key for key in SIZES.values() if not isinstance(config.get(key), int)]:
            raise UserError(f"config.json does not say {missing[0]}.", where=where)
        if (layers := config["num_hidden_layers"]) > MOST_LAYERS:
            raise UserError(f"config.json gives the model {layers} as its layers.", where=where)
        with explained("config.json cannot be understood.", TypeError, ValueError, KeyError, AttributeError,
                       ArithmeticError, where=where, why="{kind}: {error}."):  # fmt: skip
            read = cls._read(FAMILIES[name], config, where)
        read.check(where)
        return read

    def check(self, where: str) -> None:
        """See that every size is one.

        Raises:
            UserError: one is not positive, or beyond all models.
        """
        named = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "context", "eps")
        sizes = {name: getattr(self, name) for name in named} | {"theta": self.rope.theta}
        sizes |= {"attention window": min(filter(None, self.windows), default=1), "rotary width": self.rope.width}
        if odd := next((name for name, size in sizes.items() if not 0 < size < LARGEST), None):
            raise UserError(f"config.json gives the model {sizes[odd]} as its {odd}.", where=where)
        if self.heads % self.kv_heads:
            raise UserError(f"{self.kv_heads} heads of keys and values are not shared evenly by {self.heads} heads.",
                            where=where)  # fmt: skip

    @classmethod
    def _read(cls, family: Family, config: Mapping[str, Any], where: str) -> "ModelConfig":
        config = {**family.defaults, **config}
        sizes = {ours: int(config[key]) for ours, key in SIZES.items()}
        head_width = int(config.get("head_dim") or sizes["width"] // sizes["heads"])
        context = int(config.get("max_position_embeddings", 2048))
        if config.get("use_bidirectional_attention"):
            raise UserError("Tokens of this model see those after them, which is not supported.", where=where)
        near, far = _ropes(family, config, head_width, context, where)
        match far.scaling:
            case Dynamic(factor=factor) | Yarn(factor=factor):
                context = max(context, int(factor * far.scaling.original_max_position_embeddings))
        bias = bool(config.get("attention_bias", False))
        # What transformers does not read of a family's configuration is not read here either.
        scalar = (family.sandwich and config.get("query_pre_attn_scalar")) or head_width
        score_cap = config.get("attn_logit_softcapping") if family.name == "gemma2" else None
        logit_cap = config.get("final_logit_softcapping") if family.sandwich else None
        return cls(
            family=family, **sizes, kv_heads=int(config.get("num_key_value_heads") or sizes["heads"]),
            head_width=head_width, context=context, eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=far, local_rope=near, windows=_windows(family, config), score_scale=1 / math.sqrt(float(scalar)),
            score_cap=float(score_cap or 0), logit_cap=float(logit_cap or 0),
            tied=bool(config.get("tie_word_embeddings", family.tied)), qkv_bias=bias or family.qkv_bias, o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        """Write the `config.json` from which `transformers` builds the same model."""
        family, rope = self.family, self.rope.to_hf(self.head_width)
        context = self.context
        if isinstance(self.rope.scaling, Dynamic):
            context = self.rope.scaling.original_max_position_embeddings
        written: dict[str, Any] = {
            "architectures": [family.architecture], "model_type": family.name,
            "hidden_activation" if family.sandwich else "hidden_act": ACTIVATIONS[family.activation],
            **{key: getattr(self, ours) for ours, key in SIZES.items()},
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_width,
            "max_position_embeddings": context, "rms_norm_eps": self.eps, "rope_theta": self.rope.theta,
            "rope_parameters": rope, "tie_word_embeddings": self.tied, "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias, "pad_token_id": None,  # a family's default may lie outside this vocabulary
        }  # fmt: skip
        if self.local_rope is not None:
            local = self.local_rope.to_hf(self.head_width)
            written["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        if "partial_rotary_factor" in rope:
            written["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if self.windows:
            kinds = ["sliding_attention" if w else "full_attention" for w in self.windows]
            written |= {"sliding_window": max(self.windows), "layer_types": kinds, "use_sliding_window": True}
        elif family.name in ("mistral", "phi3"):
            written["sliding_window"] = None  # transformers' own default is a window of 4,096
        if family.sandwich:
            written |= {"query_pre_attn_scalar": round(self.score_scale**-2),
                        "attn_logit_softcapping": self.score_cap or None,
                        "final_logit_softcapping": self.logit_cap or None}  # fmt: skip
        return written


def _ropes(family: Family, config: Mapping[str, Any], head_width: int, context: int, where: str
           ) -> tuple[Rope | None, Rope]:  # fmt: skip
    """RoPE of the layers with a window where it is another, and of all others."""
    told = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    far, near = dict(told.get("full_attention") or told), dict(told.get("sliding_attention") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        far.setdefault(key, config.get(key))
    if family.name != "phi3":
        far.pop("partial_rotary_factor")
    near.setdefault("rope_theta", config.get("rope_local_base_freq"))
    local = None if near["rope_theta"] is None else Rope.from_hf(near, head_width, context, where)
    return local, Rope.from_hf(far, head_width, context, where)


def _windows(family: Family, config: Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens each layer sees back; empty where every layer sees all."""
    layers, window = int(config["num_hidden_layers"]), int(config.get("sliding_window") or 0)
    if not window or (family.name.startswith("qwen") and not config.get("use_sliding_window", False)):
        return ()
    match config.get("layer_types"), family.name:
        case list(kinds), _ if len(kinds) == layers and family.name != "phi3":
            seen = [window if kind == "sliding_attention" else 0 for kind in kinds]
        case _, "qwen2" | "qwen3":
            seen = [window if i >= int(config.get("max_window_layers", 28)) else 0 for i in range(layers)]
        case _, "gemma2" | "gemma3_text":
            every = 2 if family.name == "gemma2" else int(config.get("sliding_window_pattern") or 6)
            seen = [window if (i + 1) % every else 0 for i in range(layers)]
        case _, "mistral" | "phi3":
            seen = [window] * layers
        case _:
            seen = []
    return tuple(seen) if any(seen) else ()
