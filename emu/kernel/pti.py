"""Page-table isolation at the border between user mode and the kernel: which PGD is in CR3.

Linux does this in the first and last instructions of its entry code, which the user PGD maps together with the stacks that the CPU
switches to. v6.12 arch/x86/entry/calling.h: SWITCH_TO_KERNEL_CR3, SWITCH_TO_USER_CR3_STACK, SAVE_AND_SWITCH_TO_KERNEL_CR3,
PARANOID_RESTORE_CR3. With PCIDs user mode runs under one of its own (mmu_context.MmuContexts.user_cr3).
"""

from __future__ import annotations

from emu.kernel.init_64 import PTI_USER_PGD
from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.mmu_context import MmuContexts
from emu.kernel.traps import Trap

_RPL = 3
# Those that may come in kernel mode while CR3 still, or already, has the user PGD; they have stacks of their own.
_PARANOID = frozenset((Trap.DB, Trap.NMI, Trap.DF, Trap.MC))


class PageTableIsolation:
    """The switches of CR3 of one kernel; none when its `contexts` are without isolation."""

    def __init__(self, contexts: MmuContexts) -> None:
        self.contexts = contexts
        # CR3 of interrupted kernel code that ran on a user PGD, by (CPU, address of the hardware frame).
        self._interrupted: dict[tuple[int, int], int] = {}

    def enter(self, cpu: KernelCpu, vector: int, cs: int, frame_la: int) -> None:
        """The entry stub of `vector` has come from code with `cs`: go to the kernel PGD."""
        if not self.contexts.pti or not (cs & _RPL or vector in _PARANOID):
            return
        cr3 = cpu.reg("cr3")
        if not cr3 & PTI_USER_PGD:
            return
        if not cs & _RPL:
            self._interrupted[cpu.id, frame_la] = cr3
        cpu.set_reg("cr3", self.contexts.kernel_cr3(cpu.id))

    def leave(self, cpu: KernelCpu, cs: int, frame_la: int) -> None:
        """The hardware frame at `frame_la` is about to be popped: go to the user PGD, or back to the interrupted CR3."""
        if not self.contexts.pti:
            return
        if cs & _RPL:
            self.to_user(cpu)
            return
        interrupted = self._interrupted.pop((cpu.id, frame_la), None)
        if interrupted is not None:
            cpu.set_reg("cr3", self.contexts.return_cr3(cpu.id, interrupted))

    def to_kernel(self, cpu: KernelCpu) -> None:
        """SYSCALL has come from user mode."""
        cpu.set_reg("cr3", self.contexts.kernel_cr3(cpu.id))

    def to_user(self, cpu: KernelCpu) -> None:
        """The next instruction but one is user mode's."""
        if self.contexts.pti:
            cpu.set_reg("cr3", self.contexts.user_cr3(cpu.id))
