"""SYSCALL, SYSRET, IRET, far RET, JMP and CALL: SDM vol. 2, each instruction's own page."""

from __future__ import annotations

import pytest
from bare_cpu import (
    CODE,
    DATA,
    GDT,
    KERNEL_CS,
    KERNEL_SS,
    NON_CANONICAL,
    SPARE,
    STACK,
    TR,
    USER_CODE,
    USER_CS,
    USER_SS,
    USER_STACK,
    BareCpu,
    Entered,
)

from emu.descriptors import Gate, SystemType, encode_gate
from emu.exceptions import Vector
from emu.mmu.fault import PfError
from emu.mmu.registers import RESET_EFER
from emu.msr import IA32_FMASK, IA32_LSTAR, IA32_STAR
from emu.rflags import Rflags

IF, TF, NT, RF, AC, IOPL = int(Rflags.IF), int(Rflags.TF), int(Rflags.NT), int(Rflags.RF), int(Rflags.AC), int(Rflags.IOPL)
IRETQ, RETFQ, SYSCALL, SYSRETQ = b"\x48\xcf", b"\x48\xcb", b"\x0f\x05", b"\x48\x0f\x07"
UD2 = b"\x0f\x0b"
ABSENT_CODE = 0x00AF1B000000FFFF
COMPATIBILITY_CODE, CODE_OF_16_BITS, CODE_WITH_L_AND_D = 0x00CF9B000000FFFF, 0x008F9B000000FFFF, 0x00EF9B000000FFFF
CONFORMING_CODE = 0x00AF9F000000FFFF
FRAME = STACK - 0x100


@pytest.fixture
def cpu() -> BareCpu:
    cpu = BareCpu()
    cpu.memory.write(USER_CODE, UD2)
    cpu.memory.write(CODE + 0x100, UD2)
    return cpu


def iretq(
    cpu: BareCpu, rip: int = USER_CODE, cs: int = USER_CS, rflags: int = 2, rsp: int = USER_STACK, ss: int = USER_SS, *,
    cpl: int = 0, old: int = 2,
) -> Entered:
    frame = USER_STACK - 0x100 if cpl else FRAME
    cpu.put_words(frame, (rip, cs, rflags, rsp, ss))
    entered = cpu.run_code(IRETQ, cpl, at=USER_CODE + 0x200 if cpl else None, rsp=frame, rflags=old)
    assert isinstance(entered, Entered)
    return entered


# ---- IRET


def test_iretq_to_level_3_takes_the_whole_frame(cpu: BareCpu) -> None:
    entered = iretq(cpu, rflags=2 | IF | AC)
    assert (entered.vector, entered.rip, entered.cs) == (Vector.UD, USER_CODE, USER_CS)
    assert (entered.rsp, entered.ss) == (USER_STACK, USER_SS)
    assert entered.rflags == 2 | IF | AC | RF


def test_iretq_to_the_same_level_takes_rsp_and_ss_too(cpu: BareCpu) -> None:
    entered = iretq(cpu, CODE + 0x100, KERNEL_CS, 2, STACK - 0x404, 0)
    assert (entered.vector, entered.rip, entered.rsp, entered.ss, entered.cpl) == (Vector.UD, CODE + 0x100, STACK - 0x404, 0, 0)


def test_iretq_at_level_3_changes_neither_iopl_nor_if(cpu: BareCpu) -> None:
    assert iretq(cpu, rflags=2 | IF | IOPL, cpl=3).rflags == 2 | RF
    assert iretq(cpu, rflags=2, cpl=3, old=2 | IF).rflags == 2 | IF | RF
    assert iretq(cpu, rflags=2 | IF, cpl=3, old=2 | IOPL).rflags == 2 | IF | IOPL | RF


def test_iretq_never_sets_reserved_flags_or_vm(cpu: BareCpu) -> None:
    assert iretq(cpu, rflags=(1 << 64) - 1 & ~(TF | NT)).rflags == 0x3D_7FD7 & ~(TF | NT)


def test_iretq_with_nt_is_gp(cpu: BareCpu) -> None:
    entered = iretq(cpu, old=2 | NT)
    assert (entered.vector, entered.error, entered.rip, entered.rsp) == (Vector.GP, 0, CODE, FRAME)


@pytest.mark.parametrize(("cs", "expected"), [
    (0, (Vector.GP, 0)),
    (3, (Vector.GP, 0)),
    (USER_SS, (Vector.GP, USER_SS & ~3)),
    (USER_CS & ~3, (Vector.GP, USER_CS & ~3)),
    (KERNEL_CS | 3, (Vector.GP, KERNEL_CS)),
    (SPARE, (Vector.NP, SPARE)),
    (SPARE + 8, (Vector.GP, SPARE + 8)),
    (SPARE + 16, (Vector.GP, SPARE + 16)),
    (SPARE + 24, (Vector.GP, SPARE + 24)),
    (0xF3, (Vector.GP, 0xF0)),
    (TR, (Vector.GP, TR)),
    (USER_CS | 4, (Vector.GP, USER_CS & ~3 | 4)),
])
def test_iretq_checks_the_code_segment(cpu: BareCpu, cs: int, expected: tuple[int, int]) -> None:
    cpu.put_segment(SPARE, ABSENT_CODE)
    cpu.put_segment(SPARE + 8, COMPATIBILITY_CODE)
    cpu.put_segment(SPARE + 16, CODE_OF_16_BITS)
    cpu.put_segment(SPARE + 24, CODE_WITH_L_AND_D)
    entered = iretq(cpu, cs=cs)
    assert (entered.vector, entered.error) == expected
    assert (entered.rip, entered.rsp, entered.cs) == (CODE, FRAME, KERNEL_CS)


def test_iretq_cannot_return_to_an_inner_level(cpu: BareCpu) -> None:
    entered = iretq(cpu, CODE, KERNEL_CS, ss=KERNEL_SS, cpl=3)
    assert (entered.vector, entered.error, entered.cs) == (Vector.GP, KERNEL_CS, USER_CS)


@pytest.mark.parametrize(("ss", "expected"), [
    (0, (Vector.GP, 0)),
    (3, (Vector.GP, 0)),
    (KERNEL_SS, (Vector.GP, KERNEL_SS)),
    (KERNEL_SS | 3, (Vector.GP, KERNEL_SS)),
    (USER_CS, (Vector.GP, USER_CS & ~3)),
    (SPARE | 3, (Vector.SS, SPARE)),
    ((SPARE + 8) | 3, (Vector.GP, SPARE + 8)),
    (0xF3, (Vector.GP, 0xF0)),
    (TR | 3, (Vector.GP, TR)),
])
def test_iretq_checks_the_stack_segment(cpu: BareCpu, ss: int, expected: tuple[int, int]) -> None:
    cpu.put_segment(SPARE, 0x00CF73000000FFFF)
    cpu.put_segment(SPARE + 8, 0x00CFF1000000FFFF)
    entered = iretq(cpu, ss=ss)
    assert (entered.vector, entered.error, entered.rip, entered.cs) == (*expected, CODE, KERNEL_CS)


def test_iretq_to_a_non_canonical_rip_is_gp_at_the_iretq(cpu: BareCpu) -> None:
    entered = iretq(cpu, rip=NON_CANONICAL)
    assert (entered.vector, entered.error, entered.rip, entered.cpl) == (Vector.GP, 0, CODE, 0)


def test_iretq_from_an_absent_stack_reports_the_word_of_rflags(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.PF, ist=1)
    cpu.unmap(DATA)
    assert cpu.vector_of(IRETQ, rsp=DATA + 8) == (Vector.PF, 0)
    assert cpu.cr2 == DATA + 8 + 16
    assert cpu.vector_of(IRETQ, rsp=DATA - 24) == (Vector.PF, 0)
    assert cpu.cr2 == DATA


def test_iretq_from_a_non_canonical_stack_is_ss(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.SS, ist=1)
    assert cpu.vector_of(IRETQ, rsp=NON_CANONICAL) == (Vector.SS, 0)


def test_iretd_pops_words_of_32_bits(cpu: BareCpu) -> None:
    cpu.memory.write(FRAME, b"".join(word.to_bytes(4, "little") for word in (USER_CODE, USER_CS, 2, USER_STACK, USER_SS)))
    entered = cpu.run_code(b"\xcf", rsp=FRAME)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.rsp) == (Vector.UD, USER_CODE, USER_STACK)


def test_a_return_to_an_outer_level_nulls_the_segments_that_level_could_not_load(cpu: BareCpu) -> None:
    for name, selector in (("ds", KERNEL_SS), ("es", USER_SS), ("fs", KERNEL_CS), ("gs", SPARE)):
        cpu.put_segment(SPARE, CONFORMING_CODE)
        cpu.set_reg(name, selector)
    cpu.set_reg("fs_base", 0x1234)
    iretq(cpu)
    assert [cpu.reg(name) for name in ("ds", "es", "fs", "gs")] == [0, USER_SS, 0, SPARE]
    assert cpu.reg("fs_base") == 0x1234
    cpu.at_level(0)
    cpu.set_reg("ds", KERNEL_SS)
    iretq(cpu, CODE + 0x100, KERNEL_CS, ss=KERNEL_SS, rsp=STACK)
    assert cpu.reg("ds") == KERNEL_SS


def test_a_nulled_fs_keeps_its_base(cpu: BareCpu) -> None:
    cpu.run_code(b"\x8e\xe0\x0f\x0b", rax=KERNEL_SS)  # mov fs, eax; ud2
    cpu.at_level(0)
    cpu.set_reg("fs_base", 0x1234)
    iretq(cpu)
    assert cpu.reg("fs") == 0
    assert cpu.reg("fs_base") == 0x1234


# ---- RETF


def test_retfq_to_the_same_level(cpu: BareCpu) -> None:
    cpu.put_words(FRAME, (CODE + 0x100, KERNEL_CS))
    entered = cpu.run_code(RETFQ, rsp=FRAME)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.rsp, entered.ss) == (Vector.UD, CODE + 0x100, FRAME + 16, KERNEL_SS)


def test_retfq_to_an_outer_level_releases_parameters_on_both_stacks(cpu: BareCpu) -> None:
    cpu.put_words(FRAME, (USER_CODE, USER_CS, 7, USER_STACK, USER_SS))
    entered = cpu.run_code(b"\x48\xca\x08\x00", rsp=FRAME)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.cs, entered.rsp, entered.ss) == (
        Vector.UD, USER_CODE, USER_CS, USER_STACK + 8, USER_SS,
    )


def test_retf_has_an_operand_size_of_32_bits_without_rex_w(cpu: BareCpu) -> None:
    cpu.memory.write(FRAME, (CODE + 0x100).to_bytes(4, "little") + KERNEL_CS.to_bytes(4, "little"))
    entered = cpu.run_code(b"\xcb", rsp=FRAME)
    assert isinstance(entered, Entered)
    assert (entered.rip, entered.rsp) == (CODE + 0x100, FRAME + 8)


def test_retfq_checks_what_iretq_checks(cpu: BareCpu) -> None:
    for frame, expected in (
        ((CODE, 0), (Vector.GP, 0)),
        ((CODE, KERNEL_SS), (Vector.GP, KERNEL_SS)),
        ((NON_CANONICAL, KERNEL_CS), (Vector.GP, 0)),
        ((USER_CODE, USER_CS, USER_STACK, KERNEL_SS), (Vector.GP, KERNEL_SS)),
        ((NON_CANONICAL, USER_CS, USER_STACK, USER_SS), (Vector.GP, 0)),
    ):
        cpu.put_words(FRAME, frame)
        assert cpu.vector_of(RETFQ, rsp=FRAME) == expected


def test_retfq_from_an_absent_stack_reports_the_word_of_cs(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.PF, ist=1)
    cpu.unmap(DATA)
    assert cpu.vector_of(RETFQ, rsp=DATA) == (Vector.PF, 0)
    assert cpu.cr2 == DATA + 8


# ---- far JMP and CALL


def far_pointer(cpu: BareCpu, offset: int, selector: int) -> int:
    cpu.memory.write(DATA, offset.to_bytes(8, "little") + selector.to_bytes(2, "little"))
    return DATA


JMP_FAR, CALL_FAR = b"\x48\xff\x2b", b"\x48\xff\x1b"  # [rbx]


def test_a_far_jump_loads_cs_with_the_current_level(cpu: BareCpu) -> None:
    cpu.put_segment(SPARE, CONFORMING_CODE)
    cpu.memory.write(USER_CODE + 0x100, b"\x8c\xc8" + UD2)  # mov eax, cs
    pointer = USER_STACK
    cpu.memory.write(pointer, (USER_CODE + 0x100).to_bytes(8, "little") + SPARE.to_bytes(2, "little"))
    entered = cpu.run_code(JMP_FAR, 3, at=USER_CODE + 0x200, rbx=pointer)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.cs, entered.rsp) == (Vector.UD, USER_CODE + 0x102, SPARE | 3, USER_STACK)
    assert cpu.reg("rax") == SPARE | 3


def test_a_far_call_pushes_cs_and_rip(cpu: BareCpu) -> None:
    entered = cpu.run_code(CALL_FAR, rbx=far_pointer(cpu, CODE + 0x100, KERNEL_CS))
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.rsp) == (Vector.UD, CODE + 0x100, STACK - 16)
    assert cpu.words(STACK - 16, 2) == (CODE + 3, KERNEL_CS)


@pytest.mark.parametrize("code", [JMP_FAR, CALL_FAR])
def test_a_far_branch_cannot_change_the_privilege_level(cpu: BareCpu, code: bytes) -> None:
    for offset, selector, expected in (
        (CODE, 0, (Vector.GP, 0)),
        (USER_CODE, USER_CS, (Vector.GP, USER_CS & ~3)),
        (CODE, KERNEL_CS | 3, (Vector.GP, KERNEL_CS)),
        (CODE, KERNEL_SS, (Vector.GP, KERNEL_SS)),
        (CODE, TR, (Vector.GP, TR)),
        (CODE, SPARE, (Vector.NP, SPARE)),
        (CODE, SPARE + 8, (Vector.GP, SPARE + 8)),
        (NON_CANONICAL, KERNEL_CS, (Vector.GP, 0)),
    ):
        cpu.put_segment(SPARE, ABSENT_CODE)
        cpu.put_segment(SPARE + 8, COMPATIBILITY_CODE)
        assert cpu.vector_of(code, rbx=far_pointer(cpu, offset, selector)) == expected


def test_a_call_gate_is_refused_as_no_code_segment(cpu: BareCpu) -> None:
    cpu.memory.write(GDT + SPARE, encode_gate(Gate(CODE + 0x100, KERNEL_CS, type=SystemType.CALL_GATE, dpl=3)))
    cpu.memory.write(USER_STACK, bytes(8) + (SPARE | 3).to_bytes(2, "little"))
    assert cpu.vector_of(CALL_FAR, 3, rbx=USER_STACK) == (Vector.GP, SPARE)


def test_a_far_call_whose_stack_is_absent_changes_nothing(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.PF, ist=1)
    cpu.unmap(DATA + 0x1000)
    entered = cpu.run_code(CALL_FAR, rbx=far_pointer(cpu, CODE + 0x100, KERNEL_CS), rsp=DATA + 0x1100)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, entered.rsp) == (Vector.PF, PfError.W, CODE, DATA + 0x1100)


# ---- SYSCALL and SYSRET


def with_syscall(cpu: BareCpu, fmask: int = 0) -> None:
    cpu.msrs[IA32_STAR] = 0x0023_0010 << 32
    cpu.msrs[IA32_LSTAR] = CODE + 0x100
    cpu.msrs[IA32_FMASK] = fmask


def test_syscall_saves_rip_and_rflags_and_masks_rflags(cpu: BareCpu) -> None:
    with_syscall(cpu, IF | AC)
    entered = cpu.run_code(SYSCALL, 3, rflags=2 | IF | AC | 1)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.cs, entered.ss) == (Vector.UD, CODE + 0x100, KERNEL_CS, KERNEL_SS)
    assert (entered.rsp, entered.rflags) == (USER_STACK, 2 | 1 | RF)
    assert (cpu.reg("rcx"), cpu.reg("r11")) == (USER_CODE + 2, 2 | IF | AC | 1)


def test_syscall_and_sysret_take_no_descriptors_from_memory(cpu: BareCpu) -> None:
    with_syscall(cpu)
    cpu.memory.write(CODE + 0x100, SYSRETQ)
    cpu.memory.write(USER_CODE + 0x202, UD2)
    gdt = cpu.gdtr
    cpu.gdtr = type(gdt)(DATA, gdt.limit)
    cpu.load_tables()
    cpu.memory.write(DATA, cpu.memory.read(gdt.base, gdt.limit + 1))
    cpu.memory.write_u64(DATA + (USER_CS & ~7), 0)
    cpu.memory.write_u64(DATA + (USER_SS & ~7), 0)
    entered = cpu.run_code(SYSCALL, 3, at=USER_CODE + 0x200)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.cs, entered.ss) == (Vector.UD, USER_CODE + 0x202, USER_CS, USER_SS)


def test_sysret_loads_rflags_from_r11_without_rf_vm_and_reserved_bits(cpu: BareCpu) -> None:
    with_syscall(cpu)
    entered = cpu.run_code(SYSRETQ, rcx=USER_CODE, r11=(1 << 64) - 1 & ~(TF | NT))
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.cs, entered.cpl) == (Vector.UD, USER_CODE, USER_CS, 0)
    assert entered.rflags == (0x3C_7FD7 | RF) & ~(TF | NT)


def test_sysret_to_a_non_canonical_rcx_is_gp_at_level_0(cpu: BareCpu) -> None:
    with_syscall(cpu)
    entered = cpu.run_code(SYSRETQ, rcx=NON_CANONICAL, r11=2)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, entered.cs) == (Vector.GP, 0, CODE, KERNEL_CS)


def test_sysret_is_gp_at_level_3(cpu: BareCpu) -> None:
    with_syscall(cpu)
    assert cpu.vector_of(SYSRETQ, 3) == (Vector.GP, 0)


def test_syscall_and_sysret_are_ud_while_efer_sce_is_0() -> None:
    cpu = BareCpu(efer=RESET_EFER)
    with_syscall(cpu)
    assert cpu.vector_of(SYSCALL, 3) == (Vector.UD, None)
    assert cpu.vector_of(SYSRETQ) == (Vector.UD, None)
    assert cpu.vector_of(SYSRETQ, 3) == (Vector.UD, None)


# ---- what the engine executes itself


def test_popf_at_level_3_changes_neither_iopl_nor_if(cpu: BareCpu) -> None:
    cpu.put_words(USER_STACK - 8, (2 | IF | IOPL | AC,))
    entered = cpu.run_code("popfq; ud2", 3, rsp=USER_STACK - 8)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rflags) == (Vector.UD, 2 | AC | RF)


def test_cli_and_sti_need_iopl(cpu: BareCpu) -> None:
    for code in ("cli; ud2", "sti; ud2"):
        assert cpu.vector_of(code, 3) == (Vector.GP, 0)
        assert cpu.vector_of(code, 3, rflags=2 | IOPL) == (Vector.UD, None)


@pytest.mark.parametrize("code", [b"\x90", b"\x0f\x20\xd8", b"\x48\x89\xc0"])
def test_tf_traps_behind_every_instruction_with_bs_in_dr6(cpu: BareCpu, code: bytes) -> None:
    entered = cpu.run_code(code + UD2, rflags=2 | TF)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, entered.rflags) == (Vector.DB, CODE + len(code), 2 | TF)
    assert cpu.reg("dr6") & 1 << 14
    assert not cpu.reg("rflags") & TF


def test_tf_that_iretq_sets_traps_behind_the_next_instruction(cpu: BareCpu) -> None:
    cpu.memory.write(USER_CODE, b"\x90\x90")
    entered = iretq(cpu, rflags=2 | TF)
    assert (entered.vector, entered.rip, entered.cs) == (Vector.DB, USER_CODE + 1, USER_CS)
