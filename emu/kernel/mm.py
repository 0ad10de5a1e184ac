"""An address space: a PGD of its own whose kernel half shares init_mm's tables.

Source: v6.12 arch/x86/mm/pgtable.c pgd_ctor, pgd_free; arch/x86/include/asm/pgtable_types.h for user protections.
"""

from __future__ import annotations

import errno

import numpy as np

from emu.kernel.gfp import GFP_PGTABLE_USER
from emu.kernel.init_64 import InitMm
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.pgprot import ACCESSED, DIRTY, NX, PRESENT, RW, USER
from emu.kernel.pgtable import FlushRange, PageTable

PAGE_SHARED = PRESENT | RW | USER | ACCESSED | NX
PAGE_SHARED_EXEC = PRESENT | RW | USER | ACCESSED
PAGE_READONLY = PRESENT | USER | ACCESSED | NX
PAGE_READONLY_EXEC = PRESENT | USER | ACCESSED
PAGE_SHARED_DIRTY = PAGE_SHARED | DIRTY

KERNEL_PGD_BOUNDARY = 256


class Mm(PageTable):
    """A process's page tables. `pgd` is what CR3 holds. Raises MemoryError when there is no frame for the PGD."""

    def __init__(self, init_mm: InitMm) -> None:
        pfn = init_mm.pages.alloc_pages(int(GFP_PGTABLE_USER))
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
        self.memory.table(self.pgd)[KERNEL_PGD_BOUNDARY:] = self.memory.table(init_mm.pgd)[KERNEL_PGD_BOUNDARY:]
        init_mm.pgds[self.pgd] = None
        self._owned: list[int] = []

    def map_user(self, la: int, size: int, prot: int, pa: int | None = None) -> int:
        """Map user [la, la + size), page aligned, on physical `pa` or on new zeroed frames that the mm owns.

        0; -ENOMEM without memory (pages before stay mapped), -EEXIST where something is mapped already. Raises
        ValueError for a range that is unaligned or not in user space.
        """
        if la % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or (pa or 0) % PAGE_SIZE:
            raise ValueError(f"user range {la:#x}+{size:#x} is not page aligned")
        if la < 0 or la + size > self.init_mm.layout.task_size_max:
            raise ValueError(f"user range {la:#x}+{size:#x} is outside user space")
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
            self._owned += pfns.tolist()
        return self.vmap_pages_range_noflush(la, la + size, prot, pfns)

    def unmap_user(self, la: int, size: int) -> FlushRange:
        """Clear user [la, la + size); the flush is owed. Frames stay the mm's until destroy. ValueError as map_user."""
        if la % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"user range {la:#x}+{size:#x} is not page aligned")
        if la < 0 or la + size > self.init_mm.layout.task_size_max:
            raise ValueError(f"user range {la:#x}+{size:#x} is outside user space")
        return self.vunmap_range_noflush(la, la + size)

    def destroy(self) -> None:
        """Free user tables, owned frames and the PGD. No CPU may have this mm loaded, nor cached anything of it."""
        self.init_mm.pgds.pop(self.pgd)
        self.free_pgtables(0, KERNEL_PGD_BOUNDARY << (9 * self.levels + 3)).defer()
        self.pages.free_pages_bulk(np.array(self._owned, dtype=np.int64))
        self._owned = []
        self.pages.free_pages(self.pgd >> PAGE_SHIFT)
