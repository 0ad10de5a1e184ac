"""Areas for per-CPU chunks: congruent, top-down, all or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmap_machine import VMALLOC_END, VMALLOC_START, Kernel, kernel

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.pcpu_vm_areas import pcpu_free_vm_areas, pcpu_get_vm_areas
from emu.kernel.vm_struct import Vm
from emu.kernel.vmallocinfo import vmallocinfo_rows
from emu.kernel.vmap_area import VmapArea

MIB = 1 << 20
TOP = 0xFFFFE8FFFFE00000


def get(k: Kernel, offsets: list[int], sizes: list[int], align: int = 2 * MIB) -> list[int] | None:
    vms = pcpu_get_vm_areas(k.vmalloc, offsets, sizes, align)
    k.validate()
    return None if vms is None else [vm.addr for vm in vms]


def occupy(k: Kernel, start: int, size: int) -> None:
    assert isinstance(k.space.alloc_vmap_area(size, 1, start, start + size), VmapArea)


def test_C44_both_areas_lie_at_their_distance_as_high_as_they_go_and_have_no_guard():
    k = kernel()
    assert get(k, [0, 64 * MIB], [4 * MIB, 4 * MIB]) == [TOP - 68 * MIB, TOP - 4 * MIB]
    assert get(k, [0, 64 * MIB], [4 * MIB, 4 * MIB]) == [TOP - 72 * MIB, TOP - 8 * MIB]
    assert k.addresses("busy")[0] == (TOP - 72 * MIB, TOP - 68 * MIB)
    row = next(iter(vmallocinfo_rows(k.vmalloc, hex)))
    assert row.endswith("4194304 vmalloc")


def test_the_first_chunk_of_the_recorded_kernel_is_at_its_address():
    k = kernel()
    assert get(k, [0], [2 * MIB]) == [0xFFFFE8FFFFC00000]


def test_an_occupied_place_moves_the_base_down():
    k = kernel()
    occupy(k, TOP - 68 * MIB, 4096)
    assert get(k, [0, 64 * MIB], [4 * MIB, 4 * MIB]) == [TOP - 72 * MIB, TOP - 8 * MIB]


def test_a_chunk_that_was_freed_is_used_again_after_the_purge_only():
    k = kernel()
    vms = pcpu_get_vm_areas(k.vmalloc, [0, 8 * MIB], [2 * MIB, 2 * MIB], 2 * MIB)
    first = [vm.addr for vm in vms]
    assert vms[0].flags == Vm.ALLOC and vms[0].requested_size == 2 * MIB
    pcpu_free_vm_areas(k.vmalloc, vms)
    assert get(k, [0], [2 * MIB]) == [first[1] - 2 * MIB]
    k.blocks.vm_unmap_aliases()
    assert get(k, [0], [2 * MIB]) == [first[1]]


def test_without_room_lazy_areas_are_purged_once_and_then_none_is_taken():
    k = kernel()
    size = 16 << 40
    lower = k.vmalloc.get_vm_area(size, Vm.MAP)
    occupy(k, lower.addr + lower.size, (VMALLOC_END & -4096) - lower.addr - lower.size)
    descriptors = k.space.cache.live
    assert get(k, [0], [2 * MIB]) is None
    k.vmap.vunmap(lower.addr)
    assert get(k, [0], [2 * MIB]) is not None
    assert len(k.task.flushed) == 1
    assert k.space.cache.live <= descriptors + 2


@pytest.mark.parametrize(
    ("offsets", "sizes", "align"),
    [([0], [4096], 3 * 4096), ([0], [4096], 2048), ([4096], [8192], 8192), ([0], [4096], 8192), ([0, 4096], [8192, 4096], 4096)],
)
def test_bad_input_is_a_bug(offsets, sizes, align):
    k = kernel()
    assert get(k, offsets, sizes, align) is None
    assert k.task.bugs == ["pcpu_get_vm_areas"]


def test_more_than_the_region_is_a_warning():
    k = kernel()
    assert get(k, [0, 32 << 40], [2 * MIB, 2 * MIB]) is None
    assert k.task.warnings == ["pcpu_get_vm_areas: "]


def test_a_descriptor_that_cannot_be_had_leaves_nothing_taken():
    for nth in range(4):
        k = kernel()
        k.vmalloc.vmalloc(4096)
        live = k.space.cache.live
        calls = iter(range(99))
        k.space.cache.refuse = lambda gfp, calls=calls, nth=nth: next(calls) == nth
        got = pcpu_get_vm_areas(k.vmalloc, [0, 8 * MIB], [2 * MIB, 2 * MIB], 2 * MIB)
        k.space.cache.refuse = None
        k.validate()
        if got is None:
            assert k.space.cache.live == live
            assert len(k.addresses("busy")) == 1


def highest_base(busy: list[tuple[int, int]], offsets: list[int], sizes: list[int], align: int) -> int | None:
    base = (VMALLOC_END & -align) - max(o + s for o, s in zip(offsets, sizes, strict=True))
    while base >= VMALLOC_START:
        spans = [(base + o, base + o + s) for o, s in zip(offsets, sizes, strict=True)]
        if not any(a < end and start < b for a, b in busy for start, end in spans):
            return base
        base -= align
    return None


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3)), max_size=8),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=3),
)
def test_the_base_is_the_highest_at_which_every_area_is_free(occupied, groups):
    k = kernel()
    top = VMALLOC_END & -(2 * MIB)
    busy = []
    for slot, size in occupied:
        start, end = top - (slot + size) * MIB, top - slot * MIB
        if not any(a < end and start < b for a, b in busy):
            occupy(k, start, end - start)
            busy.append((start, end))
    offsets, sizes, at = [], [], 0
    for gap, size in groups:
        at += gap
        offsets.append(at * 2 * MIB)
        sizes.append(size * 2 * MIB)
        at += size
    offsets = [offset - offsets[0] for offset in offsets]
    wanted = highest_base(busy, offsets, sizes, 2 * MIB)
    assert get(k, offsets, sizes) == [wanted + offset for offset in offsets]


def test_the_vmalloc_family_goes_on_below():
    k = kernel()
    get(k, [0], [2 * MIB])
    assert k.vmalloc.vmalloc_gfp(4096, GFP_KERNEL) == VMALLOC_START
