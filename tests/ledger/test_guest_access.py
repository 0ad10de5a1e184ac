"""Ledger rows by what guest instructions meet: silent memory, or a #PF with its error code and address."""

from __future__ import annotations

import pytest
from guest_machine import PAGE, PMD, GuestMachine

from emu.kernel.gfp import GFP_KERNEL
from emu.mmu.walk import Access, walk

READ_NOT_PRESENT, WRITE_NOT_PRESENT, FETCH_PROTECTED = 0, 2, 0x11


def test_C01_a_guest_writes_all_pages_through_one_pointer_and_reads_them_in_the_direct_map():
    g = GuestMachine()
    la = g.kernel.vmalloc.vmalloc(10 * PAGE)
    wrote = g.execute(
        f"mov rdi, {la:#x}", "xor ecx, ecx",
        ".next:", "lea rax, [rcx * 8 + 7]", "mov [rdi + rcx * 8], rax", "inc ecx", f"cmp ecx, {10 * PAGE // 8}", "jne .next",
    )  # fmt: skip
    assert wrote.fault is None
    frames = g.kernel.vmalloc.find_vm_area(la).pages.tolist()
    for i, pfn in enumerate(frames):
        assert g.read(g.kernel.layout.va(pfn * PAGE) + 8).returned == (i * PAGE // 8 + 1) * 8 + 7


def test_C08_a_fetch_from_vmalloc_memory_is_a_protection_fault_and_mapping_flushed_nothing():
    g = GuestMachine()
    before = g.flushes
    la = g.kernel.vmalloc.vmalloc(PAGE)
    assert g.flushes == before
    assert g.jump(la).page_fault == (FETCH_PROTECTED, la)


def test_C09_the_last_byte_of_the_region_is_no_vmalloc_address_for_a_guest():
    g = GuestMachine()
    assert g.call("is_vmalloc_addr", 0xFFFFE8FFFFFFFFFF).returned == 0
    assert g.call("is_vmalloc_addr", 0xFFFFE8FFFFFFFFFE).returned == 1


@pytest.mark.parametrize("tlb", ["infinite", "finite", "none"])
def test_C21_C22_the_guard_page_faults_for_reads_and_writes(tlb):
    g = GuestMachine(tlb=tlb)
    # Both land in the same free stretch, side by side.
    first, second = (g.kernel.vmalloc.vmalloc(PMD) for _ in range(2))
    assert second == first + PMD + PAGE
    assert g.write(first + PMD, 1).page_fault == (WRITE_NOT_PRESENT, first + PMD)
    assert g.read(second - 8).page_fault == (READ_NOT_PRESENT, second - 8)


def test_C21_a_page_of_vm_map_ram_may_touch_the_next_area_without_a_guard():
    g = GuestMachine()
    k = g.kernel
    frames = k.pages.alloc_pages_bulk(GFP_KERNEL, 0, 64)
    pieces = [k.vmap_blocks.vm_map_ram(frames, 64) for _ in range(4)]
    block_end = pieces[3] + 64 * PAGE
    behind = k.vmalloc.vmalloc_node_range(PAGE, 1, block_end, block_end + 2 * PAGE, GFP_KERNEL, k.init_mm.prots.kernel, 0, -1)
    assert behind == block_end
    assert g.write(block_end - 8, 0x11).fault is None
    assert g.write(block_end, 0x22).fault is None
    # One store across the border reaches both.
    assert g.write(block_end - 4, 0x5555_5555_6666_6666).fault is None
    assert g.read(block_end).returned & 0xFFFF_FFFF == 0x5555_5555


def test_C23_an_overrun_is_silent_within_the_page_faults_in_the_guard_and_may_hit_the_next_area():
    g = GuestMachine()
    la = g.kernel.vmalloc.vmalloc(PMD - PAGE + 100)
    following = g.kernel.vmalloc.vmalloc(PMD)
    last = la + PMD - PAGE
    assert g.write_byte(last + 100, 1).fault is None
    assert g.write_byte(last + 4095, 1).fault is None
    assert g.write_byte(last + 4096, 1).page_fault == (WRITE_NOT_PRESENT, last + 4096)
    assert last + 8192 == following
    assert g.write_byte(last + 8192, 1).fault is None


@pytest.mark.parametrize(("large", "level", "entries"), [(True, 2, 1), (False, 1, 512)])
def test_C29_512_pages_under_a_large_leaf_take_one_tlb_entry_and_else_512(large, level, entries):
    g = GuestMachine()
    v = g.kernel.vmalloc
    la = v.vmalloc_huge(PMD, GFP_KERNEL) if large else v.vmalloc(PMD)
    mmu = g.machine.cpu.mmu
    assert g.touch(la, 512).fault is None
    cached = [entry for entry in mmu.listing() if la <= entry.la < la + PMD]
    assert [int(entry.level) for entry in cached] == [level] * entries
    # A table page less, too.
    assert len(g.kernel.init_mm.lookup(la).entries) == (3 if large else 4)


def test_C36_a_stale_entry_reads_and_writes_the_frame_s_next_owner_until_the_purge():
    g = GuestMachine()
    k = g.kernel
    la = k.vmalloc.vmalloc(PAGE)
    assert g.write(la, 0xAAAA).fault is None
    pfn = k.vmalloc.vmalloc_to_pfn(la)
    k.vmalloc.vfree(la)
    other = k.pages.alloc_pages(GFP_KERNEL)
    assert other == pfn
    k.memory.write_u64(other * PAGE, 0xB)
    assert g.read(la).returned == 0xB
    assert g.write(la, 0xC).fault is None
    assert k.memory.read_u64(other * PAGE) == 0xC
    k.vmap_blocks.vm_unmap_aliases()
    assert g.read(la).page_fault == (READ_NOT_PRESENT, la)


def test_C36_with_debug_pagealloc_the_first_access_after_vfree_faults():
    g = GuestMachine()
    g.kernel.vmalloc.debug_pagealloc = True
    la = g.kernel.vmalloc.vmalloc(PAGE)
    assert g.write(la, 1).fault is None
    g.kernel.vmalloc.vfree(la)
    assert g.write(la, 2).page_fault == (WRITE_NOT_PRESENT, la)


def test_C38_C54_C55_memory_freed_in_interrupt_is_there_until_the_worker_and_gone_unflushed_after_it():
    g = GuestMachine(tlb="none")
    k = g.kernel
    la = k.vmalloc.vmalloc(PAGE)
    assert g.write(la + 8, 0x77).fault is None
    k.vmalloc.vfree_atomic(la)
    assert k.vmalloc.find_vm_area(la) is not None
    assert k.init_mm.lookup(la).present
    # Translated as the CPU does; a call of an exported function would let the worker run.
    assert int.from_bytes(g.machine.cpu.read(la + 8, 8), "little") == 0x77
    flushes = g.flushes
    k.cond_resched()
    assert k.vmalloc.find_vm_area(la) is None
    assert g.read(la + 8).page_fault == (READ_NOT_PRESENT, la + 8)
    assert g.flushes == flushes


def test_C38_a_guest_s_own_vfree_takes_its_memory_away_at_once():
    g = GuestMachine(tlb="none")
    ran = g.execute(
        "push rbx", "mov edi, 4096", "call vmalloc", "mov rbx, rax", "mov [rbx], rax", "mov rdi, rax", "call vfree",
        "mov rax, [rbx]",
    )  # fmt: skip
    error, cr2 = ran.page_fault
    assert error == READ_NOT_PRESENT
    assert g.kernel.layout.is_vmalloc_addr(cr2)


def test_C40_freed_addresses_come_back_only_after_a_flush_and_then_show_the_new_frame():
    g = GuestMachine()
    k = g.kernel
    la = k.vmalloc.vmalloc(PMD)
    assert g.write(la, 1).fault is None
    k.vmalloc.vfree(la)
    flushes = g.flushes
    again = k.vmalloc.vmalloc_node_range(PMD, 1, la, la + PMD + PAGE, GFP_KERNEL, k.init_mm.prots.kernel, 0, -1)
    assert again == la
    assert g.flushes == flushes + 1
    k.memory.write_u64(k.vmalloc.vmalloc_to_pfn(la) * PAGE, 0xFE)
    assert g.read(la).returned == 0xFE


def test_C48_C49_two_mappings_of_a_page_alias_it_cannot_be_executed_and_vunmap_leaves_the_frame():
    g = GuestMachine()
    k = g.kernel
    frames = k.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1)
    first, second = (k.vmap.vmap(frames, 1, 4, k.init_mm.prots.kernel_exec) for _ in range(2))
    assert g.write(first + 8, 0xA11A5).fault is None
    assert g.read(second + 8).returned == 0xA11A5
    assert g.jump(second).page_fault == (FETCH_PROTECTED, second)
    k.vmap.vunmap(first)
    k.vmap.vunmap(second)
    k.vmap_blocks.vm_unmap_aliases()
    assert g.read(first).page_fault == (READ_NOT_PRESENT, first)
    assert k.pages.page_count(int(frames[0])) == 1


def test_C50_a_small_vm_map_ram_is_memory_and_its_unmapped_neighbour_faults():
    g = GuestMachine()
    frames = g.kernel.pages.alloc_pages_bulk(GFP_KERNEL, 0, 3)
    la = g.kernel.vmap_blocks.vm_map_ram(frames, 3)
    assert g.write(la + 2 * PAGE, 3).fault is None
    # Three pages take four places of the block.
    assert g.read(la + 3 * PAGE).page_fault == (READ_NOT_PRESENT, la + 3 * PAGE)


def test_C53_the_first_word_of_what_waits_to_be_freed_is_a_link():
    g = GuestMachine()
    k = g.kernel
    made = [k.vmalloc.vmalloc(PAGE) for _ in range(3)]
    for la in made:
        assert g.write(la, 0x1234).fault is None
    for la in made:
        k.vmalloc.vfree_atomic(la)
    words = [int.from_bytes(g.machine.cpu.read(la, 8), "little") for la in made]
    assert words == [0, made[0], made[1]]


def test_C58_a_large_leaf_over_a_used_up_table_is_what_the_cpu_walks():
    g = GuestMachine()
    k = g.kernel
    start = k.layout.vmalloc_start + (1 << 30)
    window = (start, start + PMD + PAGE)
    small = k.vmalloc.vmalloc_node_range(PAGE, 1, *window, GFP_KERNEL, k.init_mm.prots.kernel, 0, -1)
    assert g.write(small, 1).fault is None
    k.vmalloc.vfree(small)
    k.vmap_blocks.vm_unmap_aliases()
    large = k.vmalloc.vmalloc_node_range(PMD, 1, *window, GFP_KERNEL, k.init_mm.prots.kernel, 0x400, -1)
    assert large == small
    assert g.write(large + PMD - 8, 0x99).fault is None
    assert g.machine.cpu.mmu.query(large + PMD - 8).level == 2
    assert k.memory.read_u64((k.vmalloc.vmalloc_to_pfn(large) + 511) * PAGE + PAGE - 8) == 0x99


def test_O05_a_double_vfree_by_a_guest_warns_and_goes_on():
    g = GuestMachine()
    ran = g.execute("push rbx", "mov edi, 4096", "call vmalloc", "mov rbx, rax", "mov rdi, rax", "call vfree",
                    "mov rdi, rbx", "call vfree", "mov eax, 7", "pop rbx")  # fmt: skip
    assert ran.returned == 7
    warned = [line for line in g.machine.log_lines() if line.startswith("WARNING: ")]
    assert len(warned) == 1
    assert any("Trying to vfree() nonexistent vm area" in line for line in g.machine.log_lines())


def test_O06_a_large_area_is_memory_up_to_its_rounded_size():
    g = GuestMachine()
    la = g.kernel.vmalloc.vmalloc_huge(PMD + PAGE, GFP_KERNEL)
    assert g.write(la + 2 * PMD - 8, 1).fault is None
    assert g.write(la + 2 * PMD, 1).page_fault == (WRITE_NOT_PRESENT, la + 2 * PMD)


def test_O10_vmalloc_to_pfn_agrees_with_the_walk_of_the_hardware():
    g = GuestMachine()
    v = g.kernel.vmalloc
    for la, size in ((v.vmalloc(5 * PAGE), 5 * PAGE), (v.vmalloc_huge(PMD, GFP_KERNEL), PMD)):
        for offset in {0, PAGE, size // 2 & -PAGE, size - PAGE}:
            walked = walk(g.kernel.memory, g.machine.cpu.mmu.regs, la + offset, Access.READ, False, set_ad=False)
            assert g.call("vmalloc_to_pfn", la + offset).returned == walked.pa // PAGE


def test_O15_loading_cr3_keeps_a_stale_global_entry_and_invlpg_drops_it():
    g = GuestMachine()
    freed = ("push rbx", "mov edi, 4096", "call vmalloc", "mov rbx, rax", "mov qword [rbx], 0x15", "mov rdi, rax", "call vfree")
    assert g.execute(*freed, "mov rax, cr3", "mov cr3, rax", "mov rax, [rbx]", "pop rbx").returned == 0x15
    error, _ = g.execute(*freed, "invlpg [rbx]", "mov rax, [rbx]", "pop rbx").page_fault
    assert error == READ_NOT_PRESENT


def test_C53_C55_a_vfree_in_interrupt_leaves_the_area_to_a_worker_and_a_link_in_it():
    g = GuestMachine(tlb="none")
    k = g.kernel
    made = [k.vmalloc.vmalloc(PAGE) for _ in range(3)]
    assert all(g.write(la, 0x1234).fault is None for la in made)
    seen = []
    k.schedule_work = seen.append
    assert all(g.call_in_interrupt("vfree", la).fault is None for la in made)
    assert len(seen) == 1
    assert [g.read(la).returned for la in made] == [0, made[0], made[1]]
    seen[0]()
    assert [g.read(la).page_fault for la in made] == [(READ_NOT_PRESENT, la) for la in made]


def test_C52_unmapping_in_interrupt_is_a_bug_and_vfree_is_not():
    g = GuestMachine()
    la = g.kernel.vmap.vmap(g.kernel.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1), 1, 4, g.kernel.init_mm.prots.kernel)
    assert g.call_in_interrupt("vunmap", la).returned is None
    assert any(line.startswith("kernel BUG at mm/vmalloc.c:") for line in g.machine.log_lines())
    assert g.kernel.vmalloc.find_vm_area(la) is not None
