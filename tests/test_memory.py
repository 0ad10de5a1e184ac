"""Guest-physical memory: what a fill leaves behind, for the model and for an engine that maps the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, Uc

from emu.memory import DISCARD_SIZE, PAGE_SIZE, BusError, Memory

MIB = 1 << 20


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("size", [1, PAGE_SIZE, DISCARD_SIZE - 1, DISCARD_SIZE, DISCARD_SIZE + 1, MIB + 12345])
@pytest.mark.parametrize("start", [0, 1, PAGE_SIZE, 2 * PAGE_SIZE + 8, 3 * PAGE_SIZE - 1])
@pytest.mark.parametrize("byte", [0, 0xCC])
def test_a_fill_sets_every_byte_of_its_range_and_no_other(start: int, size: int, byte: int) -> None:
    memory = Memory(4 * MIB)
    memory.write(0, b"\xa5" * (2 * MIB))
    memory.fill(start, size, byte)
    assert memory.read(start, size) == bytes([byte]) * size
    assert memory.read(0, start) == b"\xa5" * start
    assert memory.read(start + size, 16) == b"\xa5" * 16


def test_views_taken_before_a_large_fill_show_its_zeros_and_write_through_afterwards() -> None:
    memory = Memory(4 * MIB)
    table = memory.table(MIB)
    table[:] = 7
    memory.fill(0, 4 * MIB)
    assert not table.any()
    assert memory.u64[MIB >> 3] == 0
    table[3] = 0x1234
    assert memory.read_u64(MIB + 24) == 0x1234


def test_an_engine_that_maps_the_memory_sees_the_zeros_and_its_stores_stay() -> None:
    memory = Memory(4 * MIB)
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    engine.mem_map_ptr(0, 4 * MIB, UC_PROT_ALL, memory.host_address)
    # mov rax, [0x100000]; mov [0x100008], rax; inc qword [0x100010]
    code = bytes.fromhex("48 8b 04 25 00 00 10 00 48 89 04 25 08 00 10 00 48 ff 04 25 10 00 10 00")
    memory.write(0, code)
    memory.write(MIB, b"\xff" * 64)
    engine.emu_start(0, len(code))
    assert memory.read_u64(MIB + 8) == (1 << 64) - 1
    memory.fill(MIB, MIB)
    engine.emu_start(0, len(code))
    assert memory.view_u64(MIB, 3).tolist() == [0, 0, 1]


def test_zeroing_a_large_untouched_range_takes_no_host_memory() -> None:
    memory = Memory(256 * MIB)
    before = resident_pages()
    memory.fill(0, 256 * MIB)
    assert resident_pages() - before < 256


def test_a_large_fill_outside_ram_is_a_bus_error_and_changes_nothing() -> None:
    memory = Memory(4 * MIB)
    memory.write(3 * MIB, b"\xee" * MIB)
    with pytest.raises(BusError):
        memory.fill(3 * MIB, 2 * MIB)
    assert memory.read(3 * MIB, MIB) == b"\xee" * MIB
