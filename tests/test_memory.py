"""Guest-physical memory: bounds, nodes, devices, and who is told of changed code."""

from __future__ import annotations

import pytest

from emu.memory import MAX_MEMORY, NODE_ALIGN, BusError, Memory, MmioRegion

MIB = 1 << 20


def device(start: int, size: int = 0x1000) -> MmioRegion:
    return MmioRegion(start, size, lambda offset, width: 0, lambda offset, width, value: None)


@pytest.mark.parametrize(
    ("size", "nodes"),
    [(0, 1), (-4 * MIB, 1), (6 * MIB, 1), (MAX_MEMORY + NODE_ALIGN, 1), (4 * MIB, 2), (64 * MIB, 0), (64 * MIB, 9)],
)
def test_a_size_or_node_count_that_cannot_be_is_refused(size: int, nodes: int) -> None:
    with pytest.raises(ValueError):
        Memory(size, nodes)


def test_ram_starts_as_zeros_and_keeps_what_is_stored() -> None:
    memory = Memory(4 * MIB)
    assert memory.read(0x1234, 5) == bytes(5)
    memory.write(0x1FFE, b"abcd")
    memory.write_u64(0x3000, 0x1122334455667788)
    assert memory.read(0x1FFE, 4) == b"abcd"
    assert memory.read_u64(0x3000) == memory.u64[0x3000 >> 3] == 0x1122334455667788
    assert memory.read(0x3000, 1) == b"\x88"
    memory.fill(0x3000, 4, 0xAA)
    assert memory.read_u64(0x3000) == 0x11223344AAAAAAAA


def test_an_access_outside_ram_is_a_bus_error() -> None:
    memory = Memory(4 * MIB)
    for pa, size in ((4 * MIB, 1), (4 * MIB - 1, 2), (-1, 1), (1 << 50, 8)):
        with pytest.raises(BusError) as error:
            memory.read(pa, size)
        assert (error.value.pa, error.value.size) == (pa, size)
        with pytest.raises(BusError):
            memory.write(pa, bytes(size))
        with pytest.raises(BusError):
            memory.fill(pa, size)
    memory.write(4 * MIB - 1, b"x")


def test_words_and_tables_are_aligned() -> None:
    memory = Memory(4 * MIB)
    for refused in (
        lambda: memory.read_u64(4), lambda: memory.write_u64(4, 0), lambda: memory.table(8), lambda: memory.view_u64(4, 1),
    ):
        with pytest.raises(ValueError):
            refused()


def test_a_table_is_a_view_of_512_entries() -> None:
    memory = Memory(4 * MIB)
    table = memory.table(0x5000)
    table[511] = 7
    assert len(table) == 512
    assert memory.read_u64(0x5FF8) == 7


def test_nodes_share_ram_in_order_and_the_last_takes_the_rest() -> None:
    memory = Memory(20 * MIB, 3)
    assert [(node.id, node.start // MIB, node.end // MIB) for node in memory.nodes] == [(0, 0, 4), (1, 4, 8), (2, 8, 20)]
    assert [memory.node_of(pa) for pa in (0, 4 * MIB - 1, 4 * MIB, 20 * MIB - 1)] == [0, 0, 1, 2]
    with pytest.raises(BusError):
        memory.node_of(20 * MIB)


def test_ram_under_a_device_is_not_ram() -> None:
    memory = Memory(4 * MIB)
    memory.overlay_mmio(device(0x8000))
    for pa, size in ((0x8000, 1), (0x7FFC, 8), (0x8FFF, 1), (0, 0x10000)):
        with pytest.raises(BusError):
            memory.read(pa, size)
    assert memory.read(0x7FF8, 8) == memory.read(0x9000, 8) == bytes(8)


@pytest.mark.parametrize(
    ("start", "size"), [(0x8010, 0x1000), (0x8000, 0x800), (0x8000, 0), (MAX_MEMORY, 0x1000), (0x4000, 0x2000)]
)
def test_a_device_that_is_misplaced_or_overlaps_another_is_refused(start: int, size: int) -> None:
    memory = Memory(4 * MIB)
    memory.overlay_mmio(device(0x5000))
    with pytest.raises(ValueError):
        memory.overlay_mmio(device(start, size))


def test_writes_to_frames_of_code_are_told_and_others_are_not() -> None:
    memory = Memory(4 * MIB)
    told: list[int] = []

    class Listener:
        def code_changed(self, frame: int) -> None:
            told.append(frame)

        def code_fetched(self, frame: int) -> None:
            raise AssertionError("nothing was fetched")

    memory.code_listeners.append(Listener())
    memory.code_frames |= {2, 3, 5}
    memory.write(0x1FFF, b"ab")
    memory.fill(0x3000, 0x3000)
    memory.view_u64(0x1000, 512)
    memory.write(0x2000, b"")
    memory.write_u64(0x5000, 1)
    assert told == [2, 3, 5]
