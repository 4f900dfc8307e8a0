"""An engine in a thread of its own. Everything else talks to it between two steps, and hears of tokens as they come."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from itertools import islice
from math import inf
from time import monotonic
from typing import TypeVar

import torch

from deltaw.serve.engine import Engine
from deltaw.serve.sequence import Sequence

T = TypeVar("T")
IDLE_SECONDS = 0.005
"""How long an engine that has nothing to compute waits for an adapter that is being read."""
STUCK_SECONDS = 60.0
"""An engine whose step takes longer is not well."""
log = logging.getLogger(__name__)


class Closed(RuntimeError):
    """Nothing is answered any more."""


class Service(AbstractContextManager["Service"]):
    """Steps as long as there is anything to compute. Close it, or use it as a context."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.closed, self.beat = engine, False, monotonic()
        self.inbox = queue.SimpleQueue[Callable[[], None]]()
        self.threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> str:
        """Whether it is `ok`, or else `stopped` or `stuck`."""
        if self.closed or not self.thread.is_alive():
            return "stopped"
        return "stuck" if monotonic() - self.beat > STUCK_SECONDS else "ok"

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Let the engine's thread do this between two steps.

        Raises:
            Closed: the service is.
        """
        if self.closed:
            raise Closed("The service is closed.")
        done = Future[T]()

        def answer() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except Exception as e:  # it belongs to whoever asked
                    done.set_exception(e)

        self.inbox.put(answer)
        return done

    def submit(self, *sequences: Sequence, within: float = inf) -> Future[None]:
        """Let sequences of one request be answered: their `heard` is called by the engine's thread.

        What is returned raises Busy, if the first would be heard of later than within so many seconds.
        """
        return self.do(lambda: self.engine.submit(*sequences, within=within))

    def abort(self, sequence: Sequence) -> None:
        """Let go of a sequence, if it has not ended."""
        self.do(lambda: self._abort(sequence))

    def close(self) -> None:
        """End after the step that is under way; whoever is not answered hears so."""
        if not self.closed:
            self.closed = True
            self.inbox.put(lambda: None)
            self.thread.join()

    def _abort(self, sequence: Sequence) -> None:
        if sequence in self.engine.running or sequence in self.engine.waiting:
            self.engine.end(sequence, "abort")

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # which every thread has to be told
        torch.get_num_threads()  # and has understood once it is asked
        busy = False
        while not self.closed:
            self.beat = inf
            self._listen(busy)
            self.beat = monotonic()
            try:
                busy = self.engine.step()
            except Exception as e:
                log.exception("A step failed.")
                for sequence in list(self.engine.running) or [*islice(self.engine.waiting.turns(), 1)]:
                    self.engine.end(sequence, "error", f"It could not be computed: {e}.")
        self._listen(busy=True)  # whoever asked meanwhile hears that it is closing
        for sequence in [*self.engine.running, *self.engine.waiting]:
            self.engine.end(sequence, "abort", "The server is closing.")
        self.engine.wardrobe.close()

    def _listen(self, busy: bool) -> None:
        """Do what was asked for; with nothing to compute, wait until something is."""
        wait = None if not busy and not self.engine.waiting else IDLE_SECONDS
        try:
            work = self.inbox.get_nowait() if busy else self.inbox.get(timeout=wait)
            while True:
                work()
                work = self.inbox.get_nowait()
        except queue.Empty:
            return
