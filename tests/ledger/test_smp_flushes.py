"""Lazy flushing and shootdowns on several CPUs, each row seen from the CPUs themselves."""

from __future__ import annotations

import numpy as np
import pytest

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.machine import Machine

PAGE = 4096
PROBES = """
section .text
init_module:
    ret
read:
    mov rax, [rdi]
    ret
write:
    mov qword [rdi], 0x41
    ret
"""


class Cpus:
    """A machine of several CPUs that reads and writes addresses from any of them."""

    def __init__(self, cpus: int, **config: object) -> None:
        self.machine = Machine(MachineConfig(cpus=cpus, memory=256 << 20, **config), limit=10_000_000)
        self.linked = self.machine.load(assemble(PROBES, "probes.asm"))[1]
        self.kernel = self.machine.kernel
        self.count = cpus

    def do(self, cpu: int, what: str, la: int) -> int | None:
        """RAX of the access from a CPU, None when it faulted."""
        if cpu == 0:
            ended, returned = self.machine.call(self.linked.symbols[what], argument=la)
            return returned if ended == "returned" else None
        got: list[int] = []
        thread = self.kernel.create_thread(what, cpu, function=self.linked.symbols[what], argument=la, runs=False)
        thread.on_exit = got.append
        self.kernel.cpus.current = 0
        self.kernel.sched.start(thread)
        finish = self.machine.hub.run(lambda: bool(got) or thread.state.name == "DEAD")
        if not got:
            self.kernel.abandon(thread)
        assert finish is not None
        return got[0] if got else None

    def cached(self, la: int) -> list[int]:
        """The CPUs whose TLB has a translation of an address."""
        return [cpu.id for cpu in self.machine.cpus if cpu.mmu.query(la) is not None]

    def vmalloc(self, pages: int) -> int:
        la = self.kernel.vmalloc.vmalloc(pages * PAGE)
        assert la
        return la


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_C34_after_vfree_a_cpu_that_had_the_page_reads_on_and_one_that_had_not_faults_until_the_purge(cpus):
    on = Cpus(cpus)
    la = on.vmalloc(1)
    assert on.do(1, "read", la) == 0
    assert on.cached(la) == [1]
    on.kernel.vmalloc.vfree(la)
    assert on.do(1, "read", la) is not None
    assert on.do(0, "read", la) is None
    on.kernel.vmap_blocks.vm_unmap_aliases()
    assert on.cached(la) == []
    assert on.do(1, "read", la) is None


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_C35_a_purge_of_five_pages_is_one_ipi_for_each_other_cpu_and_five_invlpgs_on_each(cpus):
    """Four pages and their guard page make five; the ledger's five contiguous pages are an area of four."""
    on = Cpus(cpus)
    la = on.vmalloc(4)
    before = on.machine.counts()
    on.kernel.vmalloc.vfree(la)
    on.kernel.vmap_blocks.vm_unmap_aliases()
    after = on.machine.counts()
    assert after["ipi"] - before["ipi"] == cpus - 1
    assert after["invlpg"] - before["invlpg"] == 5 * cpus
    assert (after["flush"] - before["flush"], after["full-flush"] - before["full-flush"]) == (1, 0)


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_C35_a_purge_of_two_distant_areas_is_one_full_flush_that_takes_unrelated_globals_too(cpus):
    on = Cpus(cpus)
    other = on.vmalloc(1)
    first = on.vmalloc(1)
    second = on.vmalloc(1)
    while abs(second - first) < 1 << 20:
        second = on.vmalloc(1)
    assert on.do(cpus - 1, "read", other) == 0 and cpus - 1 in on.cached(other)
    before = on.machine.counts()
    on.kernel.vmalloc.vfree(first)
    on.kernel.vmalloc.vfree(second)
    on.kernel.vmap_blocks.vm_unmap_aliases()
    after = on.machine.counts()
    assert after["ipi"] - before["ipi"] == cpus - 1
    assert (after["invlpg"], after["full-flush"] - before["full-flush"]) == (before["invlpg"], 1)
    assert on.cached(other) == []


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_C37_vfree_itself_flushes_nothing_and_counts_its_pages_guards_included(cpus):
    on = Cpus(cpus)
    areas = [on.vmalloc(pages) for pages in range(1, 11)]
    before = on.machine.counts()
    lazy = on.kernel.vmalloc.space.vmap_lazy_nr
    for la in areas:
        on.kernel.vmalloc.vfree(la)
    assert on.machine.counts() == before
    assert on.kernel.vmalloc.space.vmap_lazy_nr - lazy == sum(range(1, 11)) + 10


@pytest.mark.parametrize("debug", [False, True])
def test_C36_a_stale_store_reaches_the_frames_next_owner_unless_every_unmapping_is_flushed(debug):
    on = Cpus(2, debug_pagealloc=debug)
    la = on.vmalloc(1)
    pfn = on.kernel.init_mm.to_pa(la) >> 12
    assert on.do(1, "write", la) is not None
    on.kernel.vmalloc.vfree(la)
    owner = on.kernel.pages.alloc_pages(0xCC0)
    while owner != pfn:
        owner = on.kernel.pages.alloc_pages(0xCC0)
        assert owner is not None
    on.machine.memory.write_u64(pfn << 12, 0x1234)
    stored = on.do(1, "write", la)
    assert (stored is None) is debug
    assert on.machine.memory.read_u64(pfn << 12) == (0x1234 if debug else 0x41)


@pytest.mark.parametrize(("cpus", "pages"), [(1, 8192), (2, 16384), (3, 16384), (4, 24576), (7, 24576), (8, 32768), (64, 57344)])
def test_C39_lazy_max_pages_grows_with_the_logarithm_of_the_cpus(cpus, pages):
    on = Cpus(cpus)
    assert on.kernel.vmalloc.space.lazy_max_pages() == pages


@pytest.mark.parametrize("cpus", [2, 4])
def test_C40_freed_addresses_are_not_handed_out_before_a_purge(cpus):
    on = Cpus(cpus)
    before = on.machine.counts()["flush"]
    freed = on.vmalloc(3)
    on.kernel.vmalloc.vfree(freed)
    again = [on.vmalloc(3) for _ in range(8)]
    assert freed not in again
    assert on.machine.counts()["flush"] == before


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_C41_vm_unmap_aliases_flushes_a_dirty_block_once_and_then_nothing(cpus):
    on = Cpus(cpus)
    frames = np.array([on.kernel.pages.alloc_pages(0xCC0) for _ in range(2)], dtype=np.int64)
    la = on.kernel.vmap_blocks.vm_map_ram(frames, 2, -1)
    assert on.do(cpus - 1, "read", la) is not None
    on.kernel.vmap_blocks.vm_unmap_ram(la, 2)
    assert on.cached(la) == [cpus - 1]
    before = on.machine.counts()
    on.kernel.vmap_blocks.vm_unmap_aliases()
    once = on.machine.counts()
    assert once["flush"] + once["full-flush"] == before["flush"] + before["full-flush"] + 1
    assert once["ipi"] - before["ipi"] == cpus - 1
    assert on.cached(la) == []
    on.kernel.vmap_blocks.vm_unmap_aliases()
    assert on.machine.counts() == once


@pytest.mark.parametrize("cpus", [1, 2, 4])
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


def test_C29_a_huge_leaf_takes_one_entry_where_small_pages_take_512():
    fills = {}
    for huge in (True, False):
        on = Cpus(2, nohugevmalloc=not huge)
        la = on.kernel.vmalloc.vmalloc_huge(2 << 20, 0xCC0)
        mmu = on.machine.cpus[1].mmu
        before = mmu.tlb.fills
        for page in range(512):
            mmu.read(la + page * PAGE, 8, user=False)
        fills[huge] = mmu.tlb.fills - before
    assert fills == {True: 1, False: 512}
