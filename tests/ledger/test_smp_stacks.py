"""Ledger rows about stacks, on each of several CPUs: caching, overflow, what lies below, and the stacks of interrupts."""

from __future__ import annotations

import pytest
from several_cpus import PAGE, Cpus

from emu.kernel.cpu_entry_area import PageKind
from emu.mmu.fault import Access, PageFault

THREAD_SIZE = 4 * PAGE
every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])


def first_line(on: Cpus) -> str:
    return next(iter(on.machine.log_lines()))


def exited(on: Cpus, cpu: int, count: int) -> list[int]:
    """Have threads made by a CPU return from their function on it; their stacks, in the order of their exits."""
    kernel = on.on(cpu)
    threads = [kernel.create_thread("short", cpu, function=on.linked.symbols["init_module"], runs=False) for _ in range(count)]
    stacks = [thread.stack for thread in threads]
    for thread in threads:
        kernel.sched.start(thread)
    on.machine.hub.run(lambda: all(thread.stack_vm_area is None for thread in threads))
    assert not any(thread in kernel.threads for thread in threads)
    return stacks


@every_number_of_cpus
def test_R02_of_three_stacks_a_cpu_caches_two_and_the_third_is_lazy_after_a_grace_period(cpus):
    on = Cpus(cpus)
    kernel, last = on.kernel, cpus - 1
    # The worker that frees the third stack is a thread too, and would take a cached one.
    freed = on.vmalloc(1)
    on.interrupt(last, lambda: kernel.vmalloc.vfree(freed))
    lazy = kernel.vmalloc.space.vmap_lazy_nr
    stacks = exited(on, last, 3)
    cached = kernel.thread_stacks.cached_stacks
    assert [vm.addr for vm in cached[last]] == stacks[:2]
    assert [cached[cpu] for cpu in range(last)] == [[None, None]] * last, "no other CPU has any"
    on.settle()
    kernel.rcu_barrier()
    assert kernel.vmalloc.find_vm_area(stacks[2]) is None
    assert kernel.vmalloc.space.vmap_lazy_nr == lazy + 5
    for cpu in range(last):
        assert on.on(cpu).create_thread("other", cpu, runs=False).stack not in stacks
    again = on.on(last).create_thread("again", last, runs=False)
    assert again.stack == stacks[0]
    frames = [kernel.init_mm.to_pa(again.stack + i * PAGE) for i in range(4)]
    assert not any(any(kernel.memory.read(pa, PAGE)) for pa in frames), "used, and zero again"


@every_number_of_cpus
def test_R02_before_5_18_the_third_stack_is_freed_by_a_worker_of_that_cpu_without_a_grace_period(cpus):
    on = Cpus(cpus, kernel="5.4")
    kernel, last = on.kernel, cpus - 1
    freed: list[tuple[int, bool, str]] = []
    kernel.vmalloc.space.tracepoint = lambda name, values: freed.append(
        (values[0], kernel.in_interrupt, kernel.sched.current().comm)
    ) if name == "free_vmap_area_noflush" else None  # fmt: skip
    stacks = exited(on, last, 3)
    on.settle()
    assert on.do(last, "free", 0) is not None
    assert [la for la, _, _ in freed] == [stacks[2]]
    assert freed[0][1] is False
    assert cpus == 1 or freed[0][2] == f"kworker/{last}:0"


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_R02_a_stack_goes_to_the_cache_of_the_cpu_that_its_thread_died_on(cpus):
    on = Cpus(cpus)
    stacks = [exited(on, cpu, 2) for cpu in range(cpus)]
    assert [[vm.addr for vm in vms] for vms in on.kernel.thread_stacks.cached_stacks.values()] == stacks


@every_number_of_cpus
def test_R03_a_push_into_the_guard_is_a_double_fault_on_that_cpus_own_stack(cpus):
    on = Cpus(cpus)
    last = cpus - 1
    assert on.do(last, "overflow") is None
    base = on.thread.stack
    assert (on.fault.vector, on.fault.error, on.fault.rip) == (8, 0, on.linked.symbols["push_below"])
    begin, end = on.kernel.cpu_entry_area(last).exception_stack(PageKind.DF_STACK)
    assert on.machine.cpus[last].cr2 == base - 8
    assert begin <= on.rsp < end
    end = base + THREAD_SIZE
    assert first_line(on) == f"BUG: TASK stack guard page was hit at {base - 8:016x} (stack is {base:016x}..{end:016x})"


@every_number_of_cpus
def test_R03_a_store_below_a_stack_that_is_still_valid_is_a_page_fault_with_the_same_report(cpus):
    on = Cpus(cpus)
    assert on.do(cpus - 1, "store_below") is None
    base = on.thread.stack
    assert (on.fault.vector, on.fault.error, on.fault.address) == (14, 2, base - 8)
    assert first_line(on).startswith(f"BUG: TASK stack guard page was hit at {base - 8:016x} (stack is {base:016x}..")


@every_number_of_cpus
def test_R04_an_overflow_into_a_block_that_ends_at_the_stack_corrupts_it_silently_on_every_cpu(cpus):
    on = Cpus(cpus)
    kernel, last = on.on(cpus - 1), cpus - 1
    frames = on.frames(64)
    pieces = [kernel.vmap_blocks.vm_map_ram(frames, 64, -1) for _ in range(4)]
    end = pieces[-1] + 64 * PAGE
    # A stack area right behind the block: the only room that is left of its size.
    kernel.thread_stacks.vmalloc = placed = Placed(kernel.vmalloc, end)
    before = on.counted()
    assert on.do(last, "overflow") is not None
    assert on.thread.stack == end and placed.served
    assert on.fault is None
    assert on.since(before)[1:] == (0, 0, 0)
    assert kernel.memory.read_u64((int(frames[63]) + 1) * PAGE - 8) == 0x4141414141414141


class Placed:
    """The allocator of stacks, with the first one put at an address."""

    def __init__(self, vmalloc, la: int) -> None:
        self._vmalloc, self._la = vmalloc, la
        self.served = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._vmalloc, name)

    def vmalloc_node_range(self, size, align, start, end, *more):
        if not self.served:
            self.served = True
            start, end = self._la, self._la + size + PAGE
        return self._vmalloc.vmalloc_node_range(size, align, start, end, *more)


@every_number_of_cpus
def test_R05_each_cpu_has_an_interrupt_stack_with_a_guard_and_exception_stacks_outside_of_vmalloc(cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    start = kernel.layout.vmalloc_start
    assert kernel.irq_stacks == [start + 0x5000 * cpu for cpu in range(cpus)]
    for cpu in on.machine.cpus:
        stack = kernel.irq_stacks[cpu.id]
        assert cpu.mmu.translate(stack + THREAD_SIZE - 8, Access.WRITE, user=False)
        assert on.faults(cpu.id, stack + THREAD_SIZE, 2)
        for kind in (PageKind.DF_STACK, PageKind.NMI_STACK, PageKind.DB_STACK, PageKind.MCE_STACK):
            begin, end = kernel.cpu_entry_area(cpu.id).exception_stack(kind)
            assert end - begin == 2 * PAGE and not kernel.layout.is_vmalloc_addr(begin)
            assert cpu.mmu.translate(begin, Access.WRITE, user=False) and cpu.mmu.translate(end - 8, Access.WRITE, user=False)
            for la in (begin - 8, end):
                with pytest.raises(PageFault) as fault:
                    cpu.mmu.translate(la, Access.WRITE, user=False)
                assert fault.value.error == 2


@every_number_of_cpus
def test_R05_an_nmi_is_handled_on_the_nmi_stack_of_the_cpu_that_takes_it(cpus):
    on = Cpus(cpus)
    kernel = on.kernel
    seen: list[int] = []
    on.interrupt(cpus - 1, lambda: seen.append(kernel.cpu.reg("rsp")), "nmi")
    begin, end = kernel.cpu_entry_area(cpus - 1).exception_stack(PageKind.NMI_STACK)
    assert len(seen) == 1 and begin <= seen[0] < end


@every_number_of_cpus
def test_R05_a_push_below_a_cpus_double_fault_stack_is_reported_as_its_guard_page(cpus):
    on = Cpus(cpus)
    begin, end = on.kernel.cpu_entry_area(cpus - 1).exception_stack(PageKind.DF_STACK)
    assert on.do(cpus - 1, "push_at", begin) is None
    assert on.fault.vector == 8
    assert on.machine.cpus[cpus - 1].cr2 == begin - 8
    assert first_line(on) == f"BUG: #DF stack guard page was hit at {begin - 8:016x} (stack is {begin:016x}..{end:016x})"
