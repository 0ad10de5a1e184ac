"""Spinlocks: queued ones, first come, first served (v6.12 kernel/locking/qspinlock.c, include/asm-generic/qspinlock_types.h).

The u32 in guest memory: byte 0 is 1 while the lock is held, byte 1 while its first waiter spins on it, and bits 16-31 name the last
waiter of a longer queue: 2 bits of its nesting, then its CPU's number plus 1. Who waits is the model's to remember.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from emu.kernel.execution import Execution
from emu.kernel.preempt import PREEMPT_OFFSET, SOFTIRQ_DISABLE_OFFSET
from emu.kernel.task import KernelThread

Q_LOCKED = 1
Q_PENDING = 1 << 8
Q_TAIL_CPU_SHIFT = 18
BH_LOCK_OFFSET = SOFTIRQ_DISABLE_OFFSET + PREEMPT_OFFSET


@dataclass(slots=True, eq=False)
class _Ticket:
    cpu: int


class Spinlocks:
    """raw_spinlock_t and spinlock_t: 4 bytes. Locking disables preemption; the callers do the rest of each variant."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.holders: dict[int, KernelThread] = {}
        self._queues: dict[int, deque[_Ticket]] = {}

    def lock(self, la: int) -> None:
        """_raw_spin_lock()."""
        self.execution.preempt_disable()
        self.acquire(la)

    def acquire(self, la: int) -> None:
        """queued_spin_lock(): preemption is off already, or interrupts are."""
        execution = self.execution
        queue = self._queues.get(la)
        if not queue and not execution.load32(la):
            execution.store32(la, Q_LOCKED)
            self.holders[la] = execution.current()
            return
        if queue is None:
            queue = self._queues[la] = deque()
        mine = _Ticket(execution.cpu_id)
        queue.append(mine)
        taken = False
        try:
            self._show(la, queue)
            execution.spin_until(lambda: queue[0] is mine and not execution.load8(la), self._reason(la))
            taken = True
        finally:
            queue.remove(mine)
            if not queue:
                del self._queues[la]
            if taken:
                execution.store8(la, Q_LOCKED)
                self._show(la, queue)
                self.holders[la] = execution.current()

    def _show(self, la: int, queue: deque[_Ticket]) -> None:
        word = self.execution.load8(la)
        if queue:
            word |= Q_PENDING
        if len(queue) > 1:
            word |= queue[-1].cpu + 1 << Q_TAIL_CPU_SHIFT
        self.execution.store32(la, word)

    def _reason(self, la: int) -> str:
        holder = self.holders.get(la)
        by = "" if holder is None else f" held by {holder.comm}/{holder.pid}"
        return f"spinlock 0x{la:x}{by}"

    def trylock(self, la: int) -> bool:
        """_raw_spin_trylock()."""
        self.execution.preempt_disable()
        if self.try_acquire(la):
            return True
        self.execution.preempt_enable()
        return False

    def try_acquire(self, la: int) -> bool:
        """queued_spin_trylock()."""
        execution = self.execution
        if execution.load32(la):
            return False
        execution.store32(la, Q_LOCKED)
        self.holders[la] = execution.current()
        return True

    def unlock(self, la: int) -> None:
        """_raw_spin_unlock()."""
        self.release(la)
        self.execution.preempt_enable()

    def release(self, la: int) -> None:
        """queued_spin_unlock(): a byte store, whoever holds the lock."""
        self.execution.store8(la, 0)
        self.holders.pop(la, None)

    # ---- with interrupts or softirqs off

    def lock_irqsave(self, la: int) -> int:
        """_raw_spin_lock_irqsave(): the flags of before. Interrupts stay off while it waits."""
        flags = self.execution.local_irq_save()
        self.lock(la)
        return flags

    def unlock_irqrestore(self, la: int, flags: int) -> None:
        """_raw_spin_unlock_irqrestore()."""
        self.release(la)
        self.execution.local_irq_restore(flags)
        self.execution.preempt_enable()

    def unlock_irq(self, la: int) -> None:
        """_raw_spin_unlock_irq()."""
        self.release(la)
        self.execution.local_irq_enable()
        self.execution.preempt_enable()

    def lock_bh(self, la: int) -> None:
        """_raw_spin_lock_bh()."""
        self.execution.preempt.add(BH_LOCK_OFFSET)
        self.acquire(la)

    def trylock_bh(self, la: int) -> bool:
        """_raw_spin_trylock_bh(); the caller enables softirqs again when it fails."""
        self.execution.preempt.add(BH_LOCK_OFFSET)
        return self.try_acquire(la)
