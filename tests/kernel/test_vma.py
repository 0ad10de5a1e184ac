"""vm_area_structs in guest memory: what is read of them, what is written, and bad ones."""

from __future__ import annotations

import errno

import pytest
from booted import machine, run

from emu.kernel.vma import SHARED_FLAGS, VM_DONTDUMP, VM_DONTEXPAND, VM_MIXEDMAP
from emu.machine import Machine

USER = 0x400000
PAGE = 4096
SHARED = """
    mov edi, 8192
    call vmalloc_user
    mov r12, rax
    call vmemu_new_mm
    mov r13, rax
    mov rdi, rax
    mov esi, 0x400000
    mov edx, 8192
    call vmemu_mmap
    mov rbx, rax
"""
REMAP = "    mov rdi, rbx\n    mov rsi, r12\n    xor edx, edx\n    call remap_vmalloc_range\n"


def body(*lines: str, setup: str = SHARED) -> str:
    saved = ("rbx", "r12", "r13")
    head = "".join(f"    push {name}\n" for name in saved)
    tail = "".join(f"    pop {name}\n" for name in reversed(saved))
    return head + setup + "".join(line if line.endswith("\n") else f"    {line}\n" for line in lines) + tail + "    ret"


def partial(address: int, size: int) -> tuple[str, ...]:
    where = ("mov rdi, rbx", f"mov esi, {address:#x}", "mov rdx, r12", "xor ecx, ecx", f"mov r8d, {size}")
    return (*where, "call remap_vmalloc_range_partial")


def vma_words(on: Machine, count: int) -> list[int]:
    (la,) = on.mm_api.mappings._mappings
    return [int.from_bytes(on.read(la + 8 * n, 8), "little") for n in range(count)]


@pytest.mark.parametrize(("kernel", "mm", "flags"), [("6.12", 2, 4), ("6.1", 2, 4), ("5.4", 8, 10)])
def test_a_mapping_has_its_fields_where_each_version_has_them_and_its_flags_are_kept(kernel, mm, flags):
    on = machine(kernel=kernel)
    assert run(on, body(REMAP)).returned == 0
    words = vma_words(on, 11)
    (pgd,) = on.mm_api.mms
    assert words[:2] == [USER, USER + 2 * PAGE]
    assert words[mm] == on.kernel.layout.va(pgd)
    assert words[flags] == SHARED_FLAGS | VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP


def test_user_pages_have_the_protection_that_the_struct_says():
    on = machine()
    read_only = 0x8000_0000_0000_0025
    assert run(on, body(f"mov rax, {read_only:#x}", "mov [rbx + 24], rax", REMAP)).returned == 0
    (mm,) = on.mm_api.mms.values()
    assert mm.lookup(USER).entry & 0x8000_0000_0000_0FFF == read_only


def test_a_range_outside_the_mapping_is_efault_and_marks_it_mixed_only_when_a_page_is_inserted():
    on = machine()
    assert run(on, body(*partial(USER + 2 * PAGE, PAGE))).returned == (1 << 64) - errno.EFAULT
    assert vma_words(on, 5)[4] == SHARED_FLAGS


def test_a_wild_vma_is_a_page_fault_at_its_first_field():
    outcome = run(machine(), body("mov ebx, 0x1000", REMAP))
    assert (outcome.ended, outcome.faults[0].address) == ("oops", 0x1000)


@pytest.mark.parametrize(
    ("kernel", "spoil", "line"),
    [
        ("6.12", "mov [rbx + 16], rbx", 2224), ("6.1", "mov [rbx + 16], rbx", 2054),
        ("6.12", "or qword [rbx + 32], 0x400", 2225), ("6.1", "or qword [rbx + 32], 0x400", 2055),
    ],
)
def test_a_vma_of_no_mm_or_of_bare_frames_is_a_bug(kernel, spoil, line):
    outcome = run(machine(kernel=kernel), body(spoil, REMAP))
    assert outcome.ended == "oops"
    assert any(f"kernel BUG at mm/memory.c:{line}!" in text for text in outcome.log)


def test_size_0_runs_on_to_the_end_of_the_mapping_or_into_the_page_that_the_guard_has_not():
    size_0 = partial(USER, 0)
    on = machine()
    assert run(on, body(*size_0)).returned == (1 << 64) - errno.EFAULT
    longer = SHARED.replace("mov edx, 8192", "mov edx, 12288")
    outcome = run(machine(), body(*size_0, setup=longer))
    assert (outcome.ended, outcome.faults[0].address) == ("oops", 8)


def test_vm_insert_page_maps_a_page_once_and_no_slab_page():
    on = machine()
    insert = ("mov rdi, rbx", "mov esi, 0x400000", "mov rdx, r12", "call vm_insert_page")
    page = ("mov edi, 0xcc0", "xor esi, esi", "call alloc_pages", "mov r12, rax")
    slab = ("mov edi, 64", "mov esi, 0xcc0", "call kmalloc", "mov rdi, rax", "call virt_to_page", "mov r12, rax")
    assert run(on, body(*slab, *insert)).returned == (1 << 64) - errno.EINVAL
    assert run(machine(), body(*page, *insert)).returned == 0
    assert run(machine(), body(*page, *insert, *insert)).returned == (1 << 64) - errno.EBUSY


@pytest.mark.parametrize(
    ("address", "size"), [(USER + 8, PAGE), (USER, 0), (0x7FFF_FFFF_F000, PAGE), (USER + PAGE, PAGE), (0, (1 << 64) - 1)]
)
def test_no_mapping_is_made_of_a_bad_range(address, size):
    again = ("mov rdi, r13", f"mov rsi, {address:#x}", f"mov rdx, {size:#x}", "call vmemu_mmap")
    assert run(machine(), body(*again)).returned == 0


def test_munmap_gives_the_pages_back_and_drops_what_the_tlb_had():
    on = machine()
    end = ("mov rdi, rbx", "call vmemu_munmap")
    touch = ("mov rdi, r13", "call vmemu_switch_mm", "stac", "mov rax, [0x400000]", "clac")
    outcome = run(on, body(REMAP, *touch, *end, "stac", "mov rax, [0x400000]"))
    assert [(fault.vector, fault.address) for fault in outcome.faults] == [(14, USER)]
    assert on.mm_api.mappings._mappings == {}
    assert run(machine(), body(*end, *end)).returned == (1 << 64) - errno.EINVAL


def test_destroying_the_mm_frees_its_mappings_too():
    on = machine()
    assert run(on, body(REMAP, "mov rdi, r13", "call vmemu_destroy_mm")).returned == 0
    assert on.mm_api.mappings._mappings == {}
    on.kernel.slab.validate()
    on.kernel.pages.validate()
