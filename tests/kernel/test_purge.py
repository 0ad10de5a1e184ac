"""Lazy areas, the purge, and what an allocation does without room."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vmap_machine import VMALLOC_END, VMALLOC_START, Machine, space

from emu.kernel.purge import VmapSpace
from emu.kernel.vmap_area import ULONG_MAX, FreeVmapAreas, VmapArea
from emu.kernel.vmap_events import tracepoint_text
from emu.kernel.vmap_node import V6_1, V6_12

PAGE = 4096
BOTH = pytest.mark.parametrize("design", [V6_12, V6_1], ids=["6.12", "6.1"])


def alloc(made: VmapSpace, nr: int, align: int = 1, start: int = VMALLOC_START, end: int = VMALLOC_END) -> VmapArea:
    va = made.alloc_vmap_area(nr * PAGE, align, start, end)
    assert isinstance(va, VmapArea), va
    return va


def free(made: VmapSpace, va: VmapArea) -> None:
    """What remove_vm_area does around the lazy list."""
    if made.design.sharded:
        assert made.nodes.find_unlink(va.va_start) is va
    made.free_vmap_area_noflush(va)


def first_page(va: VmapArea) -> int:
    return (va.va_start - VMALLOC_START) // PAGE


@pytest.mark.parametrize(("cpus", "pages"), [(1, 8192), (2, 16384), (3, 16384), (4, 24576), (8, 32768), (64, 57344)])
def test_lazy_max_pages_is_32_mib_times_the_bit_length_of_the_number_of_cpus(cpus, pages):
    assert space(V6_12, cpus)[0].lazy_max_pages() == pages


@BOTH
def test_a_freed_area_is_lazy_and_out_of_reach_of_the_next_request(design):
    made, machine = space(design)
    va = alloc(made, 3)
    free(made, va)
    assert made.vmap_lazy_nr == 3
    assert first_page(alloc(made, 3)) == 3
    assert machine.flushed == []
    made.validate()


@BOTH
def test_a_purge_flushes_once_from_the_lowest_to_the_highest_lazy_address(design):
    made, machine = space(design, 4)
    areas = [alloc(made, 20) for _ in range(6)]
    for i in (4, 1):
        free(made, areas[i])
    assert made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert machine.flushed == [(areas[0].va_end, areas[5].va_start)]
    assert made.vmap_lazy_nr == 0
    assert not made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert len(machine.flushed) == 1
    made.validate()


def test_up_to_6_8_lazy_areas_that_touch_become_one():
    made, _ = space(V6_1)
    areas = [alloc(made, 2) for _ in range(4)]
    for i in (0, 2, 1):
        free(made, areas[i])
    assert [(va.va_end - va.va_start) // PAGE for va in made.nodes.nodes[0].lazy] == [6]
    made.validate()


def test_since_6_9_lazy_areas_that_touch_stay_apart():
    made, _ = space(V6_12)
    areas = [alloc(made, 2) for _ in range(3)]
    for va in areas:
        free(made, va)
    assert len(list(made.nodes.nodes[0].lazy)) == 3


def test_a_purge_returns_areas_ascending_up_to_6_8_and_descending_since(monkeypatch):
    seen: list[int] = []
    real = FreeVmapAreas.merge_or_add
    monkeypatch.setattr(FreeVmapAreas, "merge_or_add", lambda self, va: seen.append(first_page(va)) or real(self, va))
    for design, wanted in ((V6_1, [0, 2, 4]), (V6_12, [4, 2, 0])):
        seen.clear()
        made, _ = space(design)
        areas = [alloc(made, 1) for _ in range(6)]
        for i in (4, 0, 2):
            free(made, areas[i])
        made.purge_vmap_area_lazy(ULONG_MAX, 0)
        assert seen == wanted


@BOTH
def test_the_drain_is_queued_only_above_the_threshold_and_once(design):
    made, machine = space(design)
    free(made, alloc(made, 8192))
    assert machine.work == []
    free(made, alloc(made, 1))
    free(made, alloc(made, 1))
    assert len(machine.work) == 1
    assert machine.flushed == []
    machine.run_work()
    assert (len(machine.flushed), made.vmap_lazy_nr) == (1, 0)
    free(made, alloc(made, 8193))
    assert len(machine.work) == 1
    made.validate()


# Pools


def test_purged_areas_go_to_the_pool_of_the_cpu_that_asked_for_them_highest_first_out():
    made, machine = space(V6_12, 4)
    machine.current = 2
    areas = [alloc(made, 5) for _ in range(8)]
    machine.current = 0
    for va in areas:
        free(made, va)
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert len(made.nodes.nodes[2].pool[4]) == 8
    assert first_page(alloc(made, 5)) == 40
    machine.current = 2
    descriptors = made.cache.live
    assert first_page(alloc(made, 5)) == 35
    assert made.cache.live == descriptors
    assert first_page(alloc(made, 5, end=VMALLOC_END - 1)) == 45
    made.validate()


@pytest.mark.parametrize(("before", "after"), [(8, 6), (4, 3), (3, 0), (1, 0), (9, 7)])
def test_each_purge_takes_a_quarter_of_a_pool_and_all_of_a_pool_of_less_than_4(before, after):
    made, _ = space(V6_12, 4)
    areas = [alloc(made, 5) for _ in range(2 * before)]
    for va in areas[::2]:
        free(made, va)
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert len(made.nodes.nodes[0].pool[4]) == before
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert len(made.nodes.nodes[0].pool.get(4, ())) == after
    made.validate()


def test_a_full_reclaim_empties_the_pools_and_does_not_fill_them():
    made, _ = space(V6_12, 4)
    areas = [alloc(made, 5) for _ in range(9)]
    for va in areas:
        free(made, va)
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    free(made, alloc(made, 7))
    made.reclaim_and_purge()
    assert made.nodes.nodes[0].pool == {}
    assert [va.va_start for va in made.free] == [1]


def test_an_area_for_another_range_has_no_node_and_goes_back_to_the_free_tree():
    made, _ = space(V6_12, 4)
    va = alloc(made, 5, start=VMALLOC_START + 64 * PAGE)
    assert made.nodes.owner(va) is None
    free(made, va)
    assert next(iter(made.nodes.addr_to_node(va.va_start).lazy)) is va
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert [node.pool for node in made.nodes.nodes] == [{}] * 4


def test_above_the_threshold_helpers_take_the_first_nodes_and_come_last():
    made, machine = space(V6_12, 4)
    big = 300
    for cpu in range(4):
        machine.current = cpu
        for va in [alloc(made, big) for _ in range(60)]:
            free(made, va)
    assert made.vmap_lazy_nr // made.lazy_max_pages() == 2
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert (made.vmap_lazy_nr, len(machine.flushed)) == (0, 1)
    made.validate()


# Exhaustion


@BOTH
def test_without_room_one_purge_makes_lazy_addresses_available(design):
    made, machine = space(design, 2)
    window = (VMALLOC_START, VMALLOC_START + 4 * PAGE)
    va = alloc(made, 4, 1, *window)
    start = va.va_start
    free(made, va)
    assert alloc(made, 4, 1, *window).va_start == start
    assert len(machine.flushed) == 1
    made.validate()


@BOTH
def test_notifiers_are_asked_after_the_purge_as_long_as_they_free_something(design):
    made, machine = space(design)
    window = (VMALLOC_START, VMALLOC_START + 4 * PAGE)
    va = alloc(made, 4, 1, *window)
    calls = []

    def notifier() -> int:
        calls.append(len(machine.flushed))
        if len(calls) == 2:
            free(made, va)
        return 1 if len(calls) < 3 else 0

    made.notifiers.append(notifier)
    assert alloc(made, 4, 1, *window).va_start == window[0]
    assert len(calls) == 2
    assert made.alloc_vmap_area(4 * PAGE, 1, *window) == -16
    assert len(calls) == 3


@BOTH
def test_the_message_of_an_exhausted_range_is_rate_limited_and_silenced_by_nowarn(design):
    made, machine = space(design)
    window = (VMALLOC_START, VMALLOC_START + PAGE)
    for _ in range(12):
        assert made.alloc_vmap_area(2 * PAGE, 1, *window, 0x2000) == -16
    assert machine.log == []
    for _ in range(12):
        assert made.alloc_vmap_area(2 * PAGE, 1, *window) == -16
    assert len(machine.log) == 10
    made.validate()


def test_bad_sizes_and_alignments_are_einval_since_6_12_and_a_bug_before():
    made, _ = space(V6_12)
    for size, align in ((0, 1), (100, 1), (PAGE, 3), (PAGE, 0), (-PAGE, 1)):
        assert made.alloc_vmap_area(size, align, VMALLOC_START, VMALLOC_END) == -22
    made, _ = space(V6_1)
    with pytest.raises(AssertionError, match="BUG in alloc_vmap_area"):
        made.alloc_vmap_area(100, 1, VMALLOC_START, VMALLOC_END)


def test_before_vmalloc_init_every_request_is_ebusy():
    machine = Machine()
    made = VmapSpace(V6_12, (VMALLOC_START, VMALLOC_END), machine, machine, machine, machine)
    assert made.alloc_vmap_area(PAGE, 1, VMALLOC_START, VMALLOC_END) == -16


@BOTH
def test_early_areas_split_the_free_space_of_the_whole_address_space(design):
    machine = Machine()
    made = VmapSpace(design, (VMALLOC_START, VMALLOC_END), machine, machine, machine, machine)
    busy = []
    for start, end in ((0x5000, 0x6000), (0x6000, 0x9000), (1, 0x1000)):
        va = made.cache.alloc(0)
        va.va_start, va.va_end = start, end
        busy.append(va)
    made.init_free_space(busy)
    assert [(va.va_start, va.va_end) for va in made.free] == [(0x1000, 0x5000), (0x9000, ULONG_MAX)]
    made.validate()


@BOTH
def test_a_descriptor_that_cannot_be_had_is_enomem_and_changes_nothing(design):
    made, _ = space(design)
    alloc(made, 3)
    made.cache.refuse = lambda gfp: True
    assert made.alloc_vmap_area(PAGE, 1, VMALLOC_START, VMALLOC_END) == -12
    made.cache.refuse = None
    made.validate()


def test_freeing_an_area_that_is_still_listed_is_a_warning():
    made, machine = space(V6_12)
    made.free_vmap_area_noflush(alloc(made, 1))
    assert machine.warnings == ["free_vmap_area_noflush: "]


def test_tracepoints_tell_requests_frees_and_purges():
    made, _ = space(V6_12)
    seen = []
    made.tracepoint = lambda name, values: seen.append((name, values))
    va = alloc(made, 2)
    start = va.va_start
    free(made, va)
    made.purge_vmap_area_lazy(ULONG_MAX, 0)
    assert seen == [
        ("alloc_vmap_area", (start, 2 * PAGE, 1, VMALLOC_START, VMALLOC_END, 0)),
        ("free_vmap_area_noflush", (start, 2, 8192)),
        ("purge_vmap_area_lazy", (start, start + 2 * PAGE, 1)),
    ]


def test_tracepoints_print_as_the_kernel_s_formats_say():
    assert tracepoint_text("alloc_vmap_area", (VMALLOC_START, 8192, 1, VMALLOC_START, VMALLOC_END, 0)) == (
        "va_start: 18446683600570023936 size=8192 align=1 vstart=0xffffc90000000000 vend=0xffffe8ffffffffff failed=0"
    )
    assert tracepoint_text("purge_vmap_area_lazy", (0x1000, 0x3000, 2)) == "start=0x1000 end=0x3000 num_purged=2"
    assert tracepoint_text("free_vmap_area_noflush", (0x1000, 2, 8192)) == "va_start=0x1000 nr_lazy=2 nr_lazy_max=8192"
    with pytest.raises(ValueError, match="tracepoint is 'x'"):
        tracepoint_text("x", ())


class Lifecycle(RuleBasedStateMachine):
    """Areas go from free to busy to lazy to pool or free; at every step each address is in exactly one container."""

    design = V6_12

    def __init__(self) -> None:
        super().__init__()
        self.made, self.machine = space(self.design, 4)
        self.busy: list[VmapArea] = []
        self.translated: list[tuple[int, int]] = []

    @rule(nr=st.integers(1, 12), shift=st.integers(0, 5), cpu=st.integers(0, 3))
    def alloc(self, nr: int, shift: int, cpu: int) -> None:
        self.machine.current = cpu
        va = alloc(self.made, nr, PAGE << shift)
        assert va.va_start % (PAGE << shift) == 0
        for start, end in self.translated:
            assert va.va_end <= start or end <= va.va_start, "addresses are reused before their flush"
        self.busy.append(va)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        va = self.busy.pop(data.draw(st.integers(0, len(self.busy) - 1)))
        self.translated.append((va.va_start, va.va_end))
        free(self.made, va)

    @rule(full=st.booleans())
    def purge(self, full: bool) -> None:
        before = len(self.machine.flushed)
        self.made.purge_vmap_area_lazy(ULONG_MAX, 0, full)
        flushes = self.machine.flushed[before:]
        assert len(flushes) == bool(self.translated)
        for start, end in self.translated:
            assert flushes[0][0] <= start and end <= flushes[0][1]
        self.translated.clear()

    @invariant()
    def sound(self) -> None:
        self.made.validate()
        assert self.machine.warnings == []


class Lifecycle61(Lifecycle):
    design = V6_1


TestLifecycle = Lifecycle.TestCase
TestLifecycle61 = Lifecycle61.TestCase
TestLifecycle.settings = TestLifecycle61.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
