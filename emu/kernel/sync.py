"""Threads, locks, timers, softirqs, RCU and workqueues of one kernel, put together.

The kernel tells what happens to its CPUs: `irq_exit` at the end of a hard interrupt, `context_switch`, `sched_clock_irq` when a CPU
is looked at; IRQ_WORK_VECTOR calls `execution.run_irq_work`.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.kernel.completion import Completions
from emu.kernel.delayed_work import DelayedWorks
from emu.kernel.execution import Execution
from emu.kernel.irq_work import IrqWorks
from emu.kernel.kthread import Kthreads
from emu.kernel.mutex import Mutexes
from emu.kernel.percpu_first_chunk import STATIC_VARIABLES
from emu.kernel.rcu import Rcu
from emu.kernel.rwlock import Rwlocks
from emu.kernel.rwsem import Rwsems
from emu.kernel.semaphore import Semaphores
from emu.kernel.softirq import Ksoftirqds, Softirqs, Tasklets
from emu.kernel.spinlock import Spinlocks
from emu.kernel.task import KernelThread
from emu.kernel.timer import Timers
from emu.kernel.wait import WaitQueues
from emu.kernel.waiting import Host, Waiting
from emu.kernel.workqueue import Workqueues

# struct pcpu_hot (v6.12 arch/x86/include/asm/current.h).
CURRENT_TASK, PREEMPT_COUNT, CPU_NUMBER, TOP_OF_STACK = 0, 8, 12, 24


class Sync:
    """All of it. `is_idle(cpu)`: a CPU is in its idle loop. `version` is the kernel profile's name."""

    def __init__(self, host: Host, waiting: Waiting, version: str, is_idle: Callable[[int], bool]) -> None:
        self.host = host
        self.execution = Execution(host, waiting)
        self.softirqs = Softirqs(self.execution)
        self.tasklets = Tasklets(self.execution, self.softirqs)
        self.timers = Timers(self.execution, self.softirqs)
        self.rcu = Rcu(self.execution, self.softirqs, is_idle)
        self.kthreads = Kthreads(self.execution, self.rcu.call_rcu)
        self.ksoftirqds = Ksoftirqds(self.softirqs, self.kthreads)
        self.completions = Completions(self.execution, self.timers.sleep)
        self.semaphores = Semaphores(self.execution, self.timers.sleep)
        self.mutexes = Mutexes(self.execution)
        self.rwsems = Rwsems(self.execution)
        self.spinlocks = Spinlocks(self.execution)
        self.rwlocks = Rwlocks(self.execution)
        self.wait_queues = WaitQueues(self.execution, self.spinlocks, self.timers)
        self.workqueues = Workqueues(self.execution, self.kthreads, version)
        self.delayed_works = DelayedWorks(self.workqueues, self.timers)
        self.irq_works = IrqWorks(self.execution)
        self._hot: list[int] = []

    def place(self) -> None:
        """Per-CPU memory is there: keep preempt_count, `current` and the CPU's number in struct pcpu_hot."""
        host = self.host
        for cpu in range(host.cpus.online):
            pa = host.layout.pa(host.percpu.per_cpu_offset(cpu) + STATIC_VARIABLES["pcpu_hot"][0])
            self._hot.append(pa)
            host.preempt(cpu).place(host.memory, pa + PREEMPT_COUNT)
            host.memory.write(pa + CPU_NUMBER, cpu.to_bytes(4, "little"))

    def context_switch(self, cpu: int, previous: KernelThread, following: KernelThread) -> None:
        """A CPU switches from one thread to another: a quiescent state, and another `current`."""
        self.rcu.note_context_switch(cpu, previous)
        self.set_current(cpu, following)

    def set_current(self, cpu: int, thread: KernelThread) -> None:
        """Let `current` on a CPU be a thread."""
        if self._hot:
            memory = self.host.memory
            memory.write_u64(self._hot[cpu] + CURRENT_TASK, self.execution.tasks.of(thread).address)
            memory.write_u64(self._hot[cpu] + TOP_OF_STACK, thread.stack_end)

    def irq_exit(self) -> None:
        """A hard interrupt of this CPU ends, and preempt_count no longer has it: softirqs run."""
        self.softirqs.irq_exit()

    def sched_clock_irq(self, cpu: int, user: bool = False) -> None:
        """Look at what a CPU does, as the tick would: RCU and jiffies go on."""
        self.rcu.sched_clock_irq(cpu, user)

    def thread_died(self, thread: KernelThread) -> None:
        """A thread has ended in an oops: no grace period waits for it."""
        task = self.execution.tasks.known(thread)
        if task is not None:
            task.rcu_read_lock_nesting = 0
            self.rcu.forget(task)

    def validate(self) -> None:
        """Every part is sound."""
        self.kthreads.validate()
        self.timers.validate()
        self.rcu.validate()
        self.workqueues.validate()
