"""What every CPU and thread is doing when nothing goes on: for deadlocks and exhausted runs.

The lines are this program's own; the traces are Linux's (v6.12 arch/x86/kernel/dumpstack.c). Linux itself would say "blocked for
more than 120 seconds" of each such thread (kernel/hung_task.c), two minutes later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.kernel.execution import IDLE
from emu.kernel.task import KernelThread, ThreadState
from emu.mmu.fault import NonCanonical, PageFault

if TYPE_CHECKING:
    from emu.kernel.kernel import Kernel

_STATES = {ThreadState.RUNNABLE: "R", ThreadState.BLOCKED: "D", ThreadState.DEAD: "X"}


def blocked_lines(kernel: Kernel) -> list[str]:
    """The state of each CPU, then each thread that waits, with its call trace."""
    return ["vmemu: deadlock: no CPU can go on, and no timer or interrupt is to come", *cpu_lines(kernel), *sleeper_lines(kernel)]


def cpu_lines(kernel: Kernel) -> list[str]:
    """What each CPU does, with the call trace of those that do anything."""
    found: list[str] = []
    for cpu in range(kernel.cpus.online):
        thread = kernel.sched.running[cpu]
        if thread is None:
            continue
        if kernel.sched.idling[cpu]:
            found.append(f"CPU {cpu}: idle")
        else:
            why = f", waits for {thread.waiting_for}" if thread.waiting_for else ""
            where = kernel.symbol_text(kernel.cpu_by_number(cpu).reg("rip"))
            found.append(f"CPU {cpu}: {thread.comm}/{thread.pid} at {where}{why}")
            found += trace_lines(kernel, thread)
    return found


def sleeper_lines(kernel: Kernel) -> list[str]:
    """The threads that wait, with their call traces."""
    found: list[str] = []
    for thread in kernel.threads:
        if thread.state is ThreadState.BLOCKED and thread.waiting_for != IDLE:
            why = thread.waiting_for or "whoever wakes it"
            found.append(f"task:{thread.comm} state:{_STATES[thread.state]} pid:{thread.pid} CPU {thread.cpu}, waits for {why}")
            found += trace_lines(kernel, thread)
    return found


def trace_lines(kernel: Kernel, thread: KernelThread) -> tuple[str, ...]:
    """The call trace of a thread, on a CPU or off it."""
    try:
        return kernel.exceptions.thread_trace(thread)
    except (PageFault, NonCanonical) as fault:
        return (f"(the stack cannot be read: {fault})",)
