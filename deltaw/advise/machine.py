"""What this machine is: cores, instructions, memory, disk, and how fast it really multiplies."""

import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from deltaw.kernels.library import available, instruction_set
from deltaw.models.device import instruction_sets, multiplies_bf16
from deltaw.models.source import cache, cached

MEASURED_ROWS, MEASURED_WIDTH = 512, 1536
UNBOUNDED = 1 << 62


class Machine:
    """What `deltaw doctor` shows; each of the two matrix products is measured for about `seconds`."""

    def __init__(self, seconds: float = 0.4) -> None:
        memory, gpu = psutil.virtual_memory(), torch.cuda.is_available()
        self.system = f"{platform.system()} {platform.machine()}"
        self.python = platform.python_version()
        self.torch = torch.__version__
        self.cores = psutil.cpu_count(logical=False) or 1
        self.threads = torch.get_num_threads()
        self.instruction_sets = tuple(name for name, has in instruction_sets().items() if has)
        self.kernels = instruction_set()
        """The instruction set of the native kernels that is used; "reference": torch does their work."""
        self.kernels_available = available()
        self.ram_bytes = memory.total
        self.available_bytes = memory.available
        self.disk_free_bytes = free_disk(cache())
        self.fp32_gflops = matmul_gflops(torch.float32, seconds)
        self.bf16_gflops = matmul_gflops(torch.bfloat16, seconds)
        self.bf16_native = multiplies_bf16(torch.device("cpu"))
        self.gpu = torch.cuda.get_device_name() if gpu else None
        self.gpu_bytes = torch.cuda.get_device_properties(0).total_memory if gpu else 0
        self.cache = str(cache())
        self.models = tuple(cached())


def matmul_gflops(dtype: torch.dtype, seconds: float) -> float:
    """Billions of floating-point operations a second in a matrix product of this type on the processor."""
    x, w = (torch.randn(rows, MEASURED_WIDTH).to(dtype) for rows in (MEASURED_ROWS, MEASURED_WIDTH))
    x @ w  # the first product prepares kernels
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        x @ w
        done += 1
    return 2 * MEASURED_ROWS * MEASURED_WIDTH**2 * done / spent / 1e9


def available_bytes(device: torch.device) -> int:
    """Memory that a process may still take, on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _cgroup_room(), _address_room())


def existing(path: Path) -> Path:
    """The folder that is there of the path to one that may still be made."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is or will be."""
    return shutil.disk_usage(existing(path)).free


def _cgroup_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the memory limits of a container leave, and of the groups within it that the process is in."""
    inside = own.read_text(encoding="utf-8").rpartition("::/")[2].strip() if own.exists() else ""
    rooms = [UNBOUNDED]
    for group in (root / inside, *(root / inside).parents):
        with suppress(OSError, ValueError):  # a limit of "max" is none
            limit, used = ((group / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
            rooms.append(max(0, int(limit) - int(used)))
        if group == root:
            break
    return min(rooms)


def _address_room() -> int:
    """What `ulimit -v` leaves of the addresses that a process may have."""
    if sys.platform == "win32":
        return UNBOUNDED
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return UNBOUNDED if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)
