"""What the page-table code gives and takes: levels, flush debts, results of a walk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from emu.kernel.layout import PAGE_SHIFT
from emu.kernel.pgprot import PRESENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from emu.kernel.kernel_cpu import TlbFlush


class PgLevel(IntEnum):
    """Size of what an entry maps (v6.12 asm/pgtable_types.h: enum pg_level)."""

    NONE = 0
    PG_4K = 1
    PG_2M = 2
    PG_1G = 3
    PG_512G = 4
    PG_256T = 5


LEVEL_NAMES = {1: "PTE", 2: "PMD", 3: "PUD", 4: "P4D", 5: "PGD"}


class PgtblMod(IntFlag):
    """Levels at which an operation changed entries (v6.12 include/linux/pgtable.h: PGTBL_*_MODIFIED)."""

    PGD = 1 << 0
    P4D = 1 << 1
    PUD = 1 << 2
    PMD = 1 << 3
    PTE = 1 << 4


@dataclass(frozen=True, slots=True)
class FlushRange:
    """A debt: live entries of [start, end) changed, and TLBs may still hold the old ones. Empty when start == end."""

    start: int
    end: int

    def flush(self, tlb: TlbFlush, cause: str) -> None:
        """Pay it at once; `cause` is the C function that does."""
        if self.end - self.start >> 64:
            tlb.flush_tlb_all(cause=cause)
        elif self.start < self.end:
            tlb.flush_tlb_kernel_range(self.start, self.end, cause=cause)

    def defer(self) -> tuple[int, int]:
        """Hand the range to someone who will pay later, such as the purge of lazily freed areas."""
        return self.start, self.end


NOTHING_TO_FLUSH = FlushRange(0, 0)
FLUSH_EVERYTHING = FlushRange(0, 1 << 64)


@dataclass(slots=True)
class PageTableChanges:
    """Who wants to know when live entries change; all trees of a kernel share one.

    `tell(start, end, function, gone)`: kernel function `function` has changed or cleared entries that translate [start, end),
    in memory only; `gone`: none is left there. Making an entry present that was not is no change: none is ever cached.

    `stored(pgd, start, end, function, tables)`: `function` has stored entries under `pgd` for [start, end), whatever was there
    before; `tables`: others than PTEs too. `stored_entry(entry_pa, function)`: one entry. Both are told before `tell` is.
    """

    tell: Callable[[int, int, str, bool], None] | None = None
    stored: Callable[[int, int, int, str, bool], None] | None = None
    stored_entry: Callable[[int, str], None] | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where a walk of the tables ended: the entry (present or not), its level and where it stands in memory."""

    level: PgLevel
    entry: int
    entry_pa: int
    entries: tuple[int, ...]

    @property
    def present(self) -> bool:
        """Whether the address is mapped."""
        return bool(self.entry & PRESENT)

    @property
    def size(self) -> int:
        """Bytes that the entry maps or would map."""
        return 1 << (PAGE_SHIFT + 9 * (self.level - 1))
