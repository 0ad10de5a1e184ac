"""What an address lies in, in words."""

from __future__ import annotations

import pytest
from after_run import ran, result_word

VMALLOC = "mov edi, 4096\ncall vmalloc\nmov [result], rax"


def test_inside_an_area_the_offset_and_the_owner_are_named() -> None:
    result, machine = ran(VMALLOC)
    p = result_word(result)
    assert machine.place_of(p + 0x10).startswith(f"0x10 bytes into the vmalloc area {p:#x}-{p + 0x2000:#x} of init_module+0x")


def test_the_guard_page_is_told_from_the_area() -> None:
    result, machine = ran(VMALLOC)
    assert machine.place_of(result_word(result) + 0x1008).startswith("0x8 bytes into the guard page of the vmalloc area")


@pytest.mark.parametrize(("call", "kind"), [
    ("mov edi, 0xfed00000\nmov esi, 4096\ncall ioremap", "ioremap"),
    ("mov edi, 4096\nmov esi, 4\ncall get_vm_area\nmov rax, [rax + 8]", "vmap"),
])
def test_the_kind_of_area_is_named(call: str, kind: str) -> None:
    result, machine = ran(f"{call}\nmov [result], rax")
    assert f"into the {kind} area" in machine.place_of(result_word(result))


def test_a_block_of_vm_map_ram_is_named() -> None:
    result, machine = ran(
        "mov edi, 0xcc0\nxor esi, esi\ncall alloc_pages\nmov [result + 8], rax\nlea rdi, [result + 8]\nmov esi, 1\nmov edx, -1\n"
        "call vm_map_ram\nmov [result], rax"
    )
    assert machine.place_of(result_word(result)).startswith("0x0 bytes into the vm_map_ram area")


def test_the_parts_of_the_address_map_are_named() -> None:
    _, machine = ran("xor eax, eax")
    layout = machine.kernel.layout
    places = {
        layout.va(0x1234): "direct map of physical 0x1234", 0x1000: "user space", layout.page_to_la(5): "vmemmap: a struct page",
        layout.cpu_entry_area + 0x3000: "the CPU entry area", layout.modules_vaddr + (64 << 20): "unallocated module space",
        layout.vmalloc_start + (1 << 40): "unallocated vmalloc space", 0xFFFF_8000_0000_0000: "a hole in the address map",
    }
    assert {la: machine.place_of(la) for la in places} == places


def test_a_symbol_of_the_kernel_image_is_named() -> None:
    _, machine = ran("xor eax, eax")
    assert machine.place_of(machine.kernel.symbol("vfree")) == "vfree+0x0/0x10 in the kernel image"
