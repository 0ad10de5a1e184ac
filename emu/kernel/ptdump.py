"""The page-table dump of /sys/kernel/debug/page_tables (v6.12 arch/x86/mm/dump_pagetables.c, mm/ptdump.c, mm/pagewalk.c).

Entries that follow each other with the same flags, effective permissions and level are one row. As in Linux the flags of a row
are bits 0-11 and 52-63 of its entries, so accessed and dirty bits part rows though they are not printed, and PAT of a large
leaf (bit 12) is never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from emu.kernel.layout import CPU_ENTRY_AREA_BASE, ESPFIX_BASE_ADDR, START_KERNEL_MAP, Layout
from emu.kernel.pgprot import ACCESSED, DIRTY, GLOBAL, NX, PAT, PCD, PRESENT, PSE, PWT, RW, USER
from emu.memory import Memory
from emu.mmu.entry import PHYSICAL_MASK

LEVEL_NAMES = ("pgd", "p4d", "pud", "pmd", "pte")
_PTE = 4
_FLAGS = ((1 << 64) - 1) & ~((1 << 52) - (1 << 12))
# An entry with only these is none all the same (_PAGE_KNL_ERRATUM_MASK).
_ERRATUM = ACCESSED | DIRTY
_EFI_VA_END = 0xFFFF_FFEF_0000_0000
# FIXADDR_TOP less 646 pages: the permanent fixmap of Debian's configuration.
_FIXADDR_START = 0xFFFF_FFFF_FF57_9000
_END_OF_SPACE = (1 << 64) - 1
_ESPFIX_MAX_LINES = 16
_UNITS = "BKMGTPE"


@dataclass(frozen=True, slots=True)
class Marker:
    """Where a part of the address space begins; with `max_lines` only so many of its rows are printed."""

    start: int
    name: str
    max_lines: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """Entries of `level` (0 pgd to 4 pte) with the same flags `prot`, for [start, end); `end` wraps to 0 at the top."""

    start: int
    end: int
    level: int
    prot: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows that a marker's limit kept back."""

    count: int


def address_markers(layout: Layout) -> tuple[Marker, ...]:
    """The parts of the address space, ascending, as the kernel's own table has them."""
    return (
        Marker(0, "User Space"),
        Marker(1 << 63, "Kernel Space"),
        Marker(layout.ldt_remap, "LDT remap"),
        Marker(layout.page_offset, "Low Kernel Mapping"),
        Marker(layout.vmalloc_start, "vmalloc() Area"),
        Marker(layout.vmemmap_start, "Vmemmap"),
        Marker(CPU_ENTRY_AREA_BASE, "CPU entry Area"),
        Marker(ESPFIX_BASE_ADDR, "ESPfix Area", _ESPFIX_MAX_LINES),
        Marker(_EFI_VA_END, "EFI Runtime Services"),
        Marker(START_KERNEL_MAP, "High Kernel Mapping"),
        Marker(layout.modules_vaddr, "Modules"),
        Marker(layout.modules_end, "End Modules"),
        Marker(_FIXADDR_START, "Fixmap Area"),
        Marker(_END_OF_SPACE, ""),
    )


class _State:
    """struct pg_state: the row under construction."""

    def __init__(self, markers: tuple[Marker, ...]) -> None:
        self.markers = markers
        self.marker = 0
        self.level = -1
        self.prot = 0
        self.effective = 0
        self.start = 0
        self.lines = 0

    def note(self, addr: int, level: int, prot: int, effective: int) -> Iterator[Row | Marker | Skipped]:
        """note_page(): an entry at `addr`; what the entry before it completed."""
        if self.level == -1:
            yield self.markers[0]
        elif (prot, effective, level) == (self.prot, self.effective, self.level) and addr < self.markers[self.marker + 1].start:
            return
        else:
            limit = self.markers[self.marker].max_lines
            if not limit or self.lines < limit:
                yield Row(self.start, addr, self.level, self.prot)
            self.lines += 1
            if addr >= self.markers[self.marker + 1].start:
                if limit and self.lines > limit:
                    yield Skipped(self.lines - limit)
                self.marker += 1
                self.lines = 0
                yield self.markers[self.marker]
        self.level, self.prot, self.effective, self.start = level, prot, effective, addr

    def note_run(
        self, addr: int, end: int, size: int, level: int, prot: int, effective: int
    ) -> Iterator[Row | Marker | Skipped]:
        """note() for equal entries of `size` bytes each in [addr, end): only a marker among them makes a difference."""
        while addr < end:
            yield from self.note(addr, level, prot, effective)
            following = self.markers[self.marker + 1].start
            addr = max(addr + size, addr + (max(following - addr, 0) + size - 1) // size * size)


class PtDump:
    """Dumps the tables under `pgd`, a physical address. A table outside RAM raises BusError."""

    def __init__(self, memory: Memory, layout: Layout, pgd: int) -> None:
        self.memory = memory
        self.layout = layout
        self.pgd = pgd
        self._state = _State(address_markers(layout))

    def rows(self) -> Iterator[Row | Marker | Skipped]:
        """The dump in order, as ptdump_walk_pgd_level_debugfs() makes it."""
        self._state = _State(address_markers(self.layout))
        top = 5 - self.layout.levels
        shift = self.layout.pgdir_shift
        hole_end = (1 << 64) - (1 << shift + 8) + (16 << shift)
        yield from self._table(self.pgd, top, 0, 256, 0, USER | RW, 0)
        yield from self._table(self.pgd, top, hole_end >> shift & 511, 512, hole_end, USER | RW, 0)
        yield from self._state.note(0, -1, 0, 0)

    def _table(
        self, table: int, level: int, first: int, last: int, addr: int, allowed: int, denied: int
    ) -> Iterator[Row | Marker | Skipped]:
        """Entries [first, last) of a table, the first one for `addr`; `allowed` and `denied` is what the tables above say."""
        entries = self.memory.table(table)[first:last]
        size = 1 << 12 + 9 * (_PTE - level)
        flags = entries & np.uint64(_FLAGS)
        # A table's entry stands alone; all others run together while their flags are the same.
        keys = flags.copy()
        is_table = np.zeros(len(entries), dtype=bool)
        if level < _PTE:
            is_table = (entries & np.uint64(PRESENT) != 0) & (entries & np.uint64(PSE) == 0)
            none = (entries & np.uint64(~_ERRATUM & _END_OF_SPACE)) == 0
            keys[none] = 0
        breaks = np.flatnonzero((keys[1:] != keys[:-1]) | is_table[1:] | is_table[:-1]) + 1
        starts = [0, *breaks.tolist()]
        for begin, end in zip(starts, [*starts[1:], len(entries)], strict=True):
            entry, prot = int(entries[begin]), int(keys[begin])
            at = addr + begin * size
            effective_allowed, effective_denied = prot & allowed & (USER | RW), (prot | denied) & NX
            if is_table[begin]:
                below = entry & PHYSICAL_MASK
                yield from self._table(below, level + 1, 0, 512, at, effective_allowed, effective_denied)
                continue
            # With 4 levels a hole in the top table is one of the pgd, into which the p4d is folded.
            shown = 0 if not prot and level == 1 and self.layout.levels == 4 else level
            effective = effective_allowed | effective_denied if prot else 0
            yield from self._state.note_run(at, addr + end * size, size, shown, prot, effective)


def row_text(row: Row | Marker | Skipped) -> str:
    """One line of the dump, without its newline (v6.12 note_page, printk_prot)."""
    match row:
        case Marker(name=name):
            return f"---[ {name} ]---"
        case Skipped(count=count):
            return f"... {count} entr{'y' if count == 1 else 'ies'} skipped ... "
    delta = (row.end - row.start) & (1 << 64) - 1
    unit = 0
    while not delta & 1023 and unit < len(_UNITS) - 1:
        delta >>= 10
        unit += 1
    size = f"{delta:9d}{_UNITS[unit]}"
    return f"0x{row.start:016x}-0x{row.end:016x}   {size} {prot_text(row.prot, row.level)}{LEVEL_NAMES[row.level]}"


def prot_text(prot: int, level: int) -> str:
    """The flags in their columns; blanks for what is not present."""
    if not prot & PRESENT:
        return " " * 30
    columns = (
        "USR " if prot & USER else "    ",
        "RW " if prot & RW else "ro ",
        "PWT " if prot & PWT else "    ",
        "PCD " if prot & PCD else "    ",
        "PSE " if level < _PTE and prot & PSE else "    ",
        "PAT " if level == _PTE and prot & PAT else "    ",
        "GLB " if prot & GLOBAL else "    ",
        "NX " if prot & NX else "x  ",
    )
    return "".join(columns)
