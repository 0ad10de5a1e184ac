"""The state in which Linux runs the first thread of a CPU: control registers, tables, model-specific registers.

Equivalent to what INIT, SIPI and the kernel's own start-up code leave (v6.12 arch/x86/kernel/head_64.S,
arch/x86/kernel/cpu/common.c cpu_init): every CPU has a GDT, TSS, entry stacks and per-CPU area of its own, and the shared IDT.
"""

from __future__ import annotations

from emu.cpu import Cpu
from emu.descriptors import TableRegister
from emu.kernel.kernel import Kernel
from emu.mmu.registers import Cr0, Cr4, Efer
from emu.msr import IA32_FMASK, IA32_LSTAR, IA32_PAT, IA32_STAR

LINUX_CR0 = int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG)
LINUX_CR4 = int(
    Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.SMEP | Cr4.SMAP | Cr4.PKE
)
LINUX_EFER = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
# WB, WT, UC-, UC, WB, WP, UC-, WT: v6.12 arch/x86/mm/pat/memtype.c pat_bp_init.
LINUX_PAT = 0x0407_0506_0007_0106
LINUX_PKRU = 0x5555_5554
LINUX_FMASK = 0x0025_7FD5


def start_cpu(cpu: Cpu, kernel: Kernel, *, levels: int, pcid: bool) -> None:
    """Bring a CPU to where Linux has brought it when it runs its first thread."""
    cr4 = LINUX_CR4 | (Cr4.LA57 if levels == 5 else 0) | (Cr4.PCIDE if pcid else 0)
    cpu.mmu.reset(LINUX_CR0, kernel.contexts.build_cr3(kernel.contexts.init_mm, 0), cr4, LINUX_EFER, LINUX_PKRU)
    cpu.sync_engine_registers()
    tables = kernel.cpu_tables(cpu.id)
    cpu.gdtr = TableRegister(tables.gdt_direct, tables.gdt_limit)
    cpu.load_task_register(tables.tss_selector)
    cpu.gdtr = TableRegister(tables.gdt, tables.gdt_limit)
    cpu.idtr = TableRegister(tables.idt, tables.idt_limit)
    cpu.load_tables()
    cpu.enter_privilege(0, 0x10, new_stack=False)
    cpu.set_reg("ss", 0x18)
    cpu.set_reg("gs_base", tables.percpu)
    cpu.msrs[IA32_PAT] = LINUX_PAT
    cpu.msrs[IA32_STAR] = 0x0023_0010 << 32
    cpu.msrs[IA32_LSTAR] = kernel.symbol("entry_SYSCALL_64")
    cpu.msrs[IA32_FMASK] = LINUX_FMASK
