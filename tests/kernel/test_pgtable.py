import errno

import numpy as np
import pytest
from kernel_floor import (
    GIB,
    MIB,
    RecordedFlushes,
    RecordedReport,
    flags_of,
    make_floor,
    recorded_fact,
    recorded_facts,
    recorded_walk,
)

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.init_64 import InitMm
from emu.kernel.layout import CPU_ENTRY_AREA_BASE, MODULES_VADDR, PMD_SIZE, make_layout
from emu.kernel.memblock import Memblock
from emu.kernel.page_alloc import PageAllocator
from emu.kernel.pgtable import NOTHING_TO_FLUSH, FlushRange, PgLevel, PgtblMod
from emu.kernel.pgtable_types import FLUSH_EVERYTHING
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.memory import Memory

RECORDED = [("6.12", 4), ("6.12", 5), ("6.1", 4), ("6.1", 5)]


def profile_of(kernel):
    return V6_12 if kernel == "6.12" else V6_1


def flags(found):
    return [flags_of(entry) for entry in found.entries]


def recorded_flags(walk):
    return [flags_of(int(entry, 16)) for entry in walk["e"]]


@pytest.mark.parametrize(("kernel", "levels"), RECORDED)
@pytest.mark.parametrize("what", ["direct_map", "kernel_text", "vmemmap"])
def test_boot_mappings_have_the_entries_of_the_recorded_kernel(kernel, levels, what):
    walk = recorded_walk(f"main-{kernel}-{levels}l", what)
    floor = make_floor(levels, profile=profile_of(kernel))
    where = {"direct_map": int(walk["a"], 16), "vmemmap": int(walk["a"], 16), "kernel_text": floor.layout.kernel_text}
    found = floor.mm.lookup(where[what])
    assert flags(found) == recorded_flags(walk)
    assert f"P{found.level.name[3:]}" == {"PMD": "P2M", "PTE": "P4K"}[walk["end"]]


@pytest.mark.parametrize("what", ["direct_map", "kernel_text", "vmemmap"])
def test_with_page_table_isolation_boot_mappings_are_not_global(what):
    floor = make_floor(pti=True)
    walk = recorded_walk("pti-6.12-4l", what)
    where = floor.layout.kernel_text if what == "kernel_text" else int(walk["a"], 16)
    assert flags(floor.mm.lookup(where)) == recorded_flags(walk)


@pytest.mark.parametrize(("kernel", "levels"), RECORDED)
def test_top_level_entries_are_populated_where_the_recorded_kernel_has_them(kernel, levels):
    runs = [(f["from"], f["to"]) for f in recorded_facts(f"main-{kernel}-{levels}l") if f["t"] == "pgd_run"]
    floor = make_floor(levels, profile=profile_of(kernel))
    if levels == 4:
        # The CPU entry areas are mapped later, by the code that builds them.
        assert (508, 508) in runs
        floor.mm.set_pte(CPU_ENTRY_AREA_BASE, 0)
    populated = np.flatnonzero(floor.memory.table(floor.mm.pgd)).tolist()
    assert populated == [i for first, last in runs for i in range(first, last + 1)]


def test_an_unaligned_kaslr_base_takes_one_more_vmalloc_entry():
    runs = [(f["from"], f["to"]) for f in recorded_facts("kaslr1-6.12-4l") if f["t"] == "pgd_run"]
    assert runs[1][1] - runs[1][0] + 1 == 65
    for seed in range(5):
        floor = make_floor(kaslr=seed)
        first = floor.layout.vmalloc_start >> 39 & 511
        last = floor.layout.vmalloc_end >> 39 & 511
        assert last - first == 64
        assert floor.memory.table(floor.mm.pgd)[first : last + 1].all()
        floor.mm.validate()


def test_before_5_8_the_vmalloc_region_has_no_top_level_entries_at_boot():
    floor = make_floor(profile=V5_4)
    assert not floor.memory.table(floor.mm.pgd)[402:466].any()


def test_the_modules_window_hangs_from_level2_fixmap_with_the_recorded_flags():
    floor = make_floor()
    pfn = floor.pages.alloc_pages(GFP_KERNEL)
    assert not floor.mm.vmap_pages_range_noflush(MODULES_VADDR, MODULES_VADDR + 4096, floor.mm.prots.kernel_rox, np.array([pfn]))
    assert flags(floor.mm.lookup(MODULES_VADDR)) == recorded_flags(recorded_walk("main-6.12-4l", "module_text"))


@pytest.mark.parametrize(("kernel", "levels"), RECORDED)
def test_a_4k_vmalloc_mapping_has_the_entries_of_the_recorded_stack(kernel, levels):
    floor = make_floor(levels, profile=profile_of(kernel))
    la = floor.layout.vmalloc_start + 0x5D0000
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 4)
    assert not floor.mm.vmap_pages_range_noflush(la, la + 0x4000, floor.mm.prots.kernel, pfns)
    name = f"main-{kernel}-{levels}l"
    assert flags(floor.mm.lookup(la)) == recorded_flags(recorded_walk(name, "stack"))
    assert flags(floor.mm.lookup(la - 1)) == recorded_flags(recorded_walk(name, "stack_guard_below"))
    assert flags(floor.mm.lookup(la + 0x4000)) == recorded_flags(recorded_walk(name, "stack_end"))


def test_a_huge_vmap_block_has_the_recorded_leaf():
    walk = next(
        f["first"] for f in recorded_facts("main-6.12-4l") if f["t"] == "huge.walk" and f["how"] == "vmalloc_huge(0x200000)"
    )
    floor = make_floor()
    la = floor.layout.vmalloc_start + 0x2A00000
    head = floor.pages.alloc_pages(GFP_KERNEL, 9)
    assert not floor.mm.vmap_pages_range_noflush(la, la + PMD_SIZE, floor.mm.prots.kernel, np.arange(head, head + 512), 21)
    assert flags(floor.mm.lookup(la)) == recorded_flags(walk)


def test_direct_map_uses_4k_then_2m_then_1g_leaves():
    floor = make_floor(size=4 * GIB)
    base = floor.layout.page_offset
    assert floor.mm.lookup(base + 0x1FF000).level == PgLevel.PG_4K
    assert floor.mm.lookup(base + 2 * MIB).level == PgLevel.PG_2M
    assert floor.mm.lookup(base + GIB - 1).level == PgLevel.PG_2M
    assert floor.mm.lookup(base + GIB).level == PgLevel.PG_1G
    assert floor.mm.lookup(base + 4 * GIB).entry == 0
    leaves = list(floor.mm.leaves(base, base + 5 * GIB))
    assert [level for _, _, level in leaves] == [PgLevel.PG_4K] * 512 + [PgLevel.PG_2M] * 511 + [PgLevel.PG_1G] * 3
    assert [(entry & 0xFFFFFFF000) for _, entry, _ in leaves] == [la - base for la, _, _ in leaves]


def test_without_1g_pages_the_direct_map_has_2m_leaves():
    floor = make_floor(size=2 * GIB, gbpages=False)
    assert floor.mm.lookup(floor.layout.page_offset + GIB).level == PgLevel.PG_2M


def test_direct_map_alias_of_text_and_rodata_is_read_only_wherever_kaslr_puts_the_image():
    for seed in range(5):
        floor = make_floor(size=4 * GIB, kaslr=seed)
        alias = floor.layout.va(floor.layout.kernel_phys)
        writable = [floor.mm.lookup(alias + i * PMD_SIZE).entry & 2 for i in range(-1, 4)]
        assert writable == [2, 0, 0, 0, 2]


@pytest.mark.parametrize("levels", [4, 5])
def test_mapping_then_unmapping_leaves_tables_but_no_leaf_and_owes_a_flush(levels):
    floor = make_floor(levels)
    la = floor.layout.vmalloc_start + 0x3FE000
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1030)
    assert floor.mm.vmap_pages_range_noflush(la, la + (1030 << 12), floor.mm.prots.kernel, pfns) == 0
    assert PgtblMod.PTE in floor.mm.modified
    assert [entry >> 12 & 0xFFFFFFF for _, entry, _ in floor.mm.leaves(la, la + (1030 << 12))] == pfns.tolist()
    assert floor.mm.to_pa(la + 0x5123) == (int(pfns[5]) << 12) + 0x123
    assert floor.mm.vunmap_range_noflush(la, la + (1030 << 12)) == FlushRange(la, la + (1030 << 12))
    assert list(floor.mm.leaves(floor.layout.vmalloc_start, floor.layout.vmalloc_end)) == []
    assert floor.mm.lookup(la).level == PgLevel.PG_4K
    floor.mm.validate()


def test_an_occupied_entry_warns_and_fails_with_enomem_keeping_the_prefix():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 8)
    assert floor.mm.vmap_pages_range_noflush(la + 0x5000, la + 0x6000, floor.mm.prots.kernel, pfns[:1]) == 0
    assert floor.mm.vmap_pages_range_noflush(la, la + 0x8000, floor.mm.prots.kernel, pfns) == -errno.ENOMEM
    assert floor.report.warnings == ["vmap_small_pages_range_noflush:busy"]
    assert [la_ - la for la_, _, _ in floor.mm.leaves(la, la + 0x8000)] == [i << 12 for i in range(6)]


@pytest.mark.parametrize("bad", [-1, 1 << 40])
def test_a_frame_outside_ram_warns_and_fails_keeping_the_prefix(bad):
    floor = make_floor()
    la = floor.layout.vmalloc_start
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 700)
    pfns[600] = bad
    assert floor.mm.vmap_pages_range_noflush(la, la + (700 << 12), floor.mm.prots.kernel, pfns) == -errno.ENOMEM
    assert len(floor.report.warnings) == 1
    assert len(list(floor.mm.leaves(la, la + (700 << 12)))) == 600


def test_out_of_table_memory_midway_keeps_the_mapped_prefix():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1024)
    left = iter([False, False, True])
    floor.pages.should_fail = lambda gfp, order: next(left)
    assert floor.mm.vmap_pages_range_noflush(la, la + 4 * MIB, floor.mm.prots.kernel, pfns) == -errno.ENOMEM
    assert len(list(floor.mm.leaves(la, la + 4 * MIB))) == 512
    assert floor.report.warnings == []


def test_vmap_range_takes_the_largest_leaf_that_address_frame_and_length_allow():
    floor = make_floor(size=4 * GIB)
    la = floor.layout.vmalloc_start + GIB
    assert floor.mm.vmap_range_noflush(la - PMD_SIZE - 4096, la + GIB + 4096, GIB - PMD_SIZE - 4096, 0x163, 30) == 0
    levels = [level for _, _, level in floor.mm.leaves(la - GIB, la + 2 * GIB)]
    assert levels == [PgLevel.PG_4K, PgLevel.PG_2M, PgLevel.PG_1G, PgLevel.PG_4K]
    assert floor.mm.to_pa(la + 0x123456) == GIB + 0x123456
    assert floor.mm.vmap_range_noflush(la + 4 * GIB + 4096, la + 4 * GIB + 4096 + PMD_SIZE, 0, 0x163, 30) == 0
    assert floor.mm.lookup(la + 4 * GIB + PMD_SIZE).level == PgLevel.PG_4K


def test_max_page_shift_bounds_the_leaf():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    assert floor.mm.vmap_range_noflush(la, la + PMD_SIZE, 0, 0x163, 12) == 0
    assert floor.mm.lookup(la).level == PgLevel.PG_4K
    assert floor.mm.vmap_range_noflush(la + GIB, la + 2 * GIB, 0, 0x163, 21) == 0
    assert floor.mm.lookup(la + GIB).level == PgLevel.PG_2M
    assert floor.mm.vmap_range_noflush(la + 2 * GIB, la + 3 * GIB, 0, 0x163, 30) == 0
    assert floor.mm.lookup(la + 2 * GIB).level == PgLevel.PG_1G


def test_a_huge_leaf_over_an_empty_table_flushes_one_page_and_frees_the_table():
    floor = make_floor()
    flushes = floor.mm.tlb = RecordedFlushes()
    la = floor.layout.vmalloc_start
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1)
    floor.mm.vmap_pages_range_noflush(la, la + 4096, 0x163, pfns)
    floor.mm.vunmap_range_noflush(la, la + 4096)
    free = floor.pages.nr_free_pages()
    assert floor.mm.vmap_range_noflush(la, la + PMD_SIZE, 0, 0x163, 21) == 0
    assert flushes.ranges == [(la, la + 4096)]
    assert floor.pages.nr_free_pages() == free + 1
    floor.mm.validate()


def test_remapping_a_mapped_4k_entry_by_physical_address_is_a_bug():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    assert floor.mm.vmap_range_noflush(la, la + 4096, 0, 0x163, 12) == 0
    assert floor.mm.vmap_range_noflush(la, la + 4096, 0, 0x163, 12) == -errno.EBUSY
    assert floor.report.bugs == ["vmap_pte_range"]


def test_unmapping_a_part_of_a_huge_leaf_clears_all_of_it():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    floor.mm.vmap_range_noflush(la, la + PMD_SIZE, 0, 0x163, 21)
    floor.mm.vunmap_range_noflush(la + 4096, la + 8192)
    assert floor.mm.lookup(la).entry == 0


def test_an_empty_range_is_a_bug():
    floor = make_floor()
    la = floor.layout.vmalloc_start
    assert floor.mm.vunmap_range_noflush(la, la) == NOTHING_TO_FLUSH
    assert floor.mm.vmap_range_noflush(la, la, 0, 0x163, 12) == -errno.EINVAL
    assert len(floor.report.bugs) == 2


def test_unmapping_a_hole_of_terabytes_is_quick_and_touches_nothing():
    floor = make_floor()
    before = floor.pages.nr_free_pages()
    floor.mm.vunmap_range_noflush(floor.layout.vmalloc_start, floor.layout.vmalloc_end + 1)
    assert floor.pages.nr_free_pages() == before


def test_set_pte_owes_a_flush_only_when_the_old_entry_was_present():
    floor = make_floor()
    assert floor.mm.set_pte(CPU_ENTRY_AREA_BASE + 0x1000, 0x5121) == NOTHING_TO_FLUSH
    expected = recorded_walk("main-6.12-4l", "cpu_entry_area")
    assert flags(floor.mm.lookup(CPU_ENTRY_AREA_BASE + 0x1000))[:3] == recorded_flags(expected)[:3]
    owed = floor.mm.set_pte(CPU_ENTRY_AREA_BASE + 0x1FFF, 0)
    assert owed == FlushRange(CPU_ENTRY_AREA_BASE + 0x1000, CPU_ENTRY_AREA_BASE + 0x2000)
    floor.pages.should_fail = lambda gfp, order: True
    assert floor.mm.set_pte(CPU_ENTRY_AREA_BASE + GIB, 0x5121) == -errno.ENOMEM


@pytest.mark.parametrize(
    ("file", "profile", "pti"), [("main-6.12-4l", V6_12, False), ("main-6.1-4l", V6_1, False), ("pti-6.12-4l", V6_12, True)]
)
def test_cpu_entry_area_pages_have_the_recorded_entries_global_even_with_isolation(file, profile, pti):
    floor = make_floor(profile=profile, pti=pti)
    floor.mm.cea_set_pte(CPU_ENTRY_AREA_BASE + 0x1000, 0x5000, writable=False)
    assert flags(floor.mm.lookup(CPU_ENTRY_AREA_BASE + 0x1000)) == recorded_flags(recorded_walk(file, "cpu_entry_area"))
    floor.mm.cea_set_pte(CPU_ENTRY_AREA_BASE + 0x2000, 0x6000, writable=True)
    assert floor.mm.lookup(CPU_ENTRY_AREA_BASE + 0x2000).entry == 0x8000000000006163


def test_a_flush_debt_is_paid_once_to_the_right_call():
    flushes = RecordedFlushes()
    FlushRange(0x1000, 0x3000).flush(flushes, "test")
    NOTHING_TO_FLUSH.flush(flushes, "test")
    FLUSH_EVERYTHING.flush(flushes, "test")
    assert flushes.ranges == [(0x1000, 0x3000), None]


def test_1_gib_is_mapped_frame_by_frame_with_4k_leaves_and_block_by_block_with_2m_leaves():
    floor = make_floor(size=4 * GIB)
    small = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, 262144)
    la = floor.layout.vmalloc_start
    assert floor.mm.vmap_pages_range_noflush(la, la + GIB, floor.mm.prots.kernel, small, 12) == 0
    assert floor.mm.vmap_pages_range_noflush(la + GIB, la + 2 * GIB, floor.mm.prots.kernel, np.arange(1 << 18, 2 << 18), 21) == 0
    assert floor.mm.to_pa(la + 0x1234567) == (int(small[0x1234]) << 12) + 0x567
    assert floor.mm.to_pa(la + GIB + 0x1234567) == GIB + 0x1234567


def test_recorded_preallocation_counts_are_ours():
    for levels, count in ((4, 64), (5, 50)):
        floor = make_floor(levels)
        shift = floor.layout.pgdir_shift
        first, last = floor.layout.vmalloc_start >> shift & 511, floor.layout.vmalloc_end >> shift & 511
        assert floor.memory.table(floor.mm.pgd)[first : last + 1].all()
        assert last - first + 1 == count
        recorded = recorded_fact(f"main-6.12-{levels}l", "pgd_vmalloc")
        assert (first, last) == (recorded["idx_start"], recorded["idx_end"])


@pytest.mark.parametrize("nodes", [1, 4, 8])
@pytest.mark.parametrize("levels", [4, 5])
def test_32_mib_are_enough_wherever_kaslr_puts_the_image(levels, nodes):
    for seed in range(20):
        floor = make_floor(levels, size=32 * MIB, nodes=nodes, kaslr=seed)
        floor.mm.validate()
        floor.pages.validate()
        floor.memblock.validate()


def test_ram_that_cannot_hold_the_kernel_image_is_refused():
    with pytest.raises(ValueError, match="kernel image alone ends at 0x1800000"):
        make_floor(size=16 * MIB)


@pytest.mark.parametrize(
    ("left", "what"), [(1, "the kernel's page tables"), (4, "to preallocate the page tables of the vmalloc region")]
)
def test_without_memory_for_tables_boot_says_so(left, what):
    memory = Memory(32 * MIB)
    memblock = Memblock(memory)
    memblock.reserve(0, 32 * MIB - left * 0x1000)
    pages = PageAllocator(memory, memblock)
    init_mm = InitMm(memory, pages, make_layout(4), V6_12, RecordedReport())
    with pytest.raises(MemoryError, match=f"RAM is too small (for )?{what}"):
        init_mm.build(())
