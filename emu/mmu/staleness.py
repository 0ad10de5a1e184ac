"""What a TLB holds, in architectural terms, and where it differs from the paging structures in memory.

A stale entry is legal: hardware may use it until software invalidates it (SDM vol. 3A 4.10.4.2, 4.10.4.3). Here one looks; the
look sets no accessed flag and caches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from emu.memory import Memory
from emu.mmu.entry import (
    ENTRY_BITS,
    PHYSICAL_MASK,
    PKEY_MASK,
    PS,
    RW,
    US,
    XD,
    D,
    Entry,
    G,
    Level,
    P,
    is_leaf,
    page_size,
    reserved_bits,
)
from emu.mmu.tlb import Context, Tlb
from emu.mmu.walk import PagingRegisters, combine, inspect

_MEMORY_TYPE = int(Entry.PWT | Entry.PCD)
_RIGHT_NAMES = ((RW, "RW"), (US, "US"), (XD, "XD"))


@dataclass(frozen=True, slots=True)
class Cached:
    """A TLB entry: the page at `la` of a `level` leaf, its PCID (None: global), and the effective leaf entry."""

    la: int
    level: Level
    pcid: int | None
    entry: int

    @property
    def size(self) -> int:
        """Bytes of the page."""
        return page_size(self.level)

    def pa(self, la: int) -> int:
        """Where an address inside the page translates to."""
        return self.entry & PHYSICAL_MASK & ~(self.size - 1) | la & (self.size - 1)


@dataclass(frozen=True, slots=True)
class CachedTable:
    """A paging-structure cache entry: the `level` entry for `la` named the table at pa `table`; RW, US, XD so far in `rights`."""

    la: int
    level: Level
    pcid: int
    table: int
    rights: int


@dataclass(frozen=True, slots=True)
class Stale:
    """A cached entry that memory no longer says.

    `fresh` is the effective entry that a walk would find now, 0 when there is none. `differs` names what changed: P (no
    translation any more), RSVD, size, frame, RW, US, XD, D (memory clear, so a write will not set it), G, PKEY, type. An
    accessed flag cleared in memory alone is not reported.
    """

    cached: Cached | CachedTable
    fresh: int
    differs: tuple[str, ...]


def listing(tlb: Tlb) -> list[Cached]:
    """Every TLB entry: global ones first, then by PCID, page size and address."""
    return [Cached(la, Level(level), context.pcid, packed ^ XD) for context, level, la, packed in tlb.entries()]


def table_listing(tlb: Tlb) -> list[CachedTable]:
    """Every paging-structure cache entry, by PCID, level and address."""
    return [
        CachedTable(la, Level(level), context.pcid or 0, table, (rights ^ XD) & (RW | US | XD))
        for context, level, la, table, rights in tlb.tables()
    ]


def lookup(tlb: Tlb, context: Context, la: int) -> Cached | None:
    """The entry that serves an access to `la` now, in the order in which the MMU looks: size by size, global before local."""
    for level in (1, 2, 3):
        for where in (tlb.shared, context):
            number = la >> (9 * level + 3)
            packed = where.pages[level].get(number)
            if packed:
                return Cached(number << (9 * level + 3), Level(level), where.pcid, (packed | P) ^ XD)
    return None


def effective(memory: Memory, regs: PagingRegisters, la: int, down_to: int = 1) -> tuple[int, int, int]:
    """(level, effective entry, reserved bits found) of what memory now says of `la`; level 0 when there is no translation.

    With `down_to` above 1, the entry of that level stands for the whole, and must name a table.
    """
    rights = ENTRY_BITS
    for level, _, entry in inspect(memory, regs, la):
        if not entry & P:
            return 0, 0, 0
        reserved = entry & reserved_bits(level, entry, regs)
        if reserved or is_leaf(level, entry):
            if down_to > 1 and not reserved:
                return 0, 0, 0
            return level, (entry ^ XD) & rights ^ XD, reserved
        rights = combine(rights, entry)
        if level == down_to:
            return level, (entry ^ XD) & rights ^ XD, 0
    return 0, 0, 0


def compare_page(memory: Memory, regs: PagingRegisters, cached: Cached) -> Stale | None:
    """The staleness of a TLB entry against a walk from `regs.cr3`, or None when it is current."""
    level, fresh, reserved = effective(memory, regs, cached.la)
    if not level:
        return Stale(cached, 0, ("P",))
    differs = ["RSVD"] if reserved else []
    old = cached.entry
    if level != cached.level:
        differs.append("size")
    size = page_size(level)
    if fresh & PHYSICAL_MASK & ~(size - 1) | cached.la & (size - 1) != cached.pa(cached.la):
        differs.append("frame")
    differs += [name for bit, name in _RIGHT_NAMES if (fresh ^ old) & bit]
    if old & D and not fresh & D:
        differs.append("D")
    if (fresh ^ old) & G:
        differs.append("G")
    if (fresh ^ old) & PKEY_MASK:
        differs.append("PKEY")
    if (fresh ^ old) & (_MEMORY_TYPE | (PS if level == cached.level == Level.PTE else 0)):
        differs.append("type")
    return Stale(cached, fresh, tuple(differs)) if differs else None


def compare_table(memory: Memory, regs: PagingRegisters, cached: CachedTable) -> Stale | None:
    """The staleness of a paging-structure cache entry, or None when it is current."""
    level, fresh, reserved = effective(memory, regs, cached.la, cached.level)
    if not level:
        return Stale(cached, 0, ("P",))
    differs = ["RSVD"] if reserved else []
    if fresh & PHYSICAL_MASK != cached.table:
        differs.append("frame")
    differs += [name for bit, name in _RIGHT_NAMES if (fresh ^ cached.rights) & bit]
    return Stale(cached, fresh, tuple(differs)) if differs else None


def stale(
    memory: Memory, regs: PagingRegisters, tlb: Tlb, roots: dict[int, int], la: int | None = None, tables: bool = False
) -> list[Stale]:
    """Stale TLB entries, those of the page at `la` only if given, and stale paging-structure cache entries with `tables`.

    An entry is compared with the CR3 in `roots` of its PCID, a global one with the current CR3; one whose PCID has no root
    any more is left out.
    """
    found: list[Stale | None] = []
    for page in listing(tlb):
        if la is not None and not page.la <= la < page.la + page.size:
            continue
        root = regs.cr3 if page.pcid is None else roots.get(page.pcid)
        if root is not None:
            found.append(compare_page(memory, replace(regs, cr3=root), page))
    if tables:
        for table in table_listing(tlb):
            if la is not None and not table.la <= la < table.la + page_size(table.level):
                continue
            root = roots.get(table.pcid)
            if root is not None:
                found.append(compare_table(memory, replace(regs, cr3=root), table))
    return [entry for entry in found if entry is not None]
