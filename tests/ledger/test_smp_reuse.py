"""Ledger rows about when addresses are given out again, by which CPU, and who purges: on one CPU and on several."""

from __future__ import annotations

from contextlib import nullcontext
from random import Random

import pytest
from several_cpus import PAGE, Cpus
from vmap_machine import VMALLOC_END, VMALLOC_START, space

from emu.kernel.set_memory import set_direct_map_default, set_direct_map_invalid
from emu.kernel.task import KernelThread
from emu.kernel.vm_struct import Vm
from emu.kernel.vmap_area import ULONG_MAX, VmapArea
from emu.kernel.vmap_node import V6_1, V6_12

every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])


def purge(on: Cpus, cpu: int) -> None:
    on.on(cpu).vmap_blocks.vm_unmap_aliases()


@every_number_of_cpus
def test_O01_one_cpu_reuses_the_lowest_hole_and_each_of_several_its_own_highest_purged_area_without_the_free_tree(cpus):
    on = Cpus(cpus)
    free = on.kernel.vmalloc.space.free
    made = [[on.vmalloc(4, cpu) for _ in range(16)] for cpu in range(cpus)]
    for cpu, areas in enumerate(made):
        for la in areas[:12]:
            on.on(cpus - 1 - cpu).vmalloc.vfree(la)
    purge(on, 0)
    before = [(va.va_start, va.va_end) for va in free]
    for cpu, areas in enumerate(made):
        assert on.vmalloc(4, cpu) == (areas[0] if cpus == 1 else areas[11])
    assert ([(va.va_start, va.va_end) for va in free] == before) is (cpus > 1)


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_O01_a_cpu_without_a_pool_of_that_size_takes_the_lowest_free_address(cpus):
    on = Cpus(cpus)
    made = [on.vmalloc(4, 0) for _ in range(16)]
    for la in made[:12]:
        on.on(0).vmalloc.vfree(la)
    purge(on, 0)
    areas = list(on.kernel.vmalloc.space.free)
    fit = next(va.va_start for va in areas if va.va_start > VMALLOC_START and va.va_end - va.va_start >= 5 * PAGE)
    assert on.vmalloc(4, cpus - 1) == fit not in made
    assert on.vmalloc(4, 0) == made[11]


@every_number_of_cpus
def test_O01_without_pools_every_cpu_reuses_the_lowest_hole(cpus):
    on = Cpus(cpus, kernel="6.1")
    made = [on.vmalloc(4, cpu) for cpu in range(cpus) for _ in range(4)]
    for la in made:
        on.on(0).vmalloc.vfree(la)
    purge(on, cpus - 1)
    assert [on.vmalloc(4, cpu) for cpu in reversed(range(cpus))] == made[:cpus]


@pytest.mark.parametrize(("length", "left"), [(1, 0), (3, 0), (4, 3), (8, 6), (9, 7)])
@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_O02_each_drain_by_any_cpu_takes_a_quarter_of_every_cpus_pool_and_all_of_one_of_less_than_4(cpus, length, left):
    on = Cpus(cpus)
    nodes = on.kernel.vmalloc.space.nodes.nodes
    for cpu in range(cpus):
        for la in [on.vmalloc(4, cpu) for _ in range(2 * length)][::2]:
            on.on(cpu).vmalloc.vfree(la)
    on.on(cpus - 1).vmalloc.space.drain()
    assert [len(node.pool[4]) for node in nodes] == [length] * cpus
    on.on(0).vmalloc.space.drain()
    assert [len(node.pool.get(4, ())) for node in nodes] == [left] * cpus


def test_O02_one_cpu_has_no_pools():
    on = Cpus(1)
    for la in [on.vmalloc(4) for _ in range(8)]:
        on.kernel.vmalloc.vfree(la)
    purge(on, 0)
    assert [node.pool for node in on.kernel.vmalloc.space.nodes.nodes] == [{}]


@every_number_of_cpus
def test_O07_memory_that_resets_permissions_is_flushed_once_on_every_cpu_before_its_frames_are_free(cpus):
    on = Cpus(cpus)
    kernel, last = on.kernel, cpus - 1
    purge(on, 0)
    lazy, la = on.vmalloc(2, last), on.vmalloc(2, last)
    vm = kernel.vmalloc.find_vm_area(la)
    vm.flags |= Vm.FLUSH_RESET_PERMS
    frames = vm.pages.tolist()
    direct = [kernel.layout.va(pfn * PAGE) for pfn in frames]
    for cpu in range(cpus):
        assert all(on.do(cpu, "read", address) == 0 for address in (la, la + PAGE, *direct))
    for pfn in frames:
        # The large leaves of the direct map are split beforehand: that flushes, too.
        set_direct_map_invalid(kernel.init_mm, pfn)[1].defer()
        set_direct_map_default(kernel.init_mm, pfn)[1].defer()
    flushes: list[tuple[list[int], int, int]] = []
    tlb = kernel.vmalloc.space.tlb
    flush = tlb.flush_tlb_kernel_range

    def flushed(start: int, end: int, *, cause: str) -> None:
        flushes.append(([kernel.pages.page_count(pfn) for pfn in frames], start, end))
        flush(start, end, cause=cause)

    kernel.vmalloc.space.tlb = Replaced(tlb, flushed)
    on.on(last).vmalloc.vfree(lazy)
    before = on.counted()
    on.on(last).vmalloc.vfree(la)
    ((counts, start, end),) = flushes
    assert counts == [1, 1], "not free yet"
    assert start <= min(la, *direct) and max(la + 2 * PAGE, *direct) < end + PAGE
    assert on.since(before) == (last, 0, 0, 1), "IPIs, and the full flush that so wide a range is"
    assert [kernel.pages.page_count(pfn) for pfn in frames] == [0, 0]
    assert kernel.vmalloc.space.vmap_lazy_nr == 0
    assert [on.cached(address) for address in (la, la + PAGE, *direct)] == [[]] * 4


class Replaced:
    """TLBs with another flush_tlb_kernel_range."""

    def __init__(self, tlb, flush) -> None:
        self._tlb = tlb
        self.flush_tlb_kernel_range = flush

    def __getattr__(self, name: str) -> object:
        return getattr(self._tlb, name)


@pytest.mark.parametrize(
    ("design", "cpus", "operations"),
    [(V6_12, 4, 100_000), (V6_12, 1, 10_000), (V6_12, 2, 10_000), (V6_12, 8, 10_000), (V6_1, 1, 10_000), (V6_1, 4, 10_000)],
)
def test_C56_no_lazy_address_is_given_out_before_its_flush_over_random_operations(design, cpus, operations):
    made, machine = space(design, cpus)
    random = Random(56)
    live: list[VmapArea] = []
    stale: set[int] = set()
    reused = 0
    ever: set[int] = set()
    for number in range(operations):
        machine.current = random.randrange(cpus)
        what = random.random()
        if live and what < 0.5:
            index = random.randrange(len(live))
            live[index], live[-1] = live[-1], live[index]
            va = live.pop()
            stale.update(range(va.va_start, va.va_end, PAGE))
            if design.sharded:
                assert made.nodes.find_unlink(va.va_start) is va
            made.free_vmap_area_noflush(va)
        elif what < 0.503:
            made.purge_vmap_area_lazy(ULONG_MAX, 0)
        elif what < 0.5035:
            made.reclaim_and_purge()
        else:
            va = made.alloc_vmap_area(random.randrange(2, 9) * PAGE, 1 << random.randrange(12, 15), VMALLOC_START, VMALLOC_END)
            assert isinstance(va, VmapArea)
            pages = range(va.va_start, va.va_end, PAGE)
            assert stale.isdisjoint(pages), f"operation {number} was given {va} before its flush"
            reused += not ever.isdisjoint(pages)
            ever.update(pages)
            live.append(va)
        machine.run_work()
        while machine.flushed:
            start, end = machine.flushed.pop()
            assert all(start <= page < end for page in stale)
            stale.clear()
    assert reused > operations // 5
    made.validate()


@every_number_of_cpus
def test_C56_no_cpu_has_a_translation_of_an_address_when_it_is_given_out_again(cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    random = Random(cpus)
    live: list[int] = []
    seen: set[int] = set()
    reused = 0
    for _ in range(600):
        kernel.cpus.current = random.randrange(cpus)
        what = random.random()
        if live and what < 0.45:
            kernel.vmalloc.vfree(live.pop(random.randrange(len(live))))
        elif what < 0.48:
            kernel.vmap_blocks.vm_unmap_aliases()
        else:
            la = kernel.vmalloc.vmalloc(random.randrange(1, 4) * PAGE)
            assert on.cached(la) == []
            reused += la in seen
            seen.add(la)
            live.append(la)
        for la in random.sample(live, min(len(live), 3)):
            mmu = on.machine.cpus[random.randrange(cpus)].mmu
            mmu.read(la, 8, user=False)
            assert mmu.query(la).pa(la) == kernel.init_mm.to_pa(la)
    assert reused > 20
    kernel.vmalloc.validate()


# Who purges


def started(on: Cpus, cpu: int, name: str, argument: int = 0) -> KernelThread:
    """One of PROBES that a CPU will run."""
    thread = on.on(0).create_thread(name, cpu, function=on.linked.symbols[name], argument=argument, runs=False)
    on.kernel.sched.start(thread)
    return thread


def start(on: Cpus, name: str, argument: int = 0) -> None:
    """Run one of PROBES on all CPUs at once."""
    threads = [started(on, cpu, name, argument) for cpu in range(on.count)]
    on.settle()
    assert [thread.state.name for thread in threads] == ["DEAD"] * on.count
    assert on.machine.faults == () and not list(on.machine.log_lines())


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_C41_of_cpus_that_purge_at_once_one_flushes_and_the_others_wait_for_it_and_find_nothing(cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    made = space_of(on)
    for cpu in range(cpus):
        on.on(cpu).vmalloc.vfree(on.vmalloc(4, cpu))
    before = on.counted()
    waited: list[str] = []
    block = kernel.sched.block

    def blocks() -> None:
        waited.append(kernel.sched.current().waiting_for)
        block()

    kernel.sched.block = blocks
    start(on, "purge")
    kernel.sched.block = block
    assert waited == ["mutex vmap_purge_lock"] * (cpus - 1)
    ipis, _, ranges, full = on.since(before)
    assert (ipis >= cpus - 1, ranges + full) == (True, 1)
    assert made.vmap_lazy_nr == 0
    made.validate()


def space_of(on: Cpus):
    return on.kernel.vmalloc.space


@every_number_of_cpus
@pytest.mark.parametrize("version", ["6.12", "6.1"])
def test_C41_cpus_that_allocate_free_and_purge_all_the_time_lose_no_area(version, cpus):
    on = Cpus(cpus, kernel=version, quantum=7, tlbsan=True)
    start(on, "churn", 12)
    made = space_of(on)
    made.validate()
    assert on.machine.tlbsan.findings == []
    on.kernel.vmalloc.validate()
    purge(on, 0)
    assert made.vmap_lazy_nr == 0


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("cpus", [3, 4, 8])
def test_C41_a_purge_waits_for_the_one_under_way_and_would_lose_its_areas_otherwise(cpus, locked):
    """CPU 0 purges and waits for a CPU with interrupts off; CPU 1, of whose areas it has taken one, frees another and purges."""
    on = Cpus(cpus)
    kernel, made, last = on.kernel, space_of(on), cpus - 1
    if not locked:
        made.purge_lock = nullcontext()
    first, second = on.vmalloc(4, 1), on.vmalloc(4, 1)
    on.on(1).vmalloc.vfree(first)
    started(on, last, "closed", 50_000)
    on.machine.hub.run(lambda: not on.machine.cpus[last].reg("rflags") & 1 << 9)
    started(on, 0, "purge")
    on.machine.hub.run(lambda: kernel.sched.spinning[0])
    assert not any(made.nodes.nodes[1].lazy), "taken"
    started(on, 1, "free_and_purge", second)
    on.settle()
    if locked:
        made.validate()
        assert made.vmap_lazy_nr == 0
    else:
        with pytest.raises(AssertionError):
            made.validate()


@every_number_of_cpus
@pytest.mark.parametrize("version", ["6.12", "6.1"])
def test_C39_the_free_above_the_threshold_flushes_nothing_and_a_worker_of_its_cpu_does_in_task_context(version, cpus):
    on = Cpus(cpus, kernel=version)
    kernel, last = on.kernel, cpus - 1
    made = space_of(on)
    purge(on, 0)
    drained: list[tuple[str, int, bool]] = []
    drain = made.purge_vmap_area_lazy

    def purged(*arguments: int, **more: bool) -> bool:
        drained.append((kernel.sched.current().comm, kernel.cpus.current, kernel.in_interrupt))
        return drain(*arguments, **more)

    made.purge_vmap_area_lazy = purged
    areas = [on.vmalloc(255, last) for _ in range(made.lazy_max_pages() // 256 + 1)]
    for la in areas[:-1]:
        on.on(last).vmalloc.vfree(la)
    assert (made.vmap_lazy_nr, drained) == (made.lazy_max_pages(), [])
    before = on.counted()
    freeing: list[tuple[int, ...]] = []
    on.interrupt(last, lambda: (kernel.vmalloc.vfree(areas[-1]), freeing.append((len(drained), *on.since(before)[1:]))))
    assert freeing == [(0, 0, 0, 0)]
    assert drained == [(f"kworker/{last}:0", last, False)]
    assert on.since(before)[2:] == (0, 1)
    assert made.vmap_lazy_nr == 0
    made.validate()
