"""Page tables and TLBs as a history says that they were: the state its records begin with, and the changes since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from emu.debug.history import Key, Value
from emu.debug.history_records import AnyChange, Invalidated, RootLoaded, TableStored, TlbDropped, TlbFilled
from emu.memory import PAGE_SIZE, BusError, Memory
from emu.mmu.entry import PHYSICAL_MASK, PS, A, D, P
from emu.mmu.walk import PagingRegisters, inspect

_WORD = 8


class ReplayedTables(Memory):
    """The page tables alone, by frame: a memory of which nothing else can be read."""

    def __init__(self, frames: dict[int, bytes]) -> None:
        self.frames = {frame: bytearray(table) for frame, table in frames.items()}

    def read_u64(self, pa: int) -> int:
        """The entry at `pa`. Raises BusError where no table has been."""
        table = self.frames.get(pa >> 12)
        if table is None:
            raise BusError(pa, _WORD)
        at = pa & PAGE_SIZE - 1
        return int.from_bytes(table[at : at + _WORD], "little")

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes within one frame."""
        table = self.frames.setdefault(pa >> 12, bytearray(PAGE_SIZE))
        at = pa & PAGE_SIZE - 1
        table[at : at + len(data)] = data


class Replay:
    """A state of all tables and TLBs. `apply` goes on by one change.

    `tlbs` hold what each CPU caches; `roots` the CR3 of each PCID that it had, `current` its PCID and CR3. Accessed and dirty bits
    are stored by walks: they are taken from what the walks left in the TLB, so that A of a walk that faulted is not known.
    """

    def __init__(
        self, frames: dict[int, bytes], tlbs: list[dict[Key, Value]], roots: list[dict[int, int]], current: list[tuple[int, int]],
        regs: PagingRegisters,
    ) -> None:
        self.tables = ReplayedTables(frames)
        self.tlbs = [dict(tlb) for tlb in tlbs]
        self.roots = [dict(known) for known in roots]
        self.current = list(current)
        self.regs = regs

    def apply_all(self, changes: Iterable[AnyChange], step: int) -> None:
        """Go on to the state of a machine that was stopped by the limit `step`."""
        for change in changes:
            if change.since > step:
                return
            self.apply(change)

    def apply(self, change: AnyChange) -> None:
        """Go on by one change."""
        if isinstance(change, TlbFilled):
            self._fill(change)
        elif isinstance(change, TableStored):
            for pa, data in change.chunks:
                self.tables.write(pa, data)
        elif isinstance(change, TlbDropped):
            self.tlbs[change.cpu].pop((change.pcid, change.level, change.table, change.number), None)
        elif isinstance(change, Invalidated):
            self.tlbs[change.cpu] = {key: value for key, value in self.tlbs[change.cpu].items() if not removes(change, key)}
        elif isinstance(change, RootLoaded):
            self.current[change.cpu] = change.pcid, change.cr3
            self.roots[change.cpu][change.pcid] = change.cr3

    def holds(self, change: Invalidated, la: int) -> list[Key]:
        """What a CPU caches for an address that an invalidation is about to remove."""
        tlb = self.tlbs[change.cpu]
        return [key for key in tlb if la >> 9 * key[1] + 3 == key[3] and removes(change, key)]

    def fill_is_news(self, change: TlbFilled) -> bool:
        """Whether a fill changes the TLB: entries are also put back as they were, marked or not as stale."""
        key = change.pcid, change.level, change.table, change.number
        return self.tlbs[change.cpu].get(key) != _value(change)

    def _fill(self, change: TlbFilled) -> None:
        if not self.fill_is_news(change):
            return
        self.tlbs[change.cpu][change.pcid, change.level, change.table, change.number] = _value(change)
        marked = not (change.rights if change.table else change.value) & P
        if not marked:
            self._walk_stored(change)

    def _walk_stored(self, change: TlbFilled) -> None:
        """The walk that was cached has set A, and D with a write, in the entry that it read."""
        la = change.number << 9 * change.level + 3
        regs = replace(self.regs, cr3=self.current[change.cpu][1])
        for level, entry_pa, entry in inspect(self.tables, regs, la):
            if level != change.level:
                continue
            frame = change.value << 3 if change.table else change.value & PHYSICAL_MASK
            if entry & P and (entry & PHYSICAL_MASK == frame or (level > 1 and entry & PS and not change.table)):
                flags = A if change.table else change.value & (A | D)
                if entry & flags != flags:
                    self.tables.write(entry_pa, (entry | flags).to_bytes(_WORD, "little"))


def removes(change: Invalidated, key: Key) -> bool:
    """Whether an invalidation removes an entry (SDM vol. 3A 4.10.4.1)."""
    pcid, level, table, number = key
    if pcid < 0:
        if not change.shared:
            return False
    elif change.pcid not in (-1, pcid):
        return False
    return change.la < 0 or (table and change.shared) or change.la >> 9 * level + 3 == number


def _value(change: TlbFilled) -> Value:
    return (change.value, change.rights | P) if change.table else change.value | P
