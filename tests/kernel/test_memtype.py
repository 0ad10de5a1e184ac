"""Memory types of physical ranges, and what ioremap and set_memory_* make of them."""

from __future__ import annotations

import errno

import pytest
from booted import machine, run
from vmap_machine import Kernel, kernel

from emu.kernel.ioremap import Ioremap
from emu.kernel.memtype import CATTR_NAMES, Memtypes, PageCacheMode, pgprot2cachemode
from emu.kernel.profile import find_profile

PAGE = 4096
BAR = 0xFD000000
WB, WC, UC_MINUS, UC, WT, WP = PageCacheMode
EBUSY, EINVAL, ENOMEM = -errno.EBUSY, -errno.EINVAL, -errno.ENOMEM


def memtypes(version: str = "6.12") -> tuple[Kernel, Memtypes]:
    k = kernel(find_profile(version))
    return k, Ioremap(k.vmap, k.memblock).memtypes


def reserve(types: Memtypes, first: int, pages: int, mode: PageCacheMode, *, strict: bool = True) -> int:
    return types.reserve(BAR + first * PAGE, BAR + (first + pages) * PAGE, mode, strict=strict)[0]


def test_equal_types_overlap_and_another_is_a_conflict_with_both_messages():
    k, types = memtypes()
    assert [reserve(types, 0, 4, WC), reserve(types, 2, 4, WC)] == [0, 0]
    assert reserve(types, 3, 8, UC_MINUS) == EBUSY
    assert k.task.log == [
        "x86/PAT: swapper/0:1 conflicting memory types fd003000-fd00b000 uncached-minus<->write-combining",
        "x86/PAT: memtype_reserve failed [mem 0xfd003000-0xfd00afff], track uncached-minus, req uncached-minus",
    ]
    types.validate()
    assert len(types.entries) == 2


def test_who_takes_any_type_gets_that_of_the_others_unless_they_differ():
    k, types = memtypes()
    reserve(types, 0, 1, WC)
    reserve(types, 4, 1, UC)
    where = (BAR, BAR + 2 * PAGE)
    assert types.reserve(*where, UC_MINUS, strict=False) == (0, WC)
    assert types.reserve(BAR, BAR + 8 * PAGE, WC, strict=False)[0] == EBUSY
    assert k.task.log[0] == "x86/PAT: swapper/0:1 conflicting memory types fd000000-fd008000 write-combining<->uncached"


def test_a_reservation_is_freed_whole_or_from_its_end_and_anything_else_is_reported():
    k, types = memtypes()
    reserve(types, 0, 8, WC)
    types.free(BAR + 6 * PAGE, BAR + 8 * PAGE)
    assert [(entry.start, entry.end) for entry in types.entries] == [(BAR, BAR + 6 * PAGE)]
    types.free(BAR, BAR + 5 * PAGE)
    assert k.task.log == ["x86/PAT: swapper/0:1 freeing invalid memtype [mem 0xfd000000-0xfd004fff]"]
    types.free(BAR, BAR + 6 * PAGE)
    assert types.entries == []
    k.slab.validate()


def test_the_isa_hole_is_write_back_and_not_tracked():
    _, types = memtypes()
    assert types.reserve(0xB8000, 0xC0000, UC, strict=False) == (0, WB)
    types.free(0xB8000, 0xC0000)
    assert types.entries == []


def test_an_empty_range_warns_each_time_and_one_that_runs_into_ram_is_einval():
    k, types = memtypes()
    for _ in range(2):
        assert types.reserve(BAR, BAR, WC, strict=True)[0] == EINVAL
    assert k.task.warnings == ["memtype_reserve: memtype_reserve failed: [mem 0xfd000000-0xfcffffff], req write-combining"] * 2
    assert types.reserve(0xFF000, 0x101000, WC, strict=True)[0] == EINVAL


def test_ram_leaves_write_back_once_and_never_becomes_strongly_uncached_or_write_protected():
    k, types = memtypes()
    where = (32 << 20, (32 << 20) + 2 * PAGE)
    assert types.reserve(*where, WP, strict=True) == (EINVAL, UC_MINUS)
    assert types.reserve(*where, UC, strict=False) == (0, UC_MINUS)
    assert k.task.warnings == ["reserve_ram_pages_type: "]
    assert types.reserve(*where, UC_MINUS, strict=True) == (EBUSY, UC_MINUS)
    assert k.task.log == ["x86/PAT: reserve_ram_pages_type failed [mem 0x02000000-0x02001fff], track 0x2, req 0x2"]
    types.free(*where)
    assert types.reserve(*where, WC, strict=True) == (0, WC)
    types.validate()


def test_without_memory_for_a_reservation_there_is_none():
    k, types = memtypes()
    k.pages.should_fail = lambda gfp, order: True
    held = []
    while (la := k.slab.kzalloc(56)) is not None:
        held.append(la)
    assert reserve(types, 0, 1, WC) == ENOMEM
    assert types.entries == []


def test_before_5_7_the_functions_have_their_older_names():
    k, types = memtypes("5.4")
    reserve(types, 0, 1, WC)
    reserve(types, 0, 1, UC)
    assert k.task.log[1].startswith("x86/PAT: reserve_memtype failed [mem 0xfd000000-0xfd000fff], track uncached, ")


def test_every_type_has_a_name_and_each_pat_slot_its_type():
    assert set(CATTR_NAMES) == set(PageCacheMode)
    slots = [pwt | pcd | pat for pat in (0, 0x80) for pcd in (0, 0x10) for pwt in (0, 0x08)]
    assert [pgprot2cachemode(bits) for bits in slots] == [WB, WC, UC_MINUS, UC, WB, WP, UC_MINUS, WT]


@pytest.mark.parametrize(("prot", "bits"), [(0x163, 0), (0x16B, 0x08), (0x173, 0x10), (0x17B, 0x18), (0x1FB, 0x98), (0x1EB, 0x18)])
def test_ioremap_prot_takes_the_memory_type_alone_and_maps_write_protected_uncached(prot, bits):
    k = kernel()
    la = Ioremap(k.vmap, k.memblock).ioremap_prot(BAR, PAGE, prot & ~2)
    assert k.mm.lookup(la).entry & 0x98 == bits
    assert k.mm.lookup(la).entry & 2


def test_ioremap_of_reserved_ram_gives_the_direct_map_the_type_and_a_second_one_fails():
    k = kernel()
    io = Ioremap(k.vmap, k.memblock)
    layout = k.vmalloc.layout
    assert io.ioremap_wc(layout.kernel_phys, PAGE)
    assert k.mm.lookup(layout.va(layout.kernel_phys)).entry & 0x98 == 0x08
    assert io.ioremap_wc(layout.kernel_phys, PAGE) == 0
    assert k.task.log[-1] == "ioremap memtype_reserve failed -16"


@pytest.mark.parametrize("version", ["6.12", "6.1", "5.4"])
def test_set_memory_reserves_the_type_and_set_memory_wb_ends_it(version):
    on = machine(kernel=version)
    page = "    mov rdi, rbx\n    mov esi, 1\n"
    outcome = run(on, f"""
    push rbx
    mov edi, 0xcc0
    xor esi, esi
    call __get_free_pages
    mov rbx, rax
{page}    call set_memory_uc
    test eax, eax
    jnz .out
{page}    call set_memory_wc
    cmp eax, -16
    jne .out
{page}    call set_memory_wb
    test eax, eax
    jnz .out
{page}    call set_memory_wc
    test eax, eax
    mov rax, rbx
.out:
    pop rbx
    ret""")
    assert on.kernel.init_mm.lookup(outcome.returned).entry & 0x98 == 0x08
    pa = on.kernel.layout.pa(outcome.returned)
    failed = f"x86/PAT: reserve_ram_pages_type failed [mem {pa:#010x}-{pa + PAGE - 1:#010x}], track 0x2, req 0x1"
    assert failed in outcome.log


def test_vmalloc_addresses_are_tracked_by_what_pa_makes_of_them():
    on = machine()
    outcome = run(on, """
    push rbx
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov rdi, rax
    mov esi, 1
    call set_memory_uc
    mov rdi, rbx
    mov esi, 1
    call set_memory_wc
    pop rbx
    ret""")
    assert outcome.returned == (1 << 64) + EBUSY
    (entry,) = on.kernel.ioremap.memtypes.entries
    assert entry.start >> 40 == 0x40
    assert any(line.endswith("write-combining<->uncached-minus") and "conflicting memory types 40" in line for line in outcome.log)


def test_set_memory_of_a_hole_leaves_no_reservation_and_of_no_pages_warns():
    on = machine()
    hole = on.kernel.layout.vmalloc_end & -PAGE
    outcome = run(on, f"    sub rsp, 8\n    mov rdi, {hole:#x}\n    mov esi, 1\n    call set_memory_uc\n    add rsp, 8\n    ret")
    assert outcome.returned == (1 << 64) - errno.EFAULT
    assert on.kernel.ioremap.memtypes.entries == []
    none = run(machine(), "    sub rsp, 8\n    mov rdi, rsp\n    xor esi, esi\n    call set_memory_wc\n    add rsp, 8\n    ret")
    assert none.returned == (1 << 64) + EINVAL
    assert any("memtype_reserve failed: [mem " in line for line in none.log)


def test_set_memory_wb_of_what_has_no_reservation_says_so_and_succeeds():
    outcome = run(machine(), """
    sub rsp, 8
    mov edi, 4096
    call vmalloc
    mov rdi, rax
    mov esi, 1
    call set_memory_wb
    add rsp, 8
    ret""")
    assert outcome.returned == 0
    assert any(line.startswith("x86/PAT: guest:100 freeing invalid memtype [mem 0x40") for line in outcome.log)
