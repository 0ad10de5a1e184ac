"""Completions (v6.12 kernel/sched/completion.c): `done` stands in guest memory, waiters are woken in the order they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from emu.kernel.execution import Execution
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_UNINTERRUPTIBLE

DONE, WAIT_LOCK, WAIT_LIST, SIZE = 0, 8, 16, 32
UINT_MAX = 0xFFFF_FFFF
MAX_SCHEDULE_TIMEOUT = (1 << 63) - 1

Sleep = Callable[[int, str, int], int]


@dataclass(slots=True, eq=False)
class _Waiter:
    thread: KernelThread
    woken: bool = False


class Completions:
    """struct completion: `unsigned int done`, then the queue of waiters (raw_spinlock_t at 8, list_head at 16).

    `sleep(ticks, reason, state)` blocks once, for at most `ticks`, and tells how many of them are left (schedule_timeout).
    """

    def __init__(self, execution: Execution, sleep: Sleep) -> None:
        self.execution = execution
        self.sleep = sleep
        self._waiters: dict[int, deque[_Waiter]] = {}

    def init(self, la: int) -> None:
        """init_completion(), for completions of the model's own."""
        execution = self.execution
        execution.store32(la + DONE, 0)
        execution.store32(la + WAIT_LOCK, 0)
        execution.list_init(la + WAIT_LIST)

    def complete(self, la: int) -> None:
        """Let one waiter go on, now or later."""
        done = self.execution.load32(la + DONE)
        self.execution.store32(la + DONE, done if done == UINT_MAX else done + 1)
        self._wake(la, 1)

    def complete_all(self, la: int) -> None:
        """Let all waiters go on, those to come included."""
        self.execution.store32(la + DONE, UINT_MAX)
        self._wake(la, UINT_MAX)

    def _wake(self, la: int, count: int) -> None:
        queue = self._waiters.get(la)
        while queue and count:
            waiter = queue.popleft()
            waiter.woken = True
            self.execution.tasks.wake(waiter.thread)
            count -= 1
        if not queue:
            self._waiters.pop(la, None)

    def wait(self, la: int, timeout: int = MAX_SCHEDULE_TIMEOUT, state: int = TASK_UNINTERRUPTIBLE) -> int:
        """Sleep until done, at most `timeout` ticks: the ticks left, at least 1; 0 when they ran out."""
        execution = self.execution
        if not execution.load32(la + DONE):
            waiter = _Waiter(execution.current())
            queue = self._waiters.setdefault(la, deque())
            queue.append(waiter)
            try:
                while True:
                    if waiter.woken:
                        # Woken by a complete() whose count another one took: back to the end of the queue.
                        waiter.woken = False
                        self._waiters.setdefault(la, deque()).append(waiter)
                    timeout = self.sleep(timeout, f"completion 0x{la:x}", state)
                    if execution.load32(la + DONE) or timeout <= 0:
                        break
            finally:
                self._forget(la, waiter)
            if not execution.load32(la + DONE):
                return max(timeout, 0)
        self._take(la)
        return timeout or 1

    def _take(self, la: int) -> None:
        done = self.execution.load32(la + DONE)
        if done != UINT_MAX:
            self.execution.store32(la + DONE, done - 1)

    def _forget(self, la: int, waiter: _Waiter) -> None:
        queue = self._waiters.get(la)
        if queue and waiter in queue:
            queue.remove(waiter)
        if not queue:
            self._waiters.pop(la, None)

    def try_wait(self, la: int) -> bool:
        """Take a count without waiting."""
        if not self.execution.load32(la + DONE):
            return False
        self._take(la)
        return True

    def done(self, la: int) -> bool:
        """Whether a waiter would not wait."""
        return bool(self.execution.load32(la + DONE))
