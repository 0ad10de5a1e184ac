"""The IDT that Linux builds, and what its handlers decide."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from emu.descriptors import SystemType, decode_gate
from emu.kernel.oops import DieContext, Task
from emu.kernel.ptrace import (
    PT_REGS_IP,
    PT_REGS_SIZE,
    X86_EFLAGS_IF,
    PtRegs,
    pack_pt_regs,
    read_pt_regs,
    unpack_pt_regs,
)
from emu.kernel.traps import (
    BugEntry,
    Die,
    HandlePageFault,
    IdtEntry,
    Panic,
    Resume,
    Signal,
    Trap,
    TrapFacts,
    Warn,
    entry_stubs,
    gp_description,
    handle_trap,
    idt,
    idt_entries,
    pushes_error_code,
)
from emu.kernel.unwind import StackInfo, Stacks, StackType

KERNEL = PtRegs(cs=0x10, ss=0x18, flags=X86_EFLAGS_IF, ip=0xFFFFFFFFC0201000, sp=0xFFFFC900006ABF00)
USER = PtRegs(cs=0x33, ss=0x2B, flags=X86_EFLAGS_IF, ip=0x401000, sp=0x7FFFFFFFE000)
STACK = StackInfo(StackType.TASK, 0xFFFFC90000008000, 0xFFFFC9000000C000)
FACTS = TrapFacts("6.12", Task("guest", 42, 1), Stacks((STACK,)))
OLD = replace(FACTS, version="5.4")
UD2 = replace(FACTS, code=lambda la, size: b"\x0f\x0b"[:size])
RUNNING = DieContext()
MASKED = DieContext(irqs_disabled=True)
NMI_LIKE = DieContext(irqs_disabled=True, in_interrupt=True)
VERSIONS = ("6.12", "6.1", "5.4")


def by_vector(version: str) -> dict[int, IdtEntry]:
    return {entry.vector: entry for entry in idt_entries(version)}


# ---- the table ----


@pytest.mark.parametrize("version", VERSIONS)
def test_only_df_nmi_db_and_mce_switch_to_an_ist_stack(version: str) -> None:
    stacks = {entry.vector: entry.ist for entry in idt_entries(version) if entry.ist}
    assert stacks == {Trap.DF: 1, Trap.NMI: 2, Trap.DB: 3, Trap.MC: 4}


@pytest.mark.parametrize("version", VERSIONS)
def test_user_mode_may_raise_int3_into_and_int_80_only(version: str) -> None:
    assert {entry.vector for entry in idt_entries(version) if entry.dpl == 3} == {Trap.BP, Trap.OF, 0x80}


def test_exception_stubs_have_the_names_of_kallsyms() -> None:
    assert by_vector("6.12")[Trap.PF] == IdtEntry(14, "asm_exc_page_fault")
    assert by_vector("6.1")[Trap.DF].stub == "asm_exc_double_fault"
    assert by_vector("5.4")[Trap.DF].stub == "double_fault"
    assert by_vector("6.12")[Trap.CP].stub == "asm_exc_control_protection"
    assert by_vector("6.1")[Trap.CP] == IdtEntry(21, "early_idt_handler_array", 21 * 9)


def test_ipi_vectors_have_the_numbers_of_irq_vectors_h() -> None:
    vectors = by_vector("6.12")
    assert vectors[0xFD].stub == "asm_sysvec_reschedule_ipi"
    assert vectors[0xFC].stub == "asm_sysvec_call_function"
    assert vectors[0xFB].stub == "asm_sysvec_call_function_single"
    assert vectors[0xEC].stub == "asm_sysvec_apic_timer_interrupt"


def test_unassigned_vectors_lead_into_the_stub_arrays() -> None:
    vectors = by_vector("6.12")
    assert vectors[0x21] == IdtEntry(0x21, "irq_entries_start", 16)
    assert vectors[0xED] == IdtEntry(0xED, "spurious_entries_start", 32)
    assert by_vector("6.1")[0x21] == IdtEntry(0x21, "irq_entries_start", 8)
    assert by_vector("6.1")[0x20].stub == "asm_sysvec_irq_move_cleanup"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_idt_in_memory_is_256_present_interrupt_gates_on_kernel_cs(version: str) -> None:
    def symbol(name: str) -> int:
        return 0xFFFFFFFF81000000 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "little") * 64

    table = idt(version, symbol)
    assert len(table) == 4096
    gates = [decode_gate(table[at : at + 16]) for at in range(0, 4096, 16)]
    assert {(gate.p, gate.type, gate.selector) for gate in gates} == {(True, SystemType.INTERRUPT_GATE, 0x10)}
    for gate, entry in zip(gates, idt_entries(version), strict=True):
        assert (gate.offset, gate.ist, gate.dpl) == (symbol(entry.stub) + entry.offset, entry.ist, entry.dpl)


def test_every_stub_symbol_is_as_large_as_its_last_entry_needs() -> None:
    sizes = dict(entry_stubs("6.12"))
    assert sizes["asm_exc_page_fault"] == 64
    assert all(entry.offset + 8 <= sizes[entry.stub] for entry in idt_entries("6.12"))


def test_eight_vectors_push_an_error_code() -> None:
    assert {vector for vector in range(32) if pushes_error_code(vector)} == {8, 10, 11, 12, 13, 14, 17, 21}


# ---- the decisions, kernel mode ----


@pytest.mark.parametrize(
    ("vector", "error", "action"),
    [
        (Trap.DE, 0, Die("divide error", 0, RUNNING)),
        (Trap.OF, 0, Die("overflow", 0, RUNNING)),
        (Trap.BR, 0, Die("bounds", 0, RUNNING)),
        (Trap.UD, 0, Die("invalid opcode", 0, RUNNING)),
        (Trap.NM, 0, Die("unexpected #NM exception", 0, MASKED)),
        (Trap.OLD_MF, 0, Die("coprocessor segment overrun", 0, RUNNING)),
        (Trap.TS, 0x40, Die("invalid TSS", 0x40, RUNNING)),
        (Trap.NP, 0x40, Die("segment not present", 0x40, RUNNING)),
        (Trap.SS, 0, Die("stack segment", 0, RUNNING)),
        (Trap.GP, 0, Die("general protection fault", 0, RUNNING)),
        (Trap.GP, 0x38, Die("segment-related general protection fault", 0x38, RUNNING)),
        (Trap.PF, 2, HandlePageFault(0x1000, 2)),
        (Trap.MF, 0, Die("fpu exception", 0, RUNNING)),
        (Trap.AC, 0, Die("Split lock detected\n", 0, MASKED)),
        (Trap.MC, 0, Panic("Fatal machine check")),
        (Trap.XF, 0, Die("simd exception", 0, RUNNING)),
        (Trap.BP, 0, Die("int3", 0, NMI_LIKE)),
        (Trap.DB, 0, Resume(KERNEL.ip)),
        (Trap.SPURIOUS, 0, Resume(KERNEL.ip)),
        (Trap.DF, 0, Die("double fault", 0, NMI_LIKE, ("PANIC: double fault, error_code: 0x0",))),
    ],
)
def test_what_each_vector_means_in_kernel_mode(vector: int, error: int, action: object) -> None:
    assert handle_trap(FACTS, vector, KERNEL, error, 0x1000) == action


def test_a_handler_dies_with_the_interrupt_flag_of_the_interrupted_code() -> None:
    action = handle_trap(FACTS, Trap.DE, replace(KERNEL, flags=0x46))
    assert action == Die("divide error", 0, MASKED)


@pytest.mark.parametrize("vector", [Trap.DE, Trap.GP, Trap.NM, Trap.AC, Trap.XF])
def test_a_trap_in_an_interrupt_handler_ends_in_its_context(vector: int) -> None:
    action = handle_trap(replace(FACTS, context=DieContext(in_interrupt=True)), vector, KERNEL)
    assert isinstance(action, Die)
    assert action.context.in_interrupt


@pytest.mark.parametrize("vector", [Trap.DE, Trap.GP, Trap.SS, Trap.MF, Trap.UD])
def test_the_exception_table_is_asked_first(vector: int) -> None:
    fixing = replace(FACTS, fixup=lambda ip: ip + 7)
    assert handle_trap(fixing, vector, KERNEL) == Resume(KERNEL.ip + 7)
    assert isinstance(handle_trap(fixing, vector, USER), Signal)


def test_no_exception_table_entry_helps_against_bounds_or_int3() -> None:
    fixing = replace(FACTS, fixup=lambda ip: ip + 7)
    assert isinstance(handle_trap(fixing, Trap.BR, KERNEL), Die)
    assert isinstance(handle_trap(fixing, Trap.BP, KERNEL), Die)


def test_bug_dies_as_an_invalid_opcode_with_its_place() -> None:
    bug = BugEntry("mm/vmalloc.c", 99)
    assert handle_trap(replace(UD2, bug=lambda ip: bug), Trap.UD, KERNEL) == Die("invalid opcode", 0, RUNNING, bug=bug)


def test_warn_goes_on_behind_the_ud2() -> None:
    bug = BugEntry("mm/vmalloc.c", 99, warning=True)
    assert handle_trap(replace(UD2, bug=lambda ip: bug), Trap.UD, KERNEL) == Warn(bug, KERNEL.ip + 2)


def test_warn_once_is_silent_the_second_time() -> None:
    bug = BugEntry(warning=True, once=True)
    known = replace(UD2, bug=lambda ip: bug)
    assert isinstance(handle_trap(known, Trap.UD, KERNEL), Warn)
    assert handle_trap(replace(known, warned=lambda entry: True), Trap.UD, KERNEL) == Resume(KERNEL.ip + 2)


def test_an_opcode_that_is_no_ud2_is_no_bug() -> None:
    known = replace(FACTS, code=lambda la, size: b"\xf0\xff", bug=lambda ip: BugEntry())
    assert handle_trap(known, Trap.UD, KERNEL) == Die("invalid opcode", 0, RUNNING)


@pytest.mark.parametrize(
    ("access", "levels", "text"),
    [
        (None, 4, ""),
        ((0x800000001000, 8), 4, ", probably for non-canonical address 0x800000001000"),
        ((0xDEFFC90000000000, 1), 4, ", probably for non-canonical address 0xdeffc90000000000"),
        ((0x7FFFFFFFFFFC, 8), 4, ", probably for non-canonical address 0x7ffffffffffc"),
        ((0x7FFFFFFFFFF8, 8), 4, ", maybe for address 0x7ffffffffff8"),
        ((0xFFFFC90000000008, 16), 4, ", maybe for address 0xffffc90000000008"),
        ((0x800000001000, 8), 5, ", maybe for address 0x800000001000"),
        ((0x100000000001000, 8), 5, ", probably for non-canonical address 0x100000000001000"),
    ],
)
def test_a_kernel_gp_names_the_address_of_its_operand(access: tuple[int, int] | None, levels: int, text: str) -> None:
    assert gp_description("6.12", 0, access, levels) == "general protection fault" + text


def test_5_4_knows_no_gp_hints_and_no_split_locks() -> None:
    assert gp_description("5.4", 0x38, (0x800000001000, 8), 4) == "general protection fault"
    assert handle_trap(OLD, Trap.AC, KERNEL) == Die("alignment check", 0, RUNNING)


def test_a_double_fault_with_cr2_in_a_guard_page_is_a_stack_overflow() -> None:
    cr2 = STACK.begin - 8
    assert handle_trap(FACTS, Trap.DF, KERNEL, 0, cr2) == Die("stack guard page", 0, NMI_LIKE, overflow=STACK, address=cr2)
    only_task_dies = DieContext(irqs_disabled=True, preempt_count=1)
    old = Die("kernel stack overflow (double-fault)", 0, only_task_dies, overflow=STACK, address=cr2)
    assert handle_trap(OLD, Trap.DF, KERNEL, 0, cr2) == old


def test_any_other_double_fault_of_5_4_shows_registers_and_panics() -> None:
    lines = ("PANIC: double fault, error_code: 0x0",)
    assert handle_trap(OLD, Trap.DF, KERNEL, 0, 0x1000) == Panic("Machine halted.", lines, shows_regs=True)


def test_an_unknown_nmi_is_dazed_and_confused() -> None:
    first = "Uhhuh. NMI received for unknown reason 00 on CPU 1."
    last = "Dazed and confused, but trying to continue"
    assert handle_trap(FACTS, Trap.NMI, KERNEL) == Resume(KERNEL.ip, (first, last))
    power = "Do you have a strange power saving mode enabled?"
    assert handle_trap(OLD, Trap.NMI, KERNEL) == Resume(KERNEL.ip, (first, power, last))


def test_nm_with_cr0_ts_set_warns() -> None:
    action = handle_trap(replace(FACTS, cr0_ts=True), Trap.NM, KERNEL)
    assert action == Warn(BugEntry(warning=True, message="CR0.TS was set"), KERNEL.ip)


def test_other_vectors_are_refused_by_number() -> None:
    with pytest.raises(ValueError, match="vector 33 is no exception"):
        handle_trap(FACTS, 33, KERNEL)


# ---- the decisions, user mode ----


@pytest.mark.parametrize(
    ("vector", "error", "signal", "code", "address", "words"),
    [
        (Trap.DE, 0, 8, 1, USER.ip, "trap divide error"),
        (Trap.BP, 0, 5, 0, 0, "trap int3"),
        (Trap.OF, 0, 11, 0, 0, "trap overflow"),
        (Trap.UD, 0, 4, 2, USER.ip, "trap invalid opcode"),
        (Trap.NP, 0x18, 7, 0, 0, "trap segment not present"),
        (Trap.SS, 0, 7, 0, 0, "trap stack segment"),
        (Trap.GP, 0x38, 11, 0, 0, "general protection fault"),
        (Trap.AC, 0, 7, 1, 0, "trap alignment check"),
    ],
)
def test_a_user_trap_is_a_signal_and_a_log_line(
    vector: int, error: int, signal: int, code: int, address: int, words: str
) -> None:
    line = f"guest[42] {words} ip:401000 sp:7fffffffe000 error:{error:x} in a.out[401000+1000]"
    known = replace(FACTS, vma=lambda ip: " in a.out[401000+1000]")
    assert handle_trap(known, vector, USER, error) == Signal(signal, code, address, (line,))


def test_a_handled_signal_leaves_no_line() -> None:
    assert handle_trap(replace(FACTS, handles_signal=lambda signal: True), Trap.UD, USER) == Signal(4, 2, USER.ip)


# ---- the frame ----


def test_a_pt_regs_frame_ends_in_the_words_that_the_cpu_pushes() -> None:
    data = pack_pt_regs(replace(KERNEL, r15=1, ax=2))
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, PT_REGS_SIZE, 8)]
    assert words[PT_REGS_IP // 8 :] == [KERNEL.ip, 0x10, X86_EFLAGS_IF, KERNEL.sp, 0x18]
    assert (words[0], words[10], words[15]) == (1, 2, (1 << 64) - 1)
    assert unpack_pt_regs(data) == replace(KERNEL, r15=1, ax=2)
    with pytest.raises(ValueError, match="not 8"):
        unpack_pt_regs(bytes(8))


def test_a_frame_is_read_from_registers_by_their_sdm_names() -> None:
    asked: dict[str, int] = {}
    regs = read_pt_regs(lambda name: asked.setdefault(name, len(asked)), ip=1, cs=2, flags=3, sp=4, ss=5)
    general = {f"r{name}" for name in ("ax", "bx", "cx", "dx", "si", "di", "bp")}
    assert set(asked) == general | {f"r{n}" for n in range(8, 16)}
    assert (regs.ax, regs.r10, regs.ss) == (asked["rax"], asked["r10"], 5)
