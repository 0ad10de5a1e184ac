"""/proc/vmallocinfo: the areas as users read them (v6.12 mm/vmalloc.c: vmalloc_info_show; v6.1: s_show)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from emu.kernel.vm_struct import VM_UNINITIALIZED, Vm, VmAreas, VmStruct
from emu.kernel.vmap_area import VMAP_RAM

# In the order in which they are printed.
_TAGS = (
    (int(Vm.IOREMAP), "ioremap"),
    (int(Vm.SPARSE), "sparse"),
    (int(Vm.ALLOC), "vmalloc"),
    (int(Vm.MAP), "vmap"),
    (int(Vm.USERMAP), "user"),
    (int(Vm.DMA_COHERENT), "dma-coherent"),
)


@dataclass(frozen=True, slots=True)
class VmallocInfoRow:
    """One row: an area of `kind` "vm" with what is known of it, "vm_map_ram", or "unpurged" for a lazy one.

    `end` is behind the guard page. `tags` in printing order; `nodes` maps a node to its pages.
    """

    start: int
    end: int
    kind: str = "vm"
    caller: str | None = None
    nr_pages: int = 0
    phys_addr: int = 0
    tags: tuple[str, ...] = ()
    vpages: bool = False
    nodes: tuple[tuple[int, int], ...] = ()

    def text(self) -> str:
        """The row as it is printed, without its newline."""
        text = f"0x{self.start:016x}-0x{self.end:016x} {self.end - self.start:7d}"
        if self.kind != "vm":
            return f"{text} {'vm_map_ram' if self.kind == 'vm_map_ram' else 'unpurged vm_area'}"
        if self.caller is not None:
            text += f" {self.caller}"
        if self.nr_pages:
            text += f" pages={self.nr_pages}"
        if self.phys_addr:
            text += f" phys=0x{self.phys_addr:016x}"
        text += "".join(f" {tag}" for tag in self.tags)
        if self.vpages:
            text += " vpages"
        return text + "".join(f" N{nid}={count}" for nid, count in self.nodes)


def vmallocinfo_rows(areas: VmAreas, symbolize: Callable[[int], str]) -> Iterator[str]:
    """The rows of /proc/vmallocinfo without newlines; `symbolize` prints a caller as %pS does."""
    return (row.text() for row in vmallocinfo(areas, symbolize))


def vmallocinfo(areas: VmAreas, symbolize: Callable[[int], str]) -> Iterator[VmallocInfoRow]:
    """The rows of /proc/vmallocinfo.

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
                yield VmallocInfoRow(va.va_start, va.va_end, "vm_map_ram")
    if not sharded and areas.nodes.nodes[0].busy.rb_node is None:
        return
    for node in areas.nodes.nodes:
        for va in node.lazy:
            yield VmallocInfoRow(va.va_start, va.va_end, "unpurged")


def _row(areas: VmAreas, vm: VmStruct, symbolize: Callable[[int], str]) -> VmallocInfoRow:
    return VmallocInfoRow(
        vm.addr, vm.addr + vm.size,
        caller=symbolize(vm.caller) if vm.caller else None,
        nr_pages=vm.nr_pages,
        phys_addr=vm.phys_addr,
        tags=tuple(tag for flag, tag in _TAGS if vm.flags & flag),
        vpages=areas.layout.is_vmalloc_addr(vm.pages_la),
        nodes=_numa_info(areas, vm) if vm.pages is not None and not vm.flags & VM_UNINITIALIZED else (),
    )


def _numa_info(areas: VmAreas, vm: VmStruct) -> tuple[tuple[int, int], ...]:
    """Pages per node, counting each block of a large page by its first (Linux: show_numa_info)."""
    assert vm.pages is not None
    step = 1 << vm.page_order
    counts: dict[int, int] = {}
    heads, numbers = np.unique(vm.pages[::step] >> 10, return_counts=True)
    # A node starts on 4 MiB, so all frames of 4 MiB are of one node.
    for head, number in zip(heads.tolist(), numbers.tolist(), strict=True):
        nid = areas.pages.page_to_nid(head << 10)
        counts[nid] = counts.get(nid, 0) + number * step
    return tuple(sorted(counts.items()))
