"""Reader-writer spinlocks: queued ones (v6.12 kernel/locking/qrwlock.c, include/asm-generic/qrwlock.h).

The u32 `cnts` in guest memory: the low byte is 0xff while a writer holds the lock, bit 8 is set while one waits at the head of the
queue, and the readers are counted from bit 9 on. A reader in an interrupt does not wait behind a writer that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from emu.kernel.execution import Execution

QW_WAITING = 0x100
QW_LOCKED = 0xFF
QW_MASK = 0x1FF
QR_BIAS = 1 << 9


class Rwlocks:
    """rwlock_t: cnts, then the queue's spinlock; 8 bytes. Preemption, interrupts and softirqs are the callers' matter."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._queues: dict[int, deque[object]] = {}

    def _queued(self, la: int, condition: Callable[[], bool], reason: str) -> None:
        """Wait in line, then until `condition` holds."""
        queue = self._queues.setdefault(la, deque())
        mine = object()
        queue.append(mine)
        try:
            self.execution.spin_until(lambda: queue[0] is mine and condition(), reason)
        finally:
            queue.remove(mine)
            if not queue:
                del self._queues[la]

    def _add(self, la: int, value: int) -> None:
        self.execution.store32(la, self.execution.load32(la) + value)

    def read_acquire(self, la: int) -> None:
        """queued_read_lock()."""
        execution = self.execution
        if not execution.load32(la) & QW_MASK:
            self._add(la, QR_BIAS)
            return
        reason = f"rwlock 0x{la:x} for reading"
        if execution.preempt.in_interrupt:
            execution.spin_until(lambda: not execution.load32(la) & QW_LOCKED, reason)
        else:
            self._queued(la, lambda: not execution.load32(la) & QW_LOCKED, reason)
        self._add(la, QR_BIAS)

    def write_acquire(self, la: int) -> None:
        """queued_write_lock()."""
        execution = self.execution
        if la not in self._queues and not execution.load32(la):
            execution.store32(la, QW_LOCKED)
            return

        def free() -> bool:
            counts = execution.load32(la)
            if counts in (0, QW_WAITING):
                return True
            if not counts & QW_WAITING:
                execution.store32(la, counts | QW_WAITING)
            return False

        self._queued(la, free, f"rwlock 0x{la:x} for writing")
        execution.store32(la, QW_LOCKED)

    def try_read_acquire(self, la: int) -> bool:
        """queued_read_trylock()."""
        if self.execution.load32(la) & QW_MASK:
            return False
        self._add(la, QR_BIAS)
        return True

    def try_write_acquire(self, la: int) -> bool:
        """queued_write_trylock()."""
        if self.execution.load32(la):
            return False
        self.execution.store32(la, QW_LOCKED)
        return True

    def read_release(self, la: int) -> None:
        """queued_read_unlock()."""
        self._add(la, -QR_BIAS)

    def write_release(self, la: int) -> None:
        """queued_write_unlock(): a byte store."""
        self.execution.store8(la, 0)
