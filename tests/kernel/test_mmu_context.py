"""User mms on several CPUs: ASIDs, generations, laziness, and who is sent a flush."""

from __future__ import annotations

import random

import pytest
from smp_machine import IF, USER, SmpMachine

from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mmu_context import INIT_CTX_ID, TLB_NR_DYN_ASIDS, kern_pcid, user_pcid
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.kernel.tlbflush import FlushTlbInfo
from emu.mmu.registers import CR3_NO_INVALIDATE

VERSIONS = (V6_12, V6_1, V5_4)
CPUS = (1, 2, 4, 8)
CEILING = 33

every_version = pytest.mark.parametrize("profile", VERSIONS, ids=lambda profile: profile.name)
every_number_of_cpus = pytest.mark.parametrize("cpus", CPUS)
with_and_without_pcid = pytest.mark.parametrize("pcid", [True, False])


def everywhere(m: SmpMachine, mm, pages: int = 1) -> None:
    """Load an mm on every CPU, and have each cache its pages."""
    for number in range(m.online):
        cpu = m.switch(number, mm)
        assert all(cpu.sees(USER + n * PAGE_SIZE, user=True) is not None for n in range(pages))


def unmap(m: SmpMachine, mm, page: int = 0, pages: int = 1) -> tuple[int, int]:
    """Unmap pages of an mm, flushing nothing; the range."""
    return mm.unmap_user(USER + page * PAGE_SIZE, pages * PAGE_SIZE).defer()


# ---------------------------------------------------------------------------------------------------- switching


def test_pcid_0_is_nobody_s_and_user_mode_s_are_2048_above_the_kernel_s():
    assert [kern_pcid(asid) for asid in range(TLB_NR_DYN_ASIDS)] == [1, 2, 3, 4, 5, 6]
    assert [user_pcid(asid) for asid in range(TLB_NR_DYN_ASIDS)] == [2049, 2050, 2051, 2052, 2053, 2054]


@with_and_without_pcid
def test_a_kernel_thread_borrows_the_mm_of_the_thread_before_it(pcid):
    m = SmpMachine(1, pcid=pcid)
    mm = m.mm()
    m.contexts.context_switch(mm.context)
    writes = len(m.cpu[0].cr3_writes)
    m.contexts.context_switch(None)
    state = m.contexts.cpu_tlbstate[0]
    assert state.loaded_mm is mm.context and state.is_lazy
    m.contexts.context_switch(mm.context)
    assert not state.is_lazy and len(m.cpu[0].cr3_writes) == writes
    m.tlb.validate()


def test_without_pcids_a_switch_writes_the_pgd_to_cr3_and_keeps_no_user_translation():
    m = SmpMachine(1)
    first, second = m.mm(), m.mm()
    cpu = m.switch(0, first)
    assert cpu.cr3_writes[-1] == first.pgd and cpu.sees(USER) is not None
    m.switch(0, second)
    m.switch(0, first)
    assert cpu.cr3_writes[-1] == first.pgd and cpu.mmu.query(USER) is None
    assert m.contexts.counters.flushed[0] == 3 and m.contexts.counters.kept[0] == 0


def test_with_pcids_an_mm_that_comes_back_unchanged_keeps_its_translations():
    m = SmpMachine(1, pcid=True)
    first, second = m.mm(), m.mm()
    cpu = m.switch(0, first)
    assert cpu.cr3_writes == [first.pgd | kern_pcid(1)]
    assert cpu.sees(USER) is not None
    m.switch(0, second)
    assert cpu.cr3_writes[-1] == second.pgd | kern_pcid(2)
    assert cpu.mmu.query(USER) is None
    m.switch(0, first)
    assert cpu.cr3_writes[-1] == first.pgd | kern_pcid(1) | CR3_NO_INVALIDATE
    assert cpu.mmu.query(USER) is not None
    m.tlb.validate()


@with_and_without_pcid
def test_an_mm_that_was_changed_while_it_was_away_is_flushed_when_it_comes_back(pcid):
    m = SmpMachine(2, pcid=pcid)
    mm = m.mm()
    cpu = m.switch(1, mm)
    assert cpu.sees(USER) is not None
    m.switch(1, None)
    m.tlb.flush_tlb_mm_range(mm.context, *unmap(m, mm))
    assert m.ipis == []
    m.switch(1, mm)
    assert not cpu.cr3_writes[-1] & CR3_NO_INVALIDATE
    assert cpu.sees(USER) is None
    m.tlb.validate()


def test_with_more_mms_than_asids_the_asid_that_is_next_in_turn_is_taken_over():
    m = SmpMachine(1, pcid=True)
    mms = [m.mm() for _ in range(TLB_NR_DYN_ASIDS)]
    taken = []
    for mm in mms:
        cpu = m.switch(0, mm)
        assert cpu.sees(USER) is not None
        taken.append(m.contexts.cpu_tlbstate[0].loaded_mm_asid)
        m.tlb.validate()
    # init_mm had ASID 0 since boot.
    assert taken == [1, 2, 3, 4, 5, 0]
    assert cpu.cr3_writes[-1] == mms[5].pgd | kern_pcid(0)
    m.switch(0, mms[0])
    assert m.contexts.cpu_tlbstate[0].loaded_mm_asid == 1 and cpu.cr3_writes[-1] & CR3_NO_INVALIDATE
    m.switch(0, None)
    assert m.contexts.cpu_tlbstate[0].loaded_mm_asid == 1 and not cpu.cr3_writes[-1] & CR3_NO_INVALIDATE
    m.switch(0, mms[0])
    assert m.contexts.cpu_tlbstate[0].loaded_mm_asid == 2 and not cpu.cr3_writes[-1] & CR3_NO_INVALIDATE
    m.tlb.validate()


def test_an_mm_never_finds_translations_of_the_mm_that_had_its_asid_before():
    m = SmpMachine(1, pcid=True)
    mms = [m.mm() for _ in range(2 * TLB_NR_DYN_ASIDS)]
    frames = [mm.to_pa(USER) for mm in mms]
    for _ in range(3):
        for mm, frame in zip(mms, frames, strict=True):
            assert m.switch(0, mm).sees(USER) == frame
            m.tlb.validate()


def test_ctx_ids_are_given_once_and_init_mm_has_1():
    m = SmpMachine(1, pcid=True)
    ids = []
    for _ in range(10):
        mm = m.mm()
        m.switch(0, mm)
        ids.append(mm.context.ctx_id)
        m.switch(0, None)
        mm.destroy()
    assert INIT_CTX_ID == m.contexts.init_mm.ctx_id == 1 and ids == list(range(2, 12))


@every_number_of_cpus
def test_an_mm_s_mask_is_of_the_cpus_that_have_it_loaded(cpus):
    m = SmpMachine(cpus)
    first, second = m.mm(), m.mm()
    for number in range(cpus):
        m.switch(number, first)
    assert first.context.cpumask == set(range(cpus))
    m.switch(cpus - 1, second)
    assert first.context.cpumask == set(range(cpus - 1)) and second.context.cpumask == {cpus - 1}
    m.switch(cpus - 1, None)
    assert second.context.cpumask == set()
    m.tlb.validate()


def test_switching_to_the_loaded_mm_writes_no_cr3():
    m = SmpMachine(1)
    mm = m.mm()
    cpu = m.switch(0, mm)
    cpu.cr3_writes.clear()
    m.switch(0, mm)
    m.lazy(0)
    m.switch(0, mm)
    assert cpu.cr3_writes == [] and m.contexts.counters.lazy[0] == 1


@with_and_without_pcid
def test_leave_mm_gives_up_a_lazily_loaded_mm_and_warns_of_one_in_use(pcid):
    m = SmpMachine(1, pcid=pcid)
    mm = m.mm()
    m.contexts.leave_mm()
    assert m.warnings == []
    m.switch(0, mm)
    m.lazy(0)
    m.contexts.leave_mm()
    assert m.contexts.cpu_tlbstate[0].loaded_mm is m.contexts.init_mm and m.warnings == []
    m.switch(0, mm)
    m.contexts.leave_mm()
    assert m.warnings == ["leave_mm"]
    m.tlb.validate()


def test_a_kernel_thread_on_init_mm_is_not_lazy():
    m = SmpMachine(1)
    m.lazy(0)
    assert not m.contexts.cpu_tlbstate[0].is_lazy
    m.tlb.validate()


@pytest.mark.parametrize(("profile", "synced"), [(V6_12, 0), (V6_1, 0), (V5_4, 1)])
def test_before_5_8_the_stack_is_made_present_in_the_next_mm(profile, synced):
    m = SmpMachine(1, profile)
    pgds = []
    m.contexts.sync_current_stack = pgds.append
    mm = m.mm()
    m.switch(0, mm)
    m.switch(0, mm)
    assert pgds == [mm.pgd] * synced


# ---------------------------------------------------------------------------------------------------- flushes


@every_version
@every_number_of_cpus
@with_and_without_pcid
@pytest.mark.parametrize("pages", [1, 3, CEILING, CEILING + 1, 64])
def test_a_flush_reaches_the_cpus_that_use_the_mm_page_by_page_up_to_the_ceiling(cpus, profile, pcid, pages):
    m = SmpMachine(cpus, profile, pcid=pcid)
    mm = m.mm(pages + 1)
    everywhere(m, mm, pages + 1)
    start, end = unmap(m, mm, pages=pages)
    m.tlb.flush_tlb_mm_range(mm.context, start, end)
    assert len(m.ipis) == cpus - 1
    for cpu in m.cpu:
        assert [cpu.sees(USER + n * PAGE_SIZE) for n in range(pages)] == [None] * pages
        assert cpu.invlpgs == (list(range(start, end, PAGE_SIZE)) if pages <= CEILING else [])
        assert (cpu.mmu.query(end) is not None) == (pages <= CEILING)
    m.tlb.validate()


@every_version
@every_number_of_cpus
def test_global_entries_stay_over_a_full_flush_of_an_mm(cpus, profile):
    m = SmpMachine(cpus, profile)
    la = m.floor.layout.vmalloc_start
    m.map_kernel(la)
    mm = m.mm()
    everywhere(m, mm)
    assert all(cpu.sees(la) is not None for cpu in m.cpu)
    m.tlb.flush_tlb_mm(mm.context)
    assert all(cpu.mmu.query(la) is not None and cpu.mmu.query(USER) is None for cpu in m.cpu)


@every_version
@every_number_of_cpus
@pytest.mark.parametrize("freed_tables", [True, False])
def test_a_lazy_cpu_is_sent_a_flush_only_when_tables_were_freed_and_then_leaves_the_mm(cpus, profile, freed_tables):
    m = SmpMachine(cpus + 1, profile)
    mm = m.mm()
    everywhere(m, mm)
    for number in range(1, cpus + 1):
        m.lazy(number)
    m.tlb.flush_tlb_mm_range(mm.context, *unmap(m, mm), freed_tables=freed_tables)
    assert len(m.ipis) == (cpus if freed_tables else 0)
    lazy = m.contexts.cpu_tlbstate[1:]
    assert all((state.loaded_mm is m.contexts.init_mm) == freed_tables for state in lazy)
    assert mm.context.cpumask == ({0} if freed_tables else set(range(cpus + 1)))
    m.tlb.validate()
    if not freed_tables:
        assert all(cpu.mmu.query(USER) is not None for cpu in m.cpu[1:])
    for number in range(1, cpus + 1):
        assert m.switch(number, mm).sees(USER) is None
    m.tlb.validate()


@every_version
def test_a_cpu_that_left_the_mm_gets_no_ipi(profile):
    m = SmpMachine(3, profile)
    mm, other = m.mm(), m.mm()
    everywhere(m, mm)
    m.switch(1, other)
    m.switch(2, None)
    m.tlb.flush_tlb_page(mm.context, unmap(m, mm)[0])
    assert m.ipis == [] and m.cpu[0].invlpgs == [USER]


@every_version
def test_a_flush_of_an_mm_that_this_cpu_does_not_have_is_done_by_the_others(profile):
    m = SmpMachine(3, profile, pcid=True)
    mm = m.mm()
    m.switch(1, mm)
    m.on(0).tlb.flush_tlb_page(mm.context, USER)
    assert [cpu.invlpgs for cpu in m.cpu] == [[], [USER], []]
    m.tlb.validate()


@pytest.mark.parametrize(("profile", "sent"), [(V6_12, 0), (V6_1, 0), (V5_4, 1)])
def test_a_cpu_in_the_mask_with_another_mm_loaded_is_sent_nothing_since_6_1(profile, sent):
    m = SmpMachine(2, profile)
    mm, other = m.mm(), m.mm()
    m.switch(0, mm)
    m.switch(1, other)
    mm.context.cpumask.add(1)  # between two steps of a switch
    m.tlb.flush_tlb_page(mm.context, USER)
    assert len(m.ipis) == sent and m.cpu[1].invlpgs == []
    assert all(cpu == 0 for cpu, _ in m.tlb.counters.up_to_date)


@every_version
@every_number_of_cpus
def test_a_cpu_behind_by_more_than_one_generation_flushes_everything(cpus, profile):
    m = SmpMachine(cpus + 1, profile)
    mm = m.mm(4)
    everywhere(m, mm, 4)
    last = m.cpu[cpus]
    last.rflags &= ~IF
    start, _ = unmap(m, mm)
    with pytest.raises(AssertionError, match="waits for ever"):
        m.tlb.flush_tlb_page(mm.context, start)
    mm.context.tlb_gen += 1  # a second request, whose IPI has not come
    last.rflags |= IF
    m.settle()
    assert last.invlpgs == [] and last.mmu.query(USER + 3 * PAGE_SIZE) is None
    assert m.contexts.cpu_tlbstate[cpus].loaded.tlb_gen == mm.context.tlb_gen
    assert sum(m.tlb.counters.local.values()) == 1


@every_version
def test_a_request_for_one_page_flushes_everything_on_a_cpu_that_missed_the_one_before_it(profile):
    m = SmpMachine(1, profile)
    mm = m.mm()
    everywhere(m, mm)
    mm.context.tlb_gen = 2
    m.tlb._flush_tlb_func(0, _request(mm, 2))
    assert m.cpu[0].invlpgs == [] and sum(m.tlb.counters.local.values()) == 1
    assert m.contexts.cpu_tlbstate[0].loaded.tlb_gen == 2


@pytest.mark.parametrize(("profile", "flushes"), [(V6_12, 0), (V6_1, 0), (V5_4, 1)])
def test_a_request_that_a_cpu_has_passed_already_does_nothing_since_6_0(profile, flushes):
    m = SmpMachine(1, profile)
    mm = m.mm()
    everywhere(m, mm)
    state = m.contexts.cpu_tlbstate[0]
    mm.context.tlb_gen, state.loaded.tlb_gen = 4, 3  # the next request will be 5; this one, 3, is done
    m.tlb._flush_tlb_func(0, _request(mm, 3))
    assert sum(m.tlb.counters.local.values()) == flushes
    assert state.loaded.tlb_gen == (4 if flushes else 3)


@every_version
def test_a_request_finds_nothing_to_do_on_a_cpu_that_is_up_to_date(profile):
    m = SmpMachine(1, profile)
    mm = m.mm()
    everywhere(m, mm)
    m.tlb.flush_tlb_page(mm.context, USER)
    m.cpu[0].invlpgs.clear()
    m.tlb._flush_tlb_func(0, _request(mm, 1))
    assert m.cpu[0].invlpgs == [] and sum(m.tlb.counters.up_to_date.values()) == 1


def _request(mm, generation: int) -> FlushTlbInfo:
    return FlushTlbInfo(mm.context, USER, USER + PAGE_SIZE, 12, False, generation, 0, 1, "test")


@every_version
@pytest.mark.parametrize("span", [1, CEILING, CEILING + 1])
def test_the_ceiling_counts_leaves_of_the_stride(profile, span):
    m = SmpMachine(2, profile)
    mm = m.mm()
    everywhere(m, mm)
    m.tlb.flush_tlb_mm_range(mm.context, USER, USER + (span << 21), 21)
    expected = [USER + (n << 21) for n in range(span)] if span <= CEILING else []
    assert [cpu.invlpgs for cpu in m.cpu] == [expected, expected]


@pytest.mark.parametrize("invpcid", [True, False])
@pytest.mark.parametrize("pages", [1, CEILING + 1])
def test_with_isolation_the_user_pcid_is_flushed_too_at_the_latest_when_user_mode_returns(invpcid, pages):
    m = SmpMachine(1, pcid=True, pti=True, invpcid=invpcid)
    mm = m.mm(pages)
    cpu = m.switch(0, mm)
    asid = m.contexts.cpu_tlbstate[0].loaded_mm_asid
    assert m.contexts.cpu_tlbstate[0].user_pcid_flush_mask == 1 << kern_pcid(asid)
    cpu.set_reg("cr3", m.contexts.user_cr3(0))
    assert cpu.mmu.pcid == user_pcid(asid) and cpu.mmu.cr3 & -PAGE_SIZE == mm.user_pgd
    assert cpu.sees(USER, user=True) is not None
    m.tlb.validate()
    cpu.set_reg("cr3", m.contexts.kernel_cr3(0))
    assert cpu.mmu.cr3 == mm.pgd | kern_pcid(asid)
    m.tlb.flush_tlb_mm_range(mm.context, *unmap(m, mm, pages=pages))
    cpu.set_reg("cr3", m.contexts.user_cr3(0))
    assert cpu.sees(USER, user=True) is None
    m.tlb.validate()


def test_with_isolation_and_without_pcids_each_write_of_cr3_flushes_both_halves():
    m = SmpMachine(1, pti=True)
    mm = m.mm()
    cpu = m.switch(0, mm)
    cpu.set_reg("cr3", m.contexts.user_cr3(0))
    assert cpu.mmu.cr3 == mm.user_pgd and cpu.sees(USER, user=True) is not None
    cpu.set_reg("cr3", m.contexts.kernel_cr3(0))
    assert cpu.mmu.cr3 == mm.pgd and cpu.mmu.query(USER) is None
    m.tlb.validate()


@every_version
@every_number_of_cpus
def test_a_flush_of_an_mm_is_traced_with_the_cpus_it_is_for(cpus, profile):
    m = SmpMachine(cpus + 1, profile)
    mm = m.mm()
    everywhere(m, mm)
    m.lazy(cpus)
    m.tlb.flush_tlb_page(mm.context, USER, cause="zap")
    issued = m.issued()[-1]
    assert (issued.cause, issued.start, issued.end, issued.cpus) == ("zap", USER, USER + PAGE_SIZE, tuple(range(cpus)))
    assert sorted((event.cpu, event.flush) for event in m.flushed()) == [(cpu, issued.flush) for cpu in range(cpus)]
    m.tlb.flush_tlb_mm(mm.context)
    assert m.issued()[-1].cpus == tuple(range(cpus + 1))
    assert all(event.end == m.floor.layout.task_size_max for event in m.flushed() if event.flush == 2)


def test_an_mm_that_a_cpu_has_loaded_is_not_destroyed():
    m = SmpMachine(1)
    mm = m.mm()
    m.switch(0, mm)
    with pytest.raises(AssertionError, match="loaded"):
        mm.destroy()
    m.switch(0, None)
    mm.destroy()


# ---------------------------------------------------------------------------------------------------- all of it together


@every_version
@with_and_without_pcid
@pytest.mark.parametrize("pti", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_no_cpu_uses_a_stale_user_translation_after_the_flush_of_it_has_returned(profile, pcid, pti, seed):
    rng = random.Random(seed)
    m = SmpMachine(4, profile, pcid=pcid, pti=pti, invpcid=bool(seed & 1))
    kernel = m.floor.layout.vmalloc_start
    m.map_kernel(kernel)
    mms = [m.mm(8) for _ in range(9)]
    for _ in range(400):
        number = rng.randrange(4)
        m.on(number)
        state = m.contexts.cpu_tlbstate[number]
        action = rng.randrange(8)
        if action < 3:
            m.switch(number, rng.choice([*mms, None]))
        elif action == 3:
            m.lazy(number)
        elif action == 4:
            mm = rng.choice(mms)
            page, pages = rng.randrange(4), rng.randrange(1, 4)
            for n in range(page, page + pages):
                flush = mm.unmap_user(USER + n * PAGE_SIZE, PAGE_SIZE)
                assert not mm.map_user(USER + n * PAGE_SIZE, PAGE_SIZE, 0x67)
                start, end = flush.defer()
                m.tlb.flush_tlb_mm_range(mm.context, start, end, freed_tables=rng.random() < 0.5)
        elif action == 5:
            m.unmap_kernel(kernel)
            m.map_kernel(kernel)
            m.tlb.flush_tlb_kernel_range(kernel, kernel + PAGE_SIZE)
        m.tlb.validate()
        cpu = m.cpu[number]
        assert cpu.sees(kernel) == m.init_mm.to_pa(kernel)
        loaded = next((mm for mm in mms if mm.context is state.loaded_mm), None)
        if loaded is None or state.is_lazy:
            continue
        where = USER + rng.randrange(8) * PAGE_SIZE
        assert cpu.sees(where) == loaded.to_pa(where)
        if pti:
            cpu.set_reg("cr3", m.contexts.user_cr3(number))
            assert cpu.sees(where, user=True) == loaded.to_pa(where)
            cpu.set_reg("cr3", m.contexts.kernel_cr3(number))
    assert not m.warnings
