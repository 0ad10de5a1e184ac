"""memblock: who owns physical memory before the page allocator runs.

Boot reserves what is in use (kernel image, first MiB) and takes what is too large or too early for the page allocator
(struct pages), top-down as x86 does. Then the page allocator takes over all that is left. Source: v6.12 mm/memblock.c.
"""

from __future__ import annotations

from emu.memory import PAGE_SIZE, Memory, Node


class OutOfMemoryAtBoot(MemoryError):
    """RAM is too small for what boot has to place in it. `size` bytes did not fit on `node`."""

    def __init__(self, node: Node, size: int) -> None:
        super().__init__(
            f"node {node.id} [{node.start:#x}, {node.end:#x}) has no room for {size:#x} bytes that boot places there"
        )
        self.node = node
        self.size = size


class Memblock:
    """Reserved physical ranges of a machine. `reserved` is sorted, page aligned and free of overlaps and touching
    ends.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.reserved: list[tuple[int, int]] = []

    def reserve(self, start: int, end: int) -> None:
        """Take [start, end), widened to whole pages. Raises ValueError when it is not in RAM or overlaps a
        reservation.
        """
        start &= ~(PAGE_SIZE - 1)
        end = (end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        if not 0 <= start < end <= self.memory.size:
            raise ValueError(f"cannot reserve [{start:#x}, {end:#x}): RAM ends at {self.memory.size:#x}")
        for other_start, other_end in self.reserved:
            if start < other_end and other_start < end:
                raise ValueError(f"[{start:#x}, {end:#x}) overlaps the reserved [{other_start:#x}, {other_end:#x})")
        merged: list[tuple[int, int]] = []
        for item in sorted([*self.reserved, (start, end)]):
            if merged and merged[-1][1] == item[0]:
                merged[-1] = (merged[-1][0], item[1])
            else:
                merged.append(item)
        self.reserved = merged

    def alloc(self, size: int, align: int, node: int) -> int:
        """Reserve `size` bytes at the highest address of a node that is aligned to `align`; returns the physical
        address.

        Raises OutOfMemoryAtBoot when the node has no such hole.
        """
        where = self.memory.nodes[node]
        for start, end in reversed(self.free_ranges(where.start, where.end)):
            pa = (end - size) & ~(align - 1)
            if pa >= start:
                self.reserve(pa, pa + size)
                return pa
        raise OutOfMemoryAtBoot(where, size)

    def free(self, start: int, end: int) -> None:
        """Give a part of one reservation back. Raises ValueError when [start, end) is unaligned or not all of it is reserved."""
        if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
            raise ValueError(f"cannot free [{start:#x}, {end:#x}): not whole pages")
        for i, (reserved_start, reserved_end) in enumerate(self.reserved):
            if reserved_start <= start and end <= reserved_end:
                kept = [(reserved_start, start), (end, reserved_end)]
                self.reserved[i : i + 1] = [(low, high) for low, high in kept if low < high]
                return
        raise ValueError(f"cannot free [{start:#x}, {end:#x}): it is not reserved")

    def free_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of [start, end) is not reserved, ascending."""
        ranges = []
        for reserved_start, reserved_end in self.reserved:
            if reserved_end <= start or reserved_start >= end:
                continue
            if reserved_start > start:
                ranges.append((start, reserved_start))
            start = max(start, reserved_end)
        if start < end:
            ranges.append((start, end))
        return ranges

    def validate(self) -> None:
        """Reservations are ascending, page aligned, in RAM, and a gap separates any two."""
        previous = -1
        for start, end in self.reserved:
            assert previous < start < end <= self.memory.size, "ascending with gaps, in RAM"
            assert start % PAGE_SIZE == 0 and end % PAGE_SIZE == 0, "page aligned"
            previous = end
