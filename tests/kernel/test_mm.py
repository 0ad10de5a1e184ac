import errno

import numpy as np
import pytest
from kernel_floor import flags_of, make_floor

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.mm import PAGE_READONLY, PAGE_SHARED, Mm


@pytest.mark.parametrize("levels", [4, 5])
def test_kernel_mappings_made_after_an_mm_are_seen_by_it_without_a_write_to_its_pgd(levels):
    floor = make_floor(levels)
    mm, other = Mm(floor.mm), Mm(floor.mm)
    before = floor.memory.read(mm.pgd, 4096)
    la = floor.layout.vmalloc_start + (1 << 40)
    pfn = floor.pages.alloc_pages(GFP_KERNEL)
    assert not floor.mm.vmap_pages_range_noflush(la, la + 4096, floor.mm.prots.kernel, np.array([pfn]))
    assert mm.to_pa(la) == other.to_pa(la) == pfn << 12
    assert floor.memory.read(mm.pgd, 4096) == before


@pytest.mark.parametrize("levels", [4, 5])
def test_a_new_top_level_entry_is_carried_to_every_mm(levels):
    floor = make_floor(levels)
    mm = Mm(floor.mm)
    la = floor.layout.vmemmap_start + floor.layout.pgdir_size
    assert not floor.mm.vmap_range_noflush(la, la + 4096, 0, 0x163, 12)
    assert mm.to_pa(la) == 0


def test_user_pages_are_private_zeroed_and_user_accessible_at_every_level():
    floor = make_floor()
    mm, other = Mm(floor.mm), Mm(floor.mm)
    assert mm.map_user(0x400000, 0x3000, PAGE_SHARED) == 0
    assert [flags_of(entry) for entry in mm.lookup(0x401000).entries] == [0x67, 0x67, 0x67, 0x8000000000000027]
    assert floor.memory.read(mm.to_pa(0x400000), 4096) == bytes(4096)
    assert other.to_pa(0x400000) is None
    assert floor.mm.to_pa(0x400000) is None
    assert mm.map_user(0x402000, 0x1000, PAGE_READONLY) == -errno.EEXIST


def test_a_user_mapping_of_given_frames_does_not_own_them():
    floor = make_floor()
    mm = Mm(floor.mm)
    pfn = floor.pages.alloc_pages(GFP_KERNEL)
    assert mm.map_user(0x10000, 0x1000, PAGE_READONLY, pfn << 12) == 0
    assert mm.to_pa(0x10008) == (pfn << 12) + 8
    mm.destroy()
    assert floor.pages.page_count(pfn) == 1


@pytest.mark.parametrize("levels", [4, 5])
def test_destroy_gives_back_every_frame_and_leaves_the_kernel_half(levels):
    floor = make_floor(levels)
    free = floor.pages.nr_free_pages()
    mm = Mm(floor.mm)
    mm.map_user(0x400000, 0x5000, PAGE_SHARED)
    mm.map_user(0x7FFFFFFF0000, 0x5000, PAGE_SHARED)
    mm.unmap_user(0x400000, 0x1000)
    mm.destroy()
    assert floor.pages.nr_free_pages() == free
    floor.pages.validate()
    floor.mm.validate()


def test_ranges_outside_user_space_are_refused():
    mm = Mm(make_floor().mm)
    for la in (0x7FFFFFFFF000, 0xFFFF888000000000, 0x1001):
        with pytest.raises(ValueError, match="user range"):
            mm.map_user(la, 0x1000, PAGE_SHARED)


def test_without_memory_map_user_is_enomem_and_keeps_nothing():
    floor = make_floor(size=32 << 20)
    mm = Mm(floor.mm)
    free = floor.pages.nr_free_pages()
    assert mm.map_user(0x400000, (free + 1) << 12, PAGE_SHARED) == -errno.ENOMEM
    assert floor.pages.nr_free_pages() == free
