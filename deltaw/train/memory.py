"""How much memory the process holds, and held at most."""

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def resident_bytes() -> int:
    """Memory that the process holds now."""
    return int(psutil.Process().memory_info().rss)


def held_bytes(device: torch.device) -> int:
    """Memory that training holds now; on CUDA the most so far, since between two steps little is held there."""
    return peak_bytes(device) if device.type == "cuda" else resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most memory that the process held so far; on CUDA, the most that torch had allocated there."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    with suppress(OSError, StopIteration):  # Linux; not what the process that began this one held, as getrusage has it
        told = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in told if line.startswith("VmHWM"))
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def is_full(error: Exception) -> bool:
    """Whether torch failed for want of memory; of the processor's it says so only in words."""
    told = any(said in str(error) for said in ("DefaultCPUAllocator", "unable to mmap", "Cannot allocate memory"))
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
