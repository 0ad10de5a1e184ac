"""Lazy flushing and shootdowns on several CPUs, each row seen from the CPUs themselves."""

from __future__ import annotations

import pytest
from several_cpus import GFP_KERNEL, PAGE, Cpus

from emu.kernel.vmallocinfo import vmallocinfo_rows
from emu.mmu.registers import Cr4

every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])
every_version = pytest.mark.parametrize("version", ["6.12", "6.1"])


def purge(on: Cpus, cpu: int = 0) -> None:
    on.on(cpu).vmap_blocks.vm_unmap_aliases()


@every_version
@every_number_of_cpus
def test_C34_after_vfree_a_cpu_that_had_the_page_reads_on_and_every_other_faults_until_the_purge(cpus, version):
    on = Cpus(cpus, kernel=version)
    last = cpus - 1
    la = on.vmalloc(1)
    assert on.do(last, "read", la) == 0
    assert on.cached(la) == [last]
    on.on(0).vmalloc.vfree(la)
    assert on.do(last, "read", la) is not None
    assert all(on.faults(cpu, la) for cpu in range(last))
    purge(on)
    assert on.cached(la) == []
    assert all(on.faults(cpu, la) for cpu in range(cpus))


@every_version
@every_number_of_cpus
def test_C35_a_purge_of_five_pages_is_one_ipi_for_each_other_cpu_and_five_invlpgs_on_each(cpus, version):
    """Four pages and their guard page make five; the ledger's five contiguous pages are an area of four."""
    on = Cpus(cpus, kernel=version)
    la = on.vmalloc(4)
    before = on.counted()
    on.kernel.vmalloc.vfree(la)
    purge(on, cpus - 1)
    assert on.since(before) == (cpus - 1, 5 * cpus, 1, 0)


@every_number_of_cpus
@pytest.mark.parametrize("pages", [32, 33])
def test_C35_a_span_of_33_pages_is_flushed_one_by_one_and_of_34_by_a_full_flush(pages, cpus):
    on = Cpus(cpus)
    la = on.vmalloc(pages)
    before = on.counted()
    on.kernel.vmalloc.vfree(la)
    purge(on)
    assert on.since(before) == ((cpus - 1, 33 * cpus, 1, 0) if pages == 32 else (cpus - 1, 0, 0, 1))


@every_version
@every_number_of_cpus
def test_C35_a_purge_of_two_distant_areas_is_one_full_flush_that_takes_unrelated_globals_too(cpus, version):
    on = Cpus(cpus, kernel=version)
    other, first = on.vmalloc(1), on.vmalloc(1)
    second = on.vmalloc(1)
    while abs(second - first) < 1 << 20:
        second = on.vmalloc(1)
    for cpu in range(cpus):
        assert on.do(cpu, "read", other) == 0
    assert on.cached(other) == list(range(cpus))
    before = on.counted()
    on.on(0).vmalloc.vfree(first)
    on.kernel.vmalloc.vfree(second)
    purge(on)
    assert on.since(before) == (cpus - 1, 0, 0, 1)
    assert on.cached(other) == []


@every_number_of_cpus
def test_C35_with_invlpgb_a_purge_reaches_every_cpu_without_an_ipi(cpus):
    on = Cpus(cpus, invlpgb=True)
    la = on.vmalloc(4)
    for cpu in range(cpus):
        assert on.do(cpu, "read", la) == 0
    before = on.counted()
    on.on(0).vmalloc.vfree(la)
    assert on.cached(la) == list(range(cpus))
    purge(on)
    assert on.since(before)[0] == 0
    assert on.cached(la) == []


@every_version
@every_number_of_cpus
def test_C37_vfree_itself_flushes_nothing_and_counts_its_pages_guards_included(cpus, version):
    on = Cpus(cpus, kernel=version)
    areas = [on.vmalloc(pages, pages % cpus) for pages in range(1, 11)]
    before = on.counted()
    lazy = on.kernel.vmalloc.space.vmap_lazy_nr
    for number, la in enumerate(areas):
        on.on(number % cpus).vmalloc.vfree(la)
    assert on.since(before) == (0, 0, 0, 0)
    assert on.kernel.vmalloc.space.vmap_lazy_nr - lazy == sum(range(1, 11)) + 10
    rows = [row for row in vmallocinfo_rows(on.kernel.vmalloc, hex) if row.endswith("unpurged vm_area")]
    # Up to 6.8 lazy areas that touch become one.
    assert (len(rows) == 10) is (version == "6.12")


@every_number_of_cpus
@pytest.mark.parametrize("debug", [False, True])
def test_C36_a_stale_store_reaches_the_frames_next_owner_unless_every_unmapping_is_flushed(debug, cpus):
    on = Cpus(cpus, debug_pagealloc=debug)
    last = cpus - 1
    la = on.vmalloc(1)
    pfn = on.kernel.init_mm.to_pa(la) >> 12
    assert on.do(last, "write", la) is not None
    on.on(0).vmalloc.vfree(la)
    owner = on.kernel.pages.alloc_pages(0xCC0)
    while owner != pfn:
        owner = on.kernel.pages.alloc_pages(0xCC0)
        assert owner is not None
    on.machine.memory.write_u64(pfn << 12, 0x1234)
    assert on.faults(last, la, 2) is debug
    assert on.machine.memory.read_u64(pfn << 12) == (0x1234 if debug else 0x41)
    assert all(on.faults(cpu, la, 2) for cpu in range(last))


@pytest.mark.parametrize(("cpus", "pages"), [(1, 8192), (2, 16384), (3, 16384), (4, 24576), (7, 24576), (8, 32768), (64, 57344)])
def test_C39_lazy_max_pages_grows_with_the_logarithm_of_the_cpus(cpus, pages):
    on = Cpus(cpus)
    assert on.kernel.vmalloc.space.lazy_max_pages() == pages


@every_version
@every_number_of_cpus
def test_C40_freed_addresses_are_not_handed_out_before_a_purge(cpus, version):
    on = Cpus(cpus, kernel=version)
    before = on.counted()
    freed = on.vmalloc(3)
    on.kernel.vmalloc.vfree(freed)
    again = [on.vmalloc(3, cpu) for cpu in range(cpus) for _ in range(8)]
    assert freed not in again
    assert on.since(before) == (0, 0, 0, 0)


@every_version
@every_number_of_cpus
def test_C40_without_other_room_one_flush_of_every_cpu_precedes_the_reuse_of_a_freed_address(cpus, version):
    on = Cpus(cpus, kernel=version)
    kernel, last = on.kernel, cpus - 1
    la = on.vmalloc(2)
    assert on.do(last, "read", la) == 0
    on.on(0).vmalloc.vfree(la)
    assert on.cached(la) == [last]
    before = on.counted()
    prot = kernel.init_mm.prots.kernel
    again = kernel.vmalloc.vmalloc_node_range(2 * PAGE, 1, la, la + 3 * PAGE, GFP_KERNEL, prot, 0, -1)
    assert again == la
    ipis, _, ranges, full = on.since(before)
    assert (ipis, ranges + full) == (cpus - 1, 1)
    assert on.cached(la) == []


@every_version
@every_number_of_cpus
def test_C41_vm_unmap_aliases_flushes_a_dirty_block_once_and_then_nothing(cpus, version):
    on = Cpus(cpus, kernel=version)
    last = cpus - 1
    la = on.kernel.vmap_blocks.vm_map_ram(on.frames(2), 2, -1)
    purge(on)
    assert on.do(last, "read", la) is not None
    on.settle()
    purge(on)
    on.on(0).vmap_blocks.vm_unmap_ram(la, 2)
    assert on.cached(la) == [last]
    before = on.counted()
    purge(on)
    # Up to 6.8 a block without a page in use is given up whole: 256 pages.
    assert on.since(before) == ((cpus - 1, 2 * cpus, 1, 0) if version == "6.12" else (cpus - 1, 0, 0, 1))
    assert on.cached(la) == []
    before = on.counted()
    purge(on, last)
    assert on.since(before) == (0, 0, 0, 0)


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_C41_vm_unmap_aliases_sweeps_the_blocks_of_every_cpu(cpus):
    on = Cpus(cpus)
    pieces = [on.on(cpu).vmap_blocks.vm_map_ram(on.frames(1), 1, -1) for cpu in range(cpus)]
    assert len({la >> 20 for la in pieces}) == cpus, "a block for each CPU"
    for cpu, la in enumerate(pieces):
        assert on.do(cpu, "read", la) is not None
        on.on(cpu).vmap_blocks.vm_unmap_ram(la, 1)
    before = on.counted()
    purge(on)
    assert on.since(before) == (cpus - 1, 0, 0, 1)
    assert [on.cached(la) for la in pieces] == [[]] * cpus


@every_number_of_cpus
def test_O15_kernel_translations_survive_a_load_of_cr3_and_fall_to_invlpg_on_that_cpu_alone(cpus):
    on = Cpus(cpus)
    la = on.vmalloc(1)
    for cpu in range(cpus):
        assert on.do(cpu, "read", la) == 0
    for cpu in on.machine.cpus:
        cpu.set_reg("cr3", cpu.reg("cr3"))
    assert on.cached(la) == list(range(cpus))
    on.machine.cpus[cpus - 1].invlpg(la)
    assert on.cached(la) == list(range(cpus - 1))
    for cpu in on.machine.cpus:
        cpu.set_reg("cr4", cpu.reg("cr4") ^ Cr4.PGE)
        cpu.set_reg("cr4", cpu.reg("cr4") ^ Cr4.PGE)
    assert on.cached(la) == []


@every_number_of_cpus
def test_O15_with_isolation_kernel_translations_are_not_global_and_fall_to_a_load_of_cr3(cpus):
    on = Cpus(cpus, pti=True)
    la = on.vmalloc(1)
    for cpu in range(cpus):
        assert on.do(cpu, "read", la) == 0
    cpu = on.machine.cpus[cpus - 1]
    cpu.set_reg("cr3", cpu.reg("cr3"))
    assert on.cached(la) == list(range(cpus - 1))


@every_number_of_cpus
@pytest.mark.parametrize(("huge", "entries", "level"), [(True, 1, 2), (False, 512, 1)])
def test_C29_512_pages_take_each_cpu_one_entry_under_a_huge_leaf_and_512_under_small_ones(huge, entries, level, cpus):
    on = Cpus(cpus, nohugevmalloc=not huge)
    la = on.kernel.vmalloc.vmalloc_huge(2 << 20, GFP_KERNEL)
    for cpu in on.machine.cpus:
        before = cpu.mmu.tlb.fills
        assert on.do(cpu.id, "touch512", la) is not None
        cached = [entry for entry in cpu.mmu.listing() if la <= entry.la < la + (2 << 20)]
        assert [int(entry.level) for entry in cached] == [level] * entries
        assert 0 <= cpu.mmu.tlb.fills - before - entries < 20, "the rest is the thread's own code and stack"
