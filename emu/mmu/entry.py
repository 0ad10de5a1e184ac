"""Paging-structure entries: their bits, levels and indices (SDM vol. 3A 4.5, tables 4-15 to 4-20)."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from emu.memory import MAXPHYADDR

if TYPE_CHECKING:
    from emu.mmu.walk import PagingRegisters


class Entry(IntFlag):
    """Bits of a paging-structure entry. PS and PAT share bit 7: PS above the PTE, PAT in it."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    PAT = 1 << 7
    G = 1 << 8
    PAT_LARGE = 1 << 12
    XD = 1 << 63


class Level(IntEnum):
    """The paging structures, numbered from the leaf: level n selects by 9 bits of la from bit 12 + 9 * (n - 1)."""

    PTE = 1
    PDE = 2
    PDPTE = 3
    PML4E = 4
    PML5E = 5


# Tuples and plain ints beside the enums: arithmetic on IntFlag costs a microsecond, the walker does a dozen per walk.
P = int(Entry.P)
RW = int(Entry.RW)
US = int(Entry.US)
A = int(Entry.A)
D = int(Entry.D)
PS = int(Entry.PS)
G = int(Entry.G)
XD = int(Entry.XD)

PAGE_SHIFT = 12
PAGE_MASK = (1 << PAGE_SHIFT) - 1
ENTRY_BITS = (1 << 64) - 1
# Bits 39:12: the frame or table that an entry names.
PHYSICAL_MASK = (1 << MAXPHYADDR) - (1 << PAGE_SHIFT)
PKEY_SHIFT = 59
PKEY_MASK = 0xF << PKEY_SHIFT
# Bits 51:40 are reserved in every present entry.
ABOVE_MAXPHYADDR = (1 << 52) - (1 << MAXPHYADDR)

# The rights an entry restricts. A walk grants what every entry grants: AND of RW and US, OR of XD.
RIGHTS = RW | US | XD

_LARGE_RESERVED = {
    Level.PDE: (1 << 21) - (1 << 13),
    Level.PDPTE: (1 << 30) - (1 << 13),
}


def level_shift(level: int) -> int:
    """The number of linear-address bits below an entry of `level`."""
    return 9 * level + 3


def index(la: int, level: int) -> int:
    """Which of a table's 512 entries of `level` translates `la`."""
    return la >> (9 * level + 3) & 511


def page_size(level: int) -> int:
    """Bytes that one entry of `level` spans: 4 KiB, 2 MiB, 1 GiB as leaves."""
    return 1 << (9 * level + 3)


def is_canonical(la: int, levels: int) -> bool:
    """Whether the unsigned 64-bit `la` is canonical: bits 63:47 equal with 4 levels, 63:56 with 5 (SDM vol. 1,
    3.3.7.1).
    """
    top = la >> (9 * levels + 11)
    return top == 0 or top == (1 << (53 - 9 * levels)) - 1


def is_leaf(level: int, entry: int) -> bool:
    """Whether a present entry maps a page rather than naming a table. PS above the PDPTE is reserved, not a leaf."""
    return level == 1 or (entry & PS != 0 and level <= Level.PDPTE)


def reserved_bits(level: int, entry: int, regs: PagingRegisters) -> int:
    """The bits that must be 0 in a present `entry` of `level` (SDM vol. 3A 4.5.4).

    Bit 11 and bits 62:52 are ignored; bits 62:59 hold the protection key of a leaf.
    """
    reserved = ABOVE_MAXPHYADDR if regs.nxe else ABOVE_MAXPHYADDR | XD
    if entry & PS and level != Level.PTE:
        if level == Level.PDE or (level == Level.PDPTE and regs.gbpages):
            reserved |= _LARGE_RESERVED[Level(level)]
        else:
            reserved |= PS
    return reserved


def describe(entry: int) -> str:
    """The entry's frame and flag names, for listings and failure messages."""
    names = [flag.name or "" for flag in Entry if entry & flag and flag is not Entry.PAT_LARGE]
    key = (entry & PKEY_MASK) >> PKEY_SHIFT
    return f"{entry & PHYSICAL_MASK:#x} {'|'.join(names) or '0'}" + (f" pkey={key}" if key else "")
