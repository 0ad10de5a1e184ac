"""Kernel page tables: the only code that writes them.

A PageTable is one tree of tables under a PGD, in Linux's terms: pgd, p4d (folded into the pgd with 4 levels), pud, pmd,
pte. Mapping functions do what v6.12 mm/vmalloc.c does with init_mm's tables, leaf for leaf and error for error, but
write whole tables at once. They return 0 or a negative errno, as the kernel's do, and after an error leave mapped what
was mapped before it.

Not-present entries are never cached by a CPU (SDM vol. 3A 4.10.2.3, 4.10.3.1), so mapping owes no flush. Whatever
changes or clears a live entry returns a FlushRange: that flush is owed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from emu.kernel.gfp import GFP_PGTABLE_KERNEL
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, PUD_SHIFT, PUD_SIZE
from emu.kernel.page_alloc import PageAllocator, Pfns
from emu.kernel.pgprot import KERNPG_TABLE, PAGE_TABLE, PGPROT_MASK, PRESENT, PSE, TABLE_IGNORED, large_prot
from emu.kernel.pgtable_types import NOTHING_TO_FLUSH, FlushRange, Lookup, PageTableChanges, PgLevel, PgtblMod
from emu.memory import BusError, Memory
from emu.mmu.entry import PHYSICAL_MASK

if TYPE_CHECKING:
    from emu.kernel.kernel_cpu import TlbFlush
    from emu.kernel.vmap_area import Report

__all__ = ["NOTHING_TO_FLUSH", "FlushRange", "Lookup", "PageTable", "PgLevel", "PgtblMod"]

_GFP = int(GFP_PGTABLE_KERNEL)
_TABLE_ADDR = PHYSICAL_MASK
# Up to so many pages numpy takes longer to begin than a loop to end.
_FEW = 16


_FREE_TABLE = {2: "pmd_free_pte_page", 3: "pud_free_pmd_page"}
_MODIFIED = {level: 1 << (5 - level) for level in range(1, 6)}


class PageTable:
    """The tables under one PGD.

    `pgd` is the physical address of the top table. `tlb` performs the one flush that mapping itself needs (when a large
    leaf replaces an empty table); None while no CPU runs. `pgds` lists the other top tables that share this one's
    kernel half and must follow its new top-level entries (arch_sync_kernel_mappings); empty unless this is init_mm's.
    `modified` tells at which levels the last mapping or unmapping operation changed entries.
    """

    def __init__(
        self,
        memory: Memory,
        pages: PageAllocator,
        levels: int,
        pgd: int,
        report: Report,
        *,
        gbpages: bool = True,
    ) -> None:
        self.memory = memory
        self.pages = pages
        self.levels = levels
        self.pgd = pgd
        self.report = report
        self.gbpages = gbpages
        self.tlb: TlbFlush | None = None
        self.sync_pgds = True
        self.pgds: dict[int, None] = {}
        self.modified = PgtblMod(0)
        self.changes: PageTableChanges = pages.table_changes
        # vm_unmap_aliases(), for whoever changes protections; the owner of the vmap blocks sets it.
        self.unmap_aliases: Callable[[], None] = lambda: None
        # What may differ in a good table entry: see validate.
        self.table_ignored = TABLE_IGNORED
        self._u64 = memory.u64
        self._mask = 0
        self._ram = memory.size

    # Reading

    def lookup(self, la: int) -> Lookup:
        """Walk to the last entry that exists for `la`, as lookup_address does; reserved and permission bits are not
        judged.
        """
        u64 = self._u64
        table = self.pgd
        entries: list[int] = []
        level = self.levels
        while True:
            entry_pa = table + ((la >> (9 * level + 3) & 511) << 3)
            if entry_pa >= self._ram:
                raise BusError(entry_pa, 8)
            entry = u64[entry_pa >> 3]
            entries.append(entry)
            if level == 1 or not entry & PRESENT or entry & PSE:
                return Lookup(PgLevel(level), entry, entry_pa, tuple(entries))
            table = entry & _TABLE_ADDR
            level -= 1

    def to_pa(self, la: int) -> int | None:
        """Physical address that `la` is mapped to, or None (v6.12 mm/vmalloc.c: vmalloc_to_page, arch
        slow_virt_to_phys).
        """
        found = self.lookup(la)
        if not found.present:
            return None
        offset = found.size - 1
        return (found.entry & _TABLE_ADDR & ~offset) | (la & offset)

    def leaves(self, start: int, end: int) -> Iterator[tuple[int, int, PgLevel]]:
        """Present leaves that touch [start, end), ascending, as (address, entry, level). Holes cost nothing per
        page.
        """
        addr = start
        while addr < end:
            found = self.lookup(addr)
            size = max(found.size, PMD_SIZE)
            next_addr = (addr & -size) + size
            if found.level == PgLevel.PG_4K:
                yield from self._pte_leaves(found.entry_pa & -PAGE_SIZE, addr, min(end, next_addr))
            elif found.present:
                yield addr & -size, found.entry, found.level
            addr = next_addr

    def _pte_leaves(self, table: int, addr: int, end: int) -> Iterator[tuple[int, int, PgLevel]]:
        base = addr & -PMD_SIZE
        entries = self.memory.table(table)
        first = (addr - base) >> PAGE_SHIFT
        last = (end - base + PAGE_SIZE - 1) >> PAGE_SHIFT
        for i in (np.flatnonzero(entries[first:last] & np.uint64(PRESENT)) + first).tolist():
            yield base + (i << PAGE_SHIFT), int(entries[i]), PgLevel.PG_4K

    # Tables

    def alloc_table(self, la: int, level: int) -> int:
        """Physical address of the table whose entries of `level` translate `la`, made with its parents if missing.

        -ENOMEM when a table cannot be allocated; -EBUSY when a large leaf stands in the way. New parents are
        _PAGE_TABLE entries (U/S set), as pmd_populate_kernel and its kin write them.
        """
        u64 = self._u64
        table = self.pgd
        for at in range(self.levels, level, -1):
            i = table + ((la >> (9 * at + 3) & 511) << 3) >> 3
            if i >= self._ram >> 3:
                raise BusError(i << 3, 8)
            entry = u64[i]
            if not entry:
                pfn = self.pages.alloc_pages(_GFP)
                if pfn is None:
                    return -errno.ENOMEM
                table = pfn << PAGE_SHIFT
                u64[i] = table | PAGE_TABLE
                self._mask |= _MODIFIED[at]
                continue
            if entry & PSE:
                return -errno.EBUSY
            table = entry & _TABLE_ADDR
        return table

    def _begin(self) -> None:
        self._mask = 0

    def _finish(self, start: int, end: int, function: str) -> None:
        """Publish the modified levels, and carry new top-level entries to every other PGD (v6.12 sync_global_pgds)."""
        self.modified = PgtblMod(self._mask)
        if self.changes.stored is not None:
            self.changes.stored(self.pgd, start, end, function, self._mask != _MODIFIED[1])
        if self._mask & _MODIFIED[self.levels] and self.sync_pgds:
            self.sync(start, end)

    def sync(self, start: int, end: int) -> None:
        """arch_sync_kernel_mappings: copy this PGD's entries for [start, end) to the PGDs that lack them."""
        shift = 9 * self.levels + 3
        for i in range(start >> shift & 511, ((end - 1) >> shift & 511) + 1):
            entry = self._u64[(self.pgd >> 3) + i]
            for pgd in self.pgds:
                if entry and not self._u64[(pgd >> 3) + i]:
                    self._u64[(pgd >> 3) + i] = entry
                    self._stored_entry(pgd + 8 * i, "sync_global_pgds")

    def set_pgd(self, entry_pa: int, entry: int) -> None:
        """Store a top-level entry that was not present, into this PGD or another mm's: no flush is owed."""
        old = self._u64[entry_pa >> 3]
        self._u64[entry_pa >> 3] = entry
        self._stored_entry(entry_pa, "set_pgd")
        if old & PRESENT and old != entry:
            shift = 9 * self.levels + 3
            la = (entry_pa >> 3 & 511) << shift
            la |= -(la >> shift + 8) << shift + 8 & (1 << 64) - 1
            self._changed(la, la + (1 << shift), "set_pgd")

    def _changed(self, start: int, end: int, function: str, gone: bool = False) -> None:
        if self.changes.tell is not None:
            self.changes.tell(start, end, function, gone)

    def _stored_entry(self, entry_pa: int, function: str) -> None:
        if self.changes.stored_entry is not None:
            self.changes.stored_entry(entry_pa, function)

    # Mapping

    def vmap_pages_range_noflush(self, addr: int, end: int, prot: int, pfns: Pfns, page_shift: int = PAGE_SHIFT) -> int:
        """Map frames `pfns` (one per 4 KiB) at [addr, end): 0, or -ENOMEM with the part before the failure mapped.

        With `page_shift` above 12 the frames must be contiguous per block of that size, and blocks become large leaves
        where vmap_range_noflush allows it. An occupied entry, a negative frame or one outside RAM WARNs; as in Linux
        the inner -EBUSY or -EINVAL becomes -ENOMEM. Source: v6.12 mm/vmalloc.c __vmap_pages_range_noflush.
        """
        if addr >= end:
            self.report.bug("vmap_small_pages_range_noflush", "addr >= end")
            return -errno.EINVAL
        self._begin()
        if page_shift == PAGE_SHIFT:
            err = self._vmap_small_pages_range(addr, end, prot, pfns)
        else:
            err = self._vmap_blocks(addr, end, prot, pfns, page_shift)
        self._finish(addr, end, "vmap_pages_range_noflush")
        return err

    def _vmap_small_pages_range(self, addr: int, end: int, prot: int, pfns: Pfns) -> int:
        count = (end - addr) >> PAGE_SHIFT
        if count <= _FEW and len(pfns) == count:
            err = self._vmap_few(addr, prot, pfns.tolist())
            if err is not None:
                return err
        invalid = -1
        if count and not (int(pfns[:count].min()) >= 0 and int(pfns[:count].max()) < self.pages.max_pfn):
            invalid = int(np.flatnonzero((pfns < 0) | (pfns >= self.pages.max_pfn))[0])
        elif len(pfns) < count:
            raise ValueError(f"{len(pfns)} frames for {count} pages")
        entries = (pfns[:count].astype(np.uint64) << np.uint64(PAGE_SHIFT)) | np.uint64(prot)
        done = 0
        while done < count:
            fresh = self._mask
            self._mask = 0
            table = self.alloc_table(addr, 1)
            is_new = self._mask & _MODIFIED[2]
            self._mask |= fresh
            if table < 0:
                return self._refuse(table)
            first = addr >> PAGE_SHIFT & 511
            take = min(512 - first, count - done)
            target = self.memory.view_u64(table + (first << 3), take)
            stop = take if not 0 <= invalid - done < take else invalid - done
            if not is_new:
                busy = np.flatnonzero(target)
                stop = min(stop, int(busy[0])) if len(busy) else stop
            target[:stop] = entries[done : done + stop]
            self._mask |= _MODIFIED[1]
            if stop < take:
                at = done + stop
                which = ":busy" if at != invalid else "" if pfns[at] == -1 else ":pfn"
                self.report.warn("vmap_small_pages_range_noflush" + which)
                return -errno.ENOMEM
            done += take
            addr += take << PAGE_SHIFT
        return 0

    def _vmap_few(self, addr: int, prot: int, pfns: list[int]) -> int | None:
        """Map a few pages word by word: 0 or a negative errno; None, without a leaf written, where there is more to it."""
        first = addr >> PAGE_SHIFT & 511
        if first + len(pfns) > 512 or min(pfns) < 0 or max(pfns) >= self.pages.max_pfn:
            return None
        table = self.alloc_table(addr, 1)
        if table < 0:
            return self._refuse(table)
        u64 = self._u64
        i = (table >> 3) + first
        if any(u64[i : i + len(pfns)]):
            return None
        for pfn in pfns:
            u64[i] = pfn << PAGE_SHIFT | prot
            i += 1
        self._mask |= _MODIFIED[1]
        return 0

    def _refuse(self, err: int) -> int:
        if err == -errno.EBUSY:
            self.report.warn("vmap_small_pages_range_noflush")
        return -errno.ENOMEM

    def _vmap_blocks(self, addr: int, end: int, prot: int, pfns: Pfns, page_shift: int) -> int:
        step = 1 << (page_shift - PAGE_SHIFT)
        count = (end - addr) >> PAGE_SHIFT
        heads = pfns[:count:step]
        if page_shift == PMD_SHIFT and not addr % PMD_SIZE and not (heads % step).any():
            return self._vmap_huge_pmds(addr, heads, prot)
        for head in heads.tolist():
            err = self._vmap_range(addr, addr + (1 << page_shift), head << PAGE_SHIFT, prot, page_shift)
            if err:
                return err
            addr += 1 << page_shift
        return 0

    def _vmap_huge_pmds(self, addr: int, heads: Pfns, prot: int) -> int:
        """2 MiB leaves, a whole PMD table at a time where it is empty: one by one takes 3 us a leaf."""
        entries = (heads.astype(np.uint64) << np.uint64(PAGE_SHIFT)) | np.uint64(large_prot(prot))
        done = 0
        while done < len(heads):
            table = self.alloc_table(addr, 2)
            if table < 0:
                return self._refuse(table)
            first = addr >> PMD_SHIFT & 511
            take = min(512 - first, len(heads) - done)
            target = self.memory.view_u64(table + (first << 3), take)
            if target.any():
                for i in range(take):
                    la = addr + (i << PMD_SHIFT)
                    err = self._vmap_range(la, la + PMD_SIZE, int(heads[done + i]) << PAGE_SHIFT, prot, PMD_SHIFT)
                    if err:
                        return err
            else:
                target[:] = entries[done : done + take]
                self._mask |= _MODIFIED[2]
            done += take
            addr += take << PMD_SHIFT
        return 0

    def vmap_range_noflush(self, addr: int, end: int, phys: int, prot: int, max_page_shift: int) -> int:
        """Map physical [phys, phys + end - addr) at [addr, end) in the largest leaves up to 2^max_page_shift.

        0, or -ENOMEM with the part before the failure mapped. A leaf of a size is used where address, physical address
        and length all allow it; an empty table in its place is freed first. An occupied 4 KiB entry is a BUG.
        Source: v6.12 mm/vmalloc.c vmap_range_noflush.
        """
        if addr >= end:
            self.report.bug("vmap_range_noflush", "addr >= end")
            return -errno.EINVAL
        self._begin()
        err = self._vmap_range(addr, end, phys, prot, max_page_shift)
        self._finish(addr, end, "vmap_range_noflush")
        return err

    def _vmap_range(self, addr: int, end: int, phys: int, prot: int, max_page_shift: int) -> int:
        while addr < end:
            offset = addr | phys
            if max_page_shift >= PUD_SHIFT and self.gbpages and not offset % PUD_SIZE and end - addr >= PUD_SIZE:
                size = PUD_SIZE
                err = self._try_huge(addr, phys, prot, 3)
            elif max_page_shift >= PMD_SHIFT and not offset % PMD_SIZE and end - addr >= PMD_SIZE:
                size = PMD_SIZE
                err = self._try_huge(addr, phys, prot, 2)
            else:
                size = min(end, (addr & -PMD_SIZE) + PMD_SIZE) - addr
                err = self._vmap_pte_range(addr, size, phys, prot)
            if err:
                return err
            addr += size
            phys += size
        return 0

    def _try_huge(self, addr: int, phys: int, prot: int, level: int) -> int:
        table = self.alloc_table(addr, level)
        if table < 0:
            return -errno.ENOMEM
        i = table + ((addr >> (9 * level + 3) & 511) << 3) >> 3
        entry = self._u64[i]
        if entry & PSE:
            self.report.bug("vmap_try_huge_pmd" if level == 2 else "vmap_try_huge_pud", "remapping already mapped page")
            return -errno.EBUSY
        if entry & PRESENT:
            # v6.12 arch/x86/mm/pgtable.c pmd_free_pte_page: CPUs may hold the table's address in their paging-structure
            # caches, which an invalidation of any one page of the range removes.
            self._u64[i] = 0
            self._changed(addr, addr + (1 << 9 * level + 3), _FREE_TABLE[level])
            if self.tlb is not None:
                self.tlb.flush_tlb_kernel_range(
                    addr, addr + PAGE_SIZE, cause="pmd_free_pte_page" if level == 2 else "pud_free_pmd_page"
                )
            self._free_tables(entry & _TABLE_ADDR, level - 1)
        self._u64[i] = phys | large_prot(prot)
        self._mask |= _MODIFIED[level]
        return 0

    def _vmap_pte_range(self, addr: int, size: int, phys: int, prot: int) -> int:
        table = self.alloc_table(addr, 1)
        if table < 0:
            return -errno.ENOMEM
        count = size >> PAGE_SHIFT
        target = self.memory.view_u64(table + ((addr >> PAGE_SHIFT & 511) << 3), count)
        if target.any():
            self.report.bug("vmap_pte_range", "remapping already mapped page")
            return -errno.EBUSY
        target[:] = _pages(phys, count, PAGE_SIZE) | np.uint64(prot)
        self._mask |= _MODIFIED[1]
        return 0

    def _free_tables(self, table: int, level: int) -> None:
        """Free a table with entries of `level` and the tables below it."""
        if level > 1:
            for entry in self.memory.table(table).tolist():
                if entry & PRESENT and not entry & PSE:
                    self._free_tables(entry & _TABLE_ADDR, level - 1)
        self.pages.free_pages(table >> PAGE_SHIFT)

    # Unmapping

    def vunmap_range_noflush(self, start: int, end: int) -> FlushRange:
        """Clear every leaf that touches [start, end), large ones whole; tables stay.

        The flush is owed. Source: v6.12 mm/vmalloc.c __vunmap_range_noflush.
        """
        if start >= end:
            self.report.bug("__vunmap_range_noflush", "addr >= end")
            return NOTHING_TO_FLUSH
        self._begin()
        u64 = self._u64
        addr = start
        while addr < end:
            table = self.pgd
            level = self.levels
            while True:
                shift = 9 * level + 3
                i = table + ((addr >> shift & 511) << 3) >> 3
                if i >= self._ram >> 3:
                    raise BusError(i << 3, 8)
                entry = u64[i]
                if level == 1 or not entry & PRESENT or entry & PSE:
                    break
                table = entry & _TABLE_ADDR
                level -= 1
            next_addr = min(end, (addr & -(1 << shift)) + (1 << shift))
            if level == 1:
                next_addr = min(end, (addr & -PMD_SIZE) + PMD_SIZE)
                self.memory.view_u64(i << 3, (next_addr - addr + PAGE_SIZE - 1) >> PAGE_SHIFT)[:] = 0
                self._mask |= _MODIFIED[1]
            elif entry:
                u64[i] = 0
                self._mask |= _MODIFIED[level]
            addr = next_addr
        function = "vunmap_range_noflush" if start >> 63 else "zap_pte_range"
        self._finish(start, end, function)
        self._changed(start, end, function, True)
        return FlushRange(start, end)

    def set_pte(self, la: int, entry: int) -> FlushRange | int:
        """Write one 4 KiB entry (0 clears it), making tables as needed (v6.12 arch/x86/mm/init_64.c: set_pte_vaddr).

        The flush that is owed, empty when the old entry was not present; -ENOMEM or -EBUSY instead when there is no
        table for it.
        """
        self._begin()
        table = self.alloc_table(la, 1)
        if table < 0:
            return table
        i = table + ((la >> PAGE_SHIFT & 511) << 3) >> 3
        old = self._u64[i]
        self._u64[i] = entry
        self._mask |= _MODIFIED[1]
        self._finish(la, la + 1, "set_pte_vaddr")
        page = la & -PAGE_SIZE
        if not old & PRESENT:
            return NOTHING_TO_FLUSH
        self._changed(page, page + PAGE_SIZE, "set_pte_vaddr")
        return FlushRange(page, page + PAGE_SIZE)

    def write_entry(self, entry_pa: int, entry: int, la: int, size: int) -> FlushRange:
        """Replace a live entry of any level that translates the `size` bytes at `la`; the flush is owed."""
        self._u64[entry_pa >> 3] = entry
        la &= -size
        splits = size > PAGE_SIZE and entry & PRESENT and not entry & PSE
        function = "__split_large_page" if splits else "__change_page_attr"
        self._stored_entry(entry_pa, function)
        self._changed(la, la + size, function)
        return FlushRange(la, la + size)

    def free_pgtables(self, start: int, end: int) -> FlushRange:
        """Clear [start, end), which whole top-level entries must cover, and free the tables below them.

        Leaves' frames stay. The flush is owed before any freed table is reused. Raises ValueError when unaligned.
        """
        size = 1 << (9 * self.levels + 3)
        if start % size or end % size:
            raise ValueError(f"[{start:#x}, {end:#x}) is not a range of whole top-level entries")
        shift = 9 * self.levels + 3
        for i in range(start >> shift & 511, ((end - 1) >> shift & 511) + 1):
            entry = self._u64[(self.pgd >> 3) + i]
            if entry & PRESENT:
                self._u64[(self.pgd >> 3) + i] = 0
                self._free_tables(entry & _TABLE_ADDR, self.levels - 1)
        if self.changes.stored is not None:
            self.changes.stored(self.pgd, start, end, "free_pgtables", True)
        self._changed(start, end, "free_pgtables")
        return FlushRange(start, end)

    def validate(self) -> None:
        """Every table entry names a page-aligned table in RAM that no other entry of this tree names."""
        seen = {self.pgd}
        pending = [(self.pgd, self.levels)]
        while pending:
            table, level = pending.pop()
            for entry in self.memory.table(table).tolist():
                if not entry & PRESENT or entry & PSE or level == 1:
                    continue
                child = entry & _TABLE_ADDR
                flags = entry & PGPROT_MASK & ~self.table_ignored
                assert flags == KERNPG_TABLE & ~self.table_ignored, f"table entry {entry:#x} has the flags of a table"
                assert child + PAGE_SIZE <= self.memory.size, f"table entry {entry:#x} names RAM"
                assert child not in seen, f"table {child:#x} has one parent"
                seen.add(child)
                if level > 2:
                    pending.append((child, level - 1))


def _pages(phys: int, count: int, size: int) -> npt.NDArray[np.uint64]:
    return np.arange(phys, phys + count * size, size, dtype=np.uint64)

