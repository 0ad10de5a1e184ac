"""Model-specific registers: SDM vol. 4 chapter 2, and RDMSR and WRMSR in vol. 2."""

from __future__ import annotations

import pytest
from bare_cpu import DATA, NON_CANONICAL, BareCpu

from emu.cpu import Halted
from emu.exceptions import Vector
from emu.mmu.registers import RESET_EFER, Efer
from emu.msr import (
    IA32_APIC_BASE,
    IA32_CSTAR,
    IA32_EFER,
    IA32_FMASK,
    IA32_FS_BASE,
    IA32_GS_BASE,
    IA32_KERNEL_GS_BASE,
    IA32_LSTAR,
    IA32_MISC_ENABLE,
    IA32_MTRRCAP,
    IA32_PAT,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
    IA32_TSC,
    IA32_TSC_AUX,
    PAT_RESET,
)

GP0 = (Vector.GP, 0)
KERNEL_ADDRESS = 0xFFFF_FFFF_8123_4567


@pytest.fixture
def cpu() -> BareCpu:
    return BareCpu()


def write(cpu: BareCpu, index: int, value: int) -> None:
    stop = cpu.run_code("wrmsr; hlt", rcx=index, rax=value & 0xFFFF_FFFF | 7 << 32, rdx=value >> 32 | 7 << 32)
    assert isinstance(stop, Halted), stop


def refused(cpu: BareCpu, index: int, value: int) -> bool:
    return cpu.vector_of("wrmsr", rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32) == GP0


def read(cpu: BareCpu, index: int) -> int:
    stop = cpu.run_code("rdmsr; hlt", rcx=index | 5 << 32, rax=-1 & 2**64 - 1, rdx=-1 & 2**64 - 1)
    assert isinstance(stop, Halted), stop
    assert cpu.reg("rax") >> 32 == cpu.reg("rdx") >> 32 == 0
    return cpu.reg("rdx") << 32 | cpu.reg("rax")


@pytest.mark.parametrize("index", [0, 0x11, 0x12345678, 0xC000_0085, 0xC000_0104, 0xC001_0015, 0xFFFF_FFFF, 0x40000000])
def test_an_unknown_msr_is_gp_to_read_and_to_write(cpu: BareCpu, index: int) -> None:
    assert cpu.vector_of("rdmsr", rcx=index) == GP0
    assert refused(cpu, index, 0)


@pytest.mark.parametrize("index", [
    IA32_LSTAR, IA32_CSTAR, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE,
])
def test_msrs_that_hold_an_address_refuse_a_non_canonical_one(cpu: BareCpu, index: int) -> None:
    write(cpu, index, KERNEL_ADDRESS)
    assert refused(cpu, index, NON_CANONICAL)
    assert read(cpu, index) == KERNEL_ADDRESS


def test_what_is_canonical_depends_on_the_paging_levels() -> None:
    cpu = BareCpu(levels=5)
    write(cpu, IA32_LSTAR, NON_CANONICAL)
    assert refused(cpu, IA32_LSTAR, 1 << 56)


@pytest.mark.parametrize("index", [IA32_STAR, IA32_TSC, IA32_SYSENTER_CS])
def test_plain_msrs_hold_64_bits(cpu: BareCpu, index: int) -> None:
    write(cpu, index, 0x8765_4321_0000_0011)
    assert read(cpu, index) == 0x8765_4321_0000_0011


@pytest.mark.parametrize("index", [IA32_FMASK, IA32_TSC_AUX])
def test_fmask_and_tsc_aux_reserve_their_upper_half(cpu: BareCpu, index: int) -> None:
    write(cpu, index, 0xFFFF_FFFF)
    assert refused(cpu, index, 1 << 32)
    assert read(cpu, index) == 0xFFFF_FFFF


def test_pat_takes_the_memory_types_0_1_4_5_6_7_only(cpu: BareCpu) -> None:
    assert read(cpu, IA32_PAT) == PAT_RESET
    for kind in range(256):
        value = PAT_RESET & ~(0xFF << 56) | kind << 56
        if kind in (0, 1, 4, 5, 6, 7):
            write(cpu, IA32_PAT, value)
            assert read(cpu, IA32_PAT) == value
        elif kind < 10 or kind in (0x80, 0x86, 0xFF):
            assert refused(cpu, IA32_PAT, value)


def test_read_only_msrs_refuse_a_change(cpu: BareCpu) -> None:
    for index in (IA32_MTRRCAP, IA32_APIC_BASE, IA32_MISC_ENABLE):
        value = read(cpu, index)
        assert refused(cpu, index, value ^ 1)
        assert read(cpu, index) == value


def test_efer_is_the_mmus_and_its_lma_cannot_be_written(cpu: BareCpu) -> None:
    assert read(cpu, IA32_EFER) == RESET_EFER | Efer.SCE
    write(cpu, IA32_EFER, RESET_EFER & ~Efer.LMA)
    assert cpu.mmu.efer == RESET_EFER


def test_efer_nxe_makes_bit_63_of_a_pte_reserved_when_it_is_cleared(cpu: BareCpu) -> None:
    cpu.set_pte(DATA, DATA | 0x63 | 1 << 63)
    assert cpu.vector_of("mov eax, [rbx]; ud2", rbx=DATA) == (Vector.UD, None)
    write(cpu, IA32_EFER, RESET_EFER & ~Efer.NXE)
    cpu.set_pte(DATA, DATA | 0x63 | 1 << 63)
    assert cpu.vector_of("mov eax, [rbx]", rbx=DATA) == (Vector.PF, 9)


def test_fs_and_gs_bases_are_the_ones_that_instructions_add(cpu: BareCpu) -> None:
    write(cpu, IA32_FS_BASE, DATA)
    write(cpu, IA32_GS_BASE, DATA + 8)
    cpu.put_words(DATA, (0x11, 0x22))
    stop = cpu.run_code("mov rbx, fs:[rsi]; mov rcx, gs:[rsi]; hlt", rsi=0)
    assert isinstance(stop, Halted)
    assert (cpu.reg("rbx"), cpu.reg("rcx")) == (0x11, 0x22)
