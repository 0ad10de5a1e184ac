"""What an address lies in and who owns a frame, fast enough to be asked for every access of a run."""

from __future__ import annotations

from typing import NamedTuple

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.places import place_of
from emu.kernel.task import ThreadState
from emu.kernel.thread_stack import THREAD_SIZE
from emu.kernel.vm_struct import VmStruct
from emu.mmu.table_frames import TableFrames
from emu.tlbsan.owners import frame_owner, page_in

_INTO = " bytes into "
_DIRECT = "direct map of physical "


class _Thing(NamedTuple):
    """What a page lies in: where that begins, and what stands before and behind the offset when an address in it is named."""

    base: int
    before: str
    name: str


class Surroundings:
    """Names for the memory of one kernel, remembered until `forget`: whoever lets the kernel model run must call it.

    `tables` are the frames of page tables, as far as they are known.
    """

    def __init__(self, kernel: Kernel, tables: TableFrames | None) -> None:
        self.kernel = kernel
        self.tables = tables
        self._things: dict[int, _Thing | str | None] = {}
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
        if isinstance(thing, _Thing):
            return f"{thing.before}{la - thing.base:#x}{thing.name}"
        return place_of(self.kernel, la) if thing is None else thing

    def owner(self, pfn: int, la: int) -> str:
        """Who owns a frame that was reached at `la`."""
        try:
            return self._owners[pfn]
        except KeyError:
            owner = self._owners[pfn] = self._owner(pfn, la)
            return owner

    def _thing(self, la: int) -> _Thing | str | None:
        """What the page at an address lies in: a thing, a text that holds for the whole page, or None if neither will do."""
        kernel = self.kernel
        for thread in kernel.threads:
            if thread.stack <= la < thread.stack + THREAD_SIZE and thread.state is not ThreadState.DEAD:
                return _into(thread.stack, f"the stack of {thread.comm}/{thread.pid}")
        for module in kernel.modules:
            for part in module.parts:
                if part.la <= la < part.la + part.size:
                    return _into(part.la, f"{part.kind} of module {module.name}")
        for chunk in kernel.percpu.chunks():
            for cpu in range(kernel.cpus.possible):
                base = chunk.base_addr + kernel.percpu.unit_offsets[cpu]
                if base <= la < base + chunk.nr_pages * PAGE_SIZE:
                    return _into(base, f"per-CPU memory of CPU {cpu}")
        for node in kernel.vmalloc.nodes.nodes:
            lazy = node.lazy.find(la)
            if lazy is not None:
                return _into(lazy.va_start, f"the freed area {lazy.va_start:#x}-{lazy.va_end:#x}, not purged yet")
        text = place_of(kernel, la)
        offset, into, name = text.partition(_INTO)
        if into:
            return _into(la - int(offset, 16), name)
        if text.startswith(_DIRECT):
            return _Thing(kernel.layout.page_offset, _DIRECT, "")
        return None if "+" in text else text

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
        assert isinstance(thing, _Thing), f"{mapped:#x} lies in an area"
        return f"page {mapped - thing.base >> PAGE_SHIFT} of {thing.name.removeprefix(_INTO)}"

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


def _into(base: int, name: str) -> _Thing:
    return _Thing(base, "", _INTO + name)
