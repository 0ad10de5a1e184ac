"""What Linux does about a page fault (v6.12 and v6.1 arch/x86/mm/fault.c; v5.4 for vmalloc_fault and its overflow test).

Decisions only. `handle_page_fault` takes the fault and what the caller looked up, and says: fixed (and by what), an oops
with its first lines, or a signal. `report` prints. Page tables are read through the entries of `emu.mmu.walk.inspect`;
vmalloc_fault returns the entry to copy, because only the page-table writer may store it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from emu.descriptors import TableRegister, decode_system_segment
from emu.kernel.oops import (
    SIGKILL,
    SIGSEGV,
    DieContext,
    OopsReport,
    OopsSource,
    OopsState,
    Task,
    die,
    opcodes_line,
)
from emu.kernel.ptrace import X86_EFLAGS_AC, X86_EFLAGS_IF, PtRegs
from emu.kernel.traps import SIGBUS, Die, Signal, stack_overflow
from emu.kernel.traps import report as report_trap
from emu.kernel.unwind import StackInfo, Stacks, StackType
from emu.mmu.entry import PHYSICAL_MASK, Entry, Level, index, is_leaf
from emu.mmu.fault import PfError

PAGE_SIZE = 4096
_MASK = (1 << 64) - 1
SEGV_MAPERR, SEGV_ACCERR, SEGV_PKUERR, BUS_ADRERR = 1, 2, 4, 2

Entries = Sequence[tuple[Level, int, int]]
"""(level, physical address, entry), top level first: the result of emu.mmu.walk.inspect."""


class FixedBy(Enum):
    """Why execution may go on."""

    VMALLOC_FAULT = auto()
    SPURIOUS = auto()
    EXCEPTION_TABLE = auto()
    HANDLE_MM_FAULT = auto()


class VmFault(Enum):
    """What the user half of the address space says about a fault: handle_mm_fault and the VMA lookup before it."""

    HANDLED = auto()
    MAPERR = auto()
    ACCERR = auto()
    PKUERR = auto()
    SIGBUS = auto()


@dataclass(frozen=True, slots=True)
class Fixed:
    """The faulting instruction is restarted at `ip`, which the exception table may have moved."""

    by: FixedBy
    ip: int


@dataclass(frozen=True, slots=True)
class FaultOops:
    """An oops: its lines up to the header, the header's description, and whether "CR2:" follows the module list."""

    lines: tuple[str, ...]
    description: str
    error: int
    address: int
    context: DieContext
    shows_cr2: bool = True


@dataclass(frozen=True, slots=True)
class FaultSignal:
    """A signal for the user task; with `shows_code` a Code: line follows the log line."""

    signal: Signal
    shows_code: bool


FaultOutcome = Fixed | FaultOops | FaultSignal | Die


@dataclass(frozen=True, slots=True)
class SystemTables:
    """IDTR, GDTR, LDTR and TR, and a reader of kernel memory: printed when user mode took a supervisor fault."""

    idt: TableRegister
    gdt: TableRegister
    ldtr: int
    tr: int
    read: Callable[[int, int], bytes | None]


@dataclass(frozen=True, slots=True)
class FaultRules:
    """What the page-fault handler of one version does differently."""

    vmalloc_fault: bool = False
    """The vmalloc region's top-level entries are copied on demand: before v5.8."""
    smap_asks_fixup: bool = False
    """A kernel access to user memory with AC clear may be fixed up by the exception table: before v5.11."""
    guard_of_any_stack: bool = True
    """Guards of all stacks are recognised; before v5.16 the page on either side of the task's stack."""
    nx_of_any_level: bool = True
    """The NX line heeds the NX bit of every level, not only the leaf's."""
    segfault_names_cpu: bool = True
    """ "likely on CPU" in a segfault's line."""


FAULT_RULES = {
    "6.12": FaultRules(),
    "6.1": FaultRules(nx_of_any_level=False),
    "5.4": FaultRules(
        vmalloc_fault=True, smap_asks_fixup=True, guard_of_any_stack=False, nx_of_any_level=False, segfault_names_cpu=False
    ),
}


@dataclass(frozen=True, slots=True)
class FaultFacts:
    """What the handler looks up. `entries`: walk in the tables of CR3; `init_entries`: walk in init_mm's.

    `vmalloc_fault` is for v5.4 only: True when it repaired the tables. `handle_mm_fault` is None without an mm.
    """

    version: str
    levels: int
    task: Task
    stacks: Stacks
    entries: Entries
    init_entries: Entries
    is_vmalloc_addr: Callable[[int], bool]
    smap: bool = True
    smep: bool = True
    fixup: Callable[[int], int | None] = lambda ip: None
    vmalloc_fault: Callable[[int], bool] = lambda address: False
    handle_mm_fault: Callable[[int, int], VmFault] | None = None
    pagefault_disabled: bool = False
    stack_end_corrupted: bool = False
    handles_sigsegv: bool = False
    vma: Callable[[int], str] = lambda ip: ""
    tables: SystemTables | None = None
    core: int = 0
    socket: int = 0
    context: DieContext = field(default_factory=DieContext)
    """in_interrupt and preempt_count of the interrupted code."""

    @property
    def rules(self) -> FaultRules:
        """The rules of the version."""
        return FAULT_RULES[self.version]


def task_size_max(levels: int) -> int:
    """TASK_SIZE_MAX: where the user half ends, one guard page early."""
    return (1 << (9 * levels + 11)) - PAGE_SIZE


def dump_pagetable(entries: Entries, levels: int) -> tuple[str, ...]:
    """The PGD..PTE line. It ends at an entry that is not present or is a leaf; only a PTE is not followed by a space.

    With 4 levels the P4D is folded into the PGD, which then counts as present whatever it holds: its value stands twice.
    A second line "BAD" is printed when a table cannot be read.
    """
    if not entries:
        return ("BAD",)
    words: list[tuple[str, int, int]] = []
    for level, _, entry in entries:
        if level == Level.PML4E and levels == 4:
            words.append(("PGD", level, entry))
            words.append(("P4D", level, entry))
        else:
            words.append((_LEVEL_NAMES[level], level, entry))
    line = "".join(f"{name} {entry:x}" + ("" if name == "PTE" else " ") for name, _, entry in words)
    name, last_level, last = words[-1]
    complete = name == "PTE" or not last & Entry.P or is_leaf(last_level, last) or bool(last & Entry.PS)
    return (line,) if complete else (line, "BAD")


_LEVEL_NAMES = {Level.PML5E: "PGD", Level.PML4E: "P4D", Level.PDPTE: "PUD", Level.PDE: "PMD", Level.PTE: "PTE"}


def _instruction_fetch_line(facts: FaultFacts) -> tuple[str, ...]:
    """The line about NX or SMEP."""
    if not facts.entries:
        return ()
    level, _, leaf = facts.entries[-1]
    if not leaf & Entry.P or not is_leaf(level, leaf):
        return ()
    considered = facts.entries if facts.rules.nx_of_any_level else facts.entries[-1:]
    if any(entry & Entry.XD for _, _, entry in considered):
        return (f"kernel tried to execute NX-protected page - exploit attempt? (uid: {facts.task.uid})",)
    if facts.entries[0][2] & Entry.US and facts.smep:
        return (f"unable to execute userspace code (SMEP?) (uid: {facts.task.uid})",)
    return ()


def show_ldttss(tables: SystemTables, name: str, selector: int) -> str:
    """What LDTR or TR points to."""
    if selector == 0:
        return f"{name}: NULL"
    offset = (selector >> 3) * 8
    if offset + 16 >= tables.gdt.limit:
        return f"{name}: 0x{selector:x} -- out of bounds"
    data = tables.read(tables.gdt.base + offset, 16)
    if data is None:
        return f"{name}: 0x{selector:x} -- GDT entry is not readable"
    segment = decode_system_segment(data)
    # The kernel prints only the low 16 and next 4 bits of the limit, without the granularity.
    return f"{name}: 0x{selector:x} -- base=0x{segment.base:x} limit=0x{segment.limit:x}"


def show_fault_oops(facts: FaultFacts, regs: PtRegs, error: int, address: int) -> tuple[str, ...]:
    """The lines from "BUG:" to the page-table line."""
    lines = list(_instruction_fetch_line(facts)) if error & PfError.I else []
    what = "unable to handle page fault for"
    if address < PAGE_SIZE and not regs.user_mode:
        what = "kernel NULL pointer dereference,"
    lines.append(f"BUG: {what} address: {address:016x}")
    who = "user" if error & PfError.U else "supervisor"
    access = "instruction fetch" if error & PfError.I else "write access" if error & PfError.W else "read access"
    lines.append(f"#PF: {who} {access} in {'user' if regs.user_mode else 'kernel'} mode")
    lines.append(f"#PF: error_code(0x{error:04x}) - {_reason(error)}")
    if not error & PfError.U and regs.user_mode and facts.tables is not None:
        idt, gdt = facts.tables.idt, facts.tables.gdt
        lines.append(f"IDT: 0x{idt.base:x} (limit=0x{idt.limit:x}) GDT: 0x{gdt.base:x} (limit=0x{gdt.limit:x})")
        lines.append(show_ldttss(facts.tables, "LDTR", facts.tables.ldtr))
        lines.append(show_ldttss(facts.tables, "TR", facts.tables.tr))
    return (*lines, *dump_pagetable(facts.entries, facts.levels))


def _reason(error: int) -> str:
    if not error & PfError.P:
        return "not-present page"
    if error & PfError.RSVD:
        return "reserved bit violation"
    return "protection keys violation" if error & PfError.PK else "permissions violation"


def spurious_kernel_fault(error: int, init_entries: Entries) -> bool:
    """Whether the tables allow what a stale TLB entry refused: a write or a fetch, with P set and nothing else."""
    if error not in (PfError.W | PfError.P, PfError.I | PfError.P):
        return False
    if not init_entries or any(not entry & Entry.P for _, _, entry in init_entries):
        return False
    level, _, leaf = init_entries[-1]
    if not is_leaf(level, leaf):
        return False
    # A 4 KiB page also needs the permission in its PMD; the tables are broken where it lacks (the kernel WARNs).
    checked = [entry for entry_level, _, entry in init_entries if entry_level == level or level == Level.PTE == entry_level - 1]
    if error & PfError.W:
        return all(entry & Entry.RW for entry in checked)
    return not any(entry & Entry.XD for entry in checked)


@dataclass(frozen=True, slots=True)
class VmallocFault:
    """Result of vmalloc_fault: whether the fault is repaired, and the store it makes: (physical address, entry)."""

    handled: bool
    store: tuple[int, int] | None = None


def vmalloc_fault(
    read_u64: Callable[[int], int], cr3: int, init_pgd: int, address: int, levels: int, vmalloc: range
) -> VmallocFault:
    """v5.4 x86-64 vmalloc_fault: copy init_mm's top-level entry into the tables of CR3, if that entry is missing there.

    The copy is made even when the address turns out to be unmapped further down, and then the fault is a real one.
    `vmalloc` is range(VMALLOC_START, VMALLOC_END). Raises AssertionError where the kernel has BUG_ON: both tables have
    an entry, and they differ.
    """
    if address not in vmalloc:
        return VmallocFault(False)
    offset = 8 * index(address, levels)
    reference = read_u64((init_pgd & PHYSICAL_MASK) + offset)
    if not reference:
        return VmallocFault(False)
    store = None
    slot = (cr3 & PHYSICAL_MASK) + offset
    present = read_u64(slot)
    if not present:
        store = (slot, reference)
    elif (present ^ reference) & PHYSICAL_MASK:
        raise AssertionError(f"top-level entries of {address:#x} differ: {present:#x} here, {reference:#x} in init_mm")
    table = reference & PHYSICAL_MASK
    for level in range(levels - 1, 0, -1):
        entry = read_u64(table + 8 * index(address, level))
        # pud_none and pmd_none look at the whole entry, pte_present at P.
        if not entry or (level == Level.PTE and not entry & Entry.P):
            return VmallocFault(False, store)
        if is_leaf(level, entry):
            break
        table = entry & PHYSICAL_MASK
    return VmallocFault(True, store)


def _stack_guard(facts: FaultFacts, address: int) -> StackInfo | None:
    """The stack whose guard the fault hit."""
    if not facts.is_vmalloc_addr(address):
        return None
    if facts.rules.guard_of_any_stack:
        return facts.stacks.get_stack_guard_info(address)
    task = next((info for info in facts.stacks.infos if info.type is StackType.TASK), None)
    if task is None:
        return None
    beside = (task.begin - 1 - address) & _MASK < PAGE_SIZE or (address - task.end) & _MASK < PAGE_SIZE
    return task if beside else None


def page_fault_oops(facts: FaultFacts, regs: PtRegs, error: int, address: int, *, irqs_disabled: bool) -> FaultOutcome:
    """page_fault_oops (v5.4: no_context behind the exception table): stack overflow, or a plain oops."""
    context = replace(facts.context, irqs_disabled=irqs_disabled, signal=SIGKILL)
    if not regs.user_mode:
        info = _stack_guard(facts, address)
        if info is not None:
            overflow = replace(context, signal=SIGSEGV)
            return stack_overflow(facts.version, info, address, overflow, double_fault=False)
    lines = show_fault_oops(facts, regs, error, address)
    if facts.stack_end_corrupted:
        lines = (*lines, "Thread overran stack, or stack corrupted")
    return FaultOops(lines, "Oops", error, address, context)


def _bad_area(
    facts: FaultFacts, regs: PtRegs, error: int, address: int, *, signal: int, code: int, irqs_disabled: bool
) -> FaultOutcome:
    """__bad_area_nosemaphore and do_sigbus."""
    if not regs.user_mode:
        landing = facts.fixup(regs.ip)
        if landing is not None:
            return Fixed(FixedBy.EXCEPTION_TABLE, landing)
        return page_fault_oops(facts, regs, error, address, irqs_disabled=irqs_disabled)
    if not error & PfError.U and signal == SIGSEGV:
        return page_fault_oops(facts, regs, error, address, irqs_disabled=irqs_disabled)
    if address >= task_size_max(facts.levels):
        # User mode must not learn from the error code which kernel addresses are mapped.
        error |= PfError.P
    lines = show_signal_msg(facts, regs, error, address) if signal == SIGSEGV else ()
    return FaultSignal(Signal(signal, code, address, lines), bool(lines))


def show_signal_msg(facts: FaultFacts, regs: PtRegs, error: int, address: int) -> tuple[str, ...]:
    """The log line of a user task's segfault; none when the task handles SIGSEGV. v5.4 does not name the CPU."""
    if facts.handles_sigsegv:
        return ()
    task = facts.task
    line = f"{task.comm}[{task.pid}]: segfault at {address:x} ip {regs.ip:016x} sp {regs.sp:016x} error {error:x}"
    where = f" likely on CPU {task.cpu} (core {facts.core}, socket {facts.socket})" if facts.rules.segfault_names_cpu else ""
    return (line + facts.vma(regs.ip) + where,)


def do_kern_addr_fault(facts: FaultFacts, regs: PtRegs, error: int, address: int) -> FaultOutcome:
    """A fault in the kernel half: vmalloc_fault (v5.4), a stale TLB entry, or a bad area."""
    demand = not error & (PfError.RSVD | PfError.U | PfError.P)
    if demand and facts.rules.vmalloc_fault and facts.vmalloc_fault(address):
        return Fixed(FixedBy.VMALLOC_FAULT, regs.ip)
    if spurious_kernel_fault(error, facts.init_entries):
        return Fixed(FixedBy.SPURIOUS, regs.ip)
    # User mode gets its interrupts back before the signal; it never dies here with them off.
    return _bad_area(facts, regs, error, address, signal=SIGSEGV, code=SEGV_MAPERR, irqs_disabled=True)


def do_user_addr_fault(facts: FaultFacts, regs: PtRegs, error: int, address: int) -> FaultOutcome:
    """A fault in the user half, from either mode."""
    if error & (PfError.U | PfError.I) == PfError.I:
        return page_fault_oops(facts, regs, error, address, irqs_disabled=True)
    if error & PfError.RSVD:
        line = f"{facts.task.comm}: Corrupted page table at address {address:x}"
        lines = (line, *dump_pagetable(facts.entries, facts.levels))
        context = replace(facts.context, irqs_disabled=True, signal=SIGKILL)
        return FaultOops(lines, "Bad pagetable", error, address, context, shows_cr2=False)
    if facts.smap and not error & PfError.U and not regs.flags & X86_EFLAGS_AC:
        # A kernel access without STAC.
        if facts.rules.smap_asks_fixup:
            return _bad_area(facts, regs, error, address, signal=SIGSEGV, code=SEGV_MAPERR, irqs_disabled=True)
        return page_fault_oops(facts, regs, error, address, irqs_disabled=True)
    if facts.handle_mm_fault is None or facts.pagefault_disabled:
        return _bad_area(facts, regs, error, address, signal=SIGSEGV, code=SEGV_MAPERR, irqs_disabled=True)
    result = facts.handle_mm_fault(address, error)
    if result is VmFault.HANDLED:
        return Fixed(FixedBy.HANDLE_MM_FAULT, regs.ip)
    irqs_disabled = not regs.flags & X86_EFLAGS_IF
    signal, code = _VM_FAULT_SIGNALS[result]
    return _bad_area(facts, regs, error, address, signal=signal, code=code, irqs_disabled=irqs_disabled)


_VM_FAULT_SIGNALS = {
    VmFault.MAPERR: (SIGSEGV, SEGV_MAPERR),
    VmFault.ACCERR: (SIGSEGV, SEGV_ACCERR),
    VmFault.PKUERR: (SIGSEGV, SEGV_PKUERR),
    VmFault.SIGBUS: (SIGBUS, BUS_ADRERR),
}


def handle_page_fault(facts: FaultFacts, regs: PtRegs, error: int, address: int) -> FaultOutcome:
    """exc_page_fault: `error` is the error code pushed, `address` CR2, `regs` the interrupted context."""
    if address >= task_size_max(facts.levels):
        return do_kern_addr_fault(facts, regs, error, address)
    return do_user_addr_fault(facts, regs, error, address)


def report(src: OopsSource, state: OopsState, outcome: FaultOutcome, regs: PtRegs) -> OopsReport:
    """The lines an outcome prints, and what becomes of the task. A signal's task is left to the caller."""
    match outcome:
        case Fixed():
            return OopsReport(())
        case Die():
            return report_trap(src, state, outcome, regs)
        case FaultSignal(signal=signal, shows_code=shows_code):
            code = (opcodes_line(src, state, regs),) if shows_code else ()
            return OopsReport((*signal.lines, *code))
        case FaultOops():
            after = (f"CR2: {outcome.address:016x}",) if outcome.shows_cr2 else ()
            return die(
                src, state, outcome.description, regs, outcome.error, outcome.context, before=outcome.lines, after=after
            )
