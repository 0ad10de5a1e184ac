"""What the kernel does about page faults, and the oopses that real kernels printed for them, from fault to last line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from recorded_oops import Recorded, messages, prepare_oops, reports

from emu.descriptors import TableRegister
from emu.kernel import traps
from emu.kernel.descriptors import gdt
from emu.kernel.fault import (
    Entries,
    FaultFacts,
    FaultOops,
    FaultSignal,
    Fixed,
    FixedBy,
    SystemTables,
    VmallocFault,
    VmFault,
    do_kern_addr_fault,
    dump_pagetable,
    handle_page_fault,
    report,
    show_fault_oops,
    spurious_kernel_fault,
    vmalloc_fault,
)
from emu.kernel.oops import DieContext, OopsReport, OopsState, Task
from emu.kernel.ptrace import X86_EFLAGS_AC, X86_EFLAGS_IF, PtRegs
from emu.kernel.taint import Taint
from emu.kernel.unwind import StackInfo, Stacks, StackType
from emu.mmu.entry import Level
from emu.mmu.fault import PfError

TASK = Task("guest", 42)
STACK = StackInfo(StackType.TASK, 0xFFFFC900006A8000, 0xFFFFC900006AC000)
VMALLOC = range(0xFFFFC90000000000, 0xFFFFE90000000000)
KERNEL = PtRegs(cs=0x10, ss=0x18, flags=X86_EFLAGS_IF, ip=0xFFFFFFFFC0201000, sp=0xFFFFC900006ABF00)
USER = PtRegs(cs=0x33, ss=0x2B, flags=X86_EFLAGS_IF, ip=0x401000, sp=0x7FFFFFFFE000)
P, W, U, RSVD, FETCH = PfError.P, PfError.W, PfError.U, PfError.RSVD, PfError.I
NX = 1 << 63


def walk(*values: int, levels: int = 4) -> Entries:
    return [(Level(levels - depth), 0x1000 * depth, value) for depth, value in enumerate(values)]


def facts(version: str = "6.12", *, entries: Entries = (), init: Entries = (), **more: object) -> FaultFacts:
    return FaultFacts(
        version=version,
        levels=4,
        task=TASK,
        stacks=Stacks((STACK,)),
        entries=entries,
        init_entries=init,
        is_vmalloc_addr=lambda la: la in VMALLOC,
        **more,  # type: ignore[arg-type]
    )


MAPPED = walk(0x4000067, 0x41D8067, 0x41D9067, 0x80000000055E2163)
GUARD = walk(0x4000067, 0x41D8067, 0x41D9067, 0)


# ---- what was recorded ----


def recorded_entries(recorded: Recorded) -> Entries:
    line = next((line for line in recorded.lines if line.startswith("PGD ")), "")
    values = [int(value, 16) for name, value in re.findall(r"(P..) ([0-9a-f]+)", line) if name != "P4D"]
    return walk(*values)


def replay_page_fault(version: str, recorded: Recorded, state: OopsState, address: int) -> OopsReport:
    src, regs = prepare_oops(version, recorded, state)
    error_line = next((line for line in recorded.lines if line.startswith("#PF: error_code")), "(0x0000)")
    error = int(error_line.split("(0x")[1][:4], 16)
    guard = re.search(r"stack is ([0-9a-f]+)\.\.([0-9a-f]+)", recorded.lines[0])
    stacks = Stacks((StackInfo(StackType.TASK, int(guard[1], 16), int(guard[2], 16)),)) if guard else Stacks(())
    known = replace(facts(version, entries=recorded_entries(recorded)), stacks=stacks, task=recorded.task())
    return report(src, state, handle_page_fault(known, regs, error, address), regs)


def replay_trap(version: str, recorded: Recorded, state: OopsState) -> OopsReport:
    """Oopses of other vectors: general protection, BUG(), and the double fault of a stack overflow."""
    src, regs = prepare_oops(version, recorded, state)
    known = traps.TrapFacts(version, recorded.task(), Stacks(()))
    gp = re.search(r"general protection fault, .* address 0x([0-9a-f]+): ", recorded.lines[0])
    bug = re.match(r"kernel BUG at (.*):(\d+)!", recorded.lines[1])
    overflow = re.match(r"BUG: TASK stack guard page was hit at (\w+) \(stack is (\w+)\.\.(\w+)\)", recorded.lines[0])
    if gp:
        known = replace(known, gp_access=lambda regs: (int(gp[1], 16), 1))
        action = traps.handle_trap(known, traps.Trap.GP, regs)
    elif bug:
        entry = traps.BugEntry(bug[1], int(bug[2]))
        known = replace(known, bug=lambda ip: entry, code=lambda la, size: b"\x0f\x0b")
        action = traps.handle_trap(known, traps.Trap.UD, regs)
    else:
        assert overflow
        address, begin, end = (int(value, 16) for value in overflow.groups())
        known = replace(known, stacks=Stacks((StackInfo(StackType.TASK, begin, end),)))
        action = traps.handle_trap(known, traps.Trap.DF, regs, 0, address)
    return traps.report(src, state, action, regs)


@pytest.mark.parametrize("version", ["6.12", "6.1"])
@pytest.mark.parametrize(("log", "nr_oopses"), [("faults", 21), ("stale", 3)])
def test_every_recorded_oops_follows_from_its_exception(version: str, log: str, nr_oopses: int) -> None:
    state, replayed = OopsState(), 0
    for recorded in reports(messages(version, log)):
        if not any(" [#" in line for line in recorded.lines):
            continue
        state.tainted |= recorded.tainted()
        address = re.search(r"BUG: .* (?:address:|hit at) ([0-9a-f]{16})", "\n".join(recorded.lines[:2]))
        by_double_fault = recorded.lines[-1].startswith("Kernel Offset")
        if address and not by_double_fault:
            lines = replay_page_fault(version, recorded, state, int(address[1], 16)).lines
        else:
            lines = replay_trap(version, recorded, state).lines
        assert list(lines) == recorded.lines
        replayed += 1
    assert replayed == nr_oopses


# ---- the lines ----


def test_a_read_of_a_guard_page_says_so() -> None:
    assert show_fault_oops(facts(entries=GUARD), KERNEL, 0, 0xFFFFC9000007E000) == (
        "BUG: unable to handle page fault for address: ffffc9000007e000",
        "#PF: supervisor read access in kernel mode",
        "#PF: error_code(0x0000) - not-present page",
        "PGD 4000067 P4D 4000067 PUD 41d8067 PMD 41d9067 PTE 0",
    )


def test_a_fetch_from_data_names_nx_first() -> None:
    lines = show_fault_oops(facts(entries=MAPPED), KERNEL, P | FETCH, 0xFFFFC900000A5000)
    assert lines[0] == "kernel tried to execute NX-protected page - exploit attempt? (uid: 0)"
    assert lines[2:4] == ("#PF: supervisor instruction fetch in kernel mode", "#PF: error_code(0x0011) - permissions violation")


def test_a_fetch_from_user_text_names_smep_only_while_it_is_on() -> None:
    user_text = walk(0x67, 0x67, 0x67, 0x1025)
    line = "unable to execute userspace code (SMEP?) (uid: 0)"
    assert show_fault_oops(facts(entries=user_text), KERNEL, P | FETCH, 0x401000)[0] == line
    assert line not in show_fault_oops(facts(entries=user_text, smep=False), KERNEL, P | FETCH, 0x401000)


def test_an_upper_nx_bit_counts_for_6_12_only() -> None:
    entries = walk(0x67, NX | 0x67, 0x67, 0x1025)
    assert "NX-protected" in show_fault_oops(facts("6.12", entries=entries), KERNEL, P | FETCH, 0x401000)[0]
    assert "SMEP" in show_fault_oops(facts("6.1", entries=entries), KERNEL, P | FETCH, 0x401000)[0]


def test_an_unmapped_fetch_has_no_nx_line() -> None:
    assert show_fault_oops(facts(entries=GUARD), KERNEL, FETCH, 0xFFFFC9000007E000)[0].startswith("BUG: unable")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(P | W, "permissions violation"), (P | RSVD, "reserved bit violation"), (P | PfError.PK, "protection keys violation")],
)
def test_the_error_code_line_gives_the_first_reason_that_applies(error: int, reason: str) -> None:
    assert f"#PF: error_code(0x{error:04x}) - {reason}" in show_fault_oops(facts(), KERNEL, error, 0xFFFFC90000000000)


def test_only_the_first_page_is_a_null_pointer() -> None:
    assert show_fault_oops(facts(), KERNEL, 0, 0xFFF)[0] == "BUG: kernel NULL pointer dereference, address: 0000000000000fff"
    assert show_fault_oops(facts(), KERNEL, 0, 0x1000)[0].startswith("BUG: unable to handle page fault for address: ")


@pytest.mark.parametrize(
    ("entries", "levels", "lines"),
    [
        (walk(0), 4, ("PGD 0 P4D 0 ",)),
        (walk(0x4008067, 0), 4, ("PGD 4008067 P4D 4008067 PUD 0 ",)),
        (walk(0x67, 0x80000000056001E3), 4, ("PGD 67 P4D 67 PUD 80000000056001e3 ",)),
        (walk(0x67, 0x1067, 0x56001E3), 4, ("PGD 67 P4D 67 PUD 1067 PMD 56001e3 ",)),
        (walk(0, levels=5), 5, ("PGD 0 ",)),
        (walk(0x67, 0x1067, 0x2067, 0x3067, 0x4163, levels=5), 5, ("PGD 67 P4D 1067 PUD 2067 PMD 3067 PTE 4163",)),
        (walk(0x67, 0xFFFFF00067), 4, ("PGD 67 P4D 67 PUD fffff00067 ", "BAD")),
    ],
)
def test_the_page_table_line_ends_where_the_walk_ends(entries: Entries, levels: int, lines: tuple[str, ...]) -> None:
    assert dump_pagetable(entries, levels) == lines


def test_a_supervisor_fault_in_user_mode_shows_the_descriptor_tables() -> None:
    table = gdt(0, 0, 0xFFFFFE0000003000, 0x4087)

    def read(la: int, size: int) -> bytes | None:
        return table[la - 0xFFFFFE0000001000 :][:size]

    idtr, gdtr = TableRegister(0xFFFFFE0000000000, 0xFFF), TableRegister(0xFFFFFE0000001000, 0x7F)
    tables = SystemTables(idtr, gdtr, 0, 0x40, read)
    assert show_fault_oops(facts(tables=tables), USER, 0, 0xFFFFFE0000003000)[3:6] == (
        "IDT: 0xfffffe0000000000 (limit=0xfff) GDT: 0xfffffe0000001000 (limit=0x7f)",
        "LDTR: NULL",
        "TR: 0x40 -- base=0xfffffe0000003000 limit=0x4087",
    )
    for selector, text in ((0x78, "out of bounds"), (0x40, "GDT entry is not readable")):
        broken = replace(tables, tr=selector, read=lambda la, size: None)
        assert show_fault_oops(facts(tables=broken), USER, 0, 0)[5] == f"TR: 0x{selector:x} -- {text}"


# ---- the decisions ----


@pytest.mark.parametrize(
    ("error", "leaf", "expected"),
    [
        (P | W, 0x163, True),
        (P | W, 0x161, False),
        (P | FETCH, 0x161, True),
        (P | FETCH, NX | 0x161, False),
        (W, 0x163, False),
        (P, 0x163, False),
        (P | W | U, 0x163, False),
        (P | W | RSVD, 0x163, False),
        (P | W, 0, False),
    ],
)
def test_a_fault_is_spurious_only_if_the_tables_allow_what_was_refused(error: int, leaf: int, expected: bool) -> None:
    assert spurious_kernel_fault(error, walk(0x67, 0x67, 0x67, leaf)) is expected


def test_a_4k_page_needs_the_permission_in_its_pmd_too_but_not_above() -> None:
    assert not spurious_kernel_fault(P | W, walk(0x67, 0x67, 0x65, 0x163))
    assert spurious_kernel_fault(P | W, walk(0x65, 0x65, 0x67, 0x163))
    assert spurious_kernel_fault(P | W, walk(0x67, 0x67, 0x1E3))


def test_a_spurious_fault_restarts_the_instruction() -> None:
    outcome = handle_page_fault(facts(init=walk(0x67, 0x67, 0x67, 0x163)), KERNEL, P | W, 0xFFFFC90000000000)
    assert outcome == Fixed(FixedBy.SPURIOUS, KERNEL.ip)


def test_the_exception_table_fixes_a_kernel_fault() -> None:
    outcome = handle_page_fault(facts(fixup=lambda ip: ip + 0x100), KERNEL, 0, 0xFFFFC90000000000)
    assert outcome == Fixed(FixedBy.EXCEPTION_TABLE, KERNEL.ip + 0x100)


def test_smap_dies_without_asking_the_exception_table_except_in_5_4() -> None:
    def landing(ip: int) -> int:
        return 0x1234

    assert isinstance(handle_page_fault(facts("6.12", fixup=landing), KERNEL, P | W, 0x1000), FaultOops)
    assert handle_page_fault(facts("5.4", fixup=landing), KERNEL, P | W, 0x1000) == Fixed(FixedBy.EXCEPTION_TABLE, 0x1234)
    stac = replace(KERNEL, flags=KERNEL.flags | X86_EFLAGS_AC)
    outcome = handle_page_fault(facts(handle_mm_fault=lambda address, error: VmFault.HANDLED), stac, W, 0x1000)
    assert outcome == Fixed(FixedBy.HANDLE_MM_FAULT, KERNEL.ip)


def test_kernel_execution_of_a_user_page_is_beyond_repair() -> None:
    outcome = handle_page_fault(facts(smap=False, fixup=lambda ip: 1), KERNEL, P | FETCH, 0x401000)
    assert isinstance(outcome, FaultOops)


def test_a_reserved_bit_in_the_user_half_is_a_corrupted_page_table() -> None:
    outcome = handle_page_fault(facts(entries=walk(0x67, 0xFFFFF00000067)), USER, P | U | RSVD, 0x1000)
    assert isinstance(outcome, FaultOops)
    assert outcome.lines[0] == "guest: Corrupted page table at address 1000"
    assert (outcome.description, outcome.shows_cr2) == ("Bad pagetable", False)


@pytest.mark.parametrize(
    ("version", "address", "hit"),
    [
        ("6.12", STACK.begin - 8, True),
        ("6.12", STACK.begin - 0x1000, True),
        ("6.12", STACK.begin - 0x1001, False),
        ("6.12", STACK.end, False),
        ("5.4", STACK.begin - 0x1000, True),
        ("5.4", STACK.end, True),
        ("5.4", STACK.end + 0x1000, False),
    ],
)
def test_the_page_below_a_stack_is_its_guard(version: str, address: int, hit: bool) -> None:
    outcome = handle_page_fault(facts(version, entries=GUARD), KERNEL, W, address)
    assert isinstance(outcome, traps.Die) is hit
    if isinstance(outcome, traps.Die):
        assert outcome.overflow == STACK
        name = "stack guard page" if version == "6.12" else "kernel stack overflow (page fault)"
        assert outcome.description == name


def test_a_user_fault_on_a_kernel_address_hides_whether_it_is_mapped() -> None:
    outcome = handle_page_fault(facts(), USER, U, 0xFFFFC90000000000)
    assert isinstance(outcome, FaultSignal)
    assert outcome.signal == traps.Signal(
        11, 1, 0xFFFFC90000000000,
        ("guest[42]: segfault at ffffc90000000000 ip 0000000000401000 sp 00007fffffffe000 error 5 "
         "likely on CPU 0 (core 0, socket 0)",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "signal", "code"),
    [(VmFault.MAPERR, 11, 1), (VmFault.ACCERR, 11, 2), (VmFault.PKUERR, 11, 4), (VmFault.SIGBUS, 7, 2)],
)
def test_what_the_vma_says_becomes_the_signal(result: VmFault, signal: int, code: int) -> None:
    outcome = handle_page_fault(facts("5.4", handle_mm_fault=lambda address, error: result), USER, U | W, 0x1000)
    assert isinstance(outcome, FaultSignal)
    assert (outcome.signal.signal, outcome.signal.code, outcome.signal.address) == (signal, code, 0x1000)
    line = "guest[42]: segfault at 1000 ip 0000000000401000 sp 00007fffffffe000 error 6"
    assert outcome.signal.lines == ((line,) if signal == 11 else ())


def test_a_supervisor_access_of_user_mode_to_the_kernel_half_is_an_oops() -> None:
    assert isinstance(handle_page_fault(facts(), USER, 0, 0xFFFFFE0000003000), FaultOops)


@pytest.mark.parametrize("address", [STACK.begin - 8, 0xFFFFC90000000000])
def test_a_fault_in_an_interrupt_handler_ends_in_its_context(address: int) -> None:
    outcome = handle_page_fault(facts(context=DieContext(in_interrupt=True)), KERNEL, 0, address)
    assert isinstance(outcome, FaultOops | traps.Die)
    assert outcome.context.in_interrupt
    assert outcome.context.irqs_disabled


def test_a_kernel_thread_has_no_user_half() -> None:
    assert isinstance(handle_page_fault(facts(smap=False), KERNEL, 0, 0x123456789000), FaultOops)


# ---- vmalloc_fault, C61 and C62 ----

ADDRESS = 0xFFFFC90000005000
CR3, INIT = 0x10000, 0x20000
SLOT = 8 * 402


def tables(here: int, leaf: int) -> Callable[[int], int]:
    words = {CR3 + SLOT: here, INIT + SLOT: 0x30067, 0x30000: 0x31067, 0x31000: 0x32067, 0x32000 + 8 * 5: leaf}
    return lambda pa: words.get(pa, 0)


def test_C62_the_fault_copies_one_top_level_entry_and_no_pte() -> None:
    result = vmalloc_fault(tables(0, 0x55163), CR3, INIT, ADDRESS, 4, VMALLOC)
    assert result == VmallocFault(True, (CR3 + SLOT, 0x30067))


def test_C62_a_guard_page_is_a_real_fault_even_as_the_entry_is_copied() -> None:
    assert vmalloc_fault(tables(0, 0), CR3, INIT, ADDRESS, 4, VMALLOC) == VmallocFault(False, (CR3 + SLOT, 0x30067))


def test_C62_an_entry_that_is_there_is_not_copied_again() -> None:
    assert vmalloc_fault(tables(0x30067, 0), CR3, INIT, ADDRESS, 4, VMALLOC) == VmallocFault(False)
    assert vmalloc_fault(tables(0x30067, 0x55163), CR3, INIT, ADDRESS, 4, VMALLOC) == VmallocFault(True)


def test_C62_two_different_entries_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="differ"):
        vmalloc_fault(tables(0x99067, 0x55163), CR3, INIT, ADDRESS, 4, VMALLOC)


def test_C62_nothing_is_copied_outside_the_vmalloc_region_or_from_an_empty_slot() -> None:
    assert vmalloc_fault(tables(0, 0x55163), CR3, INIT, 0xFFFF888000000000, 4, VMALLOC) == VmallocFault(False)
    assert vmalloc_fault(lambda pa: 0, CR3, INIT, ADDRESS, 4, VMALLOC) == VmallocFault(False)


def test_C61_only_5_4_asks_for_it_and_only_for_a_plain_not_present_fault() -> None:
    asked: list[int] = []

    def repair(address: int) -> bool:
        asked.append(address)
        return True

    fixed = Fixed(FixedBy.VMALLOC_FAULT, KERNEL.ip)
    assert do_kern_addr_fault(facts("5.4", vmalloc_fault=repair), KERNEL, W, ADDRESS) == fixed
    for version, error in (("6.12", 0), ("6.1", 0), ("5.4", P | W), ("5.4", RSVD)):
        do_kern_addr_fault(facts(version, vmalloc_fault=repair), KERNEL, error, ADDRESS)
    assert asked == [ADDRESS]


def test_an_oops_of_a_fault_kills_the_task_and_taints() -> None:
    state = OopsState(tainted=Taint(0))
    recorded = next(reports(MINIMAL.split("\n")))
    src, regs = prepare_oops("6.12", recorded, state)
    outcome = report(src, state, handle_page_fault(facts(entries=GUARD), regs, 0, 0xFFFFC9000007E000), regs)
    assert list(outcome.lines) == recorded.lines
    assert (outcome.signal, outcome.panic, state.tainted) == (9, None, Taint.DIE)


_REGISTERS = """RIP: 0010:f+0x37/0x50 [m]
Code: 00 00 e8 6c 06 1b c1 31 f6 48 8d b8 00 10 00 00 48 89 c3 e8 2b e6 ff ff 48 89 de 48 c7 c7 78 dd 20 c0 48 89 c2 e8 b9 0c \
f6 c0 <0f> b6 83 00 10 00 00 5b 48 89 05 62 64 00 00 31 c0 c3 cc cc cc cc
RSP: 0018:ffffc900005e3ee0 EFLAGS: 00000246
RAX: 00000000000000af RBX: ffffc9000007d000 RCX: c0000000fffdffff
RDX: 0000000000000000 RSI: 00000000fffdffff RDI: 0000000000000001
RBP: ffff8880052b8000 R08: 0000000000000000 R09: 0000000000000003
R10: ffffc900005e3d80 R11: ffff88807fac6fe8 R12: ffffc90000653838
R13: ffff88800533f100 R14: 0000000000000000 R15: ffffffffc02011d0
FS:  0000000000000000(0000) GS:ffff88807ca00000(0000) knlGS:0000000000000000
CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033
CR2: ffffc9000007e000 CR3: 0000000005310000 CR4: 0000000000750ef0
PKRU: 55555554"""
MINIMAL = f"""BUG: unable to handle page fault for address: ffffc9000007e000
#PF: supervisor read access in kernel mode
#PF: error_code(0x0000) - not-present page
PGD 4000067 P4D 4000067 PUD 41d8067 PMD 41d9067 PTE 0
Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI
CPU: 0 UID: 0 PID: 42 Comm: guest Not tainted 6.12.117 #1
Hardware name: QEMU
{_REGISTERS}
Call Trace:
 <TASK>
 fault_thr+0x16/0x40 [m]
 ? kthread+0x10/0x10
 </TASK>
Modules linked in: m(OE)
CR2: ffffc9000007e000
---[ end trace 0000000000000000 ]---
{_REGISTERS}
note: guest[42] exited with irqs disabled
"""
