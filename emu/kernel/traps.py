"""The IDT as Linux fills it, and what Linux's handler of each vector decides.

Sources: v6.12 and v6.1 arch/x86/kernel/idt.c, traps.c, nmi.c, arch/x86/include/asm/irq_vectors.h; v5.4 the same files.
A decision is data: `handle_trap` looks at an exception and at facts the caller knows, and returns what the kernel does.
Page faults go on to emu/kernel/fault.py. #VC and #VE exist only in encrypted guests and keep their boot-time gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from emu.descriptors import Gate, encode_gate
from emu.kernel.cpu_entry_area import Ist
from emu.kernel.descriptors import IDT_ENTRIES, KERNEL_CS
from emu.kernel.oops import (
    SIGSEGV,
    DieContext,
    OopsReport,
    OopsSource,
    OopsState,
    Task,
    bug_lines,
    die,
    panic,
    stack_guard_lines,
    warn,
)
from emu.kernel.ptrace import X86_EFLAGS_IF, PtRegs
from emu.kernel.unwind import StackInfo, Stacks

_MASK = (1 << 64) - 1
SIGILL, SIGTRAP, SIGBUS, SIGFPE = 4, 5, 7, 8
IA32_SYSCALL_VECTOR = 0x80
FIRST_EXTERNAL_VECTOR = 0x20


class Trap(IntEnum):
    """X86_TRAP_* (v6.12 arch/x86/include/asm/trapnr.h); the numbers are the vectors of SDM vol. 3A table 6-1."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    OLD_MF = 9
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    SPURIOUS = 15
    MF = 16
    AC = 17
    MC = 18
    XF = 19
    VE = 20
    CP = 21
    VC = 29


@dataclass(frozen=True, slots=True)
class IdtEntry:
    """One gate: vector, the symbol of its entry stub and the offset in it, the gate's IST field (0: none) and DPL."""

    vector: int
    stub: str
    offset: int = 0
    ist: int = 0
    dpl: int = 0


_IST = {Trap.DF: Ist.DF + 1, Trap.NMI: Ist.NMI + 1, Trap.DB: Ist.DB + 1, Trap.MC: Ist.MCE + 1}
_DPL3 = (Trap.BP, Trap.OF)

_EXCEPTION_STUBS = {
    Trap.DE: ("asm_exc_divide_error", "divide_error"),
    Trap.DB: ("asm_exc_debug", "debug"),
    Trap.NMI: ("asm_exc_nmi", "nmi"),
    Trap.BP: ("asm_exc_int3", "int3"),
    Trap.OF: ("asm_exc_overflow", "overflow"),
    Trap.BR: ("asm_exc_bounds", "bounds"),
    Trap.UD: ("asm_exc_invalid_op", "invalid_op"),
    Trap.NM: ("asm_exc_device_not_available", "device_not_available"),
    Trap.DF: ("asm_exc_double_fault", "double_fault"),
    Trap.OLD_MF: ("asm_exc_coproc_segment_overrun", "coprocessor_segment_overrun"),
    Trap.TS: ("asm_exc_invalid_tss", "invalid_TSS"),
    Trap.NP: ("asm_exc_segment_not_present", "segment_not_present"),
    Trap.SS: ("asm_exc_stack_segment", "stack_segment"),
    Trap.GP: ("asm_exc_general_protection", "general_protection"),
    Trap.PF: ("asm_exc_page_fault", "page_fault"),
    Trap.SPURIOUS: ("asm_exc_spurious_interrupt_bug", "spurious_interrupt_bug"),
    Trap.MF: ("asm_exc_coprocessor_error", "coprocessor_error"),
    Trap.AC: ("asm_exc_alignment_check", "alignment_check"),
    Trap.MC: ("asm_exc_machine_check", "machine_check"),
    Trap.XF: ("asm_exc_simd_coprocessor_error", "simd_coprocessor_error"),
}

_SYSTEM_STUBS = {
    0xFF: ("asm_sysvec_spurious_apic_interrupt", "spurious_interrupt"),
    0xFE: ("asm_sysvec_error_interrupt", "error_interrupt"),
    0xFD: ("asm_sysvec_reschedule_ipi", "reschedule_interrupt"),
    0xFC: ("asm_sysvec_call_function", "call_function_interrupt"),
    0xFB: ("asm_sysvec_call_function_single", "call_function_single_interrupt"),
    0xFA: ("asm_sysvec_thermal", "thermal_interrupt"),
    0xF9: ("asm_sysvec_threshold", "threshold_interrupt"),
    0xF8: ("asm_sysvec_reboot", "reboot_interrupt"),
    0xF7: ("asm_sysvec_x86_platform_ipi", "x86_platform_ipi"),
    0xF6: ("asm_sysvec_irq_work", "irq_work_interrupt"),
    0xF4: ("asm_sysvec_deferred_error", "deferred_error_interrupt"),
    0xF2: ("asm_sysvec_kvm_posted_intr_ipi", "kvm_posted_intr_ipi"),
    0xF1: ("asm_sysvec_kvm_posted_intr_wakeup_ipi", "kvm_posted_intr_wakeup_ipi"),
    0xF0: ("asm_sysvec_kvm_posted_intr_nested_ipi", "kvm_posted_intr_nested_ipi"),
    0xEC: ("asm_sysvec_apic_timer_interrupt", "apic_timer_interrupt"),
    IA32_SYSCALL_VECTOR: ("asm_int80_emulation", "entry_INT80_compat"),
}
_IRQ_MOVE_CLEANUP_VECTOR = 0x20

RESCHEDULE_VECTOR = 0xFD
CALL_FUNCTION_VECTOR = 0xFC
CALL_FUNCTION_SINGLE_VECTOR = 0xFB
LOCAL_TIMER_VECTOR = 0xEC


@dataclass(frozen=True, slots=True)
class _IdtShape:
    column: int
    idt_align: int
    early_handler_size: int
    first_system_vector: int
    extra: tuple[tuple[int, str], ...]


# 6.12 is built with IBT: each stub starts with a 4-byte ENDBR64, so the stub arrays have twice the step.
_SHAPES = {
    "6.12": _IdtShape(0, 16, 13, 0xEB, ((Trap.CP, "asm_exc_control_protection"),)),
    "6.1": _IdtShape(0, 8, 9, 0xEC, ((_IRQ_MOVE_CLEANUP_VECTOR, "asm_sysvec_irq_move_cleanup"),)),
    "5.4": _IdtShape(1, 8, 9, 0xEC, ((_IRQ_MOVE_CLEANUP_VECTOR, "irq_move_cleanup_interrupt"),)),
}


def idt_entries(version: str) -> tuple[IdtEntry, ...]:
    """All 256 gates in vector order. Every one is an interrupt gate on __KERNEL_CS, so delivery clears IF."""
    shape = _SHAPES[version]
    stubs: dict[int, str] = {vector: names[shape.column] for vector, names in _EXCEPTION_STUBS.items()}
    stubs |= {vector: names[shape.column] for vector, names in _SYSTEM_STUBS.items()}
    stubs |= dict(shape.extra)
    entries: list[IdtEntry] = []
    for vector in range(IDT_ENTRIES):
        if vector in stubs:
            dpl = 3 if vector in _DPL3 or vector == IA32_SYSCALL_VECTOR else 0
            entries.append(IdtEntry(vector, stubs[vector], 0, _IST.get(Trap(vector), 0) if vector in _IST else 0, dpl))
        elif vector < FIRST_EXTERNAL_VECTOR:
            entries.append(IdtEntry(vector, "early_idt_handler_array", vector * shape.early_handler_size))
        elif vector < shape.first_system_vector:
            offset = (vector - FIRST_EXTERNAL_VECTOR) * shape.idt_align
            entries.append(IdtEntry(vector, "irq_entries_start", offset))
        else:
            offset = (vector - shape.first_system_vector) * shape.idt_align
            entries.append(IdtEntry(vector, "spurious_entries_start", offset))
    return tuple(entries)


def entry_stubs(version: str) -> tuple[tuple[str, int], ...]:
    """Name and size in bytes of every symbol the IDT points into, sorted by name; stubs of their own take 64 bytes."""
    sizes: dict[str, int] = {}
    for entry in idt_entries(version):
        sizes[entry.stub] = max(sizes.get(entry.stub, 64), entry.offset + 16)
    return tuple(sorted(sizes.items()))


def idt(version: str, symbol: Callable[[str], int]) -> bytes:
    """The 4096 bytes of the IDT; `symbol` gives the address of an entry stub."""
    gates = (Gate(symbol(e.stub) + e.offset, KERNEL_CS, e.ist, dpl=e.dpl) for e in idt_entries(version))
    return b"".join(encode_gate(gate) for gate in gates)


@dataclass(frozen=True, slots=True)
class TrapRules:
    """What the handlers of one version do differently."""

    gp_hint: bool = True
    """#GP says what it is about: v5.6 on."""
    split_lock: bool = True
    """A kernel #AC is a split lock: v5.7 on."""
    nmi_context: bool = True
    """#DF, int3 and the like count as interrupts; before v5.8 they only disabled preemption, so the task alone dies."""
    overflow_names_fault: bool = False
    """The header of a stack overflow says which fault found it: before v5.16."""
    df_debug: bool = False
    """A #DF that is no stack overflow shows its registers and panics, without an oops: before v5.8."""
    power_saving_line: bool = False
    """An unknown NMI asks for a strange power saving mode: until v6.0."""


TRAP_RULES = {
    "6.12": TrapRules(),
    "6.1": TrapRules(),
    "5.4": TrapRules(
        gp_hint=False,
        split_lock=False,
        nmi_context=False,
        overflow_names_fault=True,
        df_debug=True,
        power_saving_line=True,
    ),
}


@dataclass(frozen=True, slots=True)
class BugEntry:
    """A row of __bug_table: where a UD2 stands for BUG() or WARN().

    `cut_here` is false for a WARN() with a text of its own: __warn_printk has printed the marker and the text already.
    """

    file: str = ""
    line: int = 0
    warning: bool = False
    once: bool = False
    message: str | None = None
    cut_here: bool = True


@dataclass(frozen=True, slots=True)
class Resume:
    """Nothing dies: execution goes on at `ip`. `lines` go to the log first."""

    ip: int
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Warn:
    """A WARN splat, then execution goes on behind the UD2."""

    bug: BugEntry
    ip: int


@dataclass(frozen=True, slots=True)
class Die:
    """die(): see `report`. At most one of `bug` and `overflow` is set."""

    description: str
    error: int
    context: DieContext
    lines: tuple[str, ...] = ()
    bug: BugEntry | None = None
    overflow: StackInfo | None = None
    address: int = 0


@dataclass(frozen=True, slots=True)
class Panic:
    """The machine stops at once; `lines`, and with `shows_regs` the registers, come before the panic's own."""

    message: str
    lines: tuple[str, ...] = ()
    shows_regs: bool = False


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal for the user task: number, si_code (0: SI_KERNEL), si_addr, and the log line if one is due."""

    signal: int
    code: int = 0
    address: int = 0
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HandlePageFault:
    """#PF: emu/kernel/fault.py decides."""

    address: int
    error: int


Action = Resume | Warn | Die | Panic | Signal | HandlePageFault


@dataclass(frozen=True, slots=True)
class TrapFacts:
    """What a handler looks up.

    `fixup(ip)`: landing address of the exception table. `bug(ip)`: row of __bug_table. `warned(entry)`: whether a
    WARN_ONCE has been printed. `code(la, size)`: bytes of kernel text or None. `gp_access(regs)`: address and size of the
    memory operand of the faulting instruction, None when it has none. `vma(ip)`: " in name[start+size]" or "".
    """

    version: str
    task: Task
    stacks: Stacks
    fixup: Callable[[int], int | None] = lambda ip: None
    bug: Callable[[int], BugEntry | None] = lambda ip: None
    warned: Callable[[BugEntry], bool] = lambda entry: False
    code: Callable[[int, int], bytes | None] = lambda la, size: None
    gp_access: Callable[[PtRegs], tuple[int, int] | None] = lambda regs: None
    vma: Callable[[int], str] = lambda ip: ""
    levels: int = 4
    handles_signal: Callable[[int], bool] = lambda signal: False
    cr0_ts: bool = False
    context: DieContext = field(default_factory=DieContext)
    """in_interrupt and preempt_count of the interrupted code."""

    @property
    def rules(self) -> TrapRules:
        """The rules of the version."""
        return TRAP_RULES[self.version]


# Description, signal, si_code, whether si_addr is the instruction: the vectors that do_error_trap handles.
_ERROR_TRAPS: dict[int, tuple[str, int, int, bool]] = {
    Trap.DE: ("divide error", SIGFPE, 1, True),
    Trap.OF: ("overflow", SIGSEGV, 0, False),
    Trap.BR: ("bounds", SIGSEGV, 0, False),
    Trap.UD: ("invalid opcode", SIGILL, 2, True),
    Trap.OLD_MF: ("coprocessor segment overrun", SIGFPE, 0, False),
    Trap.TS: ("invalid TSS", SIGSEGV, 0, False),
    Trap.NP: ("segment not present", SIGBUS, 0, False),
    Trap.SS: ("stack segment", SIGBUS, 0, False),
    Trap.AC: ("alignment check", SIGBUS, 1, False),
}
_PUSHES_ERROR = (Trap.DF, Trap.TS, Trap.NP, Trap.SS, Trap.GP, Trap.PF, Trap.AC, Trap.CP)
_GPF = "general protection fault"


def pushes_error_code(vector: int) -> bool:
    """Whether delivery of an exception pushes an error code (SDM vol. 3A table 6-1)."""
    return vector in _PUSHES_ERROR


def _process(facts: TrapFacts, regs: PtRegs) -> DieContext:
    """Handlers that run cond_local_irq_enable before they die."""
    return replace(facts.context, irqs_disabled=not regs.flags & X86_EFLAGS_IF)


def _nmi_like(facts: TrapFacts) -> DieContext:
    """Handlers under irqentry_nmi_enter (v5.4: ist_enter)."""
    if facts.rules.nmi_context:
        return replace(facts.context, irqs_disabled=True, in_interrupt=True)
    return replace(facts.context, irqs_disabled=True, preempt_count=facts.context.preempt_count + 1)


def show_signal(facts: TrapFacts, regs: PtRegs, signal: int, kind: str, description: str, error: int) -> tuple[str, ...]:
    """The log line of an unhandled trap in user mode (traps.c: show_signal); none when the task handles the signal."""
    if facts.handles_signal(signal):
        return ()
    task = facts.task
    line = f"{task.comm}[{task.pid}] {kind}{description} ip:{regs.ip:x} sp:{regs.sp:x} error:{error:x}"
    return (line + facts.vma(regs.ip),)


def gp_description(version: str, error: int, access: tuple[int, int] | None, levels: int) -> str:
    """The text of a kernel #GP: with an error code it is about a selector, otherwise about the operand's address.

    `access`: address and size of the memory operand. v5.4 says neither.
    """
    if not TRAP_RULES[version].gp_hint:
        return _GPF
    if error:
        return f"segment-related {_GPF}"
    if access is None or access[0] == _MASK:
        return _GPF
    address, size = access
    virtual_mask = (1 << (9 * levels + 11)) - 1
    non_canonical = address < (~virtual_mask & _MASK) and (address + size - 1) & _MASK > virtual_mask
    hint = "probably for non-canonical address" if non_canonical else "maybe for address"
    return f"{_GPF}, {hint} 0x{address:x}"


def _invalid_op(facts: TrapFacts, regs: PtRegs) -> Action:
    entry = facts.bug(regs.ip) if facts.code(regs.ip, 2) == b"\x0f\x0b" else None
    if entry is None:
        return _error_trap(facts, Trap.UD, regs, 0)
    if entry.warning:
        behind = regs.ip + 2
        return Resume(behind) if entry.once and facts.warned(entry) else Warn(entry, behind)
    return Die("invalid opcode", 0, _process(facts, regs), bug=entry)


def _error_trap(facts: TrapFacts, vector: int, regs: PtRegs, error: int) -> Action:
    description, signal, code, at_ip = _ERROR_TRAPS[vector]
    if regs.user_mode:
        lines = show_signal(facts, regs, signal, "trap ", description, error)
        return Signal(signal, code, regs.ip if at_ip else 0, lines)
    fixed = facts.fixup(regs.ip)
    if fixed is not None and vector != Trap.BR:
        return Resume(fixed)
    return Die(description, error, _process(facts, regs))


def _general_protection(facts: TrapFacts, regs: PtRegs, error: int) -> Action:
    if regs.user_mode:
        return Signal(SIGSEGV, lines=show_signal(facts, regs, SIGSEGV, "", _GPF, error))
    fixed = facts.fixup(regs.ip)
    if fixed is not None:
        return Resume(fixed)
    access = None if error else facts.gp_access(regs)
    return Die(gp_description(facts.version, error, access, facts.levels), error, _process(facts, regs))


def stack_overflow(version: str, info: StackInfo, address: int, context: DieContext, *, double_fault: bool) -> Die:
    """What handle_stack_overflow does; v5.4 says in the header which of the two faults found the overflow."""
    description = "stack guard page"
    if TRAP_RULES[version].overflow_names_fault:
        description = f"kernel stack overflow ({'double-fault' if double_fault else 'page fault'})"
    return Die(description, 0, context, overflow=info, address=address)


def _double_fault(facts: TrapFacts, regs: PtRegs, error: int, cr2: int) -> Action:
    info = facts.stacks.get_stack_guard_info(cr2)
    if info is not None:
        return stack_overflow(facts.version, info, cr2, _nmi_like(facts), double_fault=True)
    lines = (f"PANIC: double fault, error_code: 0x{error:x}",)
    if facts.rules.df_debug:
        return Panic("Machine halted.", lines, shows_regs=True)
    return Die("double fault", error, _nmi_like(facts), lines)


def _nmi(facts: TrapFacts, regs: PtRegs) -> Action:
    lines = [f"Uhhuh. NMI received for unknown reason 00 on CPU {facts.task.cpu}."]
    if facts.rules.power_saving_line:
        lines.append("Do you have a strange power saving mode enabled?")
    return Resume(regs.ip, (*lines, "Dazed and confused, but trying to continue"))


def _math_error(facts: TrapFacts, regs: PtRegs, description: str) -> Action:
    if regs.user_mode:
        return Signal(SIGFPE, 0, regs.ip)
    fixed = facts.fixup(regs.ip)
    return Resume(fixed) if fixed is not None else Die(description, 0, _process(facts, regs))


HANDLED = frozenset(_ERROR_TRAPS) | {
    Trap.PF, Trap.GP, Trap.DF, Trap.NMI, Trap.BP, Trap.DB, Trap.NM, Trap.MF, Trap.XF, Trap.SPURIOUS, Trap.MC,
}
"""The vectors that handle_trap decides about."""


def handle_trap(facts: TrapFacts, vector: int, regs: PtRegs, error: int = 0, cr2: int = 0) -> Action:
    """What Linux does about exception `vector`. Raises ValueError for a vector that is no exception it handles."""
    if vector == Trap.PF:
        return HandlePageFault(cr2, error)
    if vector == Trap.UD and not regs.user_mode:
        return _invalid_op(facts, regs)
    if vector == Trap.AC and not regs.user_mode and facts.rules.split_lock:
        # The line end is the kernel's; it dies before interrupts are enabled.
        return Die("Split lock detected\n", error, replace(facts.context, irqs_disabled=True))
    if vector in _ERROR_TRAPS:
        return _error_trap(facts, vector, regs, error)
    match vector:
        case Trap.GP:
            return _general_protection(facts, regs, error)
        case Trap.DF:
            return _double_fault(facts, regs, error, cr2)
        case Trap.NMI:
            return _nmi(facts, regs)
        case Trap.BP if regs.user_mode:
            return Signal(SIGTRAP, lines=show_signal(facts, regs, SIGTRAP, "trap ", "int3", 0))
        case Trap.BP:
            return Die("int3", 0, _nmi_like(facts))
        case Trap.DB:
            return Signal(SIGTRAP, 1, regs.ip) if regs.user_mode else Resume(regs.ip)
        case Trap.NM:
            return _device_not_available(facts, regs)
        case Trap.MF:
            return _math_error(facts, regs, "fpu exception")
        case Trap.XF:
            return _math_error(facts, regs, "simd exception")
        case Trap.SPURIOUS:
            return Resume(regs.ip)
        case Trap.MC:
            return Panic("Fatal machine check")
    raise ValueError(f"vector {vector} is no exception that the kernel handles")


def _device_not_available(facts: TrapFacts, regs: PtRegs) -> Action:
    if facts.cr0_ts:
        # The kernel warns, clears CR0.TS and carries on.
        return Warn(BugEntry(warning=True, message="CR0.TS was set"), regs.ip)
    return Die("unexpected #NM exception", 0, replace(facts.context, irqs_disabled=True))


def report(src: OopsSource, state: OopsState, action: Action, regs: PtRegs) -> OopsReport:
    """The lines an action prints, and what becomes of the task. A signal's task is left to the caller."""
    match action:
        case Resume(lines=lines) | Signal(lines=lines):
            return OopsReport(lines)
        case Warn(bug=bug):
            return warn(src, state, regs, file=bug.file, line=bug.line, message=bug.message, cut_here=bug.cut_here)
        case Panic(message=message, lines=lines, shows_regs=shows_regs):
            return panic(src, state, message, before=lines, regs=regs if shows_regs else None)
        case HandlePageFault():
            raise ValueError("a page fault is reported by emu.kernel.fault")
        case Die():
            before = action.lines
            if action.bug is not None:
                before = bug_lines(src, regs, action.bug.file, action.bug.line)
            elif action.overflow is not None:
                before = stack_guard_lines(src, action.address, action.overflow)
            return die(src, state, action.description, regs, action.error, action.context, before=before)
