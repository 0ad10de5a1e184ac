"""Every store to a page table, as physical words: what is a table is kept here, from the roots down.

A frame counts as a table of a level as soon as an entry that names it is stored, whether or not any CPU has walked it yet, so
stores of guest code to it are seen from then on. Of tables above the PTEs a copy is kept, with which they are compared after
each change; a frame that becomes a table is recorded whole.
"""

from __future__ import annotations

from collections import Counter

from emu.memory import PAGE_SIZE, BusError, Memory
from emu.mmu.entry import PHYSICAL_MASK, PS, P, is_leaf, page_size
from emu.mmu.table_frames import TableFrames

# Physical address and the bytes that stand there now.
Chunk = tuple[int, bytes]
_WORD = 8
_PDE_SPAN = 1 << 21
_LINEAR = {levels: (1 << 9 * levels + 12) - 1 for levels in (4, 5)}


class KnownTables(TableFrames):
    """The frames that TLBSan's walks have visited, and those that `linked` says are tables."""

    def __init__(self, visited: TableFrames) -> None:
        super().__init__()
        self.__dict__.update(visited.__dict__)
        self.linked: dict[int, set[int]] = {}

    def is_table_frame(self, frame: int) -> bool:
        """Whether a walk from any root may come to `frame`."""
        return frame in self.linked or super().is_table_frame(frame)


class TableStores:
    """The tables under the roots of one machine. Its methods are called after a store and return what it changed."""

    def __init__(self, memory: Memory, levels: int, tables: KnownTables) -> None:
        self.memory = memory
        self._read = memory.read
        self.levels = levels
        self.tables = tables
        # By frame, the levels at which it is a table: itself in a recursive mapping at several.
        self.linked = tables.linked
        self.roots: set[int] = set()
        self._parents: Counter[tuple[int, int]] = Counter()
        # Tables above the PTEs as they were when last looked at.
        self._copies: dict[int, bytes] = {}
        # PTE tables by root and 2 MiB; emptied when any table goes.
        self._pte_tables: dict[tuple[int, int], int] = {}

    # ---------------------------------------------------------------- roots and links

    def add_root(self, pgd: int) -> list[Chunk]:
        """A CPU or an mm has this top table: the tables under it that were not known, each whole."""
        chunks: list[Chunk] = []
        if pgd not in self.roots and pgd + PAGE_SIZE <= self.memory.size:
            self.roots.add(pgd)
            self._link(pgd >> 12, self.levels, chunks)
        return chunks

    def drop_root(self, pgd: int) -> None:
        """The top table is one no more."""
        if pgd in self.roots:
            self.roots.discard(pgd)
            self._unlink(pgd >> 12, self.levels)

    def _link(self, frame: int, level: int, chunks: list[Chunk]) -> None:
        node = frame, level
        self._parents[node] += 1
        if self._parents[node] > 1:
            return
        try:
            copy = self.memory.read(frame << 12, PAGE_SIZE)
        except BusError:
            return
        if frame not in self.linked:
            self.linked[frame] = set()
            chunks.append((frame << 12, copy))
            if frame not in self.tables.frames:
                self.tables.frames[frame] = set()
            self.tables.on_new(frame)
        self.linked[frame].add(level)
        if level > 1:
            self._copies[frame] = copy
            for entry in _entries(copy):
                if _names_table(level, entry):
                    self._link((entry & PHYSICAL_MASK) >> 12, level - 1, chunks)

    def _unlink(self, frame: int, level: int) -> None:
        node = frame, level
        self._parents[node] -= 1
        if self._parents[node] > 0:
            return
        del self._parents[node]
        self._pte_tables.clear()
        levels = self.linked.get(frame)
        if levels is None:
            return
        levels.discard(level)
        if not levels:
            del self.linked[frame]
        if level > 1:
            copy = self._copies[frame]
            if not any(at > 1 for at in levels):
                del self._copies[frame]
            for entry in _entries(copy):
                if _names_table(level, entry):
                    self._unlink((entry & PHYSICAL_MASK) >> 12, level - 1)

    # ---------------------------------------------------------------- what was stored

    def stored(self, pgd: int, start: int, end: int, tables: bool) -> list[Chunk]:
        """Entries under `pgd` for [start, end) were stored; `tables`: others than PTEs too."""
        if not tables and start >> 21 == end - 1 >> 21:
            # Most stores by far: 1 us.
            table = self._pte_tables.get((pgd, start >> 21))
            if table:
                pa = table + (start >> 9 & 0xFF8)
                return [(pa, self._read(pa, (end - 1 >> 9 & 0xFF8) - (start >> 9 & 0xFF8) + _WORD))]
        chunks: list[Chunk] = []
        if pgd not in self.roots:
            return self.add_root(pgd)
        if tables:
            self._descend(pgd, self.levels, 0, start & _LINEAR[self.levels], (end - 1 & _LINEAR[self.levels]) + 1, chunks)
            return chunks
        while start < end:
            stop = min(end, (start & -_PDE_SPAN) + _PDE_SPAN)
            table = self._pte_tables.get((pgd, start >> 21)) or self._find_pte_table(pgd, start)
            if table:
                first = start >> 12 & 511
                pa = table + first * _WORD
                chunks.append((pa, self.memory.read(pa, ((stop - 1 >> 12 & 511) + 1 - first) * _WORD)))
            start = stop
        return chunks

    def stored_entry(self, entry_pa: int) -> list[Chunk]:
        """One entry was stored."""
        if entry_pa >> 12 not in self.linked:
            return []
        chunks = [(entry_pa, self.memory.read(entry_pa, _WORD))]
        self._compare(entry_pa >> 12, entry_pa >> 3 & 511, (entry_pa >> 3 & 511) + 1, chunks)
        return chunks

    def written(self, frame: int, before: bytes, after: bytes) -> list[Chunk]:
        """A store changed a frame's bytes from `before` to `after`."""
        chunks: list[Chunk] = []
        if frame not in self.linked or before == after:
            return chunks
        at = 0
        while at < PAGE_SIZE:
            if before[at : at + _WORD] == after[at : at + _WORD]:
                at += _WORD
                continue
            end = at + _WORD
            while end < PAGE_SIZE and before[end : end + _WORD] != after[end : end + _WORD]:
                end += _WORD
            chunks.append(((frame << 12) + at, after[at:end]))
            at = end
        self._compare(frame, 0, 512, chunks)
        return chunks

    def _find_pte_table(self, pgd: int, la: int) -> int:
        """Physical address of the PTE table for `la`, 0 where there is none; kept until a table goes."""
        table = pgd
        for level in range(self.levels, 1, -1):
            entry = self.memory.read_u64(table + (la >> 9 * level + 3 & 511) * _WORD)
            if not _names_table(level, entry):
                return 0
            table = entry & PHYSICAL_MASK
        self._pte_tables[pgd, la >> 21] = table
        return table

    def _descend(self, table: int, level: int, base: int, start: int, end: int, chunks: list[Chunk]) -> None:
        """Take in entries of `level` at `table`, which translates from `base` on, that translate [start, end)."""
        size = page_size(level)
        first, stop = max(0, start - base) // size, min(512, (end - base + size - 1) // size)
        if level == 1:
            chunks.append((table + first * _WORD, self.memory.read(table + first * _WORD, (stop - first) * _WORD)))
            return
        known = len(chunks)
        self._compare(table >> 12, first, stop, chunks)
        fresh = {pa >> 12 for pa, _ in chunks[known:]}
        copy = self._copies.get(table >> 12, b"")
        for i in range(first, stop if copy else first):
            entry = int.from_bytes(copy[i * _WORD : (i + 1) * _WORD], "little")
            below = entry & PHYSICAL_MASK
            if _names_table(level, entry) and below >> 12 in self.linked and below >> 12 not in fresh:
                self._descend(below, level - 1, base + i * size, start, end, chunks)

    def _compare(self, frame: int, first: int, stop: int, chunks: list[Chunk]) -> None:
        """Compare entries [first, stop) of a table above the PTEs with its copy: what changed, and which tables come and go."""
        old = self._copies.get(frame)
        if old is None:
            return
        pa = (frame << 12) + first * _WORD
        new = self.memory.read(pa, (stop - first) * _WORD)
        part = old[first * _WORD : stop * _WORD]
        if new == part:
            return
        self._copies[frame] = old[: first * _WORD] + new + old[stop * _WORD :]
        changed = [
            (i, int.from_bytes(part[i : i + _WORD], "little"), int.from_bytes(new[i : i + _WORD], "little"))
            for i in range(0, len(new), _WORD) if part[i : i + _WORD] != new[i : i + _WORD]
        ]
        levels = [level for level in self.linked.get(frame, ()) if level > 1]
        for i, before, after in changed:
            chunks.append((pa + i, after.to_bytes(_WORD, "little")))
            for level in levels:
                was, now = _names_table(level, before), _names_table(level, after)
                if was and now and not (before ^ after) & PHYSICAL_MASK:
                    continue
                if now:
                    self._link((after & PHYSICAL_MASK) >> 12, level - 1, chunks)
                if was:
                    self._unlink((before & PHYSICAL_MASK) >> 12, level - 1)

    def contents(self) -> dict[int, bytes]:
        """All tables as they are now, by frame."""
        return {frame: self.memory.read(frame << 12, PAGE_SIZE) for frame in sorted(self.linked)}


def _names_table(level: int, entry: int) -> bool:
    """Whether an entry of `level` names a table. PS above the PDPTE is reserved: no walk goes on there."""
    return level > 1 and entry & P != 0 and not (entry & PS or is_leaf(level, entry))


def _entries(table: bytes) -> list[int]:
    return memoryview(table).cast("Q").tolist()
