"""What one chunk of per-CPU memory has given out, and which of its pages are there (v6.12 mm/percpu.c: struct pcpu_chunk)."""

from __future__ import annotations

from bisect import insort

from emu.kernel.layout import PAGE_SIZE
from emu.kernel.vm_struct import VmStruct


class PcpuChunk:
    """One chunk: `base_addr` is where offset 0 of the first unit would be; offsets [start, start + size) are its to give."""

    __slots__ = ("allocated", "base_addr", "free", "immutable", "isolated", "metadata", "nr_pages", "populated", "size", "slot",
                 "start", "vms")

    def __init__(self, base_addr: int, start: int, size: int, nr_pages: int, *, immutable: bool = False) -> None:
        self.base_addr = base_addr
        self.start = start
        self.size = size
        self.nr_pages = nr_pages
        self.immutable = immutable
        self.allocated: dict[int, int] = {}
        self.free = [(start, start + size)]
        self.populated = [immutable] * nr_pages
        self.isolated = False
        self.slot = -1
        self.vms: list[VmStruct] = []
        self.metadata: list[int] = []

    @property
    def free_bytes(self) -> int:
        """Bytes not allocated, populated or not."""
        return sum(end - start for start, end in self.free)

    @property
    def contig_hint(self) -> int:
        """Bytes of the largest free run."""
        return max((end - start for start, end in self.free), default=0)

    def empty_populated(self) -> list[int]:
        """Pages that are populated and hold nothing."""
        pages: list[int] = []
        for start, end in self.free:
            first, last = -(-start // PAGE_SIZE), min(end // PAGE_SIZE, self.nr_pages)
            pages += [page for page in range(first, last) if self.populated[page]]
        return pages

    def find_block_fit(self, size: int, align: int, *, pop_only: bool) -> int:
        """The lowest offset for `size` bytes, in populated pages only if `pop_only`; -1 where there is none."""
        for start, end in self.free:
            off = start + align - 1 & -align
            while off + size <= end:
                if not pop_only:
                    return off
                pages = range(off // PAGE_SIZE, -(-(off + size) // PAGE_SIZE))
                missing = [page for page in pages if not self.populated[page]]
                if not missing:
                    return off
                off = (missing[-1] + 1) * PAGE_SIZE
        return -1

    def alloc_area(self, off: int, size: int) -> None:
        """Take [off, off + size), which is free."""
        i = next(i for i, (start, end) in enumerate(self.free) if start <= off and off + size <= end)
        start, end = self.free[i]
        self.free[i : i + 1] = [(low, high) for low, high in ((start, off), (off + size, end)) if low < high]
        self.allocated[off] = size

    def free_area(self, off: int) -> int:
        """Give an allocation back from `off` to its end; its size, 0 where nothing is allocated."""
        head = next((start for start, size in self.allocated.items() if start <= off < start + size), None)
        if head is None:
            return 0
        end = head + self.allocated.pop(head)
        if head < off:
            self.allocated[head] = off - head
        insort(self.free, (off, end))
        merged: list[tuple[int, int]] = []
        for low, high in self.free:
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self.free = merged
        return end - off

    def runs(self, first: int, end: int, *, populated: bool) -> list[tuple[int, int]]:
        """Maximal runs [start, end) of pages in [first, end) that are populated, or that are not."""
        found: list[tuple[int, int]] = []
        for page in range(first, end):
            if self.populated[page] == populated:
                if found and found[-1][1] == page:
                    found[-1] = (found[-1][0], page + 1)
                else:
                    found.append((page, page + 1))
        return found
