"""Linear-address translation by the paging structures in memory (SDM vol. 3A 4.5 to 4.8).

Accessed and dirty flags (SDM 4.8; 6.15, interrupt 14, footnote): an entry that names a table gets A as soon as it is used to
reach that table, also when the access then faults; the leaf gets A, and D for a write, only when the access is permitted.
The SDM asks for the former and leaves the leaf's A on a refused access to the processor model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.memory import BusError, Memory
from emu.mmu.entry import (
    ABOVE_MAXPHYADDR,
    ENTRY_BITS,
    PHYSICAL_MASK,
    PKEY_SHIFT,
    PS,
    RIGHTS,
    RW,
    US,
    XD,
    A,
    D,
    Level,
    P,
    index,
    is_canonical,
    is_leaf,
    reserved_bits,
)
from emu.mmu.fault import Access, NonCanonical, PageFault, PfError

_NO_RIGHTS = ~RIGHTS & ENTRY_BITS
_READ = int(Access.READ)
_WRITE = int(Access.WRITE)
_FETCH = int(Access.FETCH)
_E_P = int(PfError.P)
_E_W = int(PfError.W)
_E_U = int(PfError.U)
_E_RSVD = int(PfError.RSVD)
_E_I = int(PfError.I)
_E_PK = int(PfError.PK)


@dataclass(frozen=True, slots=True)
class PagingRegisters:
    """What paging reads from CR0, CR3, CR4, EFER, PKRU and CPUID. `levels` is 4 or 5 (CR4.LA57)."""

    cr3: int = 0
    levels: int = 4
    wp: bool = True
    smep: bool = False
    smap: bool = False
    pke: bool = False
    nxe: bool = True
    gbpages: bool = True
    pkru: int = 0


@dataclass(frozen=True, slots=True)
class Translation:
    """A completed walk.

    `effective` is the leaf entry with the rights of the whole walk (AND of RW and US, OR of XD); `entries` are the
    (level, entry_pa, entry) used, top first, as they stand in memory after the walk.
    """

    la: int
    pa: int
    level: Level
    page_size: int
    effective: int
    entries: tuple[tuple[Level, int, int], ...]


# A step of a walk: level, entry_pa, entry, and the rights mask that holds below it.
Step = tuple[int, int, int, int]


def combine(rights: int, entry: int) -> int:
    """Narrow a rights mask by one more entry.

    A rights mask has every bit set except the rights that an entry took away; in it bit 63 means *execute permitted*,
    so that rights accumulate by AND. The packed form of a leaf is (entry ^ XD) & rights.
    """
    return rights & ((entry ^ XD) | _NO_RIGHTS)


def error_bits(regs: PagingRegisters, access: int, user: bool) -> int:
    """W, U and I of the error code. I/D is reported only with NXE or SMEP (SDM 4.7; PAE is always set in long mode)."""
    error = _E_U if user else 0
    if access == _WRITE:
        error |= _E_W
    elif access == _FETCH and (regs.nxe or regs.smep):
        error |= _E_I
    return error


def violation(
    regs: PagingRegisters, effective: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool
) -> int | None:
    """The error code if `effective` (rights of the whole walk) refuses the access, else None (SDM 4.6.1, 4.6.2).

    `user` is the access mode, False for every implicit supervisor access; RFLAGS.AC is read only where SMAP asks for
    it.
    """
    refused = False
    pk = 0
    user_page = effective & US
    if access == _FETCH:
        if effective & XD and regs.nxe:
            refused = True
        if user:
            refused = refused or not user_page
        elif user_page and regs.smep:
            refused = True
    else:
        if user:
            refused = not user_page
        elif user_page and regs.smap and (implicit or not read_ac()):
            refused = True
        write = access == _WRITE
        if write and not effective & RW and (user or regs.wp):
            refused = True
        if regs.pke and user_page:
            key = regs.pkru >> (2 * (effective >> PKEY_SHIFT & 0xF))
            if key & 1 or (key & 2 and write and (user or regs.wp)):
                refused = True
                # SDM 4.7: PK is 1 whenever the protection key refuses, whatever else does.
                pk = _E_PK
    return _E_P | pk | error_bits(regs, access, user) if refused else None


def descend(
    memory: Memory,
    regs: PagingRegisters,
    la: int,
    access: int,
    user: bool,
    read_ac: Callable[[], bool],
    implicit: bool,
    set_ad: bool,
    start: tuple[int, int, int],
    steps: list[Step],
) -> int:
    """Walk from `start` = (level, table pa, rights mask) to the leaf; append each step used; return the packed leaf.

    The packed leaf is (entry ^ XD) & rights: the effective leaf entry with bit 63 inverted. Raises PageFault, and
    BusError when a table is not in RAM.
    """
    level, table, rights = start
    u64 = memory.u64
    in_ram = 0 if memory.mmio else memory.size
    # A faulting access walks from the top each time, so calls are spelled out here: 0.4 us a level instead of 1.2. An entry
    # with none of these bits is a table's.
    unusual = ABOVE_MAXPHYADDR | PS if regs.nxe else ABOVE_MAXPHYADDR | PS | XD
    while True:
        entry_pa = table + 8 * (la >> (9 * level + 3) & 511)
        entry = u64[entry_pa >> 3] if entry_pa < in_ram else memory.read_u64(entry_pa)
        if not entry & P:
            raise PageFault(la, error_bits(regs, access, user), level, entry)
        if entry & unusual and entry & reserved_bits(level, entry, regs):
            raise PageFault(la, error_bits(regs, access, user) | _E_P | _E_RSVD, level, entry)
        if level == 1 or (entry & PS and is_leaf(level, entry)):
            break
        if set_ad and not entry & A:
            entry |= A
            u64[entry_pa >> 3] = entry
        rights &= (entry ^ XD) | _NO_RIGHTS
        steps.append((level, entry_pa, entry, rights))
        table = entry & PHYSICAL_MASK
        level -= 1
    packed = (entry ^ XD) & rights
    error = violation(regs, packed ^ XD, access, user, read_ac, implicit)
    if error is not None:
        raise PageFault(la, error, level, entry)
    if set_ad:
        flags = A | D if access == _WRITE else A
        if entry & flags != flags:
            entry |= flags
            packed |= flags
            u64[entry_pa >> 3] = entry
    steps.append((level, entry_pa, entry, rights))
    return packed


def root(regs: PagingRegisters) -> tuple[int, int, int]:
    """Where a walk begins that finds nothing cached: the table that CR3 names, no right taken yet."""
    return regs.levels, regs.cr3 & PHYSICAL_MASK, ENTRY_BITS


def _ac_set() -> bool:
    return True


def _ac_clear() -> bool:
    return False


def ac_reader(ac: bool) -> Callable[[], bool]:
    """RFLAGS.AC as a callable, for a caller that knows it."""
    return _ac_set if ac else _ac_clear


def walk(
    memory: Memory,
    regs: PagingRegisters,
    la: int,
    access: int,
    user: bool,
    ac: bool = False,
    implicit: bool = False,
    set_ad: bool = True,
) -> Translation:
    """Translate `la` by the structures in memory, with no TLB.

    `implicit` marks an implicit supervisor access (descriptor tables, TSS, exception delivery): supervisor mode at
    any CPL, refused by SMAP whatever AC says. `set_ad=False` leaves accessed and dirty flags alone (a debugger's
    look). Raises NonCanonical, PageFault, and BusError when a table is not in RAM.
    """
    if not is_canonical(la, regs.levels):
        raise NonCanonical(la)
    steps: list[Step] = []
    packed = descend(
        memory, regs, la, access, user and not implicit, ac_reader(ac), implicit, set_ad, root(regs), steps
    )
    level = Level(steps[-1][0])
    size = 1 << (9 * level + 3)
    return Translation(
        la=la,
        pa=(packed & PHYSICAL_MASK & ~(size - 1)) | (la & (size - 1)),
        level=level,
        page_size=size,
        effective=packed ^ XD,
        entries=tuple((Level(at), entry_pa, entry) for at, entry_pa, entry, _ in steps),
    )


def inspect(memory: Memory, regs: PagingRegisters, la: int) -> list[tuple[Level, int, int]]:
    """The (level, entry_pa, entry) that a walk of `la` would read, top first, without any check or change.

    It ends at a leaf, at an entry that is not present, or before a table outside RAM.
    """
    entries: list[tuple[Level, int, int]] = []
    level, table, _ = root(regs)
    while level:
        entry_pa = table + 8 * index(la, level)
        try:
            entry = memory.read_u64(entry_pa)
        except BusError:
            break
        entries.append((Level(level), entry_pa, entry))
        if not entry & P or level == 1 or entry & PS:
            break
        table = entry & PHYSICAL_MASK
        level -= 1
    return entries
