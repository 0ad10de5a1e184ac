"""Who owns an address or a frame now. Asked only for a report: it may search everything."""

from __future__ import annotations

from collections.abc import Iterator

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.pgprot import PRESENT, PSE
from emu.kernel.pgtable import PageTable
from emu.kernel.places import place_of
from emu.kernel.vm_struct import VmStruct
from emu.mmu.entry import PHYSICAL_MASK

KERNEL_HALF = 256


def address_owner(kernel: Kernel, la: int) -> str:
    """What a linear address lies in, lazily freed areas included."""
    if is_lazy(kernel, la):
        return "freed, and waits for the next purge of vmalloc space"
    return place_of(kernel, la)


def is_lazy(kernel: Kernel, la: int) -> bool:
    """Whether the address lies in an area that was unmapped and not flushed yet."""
    return any(node.lazy.find(la) is not None for node in kernel.vmalloc.nodes.nodes)


def area_at(kernel: Kernel, la: int) -> object | None:
    """The busy area at an address, None if there is none: the same object for as long as the area lives."""
    va = kernel.vmalloc.nodes.find(la)
    return None if va is None else va.vm if va.vm is not None else va


def frame_owner(kernel: Kernel, pfn: int) -> str:
    """What a physical frame is used for."""
    pages = kernel.pages
    if not 0 <= pfn < pages.max_pfn:
        return "not RAM"
    if pages.is_free(pfn):
        return "free"
    level = next((level for frame, level in _tables(kernel) if frame == pfn), None)
    if level is not None:
        return f"a page table of level {level}"
    if kernel.slab.is_slab(kernel.layout.va(pfn << PAGE_SHIFT)):
        return "a slab page of kmalloc"
    for node in kernel.vmalloc.nodes.nodes:
        for va in node.busy:
            vm = va.vm
            if isinstance(vm, VmStruct):
                page = page_in(kernel, vm, pfn)
                if page is not None:
                    return place_of(kernel, vm.addr + page * PAGE_SIZE)
    if pages.page_count(pfn):
        return f"allocated, references {pages.page_count(pfn)}"
    return "part of a larger allocated block, or reserved at boot"


def page_in(kernel: Kernel, vm: VmStruct, pfn: int) -> int | None:
    if vm.pages is not None:
        found = (vm.pages == pfn).nonzero()[0]
        return int(found[0]) if len(found) else None
    for la, entry, level in kernel.init_mm.leaves(vm.addr, vm.addr + vm.get_vm_area_size()):
        first = (entry & PHYSICAL_MASK) >> PAGE_SHIFT & -(1 << 9 * (level - 1))
        if first <= pfn < first + (1 << 9 * (level - 1)):
            return (la - vm.addr >> PAGE_SHIFT) + pfn - first
    return None


def _tables(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """The frames of all page tables that the kernel knows, with their levels; a process's for its user half."""
    yield from _below(kernel.init_mm, kernel.init_mm.pgd, kernel.init_mm.levels, 512)
    for pgd in kernel.init_mm.pgds:
        yield from _below(kernel.init_mm, pgd, kernel.init_mm.levels, KERNEL_HALF)


def _below(tables: PageTable, table: int, level: int, count: int) -> Iterator[tuple[int, int]]:
    yield table >> PAGE_SHIFT, level
    if level > 1:
        for entry in tables.memory.table(table)[:count].tolist():
            if entry & PRESENT and not entry & PSE:
                yield from _below(tables, entry & PHYSICAL_MASK, level - 1, 512)
