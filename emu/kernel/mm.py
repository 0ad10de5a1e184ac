"""An address space: a PGD of its own whose kernel half shares init_mm's tables.

With page-table isolation it has a second PGD, in the page behind the first, that user mode runs on: the user half is the same in
both, the kernel half of the second has only what init_mm's user PGD has, and no vmalloc entries. What stands in the kernel's PGD
for user addresses is not executable, so that a return to user mode on the wrong tables faults.

Source: v6.12 arch/x86/mm/pgtable.c pgd_ctor, pgd_free; arch/x86/mm/pti.c __pti_set_user_pgtbl; arch/x86/include/asm/pgtable_types.h
for user protections; mm/memory.c vm_insert_page.
"""

from __future__ import annotations

import errno
from collections import Counter

import numpy as np

from emu.kernel.gfp import GFP_PGTABLE_USER
from emu.kernel.init_64 import PTI_USER_PGD, InitMm
from emu.kernel.kernel_cpu import TlbFlush
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.mmu_context import MmContext
from emu.kernel.pgprot import ACCESSED, DIRTY, NX, PRESENT, RW, USER
from emu.kernel.pgtable import FlushRange, PageTable
from emu.mmu.entry import PHYSICAL_MASK

PAGE_SHARED = PRESENT | RW | USER | ACCESSED | NX
PAGE_SHARED_EXEC = PRESENT | RW | USER | ACCESSED
PAGE_READONLY = PRESENT | USER | ACCESSED | NX
PAGE_READONLY_EXEC = PRESENT | USER | ACCESSED
PAGE_SHARED_DIRTY = PAGE_SHARED | DIRTY

KERNEL_PGD_BOUNDARY = 256


class Mm(PageTable):
    """A process's page tables. `pgd` is what CR3 holds; `context` is what TLB flushes know of it.

    Raises MemoryError when there is no frame for the PGD.
    """

    def __init__(self, init_mm: InitMm) -> None:
        self._pgd_order = 1 if init_mm.pti else 0
        pfn = init_mm.pages.alloc_pages(int(GFP_PGTABLE_USER), self._pgd_order)
        if pfn is None:
            raise MemoryError("no frame for a page directory")
        super().__init__(
            init_mm.memory,
            init_mm.pages,
            init_mm.levels,
            pfn << PAGE_SHIFT,
            init_mm.report,
            gbpages=init_mm.gbpages,
        )
        self.init_mm = init_mm
        for offset in range(0, PAGE_SIZE << self._pgd_order, PTI_USER_PGD):
            source = self.memory.table(init_mm.pgd + offset)[KERNEL_PGD_BOUNDARY:]
            self.memory.table(self.pgd + offset)[KERNEL_PGD_BOUNDARY:] = source
        if init_mm.pti:
            self.table_ignored |= NX
        init_mm.pgds[self.pgd] = None
        self.context = MmContext(self.pgd)
        # References that this mm holds, by frame.
        self._owned: Counter[int] = Counter()

    @property
    def user_pgd(self) -> int:
        """The PGD that user mode runs on: another one with page-table isolation only."""
        return self.pgd + PTI_USER_PGD if self.init_mm.pti else self.pgd

    def _finish(self, start: int, end: int, function: str) -> None:
        super()._finish(start, end, function)
        if self.init_mm.pti:
            self._set_user_pgtbl(start, end)

    def _set_user_pgtbl(self, start: int, end: int) -> None:
        """Copy top-level entries for user addresses to the user PGD, and forbid the kernel to execute there."""
        shift = 9 * self.levels + 3
        for i in range(start >> shift & 511, ((end - 1) >> shift & 511) + 1):
            if i < KERNEL_PGD_BOUNDARY:
                slot = self.pgd + 8 * i
                entry = self.memory.read_u64(slot)
                self.set_pgd(slot + PTI_USER_PGD, entry & ~NX)
                self.set_pgd(slot, entry | NX if entry else 0)

    def map_user(self, la: int, size: int, prot: int, pa: int | None = None) -> int:
        """Map user [la, la + size), page aligned, on physical `pa` or on new zeroed frames that the mm owns.

        0; -ENOMEM without memory (pages before stay mapped), -EEXIST where something is mapped already. Raises
        ValueError for a range that is unaligned or not in user space.
        """
        self._check_user(la, size)
        if (pa or 0) % PAGE_SIZE:
            raise ValueError(f"physical address {pa:#x} is not page aligned")
        if next(self.leaves(la, la + size), None) is not None:
            return -errno.EEXIST
        count = size >> PAGE_SHIFT
        if pa is not None:
            pfns = np.arange(pa >> PAGE_SHIFT, (pa >> PAGE_SHIFT) + count, dtype=np.int64)
        else:
            pfns = self.pages.alloc_pages_bulk(int(GFP_PGTABLE_USER), -1, count)
            if len(pfns) < count:
                self.pages.free_pages_bulk(pfns)
                return -errno.ENOMEM
            self._owned.update(pfns.tolist())
        return self.vmap_pages_range_noflush(la, la + size, prot, pfns)

    def insert_page(self, la: int, pfn: int, prot: int) -> int:
        """Map one frame at user `la`, taking a reference to it: 0, -EBUSY where something is mapped, -ENOMEM.

        -EINVAL for a frame that nobody holds. Raises ValueError as map_user. Source: v6.12 mm/memory.c insert_page.
        """
        self._check_user(la, PAGE_SIZE)
        if not self.pages.page_count(pfn):
            return -errno.EINVAL
        if self.lookup(la).entry:
            return -errno.EBUSY
        flush = self.set_pte(la, pfn << PAGE_SHIFT | prot)
        if isinstance(flush, int):
            return flush
        flush.defer()  # nothing was mapped: it is empty
        self.pages.get_page(pfn)
        self._owned[pfn] += 1
        return 0

    def _check_user(self, la: int, size: int) -> None:
        if la % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"user range {la:#x}+{size:#x} is not page aligned")
        if la < 0 or la + size > self.init_mm.layout.task_size_max:
            raise ValueError(f"user range {la:#x}+{size:#x} is outside user space")

    def unmap_user(self, la: int, size: int) -> FlushRange:
        """Clear user [la, la + size); the flush is owed (TlbFlushes.flush_tlb_mm_range). Frames stay the mm's until destroy.

        Raises ValueError as map_user.
        """
        self._check_user(la, size)
        return self.vunmap_range_noflush(la, la + size)

    def zap(self, la: int, size: int, tlb: TlbFlush) -> None:
        """Clear user [la, la + size), flush it, and put the frames that the mm held there. ValueError as map_user.

        Page tables stay, so CPUs that have the mm loaded lazily are not disturbed. Source: v6.12 mm/memory.c zap_page_range_single.
        """
        self._check_user(la, size)
        pfns = [(entry & PHYSICAL_MASK) >> PAGE_SHIFT for _, entry, _ in self.leaves(la, la + size)]
        start, end = self.vunmap_range_noflush(la, la + size).defer()
        if pfns:
            tlb.flush_tlb_mm_range(self.context, start, end, PAGE_SHIFT, False, cause="zap_page_range")
        for pfn in pfns:
            if self._owned[pfn]:
                self._owned[pfn] -= 1
                self.pages.put_page(pfn)

    def destroy(self) -> None:
        """Free user tables, owned frames and the PGD. No CPU may have this mm loaded, nor cached anything of it."""
        assert not self.context.cpumask, f"CPUs {sorted(self.context.cpumask)} have the mm loaded that is freed"
        self.init_mm.pgds.pop(self.pgd)
        self.free_pgtables(0, KERNEL_PGD_BOUNDARY << (9 * self.levels + 3)).defer()
        for pfn in self._owned.elements():
            self.pages.put_page(pfn)
        self._owned.clear()
        self.pages.free_pages(self.pgd >> PAGE_SHIFT, self._pgd_order)
