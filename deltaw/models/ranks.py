"""Processes that compute one thing together, over `torch.distributed`: gloo on processors, NCCL on GPUs."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.kernels.worn import Part, share
from deltaw.models.decoder import Decoder
from deltaw.weights import Weight

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")
FOR_EVER = timedelta(days=3650)
"""How long one waits for another: a server may have nothing to do."""
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
            dist.init_process_group(init_method=env.get(MEET), rank=ranks.own, world_size=ranks.count, timeout=FOR_EVER)
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
        for layer in model.layers if self.count > 1 else ():
            cast("FSDPModule", layer).unshard()


ALONE = Ranks()
