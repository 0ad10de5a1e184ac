import errno

import numpy as np
import pytest
from kernel_floor import RecordedFlushes, flags_of, make_floor, recorded_facts
from vmap_machine import kernel

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.layout import PMD_SIZE
from emu.kernel.pgtable import FlushRange, PgLevel
from emu.kernel.pgtable_types import FLUSH_EVERYTHING, NOTHING_TO_FLUSH
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.kernel.set_memory import (
    set_direct_map_default,
    set_direct_map_invalid,
    set_memory_nx,
    set_memory_ro,
    set_memory_rw,
    set_memory_x,
)


def mapped(profile=V6_12, pages=1):
    floor = make_floor(profile=profile)
    la = floor.layout.vmalloc_start + 0x45000
    pfns = floor.pages.alloc_pages_bulk(GFP_KERNEL, 0, pages)
    assert not floor.mm.vmap_pages_range_noflush(la, la + (pages << 12), floor.mm.prots.kernel, pfns)
    return floor, la, int(pfns[0])


def entry_flags(floor, la):
    return [flags_of(entry) for entry in floor.mm.lookup(la).entries]


def recorded_flags(walk):
    return [flags_of(int(entry, 16)) for entry in walk["e"]]


@pytest.mark.parametrize(("kernel", "profile"), [("6.12", V6_12), ("6.1", V6_1)])
def test_set_memory_ro_and_rw_write_the_recorded_entries(kernel, profile):
    recorded = {f["op"]: f["w"] for f in recorded_facts(f"main-{kernel}-4l") if f["t"] == "set_memory"}
    floor, la, pfn = mapped(profile)
    assert set_memory_ro(floor.mm, la, 1) == (0, FLUSH_EVERYTHING)
    assert entry_flags(floor, la) == recorded_flags(recorded["ro"])
    assert entry_flags(floor, floor.layout.va(pfn << 12)) == recorded_flags(recorded["ro.direct_alias"])
    assert set_memory_rw(floor.mm, la, 1) == (0, FLUSH_EVERYTHING)
    assert entry_flags(floor, la) == recorded_flags(recorded["rw"])


@pytest.mark.parametrize(("kernel", "profile"), [("6.12", V6_12), ("6.1", V6_1)])
def test_set_memory_ro_of_one_page_splits_the_huge_leaf_as_recorded(kernel, profile):
    recorded = {f["t"]: f["w"] for f in recorded_facts(f"main-{kernel}-4l") if f["t"] in ("split", "split_direct")}
    floor = make_floor(profile=profile)
    la = floor.layout.vmalloc_start + PMD_SIZE
    head = floor.pages.alloc_pages(GFP_KERNEL, 9)
    floor.mm.vmap_pages_range_noflush(la, la + PMD_SIZE, floor.mm.prots.kernel, np.arange(head, head + 512), 21)
    assert set_memory_ro(floor.mm, la + 4096, 1) == (0, FLUSH_EVERYTHING)
    assert entry_flags(floor, la + 4096) == recorded_flags(recorded["split"])
    assert entry_flags(floor, floor.layout.va(head + 1 << 12)) == recorded_flags(recorded["split_direct"])
    assert floor.mm.lookup(la).entry == head << 12 | floor.mm.prots.kernel
    assert floor.mm.to_pa(la + PMD_SIZE - 1) == (head << 12) + PMD_SIZE - 1
    floor.mm.validate()


@pytest.mark.parametrize("profile", [V6_12, V6_1, V5_4], ids=lambda profile: profile.name)
def test_nx_alone_changes_no_alias_and_owes_only_its_range_before_6_2(profile):
    floor, la, pfn = mapped(profile)
    before = floor.mm.lookup(floor.layout.va(pfn << 12))
    owed = FLUSH_EVERYTHING if profile is V6_12 else FlushRange(la, la + 4096)
    assert set_memory_x(floor.mm, la, 1) == (0, owed)
    assert not floor.mm.lookup(la).entry >> 63
    assert set_memory_x(floor.mm, la, 1) == (0, NOTHING_TO_FLUSH)
    assert set_memory_nx(floor.mm, la, 1) == (0, owed)
    assert floor.mm.lookup(la).entry >> 63
    assert floor.mm.lookup(floor.layout.va(pfn << 12)) == before


def test_more_than_33_pages_owe_a_flush_of_everything():
    floor, la, _ = mapped(V6_1, pages=34)
    assert set_memory_x(floor.mm, la, 33) == (0, FlushRange(la, la + 33 * 4096))
    assert set_memory_x(floor.mm, la, 34) == (0, FLUSH_EVERYTHING)


@pytest.mark.parametrize("profile", [V6_12, V6_1, V5_4], ids=lambda profile: profile.name)
def test_each_split_is_flushed_at_once_and_the_change_of_a_direct_map_page_owes_its_range(profile):
    floor = make_floor(size=4 << 30, profile=profile)
    flushes = floor.mm.tlb = RecordedFlushes()
    la = floor.layout.va((1 << 30) + 5 * PMD_SIZE + 0x3000)
    assert set_memory_ro(floor.mm, la, 1) == (0, FlushRange(la, la + 4096))
    assert flushes.ranges == [None, None]  # 1 GiB to 2 MiB, 2 MiB to 4 KiB


def test_the_split_of_an_alias_is_flushed_at_once_too():
    floor, la, _ = mapped()
    flushes = floor.mm.tlb = RecordedFlushes()
    assert set_memory_ro(floor.mm, la, 1) == (0, FLUSH_EVERYTHING)
    splits = len(flushes.ranges)
    assert splits and set(flushes.ranges) == {None}
    assert set_memory_rw(floor.mm, la, 1) == (0, FLUSH_EVERYTHING)
    assert len(flushes.ranges) == splits


def test_a_change_of_nothing_but_an_alias_is_not_flushed():
    floor, la, pfn = mapped()
    set_memory_ro(floor.mm, la, 1)
    assert set_memory_rw(floor.mm, floor.layout.va(pfn << 12), 1)[0] == 0
    assert set_memory_ro(floor.mm, la, 1) == (0, NOTHING_TO_FLUSH)
    assert not floor.mm.lookup(floor.layout.va(pfn << 12)).entry & 2


def test_a_change_that_fails_half_way_owes_a_flush_of_everything():
    floor, la, _ = mapped(V6_1, pages=2)
    assert set_memory_x(floor.mm, la, 3) == (-errno.EINVAL, FLUSH_EVERYTHING)


def test_a_whole_large_leaf_is_changed_without_a_split():
    floor = make_floor()
    la = floor.layout.va(PMD_SIZE * 100)
    assert set_memory_ro(floor.mm, la, 512) == (0, FLUSH_EVERYTHING)
    assert floor.mm.lookup(la).level == PgLevel.PG_2M
    assert flags_of(floor.mm.lookup(la).entry) == 0x80000000000001A1


def test_a_1g_leaf_splits_into_2m_leaves_and_one_of_them_into_4k():
    floor = make_floor(size=4 << 30)
    la = floor.layout.va((1 << 30) + 5 * PMD_SIZE + 0x3000)
    assert set_memory_ro(floor.mm, la, 1)[0] == 0
    assert floor.mm.lookup(la).level == PgLevel.PG_4K
    assert floor.mm.lookup(la + PMD_SIZE).level == PgLevel.PG_2M
    assert flags_of(floor.mm.lookup(la + PMD_SIZE).entry) == 0x80000000000001E3
    assert floor.mm.to_pa(la + PMD_SIZE) == la + PMD_SIZE - floor.layout.page_offset


def test_a_frame_out_of_the_direct_map_comes_back_writable():
    floor, _, pfn = mapped()
    la = floor.layout.va(pfn << 12)
    assert set_direct_map_invalid(floor.mm, pfn)[0] == 0
    assert not floor.mm.lookup(la).present
    assert set_direct_map_default(floor.mm, pfn)[0] == 0
    assert flags_of(floor.mm.lookup(la).entry) == 0x8000000000000163


def test_an_unmapped_page_is_einval_and_no_memory_for_a_split_is_enomem():
    floor, la, _ = mapped()
    assert set_memory_ro(floor.mm, la + 4096, 1)[0] == -22
    floor.pages.should_fail = lambda gfp, order: True
    assert set_memory_ro(floor.mm, floor.layout.va(PMD_SIZE * 100), 1)[0] == -12


def test_changing_a_protection_first_flushes_every_lazy_alias():
    k = kernel()
    lazy, kept = k.vmalloc.vmalloc(4096), k.vmalloc.vmalloc(4096)
    k.vmalloc.vfree(lazy)
    assert set_memory_nx(k.mm, kept, 1)[0] == 0
    assert k.space.vmap_lazy_nr == 0
    assert len(k.task.flushed) == 1
    assert k.vmalloc.vmalloc(4096) == lazy
