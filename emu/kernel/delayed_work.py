"""Delayed work: a work item and the timer that queues it (v6.12 kernel/workqueue.c)."""

from __future__ import annotations

from emu.kernel.timer import MAX_JIFFY_OFFSET, Timers
from emu.kernel.workqueue import WORK_CPU_UNBOUND, WORK_STRUCT_PENDING, Workqueue, Workqueues

# struct delayed_work: work_struct, timer_list, the workqueue, the CPU.
WORK, TIMER, WQ, CPU, SIZE = 0, 32, 72, 80, 88


class DelayedWorks:
    """Delayed work of guests."""

    def __init__(self, queues: Workqueues, timers: Timers) -> None:
        self.queues = queues
        self.timers = timers
        self.execution = queues.execution

    def queue_on(self, cpu: int, queue: Workqueue, dwork: int, delay: int) -> bool:
        """queue_delayed_work_on(): false when it is pending already."""
        execution = self.execution
        data = execution.load64(dwork + WORK)
        if data & WORK_STRUCT_PENDING:
            return False
        execution.store64(dwork + WORK, data | WORK_STRUCT_PENDING)
        self._queue(cpu, queue, dwork, delay)
        return True

    def _queue(self, cpu: int, queue: Workqueue, dwork: int, delay: int) -> None:
        if not delay:
            self.queues.insert_work(cpu, queue, dwork)
            return
        execution = self.execution
        execution.store64(dwork + WQ, queue.la)
        execution.store32(dwork + CPU, cpu)
        online = cpu < execution.host.cpus.online
        self.timers.mod(dwork + TIMER, self.timers.jiffies + min(delay, MAX_JIFFY_OFFSET), cpu if online else None)

    def timer_fn(self, timer: int) -> None:
        """delayed_work_timer_fn()."""
        dwork = timer - TIMER
        queue = self.queues.find(self.execution.load64(dwork + WQ))
        if queue is not None:
            self.queues.insert_work(self.execution.load32(dwork + CPU), queue, dwork)

    def mod_on(self, cpu: int, queue: Workqueue, dwork: int, delay: int) -> bool:
        """mod_delayed_work_on(): whether it was pending."""
        was = self.cancel(dwork)
        self.queue_on(cpu, queue, dwork, delay)
        return was

    def cancel(self, dwork: int) -> bool:
        """cancel_delayed_work(): whether it was pending."""
        self.timers.delete(dwork + TIMER)
        return self.queues.cancel(dwork)

    def cancel_sync(self, dwork: int) -> bool:
        """cancel_delayed_work_sync()."""
        self.timers.delete(dwork + TIMER)
        return self.queues.cancel_sync(dwork)

    def flush(self, dwork: int) -> bool:
        """flush_delayed_work(): run it now if its timer waits, then wait for it."""
        if self.timers.delete_sync(dwork + TIMER):
            queue = self.queues.find(self.execution.load64(dwork + WQ))
            if queue is not None:
                self.queues.insert_work(WORK_CPU_UNBOUND, queue, dwork)
        return self.queues.flush_work(dwork)
