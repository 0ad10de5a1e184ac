"""Device memory in kernel addresses: ioremap and its kin (v6.12 arch/x86/mm/ioremap.c, arch/x86/mm/pat/memtype.c).

A physical range has one memory type at a time (emu/kernel/memtype.py): while a mapping of it exists, later ones get its type, where
they may. The direct map's alias of RAM that is mapped gets the type as well, and keeps it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from emu.kernel.memblock import Memblock
from emu.kernel.memtype import CACHE_MASK, CATTR_NAMES, ISA_END_ADDRESS, Memtypes, PageCacheMode, pgprot2cachemode
from emu.kernel.pgprot import PAT, PCD, PWT
from emu.kernel.set_memory import set_memory_type
from emu.kernel.vm_struct import VM_IOREMAP
from emu.kernel.vmap import Vmap
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX
from emu.memory import MAXPHYADDR

# What firmware leaves below the first MiB: not the first page, nor the last one, which holds its data.
_LOW_RAM = range(0x1000, 0x9F000)
# For the PAT that Linux programs: WB WC UC- UC WB WP UC- WT. Write-protected is not to be had: it is mapped uncached.
_PROTVAL = {
    PageCacheMode.WB: 0,
    PageCacheMode.WC: PWT,
    PageCacheMode.UC_MINUS: PCD,
    PageCacheMode.UC: PWT | PCD,
    PageCacheMode.WT: PAT | PCD | PWT,
    PageCacheMode.WP: PWT | PCD,
}


class Ioremap:
    """Mappings of device memory. `memblock` tells which RAM boot kept from the page allocator: only that may be mapped.

    `dump_stack` prints the stack of who unmaps a bad address.
    """

    def __init__(self, vmap: Vmap, memblock: Memblock, dump_stack: Callable[[], None] = lambda: None) -> None:
        self.vmap = vmap
        self.dump_stack = dump_stack
        self.vmalloc = vmap.vmalloc
        self.memblock = memblock
        vmalloc = self.vmalloc
        self.memtypes = Memtypes(
            vmalloc.slab, vmalloc.memory.size, vmalloc.report, vmalloc.warn_once, vmalloc.profile.version
        )

    def ioremap(self, phys: int, size: int, caller: int = 0) -> int:
        """Uncached unless an MTRR says write-combining (UC-)."""
        return self._ioremap_caller(phys, size, PageCacheMode.UC_MINUS, caller)

    def ioremap_uc(self, phys: int, size: int, caller: int = 0) -> int:
        """Strongly uncached (UC)."""
        return self._ioremap_caller(phys, size, PageCacheMode.UC, caller)

    def ioremap_wc(self, phys: int, size: int, caller: int = 0) -> int:
        """Write-combining."""
        return self._ioremap_caller(phys, size, PageCacheMode.WC, caller)

    def ioremap_wt(self, phys: int, size: int, caller: int = 0) -> int:
        """Write-through."""
        return self._ioremap_caller(phys, size, PageCacheMode.WT, caller)

    def ioremap_cache(self, phys: int, size: int, caller: int = 0) -> int:
        """Write-back."""
        return self._ioremap_caller(phys, size, PageCacheMode.WB, caller)

    def ioremap_prot(self, phys: int, size: int, prot: int, caller: int = 0) -> int:
        """The memory type of an entry with the bits of `prot`; nothing else of it counts."""
        return self._ioremap_caller(phys, size, pgprot2cachemode(prot & CACHE_MASK), caller)

    def _ioremap_caller(self, phys: int, size: int, mode: PageCacheMode, caller: int) -> int:
        """Map [phys, phys + size), at any alignment, in the largest leaves: the address of `phys`, or 0.

        0 for size 0 or wraparound (silently), more than the physical address width (WARN), RAM in use (WARN), a memory type
        that does not agree with an existing mapping, and for lack of addresses or tables.
        """
        vmalloc = self.vmalloc
        last = phys + size - 1
        if not size or last > ULONG_MAX:
            return 0
        if phys >> MAXPHYADDR:
            vmalloc.report.printk(f"ioremap: invalid physical address {phys:x}")
            vmalloc.warn_once("__ioremap_caller")
            return 0
        offset = phys % PAGE_SIZE
        start = phys - offset
        end = last + PAGE_SIZE & -PAGE_SIZE
        if start < vmalloc.memory.size and self.memblock.free_ranges(start, min(end, vmalloc.memory.size)):
            vmalloc.warn_once("__ioremap_caller:ram", f"ioremap on RAM at 0x{phys:016x} - 0x{last:016x}")
            return 0
        err, granted = self.memtypes.reserve(start, end, mode, strict=False)
        if err:
            vmalloc.report.printk(f"ioremap {self.memtypes.function} failed {err}")
            return 0
        la = 0
        if not self.memtypes.is_new_memtype_allowed(start, end, mode, granted):
            text = f"ioremap error for 0x{start:x}-0x{end:x}, requested 0x{mode:x}, got 0x{granted:x}"
            vmalloc.report.printk(text)
        else:
            la = self._map(start, end, granted, caller)
        if not la:
            self.memtypes.free(start, end)
            return 0
        return la + offset

    def _map(self, start: int, end: int, mode: PageCacheMode, caller: int) -> int:
        vmalloc = self.vmalloc
        area = vmalloc.get_vm_area(end - start, VM_IOREMAP, caller)
        if area is None:
            return 0
        area.phys_addr = start
        prot = vmalloc.prots.kernel | _PROTVAL[mode]
        if self._kernel_map_sync(start, end, mode) or self.vmap.ioremap_page_range(area.addr, area.addr + end - start, start, prot):
            vmalloc.free_vm_area(area)
            return 0
        return area.addr

    def _kernel_map_sync(self, start: int, end: int, mode: PageCacheMode) -> int:
        """memtype_kernel_map_sync(): the direct map of RAM gets the type too. 0, or -EINVAL with a message."""
        vmalloc = self.vmalloc
        if not (start in _LOW_RAM or ISA_END_ADDRESS <= start < vmalloc.memory.size):
            return 0
        nr_pages = min(end, vmalloc.memory.size) - start >> PAGE_SHIFT
        err, flushes = set_memory_type(vmalloc.mm, vmalloc.layout.va(start), nr_pages, mode)
        for flush in flushes:
            flush.flush(vmalloc.space.tlb, "cpa_flush")
        if not err:
            return 0
        where = f"[mem {start:#010x}-{end - 1:#010x}]"
        vmalloc.report.printk(f"x86/PAT: {self.memtypes.current()} ioremap_change_attr failed {CATTR_NAMES[mode]} for {where}")
        return -errno.EINVAL

    def iounmap(self, la: int) -> None:
        """Remove a mapping by any address in it; what is no vmalloc address is WARNed about, an unknown one is reported."""
        vmalloc = self.vmalloc
        if not vmalloc.is_vmalloc_addr(la):
            if vmalloc.profile.version >= (6, 12):
                vmalloc.warn_once("iounmap")
            return
        la &= -PAGE_SIZE
        area = vmalloc.find_vm_area(la)
        if area is None:
            vmalloc.report.printk(f"iounmap: bad address {la:016x}")
            self.dump_stack()
            return
        self.memtypes.free(area.phys_addr, area.phys_addr + area.get_vm_area_size())
        if vmalloc.remove_vm_area(la) is not area:
            vmalloc.report.bug("iounmap")
            return
        vmalloc.slab.kfree(area.la)
