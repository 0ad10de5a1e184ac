"""vmap, vmap_pfn, sparse areas and physical ranges."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from vmap_machine import Kernel, kernel

from emu.kernel.pgtable import PgLevel
from emu.kernel.profile import V6_1, V6_12
from emu.kernel.vm_struct import Vm
from emu.kernel.vmap import PAGE_SPECIAL

PAGE = 4096
PMD = 2 << 20
GIB = 1 << 30
NX = 1 << 63
BOTH = pytest.mark.parametrize("profile", [V6_12, V6_1], ids=lambda profile: profile.name)


def entry(k: Kernel, la: int) -> int:
    return k.mm.lookup(la).entry


@BOTH
def test_vmap_maps_the_frames_in_order_with_a_guard_and_owns_none(profile):
    k = kernel(profile)
    frames = k.frames(3)[::-1].copy()
    la = k.vmap.vmap(frames, 3, Vm.MAP, k.mm.prots.kernel_exec)
    assert [k.vmalloc.vmalloc_to_pfn(la + i * PAGE) for i in range(3)] == frames.tolist()
    assert entry(k, la) & NX
    assert not k.mm.lookup(la + 3 * PAGE).present
    vm = k.vmalloc.find_vm_area(la)
    assert (vm.pages, vm.nr_pages, vm.size) == (None, 0, 4 * PAGE)
    k.vmap.vunmap(la)
    assert all(k.pages.page_count(pfn) == 1 for pfn in frames.tolist())
    assert not k.mm.lookup(la).present
    k.validate()


@BOTH
def test_contiguous_2_mib_of_frames_still_get_4_kib_leaves(profile):
    k = kernel(profile)
    head = k.pages.alloc_pages(0, 9)
    k.pages.split_page(head, 9)
    la = k.vmap.vmap(np.arange(head, head + 512), 512, Vm.MAP, k.mm.prots.kernel)
    assert k.mm.lookup(la).level == PgLevel.PG_4K


@BOTH
def test_vm_no_guard_is_stripped_with_one_warning(profile):
    k = kernel(profile)
    for _ in range(2):
        la = k.vmap.vmap(k.frames(2), 2, Vm.MAP | Vm.NO_GUARD, k.mm.prots.kernel)
        assert k.vmalloc.find_vm_area(la).size == 3 * PAGE
    assert k.task.warnings == ["vmap:no_guard: "]


def test_reset_permissions_are_refused_with_one_warning_since_6_12():
    k = kernel()
    assert k.vmap.vmap(k.frames(1), 1, Vm.MAP | Vm.FLUSH_RESET_PERMS, k.mm.prots.kernel) == 0
    assert k.vmap.vmap(k.frames(1), 1, Vm.MAP | Vm.FLUSH_RESET_PERMS, k.mm.prots.kernel) == 0
    assert k.task.warnings == ["vmap:reset_perms: "]


@BOTH
def test_more_frames_than_memory_or_none_give_null(profile):
    k = kernel(profile)
    assert k.vmap.vmap(k.frames(1), k.pages.totalram_pages() + 1, Vm.MAP, k.mm.prots.kernel) == 0
    assert k.vmap.vmap(k.frames(1), 0, Vm.MAP, k.mm.prots.kernel) == 0
    assert k.addresses("lazy") == []
    assert k.task.warnings == []


@BOTH
def test_a_missing_page_warns_and_the_mapped_part_is_rolled_back_to_lazy(profile):
    k = kernel(profile)
    frames = np.array([*k.frames(1).tolist(), -1])
    assert k.vmap.vmap(frames, 2, Vm.MAP, k.mm.prots.kernel) == 0
    assert k.task.warnings == ["vmap_small_pages_range_noflush: "]
    assert [(end - start) // PAGE for start, end in k.addresses("lazy")] == [3]
    assert k.addresses("busy") == []
    k.validate()


@BOTH
def test_put_pages_hands_frames_and_array_over_on_success_only(profile):
    k = kernel(profile)
    frames = k.frames(2)
    array = k.slab.kmalloc(16)
    flags = Vm.MAP | Vm.MAP_PUT_PAGES
    k.pages.should_fail = lambda gfp, order: True
    assert k.vmap.vmap(frames, 2, flags, k.mm.prots.kernel, pages_la=array) == 0
    k.pages.should_fail = None
    assert k.pages.page_count(int(frames[0])) == 1
    la = k.vmap.vmap(frames, 2, flags, k.mm.prots.kernel, pages_la=array)
    assert k.vmalloc.find_vm_area(la).nr_pages == 2
    used = k.vmalloc.nr_vmalloc_pages
    k.vmalloc.vfree(la)
    assert [k.pages.page_count(pfn) for pfn in frames.tolist()] == [0, 0]
    assert k.vmalloc.nr_vmalloc_pages == used
    with pytest.raises(ValueError, match=r"double free|wild pointer"):
        k.slab.kfree(array)
    k.validate()


@BOTH
def test_vfree_of_a_plain_vmap_keeps_the_frames(profile):
    k = kernel(profile)
    frames = k.frames(1)
    k.vmalloc.vfree(k.vmap.vmap(frames, 1, Vm.MAP, k.mm.prots.kernel))
    assert k.pages.page_count(int(frames[0])) == 1
    assert k.task.warnings == []


def test_vunmap_in_interrupt_is_a_bug():
    k = kernel()
    k.task.in_interrupt = True
    k.vmap.vunmap(0)
    assert k.task.bugs == ["vunmap"]


def test_vmap_pfn_makes_special_entries_of_frames_without_struct_page_only():
    k = kernel()
    outside = k.pages.max_pfn + 0x100
    la = k.vmap.vmap_pfn(np.array([outside, outside + 7]), 2, k.mm.prots.kernel_exec)
    assert entry(k, la) == outside << 12 | k.mm.prots.kernel | PAGE_SPECIAL
    assert k.vmalloc.vmalloc_to_pfn(la + PAGE) == outside + 7
    assert k.vmalloc.find_vm_area(la).flags == Vm.IOREMAP
    assert k.vmap.vmap_pfn(np.array([outside, 5]), 2, k.mm.prots.kernel) == 0
    assert k.task.warnings == ["vmap_pfn_apply: "]


# VM_IOREMAP


@pytest.mark.parametrize(
    ("size", "align"), [(PAGE, PAGE), (3 * PAGE, 4 * PAGE), (PMD, PMD), (PMD + PAGE, 2 * PMD), (3 * GIB, GIB)]
)
def test_an_ioremap_area_is_aligned_to_its_size_up_to_1_gib(size, align):
    k = kernel()
    k.vmalloc.get_vm_area(PAGE, Vm.ALLOC)
    area = k.vmap.alloc_ioremap_area(size, 0x1000)
    assert area.addr % align == 0
    assert area.addr - k.vmalloc.layout.vmalloc_start <= max(align, 2 * PAGE)


@pytest.mark.parametrize(("shift", "size", "level"), [(30, GIB, PgLevel.PG_1G), (12, PMD, PgLevel.PG_4K)])
def test_a_physical_run_gets_leaves_up_to_1_gib_and_4_kib_with_nohugeiomap(shift, size, level):
    k = kernel()
    k.vmap.ioremap_max_page_shift = shift
    area = k.vmap.alloc_ioremap_area(size, 4 * GIB)
    assert k.vmap.ioremap_page_range(area.addr, area.addr + size, 4 * GIB, k.mm.prots.kernel_exec) == 0
    assert k.mm.lookup(area.addr).level == level
    assert entry(k, area.addr) & NX
    assert k.task.warnings == []


def test_an_ioremap_must_be_of_a_whole_ioremap_area():
    k = kernel()
    other = k.vmalloc.get_vm_area(PAGE, Vm.MAP)
    prot = k.mm.prots.kernel
    assert k.vmap.ioremap_page_range(other.addr, other.addr + PAGE, 0, prot) == -errno.EINVAL
    area = k.vmap.alloc_ioremap_area(2 * PAGE, 0)
    assert k.vmap.ioremap_page_range(area.addr, area.addr + PAGE, 0, prot) == -errno.ERANGE
    assert k.vmap.ioremap_page_range(area.addr, area.addr + 2 * PAGE, 0x5000, prot) == 0
    start, end = area.addr, area.addr + 2 * PAGE
    assert k.task.warnings == [
        f"ioremap_page_range: vm_area at addr {other.addr:x} is not marked as VM_IOREMAP",
        f"ioremap_page_range:range: ioremap request [{start:x},{start + PAGE:x}) "
        f"doesn't match vm_area [{start:x}, {end:x})",
    ]


# Sparse areas


def test_a_sparse_area_is_mapped_piece_by_piece_and_unmapped_with_a_flush():
    k = kernel()
    area = k.vmalloc.get_vm_area(8 * PAGE, Vm.SPARSE)
    frames = k.frames(2)
    start, end = area.addr + 2 * PAGE, area.addr + 4 * PAGE
    assert k.vmalloc.vm_area_map_pages(area, start, end, frames) == 0
    assert k.vmalloc.vmalloc_to_pfn(start) == int(frames[0])
    k.vmalloc.vm_area_unmap_pages(area, start, end)
    assert k.task.flushed == [(start, end)]
    assert not k.mm.lookup(start).present


def test_a_bad_sparse_range_is_refused_by_code():
    k = kernel()
    frames = k.frames(1)
    v = k.vmalloc
    area = v.get_vm_area(8 * PAGE, Vm.SPARSE)
    a = area.addr
    assert v.vm_area_map_pages(area, a - PAGE, a, frames) == -errno.ERANGE
    assert v.vm_area_map_pages(area, a + 8 * PAGE, a + 9 * PAGE, frames) == -errno.ERANGE
    assert v.vm_area_map_pages(area, a, a + (1 << 40), frames) == -errno.E2BIG
    other = v.get_vm_area(8 * PAGE, Vm.MAP)
    for _ in range(2):
        assert v.vm_area_map_pages(other, other.addr, other.addr + PAGE, frames) == -errno.EINVAL
    assert len(k.task.warnings) == 1
    v.vm_area_unmap_pages(other, other.addr, other.addr + PAGE)
    assert k.task.flushed == []


# Early areas


def test_early_areas_are_busy_after_vmalloc_init_and_a_bug_later():
    k = kernel()
    from emu.kernel.purge import VmapSpace
    from emu.kernel.vmalloc import Vmalloc

    bounds = (k.vmalloc.layout.vmalloc_start, k.vmalloc.layout.vmalloc_end)
    made = VmapSpace(k.space.design, bounds, k.task, k.task, k.task, k.task)
    v = Vmalloc(made, k.mm, k.slab, k.task, k.task)
    first = v.vm_area_register_early(2 * PAGE, PAGE, Vm.ALLOC)
    second = v.vm_area_add_early(bounds[0] + 4 * PAGE, PAGE, Vm.IOREMAP)
    third = v.vm_area_register_early(2 * PAGE, PAGE, Vm.ALLOC)
    assert [vm.addr - bounds[0] for vm in (first, second, third)] == [0, 4 * PAGE, 2 * PAGE]
    with pytest.raises(ValueError, match="overlaps"):
        v.vm_area_add_early(bounds[0], PAGE, 0)
    v.vmalloc_init()
    assert v.find_vm_area(bounds[0] + PAGE) is first
    made.validate()
    v.vm_area_add_early(bounds[0] + 64 * PAGE, PAGE, 0)
    assert k.task.bugs == ["vm_area_add_early"]


def test_free_vm_area_of_something_else_is_a_bug():
    k = kernel()
    area = k.vmalloc.get_vm_area(PAGE, Vm.ALLOC)
    k.vmalloc.free_vm_area(area)
    assert k.vmalloc.find_vm_area(area.addr) is None
    k.vmalloc.free_vm_area(area)
    assert k.task.bugs == ["free_vm_area"]
