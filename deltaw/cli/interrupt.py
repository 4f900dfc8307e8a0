"""Ctrl-C and SIGTERM: the first is a wish to stop, asked for at a good moment; the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


@contextmanager
def interruptible(
    hint: str = "Stopping after this step and saving. Once more to leave at once.",
) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a stop was asked for, for the length of a `with` block."""
    asked = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(INTERRUPTED)
        asked.set()
        if hint:
            os.write(2, f"\n{hint}\n".encode())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
