"""Whoever watches page tables is told of each change to live entries, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_floor import MIB, Floor, make_floor

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.mm import PAGE_SHARED_DIRTY, Mm
from emu.kernel.set_memory import set_memory_ro

PAGE = 4096
PMD = 2 * MIB
Told = list[tuple[int, int, str, bool]]


def watched_floor() -> tuple[Floor, int, Told]:
    floor = make_floor(size=128 * MIB)
    told: Told = []
    floor.pages.table_changes.tell = lambda *change: told.append(change)
    return floor, floor.layout.vmalloc_start + (1 << 40), told


def test_making_entries_present_is_no_change():
    floor, la, told = watched_floor()
    mm = floor.mm
    assert not mm.vmap_range_noflush(la, la + PMD + PAGE, 16 * MIB, mm.prots.kernel, 21)
    assert not isinstance(mm.set_pte(la + PMD + PAGE, 0x163), int)
    assert not mm.vmap_pages_range_noflush(la + 4 * PMD, la + 4 * PMD + PAGE, mm.prots.kernel, np.array([4096]))
    user = Mm(mm)
    assert not user.map_user(0x40_0000, PAGE, PAGE_SHARED_DIRTY)
    assert told == []


def test_unmapping_tells_its_range_after_the_entries_are_gone():
    floor, la, told = watched_floor()
    mm = floor.mm
    mm.vmap_range_noflush(la, la + 2 * PAGE, 16 * MIB, mm.prots.kernel, 12)
    floor.pages.table_changes.tell = lambda *change: told.append((*change, mm.to_pa(la)))
    mm.vunmap_range_noflush(la, la + 2 * PAGE)
    assert told == [(la, la + 2 * PAGE, "vunmap_range_noflush", True, None)]


def test_a_process_unmapping_user_pages_and_dying_tells_both():
    floor, _, told = watched_floor()
    user = Mm(floor.mm)
    user.map_user(0x40_0000, PAGE, PAGE_SHARED_DIRTY)
    user.unmap_user(0x40_0000, PAGE)
    user.destroy()
    assert told == [(0x40_0000, 0x40_1000, "zap_pte_range", True), (0, 1 << 47, "free_pgtables", False)]


def test_a_changed_entry_is_told_by_the_function_that_changes_it():
    floor, la, told = watched_floor()
    mm = floor.mm
    mm.vmap_range_noflush(la, la + PAGE, 16 * MIB, mm.prots.kernel, 12)
    mm.set_pte(la, 17 * MIB | mm.prots.kernel)
    mm.vunmap_range_noflush(la, la + PAGE)
    mm.vmap_range_noflush(la, la + PMD, 16 * MIB, mm.prots.kernel, 21)
    set_memory_ro(mm, la + PAGE, 1)
    assert [(start, end, function) for start, end, function, _ in told if start >= la] == [
        (la, la + PAGE, "set_pte_vaddr"), (la, la + PAGE, "vunmap_range_noflush"), (la, la + PMD, "pmd_free_pte_page"),
        (la, la + PMD, "__split_large_page"), (la + PAGE, la + 2 * PAGE, "__change_page_attr"),
    ]


@pytest.mark.parametrize("index", [3, 300])
def test_a_changed_top_level_entry_is_told_by_the_canonical_range_that_it_translates(index: int):
    floor, _, told = watched_floor()
    entry_pa = floor.mm.pgd + 8 * index
    floor.memory.write_u64(entry_pa, 0x1000 | 0x63)
    floor.mm.set_pgd(entry_pa, 0x1000 | 0x63)
    floor.mm.set_pgd(entry_pa, 0x2000 | 0x63)
    start = index << 39 | (0xFFFF << 48 if index >= 256 else 0)
    assert told == [(start, start + (1 << 39), "set_pgd", False)]


def test_frames_handed_out_while_an_epoch_lasts_bear_it():
    pages = make_floor(size=128 * MIB).pages
    before = pages.alloc_pages(int(GFP_KERNEL))
    pages.epoch = 5
    one, block = pages.alloc_pages(int(GFP_KERNEL)), pages.alloc_pages(int(GFP_KERNEL), 2)
    many = pages.alloc_pages_bulk(int(GFP_KERNEL), -1, 100).tolist()
    pages.epoch = 0
    assert [pages.handed_out(pfn) for pfn in (before, one, block, block + 3, many[0], many[-1])] == [0, 5, 5, 5, 5, 5]
    assert pages.handed_out(pages.max_pfn) == 0


def test_a_frame_is_free_in_a_listed_block_and_in_never_used_memory_only():
    floor = make_floor(size=128 * MIB)
    pages = floor.pages
    free = sum(pages.is_free(pfn) for pfn in range(pages.max_pfn))
    assert free == pages.nr_free_pages()
    pfn = pages.alloc_pages(int(GFP_KERNEL), 1)
    assert not pages.is_free(pfn) and not pages.is_free(pfn + 1)
    pages.free_pages(pfn, 1)
    assert pages.is_free(pfn) and pages.is_free(pfn + 1)
