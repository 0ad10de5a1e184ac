"""A fake kernel with everything that waits, and the interrupts joined to it."""

from __future__ import annotations

from fake_sched import FakeKernel

from emu.kernel.execution import IRQ_WORK_VECTOR
from emu.kernel.sync import Sync


def synced(cpus: int = 2) -> tuple[FakeKernel, Sync]:
    kernel = FakeKernel(cpus)
    sync = Sync(kernel, kernel, "6.12", lambda cpu: kernel.running[cpu] is kernel.idle[cpu])
    kernel.on_irq[IRQ_WORK_VECTOR] = sync.execution.run_irq_work
    kernel.irq_exit = sync.irq_exit
    kernel.on_switch = lambda cpu, previous: sync.rcu.note_context_switch(cpu, previous)
    sync.workqueues.entry = kernel.function(lambda argument: sync.workqueues.worker_thread())
    sync.ksoftirqds.entry = kernel.function(lambda argument: sync.ksoftirqds.run())
    return kernel, sync
