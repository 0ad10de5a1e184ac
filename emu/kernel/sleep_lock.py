"""A mutex of the model's own: for a structure that no guest can see, whose owner may wait for other CPUs."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Protocol

from emu.kernel.task import KernelThread


class Sleeping(Protocol):
    """What the lock asks of the scheduler."""

    def current(self) -> KernelThread:
        """The current thread."""

    def block(self) -> None:
        """Sleep until woken."""

    def wake(self, thread: KernelThread) -> bool:
        """Make a sleeping thread runnable."""

    @property
    def in_thread(self) -> bool:
        """The model runs for a thread that can sleep; false while it is called from outside."""


class SleepLock:
    """Taken by `with`; waiters get it first come, first served. Linux's name of it is what a report shows."""

    def __init__(self, name: str, sched: Sleeping) -> None:
        self.name = name
        self._sched = sched
        self._held = False
        self._waiters: deque[KernelThread] = deque()

    def __enter__(self) -> None:
        if not self._held:
            self._held = True
            return
        assert self._sched.in_thread, f"{self.name} is held, and whoever wants it cannot wait"
        thread = self._sched.current()
        self._waiters.append(thread)
        before, thread.waiting_for = thread.waiting_for, f"mutex {self.name}"
        # Whoever gives the lock away leaves it held, and takes the new owner off the list.
        while thread in self._waiters:
            self._sched.block()
        thread.waiting_for = before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._waiters:
            self._sched.wake(self._waiters.popleft())
        else:
            self._held = False
