"""The native library: which of the instruction sets it was compiled for is used, and how its functions are called."""

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import UserError

REFERENCE = "reference"
"""What is used where nothing native is: torch."""
CHOICE = "DELTAW_ISA"
AT, COUNT, FLAG, NUMBER, WIDE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
ARGUMENTS = {
    "unpack": [AT, AT, FLAG, FLAG],
    "multiply": [AT, AT, AT, FLAG, FLAG, FLAG],
    "nearest": [AT, COUNT, AT, FLAG, AT, FLAG],
    "norm": [AT, AT, AT, AT, COUNT, COUNT, NUMBER, FLAG, FLAG],
    "norm_back": [AT, AT, AT, AT, AT, COUNT, COUNT, FLAG, FLAG],
    "gated": [AT, AT, AT, COUNT, FLAG, FLAG, FLAG],
    "gated_back": [AT, AT, AT, AT, AT, COUNT, FLAG, FLAG, FLAG],
    "turn": [AT, COUNT, AT, AT, AT, COUNT, COUNT, COUNT, COUNT, NUMBER, FLAG, FLAG],
    "surprise": [AT, AT, AT, COUNT, COUNT, FLAG, FLAG, FLAG],
    "product": [AT, AT, AT, COUNT, COUNT, COUNT, COUNT, COUNT, FLAG],
    "draw": [AT, COUNT, COUNT, FLAG],
    **{name: [AT] for name in ("attend", "attend_back", "paged", "summed", "program", "wear")},
}
FILE = Path(__file__).parent / "built" / "native.so"
PLAIN = (torch.float32, torch.bfloat16)
"""What plain numbers may be stored as."""
LANES = 16
"""Numbers that are taken at once: widths are whole numbers of them, or torch does the work."""


def fields(*kinds: tuple[Any, str]) -> Sequence[tuple[str, Any]]:
    """What a structure of C holds, in order: names, after the kind that they are of."""
    return [(name, kind) for kind, names in kinds for name in names.split()]


@lru_cache
def library() -> ctypes.CDLL | None:
    """The library; None: it was not built."""
    if not FILE.exists():
        return None
    loaded = ctypes.CDLL(str(FILE))
    loaded.instruction_sets.restype = ctypes.c_char_p
    return loaded


@lru_cache
def available() -> tuple[str, ...]:
    """The instruction sets that this processor has, the best first; last, torch's own work."""
    loaded = library()
    return (*(loaded.instruction_sets().decode().split() if loaded else ()), REFERENCE)


@lru_cache
def instruction_set() -> str:
    """The one that is used: the best, or that which the variable DELTAW_ISA names.

    Raises:
        UserError: it names one that is not there.
    """
    said = os.environ.get(CHOICE) or available()[0]
    if said not in available():
        raise UserError(f"{CHOICE}={said} is not to be had here.", remedy=f"There are {', '.join(available())}.")
    return said


@lru_cache
def function(name: str) -> Any:
    """A native function for the instruction set that is used; None: torch does its work."""
    found = getattr(library(), f"{name}_{instruction_set()}", None)  # products are written for bfloat16 alone
    if found is not None:
        found.argtypes, found.restype = ARGUMENTS[name], None
    return found


def plainly(name: str, *tensors: Tensor) -> Any:
    """A native function for tensors that lie whole in memory and are all of one plain type; None: torch does its work.

    It is called with tensors, and without its last two arguments: whether they are bf16, and the number of threads.
    """
    dtype = tensors[0].dtype
    fits = dtype in PLAIN and all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    found = function(name) if fits else None
    if found is None:
        return None
    return lambda *told: found(*(t.data_ptr() if isinstance(t, Tensor) else t for t in told),
                               int(dtype == torch.bfloat16), torch.get_num_threads())  # fmt: skip
