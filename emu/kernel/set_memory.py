"""Changing the protection of mapped kernel memory, splitting large leaves where only a part changes.

Source: v6.12 arch/x86/mm/pat/set_memory.c. A change to an address outside the direct map is made to the direct map's
mapping of the same frames too, so that no writable alias of read-only memory is left; NX alone is not carried over.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.memtype import CACHE_MASK, PageCacheMode
from emu.kernel.pgprot import DIRTY, GLOBAL, KERNPG_TABLE, NX, PCD, PGPROT_MASK, PRESENT, PWT, RW, large_prot, small_prot
from emu.kernel.pgtable_types import FLUSH_EVERYTHING, NOTHING_TO_FLUSH, FlushRange, Lookup
from emu.mmu.entry import PHYSICAL_MASK

if TYPE_CHECKING:
    from emu.kernel.init_64 import InitMm
    from emu.kernel.pgtable import PageTable

# v6.12 arch/x86/mm/tlb.c: tlb_single_page_flush_ceiling.
TLB_SINGLE_PAGE_FLUSH_CEILING = 33
_GFP = int(GFP_KERNEL)


def change_page_attr(
    tables: PageTable, addr: int, numpages: int, *, set_mask: int, clear_mask: int
) -> tuple[int, FlushRange]:
    """Set and clear protection bits (4 KiB format) of `numpages` pages from `addr`, without regard to aliases.

    Returns (0, what is owed), or (-EINVAL for an unmapped page, -ENOMEM when a leaf cannot be split; what was changed). Where
    the tables know their TLBs, a split is flushed at once and owes nothing more.
    """
    start = addr
    end = addr + (numpages << PAGE_SHIFT)
    err = 0
    changed = False
    flush_all = False
    while addr < end and not err:
        found = tables.lookup(addr)
        if not found.entry:
            err = -errno.EINVAL
        elif found.size == PAGE_SIZE:
            changed |= _set_small(tables, found, addr, set_mask, clear_mask)
            addr += PAGE_SIZE
        elif _large_prot_is(found, set_mask, clear_mask):
            addr = (addr & -found.size) + found.size
        elif addr % found.size == 0 and end - addr >= found.size:
            prot = _apply(small_prot(_leaf_flags(found)), set_mask, clear_mask)
            entry = found.entry & PHYSICAL_MASK & -found.size | (large_prot(prot) if prot & PRESENT else prot)
            tables.write_entry(found.entry_pa, entry, addr, found.size)
            changed = True
            addr += found.size
        elif split_large_page(tables, found, addr):
            # Before the new entries change: TLBs may not hold a large and a small translation that differ.
            if tables.tlb is None:
                flush_all = True
            else:
                tables.tlb.flush_tlb_all(cause="__split_large_page")
        else:
            err = -errno.ENOMEM
    if flush_all or (changed and numpages > TLB_SINGLE_PAGE_FLUSH_CEILING):
        return err, FLUSH_EVERYTHING
    return err, FlushRange(start, end) if changed else NOTHING_TO_FLUSH


def _apply(prot: int, set_mask: int, clear_mask: int) -> int:
    prot = prot & ~clear_mask | set_mask
    # pgprot_clear_protnone_bits: G in an entry that is not present would read as a NUMA hint.
    return prot if prot & PRESENT else prot & ~GLOBAL


def _leaf_flags(found: Lookup) -> int:
    """All of a leaf but its frame: a large leaf has its PAT bit within the mask of a 4 KiB entry's frame."""
    return found.entry & ~(PHYSICAL_MASK & -found.size)


def _large_prot_is(found: Lookup, set_mask: int, clear_mask: int) -> bool:
    old = small_prot(_leaf_flags(found))
    return _apply(old, set_mask, clear_mask) == old


def _set_small(tables: PageTable, found: Lookup, addr: int, set_mask: int, clear_mask: int) -> bool:
    prot = _apply(found.entry & PGPROT_MASK, set_mask, clear_mask)
    entry = found.entry & PHYSICAL_MASK | prot
    if entry == found.entry:
        return False
    tables.write_entry(found.entry_pa, entry, addr, PAGE_SIZE)
    return True


def split_large_page(tables: PageTable, found: Lookup, addr: int) -> bool:
    """Replace the large leaf at `addr` by a table of leaves of the next size that map the same; false without memory.

    The new table's entry is _KERNPG_TABLE, unlike those that mapping makes. A flush of everything is owed.
    """
    pfn = tables.pages.alloc_pages(_GFP)
    if pfn is None:
        return False
    size = found.size >> 9
    prot = small_prot(_leaf_flags(found)) if size == PAGE_SIZE else _leaf_flags(found)
    base = found.entry & PHYSICAL_MASK & -found.size
    table = pfn << PAGE_SHIFT
    tables.memory.table(table)[:] = np.arange(base, base + found.size, size, dtype=np.uint64) | np.uint64(prot)
    tables.write_entry(found.entry_pa, table | KERNPG_TABLE, addr, found.size)
    return True


def change_page_attr_set_clr(
    mm: InitMm, addr: int, numpages: int, *, set_mask: int = 0, clear_mask: int = 0
) -> tuple[int, FlushRange]:
    """change_page_attr on [addr, +numpages pages) and on the direct-map aliases of its frames, after vm_unmap_aliases().

    Raises ValueError when `addr` is not page aligned. The flush owed is everything as soon as aliases had to be looked for, or
    after an error; nothing where only an alias was changed, as Linux looks no further than at the pages asked for.
    """
    if addr % PAGE_SIZE:
        raise ValueError(f"address {addr:#x} is not page aligned")
    mm.unmap_aliases()
    err, flush = change_page_attr(mm, addr, numpages, set_mask=set_mask, clear_mask=clear_mask)
    layout = mm.layout
    in_direct_map = layout.page_offset <= addr < layout.va(mm.memory.size)
    nx_only = not (set_mask | clear_mask) & ~NX
    changed = flush != NOTHING_TO_FLUSH
    if err or in_direct_map or (nx_only and not mm.profile.nx_checks_aliases):
        return err, FLUSH_EVERYTHING if err and changed else flush
    split = False
    for page in range(addr, addr + (numpages << PAGE_SHIFT), PAGE_SIZE):
        entry = mm.lookup(page)
        pa = entry.entry & PHYSICAL_MASK & -entry.size | page & (entry.size - 1) & -PAGE_SIZE
        if pa >= mm.memory.size:
            continue
        if changed:
            flush = FLUSH_EVERYTHING
        if nx_only:
            continue
        err, alias = change_page_attr(mm, layout.va(pa), 1, set_mask=set_mask, clear_mask=clear_mask)
        split |= alias == FLUSH_EVERYTHING
        if err:
            break
    return err, FLUSH_EVERYTHING if split else flush


def set_memory_ro(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
    """Write-protect; from v6.6 on D is cleared as well, since a clean read-only entry with D means a shadow stack."""
    clear = RW | DIRTY if mm.profile.readonly_is_clean else RW
    return change_page_attr_set_clr(mm, addr, numpages, clear_mask=clear)


def set_memory_rw(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
    """Make writable; D stays as it is."""
    return change_page_attr_set_clr(mm, addr, numpages, set_mask=RW)


def set_memory_x(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
    """Make executable; the direct map stays NX."""
    return change_page_attr_set_clr(mm, addr, numpages, clear_mask=NX)


def set_memory_nx(mm: InitMm, addr: int, numpages: int) -> tuple[int, FlushRange]:
    """Make non-executable."""
    return change_page_attr_set_clr(mm, addr, numpages, set_mask=NX)


def set_memory_type(mm: InitMm, addr: int, numpages: int, mode: PageCacheMode) -> tuple[int, list[FlushRange]]:
    """_set_memory_uc, _wc, _wt and _wb: change the memory type without a reservation; what is owed for each pass, in order.

    Uncached and write-through are set on top of what is there; write-combining comes after uncached.
    """
    if mode == PageCacheMode.WB:
        err, flush = change_page_attr_set_clr(mm, addr, numpages, clear_mask=CACHE_MASK)
        return err, [flush]
    err, flush = change_page_attr_set_clr(mm, addr, numpages, set_mask=CACHE_MASK if mode == PageCacheMode.WT else PCD)
    if err or mode != PageCacheMode.WC:
        return err, [flush]
    err, second = change_page_attr_set_clr(mm, addr, numpages, set_mask=PWT, clear_mask=CACHE_MASK)
    return err, [flush, second]


def set_direct_map_invalid(mm: InitMm, pfn: int) -> tuple[int, FlushRange]:
    """Take a frame out of the direct map (set_direct_map_invalid_noflush): the flush is the caller's."""
    return change_page_attr(mm, mm.layout.va(pfn << PAGE_SHIFT), 1, set_mask=0, clear_mask=PRESENT | RW)


def set_direct_map_default(mm: InitMm, pfn: int) -> tuple[int, FlushRange]:
    """Put a frame back into the direct map, writable (set_direct_map_default_noflush)."""
    set_mask = PRESENT | RW | mm.prots.kernel & GLOBAL
    return change_page_attr(mm, mm.layout.va(pfn << PAGE_SHIFT), 1, set_mask=set_mask, clear_mask=0)
