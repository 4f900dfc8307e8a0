"""What a run resumes from, bit for bit: the adapter, Adam's moments, the random state and the counters, in one file."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.errors import explained
from deltaw.files import adapters
from deltaw.files.atomic import replacing
from deltaw.files.runs import Run
from deltaw.files.sealed import read_said, read_tensors, sealed

KEPT, KEY = 2, "progress"
Random = dict[str, Tensor]


@dataclass
class Progress:
    """Where a run is: everything that decides the next step and is no tensor."""

    step: int = 0
    steps: int = 0
    """How many there will be, which the schedule of the rate goes by."""
    rate_scale: float = 1.0
    skipped: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    seconds: float = 0.0


def save(run: Run, adapter: Adapter, optimizer: torch.optim.Optimizer, progress: Progress, random: Random) -> Path:
    """Write a checkpoint of the moment before step `progress.step`, and forget all but the last two.

    Raises:
        Diverged: a value is not finite; nothing is written.
        OSError: the disk is full or cannot be written.
    """
    tensors = {f"adapter.{name}": t for name, t in adapters.state(adapter).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": t.detach().cpu().contiguous() for key, t in state.items()}
    tensors |= {f"random.{device}": state for device, state in random.items()}
    adapters.refuse_nan(tensors)
    path = run.folder / "checkpoints" / f"step-{progress.step:07d}.safetensors"
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=sealed(KEY, asdict(progress), tensors))
    for old in run.checkpoints()[:-KEPT]:
        old.unlink()
    return path


def load(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Put a checkpoint back into the adapter, the optimizer and torch's random state.

    Raises:
        UserError: the file is damaged or does not fit this adapter.
    """
    with explained("The checkpoint is damaged.", SafetensorError, OSError, TypeError, KeyError, ValueError,
                   where=path, remedy="No other is left: train anew."), safe_open(path, "pt") as file:  # fmt: skip
        progress = Progress(**(read_said(file, KEY) or {}))
        tensors = read_tensors(file, KEY)
    adapters.put(adapter, _part(tensors, "adapter."), str(path))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, t in _part(tensors, "optimizer.").items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = t
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    set_random(_part(tensors, "random."), device)
    return progress


def get_random(device: torch.device) -> Random:
    """The state of torch's random numbers: those of the processor, and of the device where it is another."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random(random: Random, device: torch.device) -> None:
    """Put random numbers back to where they were; those of a device that this run is not on are left alone."""
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "device" in random:
        torch.cuda.set_rng_state(random["device"], device)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
