"""Descriptor tables: the SDM's byte formats and Linux's values in them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu import descriptors as hw
from emu.kernel import descriptors as linux

GDT = linux.gdt(3, 1, 0xFFFFFE0000003000, 0x4087)


def entry(index: int) -> int:
    return int(struct.unpack_from("<Q", GDT, 8 * index)[0])


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 0),
        (1, 0x00CF9B000000FFFF),
        (2, 0x00AF9B000000FFFF),
        (3, 0x00CF93000000FFFF),
        (4, 0x00CFFB000000FFFF),
        (5, 0x00CFF3000000FFFF),
        (6, 0x00AFFB000000FFFF),
        (7, 0),
        (15, 0x0040F50000001003),
    ],
)
def test_the_gdt_holds_the_words_a_linux_gdt_holds(index: int, value: int) -> None:
    assert entry(index) == value


def test_selectors_are_those_seen_in_oopses() -> None:
    assert (linux.KERNEL_CS, linux.KERNEL_DS, linux.USER_DS, linux.USER_CS, linux.TSS_SELECTOR) == (0x10, 0x18, 0x2B, 0x33, 0x40)


def test_sysret_finds_user_ds_and_user_cs_behind_its_base() -> None:
    base = linux.MSR_STAR_VALUE >> 48
    assert (base + 8, base + 16) == (linux.USER_DS, linux.USER_CS)
    syscall = linux.MSR_STAR_VALUE >> 32 & 0xFFFF
    assert (syscall, syscall + 8) == (linux.KERNEL_CS, linux.KERNEL_DS)


def test_the_tss_descriptor_takes_two_entries_and_is_available() -> None:
    tss = hw.decode_system_segment(GDT[0x40:0x50])
    assert tss == hw.SystemSegment(0xFFFFFE0000003000, 0x4087, hw.SystemType.TSS_AVAILABLE)
    assert GDT[0x4C:0x50] == bytes(4)


def test_kernel_code_is_a_long_mode_segment_and_user_data_is_not_code() -> None:
    kernel_cs, user_ds = hw.decode_segment(entry(2)), hw.decode_segment(entry(5))
    assert (kernel_cs.is_code, kernel_cs.l, kernel_cs.db, kernel_cs.dpl) == (True, True, False, 0)
    assert (user_ds.is_code, user_ds.dpl, user_ds.byte_limit) == (False, 3, 0xFFFFFFFF)


def test_an_interrupt_gate_is_laid_out_as_sdm_figure_6_8() -> None:
    gate = hw.Gate(0xFFFFFFFF81A00B40, 0x10, ist=1, dpl=3)
    data = hw.encode_gate(gate)
    assert data.hex() == "400b100001eea081ffffffff00000000"
    assert hw.decode_gate(data) == gate
    assert gate.clears_if
    assert not hw.Gate(0, 0x10, type=hw.SystemType.TRAP_GATE).clears_if


def test_the_tss_has_rsp0_at_4_ist1_at_36_and_the_map_base_at_102() -> None:
    data = linux.tss(0x1111, (0x2222, 0x3333), 0x4088)
    assert len(data) == hw.TSS_SIZE
    assert struct.unpack_from("<Q", data, 4) == (0x1111,)
    assert struct.unpack_from("<QQQ", data, 36) == (0x2222, 0x3333, 0)
    assert struct.unpack_from("<H", data, 102) == (0x4088,)
    decoded = hw.decode_tss(data)
    assert (decoded.rsp[0], decoded.stack(2)) == (0x1111, 0x3333)


def test_a_tss_has_seven_ist_entries() -> None:
    with pytest.raises(ValueError, match="not 8"):
        linux.tss(0, (0,) * 8, 0)
    with pytest.raises(IndexError, match="IST index 0"):
        hw.Tss().stack(0)


@given(st.integers(0, (1 << 64) - 1))
def test_every_segment_word_survives_decoding(value: int) -> None:
    assert hw.encode_segment(hw.decode_segment(value)) == value


@given(st.binary(min_size=12, max_size=12))
def test_every_gate_without_reserved_bits_survives_decoding(data: bytes) -> None:
    raw = bytearray(data)
    raw[4] &= 7
    raw[5] &= 0xEF
    assert hw.encode_gate(hw.decode_gate(bytes(raw)))[:12] == bytes(raw)


@given(st.binary(max_size=20))
def test_decoders_accept_any_bytes(data: bytes) -> None:
    hw.decode_gate(data)
    hw.decode_tss(data)
    hw.decode_system_segment(data)
    hw.decode_table_register(data)


def test_table_registers_and_selectors_take_apart() -> None:
    register = hw.TableRegister(0xFFFFFE0000000000, 0xFFF)
    assert hw.decode_table_register(hw.encode_table_register(register)) == register
    assert hw.decode_selector(0x2F) == hw.Selector(5, True, 3)


def test_error_codes_name_the_selector_or_the_vector() -> None:
    assert hw.selector_error_code(0x33) == 0x30
    assert hw.selector_error_code(0x33, ext=True) == 0x31
    assert hw.selector_error_code(14, idt=True) == 0x72
