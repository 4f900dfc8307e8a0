"""Ctrl-C and SIGTERM: the first is a wish to stop, asked for at a good moment; the second leaves at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from deltaw.errors import Interrupted

HINT = "Stopping as soon as what is trained is saved. Once more to leave at once."
T = TypeVar("T")


def leave(*_: object) -> None:
    """End the process now, whatever it is doing."""
    os._exit(Interrupted.code)


def heeding(items: Iterable[T], stop: Callable[[], bool]) -> Iterator[T]:
    """The same items, until a stop is asked for.

    Raises:
        Interrupted: it was.
    """
    for item in items:
        if stop():
            raise Interrupted("Stopped while the data was read: nothing was changed.")
        yield item


@contextmanager
def interruptible(
    hint: str = HINT, again: Callable[..., object] = leave, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a stop was asked for, for the length of a `with` block.

    `again` is what handles a second signal. Outside the main thread, where Python has no signals, nothing is caught.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            again(number, frame)
        asked.set()
        if hint:
            os.write(2, f"\n{hint}\n".encode())

    caught = signals if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in caught}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
