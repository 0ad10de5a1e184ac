"""Page tables for the MMU's tests: a small RAM and a builder that maps one page at a time."""

from __future__ import annotations

from emu.memory import Memory
from emu.mmu.entry import PHYSICAL_MASK, PS, RW, US, A, D, P, index

RAM = 64 << 20
ROOT = 0x1000
USER_TABLE = P | RW | US | A
# A page that every access may use without an assist.
OPEN = P | RW | US | A | D


class Tables:
    """Page tables below `root` in `memory`; every new table is linked with `USER_TABLE`, so leaves decide the rights."""

    def __init__(self, levels: int = 4, size: int = RAM, memory: Memory | None = None, root: int = ROOT) -> None:
        self.memory = memory or Memory(size)
        self.levels = levels
        self.root = root
        self.next_table = root + 0x1000

    def entry_pa(self, la: int, level: int) -> int:
        """Physical address of the entry of `level` for `la`; tables above it are made as needed."""
        table = self.root
        for at in range(self.levels, level, -1):
            where = table + 8 * index(la, at)
            entry = self.memory.read_u64(where)
            if not entry & P:
                entry = self.next_table | USER_TABLE
                self.next_table += 0x1000
                self.memory.write_u64(where, entry)
            table = entry & PHYSICAL_MASK
        return table + 8 * index(la, level)

    def map(self, la: int, pa: int, flags: int = OPEN, level: int = 1) -> int:
        """Map the page of `la`; returns where its leaf entry is."""
        where = self.entry_pa(la, level)
        self.memory.write_u64(where, pa | flags | (PS if level > 1 else 0))
        return where

    def change(self, la: int, level: int, set_: int = 0, clear: int = 0) -> None:
        """Set and clear bits of the entry of `level` for `la`."""
        where = self.entry_pa(la, level)
        self.memory.write_u64(where, self.memory.read_u64(where) & ~clear | set_)

    def entry(self, la: int, level: int) -> int:
        """The entry of `level` for `la`."""
        return self.memory.read_u64(self.entry_pa(la, level))
