"""A part of a model for one of several processes, each of which computes some heads and some of the MLPs' numbers.

What comes first (queries, keys, values; gate and up) has some of its outputs, what comes behind (`o_proj`, `down_proj`)
some of its inputs, so that two sums of each layer are all that has to be told (Megatron-LM, Shoeybi et al. 2019,
arXiv:1909.08053).
"""

from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels.library import LANES
from deltaw.kernels.worn import Part, share
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear, RMSNorm
from deltaw.weights import Dense


class Cut(NamedTuple):
    """Which outputs or inputs of a linear layer a part has; None: all."""

    outputs: list[int] | None = None
    inputs: list[int] | None = None


def cut(name: str, config: ModelConfig, part: Part) -> Cut:
    """What a part has of the linear layer of this name."""
    group, size = config.heads // config.kv_heads, config.head_width
    kv, unit = share(config.kv_heads, part), LANES if config.hidden % LANES == 0 else 1
    hidden = share(config.hidden // unit, part)
    q, k = _times(kv, group * size), _times(kv, size)
    between, heads, kv_heads = _times(hidden, unit), config.heads * size, config.kv_heads * size
    outputs = {"q_proj": [q], "k_proj": [k], "v_proj": [k], "gate_proj": [between], "up_proj": [between],
               "gate_up_proj": [between, _after(between, config.hidden)],
               "qkv_proj": [q, _after(k, heads), _after(k, heads + kv_heads)]}  # fmt: skip
    kind = name.rpartition(".")[2]
    if kind in outputs:
        return Cut(outputs=list(chain(*outputs[kind])))
    return Cut(inputs=list({"o_proj": q, "down_proj": between}[kind]))


def part_of(model: Decoder, part: Part) -> Decoder:
    """A model that computes its part; what is not of its layers is the whole model's own.

    Raises:
        UserError: there are fewer heads of keys than parts, or matrices are packed.
    """
    config, (_, parts) = model.config, part
    if parts > config.kv_heads:
        raise UserError(f"{config.kv_heads} heads of keys and values are not shared by {parts} processes.",
                        remedy=f"Take --tensor-parallel {config.kv_heads} or fewer.")  # fmt: skip
    slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, Linear | RMSNorm)}
    kv = len(share(config.kv_heads, part))
    own = replace(config, kv_heads=kv, heads=kv * config.heads // config.kv_heads,
                  hidden=len(cut("down_proj", config, part).inputs or ()))  # fmt: skip
    with torch.device("meta"):
        made = Decoder(own)
    for name, slot in made.layers.named_modules(prefix="layers"):
        whole = slots.get(name)
        if isinstance(slot, Linear) and isinstance(whole, Linear):
            if not isinstance(whole.weight, Dense):
                raise UserError("Packed matrices are not shared among processes.", remedy="Leave --base-format out.")
            outputs, inputs = cut(name, config, part)
            slot.weight = Dense(_some(_some(whole.weight.w_OI, outputs), inputs, 1), whole.weight.dtype)
            slot.bias = None if whole.bias is None else _some(whole.bias, outputs)
        elif isinstance(slot, RMSNorm) and isinstance(whole, RMSNorm):
            slot.gain = whole.gain
    made.positions, made.embed_tokens, made.norm = model.positions, model.embed_tokens, model.norm
    made.lm_head, tokens = model.lm_head, share(config.vocab, part)
    made.vocabulary = slice(tokens.start, tokens.stop)
    return made


def _some(t: Tensor, which: list[int] | None, across: int = 0) -> Tensor:
    return t if which is None else t.index_select(across, torch.tensor(which, device=t.device))


def _times(some: range, each: int) -> range:
    return range(some.start * each, some.stop * each)


def _after(some: range, first: int) -> range:
    return range(some.start + first, some.stop + first)
