"""Which frames hold the paging structures that the CPUs have walked, so that stores to them can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from emu.mmu.entry import P, page_size
from emu.mmu.walk import Step, inspect

if TYPE_CHECKING:
    from emu.mmu.mmu import Mmu

_WORD = 8


def _nothing(frame: int) -> None:
    return None


class TableFrames:
    """Frames that walks have visited, with the level and the first address of what each translates.

    `frames` may hold frames that are tables no more: is_table_frame looks, and forgets them. `on_new(frame)` is called when a
    frame becomes known: whoever grants stores to it must take that back.
    """

    def __init__(self) -> None:
        self.frames: dict[int, set[tuple[int, int]]] = {}
        self.on_new: Callable[[int], None] = _nothing
        self._mmus: list[Mmu] = []
        self._linear = (1 << 48) - 1

    def add(self, mmu: Mmu) -> None:
        """Count a CPU's address spaces among those that make a frame a table."""
        self._mmus.append(mmu)
        self._linear = (1 << 9 * mmu.regs.levels + 12) - 1

    def visited(self, la: int, steps: list[Step]) -> None:
        """A walk of `la` read these entries."""
        for level, entry_pa, *_ in steps:
            frame = entry_pa >> 12
            place = level, la & -(page_size(level) << 9) & self._linear
            places = self.frames.get(frame)
            if places is None:
                self.frames[frame] = {place}
                self.on_new(frame)
            elif place not in places:
                places.add(place)

    def is_table_frame(self, frame: int) -> bool:
        """Whether a walk from a CR3 that some CPU has in use comes to `frame`."""
        places = self.frames.get(frame)
        if places is None:
            return False
        if any(self._reaches(frame, level, la) for level, la in places):
            return True
        del self.frames[frame]
        return False

    def _reaches(self, frame: int, level: int, la: int) -> bool:
        for mmu in self._mmus:
            for cr3 in dict.fromkeys((mmu.cr3, *mmu.roots.values())):
                for at, entry_pa, _ in inspect(mmu.memory, replace(mmu.regs, cr3=cr3), self._canonical(la)):
                    if at == level and entry_pa >> 12 == frame:
                        return True
        return False

    def changed(self, frame: int, before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
        """The ranges [start, end) whose present entries in `frame` were changed by a store, ascending within each place.

        Not-present entries are never cached (SDM vol. 3A 4.10.2.3, 4.10.3.1), so making one present is no change.
        """
        if before == after:
            return
        for level, base in sorted(self.frames.get(frame, ())):
            size = page_size(level)
            for offset in range(0, len(before), _WORD):
                old = int.from_bytes(before[offset : offset + _WORD], "little")
                if old & P and before[offset : offset + _WORD] != after[offset : offset + _WORD]:
                    start = self._canonical(base + offset // _WORD * size)
                    yield start, start + size

    def _canonical(self, la: int) -> int:
        return la | (1 << 64) - 1 & ~self._linear if la > self._linear >> 1 else la
