"""Ledger rows about the page tables that mms share."""

from __future__ import annotations

import pytest
from booted import boot, machine, run

from emu.kernel.mm import PAGE_SHARED_EXEC, Mm
from emu.kernel.profile import V6_1, V6_12
from emu.mmu.fault import Access, PageFault

PAGE = 4096
# RBX: a per-CPU pointer into a chunk at the top of the vmalloc region, made after the mm in CR3.
TOUCH = """
    push rbx
    push r12
    sub rsp, 8
    call vmemu_new_mm
    mov cr3, rax
.more:
    mov edi, 32768
    mov esi, 4096
    call __alloc_percpu
    mov rbx, rax
    mov rdi, rax
    xor esi, esi
    call per_cpu_ptr
    mov r12, rax
    mov rdi, rax
    call is_vmalloc_addr
    test eax, eax
    jz .more
"""
DONE = """
    mov rax, r12
    add rsp, 8
    pop r12
    pop rbx
    ret"""


def vmalloc_slots(k, pgd):
    shift = k.layout.pgdir_shift
    first, last = k.layout.vmalloc_start >> shift & 511, k.layout.vmalloc_end >> shift & 511
    return k.memory.table(pgd)[first : last + 1].tolist()


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("profile", [V6_12, V6_1])
def test_C57_two_mms_have_init_mms_vmalloc_entries_and_see_later_mappings_without_a_write_to_their_pgds(profile, levels):
    k = boot(profile, levels=levels)
    mms = [Mm(k.init_mm), Mm(k.init_mm)]
    slots = vmalloc_slots(k, k.init_mm.pgd)
    assert len(slots) == (64 if levels == 4 else 50)
    assert all(slots)
    assert [vmalloc_slots(k, mm.pgd) for mm in mms] == [slots, slots]
    before = [k.memory.read(mm.pgd, PAGE) for mm in mms]
    la = k.vmalloc.vmalloc(PAGE)
    assert {mm.to_pa(la) for mm in mms} == {k.init_mm.to_pa(la)}
    assert [k.memory.read(mm.pgd, PAGE) for mm in mms] == before


@pytest.mark.parametrize("levels", [4, 5])
def test_C57_with_pti_user_mode_has_no_vmalloc_entries_and_no_kernel_leaf_is_global(levels):
    on = machine(pti=True, levels=levels)
    k, mmu = on.kernel, on.cpu.mmu
    mm = Mm(k.init_mm)
    la = k.vmalloc.vmalloc(PAGE)
    assert mm.map_user(0x400000, PAGE, PAGE_SHARED_EXEC) == 0
    assert not any(vmalloc_slots(k, mm.user_pgd))
    assert not k.init_mm.lookup(la).entry & 0x100
    on.cpu.set_reg("cr3", mm.pgd)
    assert mmu.translate(la, Access.READ, user=False) == k.init_mm.to_pa(la)
    with pytest.raises(PageFault) as fault:
        mmu.translate(la, Access.READ, user=True)
    assert fault.value.error == 5, "mapped, but not for user mode"
    on.cpu.set_reg("cr3", mm.user_pgd)
    with pytest.raises(PageFault) as fault:
        mmu.translate(la, Access.READ, user=True)
    assert fault.value.error == 4, "not mapped at all, and no entry was left in the TLB"


def test_C57_with_pti_user_addresses_are_the_same_in_both_tables_but_executable_on_user_modes_alone():
    on = machine(pti=True)
    free = on.kernel.pages.nr_free_pages()
    mm = Mm(on.kernel.init_mm)
    mm.map_user(0x400000, PAGE, PAGE_SHARED_EXEC)
    mmu = on.cpu.mmu
    on.cpu.set_reg("cr3", mm.user_pgd)
    assert mmu.translate(0x400000, Access.FETCH, user=True) == mm.to_pa(0x400000)
    on.cpu.set_reg("cr3", mm.pgd)
    assert mmu.translate(0x400000, Access.READ, user=True) == mm.to_pa(0x400000)
    with pytest.raises(PageFault) as fault:
        mmu.translate(0x400000, Access.FETCH, user=True)
    assert fault.value.error == 0x15
    mm.validate()
    mm.destroy()
    assert on.kernel.pages.nr_free_pages() == free, "both PGDs, the tables and the page have gone back"


def test_C57_with_pti_a_kernel_on_user_modes_tables_finds_neither_its_code_nor_its_stack_but_the_double_fault_stack():
    on = machine(pti=True, tlb="none")
    outcome = run(on, """
    sub rsp, 8
    call vmemu_new_mm
    mov rdi, rax
    call vmemu_user_pgd
    mov cr3, rax
    nop
    ret""")
    assert [fault.vector for fault in outcome.faults] == [8]
    assert outcome.ended == "panic"


def test_C57_with_pti_user_modes_tables_have_what_a_recorded_kernels_have():
    k = boot(pti=True)
    entries = k.memory.table(k.init_mm.pgd + PAGE).tolist()
    kernel = k.memory.table(k.init_mm.pgd).tolist()
    assert [i for i, entry in enumerate(entries) if entry] == [273, 508, 510, 511]
    assert (entries[508], entries[510]) == (kernel[508], kernel[510])
    assert (entries[511] & 0xFFF, kernel[511] & 0xFFF) == (0x063, 0x067)


def test_C60_page_tables_belong_to_mms_and_not_to_cpus():
    one, many = boot(), boot(cpus=8)
    assert one.init_mm.pgds == many.init_mm.pgds == {}
    mm = Mm(many.init_mm)
    assert list(many.init_mm.pgds) == [mm.pgd]
    for k in (one, many):
        k.init_mm.validate()
    assert vmalloc_slots(many, mm.pgd) == vmalloc_slots(many, many.init_mm.pgd)


@pytest.mark.parametrize("kernel", ["6.12", "6.1"])
def test_C61_since_5_8_a_new_mm_reaches_everything_without_a_fault(kernel):
    on = machine(kernel=kernel)
    outcome = run(on, TOUCH + "    mov rax, gs:[rbx]\n" + DONE)
    assert (outcome.ended, outcome.faults) == ("returned", ())


def test_C61_before_5_8_the_first_touch_faults_the_handler_copies_one_entry_and_the_second_touch_does_not_fault():
    on = machine(kernel="5.4")
    outcome = run(on, TOUCH + "touch:\n    mov rax, gs:[rbx]\n    mov gs:[rbx + 8], rax\n    mov rax, gs:[rbx + 4096]\n" + DONE)
    assert outcome.ended == "returned"
    faults = [(fault.vector, fault.error, fault.address, fault.rip) for fault in outcome.faults]
    assert faults == [(14, 0, outcome.returned, outcome.symbol("touch"))]
    k = on.kernel
    (mm,) = on.mm_api.mms.values()
    slot = outcome.returned >> 39 & 511
    entries, reference = k.memory.table(mm.pgd).tolist(), k.memory.table(k.init_mm.pgd).tolist()
    assert slot == 465
    assert entries[slot] == reference[slot] != 0
    assert all(entries[i] == reference[i] for i in range(256, 512) if reference[i])
    assert outcome.log == ()


def test_C61_before_5_8_vmalloc_sync_mappings_spares_the_fault_and_so_does_a_purge():
    for sync in ("call vmemu_vmalloc_sync_mappings", "mov edi, 4096\n    call vmalloc\n    mov rdi, rax\n    call vfree\n"
                 "    call vm_unmap_aliases"):
        on = machine(kernel="5.4")
        outcome = run(on, TOUCH + f"    {sync}\n    mov rax, gs:[rbx]\n" + DONE)
        assert (outcome.ended, outcome.faults) == ("returned", ())


def test_C62_one_copied_entry_gives_512_gib_and_a_page_that_is_missing_below_it_is_an_oops_and_no_loop():
    on = machine(kernel="5.4")
    outcome = run(on, TOUCH + "    mov rax, gs:[rbx]\n    mov gs:[rbx + 0x100000], rax\n" + DONE)
    first, second = outcome.faults
    assert (first.error, second.error) == (0, 2)
    assert second.address == first.address + 0x100000
    assert outcome.ended == "oops"
    assert f"BUG: unable to handle page fault for address: {second.address:016x}" in outcome.log


def test_C62_a_guard_page_behind_a_shared_table_is_a_real_fault_at_once():
    on = machine(kernel="5.4")
    outcome = run(on, "    sub rsp, 8\n    mov edi, 4096\n    call vmalloc\n    mov [rax + 4096], rax\n    ret")
    assert [(fault.vector, fault.error) for fault in outcome.faults] == [(14, 2)]
    assert outcome.ended == "oops"


def test_O08_a_guest_maps_vmalloc_user_memory_into_an_mm_and_both_addresses_are_the_same_frames():
    on = machine()
    outcome = run(on, """
    push rbx
    push r12
    sub rsp, 8
    mov edi, 8192
    call vmalloc_user
    mov rbx, rax
    mov qword [rbx + 4096], 0x77
    call vmemu_new_mm
    mov r12, rax
    mov rdi, rax
    mov esi, 0x400000
    mov edx, 8192
    call vmemu_mmap
    mov rdi, rax
    mov rsi, rbx
    xor edx, edx
    call remap_vmalloc_range
    test eax, eax
    jnz .out
    mov cr3, r12
    stac
    mov ecx, 0x400000
    mov rax, [rcx + 4096]
    mov qword [rcx], 0x55
    clac
    add rax, [rbx]
.out:
    add rsp, 8
    pop r12
    pop rbx
    ret""")
    assert (outcome.ended, outcome.returned, outcome.faults) == ("returned", 0x77 + 0x55, ())
    (mm,) = on.mm_api.mms.values()
    pfn = mm.to_pa(0x400000) >> 12
    assert on.kernel.pages.page_count(pfn) == 2
    mm.destroy()
    assert on.kernel.pages.page_count(pfn) == 1


def test_O08_plain_vmalloc_memory_is_refused_with_einval():
    on = machine()
    outcome = run(on, """
    push rbx
    mov edi, 8192
    call vmalloc
    mov rbx, rax
    call vmemu_new_mm
    mov rdi, rax
    mov esi, 0x400000
    mov edx, 8192
    call vmemu_mmap
    mov rdi, rax
    mov rsi, rbx
    xor edx, edx
    call remap_vmalloc_range
    pop rbx
    ret""")
    assert outcome.returned == (1 << 64) - 22
