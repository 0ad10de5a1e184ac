"""What an address lies in and who owns a frame, fast enough to be asked for every access of a run."""

from __future__ import annotations

from typing import NamedTuple

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.places import place_of
from emu.kernel.task import THREAD_SIZE, ThreadState
from emu.kernel.vm_struct import VmStruct
from emu.mmu.table_frames import TableFrames
from emu.tlbsan.owners import frame_owner, page_in


class _Thing(NamedTuple):
    """What a page lies in: where it begins, and its name."""

    base: int
    name: str


class Surroundings:
    """Names for the memory of one kernel, remembered until `forget`: whoever lets the kernel model run must call it.

    `tables` are the frames of page tables, as far as they are known.
    """

    def __init__(self, kernel: Kernel, tables: TableFrames | None) -> None:
        self.kernel = kernel
        self.tables = tables
        self._things: dict[int, _Thing | None] = {}
        self._owners: dict[int, str] = {}

    def forget(self) -> None:
        """Areas, threads or frames may have changed."""
        self._things.clear()
        self._owners.clear()

    def place(self, la: int) -> str:
        """What a linear address lies in, in words, with its offset."""
        page = la >> PAGE_SHIFT
        try:
            thing = self._things[page]
        except KeyError:
            thing = self._things[page] = self._thing(la)
        return place_of(self.kernel, la) if thing is None else f"{la - thing.base:#x} bytes into {thing.name}"

    def owner(self, pfn: int, la: int) -> str:
        """Who owns a frame that was reached at `la`."""
        try:
            return self._owners[pfn]
        except KeyError:
            owner = self._owners[pfn] = self._owner(pfn, la)
            return owner

    def _thing(self, la: int) -> _Thing | None:
        kernel = self.kernel
        for thread in kernel.threads:
            if thread.stack <= la < thread.stack + THREAD_SIZE and thread.state is not ThreadState.DEAD:
                return _Thing(thread.stack, f"the stack of {thread.comm}/{thread.pid}")
        for module in kernel.modules:
            for part in module.parts:
                if part.la <= la < part.la + part.size:
                    return _Thing(part.la, f"{part.kind} of module {module.name}")
        for chunk in kernel.percpu.chunks():
            for cpu in range(kernel.cpus.possible):
                base = chunk.base_addr + kernel.percpu.unit_offsets[cpu]
                if base <= la < base + chunk.nr_pages * PAGE_SIZE:
                    return _Thing(base, f"per-CPU memory of CPU {cpu}")
        for node in kernel.vmalloc.nodes.nodes:
            lazy = node.lazy.find(la)
            if lazy is not None:
                return _Thing(lazy.va_start, f"the freed area {lazy.va_start:#x}-{lazy.va_end:#x}, not purged yet")
        return None

    def _owner(self, pfn: int, la: int) -> str:
        kernel = self.kernel
        pages = kernel.pages
        if not 0 <= pfn < pages.max_pfn:
            return "not RAM"
        if pages.is_free(pfn):
            return "free"
        if kernel.slab.is_slab(kernel.layout.va(pfn << PAGE_SHIFT)):
            return "slab"
        if self.tables is None:
            return frame_owner(kernel, pfn)
        if self.tables.is_table_frame(pfn):
            return "page table"
        mapped = self._mapping(pfn, la)
        if mapped is None:
            return "kernel" if pages.page_count(pfn) == 0 else f"allocated, references {pages.page_count(pfn)}"
        thing = self._thing(mapped)
        if thing is not None:
            return f"page {mapped - thing.base >> PAGE_SHIFT} of {thing.name}"
        va = kernel.vmalloc.nodes.find(mapped)
        assert va is not None, "an area maps the frame"
        return f"page {mapped - va.va_start >> PAGE_SHIFT} of area {va.va_start:#x}-{va.va_end:#x}"

    def _mapping(self, pfn: int, la: int) -> int | None:
        """The address of a busy area at which a frame is mapped: that of the access first, then any."""
        nodes = self.kernel.vmalloc.nodes
        here = nodes.find(la)
        for va in ([here] if here is not None else []):
            page = self._page(va.vm, pfn)
            if page is not None:
                return va.va_start + page * PAGE_SIZE
        for node in nodes.nodes:
            for va in node.busy:
                page = self._page(va.vm, pfn)
                if page is not None:
                    return va.va_start + page * PAGE_SIZE
        return None

    def _page(self, vm: object | None, pfn: int) -> int | None:
        return page_in(self.kernel, vm, pfn) if isinstance(vm, VmStruct) else None
