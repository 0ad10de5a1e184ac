"""Ledger rows about stacks."""

from __future__ import annotations

import numpy as np
import pytest
from booted import boot, machine, row_of, run

from emu.kernel.cpu_entry_area import PageKind
from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.mmu.fault import Access, PageFault

PAGE = 4096
THREAD_SIZE = 4 * PAGE
STACK_BASE = """
    mov rax, rsp
    and rax, -16384
"""


@pytest.mark.parametrize(
    ("profile", "caller"), [(V6_12, "kernel_clone+0xc2/0x430"), (V6_1, "kernel_clone+0xbf/0x430"), (V5_4, "_do_fork+0xbf/0x430")]
)
def test_R01_fork_makes_a_row_of_20480_bytes_with_4_zeroed_pages_aligned_to_16_kib(profile, caller):
    k = boot(profile)
    stacks = [k.create_thread("kworker", runs=False).stack for _ in range(3)]
    assert [stack % THREAD_SIZE for stack in stacks] == [0, 0, 0]
    # 20 KiB aligned to 16 KiB: one stack every 32 KiB.
    assert [stack - stacks[0] for stack in stacks] == [0, 0x8000, 0x10000]
    row = f"0x{stacks[0]:016x}-0x{stacks[0] + 0x5000:016x}   20480 {caller} pages=4 vmalloc N0=4"
    assert row_of(k, stacks[0]) == row
    assert all(not any(k.memory.read(k.init_mm.to_pa(stacks[0] + i * PAGE), PAGE)) for i in range(4))
    assert k.init_mm.to_pa(stacks[0] + THREAD_SIZE) is None


def dirty(k, stack):
    for offset in range(0, THREAD_SIZE, PAGE):
        k.memory.fill(k.init_mm.to_pa(stack + offset), PAGE, 0xAA)


def test_R02_three_exits_cache_two_stacks_and_the_third_is_lazy_after_a_grace_period():
    k = boot()
    threads = [k.create_thread("kworker", runs=False) for _ in range(3)]
    lazy = k.vmalloc.space.vmap_lazy_nr
    for thread in threads:
        dirty(k, thread.stack)
        k.exit_thread(thread)
    assert [vm.addr for vm in k.thread_stacks.cached_stacks[0]] == [threads[0].stack, threads[1].stack]
    assert k.vmalloc.space.vmap_lazy_nr == lazy
    assert k.vmalloc.find_vm_area(threads[2].stack) is not None, "the grace period has not passed"
    k.rcu_barrier()
    assert k.vmalloc.space.vmap_lazy_nr == lazy + 5
    assert k.vmalloc.find_vm_area(threads[2].stack) is None
    again = k.create_thread("kworker", runs=False)
    assert again.stack == threads[0].stack
    assert all(not any(k.memory.read(k.init_mm.to_pa(again.stack + i * PAGE), PAGE)) for i in range(4))


def test_R02_a_stack_whose_grace_period_ends_goes_to_a_slot_that_has_become_free():
    k = boot()
    threads = [k.create_thread("kworker", runs=False) for _ in range(3)]
    for thread in threads:
        k.exit_thread(thread)
    k.create_thread("kworker", runs=False)
    k.rcu_barrier()
    assert [vm.addr for vm in k.thread_stacks.cached_stacks[0]] == [threads[2].stack, threads[1].stack]


def test_R02_each_cpu_has_its_own_cache_and_one_that_goes_offline_frees_it():
    k = boot(cpus=2)
    first = k.create_thread("kworker", runs=False)
    k.exit_thread(first)
    k.cpus.current = 1
    second = k.create_thread("kworker", runs=False)
    assert second.stack != first.stack
    slot = k.percpu.per_cpu_offset(0) + 0x5018
    assert k.memory.read_u64(k.layout.pa(slot)) == k.thread_stacks.cached_stacks[0][0].la
    assert k.thread_stacks.free_vm_stack_cache(0) == 0
    assert k.thread_stacks.cached_stacks[0] == [None, None]
    assert k.memory.read_u64(k.layout.pa(slot)) == 0
    assert k.vmalloc.find_vm_area(first.stack) is None


def test_R02_before_5_18_a_stack_without_a_slot_goes_to_vfree_atomic_at_once():
    k = boot(V5_4)
    threads = [k.create_thread("kworker", runs=False) for _ in range(3)]
    for thread in threads:
        k.exit_thread(thread)
    assert k.memory.read_u64(k.init_mm.to_pa(threads[2].stack)) == 0, "the end of the list of waiting frees"
    k.rcu_barrier()
    assert k.vmalloc.find_vm_area(threads[2].stack) is None


def test_R02_a_stack_that_cannot_be_charged_is_uncharged_and_freed():
    k = boot()
    charged = []
    k.thread_stacks.charge_page = lambda pfn: len(charged) < 3 and not charged.append(pfn)
    k.thread_stacks.uncharge_page = charged.remove
    free = k.pages.nr_free_pages()
    with pytest.raises(MemoryError):
        k.create_thread("kworker", runs=False)
    assert charged == []
    assert k.pages.nr_free_pages() >= free - 2, "no more than a slab and a page table are kept"


def test_R03_a_push_into_the_guard_is_a_double_fault_on_its_own_stack():
    on = machine()
    outcome = run(on, STACK_BASE + "    mov rsp, rax\npush_it:\n    push rbx\n    ret")
    base = on.thread.stack
    assert [(fault.vector, fault.error, fault.rip) for fault in outcome.faults] == [(8, 0, outcome.symbol("push_it"))]
    assert on.cpu.cr2 == base - 8
    begin, end = on.kernel.cpu_entry_area(0).exception_stack(PageKind.DF_STACK)
    assert begin <= on.cpu.reg("rsp") < end
    assert outcome.ended == "panic"
    assert outcome.log[0].startswith(f"BUG: TASK stack guard page was hit at {base - 8:016x} (stack is {base:016x}..")
    assert any("stack guard page: 0000" in line for line in outcome.log)


def test_R03_a_store_below_a_stack_that_is_still_valid_is_a_page_fault_with_the_same_report():
    on = machine()
    outcome = run(on, STACK_BASE + "    mov [rax - 8], rbx\n    ret")
    base = on.thread.stack
    assert [(fault.vector, fault.error, fault.address) for fault in outcome.faults] == [(14, 2, base - 8)]
    assert outcome.log[0].startswith(f"BUG: TASK stack guard page was hit at {base - 8:016x} (stack is {base:016x}..")


def test_R04_below_a_stack_stands_whoever_came_there_and_an_overflow_corrupts_a_block_silently():
    on = machine()
    k = on.kernel
    frames = np.array([k.pages.alloc_pages(GFP_KERNEL) for _ in range(64)], dtype=np.int64)
    pieces = [k.vmap_blocks.vm_map_ram(frames, 64, -1) for _ in range(4)]
    end = pieces[-1] + 64 * PAGE
    assert pieces == [end - (256 - 64 * i) * PAGE for i in range(4)], "one block, used to its end"
    hole = k.layout.vmalloc_start + 5 * PAGE
    while hole < pieces[0]:
        filler = k.vmalloc.vmalloc(pieces[0] - hole - PAGE)
        assert filler == hole
        hole = pieces[0]
    outcome = run(on, STACK_BASE + """
    mov rcx, rsp
    mov rsp, rax
    mov rdx, 0x4141414141414141
    push rdx
    mov rsp, rcx
    lea rax, [rax - 8]
    ret""")
    assert on.thread.stack == end
    assert (outcome.ended, outcome.returned, outcome.faults) == ("returned", end - 8, ())
    assert on.memory.read_u64((int(frames[63]) + 1) * PAGE - 8) == 0x4141414141414141


@pytest.mark.parametrize(
    ("profile", "caller"),
    [(V6_12, "irq_init_percpu_irqstack+0xf4/0x130"), (V6_1, "irq_init_percpu_irqstack+0xf0/0x120")],
)
def test_R05_the_interrupt_stack_is_per_cpu_memory_mapped_first_of_all_in_the_vmalloc_region(profile, caller):
    k = boot(profile, cpus=2)
    start = k.layout.vmalloc_start
    assert k.irq_stacks == [start, start + 0x5000]
    assert row_of(k, start) == f"0x{start:016x}-0x{start + 0x5000:016x}   20480 {caller} vmap"
    for cpu, stack in enumerate(k.irq_stacks):
        backing = k.layout.pa(k.percpu.per_cpu_offset(cpu)) + PAGE
        assert [k.init_mm.to_pa(stack + i * PAGE) for i in range(4)] == [backing + i * PAGE for i in range(4)]
        assert not k.init_mm.lookup(stack + THREAD_SIZE).present
        top = k.layout.pa(k.percpu.per_cpu_offset(cpu)) + 0x5010
        assert k.memory.read_u64(top) == stack + THREAD_SIZE - 8


def test_R05_exception_stacks_have_a_page_of_nothing_below_each_and_above_the_last():
    on = machine()
    area = on.kernel.cpu_entry_area(0)
    for kind in (PageKind.DF_STACK, PageKind.NMI_STACK, PageKind.DB_STACK, PageKind.MCE_STACK):
        begin, end = area.exception_stack(kind)
        assert not on.kernel.layout.is_vmalloc_addr(begin)
        for la in (begin, begin + PAGE):
            assert on.cpu.mmu.translate(la, Access.WRITE, user=False)
        for la in (begin - 8, end):
            with pytest.raises(PageFault) as fault:
                on.cpu.mmu.translate(la, Access.WRITE, user=False)
            assert fault.value.error == 2


def test_R05_a_push_below_the_double_fault_stack_is_reported_as_its_guard_page():
    on = machine()
    begin, end = on.kernel.cpu_entry_area(0).exception_stack(PageKind.DF_STACK)
    outcome = run(on, f"    mov rsp, {begin:#x}\n    push rbx\n    ret")
    assert [fault.vector for fault in outcome.faults] == [8]
    assert on.cpu.cr2 == begin - 8
    assert outcome.log[0] == f"BUG: #DF stack guard page was hit at {begin - 8:016x} (stack is {begin:016x}..{end:016x})"
