"""What becomes of memory that is free: kept for what comes next, or given back to the system.

As glibc is by default, tensors up to 32 MB come from one heap, and what lies between two of them is lost to larger
ones: memory that a process holds for nothing.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

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
