
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_floor import GIB, MIB

from emu.kernel.gfp import GFP_DMA, GFP_DMA32, GFP_KERNEL, Gfp
from emu.kernel.memblock import Memblock, OutOfMemoryAtBoot
from emu.kernel.page_alloc import MAX_PAGE_ORDER, PageAllocator
from emu.memory import Memory


def allocator(size=64 * MIB, nodes=1, reserved=((0, MIB),), **options):
    memory = Memory(size, nodes)
    memblock = Memblock(memory)
    for start, end in reserved:
        memblock.reserve(start, end)
    memblock.validate()
    return PageAllocator(memory, memblock, **options)


def test_all_ram_but_the_reserved_is_free_after_boot():
    pages = allocator(reserved=((0, MIB), (16 * MIB, 24 * MIB), (63 * MIB, 64 * MIB)))
    pages.validate()
    assert pages.totalram_pages() == pages.nr_free_pages() == (64 - 1 - 8 - 1) * 256


@given(st.lists(st.tuples(st.booleans(), st.integers(0, MAX_PAGE_ORDER), st.integers(0, 1 << 30)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_allocations_and_frees_keeps_the_invariants(steps):
    pages = allocator(32 * MIB, 2)
    held = []
    for free, order, choice in steps:
        if free and held:
            pages.free_pages(*held.pop(choice % len(held)))
        else:
            pfn = pages.alloc_pages(GFP_KERNEL, order, choice % 2)
            if pfn is not None:
                assert pfn % (1 << order) == 0
                held.append((pfn, order))
        pages.validate()
    frames = [pfn + i for pfn, order in held for i in range(1 << order)]
    assert len(frames) == len(set(frames)), "no frame is handed out twice"
    assert len(frames) + pages.nr_free_pages() == pages.totalram_pages()
    for pfn, order in held:
        pages.free_pages(pfn, order)
    pages.validate()
    assert pages.free_counts() == allocator(32 * MIB, 2).free_counts(), "everything merges back"


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_bulk_returns_what_as_many_single_allocations_would(orders, count):
    def prepared():
        pages = allocator(16 * MIB, 2)
        blocks = [(pages.alloc_pages(GFP_KERNEL, order), order) for order in orders]
        for block in blocks[::2]:
            pages.free_pages(*block)
        return pages

    bulk, single = prepared(), prepared()
    got = bulk.alloc_pages_bulk(GFP_KERNEL, 0, count)
    assert got.tolist() == [single.alloc_pages(GFP_KERNEL, 0, 0) for _ in range(count)][: len(got)]
    bulk.validate()
    assert bulk.free_counts() == single.free_counts()
    bulk.free_pages_bulk(got)
    bulk.validate()


def test_a_split_keeps_the_lower_half_and_a_free_merges_it_back():
    pages = allocator()
    before = pages.free_counts()
    first = pages.alloc_pages(GFP_KERNEL, 0)
    second = pages.alloc_pages(GFP_KERNEL, 0)
    assert second == first + 1
    pages.free_pages(first)
    pages.free_pages(second)
    assert pages.free_counts() == before


def test_zones_end_at_16_mib_and_4_gib():
    pages = allocator(8 * GIB)
    assert [zone.name for zone in pages.zones[0]] == ["DMA", "DMA32", "Normal"]
    assert pages.alloc_pages(GFP_DMA) < 16 * MIB >> 12
    assert 16 * MIB >> 12 <= pages.alloc_pages(GFP_DMA32) < 4 * GIB >> 12
    assert pages.alloc_pages(GFP_KERNEL) >= 4 * GIB >> 12


def test_a_full_zone_falls_back_to_lower_zones_then_to_the_next_node():
    pages = allocator(64 * MIB, 2)
    node0 = pages.nr_free_pages(0)
    got = pages.alloc_pages_bulk(GFP_KERNEL, 0, node0)
    assert {pages.page_to_nid(int(pfn)) for pfn in (got[0], got[-1])} == {0}
    assert got[-1] < 16 * MIB >> 12
    assert pages.page_to_nid(pages.alloc_pages(GFP_KERNEL, 0, 0)) == 1


def test_thisnode_does_not_fall_back():
    pages = allocator(64 * MIB, 2)
    pages.alloc_pages_bulk(GFP_KERNEL, 1, pages.nr_free_pages(1))
    assert pages.alloc_pages(GFP_KERNEL | Gfp.THISNODE, 0, 1) is None
    assert pages.alloc_pages(GFP_KERNEL, 0, 1) is not None


def test_exhaustion_returns_none_and_a_short_bulk():
    pages = allocator(8 * MIB)
    total = pages.nr_free_pages()
    assert len(pages.alloc_pages_bulk(GFP_KERNEL, 0, total + 5)) == total
    assert pages.alloc_pages(GFP_KERNEL) is None
    assert pages.alloc_pages(GFP_KERNEL, MAX_PAGE_ORDER + 1) is None


def test_zero_clears_frames_that_held_something():
    pages = allocator(8 * MIB)
    pfn = pages.alloc_pages(GFP_KERNEL)
    pages.memory.fill(pfn << 12, 4096, 0xAA)
    pages.free_pages(pfn)
    assert pages.alloc_pages(GFP_KERNEL | Gfp.ZERO) == pfn
    assert not pages.memory.view_u64(pfn << 12, 512).any()
    pages.memory.fill(pfn << 12, 4096, 0xAA)
    pages.free_pages(pfn)
    assert pfn in pages.alloc_pages_bulk(GFP_KERNEL | Gfp.ZERO, 0, 8)
    assert not pages.memory.view_u64(pfn << 12, 512).any()


def test_init_on_alloc_clears_without_being_asked():
    pages = allocator(8 * MIB, init_on_alloc=True)
    pfn = pages.alloc_pages(GFP_KERNEL)
    pages.memory.fill(pfn << 12, 4096, 0xAA)
    pages.free_pages(pfn)
    assert pages.alloc_pages(GFP_KERNEL) == pfn
    assert not pages.memory.view_u64(pfn << 12, 512).any()


def test_a_frame_is_free_when_its_last_reference_goes():
    pages = allocator()
    free = pages.nr_free_pages()
    pfn = pages.alloc_pages(GFP_KERNEL)
    pages.get_page(pfn)
    assert pages.page_count(pfn) == 2
    pages.put_page(pfn)
    assert pages.nr_free_pages() == free - 1
    pages.put_page(pfn)
    assert pages.nr_free_pages() == free


def test_split_page_gives_each_frame_a_reference_of_its_own():
    pages = allocator()
    pfn = pages.alloc_pages(GFP_KERNEL, 2)
    assert [pages.page_count(pfn + i) for i in range(4)] == [1, 0, 0, 0]
    pages.split_page(pfn, 2)
    assert [pages.page_count(pfn + i) for i in range(4)] == [1, 1, 1, 1]
    pages.free_pages_bulk(np.arange(pfn, pfn + 4))
    pages.validate()
    assert pages.nr_free_pages() == pages.totalram_pages()


def test_put_page_of_a_compound_head_frees_the_whole_block():
    pages = allocator()
    pages.put_page(pages.alloc_pages(GFP_KERNEL | Gfp.COMP, 3))
    assert pages.nr_free_pages() == pages.totalram_pages()
    head = pages.alloc_pages(GFP_KERNEL | Gfp.COMP, 3)
    single = pages.alloc_pages(GFP_KERNEL)
    pages.free_pages_bulk(np.array([single, head]))
    assert pages.nr_free_pages() == pages.totalram_pages()


def test_freeing_what_is_not_allocated_is_refused_and_changes_nothing():
    pages = allocator()
    pfn = pages.alloc_pages(GFP_KERNEL)
    pages.free_pages(pfn)
    before = pages.free_counts()
    for bad in (pfn, -1, 1 << 40):
        with pytest.raises(ValueError, match="is not"):
            pages.free_pages(bad)
    with pytest.raises(ValueError, match="not the start of a block"):
        pages.free_pages(pfn | 1, 1)
    one, two = pages.alloc_pages(GFP_KERNEL), pages.alloc_pages(GFP_KERNEL)
    for bad in ([one, one], [one, two, two + 9], [one, 1 << 40]):
        with pytest.raises(ValueError, match="frame"):
            pages.free_pages_bulk(np.array(bad))
    assert pages.page_count(one) == 1
    pages.free_pages_bulk(np.array([one, two]))
    assert pages.free_counts() == before


def test_should_fail_is_asked_once_a_request():
    pages = allocator()
    asked = []
    pages.should_fail = lambda gfp, order: bool(asked.append((gfp, order))) or order == 3
    assert pages.alloc_pages(GFP_KERNEL, 3) is None
    assert pages.alloc_pages(GFP_KERNEL, 2) is not None
    assert len(pages.alloc_pages_bulk(GFP_KERNEL, 0, 7)) == 7
    assert [order for _, order in asked] == [3, 2, 0]


def test_an_unknown_node_is_refused():
    with pytest.raises(ValueError, match="node is 4"):
        allocator(nodes=2).alloc_pages(GFP_KERNEL, 0, 4)


def test_1_gib_of_frames_comes_out_of_1_tib_in_one_bulk_request_without_a_frame_twice():
    pages = allocator(1 << 40, 8)
    taken = pages.alloc_pages_bulk(GFP_KERNEL, 0, 262144)
    assert len(set(taken.tolist())) == 262144


def test_memblock_allocates_top_down_and_refuses_overlaps():
    memory = Memory(64 * MIB)
    memblock = Memblock(memory)
    memblock.reserve(60 * MIB, 64 * MIB)
    assert memblock.alloc(2 * MIB, 2 * MIB, 0) == 58 * MIB
    assert memblock.reserved == [(58 * MIB, 64 * MIB)]
    with pytest.raises(ValueError, match="overlaps"):
        memblock.reserve(59 * MIB, 60 * MIB)
    with pytest.raises(OutOfMemoryAtBoot, match="no room for"):
        memblock.alloc(64 * MIB, 4096, 0)
