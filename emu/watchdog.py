"""A bound in host time for runs that do not count their instructions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self


class Watchdog:
    """Calls `stop` after `timeout` seconds, and again until its block is left: a stop between two runs of the engine is lost."""

    REPEAT = 0.005

    def __init__(self, timeout: float, stop: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stop = stop
        self.late = False
        self._start = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        wait = self._timeout
        while not self._left.wait(wait):
            self._stop()
            wait = self.REPEAT

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.late = time.perf_counter() - self._start > self._timeout
        self._left.set()
        self._thread.join()


class WatchdogExpired(Exception):
    """An uncounted run took too long to be sure that it kept its bound: it must be repeated with a counter."""
