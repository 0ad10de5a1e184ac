"""What recorded kernels did about stale translations and lazy areas (stale-*), done again by guests on one CPU and on several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kernel_floor import recorded_facts
from several_cpus import Cpus

from emu.kernel.vm_struct import Vm

PAGE = 4096
MIB = 1 << 20
every_version = pytest.mark.parametrize("version", ["6.12", "6.1"])
every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])


def facts(version: str, command: str, kind: str | None = None) -> list[dict]:
    return [f for f in recorded_facts(f"stale-{version}-4l") if f["cmd"] == command and kind in (None, f["t"])]


def mapped(on: Cpus, kind: str) -> tuple[int, Callable[[], None]]:
    """A page of memory, and what takes it away."""
    k = on.on(0)
    frames = on.frames(1)
    if kind == "stale_tlb":
        la = on.vmalloc(1)
        return la, lambda: k.vmalloc.vfree(la)
    if kind == "stale_vunmap":
        la = k.vmap.vmap(frames, 1, int(Vm.MAP), k.init_mm.prots.kernel)
        return la, lambda: k.vmap.vunmap(la)
    la = k.vmap_blocks.vm_map_ram(frames, 1)
    return la, lambda: k.vmap_blocks.vm_unmap_ram(la, 1)


@every_number_of_cpus
@every_version
@pytest.mark.parametrize("kind", ["stale_tlb", "stale_vunmap", "stale_vm_unmap_ram"])
def test_every_cpu_that_read_a_page_reads_on_as_recorded_and_faults_as_recorded_after_the_purge(kind, version, cpus):
    (fact,) = facts(version, f"fault {kind}")
    (purged,) = facts(version, "fault stale_tlb_purged")
    assert purged["kind"] == "stale_tlb_after_vm_unmap_aliases"
    on = Cpus(cpus, kernel=version)
    k = on.kernel
    la, unmap = mapped(on, kind)
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.memory.write_u64(pfn * PAGE, fact["val"])
    readers = range(0, cpus, 2)
    assert [on.do(cpu, "read", la) for cpu in readers] == [fact["val"]] * len(readers)
    # The frame is free, but nobody else shall write to it in between: a reader needs a stack.
    k.pages.get_page(pfn)
    before = on.counted()
    on.on(0)
    unmap()
    assert on.since(before) == (0, 0, 0, 0)
    assert k.init_mm.lookup(la).present == bool(fact.get("pte_present", 0))
    assert fact.get("survived_read_after_vfree", fact.get("survived")) == 1
    assert [on.do(cpu, "read", la) for cpu in readers] == [fact["val"]] * len(readers)
    assert all(on.faults(cpu, la) for cpu in range(cpus) if cpu not in readers)
    assert on.do(cpus - 1, "purge") is not None
    assert all(on.faults(cpu, la) for cpu in range(cpus))


@every_number_of_cpus
@every_version
def test_a_freed_address_comes_back_as_recorded_after_the_purge_only(version, cpus):
    on = Cpus(cpus, kernel=version)
    space, last = on.kernel.vmalloc.space, cpus - 1
    given: dict[str, list[int]] = {"freed": [], "again": []}
    on.do(last, "init_module")
    for fact in facts(version, "reuse", "reuse"):
        step = fact["step"]
        if step in ("purged", "after_vm_unmap_aliases"):
            on.on(last).vmap_blocks.vm_unmap_aliases()
            assert space.vmap_lazy_nr == 0 == fact["lazy"]
        if step in given:
            on.on(last)
            la = on.vmalloc(1, last)
            assert la not in given["freed"] and la not in given["again"]
            given[step].append(la)
            on.on(last).vmalloc.vfree(la)
            assert space.vmap_lazy_nr == fact["lazy"]
        elif step == "after_vm_unmap_aliases":
            la = on.vmalloc(1, last)
            (first,) = given["freed"]
            assert fact["same_as_first"] == 1
            # The recorded machine has one CPU, and so no size pools: with them the highest purged address is first.
            assert la == (first if version == "6.1" or cpus == 1 else given["again"][-1])
    assert len(given["again"]) == 3


@every_number_of_cpus
@every_version
def test_the_lazy_areas_are_drained_at_the_recorded_free_above_the_threshold_by_the_worker(version, cpus):
    dropped, reused, end = facts(version, "reuse", "lazy")
    on = Cpus(cpus, kernel=version)
    space, last = on.kernel.vmalloc.space, cpus - 1
    on.on(last).vmap_blocks.vm_unmap_aliases()
    threshold = end["threshold"] * cpus.bit_length()
    assert space.lazy_max_pages() == threshold
    lazy, after_free = [], []
    on.on(last)
    drop = threshold // end["per_iter_pages"]
    first = None
    flushes = on.counted()[2] + on.counted()[3]
    for i in range(drop + 2):
        la = on.do(last, "make", MIB)
        first = first or la
        if i == drop + 1 and (version == "6.1" or cpus == 1):
            assert la == first
        lazy.append(space.vmap_lazy_nr)
        assert on.do(last, "free", la) is not None
        after_free.append(space.vmap_lazy_nr)
    assert after_free[:drop] == [end["per_iter_pages"] * (i + 1) for i in range(drop)]
    assert after_free[drop:] == [dropped["after"], reused["lazy"]]
    assert on.counted()[2] + on.counted()[3] == flushes + 1
    if cpus == 1:
        assert (drop, after_free[drop - 1], after_free[drop]) == (dropped["iter"], dropped["before"], dropped["after"])
        assert (drop + 1, max(after_free)) == (reused["iter"], reused["max"])


@every_number_of_cpus
@every_version
def test_a_free_far_above_the_threshold_is_drained_before_the_array_of_its_pages_becomes_lazy(version, cpus):
    """The worker gets the CPU inside vfree(), where it offers it."""
    (freed, later) = facts(version, "reuse", "lazy3")
    assert freed["step"] == "freed 96M"
    on = Cpus(cpus, kernel=version, memory=512 << 20)
    space, last = on.kernel.vmalloc.space, cpus - 1
    on.on(last).vmap_blocks.vm_unmap_aliases()
    size = 96 * MIB * cpus.bit_length()
    la = on.do(last, "make", size)
    assert on.do(last, "free", la) is not None
    assert space.vmap_lazy_nr == (freed["lazy"] - 1) * cpus.bit_length() + 1
    if cpus == 1:
        assert space.vmap_lazy_nr == later["lazy"]


@every_number_of_cpus
@every_version
def test_nr_vmalloc_pages_counts_what_is_allocated_by_any_cpu_as_recorded(version, cpus):
    before, more, after = (fact["n"] for fact in facts(version, "reuse", "nr_vmalloc_pages"))
    on = Cpus(cpus, kernel=version)
    count = on.kernel.vmalloc.nr_vmalloc_pages
    made = [on.on(cpu).vmalloc.vmalloc(MIB) for cpu in range(cpus)]
    assert on.kernel.vmalloc.nr_vmalloc_pages - count == (more - before) * cpus
    for cpu, la in enumerate(made):
        on.on(cpus - 1 - cpu).vmalloc.vfree(la)
    assert on.kernel.vmalloc.nr_vmalloc_pages - count == after - before == 0
