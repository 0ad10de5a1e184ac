"""What a linear address lies in: the question every fault raises first."""

from __future__ import annotations

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.vm_struct import Vm, VmStruct


def place_of(kernel: Kernel, la: int) -> str:
    """One line of text: a vmalloc area with the offset into it or into its guard page, or the part of the address map."""
    va = kernel.vmalloc.nodes.find(la)
    vm = kernel.vmalloc.find_vm_area(la)
    if vm is not None:
        return _in_area(kernel, vm, la)
    if va is not None:
        return f"{la - va.va_start:#x} bytes into the vm_map_ram area {va.va_start:#x}-{va.va_end:#x}"
    layout = kernel.layout
    symbol = kernel.symbolize(la)
    if symbol is not None:
        return f"{symbol} in the kernel image"
    if layout.is_vmalloc_addr(la):
        below = kernel.vmalloc.find_vm_area(la - PAGE_SIZE)
        after = "" if below is None else f", behind the guard page of {_area(below)}"
        return f"unallocated vmalloc space{after}"
    if layout.is_module_addr(la):
        return "unallocated module space"
    if layout.page_offset <= la < layout.page_offset + kernel.memory.size:
        return f"direct map of physical {la - layout.page_offset:#x}"
    if la < layout.task_size_max:
        return "user space"
    if layout.vmemmap_start <= la < layout.vmemmap_start + (kernel.memory.size >> 6):
        return "vmemmap: a struct page"
    if layout.cpu_entry_area <= la < layout.cpu_entry_area + (1 << 39):
        return "the CPU entry area"
    return "a hole in the address map"


def _area(vm: VmStruct) -> str:
    return f"{vm.addr:#x}-{vm.addr + vm.size:#x}"


def _in_area(kernel: Kernel, vm: VmStruct, la: int) -> str:
    caller = kernel.symbolize(vm.caller) if vm.caller else None
    owner = f"{_kind(vm)} area {_area(vm)}" + (f" of {caller}" if caller else "")
    usable = vm.get_vm_area_size()
    offset = la - vm.addr
    if offset >= usable:
        return f"{offset - usable:#x} bytes into the guard page of the {owner}"
    return f"{offset:#x} bytes into the {owner}"


def _kind(vm: VmStruct) -> str:
    for flag, name in ((Vm.IOREMAP, "ioremap"), (Vm.MAP, "vmap"), (Vm.SPARSE, "sparse"), (Vm.ALLOC, "vmalloc")):
        if vm.flags & flag:
            return name
    return "reserved"
