"""Processes that compute one thing together, over `torch.distributed`: gloo on processors, NCCL on GPUs.

Each may have a part of a model: of what comes first (queries, keys, values; gate and up) some outputs, of what comes
behind (`o_proj`, `down_proj`) some inputs, so that two sums of each layer are all that has to be told (Megatron-LM,
Shoeybi et al. 2019, arXiv:1909.08053). Or of all its matrices, for training (FSDP).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.library import LANES
from deltaw.kernels.worn import Part, share
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear, RMSNorm
from deltaw.weights import Dense, Weight

T = TypeVar("T")
MEET = "DELTAW_MEET"
"""Where processes that one of ours began find it."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many. Of one alone, nothing is told to anybody."""

    own: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """Those that `torchrun`, or one of them, began; without, this process alone."""
        env = os.environ
        ranks = cls(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)))
        if ranks.count > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(env.get("LOCAL_RANK", ranks.own)))
            ever = timedelta(days=3650)  # a server may have nothing to do
            dist.init_process_group(init_method=env.get(MEET), rank=ranks.own, world_size=ranks.count, timeout=ever)
        return ranks

    @property
    def part(self) -> Part:
        """Which of how many."""
        return self.own, self.count

    def sum(self, t: Tensor) -> Tensor:
        """What all have, summed, in its place."""
        if self.count > 1:
            dist.all_reduce(t)
        return t

    def all(self, told: T) -> list[T]:
        """What each has to tell, in their order."""
        heard: list[Any] = [told] * self.count
        if self.count > 1:
            dist.all_gather_object(heard, told)
        return heard

    def agreed(self, told: T) -> T:
        """What the first has to tell, as soon as it does."""
        heard = [told]
        if self.count > 1:
            dist.broadcast_object_list(heard, 0)
        return heard[0]

    @contextmanager
    def once(self) -> Iterator[None]:
        """Let a fault in this block be told by the first process if it has ended of one, too; others end quietly then.

        Behind the block the first has to be `agreed` with, so that others hear that it has not.
        """
        try:
            yield
        except (UserError, RuntimeError):
            if self.own:
                try:
                    self.agreed(None)
                except RuntimeError:  # the first is gone, and has told
                    raise SystemExit(UserError.code) from None
            raise

    def beside(self, t_TV: Tensor, columns: int) -> Tensor:
        """The columns of all, beside each other; only the first hears them."""
        widths = [len(share(columns, (k, self.count))) for k in range(self.count)]
        own = F.pad(t_TV, (0, widths[0] - t_TV.shape[1]))
        all_of = None if self.own else [torch.empty_like(own) for _ in widths]
        dist.gather(own, all_of, 0)
        return own if all_of is None else torch.cat([t[:, :w] for t, w in zip(all_of, widths, strict=True)], 1)

    def shard(self, model: Decoder) -> None:
        """Let each keep a part of every layer's matrices; a layer is whole while it computes.

        FSDP (Zhao et al. 2023, arXiv:2304.11277), of torch. Frozen tensors are its parameters as trained ones are.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.count,))
        for layer in model.layers:
            for weight in (module for module in layer.modules() if isinstance(module, Weight)):
                for name, t in [pair for pair in weight.named_buffers(recurse=False) if pair[1].dim()]:
                    delattr(weight, name)
                    weight.register_parameter(name, nn.Parameter(t, requires_grad=False))
            sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            sharded.unshard()  # made here, its room is that of plain tensors, which sampling and training may both fill
            sharded.reshard()

    def whole(self, model: Decoder) -> None:
        """Let each have every layer whole, until it computes again."""
        layers: Any = model.layers if self.count > 1 else ()  # of FSDP's by now
        for layer in layers:
            layer.unshard()


ALONE = Ranks()


class Cut(NamedTuple):
    """Which outputs or inputs of a linear layer a part has; None: all."""

    outputs: Tensor | None = None
    inputs: Tensor | None = None


def cut(name: str, config: ModelConfig, part: Part) -> Cut:
    """What a part has of the linear layer of this name."""
    group, size = config.heads // config.kv_heads, config.head_width
    kv, unit = share(config.kv_heads, part), LANES if config.hidden % LANES == 0 else 1
    hidden = share(config.hidden // unit, part)
    q, k, between = (torch.arange(some.start * each, some.stop * each)
                     for some, each in ((kv, group * size), (kv, size), (hidden, unit)))  # fmt: skip
    heads, kv_heads = config.heads * size, config.kv_heads * size
    outputs = {"q_proj": q, "k_proj": k, "v_proj": k, "gate_proj": between, "up_proj": between,
               "gate_up_proj": torch.cat([between, between + config.hidden]),
               "qkv_proj": torch.cat([q, k + heads, k + heads + kv_heads])}  # fmt: skip
    kind = name.rpartition(".")[2]
    return Cut(outputs[kind]) if kind in outputs else Cut(inputs={"o_proj": q, "down_proj": between}[kind])


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
    kv, hidden = len(share(config.kv_heads, part)), cut("gate_proj", config, part).outputs
    assert hidden is not None
    own = replace(config, kv_heads=kv, heads=kv * config.heads // config.kv_heads, hidden=len(hidden))
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


def _some(t: Tensor, which: Tensor | None, across: int = 0) -> Tensor:
    return t if which is None else t.index_select(across, which.to(t.device))
