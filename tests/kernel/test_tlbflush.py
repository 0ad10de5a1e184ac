"""Flushes of kernel addresses: which CPUs do what, with how many IPIs."""

from __future__ import annotations

import pytest
from smp_machine import IF, SmpMachine

from emu.config import MachineConfig
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mmu_context import kern_pcid, user_pcid
from emu.kernel.pgprot import GLOBAL
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.kernel.purge import VmapSpace
from emu.kernel.smp import CALL_FUNCTION_VECTOR
from emu.kernel.vmap_node import design_of
from emu.machine import Machine
from emu.mmu.registers import CR3_NO_INVALIDATE, Cr4
from emu.trace import FlushIssued, TlbFlushed

VERSIONS = (V6_12, V6_1, V5_4)
CPUS = (1, 2, 4, 8)
MIB = 1 << 20
ALL = 1 << 64
CEILING = 33

every_version = pytest.mark.parametrize("profile", VERSIONS, ids=lambda profile: profile.name)
every_number_of_cpus = pytest.mark.parametrize("cpus", CPUS)


def warm(m: SmpMachine, *addresses: int) -> None:
    """Have every CPU cache the pages at these addresses."""
    for cpu in m.cpu:
        assert all(cpu.sees(la) is not None for la in addresses)


def lazy_areas(m: SmpMachine, *areas: tuple[int, int]) -> VmapSpace:
    """An address space in which areas of (offset, pages) have been unmapped lazily, and every CPU still has their translations."""
    space = VmapSpace(design_of(m.profile), (m.floor.layout.vmalloc_start, m.floor.layout.vmalloc_end), m, m.tlb, None, m)
    space.init_free_space([])
    for offset, pages in areas:
        la = m.floor.layout.vmalloc_start + offset
        va = space.alloc_vmap_area(pages * PAGE_SIZE, PAGE_SIZE, la, la + pages * PAGE_SIZE)
        assert va.va_start == la
        m.map_kernel(la, pages)
        warm(m, *range(la, la + pages * PAGE_SIZE, PAGE_SIZE))
        m.unmap_kernel(la, pages)
        if space.design.sharded:
            space.nodes.addr_to_node(la).busy.unlink(va)
        space.free_vmap_area_noflush(va)
    return space


# ---------------------------------------------------------------------------------------------------- the ledger's row


@every_version
@every_number_of_cpus
def test_C35_purge_of_5_contiguous_pages_is_n_minus_1_ipis_and_5_invlpgs_on_each_cpu(cpus, profile):
    m = SmpMachine(cpus, profile)
    start = m.floor.layout.vmalloc_start
    other = start + MIB
    m.map_kernel(other)
    space = lazy_areas(m, (0, 5))
    warm(m, other)
    assert all(cpu.sees(start + 4 * PAGE_SIZE) is not None for cpu in m.cpu)
    assert space.purge_vmap_area_lazy(ALL - 1, 0)
    assert len(m.ipis) == cpus - 1
    for cpu in m.cpu:
        assert cpu.invlpgs == [start + n * PAGE_SIZE for n in range(5)]
        assert all(cpu.sees(start + n * PAGE_SIZE) is None for n in range(5))
        assert cpu.mmu.query(other) is not None
        assert cpu.cr4_writes == []
    m.tlb.validate()


@every_version
@every_number_of_cpus
def test_C35_purge_of_two_areas_1_mib_apart_is_one_full_flush_on_each_cpu_and_drops_unrelated_global_entries(cpus, profile):
    m = SmpMachine(cpus, profile)
    start = m.floor.layout.vmalloc_start
    other = start + 8 * MIB
    m.map_kernel(other)
    space = lazy_areas(m, (0, 1), (MIB, 1))
    warm(m, other)
    assert all(cpu.mmu.query(other).entry & GLOBAL for cpu in m.cpu)
    assert space.purge_vmap_area_lazy(ALL - 1, 0)
    assert len(m.ipis) == cpus - 1
    for cpu in m.cpu:
        assert cpu.invlpgs == []
        assert len(cpu.cr4_writes) == 2 and cpu.cr4_writes[0] ^ cpu.cr4_writes[1] == Cr4.PGE
        assert cpu.mmu.query(other) is None
        assert cpu.mmu.listing() == []
    assert set(m.tlb.counters.full.values()) == {1} and len(m.tlb.counters.full) == cpus


@every_number_of_cpus
def test_C35_a_cpu_that_is_lazy_is_not_spared_a_flush_of_kernel_addresses(cpus):
    m = SmpMachine(cpus)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    for number in range(cpus):
        m.switch(number, m.mm())
        m.lazy(number)
    warm(m, la)
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    assert [cpu.mmu.query(la) for cpu in m.cpu] == [None] * cpus


@every_number_of_cpus
def test_C35_invlpgb_flushes_every_cpu_at_once_without_an_ipi(cpus):
    for pages, instructions in ((1, 1), (5, 1), (CEILING, 5)):
        m = SmpMachine(cpus, invlpgb=True)
        la, other = m.floor.layout.vmalloc_start, m.floor.layout.vmalloc_start + MIB
        m.map_kernel(la, pages)
        m.map_kernel(other)
        warm(m, la, la + (pages - 1) * PAGE_SIZE, other)
        for cpu in m.cpu:
            cpu.rflags &= ~IF
        m.tlb.flush_tlb_kernel_range(la, la + pages * PAGE_SIZE, cause="purge")
        assert m.ipis == [] and m.tlb.counters.invlpgb == {"purge": instructions}
        assert all(cpu.mmu.query(la) is cpu.mmu.query(la + (pages - 1) * PAGE_SIZE) is None for cpu in m.cpu)
        assert all(cpu.mmu.query(other) is not None for cpu in m.cpu)
        m.tlb.flush_tlb_kernel_range(la, la + (CEILING + 1) * PAGE_SIZE)
        m.tlb.flush_tlb_all()
        assert m.ipis == [] and all(cpu.mmu.listing() == [] for cpu in m.cpu)


def test_C35_invlpgb_reaches_the_entries_of_every_pcid():
    m = SmpMachine(2, invlpgb=True, pcid=True)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    cpu = m.switch(1, m.mm())
    assert cpu.sees(la) is not None
    tables = cpu.mmu.tlb.context(kern_pcid(1)).tables[2]
    assert la >> 21 in tables
    m.switch(1, m.mm())
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    assert la >> 21 not in tables


# ---------------------------------------------------------------------------------------------------- ranges


@every_version
@every_number_of_cpus
@pytest.mark.parametrize("pages", [1, 2, 5, CEILING - 1, CEILING, CEILING + 1, 512])
def test_up_to_33_pages_are_flushed_one_by_one_and_more_is_everything(cpus, profile, pages):
    m = SmpMachine(cpus, profile)
    la = m.floor.layout.vmalloc_start + MIB
    m.map_kernel(la - PAGE_SIZE, pages + 2)
    warm(m, *range(la - PAGE_SIZE, la + (pages + 1) * PAGE_SIZE, PAGE_SIZE))
    m.tlb.flush_tlb_kernel_range(la, la + pages * PAGE_SIZE)
    for cpu in m.cpu:
        inside = [cpu.mmu.query(la + n * PAGE_SIZE) for n in range(pages)]
        around = [cpu.mmu.query(la - PAGE_SIZE), cpu.mmu.query(la + pages * PAGE_SIZE)]
        assert inside == [None] * pages
        assert all(around) if pages <= CEILING else around == [None, None]
        assert len(cpu.invlpgs) == (pages if pages <= CEILING else 0)
    assert len(m.ipis) == cpus - 1


@every_number_of_cpus
def test_an_end_that_is_not_page_aligned_takes_in_its_page(cpus):
    m = SmpMachine(cpus)
    la = m.floor.layout.vmalloc_start
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE - 1)
    assert all(cpu.invlpgs == [la] for cpu in m.cpu)


@every_number_of_cpus
def test_the_cpu_that_asks_may_be_any(cpus):
    for asking in range(cpus):
        m = SmpMachine(cpus).on(asking)
        la = m.floor.layout.vmalloc_start
        m.map_kernel(la)
        warm(m, la)
        m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
        assert [cpu.mmu.query(la) for cpu in m.cpu] == [None] * cpus
        assert [to for to, _ in m.sent()] == [cpu for cpu in range(cpus) if cpu != asking]


def test_until_the_other_cpu_takes_the_ipi_it_reaches_what_was_unmapped():
    m = SmpMachine(2)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    warm(m, la)
    m.unmap_kernel(la)
    m.cpu[1].rflags &= ~IF
    with pytest.raises(AssertionError, match="waits for ever"):
        m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    assert m.cpu[0].sees(la) is None and m.cpu[1].sees(la) is not None
    m.cpu[1].rflags |= IF
    m.settle()
    assert m.cpu[1].sees(la) is None


@every_number_of_cpus
def test_flush_tlb_one_kernel_and_flush_tlb_all_local_reach_this_cpu_alone(cpus):
    m = SmpMachine(cpus).on(cpus - 1)
    la, other = m.floor.layout.vmalloc_start, m.floor.layout.vmalloc_start + PAGE_SIZE
    m.map_kernel(la, 2)
    warm(m, la, other)
    m.tlb.flush_tlb_one_kernel(la)
    assert [cpu.mmu.query(la) is None for cpu in m.cpu] == [cpu.id == cpus - 1 for cpu in m.cpu]
    m.tlb.flush_tlb_all_local()
    assert [cpu.mmu.query(other) is None for cpu in m.cpu] == [cpu.id == cpus - 1 for cpu in m.cpu]
    assert m.ipis == [] and [event.cpu for event in m.flushed()] == [cpus - 1] * 2


@every_number_of_cpus
@pytest.mark.parametrize("pcid", [True, False])
@pytest.mark.parametrize("invpcid", [True, False])
def test_a_full_flush_is_invpcid_where_there_is_one_and_else_a_toggle_of_pge(cpus, pcid, invpcid):
    m = SmpMachine(cpus, pcid=pcid, invpcid=invpcid)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    for number in range(cpus):
        m.switch(number, m.mm())
    warm(m, la)
    m.tlb.flush_tlb_all()
    for cpu in m.cpu:
        assert cpu.mmu.listing() == []
        assert len(cpu.cr4_writes) == (0 if invpcid else 2)
        assert cpu.mmu.cr4 & Cr4.PGE
    assert len(m.ipis) == cpus - 1


# ---------------------------------------------------------------------------------------------------- isolation


@pytest.mark.parametrize("invpcid", [True, False])
def test_with_isolation_a_flush_of_a_kernel_page_reaches_the_user_pcid_at_the_latest_when_user_mode_returns(invpcid):
    m = SmpMachine(1, pcid=True, pti=True, invpcid=invpcid)
    cpu = m.switch(0, m.mm())
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    asid = m.contexts.cpu_tlbstate[0].loaded_mm_asid
    # As if the page were mapped in the user PGD too.
    assert cpu.sees(la) is not None
    packed = cpu.mmu.tlb.context(kern_pcid(asid)).pages[1][la >> 12]
    user = cpu.mmu.tlb.context(user_pcid(asid)).pages[1]
    user[la >> 12] = packed
    m.contexts.cpu_tlbstate[0].user_pcid_flush_mask = 0
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    assert cpu.mmu.query(la) is None
    assert (la >> 12 in user) == (not invpcid)
    cr3 = m.contexts.user_cr3(0)
    assert bool(cr3 & CR3_NO_INVALIDATE) == invpcid
    cpu.set_reg("cr3", cr3)
    assert la >> 12 not in user
    assert m.contexts.user_cr3(0) & CR3_NO_INVALIDATE
    cpu.set_reg("cr3", m.contexts.kernel_cr3(0))
    m.tlb.validate()


def test_with_isolation_a_flush_of_a_kernel_page_reaches_the_other_mms_when_they_are_loaded():
    m = SmpMachine(1, pcid=True, pti=True, invpcid=True)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    first, second = m.mm(), m.mm()
    cpu = m.switch(0, first)
    assert cpu.sees(la) is not None and not cpu.mmu.query(la).entry & GLOBAL
    m.switch(0, second)
    assert cpu.sees(la) is not None
    m.unmap_kernel(la)
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    assert cpu.sees(la) is None
    m.tlb.validate()
    m.switch(0, first)
    assert cpu.sees(la) is None
    m.tlb.validate()
    m.switch(0, second)
    assert cpu.cr3_writes[-1] & CR3_NO_INVALIDATE  # it was loaded when the flush came


def test_without_isolation_other_mms_keep_their_translations_over_a_flush_of_a_kernel_page():
    m = SmpMachine(1, pcid=True)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    first, second = m.mm(), m.mm()
    m.switch(0, first)
    m.switch(0, second)
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE)
    cpu = m.switch(0, first)
    assert cpu.cr3_writes[-1] & CR3_NO_INVALIDATE


def test_invlpgb_and_isolation_exclude_each_other():
    with pytest.raises(ValueError, match="INVLPGB"):
        SmpMachine(1, pti=True, invlpgb=True)


# ---------------------------------------------------------------------------------------------------- what is told


@every_version
@every_number_of_cpus
def test_a_flush_is_traced_when_it_is_asked_for_and_when_each_cpu_has_done_it(cpus, profile):
    m = SmpMachine(cpus, profile)
    la = m.floor.layout.vmalloc_start
    everyone = tuple(range(cpus))
    m.tlb.flush_tlb_kernel_range(la, la + PAGE_SIZE, cause="vunmap_range")
    m.tlb.flush_tlb_all()
    assert m.issued() == [
        FlushIssued(1, 0, la, la + PAGE_SIZE, "vunmap_range", everyone), FlushIssued(2, 0, 0, ALL, "flush_tlb_all", everyone)
    ]
    done = sorted(m.flushed(), key=lambda event: (event.flush, event.cpu))
    assert done == [TlbFlushed(cpu, la, la + PAGE_SIZE, 1) for cpu in everyone] + [TlbFlushed(cpu, 0, ALL, 2) for cpu in everyone]
    assert m.events[0] == m.issued()[0]


@every_number_of_cpus
def test_invlpgs_full_flushes_and_ipis_are_counted_by_cause(cpus):
    m = SmpMachine(cpus)
    la = m.floor.layout.vmalloc_start
    for pages in (2, 3):
        m.tlb.flush_tlb_kernel_range(la, la + pages * PAGE_SIZE, cause="percpu")
    m.tlb.flush_tlb_kernel_range(la, la + 64 * PAGE_SIZE, cause="vm_unmap_aliases")
    counters = m.tlb.counters
    assert counters.requests == {"percpu": 2, "vm_unmap_aliases": 1}
    assert counters.invlpg == {(cpu, "percpu"): 5 for cpu in range(cpus)}
    assert counters.full == {(cpu, "vm_unmap_aliases"): 1 for cpu in range(cpus)}
    assert m.smp.counters.sent_for("percpu") == 2 * (cpus - 1)
    assert m.smp.counters.sent_for("vm_unmap_aliases") == cpus - 1
    if cpus > 2:
        assert {vector for _, vector in m.sent()} == {CALL_FUNCTION_VECTOR}


# ---------------------------------------------------------------------------------------------------- on a real machine


@every_number_of_cpus
def test_C35_through_the_idt_of_every_cpu(cpus):
    machine = Machine(MachineConfig(cpus=cpus, memory=256 * MIB))
    la = machine.kernel.layout.vmalloc_start + MIB
    machine.flushes.flush_tlb_kernel_range(la, la + 5 * PAGE_SIZE, cause="near")
    machine.flushes.flush_tlb_kernel_range(la, la + MIB, cause="far")
    counters, calls = machine.flushes.counters, machine.kernel.smp.counters
    assert counters.invlpg == {(cpu, "near"): 5 for cpu in range(cpus)}
    assert counters.full == {(cpu, "far"): 1 for cpu in range(cpus)}
    assert calls.sent_for("near") == calls.sent_for("far") == cpus - 1
    assert sum(calls.received.values()) == 2 * (cpus - 1)
    machine.flushes.validate()
