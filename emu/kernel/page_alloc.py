"""The buddy page allocator: physical frames by node, zone and order.

Frame numbers (pfn) in and out; a failed allocation is None. Blocks of order 0 to MAX_PAGE_ORDER (4 MiB) are split and
merged as v6.12 mm/page_alloc.c does: a split keeps the lower half, a freed block merges with its buddy as far up as it
goes, free lists are last in, first out. Not modelled: per-CPU lists, migrate types, watermarks and reclaim, so a
request fails exactly when no zone that it may use has a large enough block.

Memory that was never allocated is kept as runs of largest blocks behind the free list of that order: a machine with 1
TiB has 262,144 such blocks, and building a list entry for each would take longer than the whole boot may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from emu.kernel.gfp import Gfp
from emu.kernel.memblock import Memblock
from emu.kernel.page_blocks import MAX_PAGE_ORDER, Pfns, aligned_blocks, consecutive_runs, sparse_map
from emu.kernel.pgtable_types import PageTableChanges
from emu.memory import PAGE_SHIFT, PAGE_SIZE, Memory

__all__ = ["MAX_PAGE_ORDER", "NR_PAGE_ORDERS", "NUMA_NO_NODE", "PageAllocator", "Pfns", "Zone", "ZoneType"]

NR_PAGE_ORDERS = MAX_PAGE_ORDER + 1
MAX_BLOCK = 1 << MAX_PAGE_ORDER
NUMA_NO_NODE = -1

# Plain ints: an operation on an IntFlag costs as much as the rest of an allocation.
_DMA = int(Gfp.DMA)
_DMA32 = int(Gfp.DMA32)
_ZERO = int(Gfp.ZERO)
_COMP = int(Gfp.COMP)
_THISNODE = int(Gfp.THISNODE)


class ZoneType(IntEnum):
    """Zones of a node on x86-64, by the addresses that old devices can reach (v6.12 include/linux/mmzone.h)."""

    DMA = 0
    DMA32 = 1
    NORMAL = 2


ZONE_END_PFN = {ZoneType.DMA: 16 << 20 >> PAGE_SHIFT, ZoneType.DMA32: 4 << 30 >> PAGE_SHIFT}
_ZONE_NAMES = {ZoneType.DMA: "DMA", ZoneType.DMA32: "DMA32", ZoneType.NORMAL: "Normal"}


def gfp_zone(gfp: int) -> ZoneType:
    """The highest zone that a request may use."""
    if gfp & _DMA:
        return ZoneType.DMA
    return ZoneType.DMA32 if gfp & _DMA32 else ZoneType.NORMAL


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Where a request without a node looks: `node`'s zonelist, bound to `only`; the nodes `preferred` come first."""

    node: int
    only: frozenset[int] | None = None
    preferred: frozenset[int] | None = None


class NodePolicy(Protocol):
    """Decides for requests that name no node."""

    def numa_node_id(self) -> int:
        """Node of the CPU that asks."""

    def choose(self, gfp: int) -> NodeChoice:
        """For one block."""

    def choose_bulk(self, gfp: int, nr_pages: int) -> list[tuple[NodeChoice, int]]:
        """For many single frames: in turn, so many by each choice."""


class Zone:
    """Frames [start_pfn, end_pfn) of one node: free lists per order, and runs of never used largest blocks."""

    __slots__ = ("end_pfn", "free_area", "kind", "managed_pages", "node", "nr_free", "runs", "start_pfn")

    def __init__(self, node: int, kind: ZoneType, start_pfn: int, end_pfn: int) -> None:
        self.node = node
        self.kind = kind
        self.start_pfn = start_pfn
        self.end_pfn = end_pfn
        # Insertion order is the list: the last key is the list's head. A dict also removes a buddy in O(1).
        self.free_area: tuple[dict[int, None], ...] = tuple({} for _ in range(NR_PAGE_ORDERS))
        self.runs: list[tuple[int, int]] = []
        self.nr_free = 0
        self.managed_pages = 0

    @property
    def name(self) -> str:
        """Name as /proc/zoneinfo prints it."""
        return _ZONE_NAMES[self.kind]

    def nr_free_blocks(self, order: int) -> int:
        """Number of free blocks of an order, as a row of /proc/buddyinfo has it."""
        count = len(self.free_area[order])
        if order == MAX_PAGE_ORDER:
            count += sum(end - start for start, end in self.runs) >> MAX_PAGE_ORDER
        return count


class PageAllocator:
    """All frames of a machine.

    Frames that `memblock` holds reserved are never handed out. `should_fail`, when set, is asked before each request
    with (gfp, order) and makes it fail by answering True. With `init_on_alloc` every frame is handed out zeroed, as a
    kernel with CONFIG_INIT_ON_ALLOC_DEFAULT_ON does.
    """

    def __init__(self, memory: Memory, memblock: Memblock, *, init_on_alloc: bool = False) -> None:
        self.memory = memory
        self.max_pfn = memory.size >> PAGE_SHIFT
        self.should_fail: Callable[[int, int], bool] | None = None
        self.init_on_alloc = init_on_alloc
        # None: node 0 first, as on a machine with one node.
        self.policy: NodePolicy | None = None
        # Sparse host memory: 5 bytes a frame, of which only those of used frames become resident.
        refs = sparse_map(4 * self.max_pfn)
        self._refcount: npt.NDArray[np.int32] = np.frombuffer(refs, dtype=np.int32)
        self._refs = memoryview(refs).cast("i")
        # 0: not the first frame of a listed free block; otherwise its order + 1.
        orders = sparse_map(self.max_pfn)
        self._free_order: npt.NDArray[np.uint8] = np.frombuffer(orders, dtype=np.uint8)
        self._orders = memoryview(orders)
        self._compound_order: dict[int, int] = {}
        # Live changes to page tables made of these frames are told here.
        self.table_changes = PageTableChanges()
        # While not 0, each frame handed out is marked with it: who asks later knows whether that was after a given moment.
        self.epoch = 0
        self._handed_out: npt.NDArray[np.uint32] = np.frombuffer(sparse_map(4 * self.max_pfn), dtype=np.uint32)
        self.zones: list[list[Zone]] = [self._node_zones(node.id) for node in memory.nodes]
        self._zone_starts = [(zone.start_pfn, zone.end_pfn, zone) for zones in self.zones for zone in zones]
        for zones in self.zones:
            for zone in zones:
                ranges = memblock.free_ranges(zone.start_pfn << PAGE_SHIFT, zone.end_pfn << PAGE_SHIFT)
                for start, end in ranges:
                    self._seed(zone, start >> PAGE_SHIFT, end >> PAGE_SHIFT)
        self._zonelists = [[self._zonelist(node.id, kind) for kind in ZoneType] for node in memory.nodes]

    def _node_zones(self, node: int) -> list[Zone]:
        start = self.memory.nodes[node].start >> PAGE_SHIFT
        end = self.memory.nodes[node].end >> PAGE_SHIFT
        zones = []
        for kind in ZoneType:
            zone_end = min(end, ZONE_END_PFN.get(kind, end))
            if start < zone_end:
                zones.append(Zone(node, kind, start, zone_end))
                start = zone_end
        return zones

    def _seed(self, zone: Zone, start: int, end: int) -> None:
        zone.managed_pages += end - start
        zone.nr_free += end - start
        run_start = min(-(-start // MAX_BLOCK) * MAX_BLOCK, end)
        run_end = max(end // MAX_BLOCK * MAX_BLOCK, run_start)
        if run_start < run_end:
            zone.runs.append((run_start, run_end))
        # Reversed, so that the lowest block of an order becomes the head of its list.
        for pfn, order in reversed(aligned_blocks(run_end, end) if run_start < run_end else []):
            self._add_to_free_list(zone, pfn, order)
        for pfn, order in reversed(aligned_blocks(start, run_start if run_start < run_end else end)):
            self._add_to_free_list(zone, pfn, order)

    def _zonelist(self, node: int, highest: ZoneType) -> tuple[Zone, ...]:
        """Zones in the order in which a request on `node` tries them: node by node, high zones first."""
        count = len(self.zones)
        order = [(node + i) % count for i in range(count)]
        return tuple(z for n in order for z in reversed(self.zones[n]) if z.kind <= highest)

    def _zone_of(self, pfn: int) -> Zone:
        for start, end, zone in self._zone_starts:
            if start <= pfn < end:
                return zone
        raise ValueError(f"frame {pfn:#x} is not in RAM")

    def numa_mem_id(self) -> int:
        """The node that is local to whoever asks."""
        return 0 if self.policy is None else self.policy.numa_node_id()

    def _candidates(self, gfp: int, node: int) -> tuple[Zone, ...]:
        if node != NUMA_NO_NODE:
            if not 0 <= node < len(self.zones):
                raise ValueError(f"node is {node}; this machine has nodes 0 to {len(self.zones) - 1}")
            zones = self._zonelists[node][gfp_zone(gfp)]
            return tuple(zone for zone in zones if zone.node == node) if gfp & _THISNODE else zones
        if self.policy is None:
            return self._zonelists[0][gfp_zone(gfp)]
        return self._chosen(gfp, self.policy.choose(gfp))

    def _chosen(self, gfp: int, choice: NodeChoice) -> tuple[Zone, ...]:
        zones = self._zonelists[choice.node][gfp_zone(gfp)]
        if gfp & _THISNODE:
            return tuple(zone for zone in zones if zone.node == choice.node)
        if choice.only is not None:
            return tuple(zone for zone in zones if zone.node in choice.only)
        if choice.preferred is not None:
            return tuple(sorted(zones, key=lambda zone: zone.node not in (choice.preferred or ())))
        return zones

    # Allocation

    def alloc_pages(self, gfp: int, order: int = 0, node: int = NUMA_NO_NODE) -> int | None:
        """A block of 2^order frames, aligned to its size: first frame, or None when there is none.

        Only the first frame gets a reference count of 1 (split_page gives each its own); with __GFP_COMP put_page of
        that frame frees the whole block. __GFP_ZERO clears the block. An order above MAX_PAGE_ORDER is None. Raises
        ValueError for a node that does not exist.
        """
        gfp = int(gfp)
        zones = self._candidates(gfp, node)
        if order < 0:
            raise ValueError(f"order is {order}")
        if order > MAX_PAGE_ORDER or (self.should_fail is not None and self.should_fail(gfp, order)):
            return None
        for zone in zones:
            pfn = self._rmqueue(zone, order)
            if pfn is not None:
                self._refs[pfn] = 1
                if self.epoch:
                    self._handed_out[pfn : pfn + (1 << order)] = self.epoch
                if gfp & _COMP and order:
                    self._compound_order[pfn] = order
                if gfp & _ZERO or self.init_on_alloc:
                    self.memory.fill(pfn << PAGE_SHIFT, PAGE_SIZE << order)
                return pfn
        return None

    def alloc_pages_bulk(self, gfp: int, node: int, nr_pages: int) -> Pfns:
        """Up to `nr_pages` single frames, the same ones that as many alloc_pages calls would return, in that order.

        Returns an int64 array of frame numbers, shorter than asked when memory runs out. 1 GiB takes a few
        milliseconds.
        """
        gfp = int(gfp)
        chunks: list[Pfns] = []
        if nr_pages > 0 and not (self.should_fail is not None and self.should_fail(gfp, 0)):
            for zones, share in self._bulk_shares(gfp, node, nr_pages):
                wanted = share
                for zone in zones:
                    wanted = self._rmqueue_bulk(zone, wanted, chunks)
                    if not wanted:
                        break
        if not chunks:
            return np.empty(0, dtype=np.int64)
        pfns = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        self._refcount[pfns] = 1
        if self.epoch:
            self._handed_out[pfns] = self.epoch
        if gfp & _ZERO or self.init_on_alloc:
            for start, end in consecutive_runs(pfns):
                self.memory.fill(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        return pfns

    def _bulk_shares(self, gfp: int, node: int, nr_pages: int) -> list[tuple[tuple[Zone, ...], int]]:
        if node != NUMA_NO_NODE or self.policy is None:
            return [(self._candidates(gfp, node), nr_pages)]
        return [(self._chosen(gfp, choice), share) for choice, share in self.policy.choose_bulk(gfp, nr_pages)]

    def _rmqueue(self, zone: Zone, order: int) -> int | None:
        """Take a block of `order` from the smallest order that has one; the unused upper halves go to the lists."""
        for current in range(order, NR_PAGE_ORDERS):
            blocks = zone.free_area[current]
            if blocks:
                pfn = blocks.popitem()[0]
                self._orders[pfn] = 0
            elif current == MAX_PAGE_ORDER and zone.runs:
                pfn = self._pop_run(zone, MAX_BLOCK)[0]
            else:
                continue
            while current > order:
                current -= 1
                self._add_to_free_list(zone, pfn + (1 << current), current)
            zone.nr_free -= 1 << order
            return pfn
        return None

    def _rmqueue_bulk(self, zone: Zone, wanted: int, chunks: list[Pfns]) -> int:
        """Append single frames to `chunks`; returns how many are still wanted."""
        got = min(wanted, zone.nr_free)
        zone.nr_free -= got
        left = got
        for order in range(NR_PAGE_ORDERS):
            blocks = zone.free_area[order]
            taken: list[int] = []
            while blocks and left >= 1 << order:
                taken.append(blocks.popitem()[0])
                left -= 1 << order
            if taken:
                heads = np.array(taken, dtype=np.int64)
                self._free_order[heads] = 0
                chunks.append((heads[:, None] + np.arange(1 << order, dtype=np.int64)).reshape(-1))
            if blocks:
                break
        while left >= MAX_BLOCK and zone.runs and not zone.free_area[MAX_PAGE_ORDER]:
            start, end = self._pop_run(zone, left)
            chunks.append(np.arange(start, end, dtype=np.int64))
            left -= end - start
        zone.nr_free += left
        singles: list[int] = []
        for _ in range(left):
            pfn = self._rmqueue(zone, 0)
            assert pfn is not None, "the zone counted this frame as free"
            singles.append(pfn)
        if singles:
            chunks.append(np.array(singles, dtype=np.int64))
        return wanted - got

    @staticmethod
    def _pop_run(zone: Zone, limit: int) -> tuple[int, int]:
        """Take whole largest blocks, at most `limit` frames, from the lowest run."""
        start, end = zone.runs[0]
        taken_end = min(end, start + limit // MAX_BLOCK * MAX_BLOCK)
        if taken_end == end:
            del zone.runs[0]
        else:
            zone.runs[0] = (taken_end, end)
        return start, taken_end

    # Freeing and references

    def free_pages(self, pfn: int, order: int = 0) -> None:
        """Drop the reference on the block's first frame and free the block when it was the last.

        Raises ValueError when the frame is not in RAM, not allocated, or not aligned to the order.
        """
        self._check_free(pfn, order)
        self._refs[pfn] -= 1
        if not self._refs[pfn]:
            self._compound_order.pop(pfn, None)
            self._free_one_page(self._zone_of(pfn), pfn, order)

    def free_pages_bulk(self, pfns: Pfns) -> None:
        """put_page of many different single frames at once.

        Raises ValueError, and changes nothing, when one is repeated, not in RAM or not allocated.
        """
        if not len(pfns):
            return
        ordered = np.sort(pfns)
        if ordered[0] < 0 or ordered[-1] >= self.max_pfn:
            raise ValueError(f"frame {int(ordered[0] if ordered[0] < 0 else ordered[-1]):#x} is not in RAM")
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError("a frame occurs twice among those to free")
        references = self._refcount[ordered]
        if (references <= 0).any():
            raise ValueError(f"frame {int(ordered[references <= 0][0]):#x} is not allocated")
        if self._compound_order:
            heads = np.fromiter(self._compound_order, dtype=np.int64, count=len(self._compound_order))
            heads = heads[np.isin(heads, ordered)]
            if len(heads):
                ordered = ordered[~np.isin(ordered, heads)]
                references = self._refcount[ordered]
                for pfn in heads.tolist():
                    self.put_page(pfn)
        self._refcount[ordered] = references - 1
        for start, end in consecutive_runs(ordered[references == 1]):
            while start < end:
                zone = self._zone_of(start)
                zone_end = min(end, zone.end_pfn)
                for pfn, order in aligned_blocks(start, zone_end):
                    self._free_one_page(zone, pfn, order)
                start = zone_end

    def _check_free(self, pfn: int, order: int) -> None:
        if not 0 <= pfn < self.max_pfn:
            raise ValueError(f"frame {pfn:#x} is not in RAM")
        if not 0 <= order <= MAX_PAGE_ORDER or pfn & ((1 << order) - 1):
            raise ValueError(f"frame {pfn:#x} is not the start of a block of order {order}")
        if self._refs[pfn] <= 0:
            raise ValueError(f"frame {pfn:#x} is not allocated")

    def is_allocated_block(self, pfn: int, order: int) -> bool:
        """Whether 2^order frames from `pfn` may be freed as one block: the first one is allocated, and the others are its tails."""
        if not 0 <= pfn < self.max_pfn or pfn & ((1 << order) - 1) or self._refs[pfn] <= 0:
            return False
        rest = slice(pfn + 1, pfn + (1 << order))
        if self._refcount[rest].any() or self._free_order[rest].any():
            return False
        return not any(start < pfn + (1 << order) and pfn < end for start, end in self._zone_of(pfn).runs)

    def _free_one_page(self, zone: Zone, pfn: int, order: int) -> None:
        zone.nr_free += 1 << order
        orders = self._orders
        while order < MAX_PAGE_ORDER:
            buddy = pfn ^ (1 << order)
            if not zone.start_pfn <= buddy < zone.end_pfn or orders[buddy] != order + 1:
                break
            del zone.free_area[order][buddy]
            orders[buddy] = 0
            pfn &= buddy
            order += 1
        self._add_to_free_list(zone, pfn, order)

    def _add_to_free_list(self, zone: Zone, pfn: int, order: int) -> None:
        zone.free_area[order][pfn] = None
        self._orders[pfn] = order + 1

    def split_page(self, pfn: int, order: int) -> None:
        """Make each frame of an allocated block of `order` its own, with one reference (not for __GFP_COMP blocks)."""
        self._check_free(pfn, order)
        if pfn in self._compound_order:
            raise ValueError(f"frame {pfn:#x} heads a compound page")
        self._refcount[pfn : pfn + (1 << order)] = self._refs[pfn]

    def get_page(self, pfn: int) -> None:
        """Take a reference. Raises ValueError when the frame is not allocated."""
        self._check_free(pfn, 0)
        self._refs[pfn] += 1

    def put_page(self, pfn: int) -> None:
        """Drop a reference; the last one frees the frame, or the compound page that it heads. ValueError as
        free_pages.
        """
        self.free_pages(pfn, self._compound_order.get(pfn, 0))

    def page_count(self, pfn: int) -> int:
        """References on a frame; 0 for a free frame and for the later frames of an unsplit block."""
        if not 0 <= pfn < self.max_pfn:
            raise ValueError(f"frame {pfn:#x} is not in RAM")
        return int(self._refs[pfn])

    def handed_out(self, pfn: int) -> int:
        """The epoch in which a frame was last handed out, 0 if `epoch` was 0 then."""
        return int(self._handed_out[pfn]) if 0 <= pfn < self.max_pfn else 0

    def is_free(self, pfn: int) -> bool:
        """Whether a frame is in a free block."""
        if any(self._orders[pfn & -(1 << order)] == order + 1 for order in range(NR_PAGE_ORDERS)):
            return True
        return any(start <= pfn < end for start, end in self._zone_of(pfn).runs)

    # Figures

    def totalram_pages(self) -> int:
        """Frames that the allocator manages: RAM without what boot reserved."""
        return sum(zone.managed_pages for zones in self.zones for zone in zones)

    def nr_free_pages(self, node: int | None = None) -> int:
        """Free frames of a node, or of all."""
        return sum(z.nr_free for zones in self.zones for z in zones if node is None or z.node == node)

    def free_counts(self, node: int | None = None) -> list[int]:
        """Free blocks by order, 0 to MAX_PAGE_ORDER, of a node or of all."""
        zones = [z for zones in self.zones for z in zones if node is None or z.node == node]
        return [sum(zone.nr_free_blocks(order) for zone in zones) for order in range(NR_PAGE_ORDERS)]

    def page_to_nid(self, pfn: int) -> int:
        """Node of a frame. Raises ValueError outside RAM."""
        return self._zone_of(pfn).node

    def validate(self) -> None:
        """States and asserts what must hold between any two calls."""
        listed = np.flatnonzero(self._free_order)
        seen = 0
        for zone in (zone for zones in self.zones for zone in zones):
            spans = [(start, end) for start, end in zone.runs]
            free = sum(end - start for start, end in spans)
            for order, blocks in enumerate(zone.free_area):
                for pfn in blocks:
                    assert zone.start_pfn <= pfn and pfn + (1 << order) <= zone.end_pfn, "a free block is in its zone"
                    assert pfn & ((1 << order) - 1) == 0, "a free block is aligned to its size"
                    assert self._orders[pfn] == order + 1, "the frame table knows each listed block"
                    buddy = pfn ^ (1 << order)
                    assert order == MAX_PAGE_ORDER or buddy not in blocks, "two free buddies have merged"
                    spans.append((pfn, pfn + (1 << order)))
                    free += 1 << order
                    seen += 1
            assert free == zone.nr_free, "the zone's count is the sum of its blocks"
            assert 0 <= zone.nr_free <= zone.managed_pages, "no more is free than is managed"
            spans.sort()
            for (_, end), (start, _) in pairwise(spans):
                assert end <= start, "free blocks do not overlap"
            for start, end in spans:
                assert not self._refcount[start:end].any(), "a free frame has no references"
        assert seen == len(listed), "the frame table knows no other blocks"
        assert (self._refcount[listed] == 0).all()
