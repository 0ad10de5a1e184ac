"""Exported functions: pages, their struct page, and the protection of mapped memory (v6.12 mm/page_alloc.c, mm/swap.c,
arch/x86/mm/pat/set_memory.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from emu.kernel import set_memory
from emu.kernel.guest_exports import MASK64, GuestExports, c_int, c_unsigned
from emu.kernel.init_64 import InitMm
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.memtype import PageCacheMode, phys_addr
from emu.kernel.page_alloc import MAX_PAGE_ORDER, NUMA_NO_NODE
from emu.kernel.pgprot import NX
from emu.kernel.pgtable_types import FlushRange
from emu.kernel.vmalloc import NODE_ZONELISTS
from emu.mmu.entry import PHYSICAL_MASK

Change = Callable[[InitMm, int, int], tuple[int, FlushRange]]


def set_memory_rox(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
    """Write-protect and make executable in one pass."""
    read_only = mm.prots.kernel & ~mm.prots.kernel_ro
    return set_memory.change_page_attr_set_clr(mm, addr, numpages, clear_mask=read_only | NX)


_CHANGES: tuple[tuple[str, Change, bool], ...] = (
    ("set_memory_ro", set_memory.set_memory_ro, True), ("set_memory_rw", set_memory.set_memory_rw, True),
    ("set_memory_x", set_memory.set_memory_x, True), ("set_memory_nx", set_memory.set_memory_nx, True),
    ("set_memory_rox", set_memory_rox, True),
)


class PageExports:
    """Pages and protections of one kernel, for modules."""

    def __init__(self, exports: GuestExports) -> None:
        self.exports = exports
        self.kernel = exports.kernel
        self.pages = exports.kernel.pages
        self._register_pages()
        export = exports.export
        export("lookup_address", self._lookup_address, 2, gpl=True)
        for name, function, gpl in _CHANGES:
            export(name, lambda la, count, change=function: self._set_memory(change, la, c_int(count)), 2, gpl=gpl)
        export("slow_virt_to_phys", self._slow_virt_to_phys, 1, gpl=True)
        export("set_pages_uc", self._set_pages_uc, 2)
        export("set_pages_wb", lambda page, count: self._set_memory_wb(self._address(page), c_int(count)), 2)
        export("set_memory_uc", lambda la, count: self._set_memory_type(PageCacheMode.UC_MINUS, la, c_int(count)), 2)
        export("set_memory_wc", lambda la, count: self._set_memory_type(PageCacheMode.WC, la, c_int(count)), 2)
        export("set_memory_wb", lambda la, count: self._set_memory_wb(la, c_int(count)), 2)

    def _register_pages(self) -> None:
        exports, export = self.exports, self.exports.export
        export("alloc_pages", lambda gfp, order: self._alloc_pages(c_unsigned(gfp), c_unsigned(order)), 2, noprof=True)
        export("alloc_pages_node", self._alloc_pages_node, 3)
        export("__free_pages", lambda page, order: self._free_pages(page, c_unsigned(order)), 2)
        export("__get_free_pages", self._get_free_pages, 2)
        export("free_pages", self._free_pages_at, 2)
        export("page_address", self._address, 1)
        export("page_to_pfn", exports.page_to_pfn, 1)
        export("pfn_to_page", exports.pfn_to_page, 1)
        export("virt_to_page", exports.virt_to_page, 1)
        export("page_count", self._page_count, 1)
        export("get_page", self._get_page, 1)
        export("put_page", self._put_page, 1)

    # ---- pages

    def _alloc_pages(self, gfp: int, order: int, node: int = NUMA_NO_NODE) -> int:
        if order > MAX_PAGE_ORDER:
            self.kernel.vmalloc.warn_once("__alloc_pages")
            return 0
        if node != NUMA_NO_NODE and self.kernel.vmalloc.slab_node(node) == NUMA_NO_NODE:
            # NODE_DATA() of a node that is not there is NULL, and the allocator reads its zonelists.
            self.kernel.load(NODE_ZONELISTS)
        pfn = self.pages.alloc_pages(gfp, order, node)
        return 0 if pfn is None else self.kernel.layout.page_to_la(pfn)

    def _alloc_pages_node(self, node: int, gfp: int, order: int) -> int:
        return self._alloc_pages(c_unsigned(gfp), c_unsigned(order), c_int(node))

    def _get_free_pages(self, gfp: int, order: int) -> int:
        page = self._alloc_pages(c_unsigned(gfp), c_unsigned(order))
        return self.kernel.layout.va(self.exports.page_to_pfn(page) << PAGE_SHIFT) if page else 0

    def _free_pages(self, page: int, order: int) -> None:
        pfn = self.exports.frame_of(page)
        if pfn is None:
            return
        if order > MAX_PAGE_ORDER or not self.pages.is_allocated_block(pfn, order) or self.kernel.slab.is_slab(self._va(pfn)):
            self._bad_page(pfn)
        elif order == 0:
            self.pages.put_page(pfn)
        else:
            self.pages.free_pages(pfn, order)

    def _free_pages_at(self, la: int, order: int) -> None:
        if la:
            self._free_pages(self.exports.virt_to_page(la), c_unsigned(order))

    def _address(self, page: int) -> int:
        return self.kernel.layout.va(self.exports.page_to_pfn(page) << PAGE_SHIFT)

    def _va(self, pfn: int) -> int:
        return self.kernel.layout.va(pfn << PAGE_SHIFT)

    def _bad_page(self, pfn: int) -> None:
        """bad_page(): what is freed is not in the state of an allocated page; it stays as it is (v6.12 mm/page_alloc.c)."""
        kernel = self.kernel
        kernel.printk(f"BUG: Bad page state in process {kernel.current_thread(kernel.cpu).comm}  pfn:{pfn:05x}")

    def _page_count(self, page: int) -> int:
        pfn = self.exports.frame_of(page)
        return 0 if pfn is None else self.pages.page_count(pfn)

    def _get_page(self, page: int) -> None:
        pfn = self.exports.frame_of(page)
        if pfn is not None and self.pages.page_count(pfn):
            self.pages.get_page(pfn)

    def _put_page(self, page: int) -> None:
        self._free_pages(page, 0)

    # ---- protections

    def _lookup_address(self, la: int, level_la: int) -> int:
        """Address of the leaf entry in the direct map, 0 when a table is missing (v6.12 mm/pat/set_memory.c)."""
        found = self.kernel.init_mm.lookup(la)
        if not found.present and found.level > 1:
            return 0
        self.kernel.cpu.write(level_la, int(found.level).to_bytes(4, "little"))
        return self.kernel.layout.va(found.entry_pa)

    def _slow_virt_to_phys(self, la: int) -> int:
        """Physical address by a walk; BUG where a table is missing, nonsense where a leaf is (v6.12 mm/pat/set_memory.c)."""
        found = self.kernel.init_mm.lookup(la)
        if not found.entry and found.level > 1:
            self.kernel.bug("slow_virt_to_phys")
        return found.entry & PHYSICAL_MASK & -found.size | la & found.size - 1

    def _set_memory_type(self, mode: PageCacheMode, la: int, count: int) -> int:
        """set_memory_uc and set_memory_wc: as _set_memory, after a reservation of the memory type that may be refused."""
        memtypes = self.kernel.ioremap.memtypes
        start = phys_addr(self.kernel.layout, la)
        end = start + (count << PAGE_SHIFT) & MASK64
        err = memtypes.reserve(start, end, mode, strict=True)[0]
        if err:
            return err
        err = self._change_type(mode, la, count)
        if err:
            memtypes.free(start, end)
        return err

    def _set_pages_uc(self, page: int, count: int) -> int:
        return self._set_memory_type(PageCacheMode.UC_MINUS, self._address(page), c_int(count))

    def _set_memory_wb(self, la: int, count: int) -> int:
        err = self._change_type(PageCacheMode.WB, la, count)
        if not err:
            start = phys_addr(self.kernel.layout, la)
            self.kernel.ioremap.memtypes.free(start, start + (count << PAGE_SHIFT) & MASK64)
        return err

    def _change_type(self, mode: PageCacheMode, la: int, count: int) -> int:
        tlb = self.kernel.tlb

        def change(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
            err, flushes = set_memory.set_memory_type(mm, addr, numpages, mode)
            for flush in flushes[:-1]:
                flush.flush(tlb, "cpa_flush")
            return err, flushes[-1]

        return self._set_memory(change, la, count)

    def _set_memory(self, change: Change, la: int, count: int) -> int:
        """change_page_attr_set_clr(): 0, -ENOMEM, or -EFAULT with a WARN at the first page that is not mapped.

        A negative count goes on until there.
        """
        kernel = self.kernel
        if la % PAGE_SIZE:
            kernel.vmalloc.warn_once("change_page_attr_set_clr")
            la &= -PAGE_SIZE
        kernel.vmap_blocks.vm_unmap_aliases()
        if not count:
            return 0
        err, flush = change(kernel.init_mm, la, count & MASK64)
        flush.flush(kernel.tlb, "cpa_flush")
        if err == -errno.EINVAL:
            hole = self._first_hole(la, count & MASK64)
            kernel.warn("__cpa_process_fault", f"CPA: called for zero pte. vaddr = {hole:x} cpa->vaddr = {la:x}")
            return -errno.EFAULT
        return err

    def _first_hole(self, la: int, count: int) -> int:
        end = la + (count << PAGE_SHIFT)
        at = la
        while at < end:
            found = self.kernel.init_mm.lookup(at)
            if not found.entry:
                break
            at = (at & -found.size) + found.size
        return at
