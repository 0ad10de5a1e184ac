"""Ledger rows about freeing: what is undone at once, what waits, and when the TLBs are flushed."""

from __future__ import annotations

from random import Random

import pytest
from vmap_machine import VMALLOC_START, kernel

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.vm_struct import Vm
from emu.kernel.vmallocinfo import vmallocinfo_rows

PAGE = 4096
PMD = 2 << 20


def test_C36_frames_are_free_before_any_flush_and_debug_pagealloc_flushes_at_once():
    k = kernel()
    la = k.vmalloc.vmalloc(PAGE)
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.vmalloc.vfree(la)
    assert (k.pages.page_count(pfn), k.task.flushed) == (0, [])
    k.vmalloc.debug_pagealloc = True
    la = k.vmalloc.vmalloc(PAGE)
    k.vmalloc.vfree(la)
    assert k.task.flushed == [(la, la + 2 * PAGE)]


def test_C37_ten_frees_flush_nothing_and_count_their_pages_with_guards():
    k = kernel()
    for la in [k.vmalloc.vmalloc(pages * PAGE) for pages in range(1, 11)]:
        k.vmalloc.vfree(la)
    assert k.task.flushed == []
    assert k.space.vmap_lazy_nr == 55 + 10
    assert [row.endswith("unpurged vm_area") for row in vmallocinfo_rows(k.vmalloc, hex)] == [True] * 10


def test_C38_C55_in_task_context_all_is_gone_at_once_and_in_interrupt_all_stays_until_the_worker():
    k = kernel()
    first, second = k.vmalloc.vmalloc(PAGE), k.vmalloc.vmalloc(PAGE)
    k.vmalloc.vfree(first)
    assert not k.mm.lookup(first).present
    assert k.vmalloc.find_vm_area(first) is None
    k.task.in_interrupt = True
    k.vmalloc.vfree(second)
    k.task.in_interrupt = False
    assert k.mm.lookup(second).present
    assert k.vmalloc.find_vm_area(second) is not None
    assert len([row for row in vmallocinfo_rows(k.vmalloc, hex) if "pages=1" in row]) == 1
    k.task.run_work()
    assert not k.mm.lookup(second).present
    assert k.vmalloc.find_vm_area(second) is None


def test_C39_the_drain_is_queued_by_the_first_page_above_the_threshold():
    k = kernel(size=256 << 20)
    assert k.space.lazy_max_pages() == 8192
    k.vmalloc.vfree(k.vmalloc.vmalloc(8191 * PAGE))
    # The area's own array of pages was freed behind it: 15 pages and a guard.
    assert k.space.vmap_lazy_nr == 8192 + 17
    assert len(k.task.work) == 1
    k.task.run_work()
    assert (len(k.task.flushed), k.space.vmap_lazy_nr) == (1, 0)
    for _ in range(16):
        k.vmalloc.vfree(k.vmalloc.vmalloc(511 * PAGE))
    assert (k.space.vmap_lazy_nr, k.task.work) == (8192, [])
    k.vmalloc.vfree(k.vmalloc.vmalloc(PAGE))
    assert len(k.task.work) == 1
    assert len(k.task.flushed) == 1


def test_C40_lazy_addresses_are_not_reused_until_there_is_no_other_room():
    k = kernel()
    first = k.vmalloc.vmalloc(PAGE)
    k.vmalloc.vfree(first)
    assert k.vmalloc.vmalloc(PAGE) != first
    assert k.task.flushed == []
    prot = k.mm.prots.kernel
    again = k.vmalloc.vmalloc_node_range(PAGE, 1, first, first + 2 * PAGE, GFP_KERNEL, prot, 0, -1)
    assert again == first
    assert len(k.task.flushed) == 1


def test_C41_vm_unmap_aliases_flushes_a_dirty_piece_once():
    k = kernel()
    la = k.blocks.vm_map_ram(k.frames(1), 1)
    k.blocks.vm_unmap_ram(la, 1)
    k.blocks.vm_unmap_aliases()
    assert k.task.flushed == [(la, la + PAGE)]
    k.blocks.vm_unmap_aliases()
    assert len(k.task.flushed) == 1


def test_C52_vfree_atomic_in_nmi_is_a_bug():
    k = kernel()
    la = k.vmalloc.vmalloc(PAGE)
    k.task.in_interrupt = k.task.in_nmi = True
    k.vmalloc.vfree(la)
    assert k.task.bugs == ["vfree_atomic"]
    assert k.vmalloc.find_vm_area(la) is not None


def test_C53_deferred_frees_are_listed_through_their_own_memory_and_freed_in_reverse():
    k = kernel()
    made = [k.vmalloc.vmalloc(PAGE) for _ in range(3)]
    k.task.in_interrupt = True
    for la in made:
        k.vmalloc.vfree(la)
    k.task.in_interrupt = False
    assert [k.task.load(la) for la in made] == [0, made[0], made[1]]
    assert len(k.task.work) == 1
    freed = []
    k.space.tracepoint = lambda name, values: freed.append(values[0])
    k.task.run_work()
    assert freed == made[::-1]


def test_C54_the_worker_does_not_flush_either():
    k = kernel()
    la = k.vmalloc.vmalloc(PAGE)
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.vmalloc.vfree_atomic(la)
    assert k.pages.page_count(pfn) == 1
    k.task.run_work()
    assert k.pages.page_count(pfn) == 0
    assert k.task.flushed == []
    assert k.space.vmap_lazy_nr == 2


def test_C56_no_address_is_given_out_again_before_its_flush():
    k = kernel(cpus=4)
    random = Random(56)
    live: list[int] = []
    stale: dict[int, int] = {}
    for _ in range(3000):
        k.task.current = random.randrange(4)
        flushes = len(k.task.flushed)
        if live and random.random() < 0.5:
            la = live.pop(random.randrange(len(live)))
            vm = k.vmalloc.find_vm_area(la)
            for page in range(vm.addr, vm.addr + vm.size, PAGE):
                stale[page] = 1
            k.vmalloc.vfree(la)
        elif random.random() < 0.02:
            k.blocks.vm_unmap_aliases()
        else:
            la = k.vmalloc.vmalloc(random.randrange(1, 6) * PAGE)
            vm = k.vmalloc.find_vm_area(la)
            assert not any(page in stale for page in range(la, la + vm.size, PAGE))
            live.append(la)
        for start, end in k.task.flushed[flushes:]:
            stale = {page: 1 for page in stale if not start <= page < end}
        if len(k.task.flushed) > flushes:
            assert not stale


def test_C57_areas_are_mapped_in_init_mm_s_tables_below_entries_that_every_mm_shares():
    k = kernel()
    top = k.mm.memory.table(k.mm.pgd).copy()
    for size in (1, 600 * PAGE, 5 << 20):
        k.vmalloc.vmalloc(size)
    assert (k.mm.memory.table(k.mm.pgd) == top).all()


def test_C58_a_large_leaf_frees_the_empty_table_in_its_place_with_a_flush_of_one_page():
    k = kernel()
    prot = k.mm.prots.kernel
    start = VMALLOC_START + PMD
    window = (start, start + PMD + PAGE)
    small = k.vmalloc.vmalloc_node_range(PAGE, 1, *window, GFP_KERNEL, prot, 0, -1)
    table = k.mm.lookup(small).entry_pa & -PAGE
    k.vmalloc.vfree(small)
    k.blocks.vm_unmap_aliases()
    k.task.flushed.clear()
    k.mm.tlb = k.task
    huge = k.vmalloc.vmalloc_node_range(PMD, 1, *window, GFP_KERNEL, prot, Vm.ALLOW_HUGE_VMAP, -1)
    assert huge == small == start
    assert k.mm.lookup(huge).entry & 0x80
    assert k.task.flushed == [(start, start + PAGE)]
    assert k.pages.page_count(table // PAGE) == 0


def test_C59_leaves_are_cleared_whole_and_tables_stay():
    k = kernel()
    la = k.vmalloc.vmalloc(3 * PAGE)
    k.vmalloc.vfree(la)
    assert [k.mm.lookup(la + i * PAGE).entry for i in range(4)] == [0] * 4
    k.space.drain()
    free = k.pages.nr_free_pages()
    for _ in range(1000):
        k.vmalloc.vfree(k.vmalloc.vmalloc(PAGE))
        if k.space.vmap_lazy_nr > 100:
            k.space.drain()
    assert k.pages.nr_free_pages() == free


def test_O05_interior_unaligned_unknown_and_double_frees():
    k = kernel()
    la = k.vmalloc.vmalloc(3 * PAGE)
    k.vmalloc.vfree(la + 8)
    assert len(k.task.warnings) == 2
    k.vmalloc.vfree(la + PAGE)
    assert len(k.task.warnings) == 2
    assert k.vmalloc.find_vm_area(la) is None
    k.vmalloc.vfree(la)
    k.vmalloc.vfree(la)
    k.vmalloc.vfree(0)
    assert len(k.task.warnings) == 4


def test_O07_memory_that_resets_permissions_is_flushed_once_before_its_frames_are_free():
    k = kernel()
    la = k.vmalloc.vmalloc(2 * PAGE)
    vm = k.vmalloc.find_vm_area(la)
    vm.flags |= Vm.FLUSH_RESET_PERMS
    frames = vm.pages.tolist()
    held = []
    flush = k.task.flush_tlb_kernel_range
    k.task.flush_tlb_kernel_range = lambda s, e, cause: (held.append([k.pages.page_count(f) for f in frames]), flush(s, e))
    k.vmalloc.vfree(la)
    assert held == [[1, 1]]
    assert k.space.vmap_lazy_nr == 0
    start, end = k.task.flushed[0]
    for la_ in (la, *(k.mm.layout.va(pfn * PAGE) for pfn in frames)):
        assert start <= la_ < end


def test_O12_vrealloc_keeps_its_pages_when_it_shrinks():
    k = kernel()
    la = k.vmalloc.vmalloc(10 * PAGE)
    assert k.vmalloc.vrealloc(la, 2 * PAGE, GFP_KERNEL) == la
    assert k.vmalloc.vrealloc(la, 5 * PAGE, GFP_KERNEL) == la
    assert k.vmalloc.find_vm_area(la).nr_pages == 10


@pytest.mark.parametrize(("start", "end", "code"), [(-1, 0, -34), (7, 9, -34), (0, 1 << 28, -7)])
def test_O13_a_bad_sparse_range_has_its_code(start, end, code):
    k = kernel()
    area = k.vmalloc.get_vm_area(8 * PAGE, Vm.SPARSE)
    got = k.vmalloc.vm_area_map_pages(area, area.addr + start * PAGE, area.addr + end * PAGE, k.frames(1))
    assert got == code
