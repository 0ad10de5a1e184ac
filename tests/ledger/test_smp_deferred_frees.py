"""Ledger rows about frees that wait for a worker: from every context, on one CPU and on several, as guests and CPUs see them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from several_cpus import Cpus

from emu.hub import Final

every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])
CONTEXTS = ("hardirq", "softirq", "bh")


def free_in(on: Cpus, cpu: int, context: str, areas: list[int], then: Callable[[], object] = lambda: None) -> list[int]:
    """Have a guest free areas on a CPU in a context, each read (at 8) behind its vfree(); `then` runs while it is still there."""
    seen: list[int] = []

    def handler() -> None:
        seen.extend(on.guest("vfree_read", la) for la in areas)
        then()

    if context == "bh":
        seen.extend(on.do(cpu, "vfree_read_bh", la) for la in areas)
    else:
        on.interrupt(cpu, handler, context)
    return seen


def written(on: Cpus, count: int, cpu: int = 0) -> list[int]:
    made = [on.vmalloc(1, cpu) for _ in range(count)]
    for number, la in enumerate(made):
        assert on.do(cpu, "write", la + 8) is not None, number
    return made


@every_number_of_cpus
def test_C38_C55_freed_by_a_task_it_is_gone_for_every_cpu_at_once(cpus):
    on = Cpus(cpus, tlb="none")
    la = on.vmalloc(1)
    on.do(cpus - 1, "vfree_read", la)
    assert on.fault is not None and (on.fault.vector, on.fault.error, on.fault.address) == (14, 0, la + 8)
    assert on.kernel.vmalloc.find_vm_area(la) is None
    assert all(on.faults(cpu, la) for cpu in range(cpus))


@every_number_of_cpus
@pytest.mark.parametrize("context", CONTEXTS)
def test_C38_C52_C54_C55_freed_in_interrupt_it_stays_until_the_worker_which_flushes_nothing(context, cpus):
    on = Cpus(cpus, tlb="none")
    kernel = on.kernel
    (la,) = written(on, 1)
    pfn = kernel.vmalloc.vmalloc_to_pfn(la)
    lazy, before = kernel.vmalloc.space.vmap_lazy_nr, on.counted()
    during: list[tuple[bool, bool, int, int]] = []

    def inside() -> None:
        during.append((
            kernel.init_mm.lookup(la).present, kernel.vmalloc.find_vm_area(la) is not None, kernel.pages.page_count(pfn),
            kernel.vmalloc.space.vmap_lazy_nr - lazy,
        ))  # fmt: skip

    assert free_in(on, cpus - 1, context, [la], inside) == [0x41]
    assert during == ([] if context == "bh" else [(True, True, 1, 0)])
    assert not kernel.init_mm.lookup(la).present
    assert kernel.vmalloc.find_vm_area(la) is None
    assert kernel.vmalloc.space.vmap_lazy_nr - lazy == 2
    assert on.since(before)[1:] == (0, 0, 0), "neither INVLPG nor a flush"
    assert all(on.faults(cpu, la) for cpu in range(cpus))


@every_number_of_cpus
@pytest.mark.parametrize("context", ["hardirq", "softirq"])
def test_C53_three_frees_in_interrupt_are_one_work_item_a_list_through_themselves_and_freed_last_first(context, cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    made = written(on, 3)
    words: list[list[int]] = []
    freed: list[tuple[int, int, bool]] = []
    items: list[int] = []
    schedule = kernel.sync.workqueues.schedule_work

    def scheduled(work):
        items.append(kernel.cpus.current)
        schedule(work)

    kernel.sync.workqueues.schedule_work = scheduled
    kernel.vmalloc.space.tracepoint = lambda name, values: freed.append(
        (values[0], kernel.cpus.current, kernel.in_interrupt)
    ) if name == "free_vmap_area_noflush" else None  # fmt: skip
    assert free_in(on, cpus - 1, context, made, lambda: words.append([on.guest("read", la) for la in made])) == [0x41] * 3
    assert words == [[0, made[0], made[1]]]
    assert items == [cpus - 1]
    assert freed == [(la, cpus - 1, False) for la in made[::-1]]


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_C53_each_cpu_has_a_list_and_a_worker_of_its_own(cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    made = [written(on, 2) for _ in range(cpus)]
    freed: list[tuple[str, int, int]] = []
    kernel.vmalloc.space.tracepoint = lambda name, values: freed.append((name, kernel.cpus.current, values[0]))
    heads: list[int] = []

    def handler() -> None:
        for la in made[kernel.cpus.current]:
            kernel.vmalloc.vfree(la)
        heads.append(kernel.cpus.current)

    kernel.irqs.handlers[0x41] = lambda vector: handler()
    kernel.cpus.current = 0
    for cpu in range(cpus):
        kernel.send_ipi(cpu, 0x41)
    on.settle()
    assert sorted(heads) == list(range(cpus))
    for cpu in range(cpus):
        assert [la for name, by, la in freed if (name, by) == ("free_vmap_area_noflush", cpu)] == made[cpu][::-1]


@every_number_of_cpus
@pytest.mark.parametrize(("version", "place"), [("6.12", ("vfree_atomic", 3377)), ("6.1", ("vfree", 2854))])
def test_C52_vfree_in_nmi_is_a_bug_and_the_memory_stays(version, place, cpus):
    on = Cpus(cpus, kernel=version)
    (la,) = written(on, 1)
    finish = on.interrupt(cpus - 1, lambda: on.guest("vfree_read", la), "nmi")
    assert finish.final is Final.ENDED
    lines = list(on.machine.log_lines())
    function, line = place
    assert f"kernel BUG at mm/vmalloc.c:{line}!" in lines
    assert any(text.startswith(f"RIP: 0010:{function}+") for text in lines)
    assert "Kernel panic - not syncing: Fatal exception in interrupt" in lines
    assert on.kernel.vmalloc.find_vm_area(la) is not None
    assert on.kernel.init_mm.lookup(la).present


@every_number_of_cpus
@pytest.mark.parametrize(("function", "freed"), [("vfree_preempt", 1), ("free", 0)])
def test_C52_vfree_offers_its_cpu_to_others_and_with_preemption_off_goes_through_without_a_word(function, freed, cpus):
    """A kernel without CONFIG_DEBUG_ATOMIC_SLEEP does not mind it. `freed`: pages of the first when the second thread runs."""
    on = Cpus(cpus)
    kernel, last = on.kernel, cpus - 1
    areas = written(on, 2)
    first, second = (
        kernel.create_thread(name, last, function=on.linked.symbols[what], argument=la, runs=False)
        for name, what, la in (("first", function, areas[0]), ("second", "free", areas[1]))
    )
    pages = kernel.vmalloc.nr_vmalloc_pages
    seen: list[tuple[str, int, int]] = []

    def traced(name: str, values: tuple[int, ...]) -> None:
        if name == "free_vmap_area_noflush" and values[0] in areas:
            seen.append((kernel.sched.current().comm, kernel.preempt(last).preempt, pages - kernel.vmalloc.nr_vmalloc_pages))
            if values[0] == areas[0]:
                kernel.sched.start(second)

    kernel.vmalloc.space.tracepoint = traced
    on.on(0).sched.start(first)
    on.settle()
    assert seen == [("first", freed, 0), ("second", 0, freed)]
    assert pages - kernel.vmalloc.nr_vmalloc_pages == 2
    assert list(on.machine.log_lines()) == []


@every_number_of_cpus
@pytest.mark.parametrize("unmap", ["vunmap", "vm_unmap_ram"])
def test_C52_vunmap_in_interrupt_is_a_bug_and_vm_unmap_ram_is_not_checked(unmap, cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    frames = on.frames(1)
    if unmap == "vunmap":
        la = kernel.vmap.vmap(frames, 1, 4, kernel.init_mm.prots.kernel)
        finish = on.interrupt(cpus - 1, lambda: kernel.vmap.vunmap(la))
        assert finish.final is Final.ENDED
        assert any(line.startswith("kernel BUG at mm/vmalloc.c:") for line in on.machine.log_lines())
        assert kernel.init_mm.lookup(la).present
    else:
        la = kernel.vmap_blocks.vm_map_ram(frames, 1)
        on.interrupt(cpus - 1, lambda: kernel.vmap_blocks.vm_unmap_ram(la, 1))
        assert not kernel.init_mm.lookup(la).present


@every_number_of_cpus
@pytest.mark.parametrize("held", ["preempt", "irq"])
def test_C53_work_of_a_task_that_cannot_be_preempted_waits_until_it_can(held, cpus):
    """vfree_atomic() under a spinlock: the memory is still there when the lock is still held."""
    on = Cpus(cpus, tlb="none")
    (la,) = written(on, 1)
    assert on.do(cpus - 1, f"vfree_atomic_{held}", la) == 0x41
    assert on.kernel.vmalloc.find_vm_area(la) is None


def test_work_queued_from_outside_does_not_run_inside_an_interrupt_handler_either():
    on = Cpus(1)
    ran: list[bool] = []
    on.kernel.schedule_work(lambda: ran.append(on.kernel.in_interrupt))
    la = on.vmalloc(1)
    before: list[list[bool]] = []
    on.interrupt(0, lambda: (on.guest("vfree_read", la), before.append(list(ran))))
    assert before == [[]]
    on.do(0, "vfree_read", on.vmalloc(1))
    assert ran == [False]
    assert on.kernel.vmalloc.find_vm_area(la) is None
