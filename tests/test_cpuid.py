"""CPUID: what is announced works, and what is not announced is refused (SDM vol. 2A, CPUID)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from bare_cpu import BASE_CR4, DATA, BareCpu

from emu.cpu import Halted
from emu.cpuid import cpuid
from emu.exceptions import Vector
from emu.memory import MAXPHYADDR
from emu.mmu.registers import Cr4, Features

GP0, UD = (Vector.GP, 0), (Vector.UD, None)
NONE = Features(**{field.name: False for field in fields(Features)})
# Leaf, register (EAX EBX ECX EDX), bit of each paging feature.
PLACES = {
    "la57": (7, 2, 16), "pcid": (1, 2, 17), "invpcid": (7, 1, 10), "smep": (7, 1, 7), "smap": (7, 1, 20), "pku": (7, 2, 3),
    "nx": (0x8000_0001, 3, 20), "gbpages": (0x8000_0001, 3, 26),
}
# Leaf, register, bit that announces each bit of CR4.
CR4_PLACES = {
    Cr4.VME: (1, 3, 1), Cr4.PVI: (1, 3, 1), Cr4.TSD: (1, 3, 4), Cr4.DE: (1, 3, 2), Cr4.PSE: (1, 3, 3), Cr4.PAE: (1, 3, 6),
    Cr4.MCE: (1, 3, 7), Cr4.PGE: (1, 3, 13), Cr4.OSFXSR: (1, 3, 24), Cr4.OSXMMEXCPT: (1, 3, 25), Cr4.UMIP: (7, 2, 2),
    Cr4.FSGSBASE: (7, 1, 0), Cr4.PCIDE: (1, 2, 17), Cr4.OSXSAVE: (1, 2, 26), Cr4.SMEP: (7, 1, 7), Cr4.SMAP: (7, 1, 20),
    Cr4.PKE: (7, 2, 3), Cr4.PCE: (0xA, 0, 0), Cr4.LA57: (7, 2, 16),
}
MOV_TO_CR4 = b"\x0f\x22\xe0"


def announced(features: Features, place: tuple[int, int, int]) -> bool:
    leaf, register, bit = place
    highest = cpuid(features, leaf & 0x8000_0000, 0, 0)[0]
    return leaf <= highest and bool(cpuid(features, leaf, 0, 0)[register] >> bit & 1)


@pytest.mark.parametrize("name", PLACES)
def test_a_paging_feature_is_announced_at_its_place_if_the_cpu_has_it(name: str) -> None:
    assert not announced(NONE, PLACES[name])
    with_it = replace(NONE, **{name: True})
    assert announced(with_it, PLACES[name])
    assert [other for other, place in PLACES.items() if announced(with_it, place)] == [name]


@pytest.mark.parametrize("features", [Features(), NONE], ids=["all", "none"])
def test_a_bit_of_cr4_is_allowed_exactly_when_its_feature_is_announced(features: Features) -> None:
    assert set(CR4_PLACES) == set(Cr4)
    for bit, place in CR4_PLACES.items():
        assert bool(features.cr4_bits & bit) == announced(features, place), bit.name


@pytest.mark.parametrize("bit", [Cr4.PCIDE, Cr4.SMEP, Cr4.SMAP, Cr4.PKE, Cr4.OSXSAVE, Cr4.PCE])
def test_mov_to_cr4_refuses_what_is_not_announced(bit: Cr4) -> None:
    cpu = BareCpu(features=NONE)
    assert cpu.vector_of(MOV_TO_CR4, rax=BASE_CR4 | bit) == GP0


@pytest.mark.parametrize("bit", [bit for bit in Cr4 if bit not in (Cr4.LA57, Cr4.OSXSAVE, Cr4.PCE)])
def test_mov_to_cr4_takes_what_is_announced(bit: Cr4) -> None:
    cpu = BareCpu(features=Features())
    stop = cpu.run_code(MOV_TO_CR4 + b"\xf4", rax=BASE_CR4 | bit)
    assert isinstance(stop, Halted)
    assert cpu.reg("cr4") == BASE_CR4 | bit


def test_nxe_is_reserved_without_nx_and_ps_in_a_pdpte_without_gbpages() -> None:
    cpu = BareCpu(features=NONE, efer=0x501)
    assert cpu.vector_of("wrmsr", rcx=0xC0000080, rax=0xD01, rdx=0) == GP0
    for features, expected in ((NONE, (Vector.PF, 9)), (Features(la57=False), UD)):
        cpu = BareCpu(features=features, efer=0x501)
        cpu.memory.write_u64(0x2000 + 8, 0xE3)
        assert cpu.vector_of("mov eax, [rbx]; ud2", rbx=(1 << 30) + DATA) == expected


def test_ospke_follows_cr4() -> None:
    assert not cpuid(Features(), 7, 0, 0)[2] & 1 << 4
    assert cpuid(Features(), 7, 0, Cr4.PKE)[2] & 1 << 4


def test_instructions_that_are_not_announced_are_undefined() -> None:
    cpu = BareCpu()
    for place, code in (
        ((1, 2, 30), b"\x0f\xc7\xf0"),  # RDRAND
        ((7, 1, 18), b"\x0f\xc7\xf8"),  # RDSEED
        ((7, 2, 22), b"\xf3\x0f\xc7\xf8"),  # RDPID
        ((1, 2, 3), b"\x0f\x01\xc8"),  # MONITOR
        ((1, 2, 26), b"\x0f\x01\xd0"),  # XGETBV
        ((1, 3, 11), b"\x0f\x34"),  # SYSENTER
    ):
        assert not announced(cpu.features, place)
        assert cpu.vector_of(code, rcx=0) == UD


def test_widths_are_those_of_the_memory_and_the_paging_levels() -> None:
    assert cpuid(Features(la57=False), 0x8000_0008, 0, 0)[0] == 48 << 8 | MAXPHYADDR
    assert cpuid(Features(la57=True), 0x8000_0008, 0, 0)[0] == 57 << 8 | MAXPHYADDR


def test_an_unknown_leaf_reads_as_the_highest_basic_one() -> None:
    highest = cpuid(Features(), 0, 0, 0)[0]
    for leaf in (highest + 1, 0x4000_0000, 0x8000_0009, 0xFFFF_FFFF):
        assert cpuid(Features(), leaf, 0, 0) == cpuid(Features(), highest, 0, 0)


def test_vendor_and_brand_are_text() -> None:
    _, ebx, ecx, edx = cpuid(Features(), 0, 0, 0)
    assert b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx)) == b"GenuineIntel"
    brand = b"".join(word.to_bytes(4, "little") for n in range(3) for word in cpuid(Features(), 0x8000_0002 + n, 0, 0))
    assert brand.rstrip(b"\0").decode("ascii").startswith("vmemu")


def test_the_instruction_loads_four_registers_of_32_bits() -> None:
    cpu = BareCpu()
    stop = cpu.run_code("cpuid; hlt", 0, rax=7 | 1 << 32, rcx=1 << 32, rbx=-1 & 2**64 - 1, rdx=-1 & 2**64 - 1)
    assert isinstance(stop, Halted)
    assert tuple(cpu.reg(name) for name in ("rax", "rbx", "rcx", "rdx")) == cpuid(cpu.features, 7, 0, cpu.reg("cr4"))
