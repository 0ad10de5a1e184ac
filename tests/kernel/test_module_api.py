"""Exported functions as guests call them: names by version, C's argument types, bad pointers."""

from __future__ import annotations

from pathlib import Path

import pytest
from after_run import MEMORY, ran, result_word

from emu.config import MachineConfig
from emu.kernel.guest_exports import c_int, c_long, c_unsigned
from emu.kernel.printk import KernelLog
from emu.kernel.ratelimit import RatelimitState
from emu.machine import Machine

# v6.12 and v6.1 EXPORT_SYMBOL in mm/vmalloc.c, mm/util.c, arch/x86/mm/ioremap.c, kernel/iomem.c, without what needs a user mm.
EXPORTED = """
    is_vmalloc_addr vmalloc_to_page vmalloc_to_pfn vm_unmap_aliases vm_unmap_ram vm_map_ram vfree vunmap vmap vmap_pfn
    __vmalloc_node __vmalloc vmalloc vmalloc_huge vzalloc vmalloc_user vmalloc_node vzalloc_node vmalloc_32
    vmalloc_32_user free_vm_area
    __vmalloc_array vmalloc_array __vcalloc vcalloc kvfree kvfree_sensitive kvrealloc kvmalloc_node vmemdup_user
    ioremap ioremap_uc ioremap_wc ioremap_wt ioremap_cache iounmap memremap memunmap set_memory_uc set_memory_wc set_memory_wb
    lookup_address kfree krealloc ksize
""".split()


@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
def test_every_function_that_the_version_exports_is_there_under_its_name(kernel: str) -> None:
    symbols = Machine(MachineConfig(memory=MEMORY, kernel=kernel)).kernel.symbols
    missing = [name for name in EXPORTED if symbols.exported_address(name) is None]
    assert missing == (["vmalloc_huge"] if kernel == "5.4" else [])


def test_6_12_has_the_noprof_names_and_6_1_has_not() -> None:
    new, old = (Machine(MachineConfig(memory=MEMORY, kernel=kernel)).kernel.symbols for kernel in ("6.12", "6.1"))
    assert new.exported_address("vmalloc_noprof") == new.exported_address("vmalloc")
    assert new.symbolize(new.address_of("vmalloc")) == "vmalloc_noprof+0x0/0x10"
    assert old.exported_address("vmalloc_noprof") is None
    assert old.symbolize(old.address_of("vmalloc")) == "vmalloc+0x0/0x10"


def test_gpl_only_functions_are_refused_to_others() -> None:
    symbols = Machine(MachineConfig(memory=MEMORY)).kernel.symbols
    gpl = ("vmalloc_huge", "vm_unmap_aliases", "vmap_pfn", "free_vm_area", "__vmalloc_node", "is_vmalloc_or_module_addr")
    assert all(symbols.exported_address(name, gpl=False) is None for name in gpl)
    assert symbols.exported_address("vmalloc", gpl=False) is not None


def test_arguments_are_cut_to_the_types_of_c() -> None:
    assert c_int(0xFFFF_FFFF_FFFF_FFFF) == -1 and c_int(0x1_0000_0005) == 5 and c_int(0x8000_0000) == -(1 << 31)
    assert c_unsigned(0xFFFF_FFFF_FFFF_FFFF) == 0xFFFF_FFFF
    assert c_long((1 << 64) - 1) == -1 and c_long(5) == 5


def test_the_upper_half_of_an_int_argument_does_not_count() -> None:
    result, _ = ran("mov edi, 4096\nmov rsi, 0xabcdffffffff\ncall vmalloc_node\nmov [result], rax")
    assert result_word(result) != 0


def test_a_node_that_is_not_there_is_a_null_pointer_to_the_page_allocator() -> None:
    result, _ = ran("mov edi, 7\nmov esi, 0xcc0\nxor edx, edx\ncall alloc_pages_node")
    assert result.outcome.ended == "oops" and [f.address for f in result.outcome.faults] == [0x2000]


def test_page_to_pfn_computes_with_any_pointer() -> None:
    result, _ = ran(
        "xor edi, edi\ncall page_to_pfn\nmov [result], rax\n"
        "mov rdi, 0xffffea0000000140\ncall page_to_pfn\nmov [result + 8], rax"
    )
    assert (result_word(result), result_word(result, 1)) == ((1 << 64) - 0xFFFF_EA00_0000_0000 >> 6, 5)


def test_freeing_a_page_of_a_slab_leaves_it_and_says_so() -> None:
    result, machine = ran("mov edi, 64\nmov esi, 0xcc0\ncall kmalloc\nmov rdi, rax\ncall virt_to_page\nmov rdi, rax\ncall put_page")
    assert result.outcome.ended == "returned"
    assert any(line.startswith("BUG: Bad page state in process guest") for line in machine.log_lines())
    machine.kernel.slab.validate()


def test_freeing_more_than_was_allocated_leaves_the_neighbours() -> None:
    result, machine = ran("mov edi, 0xcc0\nxor esi, esi\ncall alloc_pages\nmov rdi, rax\nmov esi, 6\ncall __free_pages")
    assert result.outcome.ended == "returned"
    machine.kernel.pages.validate()


@pytest.mark.parametrize(("count", "returned"), [(1, -14), (-1, -14), (0, 0)])
def test_set_memory_of_what_is_not_mapped_is_efault_with_a_warning(count: int, returned: int) -> None:
    result, machine = ran(f"mov rdi, 0xffffe00000000000\nmov esi, {count & 0xFFFF_FFFF}\ncall set_memory_ro")
    assert (result.outcome.returned or 0) & 0xFFFF_FFFF == returned & 0xFFFF_FFFF
    warned = [line for line in machine.log_lines() if "CPA: called for zero pte. vaddr = ffffe00000000000" in line]
    assert len(warned) == (returned != 0)


def test_vmap_of_a_wild_array_faults_where_the_array_is_not_mapped() -> None:
    result, _ = ran("mov edi, 0x1000\nmov esi, 2\nmov edx, 4\nmov rcx, 0x8000000000000163\ncall vmap")
    assert result.outcome.ended == "oops" and result.outcome.faults[0].address == 0x1000


def test_vmap_looks_at_no_array_when_the_count_is_beyond_all_memory() -> None:
    result, _ = ran("mov edi, 0x1000\nmov esi, 0xffffffff\nmov edx, 4\nmov rcx, 0x8000000000000163\ncall vmap\nmov [result], rax")
    assert result.outcome.ended == "returned" and result_word(result) == 0


@pytest.mark.parametrize("kernel", ["6.12", "6.1"])
def test_kvrealloc_takes_the_arguments_of_its_version(kernel: str) -> None:
    old_size = "mov esi, 8192\nmov edx, 16384\nmov ecx, 0xcc0" if kernel == "6.1" else "mov esi, 16384\nmov edx, 0xcc0"
    result, _ = ran(
        f"mov edi, 8192\nmov esi, 0xcc0\ncall kvmalloc\nmov qword [rax + 8184], 77\nmov rdi, rax\n{old_size}\n"
        "call kvrealloc\nmov rcx, [rax + 8184]\nmov [result], rcx", kernel=kernel,
    )
    assert result_word(result) == 77


def test_the_total_pages_message_is_printed_once_in_ten_seconds() -> None:
    result, machine = ran("mov edi, 1 << 30\ncall vmalloc\nmov edi, 1 << 30\ncall vmalloc")
    assert result.outcome.ended == "returned"
    assert sum("exceeds total pages" in line for line in machine.log_lines()) == 1


def test_a_new_interval_tells_how_many_messages_were_kept_back() -> None:
    now = [0]
    log = KernelLog(now=lambda: now[0])
    limit = RatelimitState("warn_alloc", 10, 1)
    assert [limit.allows(log) for _ in range(3)] == [True, False, False]
    now[0] = 11_000_000_000
    assert limit.allows(log)
    assert [line.text for line in log.lines] == ["warn_alloc: 2 callbacks suppressed"]


def test_a_table_bent_out_of_ram_ends_in_a_bus_error() -> None:
    result, _ = ran(
        "mov edi, 4096\ncall vmalloc\nmov rdi, rax\nlea rsi, [result]\ncall lookup_address\nmov rcx, cr3\n"
        "mov rdx, 0xffff888000000000\nadd rcx, rdx\nmov rax, [rcx + 402 * 8]\nand rax, -4096\nadd rax, rdx\n"
        "mov rdi, 0x7000000067\nmov [rax + 8], rdi\n"
        "mov rdi, 0xffffc90040000000\ncall vmalloc_to_pfn"
    )
    assert result.outcome.ended == "bus error"


def test_every_exported_function_is_listed_in_the_guests_document() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "guests.md").read_text()
    symbols = Machine(MachineConfig(memory=MEMORY)).kernel.symbols
    names = {export.name for export in symbols.exports.values()}
    assert {name for name in names if f"`{name}`" not in document} == set()
