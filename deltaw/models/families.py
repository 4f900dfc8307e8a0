"""What sets model families apart, as data: a family is a row of this table, and the decoder asks the row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


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
