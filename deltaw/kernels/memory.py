"""The process's memory: how much it holds, and what becomes of what is free: kept for what comes, or given back.

As glibc is by default, tensors up to 32 MB come from one heap, and what lies between two of them is lost to larger
ones: memory that a process holds for nothing.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""What `mallopt` calls the size from which on the heap's free end is given back, and that from which on memory is
fetched and given back by itself."""
FRUGAL = {TRIM_THRESHOLD: 1 << 20, MMAP_THRESHOLD: 1 << 20}
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20}
"""What glibc comes to by itself once a large tensor was freed."""
_depth = 0


@contextmanager
def frugal(wanted: bool = True) -> Iterator[None]:
    """Within it, memory is given back as soon as it is free, where glibc has it and its user did not choose otherwise.

    Fetching it anew takes time, which a small model's training step feels, and a large one's hardly.
    """
    global _depth
    if not wanted:
        yield
        return
    _depth += 1
    _set(FRUGAL)
    try:
        yield
    finally:
        _depth -= 1
        _set(FRUGAL if _depth else USUAL)


def _set(sizes: Mapping[int, int]) -> None:
    if mallopt := _mallopt():
        for name, size in sizes.items():
            mallopt(name, size)


@lru_cache
def _mallopt() -> Any:
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None


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
