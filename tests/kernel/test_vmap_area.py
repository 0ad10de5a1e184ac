"""Trees of vmap_areas: search, clipping, merging."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sortedcontainers import SortedDict
from vmap_machine import VMALLOC_END, VMALLOC_START, Machine

from emu.kernel.rbtree import RB_EMPTY
from emu.kernel.vmap_area import ULONG_MAX, FreeVmapAreas, VmapArea, VmapAreaCache, VmapAreaTree

PAGE = 4096


def free_areas(*ranges: tuple[int, int]) -> FreeVmapAreas:
    """Free ranges given in pages above VMALLOC_START."""
    free = FreeVmapAreas(VmapAreaCache(), Machine())
    for start, end in ranges:
        va = free.cache.alloc(0)
        va.va_start, va.va_end = VMALLOC_START + start * PAGE, VMALLOC_START + end * PAGE
        free.insert(va)
    return free


def pages(free: VmapAreaTree) -> list[tuple[int, int]]:
    return [((va.va_start - VMALLOC_START) // PAGE, (va.va_end - VMALLOC_START) // PAGE) for va in free]


def alloc(free: FreeVmapAreas, nr: int, align: int = 1, start: int = 0, end: int | None = None) -> int | None:
    """Address in pages above VMALLOC_START, or None."""
    vend = VMALLOC_END if end is None else VMALLOC_START + end * PAGE
    addr = free.alloc(nr * PAGE, align, VMALLOC_START + start * PAGE, vend)
    free.validate()
    return None if addr == vend else (addr - VMALLOC_START) // PAGE


def alloc_unchecked(free: FreeVmapAreas, nr: int, align: int, start: int, end: int) -> int | None:
    vend = VMALLOC_START + end * PAGE
    addr = free.alloc(nr * PAGE, align, VMALLOC_START + start * PAGE, vend)
    return None if addr == vend else addr


def put(free: FreeVmapAreas, start: int, end: int) -> VmapArea | None:
    va = free.cache.alloc(0)
    va.va_start, va.va_end = VMALLOC_START + start * PAGE, VMALLOC_START + end * PAGE
    merged = free.merge_or_add(va)
    free.validate()
    return merged


def test_a_full_fit_takes_the_range_and_gives_its_descriptor_back():
    free = free_areas((0, 4), (8, 16))
    assert alloc(free, 4) == 0
    assert pages(free) == [(8, 16)]
    assert free.cache.live == 1


def test_a_left_edge_fit_moves_the_start_of_the_same_descriptor():
    free = free_areas((0, 4))
    va = free.first()
    assert alloc(free, 1) == 0
    assert pages(free) == [(1, 4)]
    assert free.first() is va


def test_a_right_edge_fit_moves_the_end():
    free = free_areas((1, 8))
    assert alloc(free, 4, 4 * PAGE) == 4
    assert pages(free) == [(1, 4)]


def test_a_middle_fit_makes_a_descriptor_for_the_lower_rest_and_keeps_the_upper_one():
    free = free_areas((1, 20))
    va = free.first()
    assert alloc(free, 2, 8 * PAGE) == 8
    assert pages(free) == [(1, 8), (10, 20)]
    assert free.last() is va


def test_a_middle_fit_uses_the_cpu_s_spare_before_it_asks_the_slab():
    free = free_areas((1, 20))
    free.preload(0, 0)
    free.cache.refuse = lambda gfp: True
    assert alloc(free, 2, 8 * PAGE) == 8
    assert free.spare == {}
    assert alloc(free, 2, 1, start=14) is None
    assert free.report.warnings == ["va_alloc: "]


def test_page_alignment_takes_the_lowest_range_that_fits():
    free = free_areas((0, 2), (4, 5), (7, 12), (20, 24))
    assert alloc(free, 3) == 7
    assert alloc(free, 1) == 0
    assert alloc(free, 4) == 20


def test_the_window_bounds_the_search_on_both_sides():
    free = free_areas((0, 100))
    assert alloc(free, 4, start=10, end=20) == 10
    assert alloc(free, 20, start=10, end=20) is None
    assert alloc(free, 4, start=8, end=12) is None
    assert alloc(free, 2, start=8, end=12) == 8


def test_a_search_that_meets_vstart_in_the_middle_of_a_range_goes_on_to_the_right():
    free = free_areas((0, 4), (6, 9), (11, 13), (15, 25), (30, 31))
    assert alloc(free, 4, start=7) == 15
    assert alloc(free, 2, start=8) == 11


def test_an_aligned_hole_that_just_fits_is_passed_over_off_the_search_path():
    # The search wants size + align - 1 bytes in a subtree: (8, 12) holds an aligned 4 pages but not that much.
    free = free_areas((8, 12), (16, 18), (33, 48), (64, 80))
    assert alloc(free, 4, 4 * PAGE) == 36
    assert (8, 12) in pages(free)


def test_a_node_on_the_search_path_is_taken_if_it_fits_exactly():
    free = free_areas((8, 12))
    assert alloc(free, 4, 4 * PAGE) == 8


def test_a_window_of_exactly_the_size_is_searched_without_allowance_for_alignment():
    free = free_areas((3, 4), (8, 12), (33, 48))
    assert alloc(free, 4, 4 * PAGE, start=8, end=12) == 8


class Counted(VmapArea):
    """Ends a search that goes round in circles."""

    __slots__ = ()
    left = 0

    def __getattribute__(self, name: str) -> object:
        if name == "va_start":
            Counted.left -= 1
            assert Counted.left > 0, "the search does not end"
        return super().__getattribute__(name)


def test_a_subtree_that_was_searched_in_vain_is_not_entered_again():
    free = FreeVmapAreas(VmapAreaCache(), Machine())
    Counted.left = 10_000
    for start in range(9, 9 + 16 * 8, 8):
        free.insert(Counted(VMALLOC_START + start * PAGE, VMALLOC_START + (start + 4) * PAGE))
    Counted.left = 500
    # Every range is as long as the request, and none holds it at its alignment.
    assert alloc_unchecked(free, 4, 4 * PAGE, 8, 12) is None


def test_arithmetic_near_the_top_of_the_address_space_does_not_wrap():
    free = FreeVmapAreas(VmapAreaCache(), Machine())
    va = VmapArea(ULONG_MAX - 0x4FFF, ULONG_MAX)
    free.insert(va)
    assert free.alloc(PAGE, 1 << 20, VMALLOC_START, ULONG_MAX) == ULONG_MAX
    assert free.alloc(1 << 63, 1 << 62, VMALLOC_START, ULONG_MAX) == ULONG_MAX
    assert free.alloc(2 * PAGE, 1, VMALLOC_START, ULONG_MAX) == ULONG_MAX - 0x4FFF


def test_a_freed_range_joins_both_neighbours_that_it_touches():
    free = free_areas((0, 2), (4, 6))
    assert put(free, 2, 4) is free.first()
    assert pages(free) == [(0, 6)]
    assert free.cache.live == 1
    put(free, 8, 9)
    put(free, 7, 8)
    put(free, 6, 7)
    assert pages(free) == [(0, 9)]


def test_an_overlapping_range_is_refused_with_linux_s_warning():
    free = free_areas((0, 4))
    assert put(free, 2, 6) is None
    assert free.report.warnings == [
        f"find_va_links: vmalloc bug: {VMALLOC_START + 2 * PAGE:#x}-{VMALLOC_START + 6 * PAGE:#x} "
        f"overlaps with {VMALLOC_START:#x}-{VMALLOC_START + 4 * PAGE:#x}"
    ]
    assert pages(free) == [(0, 4)]


def test_unlinking_an_area_that_is_in_no_tree_is_a_warning():
    tree = VmapAreaTree(VmapAreaCache(), Machine())
    tree.unlink(VmapArea(0, PAGE))
    assert tree.report.warnings == ["__unlink_va: "]


def test_find_and_find_exceed_addr_at_the_edges_of_areas():
    tree = VmapAreaTree(VmapAreaCache(), Machine())
    low, high = VmapArea(0x1000, 0x3000), VmapArea(0x8000, 0x9000)
    tree.insert(high)
    tree.insert(low)
    assert [tree.find(addr) for addr in (0xFFF, 0x1000, 0x2FFF, 0x3000)] == [None, low, low, None]
    assert [tree.find_exceed_addr(addr) for addr in (0, 0x2FFF, 0x3000, 0x9000)] == [low, low, high, None]


def test_detached_areas_are_in_order_and_in_no_tree():
    tree = VmapAreaTree(VmapAreaCache(), Machine())
    for start in (5, 1, 3):
        tree.insert(VmapArea(start, start + 1))
    areas = tree.detach()
    assert [va.va_start for va in areas] == [1, 3, 5]
    assert all(va.rb_color == RB_EMPTY and va.list_next is None for va in areas)
    assert tree.first() is None
    tree.validate()


class AgainstIntervals(RuleBasedStateMachine):
    """The free tree against a sorted map of free intervals: same ranges always, same answers for page alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.free = free_areas((0, 2000))
        self.oracle = SortedDict({0: 2000})
        self.taken: dict[int, int] = {}

    def cut(self, start: int, nr: int) -> None:
        at, end = next((s, e) for s, e in self.oracle.items() if s <= start and start + nr <= e)
        del self.oracle[at]
        if at < start:
            self.oracle[at] = start
        if start + nr < end:
            self.oracle[start + nr] = end
        self.taken[start] = nr

    @rule(nr=st.integers(1, 40), start=st.integers(0, 300))
    def alloc_lowest(self, nr: int, start: int) -> None:
        wanted = next((max(s, start) for s, e in self.oracle.items() if max(s, start) + nr <= e), None)
        assert alloc(self.free, nr, 1, start) == wanted
        if wanted is not None:
            self.cut(wanted, nr)

    @rule(nr=st.integers(1, 40), shift=st.integers(1, 6))
    def alloc_aligned(self, nr: int, shift: int) -> None:
        align = 1 << shift
        base = VMALLOC_START // PAGE
        fits = [a for s, e in self.oracle.items() if (a := -(-(base + s) // align) * align - base) + nr <= e]
        surely = any(e - s >= nr + align for s, e in self.oracle.items())
        got = alloc(self.free, nr, align * PAGE)
        assert got in fits or (got is None and not surely)
        if got is not None:
            self.cut(got, nr)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.taken)))
        end = start + self.taken.pop(start)
        put(self.free, start, end)
        end = self.oracle.pop(end, end)
        below = self.oracle.bisect_left(start) - 1
        if below >= 0 and self.oracle.peekitem(below)[1] == start:
            start = self.oracle.popitem(below)[0]
        self.oracle[start] = end

    @invariant()
    def same_intervals(self) -> None:
        assert pages(self.free) == list(self.oracle.items())
        assert self.free.cache.live == len(self.oracle)


TestAgainstIntervals = AgainstIntervals.TestCase
TestAgainstIntervals.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
