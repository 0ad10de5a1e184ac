"""Delivery of exceptions and interrupts: SDM vol. 3A chapter 6."""

from __future__ import annotations

import pytest
from bare_cpu import (
    CODE,
    DATA,
    GDT,
    IDT,
    IST1,
    IST2,
    KERNEL_CS,
    KERNEL_SS,
    NON_CANONICAL,
    RSP0,
    SPARE,
    STACK,
    STUB_SIZE,
    STUBS,
    TR,
    TSS,
    USER_CODE,
    USER_CS,
    USER_DATA,
    USER_SS,
    USER_STACK,
    BareCpu,
    Entered,
)

from emu.descriptors import SystemType, TableRegister, Tss
from emu.exceptions import CpuException, Source, TripleFault, Vector, deliver, double_fault_follows
from emu.mmu.entry import RW, A, D, P
from emu.mmu.fault import PfError
from emu.mmu.registers import Cr4
from emu.rflags import Rflags

IF, TF, NT, RF, AC = int(Rflags.IF), int(Rflags.TF), int(Rflags.NT), int(Rflags.RF), int(Rflags.AC)
CONFORMING_CODE = 0x00AF9F000000FFFF
COMPATIBILITY_CODE, CODE_OF_16_BITS, CODE_WITH_L_AND_D = 0x00CF9B000000FFFF, 0x008F9B000000FFFF, 0x00EF9B000000FFFF
BENIGN = (Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.BR, Vector.UD, Vector.NM, Vector.MF, Vector.AC, Vector.MC, Vector.XM)
CONTRIBUTORY = (Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP)


@pytest.fixture
def cpu() -> BareCpu:
    return BareCpu()


def enter(cpu: BareCpu, source: str | bytes, cpl: int = 0, **registers: int) -> Entered:
    entered = cpu.run_code(source, cpl, **registers)
    assert isinstance(entered, Entered), entered
    return entered


def idt_error(vector: int, ext: int = 0) -> int:
    return vector << 3 | 2 | ext


# ---- the frame (6.14.2)


def test_a_fault_pushes_rip_of_its_instruction_and_rflags_with_rf(cpu: BareCpu) -> None:
    entered = enter(cpu, "nop; ud2", rflags=2 | IF)
    assert (entered.vector, entered.error, entered.rip) == (Vector.UD, None, CODE + 1)
    assert (entered.cs, entered.ss, entered.rsp) == (KERNEL_CS, KERNEL_SS, STACK)
    assert entered.rflags == 2 | IF | RF


def test_a_trap_pushes_rip_behind_its_instruction_and_rflags_without_rf(cpu: BareCpu) -> None:
    for code, vector in ((b"\xcc", Vector.BP), (b"\xcd\x80", 0x80), (b"\xcd\x03", Vector.BP), (b"\xf1", Vector.DB)):
        entered = enter(cpu, code)
        assert (entered.vector, entered.rip, entered.rflags) == (vector, CODE + len(code), 2)


def test_divide_error_has_no_error_code(cpu: BareCpu) -> None:
    assert cpu.vector_of("div rcx", rcx=0) == (Vector.DE, None)


def test_a_page_fault_pushes_its_error_code_and_loads_cr2(cpu: BareCpu) -> None:
    cpu.unmap(DATA)
    assert cpu.vector_of("mov eax, [rcx]", rcx=DATA + 9) == (Vector.PF, 0)
    assert cpu.cr2 == DATA + 9
    assert cpu.vector_of("add [rcx], eax", rcx=DATA + 17) == (Vector.PF, PfError.W)
    assert cpu.cr2 == DATA + 17
    assert cpu.vector_of("mov [rcx], eax", 3, rcx=DATA) == (Vector.PF, PfError.W | PfError.U)


def test_the_stack_is_aligned_to_16_bytes_before_the_push(cpu: BareCpu) -> None:
    for odd in (0, 1, 8, 15):
        entered = enter(cpu, "ud2", rsp=STACK + odd)
        assert (entered.at, entered.rsp) == (STACK - 40, STACK + odd)
        assert enter(cpu, "mov eax, [rcx]", rsp=STACK + odd, rcx=NON_CANONICAL).at == STACK - 48


def test_the_handler_runs_with_tf_nt_rf_cleared_and_ac_kept(cpu: BareCpu) -> None:
    enter(cpu, "ud2", rflags=2 | NT | AC | RF)
    assert cpu.reg("rflags") == 2 | AC


def test_an_interrupt_gate_clears_if_and_a_trap_gate_keeps_it(cpu: BareCpu) -> None:
    enter(cpu, "ud2", rflags=2 | IF)
    assert not cpu.reg("rflags") & IF
    cpu.put_gate(Vector.UD, type=SystemType.TRAP_GATE)
    enter(cpu, "ud2", rflags=2 | IF)
    assert cpu.reg("rflags") & IF


# ---- stacks (6.14.4, 6.14.5)


def test_a_change_to_level_0_takes_rsp0_and_a_null_ss(cpu: BareCpu) -> None:
    entered = enter(cpu, "ud2", 3)
    assert (entered.cs, entered.ss, entered.rsp, entered.rip) == (USER_CS, USER_SS, USER_STACK, USER_CODE)
    assert (entered.at, entered.cpl) == (RSP0 - 40, 0)
    assert (cpu.reg("cs"), cpu.reg("ss")) == (KERNEL_CS, 0)


def test_an_ist_entry_is_taken_at_any_privilege_level_and_keeps_ss_without_a_change(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.UD, ist=2)
    assert enter(cpu, "ud2").at == IST2 - 40
    assert cpu.reg("ss") == KERNEL_SS
    assert enter(cpu, "ud2", 3).at == IST2 - 40
    assert cpu.reg("ss") == 0


def test_a_conforming_handler_runs_at_the_interrupted_level_on_its_stack(cpu: BareCpu) -> None:
    cpu.put_segment(SPARE, CONFORMING_CODE)
    cpu.put_gate(Vector.UD, selector=SPARE, offset=USER_CODE + 0x100)
    cpu.memory.write(USER_CODE + 0x100, b"\xcc")
    entered = enter(cpu, "ud2", 3)
    assert (entered.vector, entered.cs) == (Vector.GP, SPARE | 3)  # INT3: its gate has DPL 0
    assert cpu.words(USER_STACK - 40, 2) == (USER_CODE, USER_CS)


def test_a_frame_for_level_3_is_pushed_with_the_rights_of_level_3(cpu: BareCpu) -> None:
    cpu.put_segment(SPARE, CONFORMING_CODE)
    cpu.put_gate(Vector.UD, selector=SPARE)
    assert cpu.vector_of("ud2", 3, rsp=STACK) == (Vector.PF, PfError.P | PfError.W | PfError.U)
    assert cpu.cr2 == STACK - 8


# ---- gates (6.12.1, 6.13)


def test_int_n_needs_a_gate_open_to_its_privilege_level(cpu: BareCpu) -> None:
    assert cpu.vector_of("int 0x80", 3) == (0x80, None)
    assert cpu.vector_of("int 0x81", 3) == (Vector.GP, idt_error(0x81))
    assert cpu.vector_of(b"\xcc", 3) == (Vector.GP, idt_error(3))
    cpu.put_gate(Vector.BP, dpl=3)
    assert cpu.vector_of(b"\xcc", 3) == (Vector.BP, None)


def test_a_refused_int_n_restarts(cpu: BareCpu) -> None:
    for code in (b"\xcd\x81", b"\xcc"):
        assert enter(cpu, code, 3).rip == USER_CODE


def test_the_dpl_of_a_gate_does_not_matter_to_exceptions(cpu: BareCpu) -> None:
    assert cpu.vector_of("ud2", 3) == (Vector.UD, None)


def test_a_gate_that_is_not_present_is_np_with_its_vector(cpu: BareCpu) -> None:
    cpu.put_gate(0x80, p=0)
    assert cpu.vector_of("int 0x80") == (Vector.NP, idt_error(0x80))
    cpu.put_gate(Vector.UD, p=0)
    assert cpu.vector_of("ud2") == (Vector.NP, idt_error(Vector.UD, 1))


@pytest.mark.parametrize("kind", [0, 5, 9, 12])
def test_what_is_no_interrupt_or_trap_gate_is_gp_with_its_vector(cpu: BareCpu, kind: int) -> None:
    cpu.put_gate(0x80, type=kind)
    assert cpu.vector_of("int 0x80") == (Vector.GP, idt_error(0x80))
    cpu.put_gate(Vector.UD, type=kind)
    assert cpu.vector_of("ud2") == (Vector.GP, idt_error(Vector.UD, 1))


def test_a_vector_beyond_the_idt_limit_is_gp_with_its_vector(cpu: BareCpu) -> None:
    cpu.idtr = TableRegister(IDT, 16 * 0x80 + 14)
    cpu.load_tables()
    assert cpu.vector_of("int 0x7f") == (0x7F, None)
    assert cpu.vector_of("int 0x80") == (Vector.GP, idt_error(0x80))


def test_the_code_segment_of_a_gate_is_checked(cpu: BareCpu) -> None:
    for selector, expected in (
        (0, (Vector.GP, 0)), (3, (Vector.GP, 0)), (KERNEL_SS, (Vector.GP, KERNEL_SS)), (0xF0, (Vector.GP, 0xF0)),
        (0x14, (Vector.GP, 0x14)), (USER_CS & ~3, (Vector.GP, USER_CS & ~3)), (SPARE, (Vector.NP, SPARE)),
        (SPARE + 8, (Vector.GP, SPARE + 8)), (SPARE + 16, (Vector.GP, SPARE + 16)), (SPARE + 24, (Vector.GP, SPARE + 24)),
    ):
        cpu.put_segment(SPARE, 0x00AF1B000000FFFF)
        cpu.put_segment(SPARE + 16, CODE_OF_16_BITS)
        cpu.put_segment(SPARE + 24, CODE_WITH_L_AND_D)
        cpu.put_segment(SPARE + 8, COMPATIBILITY_CODE)
        cpu.put_gate(0x80, selector=selector)
        assert cpu.vector_of("int 0x80") == expected
        cpu.put_gate(Vector.UD, selector=selector)
        assert cpu.vector_of("ud2") == (expected[0], expected[1] | 1)


def test_a_non_canonical_handler_is_gp_and_pushes_nothing(cpu: BareCpu) -> None:
    cpu.put_gate(0x80, offset=NON_CANONICAL)
    cpu.put_words(STACK - 40, [7] * 5)
    cpu.put_gate(Vector.GP, ist=1)
    assert cpu.vector_of("int 0x80") == (Vector.GP, 0)
    assert cpu.words(STACK - 40, 5) == (7,) * 5


def test_a_tss_too_small_for_the_stack_pointer_is_ts(cpu: BareCpu) -> None:
    cpu.put_gate(0x80, ist=2)
    cpu.tss = TableRegister(TSS, 36 + 8 + 6)
    cpu.load_tables()
    assert cpu.vector_of("int 0x80") == (Vector.TS, TR)
    cpu.tss = TableRegister(TSS, 36 + 8 + 7)
    cpu.load_tables()
    assert cpu.vector_of("int 0x80") == (0x80, None)


def test_a_non_canonical_stack_in_the_tss_is_ss_with_error_code_0(cpu: BareCpu) -> None:
    cpu.put_tss(Tss((RSP0, 0, 0), (IST1, NON_CANONICAL, 0, 0, 0, 0, 0)))
    cpu.put_gate(0x80, ist=2)
    assert cpu.vector_of("int 0x80") == (Vector.SS, 0)
    cpu.put_gate(Vector.UD, ist=2)
    assert cpu.vector_of("ud2") == (Vector.SS, 1)


def test_a_non_canonical_interrupted_stack_is_ss(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.SS, ist=1)
    assert cpu.vector_of("ud2", rsp=NON_CANONICAL + 0x100) == (Vector.SS, 1)


# ---- exceptions during delivery (6.15, interrupt 8, tables 6-4 and 6-5)


@pytest.mark.parametrize("first", [*BENIGN, *CONTRIBUTORY, Vector.PF])
@pytest.mark.parametrize("second", [*BENIGN, *CONTRIBUTORY, Vector.PF])
def test_table_6_5_says_which_pairs_make_a_double_fault(first: Vector, second: Vector) -> None:
    expected = (first in CONTRIBUTORY and second in CONTRIBUTORY) or (
        first == Vector.PF and (second in CONTRIBUTORY or second == Vector.PF)
    )
    assert double_fault_follows(first, second) is expected


SECONDS = {
    Vector.TS: {"ist": 7}, Vector.NP: {"p": 0}, Vector.SS: {"ist": 3}, Vector.GP: {"type": 0}, Vector.PF: {"ist": 4},
}


@pytest.mark.parametrize(("first", "second"), [
    (first, second) for first in (Vector.DE, Vector.NMI, Vector.UD, Vector.NP, Vector.GP, Vector.PF) for second in SECONDS
    if first != second  # the second could not be delivered either
])
def test_a_second_exception_is_delivered_in_turn_or_becomes_a_double_fault(cpu: BareCpu, first: Vector, second: Vector) -> None:
    cpu.put_tss(Tss((RSP0, 0, 0), (IST1, IST2, NON_CANONICAL, DATA, 0, 0, 0)))
    cpu.tss = TableRegister(TSS, 36 + 8 * 6 - 1)
    cpu.load_tables()
    cpu.unmap(DATA - 0x1000)
    cpu.put_gate(first, **SECONDS[second])
    cpu.put_gate(Vector.DF, ist=1)
    cpu.rip = CODE
    cpu.set_reg("rsp", STACK)
    seen: list[int] = []
    cpu.on_delivery = lambda exception: seen.append(exception.vector)
    error = {Vector.PF: 0, Vector.GP: 0, Vector.NP: 0}.get(first)
    source = Source.EXTERNAL if first == Vector.NMI else Source.EXCEPTION
    deliver(cpu, CpuException(first, error, DATA if first == Vector.PF else None), source)
    entered = cpu.go_on()
    assert isinstance(entered, Entered)
    assert entered.rip == CODE
    if double_fault_follows(first, second):
        assert (entered.vector, entered.error, entered.at) == (Vector.DF, 0, IST1 - 48)
        assert seen == [first, Vector.DF]
    else:
        assert entered.vector == second
        assert seen == [first, second]


def test_int_n_is_benign_whatever_its_vector(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.DE, type=0)
    assert cpu.vector_of("int 0") == (Vector.GP, idt_error(0))
    assert cpu.vector_of("div rcx", rcx=0) == (Vector.DF, 0)


def test_a_page_fault_that_becomes_a_double_fault_leaves_its_address_in_cr2(cpu: BareCpu) -> None:
    cpu.unmap(DATA)
    cpu.unmap(STACK)
    cpu.put_gate(Vector.DF, ist=1)
    entered = enter(cpu, "mov eax, [rcx]", rcx=DATA)
    assert (entered.vector, entered.rip, cpu.cr2) == (Vector.DF, CODE, STACK - 8)


def test_a_double_fault_that_cannot_be_delivered_stops_the_cpu_and_tells_what_led_there(cpu: BareCpu) -> None:
    cpu.unmap(STACK)
    with pytest.raises(TripleFault) as stopped:
        cpu.run_code("mov eax, [rcx]", rcx=STACK)
    assert [exception.vector for exception in stopped.value.chain] == [Vector.PF, Vector.PF, Vector.DF, Vector.PF]
    assert str(stopped.value).startswith(f"#PF, error code 0x2, CR2 {STACK - 8:#x} while delivering #DF")


def test_an_idt_that_is_absent_ends_in_a_triple_fault(cpu: BareCpu) -> None:
    cpu.idtr = TableRegister(0, 0)
    cpu.load_tables()
    with pytest.raises(TripleFault) as stopped:
        cpu.run_code("ud2")
    assert [exception.vector for exception in stopped.value.chain] == [Vector.UD, Vector.GP, Vector.GP, Vector.DF, Vector.GP]


def test_a_frame_that_crosses_into_an_absent_page_faults_at_the_word_pushed_there(cpu: BareCpu) -> None:
    page = STACK & ~0xFFF
    cpu.unmap(page - 0x1000)
    cpu.put_gate(Vector.PF, ist=1)
    entered = enter(cpu, "ud2", rsp=page + 16)
    assert (entered.vector, entered.error, cpu.cr2) == (Vector.PF, PfError.W, page - 8)
    assert (entered.rip, entered.rsp) == (CODE, page + 16)
    assert cpu.words(page, 2) == (page + 16, KERNEL_SS)


def test_a_frame_for_an_absent_page_faults_at_its_first_word(cpu: BareCpu) -> None:
    cpu.unmap(STACK)
    cpu.put_gate(Vector.PF, ist=1)
    assert cpu.vector_of("ud2", rsp=STACK) == (Vector.PF, PfError.W)
    assert cpu.cr2 == STACK - 8


def test_a_frame_needs_a_writable_page(cpu: BareCpu) -> None:
    cpu.set_pte(STACK, STACK & ~0xFFF | P | A | D)
    cpu.put_gate(Vector.PF, ist=1)
    assert cpu.vector_of("ud2") == (Vector.PF, PfError.P | PfError.W)
    cpu.set_pte(STACK, STACK & ~0xFFF | P | A | D | RW)
    assert cpu.vector_of("ud2") == (Vector.UD, None)


def test_descriptor_tables_are_read_as_supervisor_data(cpu: BareCpu) -> None:
    cpu.memory.write(DATA, cpu.memory.read(GDT, 0x1000))
    cpu.gdtr = TableRegister(DATA, cpu.gdtr.limit)
    cpu.load_tables()
    cpu.unmap(DATA)
    cpu.put_gate(Vector.DF, ist=1)
    with pytest.raises(TripleFault):
        cpu.run_code("ud2", 3)
    assert cpu.cr2 == DATA + KERNEL_CS


def test_a_gdt_in_a_user_page_cannot_be_read_under_smap() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    cpu.memory.write(USER_DATA, cpu.memory.read(GDT, 0x1000))
    cpu.gdtr = TableRegister(USER_DATA, cpu.gdtr.limit)
    cpu.load_tables()
    for rflags in (2, 2 | AC):
        with pytest.raises(TripleFault) as stopped:
            cpu.run_code("ud2", 3, rflags=rflags)
        assert stopped.value.chain[1].error == PfError.P
        assert cpu.cr2 == USER_DATA + KERNEL_CS


# ---- external interrupts and NMIs (6.7, 6.8)


def test_an_nmi_blocks_further_ones_until_iret_and_one_is_remembered(cpu: BareCpu) -> None:
    taken: list[tuple[int, int]] = []
    cpu.on_delivery = lambda exception: taken.append((exception.vector, cpu.rip))
    cpu.raise_nmi()
    assert enter(cpu, "nop; ud2").vector == Vector.NMI
    cpu.raise_nmi()
    cpu.raise_nmi()
    cpu.memory.write(cpu.rip, b"\x90\x48\xcf")  # nop; iretq behind the stub's HLT
    cpu.memory.write(CODE + 0x800, b"\x48\xff\xc3\x48\xcf")  # inc rbx; iretq
    cpu.put_gate(Vector.NMI, offset=CODE + 0x800)
    cpu.set_reg("rbx", 0)
    entered = cpu.go_on()
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, cpu.reg("rbx")) == (Vector.UD, CODE + 1, 1)
    assert taken == [(Vector.NMI, CODE), (Vector.NMI, CODE), (Vector.UD, CODE + 1)]  # the second behind IRETQ


def test_int_2_does_not_block_nmis(cpu: BareCpu) -> None:
    assert cpu.vector_of("int 2") == (Vector.NMI, None)
    assert not cpu.nmi_blocked


def test_an_iret_that_faults_unblocks_nmis_too(cpu: BareCpu) -> None:
    cpu.raise_nmi()
    assert cpu.vector_of("nop") == (Vector.NMI, None)
    assert cpu.nmi_blocked
    assert cpu.vector_of("iretq", rflags=2 | NT) == (Vector.GP, 0)
    assert not cpu.nmi_blocked


def test_int_14_leaves_cr2_and_pushes_no_error_code(cpu: BareCpu) -> None:
    cpu.cr2 = 0x1234
    cpu.run_code("int 14")
    assert cpu.cr2 == 0x1234
    assert cpu.words(STACK - 40, 1) == (CODE + 2,)


def test_an_interrupt_waits_for_if_and_is_taken_when_sti_has_let_one_more_instruction_pass(cpu: BareCpu) -> None:
    cpu.raise_interrupt(0x40)
    entered = enter(cpu, "inc rbx; inc rbx; sti; inc rbx; inc rbx; ud2", rbx=0)
    assert (entered.vector, entered.error, cpu.reg("rbx")) == (0x40, None, 3)
    assert entered.rflags & IF


def test_an_interrupt_is_taken_at_once_when_popf_sets_if(cpu: BareCpu) -> None:
    cpu.raise_interrupt(0x40)
    entered = enter(cpu, "inc rbx; push 0x202; popfq; inc rbx; ud2", rbx=0)
    assert (entered.vector, cpu.reg("rbx")) == (0x40, 1)


def test_interrupts_are_taken_in_the_order_in_which_they_came(cpu: BareCpu) -> None:
    cpu.raise_interrupt(0x41)
    cpu.raise_interrupt(0x40)
    assert enter(cpu, "nop", rflags=2 | IF).vector == 0x41
    assert enter(cpu, "nop", rflags=2 | IF).vector == 0x40


def test_an_interrupt_vector_below_32_is_refused(cpu: BareCpu) -> None:
    for vector in (-1, 31, 256):
        with pytest.raises(ValueError, match=str(vector)):
            cpu.raise_interrupt(vector)


def test_an_interrupt_wakes_hlt_and_returns_behind_it(cpu: BareCpu) -> None:
    cpu.raise_interrupt(0x40)
    entered = enter(cpu, "inc rbx; sti; hlt; inc rbx; ud2", rbx=0)
    assert (entered.vector, entered.rip, cpu.reg("rbx")) == (0x40, CODE + 5, 1)


def test_an_nmi_wakes_hlt_with_interrupts_off(cpu: BareCpu) -> None:
    assert not isinstance(cpu.run_code("hlt; ud2"), Entered)
    cpu.raise_nmi()
    entered = cpu.go_on()
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip) == (Vector.NMI, CODE + 1)


def test_external_events_set_ext_in_the_error_codes_of_their_delivery(cpu: BareCpu) -> None:
    cpu.put_gate(0x40, p=0)
    cpu.raise_interrupt(0x40)
    assert cpu.vector_of("nop", rflags=2 | IF) == (Vector.NP, idt_error(0x40, 1))


# ---- many in a row


def test_ten_thousand_exceptions_in_a_row_arrive_each_with_its_vector(cpu: BareCpu) -> None:
    cpu.unmap(DATA)
    seen: list[int] = []
    cpu.on_delivery = lambda exception: seen.append(exception.vector)
    # Every handler steps over its instruction, whose length is in BL.
    code = CODE + 0x800
    plain, with_error = b"\x48\x01\x1c\x24\x48\xcf", b"\x48\x83\xc4\x08\x48\x01\x1c\x24\x48\xcf"
    cpu.memory.write(code, plain.ljust(16) + with_error)
    for vector in (Vector.DE, Vector.UD):
        cpu.put_gate(vector, offset=code)
    for vector in (Vector.GP, Vector.PF, Vector.SS):
        cpu.put_gate(vector, offset=code + 16)
    loop = (
        "again: mov bl, 3; div rcx; mov bl, 2; ud2; mov bl, 3; mov rax, [rdx]; mov rax, [rsi]; mov bl, 2; mov ds, edi; "
        "dec ebp; jnz again; hlt"
    )
    cpu.run_code(loop, rbx=0, rcx=0, rdx=DATA, rsi=NON_CANONICAL, rdi=0x7F8, rbp=2000)
    assert seen == [Vector.DE, Vector.UD, Vector.PF, Vector.GP, Vector.GP] * 2000


def test_stub_addresses_are_where_vectors_say(cpu: BareCpu) -> None:
    assert enter(cpu, "int 0x80").vector == 0x80
    assert cpu.rip == STUBS + STUB_SIZE * 0x80 + 1


def test_the_names_of_exceptions_read_as_in_the_sdm() -> None:
    assert str(CpuException(Vector.GP, 0x18)) == "#GP, error code 0x18"
    assert str(CpuException(Vector.PF, 2, 0x1000)) == "#PF, error code 0x2, CR2 0x1000"
    assert str(CpuException(0x40)) == "#vector 64"
