"""Mutexes (v6.12 kernel/locking/mutex.c), without spinning on the owner.

`owner` is the owner's task_struct, and in its low bits: 1 somebody waits, 2 the next unlock hands over to the first waiter, 4 it
has been handed over. A newcomer may take a free mutex before the waiter that was woken for it; the first waiter that loses this
way once asks for the handover.
"""

from __future__ import annotations

from collections import deque

from emu.kernel.execution import Execution
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_UNINTERRUPTIBLE

OWNER, WAIT_LOCK, OSQ, WAIT_LIST, SIZE = 0, 8, 12, 16, 32
FLAG_WAITERS, FLAG_HANDOFF, FLAG_PICKUP, FLAGS = 1, 2, 4, 7


class Mutexes:
    """struct mutex: owner (8 bytes), wait_lock, osq, wait_list at 16."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._waiters: dict[int, deque[KernelThread]] = {}

    def init(self, la: int) -> None:
        """__mutex_init()."""
        execution = self.execution
        execution.store64(la + OWNER, 0)
        execution.store64(la + WAIT_LOCK, 0)
        execution.list_init(la + WAIT_LIST)

    def trylock(self, la: int) -> bool:
        """mutex_trylock()."""
        return self._trylock(la, handoff=False)

    def _trylock(self, la: int, *, handoff: bool) -> bool:
        """__mutex_trylock_common(): take a free mutex, or one handed over; with `handoff` ask for that."""
        execution = self.execution
        current = execution.tasks.current().address
        word = execution.load64(la + OWNER)
        owner, flags = word & ~FLAGS, word & FLAGS
        if owner:
            if flags & FLAG_PICKUP and owner == current:
                execution.store64(la + OWNER, current | flags & ~FLAG_PICKUP)
                return True
            if handoff and not flags & (FLAG_PICKUP | FLAG_HANDOFF):
                execution.store64(la + OWNER, owner | flags | FLAG_HANDOFF)
            return False
        execution.store64(la + OWNER, current | flags)
        return True

    def lock(self, la: int, state: int = TASK_UNINTERRUPTIBLE) -> None:
        """mutex_lock(), and the killable and interruptible ones: there are no signals."""
        if self._trylock(la, handoff=False):
            return
        execution = self.execution
        thread = execution.current()
        queue = self._waiters.setdefault(la, deque())
        queue.append(thread)
        taken = False
        try:
            if queue[0] is thread:
                execution.store64(la + OWNER, execution.load64(la + OWNER) | FLAG_WAITERS)
            while not taken:
                execution.block(self._reason(la), state)
                taken = self._trylock(la, handoff=queue[0] is thread)
        finally:
            queue.remove(thread)
            if not queue:
                del self._waiters[la]
                if taken:
                    execution.store64(la + OWNER, execution.load64(la + OWNER) & ~FLAGS)

    def _reason(self, la: int) -> str:
        word = self.execution.load64(la + OWNER) & ~FLAGS
        task = self.execution.tasks.find(word)
        holder = f"{task.thread.comm}/{task.thread.pid}" if task is not None else f"task 0x{word:x}"
        return f"mutex 0x{la:x} held by {holder}"

    def unlock(self, la: int) -> None:
        """mutex_unlock(): whoever calls it, as without CONFIG_DEBUG_MUTEXES."""
        execution = self.execution
        word = execution.load64(la + OWNER)
        if not word & FLAGS:
            execution.store64(la + OWNER, 0)
            return
        queue = self._waiters.get(la)
        if word & FLAG_HANDOFF:
            flags = word & FLAG_WAITERS
            following = execution.tasks.of(queue[0]).address | FLAG_PICKUP if queue else 0
            execution.store64(la + OWNER, following | flags)
        else:
            execution.store64(la + OWNER, word & FLAGS)
        if queue:
            execution.tasks.wake(queue[0])

    def is_locked(self, la: int) -> bool:
        """mutex_is_locked()."""
        return bool(self.execution.load64(la + OWNER) & ~FLAGS)
