"""vm_map_ram: blocks of address space that are handed out once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vmap_machine import Kernel, kernel

from emu.kernel.profile import V6_1, V6_12
from emu.kernel.vmallocinfo import vmallocinfo_rows
from emu.kernel.vmap_block import VMAP_BLOCK_SIZE, get_order

PAGE = 4096
BLOCK = VMAP_BLOCK_SIZE
BOTH = pytest.mark.parametrize("profile", [V6_12, V6_1], ids=lambda profile: profile.name)


def map_ram(k: Kernel, count: int) -> int:
    la = k.blocks.vm_map_ram(k.frames(count), count)
    assert la
    return la


@pytest.mark.parametrize(("size", "order"), [(1, 0), (PAGE, 0), (PAGE + 1, 1), (5 * PAGE, 3), (64 * PAGE, 6), (0, 52)])
def test_get_order(size, order):
    assert get_order(size) == order


@BOTH
def test_small_mappings_share_a_block_of_1_mib_from_the_bottom_rounded_to_powers_of_two(profile):
    k = kernel(profile)
    base = map_ram(k, 3)
    assert base % BLOCK == 0
    assert [map_ram(k, count) - base for count in (1, 5, 1)] == [4 * PAGE, 5 * PAGE, 13 * PAGE]
    assert k.addresses("busy") == [(base, base + BLOCK)]
    assert k.vmalloc.find_vm_area(base) is None
    k.validate()


@BOTH
def test_a_mapped_page_is_kernel_data_and_there_is_no_guard(profile):
    k = kernel(profile)
    frames = k.frames(64)
    la = k.blocks.vm_map_ram(frames, 64)
    assert k.mm.lookup(la).entry == int(frames[0]) << 12 | 0x8000000000000163
    neighbour = map_ram(k, 64)
    assert neighbour == la + 64 * PAGE


@BOTH
def test_a_freed_piece_is_not_handed_out_again(profile):
    k = kernel(profile)
    first = map_ram(k, 4)
    k.blocks.vm_unmap_ram(first, 4)
    assert not k.mm.lookup(first).present
    assert map_ram(k, 4) == first + 4 * PAGE
    assert k.task.flushed == []
    k.validate()


@BOTH
def test_a_block_whose_pages_are_all_dirty_becomes_lazy(profile):
    k = kernel(profile)
    areas = [map_ram(k, 64) for _ in range(4)]
    assert k.blocks.free_list[0] == {}
    for la in areas:
        k.blocks.vm_unmap_ram(la, 64)
    assert k.addresses("busy") == []
    assert k.space.vmap_lazy_nr == 256
    k.validate()


@BOTH
def test_more_than_64_pages_have_an_area_of_their_own(profile):
    k = kernel(profile)
    la = map_ram(k, 65)
    assert k.addresses("busy") == [(la, la + 65 * PAGE)]
    k.blocks.vm_unmap_ram(la, 65)
    assert k.space.vmap_lazy_nr == 65
    assert not k.mm.lookup(la).present
    k.validate()


@BOTH
def test_vm_unmap_aliases_flushes_the_dirty_pieces_once_and_then_nothing(profile):
    k = kernel(profile)
    first, second = map_ram(k, 1), map_ram(k, 2)
    map_ram(k, 1)
    k.blocks.vm_unmap_ram(second, 2)
    k.blocks.vm_unmap_ram(first, 1)
    k.blocks.vm_unmap_aliases()
    assert k.task.flushed == [(first, second + 2 * PAGE)]
    k.blocks.vm_unmap_aliases()
    # Before v6.9 the dirty range is kept, and flushed every time.
    assert len(k.task.flushed) == {"6.12": 1, "6.1": 2}[profile.name]


@BOTH
def test_one_flush_covers_dirty_pieces_and_lazy_areas(profile):
    k = kernel(profile)
    piece = map_ram(k, 1)
    map_ram(k, 1)
    area = k.vmalloc.vmalloc(PAGE)
    k.vmalloc.vfree(area)
    k.blocks.vm_unmap_ram(piece, 1)
    k.blocks.vm_unmap_aliases()
    low, high = min(piece, area), max(piece + PAGE, area + 2 * PAGE)
    assert k.task.flushed == [(low, high)]


@BOTH
def test_vm_unmap_aliases_without_anything_stale_flushes_nothing(profile):
    k = kernel(profile)
    map_ram(k, 1)
    k.vmalloc.vmalloc(PAGE)
    k.blocks.vm_unmap_aliases()
    assert k.task.flushed == []


@pytest.mark.parametrize(("used", "purged"), [(64, False), (192, False), (193, True)])
def test_vm_unmap_aliases_purges_an_unused_block_only_below_a_quarter_of_room_since_6_12(used, purged):
    k = kernel()
    pieces = [(map_ram(k, 64), 64) for _ in range(used // 64)] + [(map_ram(k, 1), 1) for _ in range(used % 64)]
    for la, count in pieces:
        k.blocks.vm_unmap_ram(la, count)
    k.blocks.vm_unmap_aliases()
    assert (k.addresses("busy") == []) == purged
    k.validate()


@BOTH
def test_a_reclaim_purges_every_unused_block_of_every_cpu(profile):
    k = kernel(profile, cpus=3)
    for cpu in range(3):
        k.task.current = cpu
        la = map_ram(k, 1)
        k.blocks.vm_unmap_ram(la, 1)
    assert len(k.addresses("busy")) == 3
    k.space.reclaim_and_purge()
    assert k.addresses("busy") == []
    k.validate()


def test_each_cpu_has_blocks_of_its_own_found_by_address_from_any():
    k = kernel(cpus=2)
    first = map_ram(k, 1)
    k.task.current = 1
    second = map_ram(k, 1)
    assert abs(second - first) >= BLOCK
    k.blocks.vm_unmap_ram(first, 1)
    assert not k.mm.lookup(first).present
    k.validate()


@BOTH
def test_count_0_warns_and_bad_addresses_are_bugs(profile):
    k = kernel(profile)
    assert k.blocks.vm_map_ram(k.frames(1), 0) == 0
    assert k.task.warnings == ["vb_alloc: "]
    layout = k.vmalloc.layout
    for la in (0, layout.vmalloc_start - PAGE, layout.vmalloc_end + 1, layout.vmalloc_start + 8):
        k.blocks.vm_unmap_ram(la, 1)
    assert k.task.bugs == ["vm_unmap_ram"] * 4


@BOTH
def test_an_address_that_no_block_holds_makes_the_kernel_touch_null(profile):
    k = kernel(profile)
    with pytest.raises(LookupError, match="page fault at 0x0"):
        k.blocks.vm_unmap_ram(k.vmalloc.layout.vmalloc_start, 1)


@BOTH
def test_a_page_table_that_cannot_be_had_rolls_the_mapping_back(profile):
    k = kernel(profile)
    frames = k.frames(65)
    calls = iter(range(100))
    k.pages.should_fail = lambda gfp, order: next(calls) >= 1
    assert k.blocks.vm_map_ram(frames, 65) == 0
    k.pages.should_fail = None
    k.validate()
    assert k.addresses("busy") == []


@BOTH
def test_vmallocinfo_shows_a_block_as_one_row(profile):
    k = kernel(profile)
    la = map_ram(k, 3)
    assert list(vmallocinfo_rows(k.vmalloc, hex)) == [f"0x{la:016x}-0x{la + BLOCK:016x} 1048576 vm_map_ram"]


def test_vfree_of_a_block_warns_and_loses_it():
    k = kernel()
    la = map_ram(k, 1)
    k.vmalloc.vfree(la)
    assert k.task.warnings == [f"vfree: Trying to vfree() nonexistent vm area ({la:016x})"]
    assert k.addresses("busy") == k.addresses("lazy") == []
    assert k.mm.lookup(la).present


class Pieces(RuleBasedStateMachine):
    """Random mappings on random CPUs: pieces never overlap, and none is reused before its flush."""

    profile = V6_12

    def __init__(self) -> None:
        super().__init__()
        self.k = kernel(self.profile, cpus=2)
        self.frames = self.k.frames(100)
        self.live: dict[int, int] = {}
        self.stale: list[tuple[int, int]] = []

    @rule(count=st.one_of(st.integers(1, 64), st.integers(65, 100)), cpu=st.integers(0, 1))
    def map(self, count: int, cpu: int) -> None:
        self.k.task.current = cpu
        la = self.k.blocks.vm_map_ram(self.frames, count)
        assert la
        for start, end in [(start, start + n * PAGE) for start, n in self.live.items()] + self.stale:
            assert la + count * PAGE <= start or end <= la
        self.live[la] = count

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        la = data.draw(st.sampled_from(sorted(self.live)))
        count = self.live.pop(la)
        self.k.blocks.vm_unmap_ram(la, count)
        self.stale.append((la, la + count * PAGE))

    @rule()
    def flush(self) -> None:
        before = len(self.k.task.flushed)
        self.k.blocks.vm_unmap_aliases()
        flushes = self.k.task.flushed[before:]
        assert len(flushes) <= 1
        for start, end in self.stale:
            assert flushes[0][0] <= start and end <= flushes[0][1]
        self.stale.clear()

    @rule()
    def reclaim(self) -> None:
        self.k.blocks.vm_unmap_aliases()
        self.k.space.reclaim_and_purge()
        self.stale.clear()

    @invariant()
    def sound(self) -> None:
        self.k.validate()
        for la, count in self.live.items():
            assert self.k.mm.lookup(la).present and self.k.mm.lookup(la + (count - 1) * PAGE).present


TestPieces = Pieces.TestCase
TestPieces.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
