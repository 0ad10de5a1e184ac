"""The text of oopses, warnings and panics, against what real kernels printed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from recorded_oops import Recorded, messages, prepare_oops, reports, source

from emu.kernel.oops import (
    CUT_HERE,
    KERNEL_TEXT,
    Controls,
    DieContext,
    KernelBuild,
    OopsReport,
    OopsSource,
    OopsState,
    Task,
    bug_lines,
    die,
    dump_stack,
    panic,
    stack_guard_lines,
    warn,
)
from emu.kernel.ptrace import PtRegs
from emu.kernel.taint import Taint, module_flags, print_tainted, print_tainted_verbose
from emu.kernel.unwind import StackInfo, StackSection, StackType, TraceLine
from emu.mmu.fault import PageFault

HEADER = re.compile(r"(?:Oops: )?(.*): ([0-9a-f]{4}) \[#(\d+)\] PREEMPT SMP NOPTI$")
TASK = Task("vmemu", 42, 1)


def replay_warn(version: str, recorded: Recorded, state: OopsState) -> tuple[str, ...]:
    at = recorded.index("RIP: ")
    place = recorded.index("WARNING: ")
    found = re.match(r"WARNING: CPU: \d+ PID: \d+ at (\S+):(\d+) ", recorded.lines[place])
    assert found
    message = "\n".join(recorded.lines[1:place]) or None
    regs = recorded.regs(at)
    src = source(version, recorded, [at])
    return warn(src, state, regs, file=found[1], line=int(found[2]), message=message).lines


def replay_die(version: str, recorded: Recorded, state: OopsState) -> OopsReport:
    """Every line from the header on; the lines before it, and CR2:, are passed through."""
    header_at = next(i for i, line in enumerate(recorded.lines) if HEADER.match(line))
    header = HEADER.match(recorded.lines[header_at])
    assert header
    src, regs = prepare_oops(version, recorded, state)
    first, end = recorded.index("RIP: "), recorded.index("---[ end trace")
    modules = recorded.index("Modules linked in:", first)
    context = DieContext(
        irqs_disabled=any(line.endswith("irqs disabled") for line in recorded.lines),
        in_interrupt=any("in interrupt" in line for line in recorded.lines),
    )
    return die(
        src,
        state,
        header[1],
        regs,
        int(header[2], 16),
        context,
        before=recorded.lines[:header_at],
        after=recorded.lines[modules + 1 : end],
    )


@pytest.mark.parametrize(("version", "nr_warnings", "nr_dumps"), [("6.12", 9, 3), ("6.1", 7, 3)])
def test_every_recorded_report_is_printed_line_for_line(version: str, nr_warnings: int, nr_dumps: int) -> None:
    state, oopses, warnings, dumps = OopsState(), 0, 0, 0
    for recorded in reports(messages(version)):
        if not state.tainted:
            state.tainted = recorded.tainted()
        if recorded.lines[0].startswith("CPU: "):
            lines = dump_stack(source(version, recorded, []), state)
            dumps += 1
        elif any(line.startswith("WARNING: ") for line in recorded.lines):
            lines = replay_warn(version, recorded, state)
            warnings += 1
        else:
            lines = replay_die(version, recorded, state).lines
            oopses += 1
        assert list(lines) == recorded.lines
    assert oopses == state.die_counter == 21
    assert (warnings, dumps) == (nr_warnings, nr_dumps)


REGS = PtRegs(
    ax=0xAF, bx=0xFFFFC9000007D000, cx=0xC0000000FFFDFFFF, si=0xFFFDFFFF, di=1, bp=0xFFFF8880052B8000, r9=3,
    r10=0xFFFFC900005E3D80, r15=0xFFFFFFFFC02011D0, ip=0xFFFFFFFFC0201237, cs=0x10, flags=0x246,
    sp=0xFFFFC900005E3EE0, ss=0x18,
)  # fmt: skip
CONTROLS = Controls(
    cr0=0x80050033, cr2=0xFFFFC9000007E000, cr3=0x5310000, cr4=0x750EF0, gs_base=0xFFFF88807CA00000, pkru=0x55555554
)
CODE = bytes(range(64))
TRACE = (StackSection(StackType.TASK, (TraceLine(0xFFFFFFFFC0201016, True), TraceLine(0xFFFFFFFF81001010, False))),)
SYMBOLS = ((0xFFFFFFFF81001000, 0x10, "__pfx_kthread"), (0xFFFFFFFFC0201000, 0x40, "fault_thr"), (0xFFFFFFFFC0201200, 0x50, "f"))


def symbolize(la: int) -> str | None:
    for start, size, name in SYMBOLS:
        if start <= la < start + size:
            return f"{name}+0x{la - start:x}/0x{size:x}" + (" [m]" if start >= 0xFFFFFFFFC0000000 else "")
    return None


def machine(version: str, *, task: Task = TASK, controls: Controls = CONTROLS, **build: object) -> OopsSource:
    """A source of facts that needs no recording."""

    def read(la: int, size: int) -> bytes:
        if la >> 12 == 0xFFFFFFFFC0201:
            return CODE[:size]
        raise PageFault(la, 0, 1, 0)

    facts = KernelBuild("6.12.0", "#1 vmemu", "QEMU", **build)  # type: ignore[arg-type]
    return OopsSource(KERNEL_TEXT[version], facts, task, read, lambda: controls, symbolize, lambda regs: TRACE, ("m(OE)", "n"))


def test_a_6_12_oops_reads_like_this() -> None:
    state = OopsState(tainted=Taint.OOT_MODULE | Taint.UNSIGNED_MODULE)
    report = die(machine("6.12"), state, "Oops", REGS, 2, DieContext(irqs_disabled=True, signal=9), after=["CR2: 1"])
    body = """RIP: 0010:f+0x37/0x50 [m]
Code: 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f \
20 21 22 23 24 25 26 27 28 29 <2a> 2b 2c 2d 2e 2f 30 31 32 33 34 35 36 37 38 39 3a 3b 3c 3d 3e 3f
RSP: 0018:ffffc900005e3ee0 EFLAGS: 00000246
RAX: 00000000000000af RBX: ffffc9000007d000 RCX: c0000000fffdffff
RDX: 0000000000000000 RSI: 00000000fffdffff RDI: 0000000000000001
RBP: ffff8880052b8000 R08: 0000000000000000 R09: 0000000000000003
R10: ffffc900005e3d80 R11: 0000000000000000 R12: 0000000000000000
R13: 0000000000000000 R14: 0000000000000000 R15: ffffffffc02011d0
FS:  0000000000000000(0000) GS:ffff88807ca00000(0000) knlGS:0000000000000000
CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033
CR2: ffffc9000007e000 CR3: 0000000005310000 CR4: 0000000000750ef0
PKRU: 55555554"""
    expected = f"""Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI
CPU: 1 UID: 0 PID: 42 Comm: vmemu Tainted: G           OE      6.12.0 #1 vmemu
Tainted: [O]=OOT_MODULE, [E]=UNSIGNED_MODULE
Hardware name: QEMU
{body}
Call Trace:
 <TASK>
 fault_thr+0x16/0x40 [m]
 ? __pfx_kthread+0x10/0x10
 </TASK>
Modules linked in: m(OE) n
CR2: 1
---[ end trace 0000000000000000 ]---
{body}
note: vmemu[42] exited with irqs disabled"""
    assert "\n".join(report.lines) == expected
    assert (report.panic, report.signal) == (None, 9)
    assert state.tainted & Taint.DIE


def test_6_1_names_neither_uid_nor_taint_words_nor_a_second_oops() -> None:
    lines = die(machine("6.1"), OopsState(tainted=Taint.WARN), "stack guard page", REGS, 0, DieContext()).lines
    assert lines[:3] == (
        "stack guard page: 0000 [#1] PREEMPT SMP NOPTI",
        "CPU: 1 PID: 42 Comm: vmemu Tainted: G        W          6.12.0 #1 vmemu",
        "Hardware name: QEMU",
    )


def test_5_4_has_no_stack_tags_and_numbers_its_end_markers() -> None:
    state = OopsState(oops_id=0xABCD)
    lines = die(machine("5.4"), state, "Oops", REGS, 0, DieContext(irqs_disabled=True)).lines
    at = lines.index("Call Trace:")
    assert lines[at + 1] == " fault_thr+0x16/0x40 [m]"
    assert "---[ end trace 000000000000abcd ]---" in lines
    assert state.oops_id == 0xABCE
    assert lines[-1] == "PKRU: 55555554"


def test_the_summary_shows_the_registers_of_the_first_oops() -> None:
    state = OopsState()
    die(machine("6.12"), state, "Oops", REGS, 0, DieContext())
    second = die(machine("6.12"), state, "Oops", replace(REGS, ax=0x1234), 0, DieContext()).lines
    end = second.index("---[ end trace 0000000000000000 ]---")
    assert second[0].startswith("Oops: Oops: 0000 [#2]")
    assert any(line.startswith("RAX: 0000000000001234") for line in second[:end])
    assert any(line.startswith("RAX: 00000000000000af") for line in second[end:])


def test_unreadable_code_bytes_leave_their_address_in_cr2() -> None:
    regs = replace(REGS, ip=0xFFFFC9000007E000)
    lines = die(machine("6.12"), OopsState(), "Oops", regs, 0x11, DieContext()).lines
    at = lines.index("Code: Unable to access opcode bytes at 0xffffc9000007dfd6.")
    assert lines[at - 1] == "RIP: 0010:0xffffc9000007e000"
    assert lines[at + 9].startswith("CR2: ffffc9000007dfd6 CR3:")


def test_a_jump_to_null_reads_code_at_the_top_of_the_address_space() -> None:
    lines = die(machine("6.12"), OopsState(), "Oops", replace(REGS, ip=0), 0x10, DieContext()).lines
    assert "Code: Unable to access opcode bytes at 0xffffffffffffffd6." in lines
    assert "RIP: 0010:0x0" in lines


def test_kernel_code_at_a_user_address_is_refused_without_touching_cr2() -> None:
    lines = die(machine("6.12"), OopsState(), "Oops", replace(REGS, ip=0x401000), 0x11, DieContext()).lines
    assert "Code: Unable to access opcode bytes at 0x400fd6." in lines
    assert any(line.startswith("CR2: ffffc9000007e000 CR3:") for line in lines)


def test_debug_registers_are_shown_only_when_they_are_in_use() -> None:
    used = replace(CONTROLS, debug_registers=(0x1000, 0, 0, 0, 0xFFFF0FF1, 0x401))
    lines = die(machine("6.12", controls=used), OopsState(), "Oops", REGS, 0, DieContext()).lines
    assert "DR0: 0000000000001000 DR1: 0000000000000000 DR2: 0000000000000000" in lines
    assert "DR3: 0000000000000000 DR6: 00000000ffff0ff1 DR7: 0000000000000401" in lines


@pytest.mark.parametrize(
    ("task", "context", "build", "message"),
    [
        (Task("a", 5), DieContext(in_interrupt=True), {"panic_on_oops": True}, "Fatal exception in interrupt"),
        (Task("a", 5), DieContext(), {"panic_on_oops": True}, "Fatal exception"),
        (Task("swapper/0", 0), DieContext(), {}, "Attempted to kill the idle task!"),
        (Task("init", 1), DieContext(), {}, "Attempted to kill init! exitcode=0x0000000b"),
    ],
)
def test_an_oops_that_cannot_end_its_task_panics(
    task: Task, context: DieContext, build: dict[str, bool], message: str
) -> None:
    report = die(machine("6.12", task=task, **build), OopsState(), "Oops", REGS, 0, context)
    assert report.panic == message
    assert report.lines[-3:] == (
        f"Kernel panic - not syncing: {message}",
        "Kernel Offset: disabled",
        f"---[ end Kernel panic - not syncing: {message} ]---",
    )


def test_a_panic_without_an_oops_dumps_the_stack_and_names_the_kaslr_offset() -> None:
    lines = panic(machine("6.12", kaslr_offset=0x1C000000, panic_timeout=3), OopsState(), "Machine halted.").lines
    assert lines[1].startswith("CPU: 1 UID: 0 PID: 42 Comm: vmemu Not tainted 6.12.0")
    assert "Call Trace:" in lines
    assert lines[-2:] == (
        "Kernel Offset: 0x1c000000 from 0xffffffff81000000 (relocation range: 0xffffffff80000000-0xffffffffbfffffff)",
        "Rebooting in 3 seconds..",
    )


def test_a_panic_with_registers_shows_them_first() -> None:
    lines = panic(machine("5.4"), OopsState(), "Machine halted.", before=["PANIC: double fault"], regs=REGS).lines
    assert (lines[0], lines[3]) == ("PANIC: double fault", "RIP: 0010:f+0x37/0x50 [m]")
    assert lines.index("Kernel panic - not syncing: Machine halted.") > lines.index("Call Trace:")


def test_a_user_mode_frame_shows_its_own_segment_bases_and_no_trace() -> None:
    lines = die(machine("6.12"), OopsState(), "Oops", replace(REGS, cs=0x33, ss=0x2B), 5, DieContext()).lines
    assert "FS:  0000000000000000 GS:  0000000000000000" in lines
    assert "Call Trace:" not in lines


def test_bug_names_the_place_or_the_function() -> None:
    assert bug_lines(machine("6.12"), REGS, "mm/vmalloc.c", 99) == (CUT_HERE, "kernel BUG at mm/vmalloc.c:99!")
    assert bug_lines(machine("6.12"), REGS)[1] == "Kernel BUG at f+0x37/0x50 [m] [verbose debug info unavailable]"


def test_the_stack_guard_line_of_5_4_gives_the_last_byte_and_no_name() -> None:
    info = StackInfo(StackType.TASK, 0xFFFFC90000008000, 0xFFFFC9000000C000)
    head = "stack guard page was hit at ffffc90000007ff8 (stack is ffffc90000008000..ffffc9000000"
    assert stack_guard_lines(machine("6.1"), 0xFFFFC90000007FF8, info) == (f"BUG: TASK {head}c000)",)
    assert stack_guard_lines(machine("5.4"), 0xFFFFC90000007FF8, info) == (f"BUG: {head}bfff)",)
    hashed = replace(machine("6.1"), pointer=lambda la: "P")
    assert stack_guard_lines(hashed, 0, info) == ("BUG: TASK stack guard page was hit at P (stack is P..P)",)


def test_a_split_lock_oops_breaks_its_header_line_as_the_kernel_does() -> None:
    lines = die(machine("6.12"), OopsState(), "Split lock detected\n", REGS, 0, DieContext()).lines
    assert lines[:2] == ("Oops: Split lock detected", ": 0000 [#1] PREEMPT SMP NOPTI")


def test_taint_letters_stand_in_fixed_columns() -> None:
    assert print_tainted(Taint(0)) == print_tainted_verbose(Taint(0)) == "Not tainted"
    assert print_tainted(Taint.PROPRIETARY_MODULE | Taint.TEST) == "Tainted: P                 N"
    assert print_tainted_verbose(Taint.DIE | Taint.WARN) == "Tainted: [D]=DIE, [W]=WARN"
    assert module_flags(Taint.OOT_MODULE | Taint.UNSIGNED_MODULE | Taint.DIE) == "(OE)"
    assert module_flags(Taint.DIE) == ""
