"""Reader-writer semaphores (v6.12 kernel/locking/rwsem.c), without spinning on the owner.

`count` in guest memory: bit 0 a writer holds it, bit 1 somebody waits, bit 2 handover, readers from bit 8 on. `owner` is the
task_struct of the writer, or of the last reader with bit 0 set. Nobody overtakes a waiter; readers are woken together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from emu.kernel.execution import MASK64, Execution
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_UNINTERRUPTIBLE

COUNT, OWNER, OSQ, WAIT_LOCK, WAIT_LIST, SIZE = 0, 8, 16, 20, 24, 40
WRITER_LOCKED, FLAG_WAITERS, FLAG_HANDOFF = 1, 2, 4
READER_BIAS = 1 << 8
READER_MASK = MASK64 & -READER_BIAS
READ_FAILED = WRITER_LOCKED | FLAG_WAITERS | FLAG_HANDOFF | 1 << 63
READER_OWNED, NONSPINNABLE = 1, 2
MAX_READERS_WAKEUP = 0x100


@dataclass(slots=True, eq=False)
class _Waiter:
    thread: KernelThread
    writes: bool
    granted: bool = False


class Rwsems:
    """struct rw_semaphore: count and owner (8 bytes each), osq, wait_lock, wait_list at 24."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._waiters: dict[int, deque[_Waiter]] = {}

    def init(self, la: int) -> None:
        """__init_rwsem()."""
        execution = self.execution
        execution.store64(la + COUNT, 0)
        execution.store64(la + OWNER, 0)
        execution.store64(la + OSQ, 0)
        execution.list_init(la + WAIT_LIST)

    def _count(self, la: int) -> int:
        return self.execution.load64(la + COUNT)

    def _add(self, la: int, value: int) -> int:
        count = self._count(la) + value & MASK64
        self.execution.store64(la + COUNT, count)
        return count

    def _own(self, la: int, thread: KernelThread, flags: int) -> None:
        self.execution.store64(la + OWNER, self.execution.tasks.of(thread).address | flags)

    def _reason(self, la: int, how: str) -> str:
        word = self.execution.load64(la + OWNER)
        task = self.execution.tasks.find(word & -8)
        if task is None:
            return f"rw_semaphore 0x{la:x} for {how}"
        part = "read" if word & READER_OWNED else "written"
        return f"rw_semaphore 0x{la:x} for {how}, {part} by {task.thread.comm}/{task.thread.pid}"

    # ---- taking

    def down_read_trylock(self, la: int) -> bool:
        """down_read_trylock(): fails also behind waiters."""
        if self._count(la) & READ_FAILED:
            return False
        self._add(la, READER_BIAS)
        self._own(la, self.execution.current(), READER_OWNED)
        return True

    def down_write_trylock(self, la: int) -> bool:
        """down_write_trylock()."""
        if self._count(la):
            return False
        self.execution.store64(la + COUNT, WRITER_LOCKED)
        self._own(la, self.execution.current(), 0)
        return True

    def down_read(self, la: int, state: int = TASK_UNINTERRUPTIBLE) -> None:
        """down_read(), and the killable and interruptible ones: there are no signals."""
        if not self.down_read_trylock(la):
            self._wait(la, False, state)

    def down_write(self, la: int, state: int = TASK_UNINTERRUPTIBLE) -> None:
        """down_write() and down_write_killable()."""
        if not self.down_write_trylock(la):
            self._wait(la, True, state)

    def _wait(self, la: int, writes: bool, state: int) -> None:
        execution = self.execution
        reason = self._reason(la, "writing" if writes else "reading")
        waiter = _Waiter(execution.current(), writes)
        queue = self._waiters.setdefault(la, deque())
        queue.append(waiter)
        try:
            execution.store64(la + COUNT, self._count(la) | FLAG_WAITERS)
            # The holder may have gone while nobody waited: a semaphore with bits set by hand.
            self._hand_out(la)
            execution.sleep_until(lambda: waiter.granted, reason, state)
        finally:
            if not waiter.granted:
                queue.remove(waiter)
                self._hand_out(la)

    # ---- giving back

    def up_read(self, la: int) -> None:
        """up_read()."""
        if not self._add(la, -READER_BIAS) & (READER_MASK | WRITER_LOCKED):
            self._hand_out(la)

    def up_write(self, la: int) -> None:
        """up_write()."""
        self.execution.store64(la + OWNER, 0)
        self.execution.store64(la + COUNT, self._count(la) & ~WRITER_LOCKED)
        self._hand_out(la)

    def downgrade_write(self, la: int) -> None:
        """downgrade_write(): the writer goes on as a reader, and those who wait first to read join it."""
        self._add(la, READER_BIAS - WRITER_LOCKED)
        self._own(la, self.execution.current(), READER_OWNED)
        self._hand_out(la)

    def _hand_out(self, la: int) -> None:
        """Give the semaphore to whoever may have it now: the first waiter if that writes, else all readers that wait."""
        queue = self._waiters.get(la)
        if queue:
            count = self._count(la)
            if queue[0].writes:
                if not count & (READER_MASK | WRITER_LOCKED):
                    self._grant(la, queue, queue[0])
            elif not count & WRITER_LOCKED:
                for waiter in [waiter for waiter in queue if not waiter.writes][:MAX_READERS_WAKEUP]:
                    self._grant(la, queue, waiter)
        if not queue:
            self._waiters.pop(la, None)
            self.execution.store64(la + COUNT, self._count(la) & ~(FLAG_WAITERS | FLAG_HANDOFF))

    def _grant(self, la: int, queue: deque[_Waiter], waiter: _Waiter) -> None:
        queue.remove(waiter)
        waiter.granted = True
        self._add(la, WRITER_LOCKED if waiter.writes else READER_BIAS)
        self._own(la, waiter.thread, 0 if waiter.writes else READER_OWNED)
        self.execution.tasks.wake(waiter.thread)

    def is_locked(self, la: int) -> bool:
        """rwsem_is_locked()."""
        return bool(self._count(la) & (READER_MASK | WRITER_LOCKED))
