"""The CPU's own surface: registers by name, memory as level 0 sees it, and the reasons for which a run ends."""

from __future__ import annotations

import pytest
from bare_cpu import BASE_CR4, CODE, DATA, KERNEL_SS, NON_CANONICAL, RAM, STACK, STUBS, USER_DATA, BareCpu, Entered

from emu.cpu import Halted, KernelEntry
from emu.exceptions import CpuException, TripleFault, Vector
from emu.memory import BusError
from emu.mmu.entry import RW, A, D, P
from emu.mmu.fault import GeneralProtection, NonCanonical, PageFault, PfError
from emu.mmu.registers import RESET_CR0, Cr4
from emu.operands import MemoryAccess
from emu.rflags import Rflags

AC, IF = int(Rflags.AC), int(Rflags.IF)


@pytest.fixture
def cpu() -> BareCpu:
    return BareCpu()


def test_registers_are_read_and_written_by_their_lower_case_names(cpu: BareCpu) -> None:
    for name in ("rax", "r15", "rsp", "rip", "fs_base", "gs_base", "kernel_gs_base", "cr2", "mxcsr", "dr0"):
        cpu.set_reg(name, 0x1F80)
        assert cpu.reg(name) == 0x1F80
    assert (cpu.reg("cr0"), cpu.reg("cr4"), cpu.reg("ss"), cpu.reg("cpl")) == (RESET_CR0, BASE_CR4, KERNEL_SS, 0)
    with pytest.raises(KeyError):
        cpu.reg("nothing")


def test_a_control_register_refuses_what_a_mov_to_it_would(cpu: BareCpu) -> None:
    with pytest.raises(GeneralProtection):
        cpu.set_reg("cr4", BASE_CR4 | 1 << 30)
    assert cpu.reg("cr4") == BASE_CR4


def test_a_run_ends_at_the_hlt_of_a_stub_and_names_it(cpu: BareCpu) -> None:
    cpu.rip = STUBS + 0x100
    assert cpu.run() == KernelEntry(STUBS + 0x100)
    assert cpu.rip == STUBS + 0x101


def test_hlt_elsewhere_ends_a_run_that_nothing_can_wake(cpu: BareCpu) -> None:
    assert cpu.run_code("nop; hlt") == Halted(CODE + 1, False)
    assert cpu.run_code("nop; hlt", rflags=2 | IF) == Halted(CODE + 1, True)


def test_memory_is_read_and_written_through_the_tlb_as_level_0_would(cpu: BareCpu) -> None:
    cpu.write(DATA + 0xFFC, b"12345678")
    assert cpu.memory.read(DATA + 0xFFC, 8) == cpu.read(DATA + 0xFFC, 8) == b"12345678"
    cpu.set_pte(DATA + 0x1000, DATA + 0x1000 | P | A)
    with pytest.raises(PageFault) as fault:
        cpu.write(DATA + 0xFFC, b"abcdefgh")
    assert (fault.value.la, fault.value.error) == (DATA + 0x1000, PfError.P | PfError.W)
    assert cpu.read(DATA + 0xFFC, 8) == b"12345678"
    with pytest.raises(NonCanonical):
        cpu.read(NON_CANONICAL, 1)


def test_smap_binds_the_kernel_model_unless_ac_is_set() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    with pytest.raises(PageFault):
        cpu.read(USER_DATA, 1)
    cpu.set_reg("rflags", 2 | AC)
    assert cpu.read(USER_DATA, 1) == b"\0"


def test_an_access_beyond_ram_is_a_bus_error_and_no_exception(cpu: BareCpu) -> None:
    cpu.set_pte(DATA, RAM | P | RW | A | D)
    with pytest.raises(BusError) as error:
        cpu.run_code("mov eax, [rbx]", rbx=DATA)
    assert error.value.pa == RAM
    assert cpu.rip == CODE


def test_an_exception_may_be_raised_from_outside(cpu: BareCpu) -> None:
    cpu.rip = CODE
    cpu.set_reg("rsp", STACK)
    cpu.raise_exception(CpuException(Vector.GP, 8))
    entered = cpu.go_on()
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.GP, 8, CODE)


def test_every_delivery_is_told_before_it_happens(cpu: BareCpu) -> None:
    told: list[tuple[int, int]] = []
    cpu.on_delivery = lambda exception: told.append((exception.vector, cpu.rip))
    cpu.run_code("nop; ud2")
    assert told == [(Vector.UD, CODE + 1)]


def test_the_memory_accesses_of_an_instruction_come_from_the_registers_of_now(cpu: BareCpu) -> None:
    cpu.memory.write(CODE, b"\x48\x01\x43\x08")  # add [rbx + 8], rax
    cpu.set_reg("rbx", DATA)
    assert cpu.memory_accesses(CODE) == (MemoryAccess(DATA + 8, 8, True, True),)
    assert cpu.memory_accesses(NON_CANONICAL) == ()
    cpu.memory.write(CODE, b"\x06")
    assert cpu.memory_accesses(CODE) == ()


def test_a_stack_access_that_is_not_canonical_is_ss_and_any_other_gp(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.SS, ist=1)
    cpu.put_gate(Vector.GP, ist=1)
    for code, vector in (
        ("push rax", Vector.SS), ("mov rax, [rsp]", Vector.SS), ("mov rax, [rbp]", Vector.SS), ("mov rax, [rbx]", Vector.GP),
        ("call rax", Vector.SS),
    ):
        registers = {"rsp": NON_CANONICAL + 0x100, "rbp": NON_CANONICAL, "rbx": NON_CANONICAL, "rax": CODE}
        assert cpu.vector_of(code, **registers) == (vector, 0)


def test_a_store_that_crosses_into_an_absent_page_reports_that_page_and_writes_nothing(cpu: BareCpu) -> None:
    cpu.unmap(DATA + 0x1000)
    assert cpu.vector_of("mov [rbx], rax", rbx=DATA + 0xFFD, rax=-1 & 2**64 - 1) == (Vector.PF, PfError.W)
    assert cpu.cr2 == DATA + 0x1000
    assert cpu.memory.read(DATA + 0xFFD, 3) == bytes(3)


def test_rep_movs_restarts_at_the_element_that_faulted(cpu: BareCpu) -> None:
    cpu.unmap(DATA + 0x1000)
    entered = cpu.run_code("rep movsb", rsi=DATA + 0x4000, rdi=DATA + 0xFF0, rcx=100)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, cpu.cr2) == (Vector.PF, PfError.W, DATA + 0x1000)
    assert (cpu.reg("rcx"), cpu.reg("rdi"), cpu.reg("rsi")) == (84, DATA + 0x1000, DATA + 0x4010)


def test_a_triple_fault_names_every_exception(cpu: BareCpu) -> None:
    cpu.put_gate(Vector.DF, p=0)
    cpu.put_gate(Vector.GP, p=0)
    with pytest.raises(TripleFault, match="#NP, error code 0x43 while delivering #DF, error code 0x0 while delivering #NP"):
        cpu.run_code("mov eax, [rbx]", rbx=NON_CANONICAL)
