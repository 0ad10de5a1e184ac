"""Privileged instructions: control registers, descriptor tables, TLB and time, by their pages in SDM vol. 2."""

from __future__ import annotations

import struct

import pytest
from bare_cpu import (
    BASE_CR4,
    CODE,
    DATA,
    GDT,
    GDT_LIMIT,
    HIGH,
    IDT,
    KERNEL_CS,
    KERNEL_SS,
    NON_CANONICAL,
    PML4,
    SPARE,
    STACK,
    TR,
    TSS,
    USER_CODE,
    USER_DATA,
    USER_SS,
    USER_STACK,
    BareCpu,
    Entered,
)

from emu.cpu import Halted
from emu.descriptors import SystemSegment, SystemType, TableRegister, encode_table_register
from emu.exceptions import TripleFault, Vector
from emu.mmu.entry import RW, US, A, D, P
from emu.mmu.fault import PfError
from emu.mmu.registers import RESET_CR0, RESET_EFER, Cr0, Cr4, Efer, Features
from emu.privileged import TSC_STEP

GP0, UD = (Vector.GP, 0), (Vector.UD, None)
MOV_TO_CR0, MOV_TO_CR3, MOV_TO_CR4, MOV_TO_CR8 = b"\x0f\x22\xc0", b"\x0f\x22\xd8", b"\x0f\x22\xe0", b"\x44\x0f\x22\xc0"
WRPKRU, RDPKRU, STAC, CLAC = b"\x0f\x01\xef", b"\x0f\x01\xee", b"\x0f\x01\xcb", b"\x0f\x01\xca"
INVPCID = b"\x66\x0f\x38\x82\x01"  # rax, [rcx]


@pytest.fixture
def cpu() -> BareCpu:
    return BareCpu()


def halts(cpu: BareCpu, source: str | bytes, **registers: int) -> None:
    code = source if isinstance(source, bytes) else source + "; "
    stop = cpu.run_code(code + b"\xf4" if isinstance(code, bytes) else code + "hlt", **registers)
    assert isinstance(stop, Halted), stop


PRIVILEGED = {
    "mov cr0": MOV_TO_CR0, "mov cr2": b"\x0f\x22\xd0", "mov cr3": MOV_TO_CR3, "mov cr4": MOV_TO_CR4, "mov cr8": MOV_TO_CR8,
    "mov from cr0": b"\x0f\x20\xc0", "mov from cr3": b"\x0f\x20\xd8", "mov dr7": b"\x0f\x23\xf8", "mov from dr7": b"\x0f\x21\xf8",
    "clts": b"\x0f\x06", "lmsw": b"\x0f\x01\xf0", "lgdt": b"\x0f\x01\x11", "lidt": b"\x0f\x01\x19", "lldt": b"\x0f\x00\xd0",
    "ltr": b"\x0f\x00\xd8", "invlpg": b"\x0f\x01\x39", "invpcid": INVPCID, "rdmsr": b"\x0f\x32", "wrmsr": b"\x0f\x30",
    "swapgs": b"\x0f\x01\xf8", "hlt": b"\xf4", "cli": b"\xfa", "sti": b"\xfb", "in": b"\xec", "out": b"\xee",
    "insb": b"\x6c", "outsb": b"\x6e", "rdpmc": b"\x0f\x33", "wbinvd": b"\x0f\x09", "invd": b"\x0f\x08",
}


@pytest.mark.parametrize("name", PRIVILEGED)
def test_privileged_instructions_are_gp_at_level_3(cpu: BareCpu, name: str) -> None:
    entered = cpu.run_code(PRIVILEGED[name], 3, rcx=USER_DATA, rax=0)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.GP, 0, USER_CODE)


UNANNOUNCED = {
    "rdrand": b"\x0f\xc7\xf0", "rdseed": b"\x0f\xc7\xf8", "rdpid": b"\xf3\x0f\xc7\xf8", "monitor": b"\x0f\x01\xc8",
    "mwait": b"\x0f\x01\xc9", "xgetbv": b"\x0f\x01\xd0", "xsetbv": b"\x0f\x01\xd1",
    "sysenter": b"\x0f\x34", "sysexit": b"\x0f\x35",
    "mov from cr1": b"\x0f\x20\xc8", "mov to cr5": b"\x0f\x22\xe8", "mov from dr8": b"\x44\x0f\x21\xc0",
    "sgdt register": b"\x0f\x01\xc5", "lgdt register": b"\x0f\x01\xd7", "lock mov cr0": b"\xf0\x0f\x20\xc0",
    "lock invlpg": b"\xf0\x0f\x01\x39",
}


@pytest.mark.parametrize("name", UNANNOUNCED)
@pytest.mark.parametrize("cpl", [0, 3])
def test_what_is_not_announced_or_not_encodable_is_ud(cpu: BareCpu, name: str, cpl: int) -> None:
    entered = cpu.run_code(UNANNOUNCED[name], cpl, rcx=0)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip) == (Vector.UD, USER_CODE if cpl else CODE)


# ---- control registers


@pytest.mark.parametrize(
    "value", [1 << 32, RESET_CR0 & ~Cr0.PG, RESET_CR0 & ~Cr0.PE, RESET_CR0 | Cr0.NW, RESET_CR0 & ~Cr0.PE & ~Cr0.PG]
)
def test_a_cr0_that_64_bit_mode_refuses_is_gp_and_changes_nothing(cpu: BareCpu, value: int) -> None:
    assert cpu.vector_of(MOV_TO_CR0, rax=value) == GP0
    assert cpu.reg("cr0") == RESET_CR0


@pytest.mark.parametrize("bit", [13, 14, 15, 19, 23, 24, 31, 32, 63, 8, 18])
def test_a_reserved_bit_of_cr4_is_gp_and_changes_nothing(cpu: BareCpu, bit: int) -> None:
    assert cpu.vector_of(MOV_TO_CR4, rax=BASE_CR4 | 1 << bit) == GP0
    assert cpu.reg("cr4") == BASE_CR4


def test_pae_and_la57_cannot_change_in_64_bit_mode() -> None:
    for levels in (4, 5):
        cpu = BareCpu(levels=levels, features=Features(la57=True))
        cr4 = cpu.reg("cr4")
        assert cpu.vector_of(MOV_TO_CR4, rax=cr4 & ~Cr4.PAE) == GP0
        assert cpu.vector_of(MOV_TO_CR4, rax=cr4 ^ Cr4.LA57) == GP0
        assert cpu.reg("cr4") == cr4


def test_pcide_needs_pcid_0_and_then_cr3_takes_a_pcid(cpu: BareCpu) -> None:
    assert cpu.vector_of(MOV_TO_CR3, rax=PML4 | 1 << 63) == GP0
    assert cpu.vector_of(MOV_TO_CR3, rax=1 << 40) == GP0
    halts(cpu, MOV_TO_CR3, rax=PML4 | 0x18)
    assert cpu.vector_of(MOV_TO_CR4, rax=BASE_CR4 | Cr4.PCIDE) == GP0
    halts(cpu, MOV_TO_CR3, rax=PML4)
    halts(cpu, MOV_TO_CR4, rax=BASE_CR4 | Cr4.PCIDE)
    halts(cpu, MOV_TO_CR3, rax=PML4 | 0x123 | 1 << 63)
    assert cpu.mmu.pcid == 0x123
    halts(cpu, b"\x0f\x20\xd9")
    assert cpu.reg("rcx") == PML4 | 0x123


def test_mov_cr3_with_bit_63_keeps_the_translations_of_its_pcid(cpu: BareCpu) -> None:
    halts(cpu, MOV_TO_CR4, rax=BASE_CR4 | Cr4.PCIDE)
    cpu.memory.write_u64(DATA, 0x11)
    cpu.memory.write_u64(DATA + 0x1000, 0x22)
    halts(cpu, "mov rdx, [rbx]", rbx=DATA)
    cpu.memory.write_u64(cpu.pte_pa(DATA), DATA + 0x1000 | P | RW | A | D)
    halts(cpu, MOV_TO_CR3 + b"\x48\x8b\x13", rax=PML4 | 1 << 63, rbx=DATA)
    assert cpu.reg("rdx") == 0x11
    halts(cpu, MOV_TO_CR3 + b"\x48\x8b\x13", rax=PML4, rbx=DATA)
    assert cpu.reg("rdx") == 0x22


def test_cr2_holds_any_value_and_cr8_four_bits(cpu: BareCpu) -> None:
    halts(cpu, b"\x0f\x22\xd0\x0f\x20\xd3", rax=NON_CANONICAL)
    assert cpu.cr2 == cpu.reg("rbx") == NON_CANONICAL
    halts(cpu, MOV_TO_CR8 + b"\x44\x0f\x20\xc3", rax=15)
    assert cpu.reg("rbx") == 15
    assert cpu.vector_of(MOV_TO_CR8, rax=16) == GP0
    assert cpu.cr8 == 15


def test_clts_and_lmsw(cpu: BareCpu) -> None:
    halts(cpu, b"\x0f\x01\xf0", rax=Cr0.TS)
    assert cpu.reg("cr0") == RESET_CR0 & ~Cr0.MP | Cr0.TS  # LMSW sets PE but does not clear it
    assert cpu.vector_of("fninit") == (Vector.NM, None)
    halts(cpu, b"\x0f\x06\xdb\xe3")
    assert not cpu.reg("cr0") & Cr0.TS


def test_cr0_wp_takes_effect_at_the_next_write(cpu: BareCpu) -> None:
    cpu.set_pte(DATA, DATA | P | A | D)
    code = MOV_TO_CR0 + b"\x89\x0b" + b"\x48\x0d\x00\x00\x01\x00" + MOV_TO_CR0 + b"\x89\x0b"  # mov [rbx], ecx; or rax, WP
    entered = cpu.run_code(code, rax=RESET_CR0 & ~Cr0.WP, rbx=DATA, rcx=7)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.PF, PfError.P | PfError.W, CODE + len(code) - 2)
    assert cpu.memory.read(DATA, 1) == b"\7"


@pytest.mark.parametrize("bit", [1, 2, 9, 10, 12, 63])
def test_a_reserved_bit_of_efer_is_gp_and_changes_nothing(cpu: BareCpu, bit: int) -> None:
    efer = RESET_EFER | Efer.SCE
    value = efer | 1 << bit
    if bit == 10:
        value = efer & ~Efer.LME
    assert cpu.vector_of("wrmsr", rcx=0xC0000080, rax=value & 0xFFFFFFFF, rdx=value >> 32) == GP0
    assert cpu.reg("efer") == efer


# ---- debug registers


def test_debug_registers_move_and_dr4_is_dr6_unless_cr4_de(cpu: BareCpu) -> None:
    halts(cpu, b"\x0f\x23\xc0\x0f\x21\xc3", rax=0x1234)  # dr0
    assert cpu.reg("rbx") == 0x1234
    halts(cpu, b"\x0f\x21\xe3\x0f\x21\xf1")
    assert cpu.reg("rbx") == cpu.reg("rcx")
    halts(cpu, MOV_TO_CR4, rax=BASE_CR4 | Cr4.DE)
    assert cpu.vector_of(b"\x0f\x21\xe3") == UD
    assert cpu.vector_of(b"\x0f\x23\xf8", rax=1 << 32) == GP0


# ---- UMIP


STORES = {
    "sgdt": b"\x0f\x01\x01", "sidt": b"\x0f\x01\x09", "sldt": b"\x0f\x00\x01", "str": b"\x0f\x00\x09", "smsw": b"\x0f\x01\x21",
}


@pytest.mark.parametrize("name", STORES)
def test_umip_makes_stores_of_system_registers_gp_at_level_3_only(name: str) -> None:
    cpu = BareCpu()
    assert cpu.vector_of(STORES[name] + b"\x0f\x0b", 3, rcx=USER_DATA) == UD
    cpu = BareCpu(cr4=Cr4.UMIP)
    assert cpu.vector_of(STORES[name], 3, rcx=USER_DATA) == GP0
    halts(cpu, STORES[name], rcx=DATA)


def test_system_registers_are_stored_as_they_are(cpu: BareCpu) -> None:
    halts(cpu, STORES["sgdt"], rcx=DATA)
    assert cpu.memory.read(DATA, 10) == encode_table_register(TableRegister(GDT, GDT_LIMIT))
    halts(cpu, STORES["sidt"], rcx=DATA)
    assert cpu.memory.read(DATA, 10) == encode_table_register(TableRegister(IDT, 0xFFF))
    halts(cpu, b"\x0f\x00\xc9\x0f\x00\xc2\x48\x0f\x01\xe3", rcx=-1 & 2**64 - 1, rdx=-1 & 2**64 - 1)
    assert (cpu.reg("rcx"), cpu.reg("rdx"), cpu.reg("rbx")) == (TR, 0, RESET_CR0)
    halts(cpu, b"\x66\x0f\x00\xc9", rcx=-1 & 2**64 - 1)
    assert cpu.reg("rcx") == 2**64 - 0x10000 + TR


def test_a_store_faults_as_a_write_with_the_rights_of_the_program(cpu: BareCpu) -> None:
    assert cpu.vector_of(STORES["sgdt"], 3, rcx=DATA) == (Vector.PF, PfError.P | PfError.W | PfError.U)
    assert cpu.cr2 == DATA
    cpu.unmap(DATA + 0x1000)
    assert cpu.vector_of(STORES["sgdt"], rcx=DATA + 0xFFC) == (Vector.PF, PfError.W)
    assert cpu.cr2 == DATA + 0x1000
    assert cpu.vector_of(STORES["sgdt"], rcx=NON_CANONICAL) == GP0


# ---- LGDT, LIDT, LLDT, LTR


def test_lidt_and_lgdt_need_a_canonical_base(cpu: BareCpu) -> None:
    for code in (PRIVILEGED["lgdt"], PRIVILEGED["lidt"]):
        cpu.memory.write(DATA, encode_table_register(TableRegister(NON_CANONICAL, 0xFFF)))
        assert cpu.vector_of(code, rcx=DATA) == GP0
    assert (cpu.gdtr, cpu.idtr) == (TableRegister(GDT, GDT_LIMIT), TableRegister(IDT, 0xFFF))
    cpu.memory.write(DATA, encode_table_register(TableRegister(IDT + HIGH, 0x1FF)))
    halts(cpu, PRIVILEGED["lidt"], rcx=DATA)
    assert cpu.idtr == TableRegister(IDT + HIGH, 0x1FF)


def test_ltr_takes_an_available_tss_and_marks_it_busy(cpu: BareCpu) -> None:
    cpu.put_system_segment(SPARE, SystemSegment(TSS + HIGH, 0x80, SystemType.TSS_AVAILABLE))
    halts(cpu, PRIVILEGED["ltr"], rax=SPARE)
    assert (cpu.tr, cpu.tss) == (SPARE, TableRegister(TSS + HIGH, 0x80))
    assert cpu.memory.read(GDT + SPARE + 5, 1)[0] & 15 == SystemType.TSS_BUSY
    assert cpu.vector_of(PRIVILEGED["ltr"], rax=SPARE) == (Vector.GP, SPARE)


@pytest.mark.parametrize("code", [PRIVILEGED["ltr"], PRIVILEGED["lldt"]])
def test_ltr_and_lldt_check_their_descriptor(cpu: BareCpu, code: bytes) -> None:
    kind = SystemType.TSS_AVAILABLE if code == PRIVILEGED["ltr"] else SystemType.LDT
    for selector, segment, expected in (
        (KERNEL_SS, None, (Vector.GP, KERNEL_SS)),
        (SPARE | 4, None, (Vector.GP, SPARE | 4)),
        (0x1000, None, (Vector.GP, 0x1000)),
        (SPARE, SystemSegment(DATA, 0xFF, SystemType.CALL_GATE), (Vector.GP, SPARE)),
        (SPARE, SystemSegment(DATA, 0xFF, kind, p=False), (Vector.NP, SPARE)),
        (SPARE, SystemSegment(NON_CANONICAL, 0xFF, kind), (Vector.GP, 0)),
    ):
        if segment is not None:
            cpu.put_system_segment(SPARE, segment)
        assert cpu.vector_of(code, rax=selector) == expected
    assert (cpu.tr, cpu.ldt_selector) == (TR, 0)


def test_a_segment_of_type_9_is_no_tss(cpu: BareCpu) -> None:
    cpu.put_segment(SPARE, 0x00CF99000000FFFF)
    cpu.put_segment(SPARE + 8, 0)
    assert cpu.vector_of(PRIVILEGED["ltr"], rax=SPARE) == (Vector.GP, SPARE)


def test_ltr_of_a_null_selector_is_gp_and_lldt_of_one_empties_the_ldt(cpu: BareCpu) -> None:
    assert cpu.vector_of(PRIVILEGED["ltr"], rax=0) == GP0
    cpu.put_system_segment(SPARE, SystemSegment(DATA, 0xFF, SystemType.LDT))
    cpu.memory.write_u64(DATA + 8, 0x00CF93000000FFFF)
    halts(cpu, PRIVILEGED["lldt"], rax=SPARE)
    halts(cpu, "mov ds, ecx", rcx=0xC)
    halts(cpu, PRIVILEGED["lldt"], rax=0)
    assert cpu.vector_of("mov ds, ecx", rcx=0xC) == (Vector.GP, 0xC)


# ---- segment registers


@pytest.mark.parametrize("name", ["ds", "es", "fs", "gs"])
def test_a_bad_selector_is_gp_with_the_selector(cpu: BareCpu, name: str) -> None:
    assert cpu.vector_of(f"mov {name}, ecx", rcx=0x7F8) == (Vector.GP, 0x7F8)
    assert cpu.vector_of(f"mov {name}, ecx", 3, rcx=KERNEL_SS) == (Vector.GP, KERNEL_SS)
    cpu.put_segment(SPARE, 0x00CF73000000FFFF)
    assert cpu.vector_of(f"mov {name}, ecx", rcx=SPARE) == (Vector.NP, SPARE)


def test_mov_ss_checks_its_selector(cpu: BareCpu) -> None:
    assert cpu.vector_of("mov ss, ecx", 3, rcx=0) == GP0
    assert cpu.vector_of("mov ss, ecx", rcx=USER_SS) == (Vector.GP, USER_SS & ~3)
    cpu.put_segment(SPARE, 0x00CF13000000FFFF)
    assert cpu.vector_of("mov ss, ecx", rcx=SPARE) == (Vector.SS, SPARE)
    halts(cpu, "mov ss, ecx", rcx=0)


def test_mov_ds_at_level_3_reads_the_supervisors_gdt(cpu: BareCpu) -> None:
    assert cpu.vector_of("nop; mov ds, ecx; ud2", 3, rcx=USER_SS) == UD
    assert cpu.reg("ds") == USER_SS


def test_a_program_cannot_read_the_gdt_that_mov_ds_reads(cpu: BareCpu) -> None:
    entered = cpu.run_code("mov ds, ecx; mov eax, [rbx]", 3, rcx=USER_SS, rbx=GDT)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.PF, PfError.P | PfError.U, USER_CODE + 2)


def test_mov_ds_from_a_gdt_in_a_user_page_is_pf_under_smap_whatever_ac_says() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    cpu.memory.write(USER_DATA, cpu.memory.read(GDT, 0x1000))
    cpu.gdtr = TableRegister(USER_DATA, GDT_LIMIT)
    cpu.load_tables()
    cpu.mmu.load_cr4(cpu.reg("cr4") & ~Cr4.SMAP)
    halts(cpu, "mov ds, ecx", rcx=USER_SS)
    cpu.mmu.load_cr4(cpu.reg("cr4") | Cr4.SMAP)
    seen: list[tuple[int, int | None]] = []
    cpu.on_delivery = lambda exception: seen.append((exception.vector, exception.error))
    with pytest.raises(TripleFault):
        cpu.run_code(STAC + b"\x8e\xd9", rcx=USER_SS)
    assert seen[0] == (Vector.PF, PfError.P)


# ---- SMAP, SMEP, protection keys


def test_clac_takes_effect_at_the_next_access() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    code = STAC + b"\x8b\x03\x89\x03" + CLAC + b"\x8b\x03"
    entered = cpu.run_code(code, rbx=USER_DATA)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.PF, PfError.P, CODE + len(code) - 2)
    assert cpu.vector_of(CLAC + b"\x89\x03", rbx=USER_DATA) == (Vector.PF, PfError.P | PfError.W)


def test_stac_and_clac_are_ud_at_level_3() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    for code in (STAC, CLAC):
        assert cpu.vector_of(code, 3) == UD


def test_popf_changes_ac_for_the_next_access() -> None:
    cpu = BareCpu(cr4=Cr4.SMAP)
    entered = cpu.run_code("push 0x40002; popfq; mov eax, [rbx]; push 2; popfq; mov eax, [rbx]", rbx=USER_DATA)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error) == (Vector.PF, PfError.P)
    assert not entered.rflags & 1 << 18


def test_cr4_smap_takes_effect_at_the_next_access(cpu: BareCpu) -> None:
    code = b"\x8b\x13" + MOV_TO_CR4 + b"\x8b\x13"
    entered = cpu.run_code(code, rbx=USER_DATA, rax=BASE_CR4 | Cr4.SMAP)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip) == (Vector.PF, PfError.P, CODE + 5)


def test_smep_refuses_a_user_page_to_the_supervisor_and_not_to_the_user() -> None:
    cpu = BareCpu(cr4=Cr4.SMEP)
    cpu.memory.write(USER_CODE, b"\x0f\x0b")
    assert cpu.vector_of("jmp rbx", rbx=USER_CODE) == (Vector.PF, PfError.P | PfError.I)
    assert cpu.cr2 == USER_CODE
    assert cpu.vector_of("ud2", 3) == UD


def test_wrpkru_takes_effect_at_the_next_access() -> None:
    cpu = BareCpu(cr4=Cr4.PKE)
    cpu.set_pte(USER_DATA, USER_DATA | P | RW | US | A | D | 3 << 59)
    code = b"\x8b\x33\x89\x33" + WRPKRU + b"\x8b\x33\x89\x33"
    entered = cpu.run_code(code, 3, rbx=USER_DATA, rax=2 << 6, rcx=0, rdx=0)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error) == (Vector.PF, PfError.P | PfError.W | PfError.U | PfError.PK)
    assert entered.rip == USER_CODE + 9
    entered = cpu.run_code(WRPKRU + b"\x8b\x33", 3, rbx=USER_DATA, rax=1 << 6, rcx=0, rdx=0)
    assert isinstance(entered, Entered)
    assert entered.error == PfError.P | PfError.U | PfError.PK


def test_pkru_moves_through_eax_and_needs_ecx_and_edx_0() -> None:
    cpu = BareCpu(cr4=Cr4.PKE)
    halts(cpu, WRPKRU + b"\x31\xc0" + RDPKRU, rax=0x55555550, rcx=0, rdx=0)
    assert (cpu.reg("rax"), cpu.reg("rdx")) == (0x55555550, 0)
    cpu.mmu.load_pkru(0)
    assert cpu.vector_of(WRPKRU, rax=0, rcx=1, rdx=0) == GP0
    assert cpu.vector_of(WRPKRU, rax=0, rcx=0, rdx=1) == GP0
    assert cpu.vector_of(RDPKRU, rcx=1) == GP0
    assert BareCpu().vector_of(RDPKRU, rcx=0) == UD


# ---- TLB


def remapped(cpu: BareCpu) -> None:
    """DATA was read while it was 0x11; its PTE now leads to 0x22, and nothing was flushed."""
    cpu.memory.write_u64(DATA, 0x11)
    cpu.memory.write_u64(DATA + 0x1000, 0x22)
    cpu.set_pte(DATA, DATA | P | RW | A | D)
    halts(cpu, "mov rdx, [rbx]", rbx=DATA)
    cpu.memory.write_u64(cpu.pte_pa(DATA), DATA + 0x1000 | P | RW | A | D)
    halts(cpu, "mov rdx, [rbx]", rbx=DATA)


def test_a_stale_translation_lives_until_invlpg(cpu: BareCpu) -> None:
    remapped(cpu)
    assert cpu.reg("rdx") == 0x11
    halts(cpu, b"\x0f\x01\x3b\x48\x8b\x13", rbx=DATA)
    assert cpu.reg("rdx") == 0x22


def test_invlpg_takes_the_whole_addressing_mode_and_no_access(cpu: BareCpu) -> None:
    remapped(cpu)
    halts(cpu, "invlpg [rbx + 8*rcx + 0x10]; mov rdx, [rsi]", rbx=DATA - 0x110, rcx=0x20, rsi=DATA)
    assert cpu.reg("rdx") == 0x22
    halts(cpu, "invlpg [rbx]", rbx=NON_CANONICAL)


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_invpcid_invalidates_by_its_type(cpu: BareCpu, kind: int) -> None:
    remapped(cpu)
    cpu.memory.write(DATA + 0x4000, struct.pack("<QQ", 0, DATA))
    halts(cpu, INVPCID + b"\x48\x8b\x13", rbx=DATA, rcx=DATA + 0x4000, rax=kind)
    assert cpu.reg("rdx") == 0x22


def test_invpcid_refuses_bad_operands(cpu: BareCpu) -> None:
    for kind, pcid, la in (
        (4, 0, 0), (1 << 63, 0, 0), (0, 0x1000, 0), (2, 1 << 63, 0), (0, 1, 0), (1, 1, 0), (0, 0, NON_CANONICAL),
    ):
        cpu.memory.write(DATA, struct.pack("<QQ", pcid, la))
        assert cpu.vector_of(INVPCID, rcx=DATA, rax=kind) == GP0
    cpu.unmap(DATA)
    assert cpu.vector_of(INVPCID, rcx=DATA, rax=2) == (Vector.PF, 0)
    assert cpu.vector_of(INVPCID, rcx=NON_CANONICAL, rax=2) == GP0


def test_invpcid_is_ud_when_it_is_not_announced() -> None:
    assert BareCpu(features=Features(la57=False, invpcid=False)).vector_of(INVPCID, rcx=DATA, rax=2) == UD


# ---- FS and GS


def test_fsgsbase_instructions_need_cr4_fsgsbase(cpu: BareCpu) -> None:
    code = b"\xf3\x48\x0f\xae\xd0\xf3\x48\x0f\xae\xc3"  # wrfsbase rax; rdfsbase rbx
    assert cpu.vector_of(code, rax=5) == UD
    cpu = BareCpu(cr4=Cr4.FSGSBASE)
    assert cpu.vector_of(code + b"\x0f\x0b", 3, rax=0x1234) == UD
    assert cpu.reg("rbx") == 0x1234
    assert cpu.vector_of(code, rax=NON_CANONICAL) == GP0
    halts(cpu, b"\xf3\x0f\xae\xd0\xf3\x48\x0f\xae\xc3", rax=NON_CANONICAL << 8 | 7)
    assert cpu.reg("rbx") == 7


def test_swapgs_exchanges_gs_base_with_its_msr(cpu: BareCpu) -> None:
    cpu.set_reg("gs_base", DATA)
    cpu.set_reg("kernel_gs_base", DATA + 0x1000)
    cpu.memory.write_u64(DATA + 0x1008, 0x77)
    halts(cpu, b"\x0f\x01\xf8\x65\x48\x8b\x04\x25\x08\x00\x00\x00")
    assert (cpu.reg("rax"), cpu.reg("kernel_gs_base")) == (0x77, DATA)


# ---- time, ports


def test_rdtsc_is_virtual_and_the_same_in_every_run() -> None:
    values = []
    for _ in range(2):
        cpu = BareCpu()
        halts(cpu, b"\x0f\x31\x89\xc3\x0f\x31", rdx=-1 & 2**64 - 1)
        values.append((cpu.reg("rbx"), cpu.reg("rax"), cpu.reg("rdx")))
    assert values == [(TSC_STEP, 2 * TSC_STEP, 0)] * 2


def test_rdtsc_with_cr4_tsd_is_gp_at_level_3_only(cpu: BareCpu) -> None:
    assert cpu.vector_of(b"\x0f\x31\x0f\x0b", 3) == UD
    cpu = BareCpu(cr4=Cr4.TSD)
    for code in (b"\x0f\x31", b"\x0f\x01\xf9"):
        assert cpu.vector_of(code, 3) == GP0
        halts(cpu, code)


def test_rdtscp_reads_tsc_aux(cpu: BareCpu) -> None:
    cpu.msrs[0xC0000103] = 9
    halts(cpu, b"\x0f\x01\xf9", rcx=0)
    assert cpu.reg("rcx") == 9


def test_no_port_answers(cpu: BareCpu) -> None:
    for code, value in ((b"\xec", 0x1234_56FF), (b"\x66\xed", 0x1234_FFFF), (b"\xed", 0xFFFF_FFFF)):
        halts(cpu, code + b"\xee", rax=0x1234_5678, rdx=0x60)
        assert cpu.reg("rax") == value


def test_ports_at_level_3_need_iopl_or_a_clear_bit_in_the_tss(cpu: BareCpu) -> None:
    assert cpu.vector_of(b"\xec\x0f\x0b", 3, rflags=0x3002, rdx=0x60) == UD
    cpu.tss = TableRegister(TSS, 0x68 + 0x20)
    cpu.memory.write(TSS + 102, struct.pack("<H", 0x68))
    cpu.memory.write(TSS + 0x68, b"\xff" * 12 + b"\xfe\xff\xff")
    cpu.load_tables()
    assert cpu.vector_of(b"\xec\x0f\x0b", 3, rdx=0x60) == UD
    assert cpu.reg("rax") & 0xFF == 0xFF
    assert cpu.vector_of(b"\xec", 3, rdx=0x61) == GP0
    assert cpu.vector_of(b"\xed", 3, rdx=0x60) == GP0  # the bits of all its ports
    assert cpu.vector_of(b"\xe6\x60\x0f\x0b", 3) == UD
    assert cpu.vector_of(b"\xe6\x61", 3) == GP0
    assert cpu.vector_of(b"\xec", 3, rdx=0x2000) == GP0  # beyond the TSS
    cpu.unmap(USER_DATA)
    assert cpu.vector_of("rep insb", 3, rdx=0x61, rdi=USER_DATA, rcx=4) == GP0


# ---- where the instruction lies


def test_a_privileged_instruction_is_found_across_pages_and_through_prefixes(cpu: BareCpu) -> None:
    for back in range(1, 6):
        entered = cpu.run_code(b"\x66\x66\x66\x48\x0f\x22\xe0", at=CODE + 0x2000 - back, rax=1 << 30)
        assert isinstance(entered, Entered)
        assert (entered.vector, entered.rip) == (Vector.GP, CODE + 0x2000 - back)


def test_a_privileged_instruction_cut_by_an_absent_page_faults_there(cpu: BareCpu) -> None:
    for back in (1, 2):
        cpu.set_pte(CODE + 0x1000, CODE + 0x1000 | P | RW | A | D)
        cpu.memory.write(CODE + 0x1000 - back, MOV_TO_CR3)
        cpu.unmap(CODE + 0x1000)
        entered = cpu.run_code(b"\x90", at=CODE + 0xF00)
        cpu.rip = CODE + 0x1000 - back
        entered = cpu.go_on()
        assert isinstance(entered, Entered)
        assert (entered.vector, entered.error, entered.rip) == (Vector.PF, PfError.I, CODE + 0x1000 - back)
        assert cpu.cr2 == CODE + 0x1000


def test_a_privileged_instruction_is_found_at_every_alias_of_its_page(cpu: BareCpu) -> None:
    assert cpu.vector_of(MOV_TO_CR4, rax=1 << 30) == GP0
    cpu.rip = CODE + HIGH
    entered = cpu.go_on()
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip) == (Vector.GP, CODE + HIGH)
    assert cpu.reg("cr4") == BASE_CR4


def test_a_privileged_instruction_is_found_in_straight_line_from_another_page(cpu: BareCpu) -> None:
    cpu.memory.write(CODE + 0x1000, MOV_TO_CR4)
    entered = cpu.run_code(b"\x48\xff\xc3" * 4, at=CODE + 0x1000 - 12, rax=1 << 30, rbx=0)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, cpu.reg("rbx")) == (Vector.GP, CODE + 0x1000, 4)


def test_rsp_and_stack_operands_are_taken_as_the_program_sees_them(cpu: BareCpu) -> None:
    halts(cpu, "sgdt [rsp - 0x20]")
    assert cpu.memory.read(STACK - 0x20, 10) == encode_table_register(TableRegister(GDT, GDT_LIMIT))
    assert cpu.vector_of("sgdt [rsp]", 3, rsp=NON_CANONICAL) == (Vector.SS, 0)


def test_a_user_page_below_level_3_needs_no_us_bit(cpu: BareCpu) -> None:
    assert cpu.vector_of("mov eax, [rbx]", 3, rbx=STACK) == (Vector.PF, PfError.P | PfError.U)
    assert cpu.vector_of("mov eax, [rbx]; ud2", rbx=USER_STACK) == UD
    assert cpu.reg("cs") == KERNEL_CS
