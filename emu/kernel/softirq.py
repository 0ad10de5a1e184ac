"""Softirqs and tasklets (v6.12 kernel/softirq.c).

A softirq runs when the interrupt that raised it ends, or at local_bh_enable(). What a thread raises, and what is left after ten
rounds, is left to the CPU's ksoftirqd.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from emu.kernel.execution import IDLE, Execution
from emu.kernel.kthread import Kthreads
from emu.kernel.preempt import SOFTIRQ_DISABLE_OFFSET, SOFTIRQ_OFFSET
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_INTERRUPTIBLE

MAX_SOFTIRQ_RESTART = 10


class Softirq(IntEnum):
    """The numbers, in the order in which they are served."""

    HI = 0
    TIMER = 1
    NET_TX = 2
    NET_RX = 3
    BLOCK = 4
    IRQ_POLL = 5
    TASKLET = 6
    SCHED = 7
    HRTIMER = 8
    RCU = 9


class Softirqs:
    """What is pending on each CPU, and who serves it."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.actions: dict[Softirq, Callable[[], None]] = {}
        # Has a CPU's ksoftirqd run.
        self.wakeup_softirqd: Callable[[int], None] = lambda cpu: None
        self._pending = [0] * execution.host.cpus.online

    def pending(self, cpu: int) -> int:
        """local_softirq_pending(): a bit for each number."""
        return self._pending[cpu]

    def raise_softirq(self, number: Softirq) -> None:
        """Mark a softirq pending on this CPU."""
        execution = self.execution
        cpu = execution.cpu_id
        self._pending[cpu] |= 1 << number
        if not execution.preempt.in_interrupt:
            self.wakeup_softirqd(cpu)

    def raise_on(self, cpu: int, number: Softirq) -> None:
        """Mark a softirq pending on any CPU."""
        self.execution.run_on(cpu, lambda: self.raise_softirq(number))

    def irq_exit(self) -> None:
        """A hard interrupt ends, and is no longer counted: serve what is pending, unless it came while softirqs are off."""
        execution = self.execution
        if self._pending[execution.cpu_id] and not execution.preempt.in_interrupt:
            self._do_softirq()

    def local_bh_disable(self) -> None:
        """local_bh_disable()."""
        self.execution.preempt.add(SOFTIRQ_DISABLE_OFFSET)

    def local_bh_enable(self) -> None:
        """local_bh_enable(): serve what became pending meanwhile."""
        execution = self.execution
        execution.preempt.add(-SOFTIRQ_DISABLE_OFFSET)
        if self._pending[execution.cpu_id] and not execution.preempt.in_interrupt:
            self.do_softirq()

    def do_softirq(self) -> None:
        """Serve what is pending, in a thread."""
        flags = self.execution.local_irq_save()
        self._do_softirq()
        self.execution.local_irq_restore(flags)

    def _do_softirq(self) -> None:
        execution = self.execution
        cpu = execution.cpu_id
        count = execution.preempt
        count.add(SOFTIRQ_OFFSET)
        try:
            for _ in range(MAX_SOFTIRQ_RESTART):
                pending, self._pending[cpu] = self._pending[cpu], 0
                execution.local_irq_enable()
                for number in Softirq:
                    if pending >> number & 1 and number in self.actions:
                        self.actions[number]()
                execution.local_irq_save()
                if not self._pending[cpu]:
                    break
        finally:
            count.add(-SOFTIRQ_OFFSET)
        if self._pending[cpu]:
            self.wakeup_softirqd(cpu)


class Ksoftirqds:
    """The threads that serve softirqs, one a CPU, made when first needed. `entry` is the address of smpboot_thread_fn."""

    def __init__(self, softirqs: Softirqs, kthreads: Kthreads) -> None:
        self.execution = softirqs.execution
        self.softirqs = softirqs
        self.kthreads = kthreads
        self.entry = 0
        self._tasks: dict[int, int] = {}
        softirqs.wakeup_softirqd = self.wake

    def wake(self, cpu: int) -> None:
        """wakeup_softirqd(). Without memory for the thread, the softirqs wait for the CPU's next interrupt."""
        if cpu not in self._tasks:
            with self.execution.process_context():
                task = self.kthreads.create(self.entry, 0, f"ksoftirqd/{cpu}", cpu=cpu)
            if self.kthreads.find(task) is None:
                return
            self._tasks[cpu] = task
        self.kthreads.wake_up_process(self._tasks[cpu])

    def run(self) -> None:
        """The body of such a thread (run_ksoftirqd)."""
        execution = self.execution
        if execution.tasks.current().address not in self._tasks.values():
            return
        while True:
            if self.softirqs.pending(execution.cpu_id):
                self.softirqs.do_softirq()
                execution.waiting.yield_cpu()
                execution.cpu_relax()
            else:
                execution.block(IDLE, TASK_INTERRUPTIBLE)


NEXT, STATE, COUNT, USE_CALLBACK, FUNC, DATA, SIZE = 0, 8, 16, 20, 24, 32, 40
STATE_SCHED, STATE_RUN = 1, 2


class Tasklets:
    """struct tasklet_struct: next, state, count at 16, use_callback at 20, the function at 24, its data at 32."""

    def __init__(self, execution: Execution, softirqs: Softirqs) -> None:
        self.execution = execution
        self.softirqs = softirqs
        self._queues: dict[tuple[Softirq, int], deque[int]] = {}
        self._killers: list[KernelThread] = []
        for number in (Softirq.HI, Softirq.TASKLET):
            softirqs.actions[number] = lambda number=number: self._action(number)  # type: ignore[misc]

    def init(self, la: int, function: int, data: int, *, callback: bool) -> None:
        """tasklet_init() and, with `callback`, tasklet_setup()."""
        execution = self.execution
        execution.store64(la + NEXT, 0)
        execution.store64(la + STATE, 0)
        execution.store32(la + COUNT, 0)
        execution.store8(la + USE_CALLBACK, int(callback))
        execution.store64(la + FUNC, function)
        execution.store64(la + DATA, data)

    def _change(self, la: int, *, set_bits: int = 0, clear: int = 0) -> int:
        """Change bits of the state; what it was."""
        state = self.execution.load64(la + STATE)
        self.execution.store64(la + STATE, state & ~clear | set_bits)
        return state

    def schedule(self, la: int) -> None:
        """tasklet_schedule() as a whole."""
        if not self._change(la, set_bits=STATE_SCHED) & STATE_SCHED:
            self.enqueue(la, Softirq.TASKLET)

    def enqueue(self, la: int, number: Softirq) -> None:
        """__tasklet_schedule() and __tasklet_hi_schedule(): the caller has set the SCHED bit."""
        self._queues.setdefault((number, self.execution.cpu_id), deque()).append(la)
        self.softirqs.raise_softirq(number)

    def _action(self, number: Softirq) -> None:
        execution = self.execution
        for la in self._queues.pop((number, execution.cpu_id), ()):
            state = execution.load64(la + STATE)
            if state & STATE_RUN or execution.load32(la + COUNT):
                # Running on another CPU, or disabled: again later.
                self._queues.setdefault((number, execution.cpu_id), deque()).append(la)
                self.softirqs.raise_softirq(number)
                continue
            self._change(la, set_bits=STATE_RUN, clear=STATE_SCHED)
            argument = la if execution.load8(la + USE_CALLBACK) else execution.load64(la + DATA)
            execution.waiting.call_guest(execution.load64(la + FUNC), argument, site="tasklet_action_common")
            self._change(la, clear=STATE_RUN)
        for killer in self._killers:
            execution.tasks.wake(killer)

    def kill(self, la: int) -> None:
        """tasklet_kill(): wait until it is neither scheduled nor running."""
        execution = self.execution
        thread = execution.current()
        self._killers.append(thread)
        try:
            execution.sleep_until(
                lambda: not execution.load64(la + STATE) & (STATE_SCHED | STATE_RUN), f"tasklet 0x{la:x}"
            )
        finally:
            self._killers.remove(thread)

    def unlock_wait(self, la: int) -> None:
        """tasklet_unlock_spin_wait(): wait while it runs on another CPU."""
        execution = self.execution
        execution.spin_until(lambda: not execution.load64(la + STATE) & STATE_RUN, f"tasklet 0x{la:x}")
