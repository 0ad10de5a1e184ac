"""The memory type of physical ranges, one at a time: who asks for another gets the old one, or an error.

Source: v6.12 arch/x86/mm/pat/memtype.c memtype_reserve, memtype_free, reserve_ram_pages_type, memtype_interval.c; up to v5.6 the
functions are called reserve_memtype and free_memtype. RAM has a type for each page, without counting its users; for all else there
is a list of reservations. Not modelled: MTRRs (a request for write-back is not weakened), and that freeing a page of RAM makes its
type write-back again.
"""

from __future__ import annotations

import errno
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.layout import PAGE_SHIFT, START_KERNEL_MAP, Layout
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.pgprot import PAT, PCD, PWT

if TYPE_CHECKING:
    from emu.kernel.vm_struct import Slab

ISA_START_ADDRESS = 0x000A0000
ISA_END_ADDRESS = 0x00100000
SIZEOF_STRUCT_MEMTYPE = 56
_PHYSICAL_MASK = (1 << 52) - 1
_MASK64 = (1 << 64) - 1


class PageCacheMode(IntEnum):
    """Memory types (v6.12 asm/pgtable_types.h: enum page_cache_mode)."""

    WB = 0
    WC = 1
    UC_MINUS = 2
    UC = 3
    WT = 4
    WP = 5


_M = PageCacheMode
CACHE_MASK = PWT | PCD | PAT
CATTR_NAMES = {
    _M.UC: "uncached", _M.UC_MINUS: "uncached-minus", _M.WB: "write-back", _M.WC: "write-combining", _M.WT: "write-through",
    _M.WP: "write-protected",
}  # fmt: skip
# By PAT, PCD, PWT as a number, for the PAT that Linux programs.
_OF_PAT_SLOT = (_M.WB, _M.WC, _M.UC_MINUS, _M.UC, _M.WB, _M.WP, _M.UC_MINUS, _M.WT)
_REFUSED = {(_M.UC_MINUS, _M.WB), (_M.WC, _M.WB), (_M.WT, _M.WB), (_M.WT, _M.WC)}


def pgprot2cachemode(prot: int) -> PageCacheMode:
    """The memory type that a 4 KiB entry with these bits has."""
    return _OF_PAT_SLOT[(prot & PAT > 0) << 2 | (prot & PCD > 0) << 1 | (prot & PWT > 0)]


def phys_addr(layout: Layout, la: int) -> int:
    """__pa() as C computes it: any address gives a number, which is physical for the direct map and the kernel image only."""
    if la >= START_KERNEL_MAP:
        return la - layout.kernel_text + layout.kernel_phys & _MASK64
    return la - layout.page_offset & _MASK64


@dataclass(slots=True)
class Memtype:
    """A reservation of physical [start, end) with a memory type; `la` is its object in the slab."""

    start: int
    end: int
    mode: PageCacheMode
    la: int = 0


class Report(Protocol):
    """Where messages go."""

    def printk(self, text: str) -> None:
        """A line of the kernel log."""

    def warn(self, function: str, text: str = "") -> None:
        """WARN in a C function."""


class Memtypes:
    """The memory types of one machine, whose RAM ends at `ram`. `current` names the current task in messages: comm:pid."""

    def __init__(self, slab: Slab, ram: int, report: Report, warn_once: Callable[[str], None], version: tuple[int, ...]) -> None:
        self._slab = slab
        self._ram = ram
        self._report = report
        self._warn_once = warn_once
        self.function = "memtype_reserve" if version >= (5, 7) else "reserve_memtype"
        self.current: Callable[[], str] = lambda: "swapper/0:1"
        # Ordered by start; of equal ones the older is first, as in Linux's interval tree.
        self.entries: list[Memtype] = []
        self.ram_types: dict[int, PageCacheMode] = {}

    def validate(self) -> None:
        """Reservations are ordered and not empty, and all that overlap agree; no page of RAM is listed as write-back."""
        for entry, following in zip(self.entries, self.entries[1:], strict=False):
            assert entry.start <= following.start
        for i, entry in enumerate(self.entries):
            assert entry.start < entry.end
            for other in self.entries[i + 1 :]:
                assert other.start >= entry.end or other.mode == entry.mode
        assert PageCacheMode.WB not in self.ram_types.values()

    def reserve(self, start: int, end: int, mode: PageCacheMode, *, strict: bool) -> tuple[int, PageCacheMode]:
        """memtype_reserve(): 0 and the type to use, which is `mode` when `strict`; or a negative errno.

        -EINVAL for an empty range (WARN) and one that begins below RAM and ends in it, -EBUSY for a conflict, -ENOMEM.
        """
        start &= _PHYSICAL_MASK
        end = (end - 1 & _PHYSICAL_MASK) + 1
        if start >= end:
            text = f"{self.function} failed: [mem {start:#010x}-{end - 1 & _MASK64:#010x}], req {CATTR_NAMES[mode]}"
            self._report.warn("memtype_reserve", text)
            return -errno.EINVAL, mode
        if start >= ISA_START_ADDRESS and end <= ISA_END_ADDRESS:
            return 0, PageCacheMode.WB
        is_ram = self._is_ram(start, end)
        if is_ram is None:
            return -errno.EINVAL, mode
        if is_ram:
            return self._reserve_ram_pages_type(start, end, mode)
        la = self._slab.kmalloc(SIZEOF_STRUCT_MEMTYPE, int(GFP_KERNEL | Gfp.ZERO), NUMA_NO_NODE)
        if la is None:
            return -errno.ENOMEM, mode
        granted = self._check_conflict(start, end, mode, strict)
        if granted is None:
            self._slab.kfree(la)
            name = CATTR_NAMES[mode]
            self._report.printk(f"x86/PAT: {self.function} failed [mem {start:#010x}-{end - 1:#010x}], track {name}, req {name}")
            return -errno.EBUSY, mode
        insort(self.entries, Memtype(start, end, granted, la), key=lambda entry: entry.start)
        return 0, granted

    def free(self, start: int, end: int) -> None:
        """memtype_free(): a reservation of that very range, or the tail of one; a message where there is none."""
        start &= _PHYSICAL_MASK
        end &= _PHYSICAL_MASK
        if start >= ISA_START_ADDRESS and end <= ISA_END_ADDRESS:
            return
        is_ram = self._is_ram(start, end)
        if is_ram is None:
            return
        if is_ram:
            for pfn in self._pfns(start, end):
                self.ram_types.pop(pfn, None)
            return
        for i, entry in enumerate(self.entries):
            if (entry.start, entry.end) == (start, end):
                del self.entries[i]
                self._slab.kfree(entry.la)
                return
        for entry in self.entries:
            if entry.start < start and entry.end == end:
                entry.end = start
                return
        self._report.printk(f"x86/PAT: {self.current()} freeing invalid memtype [mem {start:#010x}-{end - 1 & _MASK64:#010x}]")

    def is_new_memtype_allowed(self, start: int, end: int, mode: PageCacheMode, granted: PageCacheMode) -> bool:
        """Whether who asked for `mode` may be given `granted`."""
        return (start >= ISA_START_ADDRESS and end <= ISA_END_ADDRESS) or (mode, granted) not in _REFUSED

    def _is_ram(self, start: int, end: int) -> bool | None:
        """pat_pagerange_is_ram(): None where RAM begins within the range. The first MiB counts as none; what follows RAM, not."""
        first, end_pfn = start >> PAGE_SHIFT, end + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT
        ram_first = max(first, ISA_END_ADDRESS >> PAGE_SHIFT)
        if ram_first >= min(end_pfn, self._ram >> PAGE_SHIFT):
            return False
        return True if ram_first == first else None

    def _pfns(self, start: int, end: int) -> range:
        return range(start >> PAGE_SHIFT, min(end, self._ram) >> PAGE_SHIFT)

    def _reserve_ram_pages_type(self, start: int, end: int, mode: PageCacheMode) -> tuple[int, PageCacheMode]:
        """Types of RAM: write-back may become another one, which must become write-back before the next."""
        if mode == PageCacheMode.WP:
            return -errno.EINVAL, PageCacheMode.UC_MINUS
        if mode == PageCacheMode.UC:
            self._warn_once("reserve_ram_pages_type")
            mode = PageCacheMode.UC_MINUS
        pfns = self._pfns(start, end)
        for pfn in pfns if self.ram_types else ():
            found = self.ram_types.get(pfn, PageCacheMode.WB)
            if found != PageCacheMode.WB:
                self._report.printk(
                    f"x86/PAT: reserve_ram_pages_type failed [mem {start:#010x}-{end - 1:#010x}], track 0x{found:x}, req 0x{mode:x}"
                )
                return -errno.EBUSY, found
        if mode != PageCacheMode.WB:
            self.ram_types.update(dict.fromkeys(pfns, mode))
        return 0, mode

    def _check_conflict(self, start: int, end: int, mode: PageCacheMode, strict: bool) -> PageCacheMode | None:
        """memtype_check_conflict(): the type that all reservations in the range have, None with a message if there is none."""
        found = mode
        for n, entry in enumerate(entry for entry in self.entries if entry.start < end and start < entry.end):
            if entry.mode != found and (strict or n):
                names = f"{CATTR_NAMES[found]}<->{CATTR_NAMES[entry.mode]}"
                self._report.printk(f"x86/PAT: {self.current()} conflicting memory types {start:x}-{end:x} {names}")
                return None
            found = entry.mode
        return found
