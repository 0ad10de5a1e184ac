"""Joining threads, locks, timers, softirqs, RCU and workqueues to a booted kernel, and exporting them to modules."""

from __future__ import annotations

from collections.abc import Callable

from emu.kernel.execution import IRQ_WORK_VECTOR
from emu.kernel.guest_exports import GuestExports
from emu.kernel.kernel import Kernel
from emu.kernel.module_api_kthread import KthreadExports
from emu.kernel.module_api_sync import SyncExports
from emu.kernel.module_api_time import RandomExports, TimeExports
from emu.kernel.module_api_work import WorkExports
from emu.kernel.sync import Sync
from emu.kernel.task import KernelThread


def boot_sync(kernel: Kernel, exports: GuestExports, kvfree: Callable[[int], None]) -> Sync:
    """Make all of it for a kernel whose CPUs are not there yet. `kvfree` frees what a grace period has been waited for."""
    sched = kernel.sched
    sync = Sync(kernel, sched, kernel.profile.name, lambda cpu: sched.running[cpu] is sched.idle[cpu])
    sync.place()
    before = sched.on_switch

    def on_switch(previous: KernelThread, following: KernelThread) -> None:
        before(previous, following)
        sync.context_switch(kernel.cpus.current, previous, following)

    sched.on_switch = on_switch
    kernel.irqs.handlers[IRQ_WORK_VECTOR] = lambda vector: sync.execution.run_irq_work()
    kernel.irqs.softirqs = sync.irq_exit

    def request_irq(vector: int, function: Callable[[], None]) -> bool:
        if vector in kernel.irqs.handlers:
            return False
        kernel.irqs.handlers[vector] = lambda number: function()
        return True

    SyncExports(exports, sync)
    threads = KthreadExports(
        exports, sync, send_nmi=lambda cpu: kernel.send_nmi(cpu), send_ipi=lambda cpu, vector: kernel.send_ipi(cpu, vector),
        request_irq=request_irq,
    )
    TimeExports(exports, sync)
    RandomExports(exports)
    WorkExports(exports, sync, threads, kernel.smp, kvfree)
    return sync
