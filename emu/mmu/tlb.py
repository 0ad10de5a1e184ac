"""The TLB and the paging-structure caches of one CPU (SDM vol. 3A 4.10).

What is kept for how long is the caller's business (emu/mmu/mmu.py follows SDM 4.10.4); here is only where it is kept:

- a TLB entry is the packed leaf of a completed walk, `(entry ^ XD) & rights`: the leaf with the rights of the whole
  walk, bit 63 inverted so that every right is a bit that must be set. It always has P and A set;
- a paging-structure cache entry is (table pa >> 3, rights mask) of the table below an entry of that level;
- P clear in either (and only there) marks what memory no longer says, so that the hot path refuses it: see watch.py;
- both are tagged with a PCID; global TLB entries stand apart and belong to all. Nothing not present is ever cached.

Modes: `infinite` keeps an entry until something must remove it, the adversary that finds missing flushes; `finite`
has the sets and ways of Geometry and replaces the entry of a set that was filled first; `none` keeps nothing (whoever
keeps a soft cache above must then drop it after each access). First-in first-out and not least recently used, because
a soft cache above answers hits that this TLB never sees, and what is replaced must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from emu.mmu.entry import ABOVE_MAXPHYADDR, ENTRY_BITS, PHYSICAL_MASK, PS, RIGHTS, A, G, Level, P, is_canonical

LEAF_LEVELS = (Level.PTE, Level.PDE, Level.PDPTE)
TABLE_LEVELS = (Level.PDE, Level.PDPTE, Level.PML4E, Level.PML5E)


class TlbMode(StrEnum):
    """How long the TLB keeps what nothing has to remove."""

    INFINITE = "infinite"
    FINITE = "finite"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sets and ways of a finite TLB by page size, and entries of each paging-structure cache (one set each).

    The defaults have the shape of a recent server core: 1536 4K entries, 1024 2M entries, 16 1G entries.
    """

    sets_4k: int = 128
    ways_4k: int = 12
    sets_2m: int = 128
    ways_2m: int = 8
    sets_1g: int = 4
    ways_1g: int = 4
    pde: int = 32
    pdpte: int = 16
    pml4e: int = 8
    pml5e: int = 4

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"TLB geometry {name} is {getattr(self, name)}; it must be at least 1")


class Context:
    """Everything cached under one PCID, or the global entries (`pcid` None).

    pages[level]: page number -> packed leaf. tables[level]: la prefix -> (table pa >> 3, rights mask).
    """

    __slots__ = ("pages", "pcid", "tables")

    def __init__(self, pcid: int | None) -> None:
        self.pcid = pcid
        self.pages: dict[int, dict[int, int]] = {level: {} for level in LEAF_LEVELS}
        self.tables: dict[int, dict[int, tuple[int, int]]] = {level: {} for level in TABLE_LEVELS}

    def clear(self) -> None:
        """Forget everything. The dicts stay the same objects: the MMU holds them."""
        for pages in self.pages.values():
            pages.clear()
        self.clear_tables()

    def clear_tables(self) -> None:
        """Forget the paging-structure caches."""
        for tables in self.tables.values():
            tables.clear()

    def drop_page(self, la: int) -> bool:
        """Forget the pages of every size that hold `la`; tell whether there was one."""
        pages = self.pages
        dropped = pages[1].pop(la >> 12, None) is not None
        if pages[2] and pages[2].pop(la >> 21, None) is not None:
            dropped = True
        if pages[3] and pages[3].pop(la >> 30, None) is not None:
            dropped = True
        return dropped

    def drop_path(self, la: int) -> None:
        """Forget the paging-structure cache entries that would serve a walk of `la`."""
        for level, tables in self.tables.items():
            tables.pop(la >> (9 * level + 3), None)


# Makes a dict for what a context holds of one level: PCID (None: the global entries), level, whether it caches tables.
MakeDict = Callable[[int | None, int, bool], dict[int, Any]]


class Tlb:
    """The TLB of one CPU: contexts by PCID, global entries, and the replacement order of a finite geometry."""

    def __init__(self, mode: TlbMode | str = TlbMode.INFINITE, geometry: Geometry | None = None) -> None:
        self.mode = TlbMode(mode)
        self.geometry = geometry or Geometry()
        self.shared = Context(None)
        self.contexts: dict[int, Context] = {}
        self.fills = 0
        self.evictions = 0
        shape = self.geometry
        self._sets = {1: shape.sets_4k, 2: shape.sets_2m, 3: shape.sets_1g}
        self._ways = {1: shape.ways_4k, 2: shape.ways_2m, 3: shape.ways_1g}
        self._table_ways = {2: shape.pde, 3: shape.pdpte, 4: shape.pml4e, 5: shape.pml5e}
        self._page_order: dict[tuple[int, int], list[tuple[dict[int, int], int]]] = {}
        self._table_order: dict[int, list[tuple[dict[int, tuple[int, int]], int]]] = {}
        self._make_dict: MakeDict | None = None

    def context(self, pcid: int) -> Context:
        """The context of a PCID, made when first asked for."""
        context = self.contexts.get(pcid)
        if context is None:
            context = self.contexts[pcid] = Context(pcid)
            if self._make_dict is not None:
                self._remake(context, self._make_dict)
        return context

    def keep_in(self, make_dict: MakeDict) -> None:
        """Keep entries in dicts of another kind from now on. Whoever holds a context's dicts must take them anew."""
        self._make_dict = make_dict
        for context in (self.shared, *self.contexts.values()):
            self._remake(context, make_dict)

    def _remake(self, context: Context, make_dict: MakeDict) -> None:
        both: tuple[tuple[bool, dict[int, Any]], ...] = ((False, context.pages), (True, context.tables))
        for is_table, kept in both:
            for level, old in list(kept.items()):
                new = make_dict(context.pcid, level, is_table)
                new.update(old)
                kept[level] = new
                orders: list[Any] = [*self._page_order.values(), *self._table_order.values()]
                for order in orders:
                    order[:] = [(new if where is old else where, key) for where, key in order]

    def insert(self, context: Context, level: int, la: int, packed: int) -> bool:
        """Cache a leaf in `context` (the shared one for a global page); tell whether another entry had to go."""
        if self.mode is TlbMode.NONE:
            return False
        pages = context.pages[level]
        number = la >> (9 * level + 3)
        pages[number] = packed
        self.fills += 1
        return self.mode is TlbMode.FINITE and self.place(level, pages, number)

    def insert_table(self, context: Context, level: int, la: int, table: int, rights: int) -> None:
        """Cache that the entry of `level` for `la` names the table at pa `table`, with `rights` left."""
        if self.mode is TlbMode.NONE:
            return
        tables = context.tables[level]
        number = la >> (9 * level + 3)
        tables[number] = (table >> 3, rights)
        if self.mode is TlbMode.FINITE:
            order = [
                (where, key)
                for where, key in self._table_order.get(level, ())
                if key in where and not (where is tables and key == number)
            ]
            if len(order) >= self._table_ways[level]:
                where, key = order.pop(0)
                del where[key]
            order.append((tables, number))
            self._table_order[level] = order

    def place(self, level: int, pages: dict[int, int], number: int) -> bool:
        """Give a page just inserted its way in a finite TLB; tell whether another entry had to go."""
        slot = (level, number % self._sets[level])
        order = [
            (where, key)
            for where, key in self._page_order.get(slot, ())
            if key in where and not (where is pages and key == number)
        ]
        full = len(order) >= self._ways[level]
        if full:
            where, key = order.pop(0)
            del where[key]
            self.evictions += 1
        order.append((pages, number))
        self._page_order[slot] = order
        return full

    def flush_all(self) -> None:
        """Forget everything: all PCIDs, global entries, paging-structure caches."""
        self.shared.clear()
        self.flush_all_but_global()

    def flush_all_but_global(self) -> None:
        """Forget every PCID's entries and paging-structure caches."""
        for context in self.contexts.values():
            context.clear()

    def entries(self) -> Iterator[tuple[Context, int, int, int]]:
        """Every cached page as (context, level, la, packed): global ones first, then by PCID, size and address."""
        for context in (self.shared, *(self.contexts[pcid] for pcid in sorted(self.contexts))):
            for level, pages in context.pages.items():
                for number in sorted(pages):
                    yield context, level, number << (9 * level + 3), pages[number] | P

    def tables(self) -> Iterator[tuple[Context, int, int, int, int]]:
        """Every paging-structure cache entry as (context, level, la, table pa, rights mask), in the same order."""
        for pcid in sorted(self.contexts):
            context = self.contexts[pcid]
            for level, tables in context.tables.items():
                for number in sorted(tables):
                    slot, rights = tables[number]
                    yield context, level, number << (9 * level + 3), slot << 3, rights | P

    def validate(self) -> None:
        """Assert the invariants.

        Every cached leaf is accessed, has no reserved bit, and is keyed by a canonical address; a large
        leaf has PS; a global leaf, and only a global leaf, is in the shared context; a table is page aligned and its
        rights mask takes away nothing but rights; the shared context caches no table; no set holds more than its
        ways; mode `none` holds nothing.
        """
        sets: dict[tuple[int, int], int] = {}
        held = 0
        for context, level, la, packed in self.entries():
            held += 1
            assert packed & A, f"cached leaf {packed:#x} of {la:#x} is not accessed"
            assert not packed & ABOVE_MAXPHYADDR, f"cached leaf {packed:#x} of {la:#x} has reserved bits"
            assert is_canonical(la, 5), f"cached page {la:#x} is not canonical"
            assert level == 1 or packed & PS, f"cached large leaf {packed:#x} of {la:#x} has no PS"
            assert context.pcid is not None or packed & G, f"shared entry {packed:#x} of {la:#x} is not global"
            slot = (level, (la >> (9 * level + 3)) % self._sets[level])
            sets[slot] = sets.get(slot, 0) + 1
        for _, _, la, table, rights in self.tables():
            held += 1
            assert not table & ~PHYSICAL_MASK, f"cached table {table:#x} of {la:#x} is not a frame"
            assert rights | RIGHTS == ENTRY_BITS, f"rights mask {rights:#x} of {la:#x} takes away more than rights"
        assert not any(self.shared.tables.values()), "the shared context caches a table"
        if self.mode is TlbMode.FINITE:
            for (level, number), count in sets.items():
                assert count <= self._ways[level], f"set {number} of level {level} holds {count} entries"
            for level, ways in self._table_ways.items():
                count = sum(len(context.tables[level]) for context in self.contexts.values())
                assert count <= ways, f"the level {level} structure cache holds {count} entries"
        assert self.mode is not TlbMode.NONE or not held, f"mode none holds {held} entries"
