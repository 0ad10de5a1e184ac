"""Ledger rows about per-CPU memory."""

from __future__ import annotations

import pytest
from booted import MIB, boot, machine, run

from emu.kernel.gfp import GFP_KERNEL, GFP_NOWAIT
from emu.kernel.kernel import Kernel
from emu.kernel.pcpu_vm_areas import pcpu_free_vm_areas, pcpu_get_vm_areas
from emu.kernel.vm_struct import Vm

PAGE = 4096


def second_chunk(k: Kernel, size: int = 32 << 10) -> int:
    """A pointer that is the first in a chunk made of vmalloc areas, found by allocations of `size`."""
    while True:
        ptr = k.percpu.alloc_percpu(size, 4)
        assert ptr
        if k.layout.is_vmalloc_addr(k.percpu.per_cpu_ptr(ptr, 0)):
            return ptr


@pytest.mark.parametrize("cpus", [1, 4])
def test_C42_the_first_chunk_is_in_the_direct_map_and_the_second_at_the_top_of_the_vmalloc_region(cpus):
    k = boot(cpus=cpus)
    for cpu in range(cpus):
        first = k.percpu.per_cpu_offset(cpu)
        assert k.layout.page_offset <= first < k.layout.page_offset + k.memory.size
        assert k.init_mm.to_pa(first) == first - k.layout.page_offset
    ptr = second_chunk(k)
    area = k.vmalloc.find_vm_area(k.percpu.per_cpu_ptr(ptr, 0))
    assert area.addr + area.size == k.layout.vmalloc_end + 1 - 2 * MIB
    assert (area.flags, area.pages) == (Vm.ALLOC, None)


def test_C42_a_later_chunk_is_populated_page_by_page_in_every_unit_when_something_is_allocated_there():
    k = boot(cpus=4)
    ptr = second_chunk(k)
    units = [k.percpu.per_cpu_ptr(ptr, cpu) for cpu in range(4)]
    for la in units:
        assert [k.init_mm.to_pa(la + i * PAGE) is not None for i in range(10)] == [True] * 8 + [False] * 2
    k.percpu.validate()


def test_C42_a_worker_keeps_four_empty_pages_populated_for_requests_that_cannot_wait():
    k = boot(cpus=4)
    second_chunk(k, PAGE)
    assert k.percpu.nr_empty_pop_pages < 2
    k.rcu_barrier()
    assert k.percpu.nr_empty_pop_pages == 4
    assert k.percpu.alloc_percpu(3 * PAGE, 4, int(GFP_NOWAIT))
    assert not k.percpu.alloc_percpu(3 * PAGE, 4, int(GFP_NOWAIT))
    assert k.percpu.alloc_percpu(3 * PAGE, 4)
    k.percpu.validate()


def test_C42_pages_that_became_empty_are_unmapped_in_every_unit_flushed_once_and_freed():
    k = boot(cpus=4)
    spare = k.percpu.alloc_percpu(32 << 10, 4)
    first = second_chunk(k)
    ptrs = [first] + [k.percpu.alloc_percpu(32 << 10, 4) for _ in range(9)]
    k.rcu_barrier()
    free = k.pages.nr_free_pages()
    k.tlb.ranges.clear()
    for ptr in (spare, *ptrs[1:]):
        k.percpu.free_percpu(ptr)
    k.rcu_barrier()
    assert k.pages.nr_free_pages() == free + 4 * 9 * 8
    assert k.tlb.ranges == [(k.percpu.per_cpu_ptr(ptrs[1], 0), k.percpu.per_cpu_ptr(ptrs[9], 3) + (32 << 10))]
    assert all(k.init_mm.to_pa(k.percpu.per_cpu_ptr(ptrs[1], cpu)) is None for cpu in range(4))
    k.percpu.validate()


def test_C43_units_of_a_node_adjoin_and_each_node_has_an_area_of_its_own_at_a_fixed_distance():
    k = boot(cpus=4, nodes=2, size=128 * MIB)
    offsets = k.percpu.unit_offsets
    unit = k.percpu.info.unit_size
    assert offsets[1] - offsets[0] == offsets[3] - offsets[2] == unit
    distance = offsets[2] - offsets[0]
    assert distance >= 32 * MIB
    first, second = second_chunk(k), 0
    areas = {k.vmalloc.find_vm_area(k.percpu.per_cpu_ptr(first, cpu)).addr for cpu in range(4)}
    assert len(areas) == 2
    assert max(areas) - min(areas) == distance
    while k.percpu.per_cpu_ptr(second, 0) >> 21 in (0, k.percpu.per_cpu_ptr(first, 0) >> 21) or not second:
        second = k.percpu.alloc_percpu(32 << 10, 4)
    more = {k.vmalloc.find_vm_area(k.percpu.per_cpu_ptr(second, cpu)).addr for cpu in range(4)}
    assert not more & areas
    assert max(more) - min(more) == distance
    frames = [k.init_mm.to_pa(k.percpu.per_cpu_ptr(second, cpu)) >> 12 for cpu in range(4)]
    assert [k.pages.page_to_nid(pfn) for pfn in frames] == [0, 0, 1, 1]


def test_C44_congruent_areas_take_the_highest_base_and_slide_below_what_is_in_the_way():
    k = boot()
    offsets, sizes = [0, 64 * MIB], [4 * MIB, 4 * MIB]
    top = k.layout.vmalloc_end + 1 - 2 * MIB
    vms = pcpu_get_vm_areas(k.vmalloc, offsets, sizes, 2 * MIB)
    assert [vm.addr for vm in vms] == [top - 68 * MIB, top - 4 * MIB]
    assert [(vm.size, vm.get_vm_area_size()) for vm in vms] == [(4 * MIB, 4 * MIB - PAGE)] * 2
    pcpu_free_vm_areas(k.vmalloc, vms)
    k.vmalloc.space.reclaim_and_purge()
    assert k.vmalloc.vmalloc_node_range(PAGE, 1, top - PAGE * 2, top, GFP_KERNEL, k.vmalloc.prots.kernel, 0, -1) == top - PAGE * 2
    vms = pcpu_get_vm_areas(k.vmalloc, offsets, sizes, 2 * MIB)
    assert [vm.addr for vm in vms] == [top - 70 * MIB, top - 6 * MIB]


def test_C45_the_distance_between_two_cpus_copies_is_the_same_in_every_chunk():
    k = boot(cpus=4)
    early, late = k.percpu.alloc_percpu(64, 64), second_chunk(k)
    for cpu in range(4):
        distance = k.percpu.unit_offsets[cpu]
        for ptr in (early, late):
            assert k.percpu.per_cpu_ptr(ptr, cpu) - k.percpu.per_cpu_ptr(ptr, 0) == distance


def test_C45_a_guest_reaches_its_copy_in_either_chunk_through_gs():
    on = machine()
    outcome = run(on, """
    push rbx
    push r12
    sub rsp, 8
    mov edi, 8
    mov esi, 8
    call __alloc_percpu
    mov rbx, rax
    mov qword gs:[rbx], 0x1111
.more:
    mov edi, 32768
    mov esi, 4096
    call __alloc_percpu
    mov r12, rax
    mov rdi, rax
    xor esi, esi
    call per_cpu_ptr
    mov rdi, rax
    call is_vmalloc_addr
    test eax, eax
    jz .more
    mov rdi, r12
    call this_cpu_ptr
    mov qword gs:[r12], 0x2222
    mov rax, [rax]
    add rax, gs:[rbx]
    add rsp, 8
    pop r12
    pop rbx
    ret""")
    assert (outcome.ended, outcome.returned, outcome.faults) == ("returned", 0x3333, ())


def test_C45_gs_base_is_the_cpus_unit_and_this_cpu_off_says_so():
    on = machine()
    base = on.kernel.percpu.per_cpu_offset(0)
    assert on.cpu.reg("gs_base") == base
    assert run(on, "    mov eax, 0x5000\n    mov rax, gs:[rax]\n    ret").returned == base
