"""Device memory in kernel addresses: ioremap and its kin (v6.12 arch/x86/mm/ioremap.c, arch/x86/mm/pat/memtype.c).

A physical range has one memory type at a time: while a mapping of it exists, later ones get its type, where they may. Not
modelled: MTRRs (a request for write-back is not weakened) and the alias of mapped RAM in the direct map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from emu.kernel.memblock import Memblock
from emu.kernel.pgprot import PAT, PCD, PWT
from emu.kernel.vm_struct import VM_IOREMAP
from emu.kernel.vmap import Vmap
from emu.kernel.vmap_area import PAGE_SIZE, ULONG_MAX
from emu.memory import MAXPHYADDR

ISA_START_ADDRESS = 0x000A0000
ISA_END_ADDRESS = 0x00100000


class PageCacheMode(IntEnum):
    """Memory types (v6.12 asm/pgtable_types.h: enum page_cache_mode)."""

    WB = 0
    WC = 1
    UC_MINUS = 2
    UC = 3
    WT = 4


# For the PAT that Linux programs: WB WC UC- UC WB WP UC- WT.
_PROTVAL = {
    PageCacheMode.WB: 0,
    PageCacheMode.WC: PWT,
    PageCacheMode.UC_MINUS: PCD,
    PageCacheMode.UC: PWT | PCD,
    PageCacheMode.WT: PAT | PCD | PWT,
}
_REFUSED = {
    (PageCacheMode.UC_MINUS, PageCacheMode.WB),
    (PageCacheMode.WC, PageCacheMode.WB),
    (PageCacheMode.WT, PageCacheMode.WB),
    (PageCacheMode.WT, PageCacheMode.WC),
}


@dataclass(frozen=True, slots=True)
class Memtype:
    """A reservation of physical [start, end) with a memory type."""

    start: int
    end: int
    mode: PageCacheMode


class Ioremap:
    """Mappings of device memory. `memblock` tells which RAM boot kept from the page allocator: only that may be mapped.

    `dump_stack` prints the stack of who unmaps a bad address.
    """

    def __init__(self, vmap: Vmap, memblock: Memblock, dump_stack: Callable[[], None] = lambda: None) -> None:
        self.vmap = vmap
        self.dump_stack = dump_stack
        self.vmalloc = vmap.vmalloc
        self.memblock = memblock
        self.memtypes: list[Memtype] = []

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
        granted = self._memtype_reserve(start, end, mode)
        if granted is None:
            return 0
        area = vmalloc.get_vm_area(end - start, VM_IOREMAP, caller)
        if area is None:
            self._memtype_free(start, end)
            return 0
        area.phys_addr = start
        prot = vmalloc.prots.kernel | _PROTVAL[granted]
        if self.vmap.ioremap_page_range(area.addr, area.addr + end - start, start, prot):
            vmalloc.free_vm_area(area)
            self._memtype_free(start, end)
            return 0
        return area.addr + offset

    def _memtype_reserve(self, start: int, end: int, mode: PageCacheMode) -> PageCacheMode | None:
        """Reserve a range: the type to use, or None with its message where the existing types forbid it."""
        if start >= ISA_START_ADDRESS and end <= ISA_END_ADDRESS:
            return PageCacheMode.WB
        found = {reserved.mode for reserved in self.memtypes if reserved.start < end and start < reserved.end}
        if len(found) > 1:
            self.vmalloc.report.printk("ioremap memtype_reserve failed -16")
            return None
        granted = found.pop() if found else mode
        if (mode, granted) in _REFUSED:
            text = f"ioremap error for 0x{start:x}-0x{end:x}, requested 0x{mode:x}, got 0x{granted:x}"
            self.vmalloc.report.printk(text)
            return None
        self.memtypes.append(Memtype(start, end, granted))
        return granted

    def _memtype_free(self, start: int, end: int) -> None:
        for i, reserved in enumerate(self.memtypes):
            if (reserved.start, reserved.end) == (start, end):
                del self.memtypes[i]
                return

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
        self._memtype_free(area.phys_addr, area.phys_addr + area.get_vm_area_size())
        if vmalloc.remove_vm_area(la) is not area:
            vmalloc.report.bug("iounmap")
            return
        vmalloc.slab.kfree(area.la)
