"""Whose mm a CPU has loaded after a thread has died in an oops, and after a guest has written CR3 by itself."""

from __future__ import annotations

import pytest
from several_cpus import Cpus

from emu.kernel.mm import PAGE_SHARED, Mm

USER = 0x4000_0000
PAGE = 4096
every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4])
with_and_without_pcid = pytest.mark.parametrize("pcid", [False, True])


def new_mm(on: Cpus) -> Mm:
    mm = Mm(on.kernel.init_mm)
    on.machine.mm_api.mms[mm.pgd] = mm
    assert mm.map_user(USER, PAGE, PAGE_SHARED) == 0
    return mm


@with_and_without_pcid
@every_number_of_cpus
def test_a_thread_that_dies_in_an_oops_drops_its_mm_and_its_cpu_keeps_it_lazily(cpus, pcid):
    on = Cpus(cpus, pcid=pcid)
    mm = new_mm(on)
    last = cpus - 1
    contexts = on.kernel.contexts
    assert on.do(last, "switch_and_die", mm.pgd) is None
    assert on.thread is not None and on.thread.mm is None
    state = contexts.cpu_tlbstate[last]
    assert state.loaded_mm is mm.context and state.is_lazy
    contexts.validate()
    assert on.do(0, "destroy_mm", mm.pgd) == 0
    assert state.loaded_mm is contexts.init_mm and not state.is_lazy
    assert contexts.foreign_cr3(last) is None
    contexts.validate()


@with_and_without_pcid
@every_number_of_cpus
def test_a_guest_that_writes_cr3_itself_changes_no_bookkeeping_and_the_next_switch_of_mms_undoes_it(cpus, pcid):
    on = Cpus(cpus, pcid=pcid)
    first, second = new_mm(on), new_mm(on)
    last = cpus - 1
    contexts = on.kernel.contexts
    assert on.do(last, "load_cr3", first.pgd) == first.pgd
    state = contexts.cpu_tlbstate[last]
    assert contexts.foreign_cr3(last) == first.pgd
    assert [contexts.foreign_cr3(cpu) for cpu in range(last)] == [None] * last
    assert state.loaded_mm is contexts.init_mm and first.context.cpumask == set()
    contexts.validate()
    on.machine.flushes.validate()
    assert on.do(0, "destroy_mm", first.pgd) == (1 << 64) - 16, "EBUSY: its tables are in use"
    assert on.do(last, "switch_mm", second.pgd) == contexts.build_cr3(second.context, state.loaded_mm_asid)
    assert contexts.foreign_cr3(last) is None
    contexts.validate()
    assert on.do(0, "destroy_mm", first.pgd) == 0


@every_number_of_cpus
def test_a_switch_to_the_mm_that_is_loaded_by_the_books_does_not_notice_a_guests_cr3(cpus):
    """As v6.12 switch_mm_irqs_off without CONFIG_DEBUG_VM: CR3 is written only when the loaded mm changes."""
    on = Cpus(cpus)
    first, second = new_mm(on), new_mm(on)
    last = cpus - 1
    assert on.do(last, "switch_mm", first.pgd) == first.pgd
    assert on.do(last, "load_cr3", second.pgd) == second.pgd
    assert on.do(last, "switch_mm", first.pgd) == second.pgd
    assert on.kernel.contexts.foreign_cr3(last) == second.pgd
    on.kernel.contexts.validate()
