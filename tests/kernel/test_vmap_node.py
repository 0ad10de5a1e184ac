"""vmap_nodes: where areas are filed, and the size pools."""

from __future__ import annotations

import pytest
from vmap_machine import VMALLOC_END, VMALLOC_START, space

from emu.kernel.profile import V5_4
from emu.kernel.profile import V6_1 as PROFILE_6_1
from emu.kernel.profile import V6_12 as PROFILE_6_12
from emu.kernel.vmap_area import VmapArea
from emu.kernel.vmap_node import V6_1, V6_12, design_of

PAGE = 4096
ZONE = 16 * PAGE


def pool_starts(node, pages):
    return [(va.va_start - VMALLOC_START) // PAGE for va in node.pool.get(pages - 1, ())]


def pooled(nodes, node, *starts, pages=1):
    """Put areas into a node's pool, given by their first page."""
    for start in starts:
        va = VmapArea(VMALLOC_START + start * PAGE, VMALLOC_START + (start + pages) * PAGE)
        assert nodes.nodes[node].pool_add(va)


@pytest.mark.parametrize(("design", "cpus", "nodes"), [(V6_12, 1, 1), (V6_12, 4, 4), (V6_12, 300, 128), (V6_1, 4, 1)])
def test_there_is_a_node_per_possible_cpu_up_to_128_and_one_before_6_9(design, cpus, nodes):
    made, _ = space(design, cpus)
    assert (made.nodes.nr, made.nodes.zone_size) == (nodes, ZONE if nodes > 1 else 1)


def test_designs_follow_the_kernel_version():
    assert [design_of(profile) for profile in (PROFILE_6_12, PROFILE_6_1, V5_4)] == [V6_12, V6_1, V6_1]


def test_a_busy_area_is_in_the_node_of_its_64_kib_zone():
    made, _ = space(V6_12, 4)
    for zone in range(9):
        addr = VMALLOC_START + zone * ZONE
        assert made.nodes.addr_to_node(addr).id == addr // ZONE % 4
        assert made.nodes.addr_to_node(addr + ZONE - 1).id == addr // ZONE % 4


def test_an_interior_address_in_another_zone_is_found_by_trying_every_node():
    made, _ = space(V6_12, 4)
    va = made.alloc_vmap_area(1 << 20, 1, VMALLOC_START, VMALLOC_END)
    addr = va.va_start + 200 * 1024
    assert made.nodes.addr_to_node(addr) is not made.nodes.addr_to_node(va.va_start)
    assert made.nodes.find(addr) is va
    assert made.nodes.find_unlink(addr) is va
    assert made.nodes.find(va.va_start) is None


def test_the_lowest_area_above_an_address_is_found_across_nodes():
    made, _ = space(V6_12, 4)
    areas = [made.alloc_vmap_area(3 * ZONE, 1, VMALLOC_START, VMALLOC_END) for _ in range(5)]
    assert made.nodes.find_exceed_addr(0) is areas[0]
    assert made.nodes.find_exceed_addr(areas[2].va_end) is areas[3]
    assert made.nodes.find_exceed_addr(areas[4].va_end) is None


def test_flags_hold_the_node_plus_one_above_bit_8_and_0_for_none():
    made, machine = space(V6_12, 4)
    assert [made.nodes.encode_vn_id(node) for node in (0, 3)] == [0x100, 0x400]
    va = VmapArea()
    assert made.nodes.owner(va) is None
    va.flags = 0x401
    assert made.nodes.owner(va).id == 3
    assert machine.warnings == []
    assert made.nodes.encode_vn_id(4) == 0
    va.flags = 0x900
    assert made.nodes.owner(va) is None
    assert machine.warnings == ["encode_vn_id: Encode wrong node id (4)", "decode_vn_id: Decode wrong node id (8)"]


def test_a_pool_is_last_in_first_out():
    made, machine = space(V6_12, 4)
    node = made.nodes.nodes[0]
    pooled(made.nodes, 0, 3, 5)
    va = node.pool_del(PAGE, 1, VMALLOC_START, VMALLOC_END, machine)
    assert va.va_start == VMALLOC_START + 5 * PAGE
    assert pool_starts(node, 1) == [3]


def test_a_misaligned_head_moves_to_the_tail_and_nothing_is_served():
    made, machine = space(V6_12, 4)
    node = made.nodes.nodes[0]
    pooled(made.nodes, 0, 5, 8, 3)
    assert node.pool_del(PAGE, 4 * PAGE, VMALLOC_START, VMALLOC_END, machine) is None
    assert pool_starts(node, 1) == [8, 5, 3]
    assert node.pool_del(PAGE, 4 * PAGE, VMALLOC_START, VMALLOC_END, machine).va_start == VMALLOC_START + 8 * PAGE


def test_areas_of_more_than_256_pages_have_no_pool():
    made, machine = space(V6_12, 4)
    node = made.nodes.nodes[0]
    assert not node.pool_add(VmapArea(VMALLOC_START, VMALLOC_START + 257 * PAGE))
    assert node.pool_add(VmapArea(VMALLOC_START, VMALLOC_START + 256 * PAGE))
    assert node.pool_del(257 * PAGE, 1, VMALLOC_START, VMALLOC_END, machine) is None


def test_a_pooled_area_outside_the_window_is_refused_with_a_warning():
    made, machine = space(V6_12, 4)
    pooled(made.nodes, 0, 3)
    assert made.nodes.nodes[0].pool_del(PAGE, 1, VMALLOC_START + 4 * PAGE, VMALLOC_END, machine) is None
    assert machine.warnings == ["node_pool_del_va: "]


def test_validate_rejects_an_area_in_the_wrong_node_and_one_in_the_wrong_pool():
    made, _ = space(V6_12, 4)
    made.nodes.nodes[1].busy.insert(VmapArea(VMALLOC_START, VMALLOC_START + PAGE))
    with pytest.raises(AssertionError, match="is in node 1"):
        made.nodes.validate()
    made, _ = space(V6_12, 4)
    pooled(made.nodes, 0, 3)
    made.nodes.nodes[0].pool[7] = made.nodes.nodes[0].pool.pop(0)
    with pytest.raises(AssertionError, match="is in pool 7"):
        made.nodes.validate()


