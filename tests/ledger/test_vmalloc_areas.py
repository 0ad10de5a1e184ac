"""Ledger rows about areas of kernel addresses: what they are, where they are filed, how room is found."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from vmap_machine import VMALLOC_END, VMALLOC_START, Kernel, kernel, space

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.pgtable import PgLevel
from emu.kernel.profile import V6_1, V6_12
from emu.kernel.vm_struct import Vm, VmStruct
from emu.kernel.vmallocinfo import vmallocinfo_rows
from emu.kernel.vmap_area import VMAP_BLOCK, VMAP_RAM, FreeVmapAreas, VmapArea, VmapAreaCache
from emu.kernel.vmap_node import V6_12 as SHARDED

PAGE = 4096
PMD = 2 << 20
PTE_BITS = 0xFFF0000000000FFF


def containers(k: Kernel, va: VmapArea) -> list[str]:
    nodes = k.space.nodes.nodes
    found = ["free"] if any(va is other for other in k.space.free) else []
    for name in ("busy", "lazy", "pooled"):
        for node in nodes:
            areas = node.pooled() if name == "pooled" else getattr(node, name)
            found += [f"{name}{node.id}" for other in areas if other is va]
    return found


def area(k: Kernel, la: int) -> VmStruct:
    vm = k.vmalloc.find_vm_area(la)
    assert vm is not None
    return vm


# What an allocation is


def test_C01_all_pages_of_an_area_are_mapped_in_the_order_of_its_array():
    k = kernel()
    la = k.vmalloc.vmalloc(10 * PAGE)
    frames = area(k, la).pages.tolist()
    for i in range(10):
        k.task.store(la + i * PAGE, 0xC0DE + i)
    assert [k.pages.memory.read_u64(pfn * PAGE) for pfn in frames] == [0xC0DE + i for i in range(10)]


def test_C02_no_two_frames_need_to_be_neighbours():
    k = kernel()
    while (pfn := k.pages.alloc_pages(GFP_KERNEL)) is not None:
        last = pfn
    for pfn in range(last - 64, last, 2):
        k.pages.free_pages(pfn)
    assert k.slab.kmalloc(32 * 1024) is None
    frames = sorted(area(k, k.vmalloc.vmalloc(8 * PAGE)).pages.tolist())
    assert all(high - low > 1 for low, high in pairwise(frames))


def test_C05_C06_the_area_is_busy_and_uninitialized_before_the_first_page_is_there():
    k = kernel()
    stages = []
    alloc = k.pages.alloc_pages

    def spy(gfp, order=0, node=NUMA_NO_NODE):
        vm = k.vmalloc.find_vm_area(VMALLOC_START)
        if vm is not None:
            stages.append((bool(vm.flags & Vm.UNINITIALIZED), vm.pages is None, list(vmallocinfo_rows(k.vmalloc, hex))))
        return alloc(gfp, order, node)

    k.pages.alloc_pages = spy
    la = k.vmalloc.vmalloc(PAGE)
    assert la == VMALLOC_START
    assert stages[0] == (True, True, [])
    assert not area(k, la).flags & Vm.UNINITIALIZED
    assert len(list(vmallocinfo_rows(k.vmalloc, hex))) == 1


def test_C06_a_failed_allocation_leaves_its_addresses_lazy():
    k = kernel()
    free = k.pages.nr_free_pages()
    served = iter(range(100))
    alloc = k.pages.alloc_pages
    k.pages.alloc_pages_bulk = lambda gfp, node, nr: np.empty(0, dtype=np.int64)
    k.pages.alloc_pages = lambda gfp, order=0, node=-1: alloc(gfp, order, node) if next(served) < 4 else None
    assert k.vmalloc.vmalloc(8 * PAGE) == 0
    assert (k.pages.nr_free_pages(), k.space.vmap_lazy_nr) == (free, 9)


def test_C07_250_pages_are_three_bulk_requests_of_100_100_and_50():
    k = kernel()
    asked = []
    bulk = k.pages.alloc_pages_bulk
    k.pages.alloc_pages_bulk = lambda gfp, node, nr: asked.append(nr) or bulk(gfp, node, nr)
    k.vmalloc.vmalloc(250 * PAGE)
    assert asked == [100, 100, 50]


def test_C08_leaves_are_PAGE_KERNEL_and_mapping_flushes_nothing():
    # The row says that non-leaf entries are 0x63; recorded kernels have 0x67: U/S is set in upper entries.
    k = kernel()
    found = k.mm.lookup(k.vmalloc.vmalloc(PAGE))
    assert found.entry & PTE_BITS == 0x8000000000000163
    assert [entry & PTE_BITS for entry in found.entries[:-1]] == [0x67, 0x67, 0x67]
    assert k.mm.lookup(k.vmalloc.vmalloc_huge(PMD, GFP_KERNEL)).entry & PTE_BITS == 0x80000000000001E3
    assert k.task.flushed == []


def test_C09_the_last_page_is_never_allocated_and_the_last_byte_is_not_a_vmalloc_address():
    made, _ = space(SHARDED)
    size = (VMALLOC_END + 1 - VMALLOC_START) - PAGE
    va = made.alloc_vmap_area(size, 1, VMALLOC_START, VMALLOC_END)
    assert va.va_end == 0xFFFFE8FFFFFFF000
    assert made.alloc_vmap_area(PAGE, 1, VMALLOC_START, VMALLOC_END) == -16
    k = kernel()
    assert k.vmalloc.is_vmalloc_addr(0xFFFFE8FFFFFFFFFE)
    assert not k.vmalloc.is_vmalloc_addr(0xFFFFE8FFFFFFFFFF)


@pytest.mark.parametrize(("levels", "kib"), [(4, 34359738367), (5, 13743895347199)])
def test_C10_the_region_is_32_tib_or_12800_tib_less_a_byte(levels, kib):
    layout = kernel(levels=levels).vmalloc.layout
    assert (layout.vmalloc_end - layout.vmalloc_start) >> 10 == kib


def test_C11_an_area_goes_from_free_to_busy_to_lazy_to_a_pool_and_is_in_one_container_at_a_time():
    k = kernel(cpus=4)
    la = k.vmalloc.vmalloc(PAGE)
    va = k.space.nodes.find(la)
    home = la // 65536 % 4
    assert containers(k, va) == [f"busy{home}"]
    k.vmalloc.vfree(la)
    assert containers(k, va) == ["lazy0"]
    k.blocks.vm_unmap_aliases()
    assert containers(k, va) == ["pooled0"]
    assert k.vmalloc.vmalloc(PAGE) == la
    assert containers(k, va) == [f"busy{home}"]


def test_C12_four_cpus_make_four_nodes_busy_by_address_lazy_by_the_cpu_that_asked():
    k = kernel(cpus=4)
    for cpu in range(4):
        k.task.current = cpu
        for _ in range(9):
            la = k.vmalloc.vmalloc(15 * PAGE)
            va = k.space.nodes.find(la)
            assert containers(k, va) == [f"busy{la // 65536 % 4}"]
            k.task.current = 3 - cpu
            k.vmalloc.vfree(la)
            assert containers(k, va) == [f"lazy{cpu}"]
            k.task.current = cpu


def test_C13_an_area_is_found_by_an_address_that_hashes_to_another_node():
    k = kernel(cpus=4)
    la = k.vmalloc.vmalloc(1 << 20)
    inside = la + 200 * 1024
    assert inside // 65536 % 4 != la // 65536 % 4
    assert area(k, inside).addr == la


def test_C14_free_busy_lazy_and_pooled_areas_cover_the_whole_address_space_and_modules_share_it():
    k = kernel(cpus=2)
    layout = k.vmalloc.layout
    la = k.vmalloc.vmalloc_node_range(
        PAGE, 1, layout.modules_vaddr, layout.modules_end, GFP_KERNEL, k.mm.prots.kernel, 0, NUMA_NO_NODE
    )
    assert la == layout.modules_vaddr
    k.vmalloc.vfree(k.vmalloc.vmalloc(PAGE))
    k.space.validate()
    assert [va.va_end for va in k.space.free if va.va_end == la] == [la]


def test_C15_subtree_max_size_and_the_list_are_right_after_every_operation():
    made, _ = space(SHARDED, 4)
    random = Random(15)
    live: list[VmapArea] = []
    for _ in range(400):
        if live and random.random() < 0.45:
            va = live.pop(random.randrange(len(live)))
            made.nodes.find_unlink(va.va_start)
            made.free_vmap_area_noflush(va)
        elif random.random() < 0.05:
            made.purge_vmap_area_lazy((1 << 64) - 1, 0)
        else:
            align = 1 << random.randrange(0, 20)
            live.append(made.alloc_vmap_area(random.randrange(1, 300) * PAGE, align, VMALLOC_START, VMALLOC_END))
        made.validate()


class Visited(VmapArea):
    """Counts the nodes that a search looks at."""

    __slots__ = ()
    count = 0

    def __getattribute__(self, name):
        if name == "va_end":
            Visited.count += 1
        return super().__getattribute__(name)


def test_C16_the_search_visits_a_logarithmic_number_of_nodes():
    free = FreeVmapAreas(VmapAreaCache(), None)
    holes = 20_000
    for i in range(holes):
        # Holes of 4 pages that hold no aligned 4 pages, then one of 16.
        free.insert(Visited(VMALLOC_START + (8 * i + 1) * PAGE, VMALLOC_START + (8 * i + 5) * PAGE))
    free.insert(Visited(VMALLOC_START + 8 * holes * PAGE, VMALLOC_START + (8 * holes + 16) * PAGE))
    height = 2 * holes.bit_length()
    for size, align, adjust in ((4, 1, False), (5, 1, False), (4, 4 * PAGE, True)):
        Visited.count = 0
        assert free.find_lowest_match(size * PAGE, align, VMALLOC_START, adjust) is not None
        assert Visited.count <= 2 * height


def test_C16_an_aligned_hole_off_the_search_path_is_passed_over_for_a_higher_one():
    free = FreeVmapAreas(VmapAreaCache(), None)
    for start, end in ((8, 12), (16, 18), (33, 48), (64, 80)):
        free.insert(VmapArea(VMALLOC_START + start * PAGE, VMALLOC_START + end * PAGE))
    assert free.alloc(4 * PAGE, 4 * PAGE, VMALLOC_START, VMALLOC_END) == VMALLOC_START + 36 * PAGE


def test_C17_vm_map_ram_areas_have_no_vm_struct():
    k = kernel()
    la = k.blocks.vm_map_ram(k.frames(3), 3)
    assert k.vmalloc.find_vm_area(la) is None
    va = k.space.nodes.find(la)
    assert (va.vm, va.flags & 3) == (None, VMAP_RAM | VMAP_BLOCK)
    assert k.space.nodes.find(k.blocks.vm_map_ram(k.frames(65), 65)).flags & 3 == VMAP_RAM
    assert "vm_map_ram" in next(iter(vmallocinfo_rows(k.vmalloc, hex)))
    k.vmalloc.vfree(la)
    assert len(k.task.warnings) == 1
    assert k.space.nodes.find(la) is None


def test_C18_size_has_the_guard_page_and_requested_size_the_bytes_asked_for():
    k = kernel()
    vm = area(k, k.vmalloc.vmalloc(100))
    assert (vm.size, vm.get_vm_area_size(), vm.requested_size) == (8192, 4096, 100)
    assert next(iter(vmallocinfo_rows(k.vmalloc, hex))).split()[1] == "8192"


def test_C19_only_vmalloc_memory_has_an_array_of_pages_by_4_kib():
    k = kernel()
    vm = area(k, k.vmap.vmap(k.frames(4), 4, Vm.MAP, k.mm.prots.kernel))
    assert (vm.nr_pages, vm.pages) == (0, None)
    vm = area(k, k.vmalloc.vmalloc_huge(PMD, GFP_KERNEL))
    assert (vm.nr_pages, vm.page_order) == (512, 9)
    assert "pages=" not in next(iter(vmallocinfo_rows(k.vmalloc, hex)))


def test_C20_each_function_sets_exactly_its_flags():
    k = kernel()
    v = k.vmalloc
    made = {
        "vmalloc": v.vmalloc(1),
        "vmalloc_user": v.vmalloc_user(1),
        "vmalloc_huge": v.vmalloc_huge(1, GFP_KERNEL),
        "vmap": k.vmap.vmap(k.frames(1), 1, Vm.MAP, k.mm.prots.kernel),
        "ioremap": k.vmap.alloc_ioremap_area(PAGE, 0).addr,
    }
    assert {name: area(k, la).flags for name, la in made.items()} == {
        "vmalloc": Vm.ALLOC,
        "vmalloc_user": Vm.ALLOC | Vm.USERMAP,
        "vmalloc_huge": Vm.ALLOC | Vm.ALLOW_HUGE_VMAP,
        "vmap": Vm.MAP,
        "ioremap": Vm.IOREMAP,
    }
    tags = [row.split(maxsplit=2)[2] for row in vmallocinfo_rows(v, hex)]
    assert tags == ["pages=1 vmalloc N0=1", "pages=1 vmalloc user N0=1", "pages=1 vmalloc N0=1", "vmap", "ioremap"]


# Guard pages


def test_C21_C22_the_page_behind_an_area_is_not_mapped_and_vm_map_ram_has_none():
    k = kernel()
    first, second = k.vmalloc.vmalloc(PAGE), k.vmalloc.vmalloc(PAGE)
    assert second == first + 2 * PAGE
    assert not k.mm.lookup(first + PAGE).present
    pieces = [k.blocks.vm_map_ram(k.frames(64), 64) for _ in range(4)]
    behind = k.vmalloc.vmalloc(PAGE)
    assert behind in (pieces[3] + 64 * PAGE, first + 4 * PAGE)
    assert all(k.mm.lookup(la + 64 * PAGE - 1).present for la in pieces)


def test_C23_an_overrun_is_silent_up_to_the_end_of_the_page():
    k = kernel()
    la, following = k.vmalloc.vmalloc(100), k.vmalloc.vmalloc(100)
    mapped = [k.mm.lookup(la + offset).present for offset in (100, 4095, 4096, 8192)]
    assert mapped == [True, True, False, True]
    assert following == la + 8192


def test_C24_a_16_kib_stack_takes_20_kib_of_addresses_at_a_spacing_of_32_kib_and_16_kib_of_memory():
    k = kernel()
    stacks = [k.vmalloc.vmalloc_node_align(16384, 16384, GFP_KERNEL, NUMA_NO_NODE) for _ in range(3)]
    assert [b - a for a, b in pairwise(stacks)] == [32768, 32768]
    assert sum(area(k, la).nr_pages for la in stacks) == 12
    k.vmalloc.vfree(stacks[0])
    assert k.space.vmap_lazy_nr == 5


def test_C25_vm_no_guard_is_honoured_by_node_range_and_stripped_by_vmap():
    k = kernel()
    layout = k.vmalloc.layout
    la = k.vmalloc.vmalloc_node_range(
        3 * PAGE, 1, layout.vmalloc_start, layout.vmalloc_end, GFP_KERNEL, k.mm.prots.kernel, Vm.NO_GUARD, NUMA_NO_NODE
    )
    assert area(k, la).size == 3 * PAGE
    la = k.vmap.vmap(k.frames(3), 3, Vm.NO_GUARD, k.mm.prots.kernel)
    assert area(k, la).size == 4 * PAGE
    assert len(k.task.warnings) == 1


# Large leaves


def leaf_levels(k: Kernel, la: int, size: int) -> list[PgLevel]:
    return [level for _, _, level in k.mm.leaves(la, la + size)]


def test_C26_plain_vmalloc_never_gets_large_leaves_and_vmalloc_huge_does():
    k = kernel()
    assert leaf_levels(k, k.vmalloc.vmalloc(4 << 20), 4 << 20) == [PgLevel.PG_4K] * 1024
    assert leaf_levels(k, k.vmalloc.vmalloc_huge(4 << 20, GFP_KERNEL), 4 << 20) == [PgLevel.PG_2M] * 2
    k = kernel(nodes=4, size=256 << 20)
    assert leaf_levels(k, k.vmalloc.vmalloc_huge(4 << 20, GFP_KERNEL), 4 << 20) == [PgLevel.PG_4K] * 1024


def test_C27_C28_a_gibibyte_by_vmalloc_huge_is_512_leaves_of_2_mib():
    k = kernel(size=4 << 30)
    la = k.vmalloc.vmalloc_huge(1 << 30, GFP_KERNEL)
    assert leaf_levels(k, la, 1 << 30) == [PgLevel.PG_2M] * 512
    area_ = k.vmap.alloc_ioremap_area(1 << 30, 8 << 30)
    assert k.vmap.ioremap_page_range(area_.addr, area_.addr + (1 << 30), 8 << 30, k.mm.prots.kernel) == 0
    assert leaf_levels(k, area_.addr, 1 << 30) == [PgLevel.PG_1G]


def test_C32_one_missing_large_page_makes_all_pages_small_and_the_first_area_lazy():
    k = kernel()
    large = iter(range(10))
    k.pages.should_fail = lambda gfp, order: order == 9 and next(large) == 1
    la = k.vmalloc.vmalloc_huge(4 << 20, GFP_KERNEL)
    assert leaf_levels(k, la, 4 << 20) == [PgLevel.PG_4K] * 1024
    lazy = [end - start for start, end in k.addresses("lazy")]
    assert (4 << 20) + PAGE in lazy
    assert k.task.warn_allocs == []


def test_C33_without_an_aligned_window_the_call_still_succeeds_with_small_pages():
    k = kernel()
    start = VMALLOC_START + PAGE
    prot = k.mm.prots.kernel
    window = (start, start + PMD + 16 * PAGE)
    la = k.vmalloc.vmalloc_node_range(PMD, 1, *window, GFP_KERNEL, prot, Vm.ALLOW_HUGE_VMAP, NUMA_NO_NODE)
    assert la == start
    assert leaf_levels(k, la, PAGE) == [PgLevel.PG_4K]


# Other allocations


def test_C47_an_allocation_takes_its_pages_and_one_page_more_of_addresses():
    k = kernel()
    k.vmalloc.vmalloc(PAGE)
    frames = k.vmalloc.nr_vmalloc_pages
    vm = area(k, k.vmalloc.vmalloc(10 * PAGE))
    assert (k.vmalloc.nr_vmalloc_pages - frames, vm.size // PAGE) == (10, 11)


def test_C48_two_vmaps_of_one_page_alias_it():
    k = kernel()
    frames = k.frames(1)
    first, second = (k.vmap.vmap(frames, 1, Vm.MAP, k.mm.prots.kernel) for _ in range(2))
    k.task.store(first + 8, 0xA11A5)
    assert k.task.load(second + 8) == 0xA11A5


def test_C49_vunmap_keeps_the_frames_even_of_vmalloc_memory():
    k = kernel()
    la = k.vmalloc.vmalloc(PAGE)
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.vmap.vunmap(la)
    assert k.pages.page_count(pfn) == 1
    assert k.task.warnings == []


def test_C50_small_vm_map_ram_requests_share_a_block_and_large_ones_do_not():
    k = kernel()
    first = k.blocks.vm_map_ram(k.frames(1), 1)
    assert k.blocks.vm_map_ram(k.frames(3), 3) == first + PAGE
    assert k.blocks.vm_map_ram(k.frames(65), 65) // (1 << 20) != first // (1 << 20)
    assert k.blocks.vm_map_ram(k.frames(1), 0) == 0
    assert k.task.warnings == ["vb_alloc: "]


def test_C51_mapping_and_unmapping_a_page_as_often_as_a_block_has_pages_takes_one_area():
    # 256 pages a block: the recorded kernels are built for 8192 CPUs.
    k = kernel()
    frames = k.frames(1)
    for _ in range(256):
        k.blocks.vm_unmap_ram(k.blocks.vm_map_ram(frames, 1), 1)
    assert k.addresses("busy") == []
    assert k.addresses("lazy") == [(VMALLOC_START, VMALLOC_START + (1 << 20))]


# Placement and reuse


def test_O01_one_cpu_reuses_the_lowest_hole_and_several_the_highest_purged_area_first():
    for cpus in (1, 4):
        k = kernel(cpus=cpus)
        made = [k.vmalloc.vmalloc(4 * PAGE) for _ in range(16)]
        for la in made[:12]:
            k.vmalloc.vfree(la)
        k.blocks.vm_unmap_aliases()
        assert k.vmalloc.vmalloc(4 * PAGE) == (made[0] if cpus == 1 else made[11])


@pytest.mark.parametrize(("length", "left"), [(3, 0), (8, 6)])
def test_O02_each_drain_takes_a_quarter_of_a_pool_and_all_of_a_pool_of_3(length, left):
    k = kernel(cpus=4)
    made = [k.vmalloc.vmalloc(4 * PAGE) for _ in range(2 * length)]
    for la in made[::2]:
        k.vmalloc.vfree(la)
    k.space.drain()
    assert len(k.space.nodes.nodes[0].pool[4]) == length
    k.space.drain()
    assert len(k.space.nodes.nodes[0].pool.get(4, ())) == left


def test_O03_more_pages_than_there_are_take_no_address():
    k = kernel()
    total = k.pages.totalram_pages()
    assert k.vmalloc.vmalloc((total + 1) * PAGE) == 0
    assert k.vmap.vmap(k.frames(1), total + 1, Vm.MAP, k.mm.prots.kernel) == 0
    assert k.addresses("lazy") == []


def test_O06_large_pages_round_the_area_up_and_keep_the_requested_size():
    k = kernel()
    vm = area(k, k.vmalloc.vmalloc_huge(PMD + PAGE, GFP_KERNEL))
    assert (vm.nr_pages, vm.size, vm.requested_size) == (1024, 4198400, PMD + PAGE)


def test_O10_vmalloc_to_page_finds_the_page_within_a_large_leaf():
    k = kernel()
    la = k.vmalloc.vmalloc_huge(PMD, GFP_KERNEL)
    head = int(area(k, la).pages[0])
    assert [k.vmalloc.vmalloc_to_pfn(la + i * PAGE) for i in (0, 7, 511)] == [head, head + 7, head + 511]
    assert k.vmalloc.vmalloc_to_pfn(la + PMD) is None


@pytest.mark.parametrize("profile", [V6_12, V6_1], ids=lambda profile: profile.name)
def test_O14_a_page_table_that_cannot_be_had_leaves_no_leaf_behind(profile):
    k = kernel(profile)
    k.vmalloc.vmalloc(500 * PAGE)
    # Page tables are the only single zeroed pages here besides those of the array, which come first.
    zeroed = iter(range(9))
    k.pages.should_fail = lambda gfp, order: bool(gfp & Gfp.ZERO) and order == 0 and next(zeroed) >= 2
    asked = VMALLOC_START + 501 * PAGE
    assert k.vmalloc.vmalloc(600 * PAGE) == 0
    k.pages.should_fail = None
    assert leaf_levels(k, asked, 700 * PAGE) == []
    k.validate()
