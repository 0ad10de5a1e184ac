"""Seeing the uses of translations that memory no longer gives, at no cost while there are none.

An entry found stale stays where it is, so that every rule about its life still holds, but loses its P bit. The hot path asks
for P and so hands each use of it to `Watch`, which walks memory afresh for that access. Legal laziness (SDM vol. 3A 4.10.4.3:
rights that were widened, A and D flags, an access that needs nothing of what was taken away) is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from emu.memory import BusError
from emu.mmu.entry import PAGE_MASK, PHYSICAL_MASK, RIGHTS, RW, XD, Level, P, page_size
from emu.mmu.fault import PageFault
from emu.mmu.staleness import Cached, CachedTable, Stale, compare_page, compare_table
from emu.mmu.table_frames import TableFrames
from emu.mmu.tlb import LEAF_LEVELS, TABLE_LEVELS, Context
from emu.mmu.walk import Step, descend, root

if TYPE_CHECKING:
    from emu.mmu.mmu import Mmu

KERNEL_HALF = 1 << 63
_FEW = 256
# A mark is nothing that goes into the TLB: dicts that tell of that (Mmu.keep_translations_in) are not to tell of marks.
_mark: Callable[..., None] = dict.__setitem__
# What an access through the entry can come to depend on. The rest (memory type, G, D) changes nothing that it does.
_MATTERS = frozenset({"P", "RSVD", "size", "frame", "US", "PKEY"})


class Key(NamedTuple):
    """A cached entry's identity on its CPU: a table's or a page's, PCID (-1: global), level, and the first address it serves."""

    table: bool
    pcid: int
    level: int
    la: int

    @property
    def size(self) -> int:
        """Bytes that the entry serves."""
        return page_size(self.level)


class Mark(NamedTuple):
    """An entry that a change of memory left stale: how it differs now, and as what it was known stale before (empty: fresh)."""

    key: Key
    differs: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StaleUse:
    """An access that went where a fresh walk would not have led it.

    `entry` is what the CPU used, `pa` the frame it reached (None: its walk through a stale structure faulted). Memory says
    `fault`, or else that the page is in frame `fresh`.
    """

    key: Key
    entry: Cached | CachedTable
    la: int
    access: int
    user: bool
    pa: int | None
    fault: PageFault | None
    fresh: int | None


UsedTable = tuple[Key, CachedTable]


class Watch:
    """The watched entries of one CPU. `tables` is shared by all CPUs; `tracked` are numbers of pages whose fills are told.

    `on_use` is told each use that differs, before the access goes on as hardware would; `on_fill` each fill of a tracked page;
    `on_root` that a PCID with entries was given another CR3 without invalidation, and the marks that this made;
    `on_invalidate` (pcid or None for all, la or None for all, whether globals too) each invalidation; `on_store` a store of
    the model's own to a page table, as (frame, before, after).
    """

    def __init__(
        self, mmu: Mmu, tables: TableFrames, on_use: Callable[[StaleUse], None], tracked: Iterable[int] = ()
    ) -> None:
        self.mmu = mmu
        self.tables = tables
        self.on_use = on_use
        self.on_fill: Callable[[int, int], None] = lambda la, level: None
        self.on_root: Callable[[int, int, list[Mark]], None] = lambda pcid, before, marks: None
        self.on_invalidate: Callable[[int | None, int | None, bool], None] = lambda pcid, la, shared: None
        self.on_store: Callable[[int, bytes, bytes], None] = lambda frame, before, after: None
        self.uses = 0
        self._tracked = frozenset(tracked)
        self._tracked_regions = frozenset(page >> 9 for page in self._tracked)
        # What was found of each watched entry; an entry that has P, or is gone, is not watched whatever stands here.
        self._known: dict[Key, tuple[str, ...]] = {}
        self._limit = _FEW
        self._touched = False
        tables.add(mmu)

    # ---------------------------------------------------------------- marking

    def recheck(self, start: int, end: int, *, gone: bool = False) -> list[Mark]:
        """Compare all that is cached for [start, end) with memory; return what is stale in a way it was not before.

        `gone` asserts that leaves were cleared, tables kept, and no 4 KiB leaf is left there: entries for kernel addresses need
        no walk then.
        """
        marks: list[Mark] = []
        if start >= end:
            return marks
        tlb = self.mmu.tlb
        for context in (tlb.shared, *(tlb.contexts[pcid] for pcid in sorted(tlb.contexts))):
            self._recheck(context, start, end, gone, marks)
        if self._touched:
            # Also when nothing is new: what was legal to use through a stale entry may not be any more.
            self._touched = False
            self._forget_removed()
            self.mmu.on_drop()
        return marks

    def root_changed(self, pcid: int, before: int) -> None:
        """A PCID's entries now stand for another CR3: all of them are compared with its tables."""
        marks: list[Mark] = []
        self._recheck(self.mmu.tlb.context(pcid), 0, 1 << 64, False, marks)
        if marks:
            self.on_root(pcid, before, marks)

    def _recheck(self, context: Context, start: int, end: int, gone: bool, marks: list[Mark]) -> None:
        tag = -1 if context.pcid is None else context.pcid
        for level in LEAF_LEVELS:
            pages = context.pages[level]
            if pages:
                for number in _within(pages, level, start, end):
                    packed = pages[number]
                    la = number << (9 * level + 3)
                    key = Key(False, tag, level, la)
                    known = not packed & P
                    if gone and level == 1 and la & KERNEL_HALF:
                        differs: tuple[str, ...] = ("P",)
                    else:
                        differs = self._page_differs(Cached(la, Level(level), context.pcid, (packed | P) ^ XD))
                    _mark(pages, number, packed & ~P if differs else packed | P)
                    self._note(key, known, differs, marks)
        # Clearing leaves changes nothing that the structure caches hold.
        for level in () if gone else TABLE_LEVELS:
            tables = context.tables[level]
            if tables:
                for number in _within(tables, level, start, end):
                    slot, rights = tables[number]
                    la = number << (9 * level + 3)
                    key = Key(True, tag, level, la)
                    differs = self._table_differs(CachedTable(la, Level(level), tag, slot << 3, _table_rights(rights)))
                    marked = differs or self._is_tracked_region(level, la)
                    _mark(tables, number, (slot, rights & ~P if marked else rights | P))
                    self._note(key, not rights & P, differs, marks)

    def _note(self, key: Key, known: bool, differs: tuple[str, ...], marks: list[Mark]) -> None:
        before = self._known.get(key, ()) if known else ()
        if differs:
            self._touched = True
            self._known[key] = differs
            # Within a large page that memory has split, each change may concern another part.
            if differs != before or "size" in differs:
                marks.append(Mark(key, differs, before))
        else:
            self._known.pop(key, None)

    def _roots(self, pcid: int | None) -> list[int]:
        mmu = self.mmu
        if pcid is None:
            return list(dict.fromkeys((mmu.cr3, *mmu.roots.values())))
        cr3 = mmu.roots.get(pcid)
        return [] if cr3 is None else [cr3]

    def _page_differs(self, cached: Cached) -> tuple[str, ...]:
        """How a page's entry differs from memory; a global one from each address space that this CPU knows."""
        found: tuple[str, ...] = ()
        for cr3 in self._roots(cached.pcid):
            stale = compare_page(self.mmu.memory, replace(self.mmu.regs, cr3=cr3), cached)
            differs = _what_matters(stale, cached.entry)
            if not differs:
                return ()
            found = found or differs
        return found

    def _table_differs(self, cached: CachedTable) -> tuple[str, ...]:
        cr3 = self.mmu.roots.get(cached.pcid)
        if cr3 is None:
            return ()
        return _what_matters(compare_table(self.mmu.memory, replace(self.mmu.regs, cr3=cr3), cached), cached.rights)

    def holds(self, key: Key) -> bool:
        """Whether the CPU still has the entry, marked."""
        context = self.mmu.tlb.shared if key.pcid < 0 else self.mmu.tlb.contexts.get(key.pcid)
        if context is None:
            return False
        number = key.la >> (9 * key.level + 3)
        if key.table:
            table = context.tables[key.level].get(number)
            return table is not None and not table[1] & P and key in self._known
        packed = context.pages[key.level].get(number)
        return packed is not None and not packed & P

    def _forget_removed(self) -> None:
        """Forget what was known of entries that are gone, when that may be much: most go at once, by a flush."""
        if len(self._known) > self._limit:
            self._known = {key: differs for key, differs in self._known.items() if self.holds(key)}
            self._limit = 2 * len(self._known) + _FEW

    @property
    def watched(self) -> tuple[Key, ...]:
        """The entries known to be stale."""
        return tuple(key for key in self._known if self.holds(key))

    # ---------------------------------------------------------------- uses

    def entry_used(self, la: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool, pa: int) -> None:
        """An access is about to go through a watched TLB entry to the frame `pa`."""
        cached = self.mmu.query(la)
        assert cached is not None, f"the entry used for {la:#x} is cached"
        self.uses += 1
        fault, fresh = self._fresh(self.mmu.cr3, la, access, user, read_ac, implicit)
        if fresh == pa:
            return
        if cached.pcid is None:
            for cr3 in self._roots(None):
                if self._fresh(cr3, la, access, user, read_ac, implicit)[1] == pa:
                    return
        tag = -1 if cached.pcid is None else cached.pcid
        self.on_use(StaleUse(Key(False, tag, cached.level, cached.la), cached, la, access, user, pa, fault, fresh))

    def table_used(self, la: int, level: int) -> UsedTable | None:
        """The structure entry of `level` from which a walk of `la` is about to begin; None if it is not known to be stale."""
        mmu = self.mmu
        number = la >> (9 * level + 3)
        base = number << (9 * level + 3)
        key = Key(True, mmu.pcid, level, base)
        if key not in self._known:
            return None
        slot, rights = mmu.tlb.context(mmu.pcid).tables[level][number]
        return key, CachedTable(base, Level(level), mmu.pcid, slot << 3, _table_rights(rights))

    def walked(
        self, used: UsedTable, la: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool, pa: int
    ) -> bool:
        """A walk from a stale structure entry ended in frame `pa`, and was cached. Tell whether memory says otherwise."""
        self.uses += 1
        fault, fresh = self._fresh(self.mmu.cr3, la, access, user, read_ac, implicit)
        if fresh != pa:
            self.on_use(StaleUse(*used, la, access, user, pa, fault, fresh))
        return bool(self.recheck(la, la + 1)) or fresh != pa

    def walk_faulted(
        self, used: UsedTable, la: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool, fault: PageFault
    ) -> None:
        """A walk from a stale structure entry faulted. A refused right may be laziness, a missing page is not."""
        if fault.error & 1:
            return
        self.uses += 1
        fresh = self._fresh(self.mmu.cr3, la, access, user, read_ac, implicit)[1]
        if fresh is not None:
            self.on_use(StaleUse(*used, la, access, user, None, None, fresh))

    def _fresh(
        self, cr3: int, la: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool
    ) -> tuple[PageFault | None, int | None]:
        """What a walk of memory alone says to the access: a fault, or the 4 KiB frame; neither where a table is not in RAM."""
        mmu = self.mmu
        regs = mmu.regs if cr3 == mmu.cr3 else replace(mmu.regs, cr3=cr3)
        steps: list[Step] = []
        try:
            leaf = descend(mmu.memory, regs, la, access, user, read_ac, implicit, False, root(regs), steps)
        except PageFault as fault:
            return fault, None
        except BusError:
            return None, None
        offset = page_size(steps[-1][0]) - 1
        return None, (leaf & PHYSICAL_MASK & ~offset) | (la & offset & ~PAGE_MASK)

    # ---------------------------------------------------------------- fills

    def filled(self, la: int, level: int, steps: list[Step]) -> None:
        """A walk on the slow path was cached: learn its tables; keep a tracked page off the hot path, and tell its fills."""
        self.tables.visited(la, steps)
        if self._known:
            # What this walk read took the place of what was known to be stale.
            for at, *_ in steps[:-1]:
                self._known.pop(Key(True, self.mmu.pcid, at, la & -page_size(at)), None)
        if self._tracked:
            self._track(la, level)

    def _is_tracked_region(self, level: int, la: int) -> bool:
        return level == 2 and la >> 21 in self._tracked_regions

    def _track(self, la: int, level: int) -> None:
        if level == 1 and la >> 21 in self._tracked_regions:
            tables = self.mmu.tlb.context(self.mmu.pcid).tables[2]
            cached = tables.get(la >> 21)
            if cached is not None:
                tables[la >> 21] = cached[0], cached[1] & ~P
        base = la & -page_size(level)
        if base >> 12 in self._tracked:
            self.on_fill(base, level)

    def store_to_table(self, pa: int, data: bytes) -> None:
        """Store `data`, within one page, to a frame that is a page table."""
        memory = self.mmu.memory
        frame = pa >> 12
        before = memory.read(frame << 12, PAGE_MASK + 1)
        memory.write(pa, data)
        self.on_store(frame, before, memory.read(frame << 12, PAGE_MASK + 1))


def _within(entries: dict[int, int] | dict[int, tuple[int, int]], level: int, start: int, end: int) -> list[int]:
    """The keys of a level's entries that touch [start, end), ascending."""
    shift = 9 * level + 3
    first, last = start >> shift, end - 1 >> shift
    if last - first < len(entries):
        return [number for number in range(first, last + 1) if number in entries]
    return sorted(number for number in entries if first <= number <= last)


def _what_matters(stale: Stale | None, old: int) -> tuple[str, ...]:
    """The differences by which memory gives less than the entry, or something else."""
    if stale is None:
        return ()
    fresh = stale.fresh
    lost = {"RW": bool(old & RW and not fresh & RW), "XD": bool(fresh & XD and not old & XD)}
    return tuple(name for name in stale.differs if name in _MATTERS or lost.get(name, False))


def _table_rights(rights: int) -> int:
    """A structure entry's rights mask as RW, US and XD flags."""
    return (rights ^ XD) & RIGHTS
