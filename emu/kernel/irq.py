"""External interrupts and NMIs: the context they run in, and whose handler takes which vector.

Source: v6.12 kernel/softirq.c irq_enter, irq_exit; arch/x86/kernel/smp.c; arch/x86/kernel/apic/apic.c local_apic_timer_interrupt;
arch/x86/kernel/nmi.c default_do_nmi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.kernel.traps import (
    CALL_FUNCTION_SINGLE_VECTOR,
    CALL_FUNCTION_VECTOR,
    LOCAL_TIMER_VECTOR,
    RESCHEDULE_VECTOR,
)

if TYPE_CHECKING:
    from emu.kernel.kernel import Kernel

# Told the vector; in hard interrupt context.
IrqHandler = Callable[[int], None]
# Whether the NMI was this handler's.
NmiHandler = Callable[[], bool]


class Irqs:
    """The handlers of one kernel. `softirqs` runs what is pending when the last hard interrupt of a CPU ends."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.handlers: dict[int, IrqHandler] = {
            RESCHEDULE_VECTOR: lambda vector: None,
            LOCAL_TIMER_VECTOR: lambda vector: kernel.sched.run_timers(kernel.cpus.current),
        }
        self.nmi_handlers: list[NmiHandler] = []
        self.softirqs: Callable[[], None] = lambda: None

    def take_calls(self, handler: IrqHandler) -> None:
        """The handler of both vectors that ask a CPU to call functions."""
        self.handlers[CALL_FUNCTION_VECTOR] = self.handlers[CALL_FUNCTION_SINGLE_VECTOR] = handler

    def handle(self, vector: int) -> bool:
        """An external interrupt has arrived on the current CPU; false when nobody takes its vector."""
        handler = self.handlers.get(vector)
        if handler is None:
            return False
        count = self.kernel.preempt(self.kernel.cpus.current)
        count.hardirq += 1
        try:
            handler(vector)
        finally:
            count.hardirq -= 1
        if not count.in_interrupt:
            self.softirqs()
        return True

    def nmi(self) -> bool:
        """An NMI has arrived on the current CPU; false when no handler knows why."""
        count = self.kernel.preempt(self.kernel.cpus.current)
        # v6.12 include/linux/hardirq.h __nmi_enter: an NMI is a hard interrupt too.
        count.nmi += 1
        count.hardirq += 1
        # A fault in a handler must not show to the page fault handler that the NMI may have interrupted (nmi.c nmi_cr2).
        cpu = self.kernel.cpu
        cr2 = cpu.reg("cr2")
        try:
            # Every handler is asked: several events may have come as one NMI.
            return sum(handler() for handler in self.nmi_handlers) > 0
        finally:
            cpu.set_reg("cr2", cr2)
            count.nmi -= 1
            count.hardirq -= 1
