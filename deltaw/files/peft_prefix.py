"""Prefixes in the format of PEFT: one matrix of P rows, each with K and V of every layer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.errors import UserError
from deltaw.files import foreign
from deltaw.files.adapters import filled
from deltaw.files.foreign import CONFIG, WEIGHTS
from deltaw.methods import method
from deltaw.methods.prefix_tuning import Prefix
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder

KIND, KEY = "PREFIX_TUNING", "prompt_embeddings"


def is_prefix(adapter: Adapter) -> bool:
    """Whether this adapter is keys and values, and nothing else."""
    return all(isinstance(delta, Prefix) for _, delta in adapter.named_deltas())


def write(adapter: Adapter, model: Decoder, base: str, folder: Path) -> None:
    """Write a prefix so that PEFT loads it onto `base`.

    Raises:
        UserError: it is attended to apart, which PEFT cannot. Diverged: a value is not finite.
    """
    c, pairs = model.config, []
    for _, delta in adapter.named_deltas():
        assert isinstance(delta, Prefix)
        if not delta.before:
            raise UserError("PEFT knows no prefix behind a gate.", remedy="Train without --gate to go there.")
        pairs.append(torch.stack(delta.pair(), 1))
    rows_PX = torch.stack(pairs, 1).flatten(1)
    config = {**_shape(c, len(rows_PX)), "prefix_projection": False, "num_transformer_submodules": 1}
    foreign.write(folder, KIND, base, config, {KEY: rows_PX})


def _shape(c: ModelConfig, tokens: int) -> dict[str, int]:
    width = c.kv_heads * c.head_width
    return {"num_virtual_tokens": tokens, "num_layers": c.layers, "num_attention_heads": c.kv_heads,
            "token_dim": width, "encoder_hidden_size": width}  # fmt: skip


def read(told: dict[str, Any], tensors: dict[str, Tensor], model: Decoder, folder: Path) -> Adapter:
    """Build the prefix that a folder of PEFT holds on `model`.

    Raises:
        UserError: it has other tensors, or is one of another model.
    """
    c, t = model.config, tensors.get(KEY)
    if t is None or len(tensors) > 1 or t.ndim != 2:
        raise UserError(f"A prefix is one tensor, '{KEY}'.", where=str(folder / WEIGHTS),
                        why=f"There are: {', '.join(tensors)[:100] or 'none'}.")  # fmt: skip
    if t.shape[1:] != (2 * c.layers * c.kv_heads * c.head_width,):
        raise UserError("This prefix was made for another model.", where=str(folder),
                        why=f"It has {tuple(t.shape)[-1]:,} values a token, and this model takes "
                            f"{2 * c.layers * c.kv_heads * c.head_width:,}.")  # fmt: skip
    own = {**_shape(c, len(t)), "num_transformer_submodules": 1}
    if odd := next((key for key in own if told.get(key, own[key]) != own[key]), None):
        raise UserError(f"{CONFIG} says {told[odd]} as {odd}, and it is {own[odd]} here.", where=str(folder))
    chosen = method("prefix_tuning", str(folder), tokens=len(t))
    parts_PL2KE = t.float().view(len(t), c.layers, 2, c.kv_heads, c.head_width)
    tensors = {f"{site.name}.{part}": parts_PL2KE[:, i, j].contiguous()
               for i, site in enumerate(chosen.sites(model)) for j, part in enumerate("kv")}  # fmt: skip
    return filled(chosen, model, tensors, str(folder))
