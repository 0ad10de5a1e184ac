"""Guest-physical memory: one sparse private mapping under every CPU, with NUMA nodes as ranges of it.

RAM is [0, size). Frames that nobody touched cost nothing (anonymous mapping, MAP_NORESERVE). An access outside RAM, or to a
page that an MMIO region overlays, is a BusError: the model never reads a silent zero.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
MAXPHYADDR = 40
MAX_MEMORY = 1 << MAXPHYADDR
MAX_NODES = 8
# linux/mman.h; the mmap module of Python 3.11 has no name for it.
MAP_NORESERVE = 0x4000
# A node starts on a boundary that holds the largest buddy block and a 2 MiB leaf, so neither crosses nodes.
NODE_ALIGN = 4 << 20
# From here on giving the host's pages back costs less than writing zeros to them: 0.3 us against 3 us and more.
DISCARD_SIZE = 128 << 10

MmioRead = Callable[[int, int], int]
MmioWrite = Callable[[int, int, int], None]


class BusError(Exception):
    """An access to guest-physical [pa, pa + size) that no RAM answers."""

    def __init__(self, pa: int, size: int) -> None:
        super().__init__(f"bus error: no RAM at physical address {pa:#x} ({size} bytes)")
        self.pa = pa
        self.size = size


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node: the physical range [start, end)."""

    id: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class MmioRegion:
    """A device's registers at [start, start + size): read(offset, width) and write(offset, width, value)."""

    start: int
    size: int
    read: MmioRead
    write: MmioWrite


class CodeListener(Protocol):
    """A CPU that may hold code of this memory as translations, and rights to write it unseen."""

    def code_changed(self, frame: int) -> None:
        """The bytes of a frame that was executed change, and not by this CPU."""

    def code_fetched(self, frame: int) -> None:
        """Another CPU begins to execute a frame: from now on it must see this CPU's stores to it."""


class Memory:
    """RAM of `size` bytes in `nodes` NUMA nodes.

    `u64` is the whole RAM as a memoryview of u64, indexed by pa >> 3: 0.08 us a word, where an API call costs 0.4 us and
    more; only code that has checked its address may use it.

    Raises ValueError for a size that is not a positive multiple of 4 MiB per node or exceeds 1 TiB, or a node count
    outside 1..8.
    """

    def __init__(self, size: int, nodes: int = 1) -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"number of NUMA nodes is {nodes}; it must be 1 to {MAX_NODES}")
        if size <= 0 or size % NODE_ALIGN:
            raise ValueError(f"memory size is {size:#x}; it must be a positive multiple of {NODE_ALIGN >> 20} MiB")
        if size > MAX_MEMORY:
            raise ValueError(f"memory size is {size:#x}; the physical address width of {MAXPHYADDR} bits allows 1 TiB")
        if size < nodes * NODE_ALIGN:
            raise ValueError(f"memory size is {size:#x}; {nodes} nodes need at least {nodes * NODE_ALIGN:#x}")
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._bytes = memoryview(self._map)
        self.u64 = self._bytes.cast("Q")
        self._array: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        share = size // nodes // NODE_ALIGN * NODE_ALIGN
        self.nodes = tuple(
            Node(n, n * share, size if n == nodes - 1 else (n + 1) * share) for n in range(nodes)
        )
        self.mmio: list[MmioRegion] = []
        # Frames whose bytes a CPU may hold as translated code, and the CPUs to tell when somebody else writes one.
        self.code_frames: set[int] = set()
        self.code_listeners: list[CodeListener] = []

    def no_stores_unseen(self, frame: int) -> None:
        """From now on stores to a frame must be seen: the CPUs' caches of rights lose what they have of it."""
        for listener in self.code_listeners:
            listener.code_fetched(frame)

    def node_of(self, pa: int) -> int:
        """NUMA node of a physical address."""
        for node in self.nodes:
            if pa < node.end:
                return node.id
        raise BusError(pa, 1)

    def _check(self, pa: int, size: int) -> None:
        if pa < 0 or size < 0 or pa + size > self.size:
            raise BusError(pa, size)
        for region in self.mmio:
            if pa < region.start + region.size and region.start < pa + size:
                raise BusError(pa, size)

    def _check_write(self, pa: int, size: int) -> None:
        self._check(pa, size)
        if self.code_frames and size:
            for frame in range(pa >> PAGE_SHIFT, (pa + size - 1 >> PAGE_SHIFT) + 1):
                if frame in self.code_frames:
                    self.code_frames.discard(frame)
                    for listener in self.code_listeners:
                        listener.code_changed(frame)

    def overlay_mmio(self, region: MmioRegion) -> None:
        """Let a device answer for a page-aligned physical range. Raises ValueError when it is unaligned or overlaps another."""
        if region.start % PAGE_SIZE or region.size % PAGE_SIZE or region.size <= 0:
            raise ValueError(f"MMIO region {region.start:#x}+{region.size:#x} is not page aligned")
        if region.start < 0 or region.start + region.size > MAX_MEMORY:
            raise ValueError(f"MMIO region {region.start:#x}+{region.size:#x} is outside the physical address space")
        for other in self.mmio:
            if region.start < other.start + other.size and other.start < region.start + region.size:
                raise ValueError(f"MMIO region {region.start:#x}+{region.size:#x} overlaps {other.start:#x}+{other.size:#x}")
        self.mmio.append(region)

    def read_u64(self, pa: int) -> int:
        """The u64 at `pa`. Raises BusError, ValueError when unaligned."""
        if self.mmio or pa < 0 or pa + 8 > self.size:
            self._check(pa, 8)
        if pa & 7:
            raise ValueError(f"physical address {pa:#x} is not aligned to 8 bytes")
        return self.u64[pa >> 3]

    def write_u64(self, pa: int, value: int) -> None:
        """Store a u64 at `pa`. Raises BusError, ValueError when unaligned."""
        self._check_write(pa, 8)
        if pa & 7:
            raise ValueError(f"physical address {pa:#x} is not aligned to 8 bytes")
        self.u64[pa >> 3] = value

    def read(self, pa: int, size: int) -> bytes:
        """`size` bytes at `pa`. Raises BusError."""
        if self.mmio or pa < 0 or size < 0 or pa + size > self.size:
            self._check(pa, size)
        return self._map[pa : pa + size]

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes at `pa`. Raises BusError."""
        if self.mmio or pa >> PAGE_SHIFT in self.code_frames or pa < 0 or pa + len(data) > min(self.size, (pa | PAGE_SIZE - 1) + 1):
            self._check_write(pa, len(data))
        self._bytes[pa : pa + len(data)] = data

    def fill(self, pa: int, size: int, byte: int = 0) -> None:
        """Set `size` bytes at `pa`. Frames of a large zeroed range cost nothing until touched again. Raises BusError."""
        self._check_write(pa, size)
        if not byte and size >= DISCARD_SIZE:
            start = pa + PAGE_SIZE - 1 & -PAGE_SIZE
            end = pa + size & -PAGE_SIZE
            # The kernel drops the pages and keeps the mapping: whoever reads them next, an engine too, finds zeros.
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
            ctypes.memset(self.host_address + pa, 0, start - pa)
            ctypes.memset(self.host_address + end, 0, pa + size - end)
            return
        ctypes.memset(self.host_address + pa, byte, size)

    def table(self, pa: int) -> npt.NDArray[np.uint64]:
        """The page table at `pa`: a writable view of its 512 entries. Raises BusError, ValueError when unaligned."""
        if pa & (PAGE_SIZE - 1):
            raise ValueError(f"page table at {pa:#x} is not page aligned")
        return self.view_u64(pa, 512)

    def view_u64(self, pa: int, count: int) -> npt.NDArray[np.uint64]:
        """A writable view of `count` u64 at `pa`. Raises BusError, ValueError when unaligned."""
        self._check_write(pa, 8 * count)
        if pa & 7:
            raise ValueError(f"physical address {pa:#x} is not aligned to 8 bytes")
        return self._array[pa >> 3 : (pa >> 3) + count]
