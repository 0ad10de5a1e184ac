"""Counting semaphores (v6.12 kernel/locking/semaphore.c): `count` stands in guest memory, waiters are served in their order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from emu.kernel.completion import MAX_SCHEDULE_TIMEOUT, Sleep
from emu.kernel.execution import Execution
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_UNINTERRUPTIBLE

LOCK, COUNT, WAIT_LIST, SIZE = 0, 4, 8, 24


@dataclass(slots=True, eq=False)
class _Waiter:
    thread: KernelThread
    up: bool = False


class Semaphores:
    """struct semaphore: raw_spinlock_t, `unsigned int count` at 4, wait_list at 8. `sleep` as for Completions."""

    def __init__(self, execution: Execution, sleep: Sleep) -> None:
        self.execution = execution
        self.sleep = sleep
        self._waiters: dict[int, deque[_Waiter]] = {}

    def down_trylock(self, la: int) -> bool:
        """Take a count without waiting."""
        count = self.execution.load32(la + COUNT)
        if not count:
            return False
        self.execution.store32(la + COUNT, count - 1)
        return True

    def down(self, la: int, timeout: int = MAX_SCHEDULE_TIMEOUT, state: int = TASK_UNINTERRUPTIBLE) -> bool:
        """Take a count, waiting for at most `timeout` ticks; false when they ran out."""
        if self.down_trylock(la):
            return True
        waiter = _Waiter(self.execution.current())
        queue = self._waiters.setdefault(la, deque())
        queue.append(waiter)
        try:
            while not waiter.up and timeout > 0:
                timeout = self.sleep(timeout, f"semaphore 0x{la:x}", state)
        finally:
            if not waiter.up:
                queue.remove(waiter)
            if not queue:
                self._waiters.pop(la, None)
        return waiter.up

    def up(self, la: int) -> None:
        """Give a count to the first waiter, or back."""
        queue = self._waiters.get(la)
        if not queue:
            self.execution.store32(la + COUNT, self.execution.load32(la + COUNT) + 1)
            return
        waiter = queue.popleft()
        waiter.up = True
        self.execution.tasks.wake(waiter.thread)
