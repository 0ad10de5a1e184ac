"""Vectors that no exception handler takes: device and system interrupts, INT 0x80, and exceptions only boot knows.

Sources: v6.12 arch/x86/kernel/irq.c, arch/x86/entry/common.c do_int80_emulation, arch/x86/mm/extable.c early_fixup_exception,
arch/x86/kernel/cet.c; v6.1 and v5.4 the same files. No device raises an interrupt in this machine: what arrives was sent by INT n.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu.kernel.ptrace import PtRegs
from emu.kernel.traps import FIRST_EXTERNAL_VECTOR, IA32_SYSCALL_VECTOR, BugEntry, Panic, Resume, Trap, Warn

SPURIOUS_APIC_VECTOR = 0xFF
_FIRST_SYSTEM_VECTOR = {"6.12": 0xEB, "6.1": 0xEC, "5.4": 0xEC}
_NO_HANDLER = {
    "6.12": "No irq handler for {cpu}.{vector}",
    "6.1": "__common_interrupt: {cpu}.{vector} No irq handler for vector",
    "5.4": "do_IRQ: {cpu}.{vector} No irq handler for vector",
}
# v6.12 include/linux/ratelimit_types.h: DEFAULT_RATELIMIT_BURST lines in DEFAULT_RATELIMIT_INTERVAL.
_RATELIMIT_BURST = 10
_CP_ERRORS = ("unknown", "near ret", "far/iret", "endbranch", "rstorssp", "setssbsy")
_CP_EC = 0x7FFF
ENOSYS = 38


@dataclass(frozen=True, slots=True)
class Syscall:
    """INT 0x80 of user mode: there are no system calls, so RAX becomes -ENOSYS."""


@dataclass(frozen=True, slots=True)
class EarlyException:
    """A vector whose gate still leads to boot's handler: it prints `lines` and the registers, and halts."""

    lines: tuple[str, ...]


class Interrupts:
    """One machine's answers; it limits the rate of its messages as printk_ratelimit does, in a time that stands still."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._left = _RATELIMIT_BURST

    def handle(self, vector: int, regs: PtRegs, error: int, cr2: int, cpu: int) -> Resume | Panic | Warn | Syscall | EarlyException:
        """What the kernel does about `vector`, which traps.handle_trap does not know."""
        if vector == IA32_SYSCALL_VECTOR:
            return Syscall() if regs.user_mode else Panic("Unexpected external interrupt 0x80")
        if vector == Trap.CP and self.version == "6.12":
            mode = "user mode" if regs.user_mode else "kernel mode"
            code = error & _CP_EC
            what = _CP_ERRORS[code if code < len(_CP_ERRORS) else 0]
            text = f"Unexpected {mode} #CP, error_code: {what}"
            return Warn(BugEntry("arch/x86/kernel/cet.c", 39, True, True, text), regs.ip)
        if vector < FIRST_EXTERNAL_VECTOR:
            text = f"PANIC: early exception 0x{vector:02x} IP {regs.cs:x}:{regs.ip:x} error {error:x} cr2 0x{cr2:x}"
            return EarlyException((text,))
        return Resume(regs.ip, self._no_handler(vector, cpu))

    def _no_handler(self, vector: int, cpu: int) -> tuple[str, ...]:
        if vector == SPURIOUS_APIC_VECTOR:
            text = f"Spurious APIC interrupt (vector 0xFF) on CPU#{cpu}, should never happen."
        elif vector >= _FIRST_SYSTEM_VECTOR[self.version]:
            return ()
        else:
            text = _NO_HANDLER[self.version].format(cpu=cpu, vector=vector)
        if not self._left:
            return ()
        self._left -= 1
        return (text,)
