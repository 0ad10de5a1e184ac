"""vmalloc and vfree over real page tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vmap_machine import Kernel, kernel

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.pgtable import PgLevel
from emu.kernel.profile import V6_1, V6_12
from emu.kernel.vm_struct import Vm
from emu.kernel.vmallocinfo import vmallocinfo_rows

PAGE = 4096
PMD = 2 << 20
GUARD = PAGE
BOTH = pytest.mark.parametrize("profile", [V6_12, V6_1], ids=lambda profile: profile.name)


def lazy_pages(k: Kernel) -> int:
    return sum(end - start for start, end in k.addresses("lazy")) // PAGE


def leaf(k: Kernel, la: int) -> tuple[PgLevel, int]:
    found = k.mm.lookup(la)
    return found.level, found.entry & ~0xFF_FFFF_F000


@BOTH
def test_one_byte_takes_a_page_and_a_guard_page_that_is_not_mapped(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(1)
    vm = k.vmalloc.find_vm_area(la)
    assert (vm.size, vm.get_vm_area_size(), vm.requested_size, vm.nr_pages) == (2 * PAGE, PAGE, 1, 1)
    assert leaf(k, la) == (PgLevel.PG_4K, 0x8000000000000163)
    assert not k.mm.lookup(la + PAGE).present
    k.validate()


@BOTH
def test_size_0_warns_once_and_gives_null(profile):
    k = kernel(profile)
    assert k.vmalloc.vmalloc(0) == 0
    assert k.vmalloc.vzalloc(0) == 0
    assert k.task.warnings == ["__vmalloc_node_range: "]


@BOTH
@pytest.mark.parametrize("size", [1 << 45, (1 << 64) - 1, ~0xFFF & (1 << 64) - 1])
def test_more_than_all_memory_is_reported_and_takes_no_address(profile, size):
    k = kernel(profile)
    assert k.vmalloc.vmalloc(size) == 0
    assert k.task.warn_allocs == [(0xCC0, f"vmalloc error: size {size}, exceeds total pages")]
    assert k.addresses("lazy") == []
    k.task.warn_allocs.clear()
    assert k.vmalloc.vmalloc_gfp(size, GFP_KERNEL | Gfp.NOWARN) == 0
    assert k.task.warn_allocs == []


@BOTH
def test_a_range_that_is_too_small_is_reported_as_the_version_does(profile):
    k = kernel(profile)
    start = k.vmalloc.layout.vmalloc_start + (1 << 40)
    prot = k.mm.prots.kernel
    assert k.vmalloc.vmalloc_node_range(0x10000, 1, start, start + 0x8000, GFP_KERNEL, prot, 0, -1) == 0
    wanted = {
        "6.12": "vmalloc_node_range for size 69632 failed: "
        "Address range restricted to 0xffffca0000000000 - 0xffffca0000008000",
        "6.1": "vmap allocation for size 69632 failed: use vmalloc=<size> to increase size",
    }
    assert k.task.log == [wanted[profile.name]]
    assert not any(slab.allocated for slab in k.slab._slabs.values())
    assert k.task.warn_allocs == [(0xCC0, "vmalloc error: size 65536, vm_struct allocation failed")]
    k.validate()


def test_more_than_512_pages_take_their_array_from_vmalloc_after_the_area_itself():
    k = kernel()
    small = k.vmalloc.find_vm_area(k.vmalloc.vmalloc(512 * PAGE))
    assert not k.vmalloc.is_vmalloc_addr(small.pages_la)
    large = k.vmalloc.find_vm_area(k.vmalloc.vmalloc(513 * PAGE))
    array = k.vmalloc.find_vm_area(large.pages_la)
    assert array.addr == large.addr + large.size
    assert array.requested_size == 513 * 8
    k.vmalloc.vfree(large.addr)
    assert k.vmalloc.find_vm_area(large.pages_la) is None
    k.validate()


def test_a_large_request_asks_the_bulk_allocator_for_100_pages_at_a_time():
    k = kernel()
    asked = []
    bulk = k.pages.alloc_pages_bulk
    k.pages.alloc_pages_bulk = lambda gfp, node, nr: asked.append(nr) or bulk(gfp, node, nr)
    k.vmalloc.vmalloc(250 * PAGE)
    assert asked == [100, 100, 50]


@BOTH
def test_a_page_that_cannot_be_had_undoes_all_and_leaves_the_addresses_lazy(profile):
    k = kernel(profile)
    free = k.pages.nr_free_pages()
    calls = iter(range(100))
    k.pages.alloc_pages_bulk = lambda gfp, node, nr: np.array(
        [k.pages.alloc_pages(gfp) for _ in range(2)], dtype=np.int64
    )
    alloc = k.pages.alloc_pages
    k.pages.alloc_pages = lambda gfp, order=0, node=-1: alloc(gfp, order, node) if next(calls) < 4 else None
    assert k.vmalloc.vmalloc(8 * PAGE) == 0
    k.pages.alloc_pages = alloc
    assert k.pages.nr_free_pages() == free
    assert lazy_pages(k) == 9
    wanted = {"6.12": ["vmalloc error: size 8192, failed to allocate pages"], "6.1": []}
    assert [text for _, text in k.task.warn_allocs] == wanted[profile.name]
    k.validate()


def test_failure_at_every_allocation_leaks_nothing():
    k = kernel()
    k.vmalloc.vfree(k.vmalloc.vmalloc(1030 * PAGE))
    k.blocks.vm_unmap_aliases()
    free = k.pages.nr_free_pages()
    descriptors = k.space.cache.live
    for nth in range(100):
        count = [0]

        def refuse(gfp: int, order: int, count: list[int] = count, nth: int = nth) -> bool:
            count[0] += 1
            return count[0] == nth + 1

        k.pages.should_fail = refuse
        la = k.vmalloc.vmalloc(1030 * PAGE)
        k.pages.should_fail = None
        if la:
            k.vmalloc.vfree(la)
        k.blocks.vm_unmap_aliases()
        # Page tables that were made stay.
        tables = free - k.pages.nr_free_pages()
        assert 0 <= tables <= 12
        if count[0] < nth + 1:
            break
        k.validate()
    else:
        raise AssertionError("more allocations than expected")
    assert nth > 12
    assert k.space.cache.live - descriptors <= 2


@BOTH
def test_vmalloc_huge_maps_2_mib_leaves_and_rounds_the_size_up(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc_huge(PMD + PAGE, GFP_KERNEL)
    vm = k.vmalloc.find_vm_area(la)
    assert la % PMD == 0
    assert leaf(k, la) == leaf(k, la + PMD) == (PgLevel.PG_2M, 0x80000000000001E3)
    assert (vm.nr_pages, vm.page_order, vm.size) == (1024, 9, 2 * PMD + GUARD)
    assert vm.flags == Vm.ALLOC | Vm.ALLOW_HUGE_VMAP
    k.vmalloc.vfree(la)
    assert not k.mm.lookup(la).present
    k.validate()


def test_vmalloc_huge_falls_back_to_4_kib_pages_without_a_word_when_one_large_page_is_missing():
    k = kernel()
    alloc = k.pages.alloc_pages
    large = iter(range(10))
    k.pages.alloc_pages = lambda gfp, order=0, node=-1: (
        None if order == 9 and next(large) >= 1 else alloc(gfp, order, node)
    )
    la = k.vmalloc.vmalloc_huge(2 * PMD, GFP_KERNEL)
    assert leaf(k, la)[0] == PgLevel.PG_4K
    assert k.vmalloc.find_vm_area(la).page_order == 0
    assert (2 * PMD + GUARD) // PAGE in [(end - start) // PAGE for start, end in k.addresses("lazy")]
    assert k.task.warn_allocs == []
    k.pages.alloc_pages = alloc
    k.validate()


def test_the_size_for_large_pages_is_judged_per_online_node():
    k = kernel(nodes=4, size=256 << 20)
    assert leaf(k, k.vmalloc.vmalloc_huge(4 << 20, GFP_KERNEL))[0] == PgLevel.PG_4K
    assert leaf(k, k.vmalloc.vmalloc_huge(8 << 20, GFP_KERNEL))[0] == PgLevel.PG_2M


def test_nohugevmalloc_keeps_4_kib_pages():
    k = kernel()
    k.vmalloc.vmap_allow_huge = False
    la = k.vmalloc.vmalloc_huge(4 << 20, GFP_KERNEL)
    assert leaf(k, la)[0] == PgLevel.PG_4K
    assert k.vmalloc.find_vm_area(la).flags & Vm.ALLOW_HUGE_VMAP


def test_an_alignment_above_a_page_is_kept():
    k = kernel()
    layout = k.vmalloc.layout
    k.vmalloc.vmalloc(PAGE)
    for align in (1 << 16, 1 << 21, 1 << 30):
        la = k.vmalloc.vmalloc_node_range(
            PAGE, align, layout.vmalloc_start, layout.vmalloc_end, GFP_KERNEL, k.mm.prots.kernel, 0, NUMA_NO_NODE
        )
        assert la % align == 0
    wrong = k.vmalloc.vmalloc_node_align(PAGE, 3 * PAGE, GFP_KERNEL, NUMA_NO_NODE)
    assert wrong == 0


def test_zeroed_and_user_and_low_variants_set_what_their_names_say():
    k = kernel()
    v = k.vmalloc
    for pfn in (frames := k.frames(64)).tolist():
        k.pages.memory.fill(pfn * PAGE, PAGE, 0xEE)
    k.pages.free_pages_bulk(frames)
    for la in (v.vzalloc(5000), v.vmalloc_user(5000), v.vmalloc_32_user(5000), v.vcalloc(10, 500), v.vzalloc_node(9, 0)):
        pa = k.mm.to_pa(la)
        assert k.pages.memory.read(pa, PAGE) == bytes(PAGE)
    assert v.find_vm_area(v.vmalloc_user(1)).flags == Vm.ALLOC | Vm.USERMAP
    assert v.find_vm_area(v.vmalloc_32(1)).flags == Vm.ALLOC
    assert v.vmalloc_array(1 << 40, 1 << 30) == 0
    assert v.vcalloc(3, PAGE)
    assert k.task.warnings == [] and k.task.warn_allocs == []


def test_vmalloc_node_takes_pages_of_that_node_first():
    k = kernel(nodes=2, size=128 << 20)
    vm = k.vmalloc.find_vm_area(k.vmalloc.vmalloc_node(5 * PAGE, 1))
    assert {k.pages.page_to_nid(pfn) for pfn in vm.pages.tolist()} == {1}


# Freeing


@BOTH
def test_vfree_unmaps_at_once_frees_the_pages_and_flushes_nothing(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(10 * PAGE)
    free = k.pages.nr_free_pages()
    k.vmalloc.vfree(la)
    assert not k.mm.lookup(la).present
    assert k.pages.nr_free_pages() >= free + 10
    assert k.task.flushed == []
    assert (lazy_pages(k), k.space.vmap_lazy_nr, k.vmalloc.nr_vmalloc_pages) == (11, 11, 0)
    k.validate()


@BOTH
def test_frames_are_free_before_the_flush_of_their_addresses(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(PAGE)
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.vmalloc.vfree(la)
    assert k.pages.page_count(pfn) == 0
    assert k.task.flushed == []


@BOTH
def test_an_interior_page_aligned_pointer_frees_the_whole_area(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(3 * PAGE)
    k.vmalloc.vfree(la + PAGE)
    assert k.vmalloc.find_vm_area(la) is None
    assert k.task.warnings == []


@BOTH
def test_bad_pointers_are_warned_about_as_the_version_does(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(PAGE)
    k.vmalloc.vfree(0)
    k.vmap.vunmap(0)
    assert k.task.warnings == []
    k.vmalloc.vfree(la + 8)
    bad = f"Trying to vfree() bad address ({la + 8:016x})"
    nonexistent = f"Trying to vfree() nonexistent vm area ({la + 8:016x})"
    wanted = {"6.12": [f"remove_vm_area: {bad}", f"vfree: {nonexistent}"], "6.1": [f"__vunmap:bad: {bad}"]}
    assert k.task.warnings == wanted[profile.name]
    assert k.vmalloc.find_vm_area(la) is not None
    k.task.warnings.clear()
    k.vmalloc.vfree(la)
    k.vmalloc.vfree(la)
    name = {"6.12": "vfree", "6.1": "__vunmap"}[profile.name]
    assert k.task.warnings == [f"{name}: Trying to vfree() nonexistent vm area ({la:016x})"]
    k.task.warnings.clear()
    k.vmap.vunmap(0xFFFFE8FFFFF00000)
    name, verb = {"6.12": ("vunmap", "vunmap"), "6.1": ("__vunmap", "vfree")}[profile.name]
    assert k.task.warnings == [f"{name}: Trying to {verb}() nonexistent vm area (ffffe8fffff00000)"]
    k.validate()


@BOTH
def test_vfree_in_interrupt_leaves_the_mapping_until_the_worker_runs(profile):
    k = kernel(profile)
    first, second = k.vmalloc.vmalloc(PAGE), k.vmalloc.vmalloc(PAGE)
    k.task.in_interrupt = True
    k.vmalloc.vfree(first)
    k.vmalloc.vfree(second)
    k.task.in_interrupt = False
    assert k.mm.lookup(first).present and k.mm.lookup(second).present
    assert k.task.load(first) == 0
    assert k.task.load(second) == first
    assert len(k.task.work) == 1
    k.task.run_work()
    assert not k.mm.lookup(first).present and not k.mm.lookup(second).present
    k.validate()


def test_vfree_atomic_in_nmi_is_a_bug_and_vmalloc_in_interrupt_too():
    k = kernel()
    la = k.vmalloc.vmalloc(PAGE)
    k.task.in_nmi = k.task.in_interrupt = True
    k.vmalloc.vfree_atomic(la)
    assert k.task.bugs == ["vfree_atomic"]
    assert k.vmalloc.vmalloc(PAGE) == 0
    assert k.task.bugs == ["vfree_atomic", "__get_vm_area_node"]


@BOTH
def test_freeing_memory_with_reset_permissions_flushes_once_before_the_frames_are_free(profile):
    k = kernel(profile)
    la = k.vmalloc.vmalloc(3 * PAGE)
    vm = k.vmalloc.find_vm_area(la)
    vm.flags |= Vm.FLUSH_RESET_PERMS
    frames = vm.pages.tolist()
    counts = []
    direct = []
    flush = k.task.flush_tlb_kernel_range

    def record(start: int, end: int, *, cause: str) -> None:
        counts.append([k.pages.page_count(pfn) for pfn in frames])
        direct.append([k.mm.lookup(k.mm.layout.va(pfn * PAGE)).present for pfn in frames])
        flush(start, end)

    k.task.flush_tlb_kernel_range = record
    k.vmalloc.vfree(la)
    assert counts == [[1, 1, 1]]
    assert direct == [[False, False, False]]
    assert all(k.mm.lookup(k.mm.layout.va(pfn * PAGE)).present for pfn in frames)
    assert k.space.vmap_lazy_nr == 0
    k.validate()


def test_nofail_tries_again_until_memory_is_there():
    k = kernel()
    k.pages.should_fail = lambda gfp, order: k.task.timeouts < 3
    gfp = GFP_KERNEL | Gfp.NOFAIL
    assert k.vmalloc.vmalloc_gfp(PAGE, gfp)
    assert k.task.timeouts == 3
    assert [text for _, text in k.task.warn_allocs] == [
        "vmalloc error: size 4096, vm_struct allocation failed. Retrying."
    ] * 3


@pytest.mark.parametrize("pages", [1, 20])
def test_frames_that_somebody_freed_before_are_bad_pages_and_the_rest_is_freed(pages):
    k = kernel()
    la = k.vmalloc.vmalloc(pages * PAGE)
    frames = k.vmalloc.find_vm_area(la).pages.tolist()
    k.pages.put_page(frames[0])
    k.vmalloc.vfree(la)
    assert k.task.log == [f"BUG: Bad page state  pfn:{frames[0]:05x}"]
    assert [k.pages.page_count(pfn) for pfn in frames] == [0] * pages
    k.validate()


def test_a_node_that_does_not_exist_makes_the_kernel_fault_after_reserving_the_area():
    k = kernel(nodes=2, size=128 << 20)
    with pytest.raises(LookupError, match="page fault at 0x2000"):
        k.vmalloc.vmalloc_node(PAGE, 5)
    assert k.vmalloc.find_vm_area(k.vmalloc.layout.vmalloc_start) is not None


# vrealloc


def test_vrealloc_shrinks_and_grows_in_place_within_its_pages_and_moves_beyond():
    k = kernel()
    v = k.vmalloc
    la = v.vrealloc(0, 10 * PAGE, GFP_KERNEL)
    k.task.store(la + 8, 0x1234)
    assert v.vrealloc(la, 2 * PAGE, GFP_KERNEL) == la
    assert v.find_vm_area(la).nr_pages == 10
    assert v.vrealloc(la, 5 * PAGE, GFP_KERNEL) == la
    moved = v.vrealloc(la, 11 * PAGE, GFP_KERNEL)
    assert moved not in (0, la)
    assert k.task.load(moved + 8) == 0x1234
    assert v.find_vm_area(la) is None
    assert v.vrealloc(moved, 0, GFP_KERNEL) == 0
    assert v.find_vm_area(moved) is None
    k.validate()


def test_vrealloc_of_an_unknown_pointer_warns_and_a_failed_growth_keeps_the_old_memory():
    k = kernel()
    assert k.vmalloc.vrealloc(0xFFFFC90000005000, 1, GFP_KERNEL) == 0
    assert k.task.warnings == ["vrealloc: Trying to vrealloc() nonexistent vm area (ffffc90000005000)"]
    la = k.vmalloc.vmalloc(PAGE)
    k.pages.should_fail = lambda gfp, order: True
    assert k.vmalloc.vrealloc(la, 3 * PAGE, GFP_KERNEL) == 0
    assert k.vmalloc.find_vm_area(la) is not None


# What users read


@BOTH
def test_vmallocinfo_prints_range_size_caller_pages_tags_and_nodes(profile):
    k = kernel(profile, nodes=2, size=128 << 20)
    v = k.vmalloc
    start = v.layout.vmalloc_start
    v.vmalloc(100, caller=0x1234)
    v.vmalloc(513 * PAGE)
    freed = v.vmalloc(PAGE)
    area = v.get_vm_area(PAGE, Vm.IOREMAP)
    area.phys_addr = 0xFED00000
    v.vmalloc_node(2 * PAGE, 1)
    v.vfree(freed)
    rows = list(vmallocinfo_rows(v, lambda la: f"caller+{la:#x}/0x2000"))
    assert rows == [
        f"0x{start:016x}-0x{start + 0x2000:016x}    8192 caller+0x1234/0x2000 pages=1 vmalloc N0=1",
        f"0x{start + 0x2000:016x}-0x{start + 0x204000:016x} 2105344 pages=513 vmalloc vpages N0=513",
        f"0x{start + 0x204000:016x}-0x{start + 0x207000:016x}   12288 pages=2 vmalloc N0=2",
        f"0x{start + 0x209000:016x}-0x{start + 0x20b000:016x}    8192 phys=0x00000000fed00000 ioremap",
        f"0x{start + 0x20b000:016x}-0x{start + 0x20e000:016x}   12288 pages=2 vmalloc N1=2",
        f"0x{start + 0x207000:016x}-0x{start + 0x209000:016x}    8192 unpurged vm_area",
    ]


def test_an_area_under_construction_is_found_but_not_listed():
    k = kernel()
    seen = []
    alloc = k.pages.alloc_pages

    def spy(gfp: int, order: int = 0, node: int = -1) -> int | None:
        start = k.vmalloc.layout.vmalloc_start
        seen.append((k.vmalloc.find_vm_area(start) is not None, list(vmallocinfo_rows(k.vmalloc, hex))))
        return alloc(gfp, order, node)

    k.pages.alloc_pages = spy
    k.vmalloc.vmalloc(PAGE)
    assert (True, []) in seen
    assert not any(rows for _, rows in seen)


class Sequences(RuleBasedStateMachine):
    """Random calls of the whole family; everything is validated after each and nothing is left at the end."""

    profile = V6_12
    cpus = 4

    def __init__(self) -> None:
        super().__init__()
        self.k = kernel(self.profile, cpus=self.cpus)
        self.live: dict[int, int] = {}

    @rule(pages=st.integers(1, 40), cpu=st.integers(0, 3), align=st.sampled_from([1, PAGE, 1 << 14, 1 << 18, 1 << 21]))
    def alloc(self, pages: int, cpu: int, align: int) -> None:
        self.k.task.current = cpu % self.cpus
        la = self.k.vmalloc.vmalloc_node_align(pages * PAGE - 5, align, GFP_KERNEL, NUMA_NO_NODE)
        assert la % align == 0 and la
        self.live[la] = pages

    @rule(size=st.sampled_from([PMD - PAGE, PMD, PMD + 1, 600 * PAGE]))
    def alloc_huge(self, size: int) -> None:
        if len(self.live) < 8:
            la = self.k.vmalloc.vmalloc_huge(size, GFP_KERNEL)
            assert la
            self.live[la] = size // PAGE

    @precondition(lambda self: self.live)
    @rule(data=st.data(), interrupt=st.booleans())
    def free(self, data: st.DataObject, interrupt: bool) -> None:
        la = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[la]
        self.k.task.in_interrupt = interrupt
        self.k.vmalloc.vfree(la)
        self.k.task.in_interrupt = False
        self.k.task.run_work()

    @rule()
    def unmap_aliases(self) -> None:
        before = len(self.k.task.flushed)
        lazy = self.k.space.vmap_lazy_nr
        self.k.blocks.vm_unmap_aliases()
        assert len(self.k.task.flushed) - before == (1 if lazy else 0)
        assert self.k.space.vmap_lazy_nr == 0

    @rule(nth=st.integers(0, 6), pages=st.sampled_from([1, 5, 600]))
    def failing_alloc(self, nth: int, pages: int) -> None:
        count = iter(range(1000))
        self.k.pages.should_fail = lambda gfp, order: next(count) == nth
        la = self.k.vmalloc.vmalloc(pages * PAGE)
        self.k.pages.should_fail = None
        if la:
            self.live[la] = pages

    @invariant()
    def sound(self) -> None:
        self.k.validate()
        assert {start for start, _ in self.k.addresses("busy")} >= set(self.live)

    def teardown(self) -> None:
        for la in self.live:
            self.k.vmalloc.vfree(la)
        assert self.k.addresses("busy") == []
        assert self.k.vmalloc.nr_vmalloc_pages == 0
        assert self.k.task.warnings == []
        self.k.validate()


class Sequences61(Sequences):
    profile = V6_1


TestSequences = Sequences.TestCase
TestSequences61 = Sequences61.TestCase
TestSequences.settings = TestSequences61.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
