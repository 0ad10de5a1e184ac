"""/proc/vmallocinfo: the areas as users read them (v6.12 mm/vmalloc.c: vmalloc_info_show; v6.1: s_show)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from emu.kernel.vm_struct import VM_UNINITIALIZED, Vm, VmAreas, VmStruct
from emu.kernel.vmap_area import VMAP_RAM, VmapArea

# In the order in which they are printed.
_TAGS = (
    (int(Vm.IOREMAP), " ioremap"),
    (int(Vm.SPARSE), " sparse"),
    (int(Vm.ALLOC), " vmalloc"),
    (int(Vm.MAP), " vmap"),
    (int(Vm.USERMAP), " user"),
    (int(Vm.DMA_COHERENT), " dma-coherent"),
)


def _range(start: int, end: int) -> str:
    return f"0x{start:016x}-0x{end:016x} {end - start:7d}"


def vmallocinfo_rows(areas: VmAreas, symbolize: Callable[[int], str]) -> Iterator[str]:
    """The rows of /proc/vmallocinfo without newlines; `symbolize` prints a caller as %pS does.

    From v6.9 on ordered by vmap_node, and an area under construction is left out; before, by address. Lazy areas come last.
    """
    sharded = areas.space.design.sharded
    for node in areas.nodes.nodes:
        for va in node.busy:
            vm = va.vm
            if isinstance(vm, VmStruct):
                if not (sharded and vm.flags & VM_UNINITIALIZED):
                    yield _row(areas, vm, symbolize)
            elif not sharded or va.flags & VMAP_RAM:
                yield f"{_range(va.va_start, va.va_end)} vm_map_ram"
    if not sharded and areas.nodes.nodes[0].busy.rb_node is None:
        return
    for node in areas.nodes.nodes:
        yield from map(_unpurged, node.lazy)


def _unpurged(va: VmapArea) -> str:
    return f"{_range(va.va_start, va.va_end)} unpurged vm_area"


def _row(areas: VmAreas, vm: VmStruct, symbolize: Callable[[int], str]) -> str:
    text = _range(vm.addr, vm.addr + vm.size)
    if vm.caller:
        text += f" {symbolize(vm.caller)}"
    if vm.nr_pages:
        text += f" pages={vm.nr_pages}"
    if vm.phys_addr:
        text += f" phys=0x{vm.phys_addr:016x}"
    text += "".join(tag for flag, tag in _TAGS if vm.flags & flag)
    if areas.layout.is_vmalloc_addr(vm.pages_la):
        text += " vpages"
    if vm.pages is not None and not vm.flags & VM_UNINITIALIZED:
        text += _numa_info(areas, vm)
    return text


def _numa_info(areas: VmAreas, vm: VmStruct) -> str:
    """Pages per node, counting each block of a large page by its first (Linux: show_numa_info)."""
    assert vm.pages is not None
    step = 1 << vm.page_order
    counts: dict[int, int] = {}
    heads, numbers = np.unique(vm.pages[::step] >> 10, return_counts=True)
    # A node starts on 4 MiB, so all frames of 4 MiB are of one node.
    for head, number in zip(heads.tolist(), numbers.tolist(), strict=True):
        nid = areas.pages.page_to_nid(head << 10)
        counts[nid] = counts.get(nid, 0) + number * step
    return "".join(f" N{nid}={counts[nid]}" for nid in sorted(counts))
