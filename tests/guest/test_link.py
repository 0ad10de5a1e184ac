"""Linking: relocations against the psABI's arithmetic, overflow, undefined symbols."""

from __future__ import annotations

import pytest

from emu.guest.error import GuestError
from emu.guest.link import link
from emu.guest.program import Program, Relocation, RelocationType, Section, SectionKind, Symbol

TEXT, DATA = 0xFFFFFFFFC0000000, 0xFFFFFFFFC0100000


def program(kind: RelocationType, addend: int = 0, symbol: Symbol | None = None) -> Program:
    """A patch of `kind` at .text+4 against `symbol` (default: target, .data+8)."""
    return Program(
        "t.o",
        (Section(".text", SectionKind.TEXT, bytes(16), 16, 16), Section(".data", SectionKind.DATA, bytes(16), 16, 8)),
        (Symbol("init_module", 0, 0), symbol or Symbol("target", 1, 8)),
        (Relocation(0, 4, kind, 1, addend),),
        0,
    )


def patched(kind: RelocationType, addend: int = 0, symbol: Symbol | None = None, data: int = DATA) -> bytes:
    linked = link(program(kind, addend, symbol), {SectionKind.TEXT: TEXT, SectionKind.DATA: data}, lambda name: None)
    return linked.images[".text"][1][4:12]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RelocationType.R64, (DATA + 8 + 3).to_bytes(8, "little")),
        (RelocationType.PC32, (DATA + 8 + 3 - TEXT - 4).to_bytes(4, "little") + bytes(4)),
        (RelocationType.PLT32, (DATA + 8 + 3 - TEXT - 4).to_bytes(4, "little") + bytes(4)),
        (RelocationType.PC64, (DATA + 8 + 3 - TEXT - 4).to_bytes(8, "little")),
        (RelocationType.R32S, (DATA + 8 + 3 & 0xFFFFFFFF).to_bytes(4, "little") + bytes(4)),
        (RelocationType.NONE, bytes(8)),
    ],
)
def test_a_relocation_is_the_arithmetic_of_the_psabi(kind: RelocationType, expected: bytes) -> None:
    assert patched(kind, 3) == expected


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (RelocationType.R32, 1 << 32),
        (RelocationType.R32, DATA),
        (RelocationType.R32S, 1 << 31),
        (RelocationType.R32S, (1 << 64) - (1 << 31) - 1),
        (RelocationType.PC32, 0xFFFF888000000000),
        (RelocationType.PLT32, TEXT + 4 + (1 << 31)),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_an_error_that_names_both(kind: RelocationType, value: int) -> None:
    with pytest.raises(GuestError, match=r"R_X86_64_\w+ against far overflows"):
        patched(kind, symbol=Symbol("far", None, value, absolute=True))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (RelocationType.R32, (1 << 32) - 1),
        (RelocationType.R32S, (1 << 31) - 1),
        (RelocationType.R32S, (1 << 64) - (1 << 31)),
        (RelocationType.PC32, TEXT + 4 + (1 << 31) - 1),
    ],
)
def test_the_last_value_that_fits_is_accepted(kind: RelocationType, value: int) -> None:
    expected = (value - (TEXT + 4 if kind is RelocationType.PC32 else 0)) & 0xFFFFFFFF
    assert patched(kind, symbol=Symbol("near", None, value, absolute=True))[:4] == expected.to_bytes(4, "little")


def test_all_undefined_symbols_come_in_one_error_with_their_users() -> None:
    symbols = (Symbol("init_module", 0, 0), Symbol("one", None, 0), Symbol("two", None, 0), Symbol("unused", None, 0))
    relocations = (
        Relocation(0, 1, RelocationType.PLT32, 1, -4),
        Relocation(0, 6, RelocationType.PLT32, 2, -4),
        Relocation(0, 11, RelocationType.PLT32, 1, -4),
    )
    guest = Program("t.o", (Section(".text", SectionKind.TEXT, bytes(16), 16, 1),), symbols, relocations, 0)
    with pytest.raises(GuestError) as error:
        link(guest, {SectionKind.TEXT: TEXT}, lambda name: None)
    assert str(error.value) == (
        "t.o: undefined symbols: one (used by init_module+0x1, init_module+0xb); two (used by init_module+0x6)"
    )


def test_an_undefined_weak_symbol_is_zero() -> None:
    assert patched(RelocationType.R64, symbol=Symbol("maybe", None, 0, weak=True)) == bytes(8)


def test_sections_of_one_kind_share_their_area_and_a_section_can_be_placed_by_name() -> None:
    sections = (
        Section(".text", SectionKind.TEXT, b"\xc3", 1, 1),
        Section(".text.hot", SectionKind.TEXT, b"\x90\xc3", 2, 16),
        Section(".init.text", SectionKind.TEXT, b"\xc3", 1, 1),
    )
    guest = Program("t.o", sections, (Symbol("init_module", 1, 1),), (), 0)
    assert guest.areas()[SectionKind.TEXT].size == 19
    linked = link(guest, {SectionKind.TEXT: TEXT, ".init.text": 0x1000}, lambda name: None)
    assert linked.images == {".text": (TEXT, b"\xc3"), ".text.hot": (TEXT + 16, b"\x90\xc3"), ".init.text": (0x1000, b"\xc3")}
    assert linked.entry == TEXT + 17
    assert linked.where(TEXT + 17) == (".text.hot", 1)


def test_a_kind_without_an_address_and_a_misaligned_address_are_the_callers_mistakes() -> None:
    with pytest.raises(ValueError, match="no address for section"):
        link(program(RelocationType.NONE), {SectionKind.TEXT: TEXT}, lambda name: None)
    with pytest.raises(ValueError, match="not aligned"):
        link(program(RelocationType.NONE), {SectionKind.TEXT: TEXT + 8, SectionKind.DATA: DATA}, lambda name: None)
