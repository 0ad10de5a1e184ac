"""The containers of busy and lazily freed areas (v6.12 mm/vmalloc.c, struct vmap_node).

Since v6.9 busy and lazy areas are sharded into vmap_nodes, which have nothing to do with NUMA: a busy area is in the node
of its address, a lazy one in the node of the CPU that asked for it. With more than one node each keeps pools of purged
areas by size, from which that CPU is served before the free tree. Up to v6.8 there is one busy tree and one lazy tree,
which merges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from emu.kernel.profile import Profile
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, Report, VmapArea, VmapAreaCache, VmapAreaTree

# A pool for each size of 1 to 256 pages, guard page included.
MAX_VA_SIZE_PAGES = 256
MAX_VMAP_NODES = 128
# 64 KiB: consecutive zones belong to consecutive nodes (v6.12 vmap_init_nodes).
VMAP_ZONE_SIZE = 16 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class VmapDesign:
    """What distinguishes the kernel versions in the handling of areas.

    sharded: busy and lazy areas live in vmap_nodes with size pools (v6.9). merges_lazy: the lazy tree joins areas that
    touch, and a purge returns them in ascending order (up to v6.8); otherwise each area is returned as it was freed, in
    descending order per node. drain_rechecks: the drain work repeats while more than lazy_max_pages are lazy.
    """

    sharded: bool
    merges_lazy: bool
    drain_rechecks: bool


V6_12 = VmapDesign(sharded=True, merges_lazy=False, drain_rechecks=False)
V6_1 = VmapDesign(sharded=False, merges_lazy=True, drain_rechecks=True)


def design_of(profile: Profile) -> VmapDesign:
    """The handling of areas in a kernel version."""
    return V6_12 if profile.max_vmap_nodes else V6_1


class Cpus(Protocol):
    """How many CPUs there are, and which one runs the caller."""

    @property
    def current(self) -> int:
        """Number of the CPU that executes now (Linux: raw_smp_processor_id)."""

    @property
    def online(self) -> int:
        """Number of online CPUs."""

    @property
    def possible(self) -> int:
        """Number of possible CPUs."""


class VmapNode:
    """One shard: busy areas, lazily freed areas, and the pools of areas ready for use (Linux: struct vmap_node)."""

    __slots__ = ("busy", "id", "lazy", "nr_purged", "pool", "purge_list", "skip_populate")

    def __init__(self, node_id: int, cache: VmapAreaCache, report: Report) -> None:
        self.id = node_id
        self.busy = VmapAreaTree(cache, report)
        self.lazy = VmapAreaTree(cache, report)
        # Index: pages - 1. The left end of a deque is the head of Linux's list.
        self.pool: dict[int, deque[VmapArea]] = {}
        self.skip_populate = False
        self.purge_list: list[VmapArea] = []
        self.nr_purged = 0

    def pool_add(self, va: VmapArea) -> bool:
        """Put a purged area at the head of the pool of its size; false if it is too large (Linux: node_pool_add_va)."""
        index = (va.va_end - va.va_start - 1) >> PAGE_SHIFT
        if index >= MAX_VA_SIZE_PAGES:
            return False
        pool = self.pool.get(index)
        if pool is None:
            pool = self.pool[index] = deque()
        pool.appendleft(va)
        return True

    def pool_del(self, size: int, align: int, vstart: int, vend: int, report: Report) -> VmapArea | None:
        """Take an area of exactly `size` bytes, or None (Linux: node_pool_del_va).

        Only the head is looked at: if it is misaligned it moves to the tail and the caller gets nothing.
        """
        pool = self.pool.get((size - 1) >> PAGE_SHIFT)
        if not pool:
            return None
        va = pool[0]
        if va.va_start & (align - 1):
            pool.rotate(-1)
            return None
        if va.va_end - va.va_start != size or va.va_start < vstart or va.va_end > vend:
            report.warn("node_pool_del_va")
            return None
        return pool.popleft()

    def pooled(self) -> Iterator[VmapArea]:
        """Every pooled area, by size, head first."""
        for index in sorted(self.pool):
            yield from self.pool[index]


class VmapNodes:
    """All vmap_nodes, and the way from an address or an area to its node."""

    __slots__ = ("cache", "design", "nodes", "nr", "report", "zone_size")

    def __init__(self, design: VmapDesign, possible_cpus: int, cache: VmapAreaCache, report: Report) -> None:
        self.design = design
        self.cache = cache
        self.report = report
        self.nr = max(1, min(possible_cpus, MAX_VMAP_NODES)) if design.sharded else 1
        self.zone_size = VMAP_ZONE_SIZE if self.nr > 1 else 1
        self.nodes = [VmapNode(i, cache, report) for i in range(self.nr)]

    def addr_to_node(self, addr: int) -> VmapNode:
        """The node that a busy area starting at `addr` belongs to."""
        return self.nodes[addr // self.zone_size % self.nr]

    def encode_vn_id(self, node_id: int) -> int:
        """The bits of va->flags that name a node; an unknown node: WARN and none."""
        if node_id < self.nr:
            return (node_id + 1) << 8
        self.report.warn("encode_vn_id", f"Encode wrong node id ({node_id})")
        return 0

    def owner(self, va: VmapArea) -> VmapNode | None:
        """The node that va->flags name, or None (Linux: decode_vn_id, is_vn_id_valid)."""
        node_id = (va.flags >> 8) - 1
        if 0 <= node_id < self.nr:
            return self.nodes[node_id]
        if node_id >= 0:
            self.report.warn("decode_vn_id", f"Decode wrong node id ({node_id})")
        return None

    def find(self, addr: int) -> VmapArea | None:
        """The busy area that contains `addr`, or None (Linux: find_vmap_area)."""
        nodes = self.nodes
        nr = self.nr
        first = addr // self.zone_size % nr
        va = nodes[first].busy.find(addr)
        if va is None and nr > 1:
            for step in range(1, nr):
                va = nodes[(first + step) % nr].busy.find(addr)
                if va is not None:
                    break
        return va

    def find_unlink(self, addr: int) -> VmapArea | None:
        """As find, and take the area out of its busy tree (Linux: find_unlink_vmap_area)."""
        va = self.find(addr)
        if va is not None:
            self.addr_to_node(va.va_start).busy.unlink(va)
        return va

    def find_exceed_addr(self, addr: int) -> VmapArea | None:
        """The lowest busy area of all nodes that ends above `addr` (Linux: find_vmap_area_exceed_addr_lock)."""
        lowest = None
        for node in self.nodes:
            va = node.busy.find_exceed_addr(addr)
            if va is not None and (lowest is None or va.va_start < lowest.va_start):
                lowest = va
        return lowest

    def validate(self) -> None:
        """Every tree is sound; a busy area is in the node of its address; a pool holds areas of its size.

        Without shards there are no pools. No area is in two containers.
        """
        seen: set[int] = set()
        for node in self.nodes:
            node.busy.validate()
            node.lazy.validate()
            assert not node.purge_list, f"node {node.id}: areas left between lazy tree and free tree"
            for va in node.busy:
                assert self.addr_to_node(va.va_start) is node, f"{va} is in node {node.id}"
            assert self.nr > 1 or not node.pool, "pools without shards"
            for index, pool in node.pool.items():
                for va in pool:
                    assert va.va_end - va.va_start == (index + 1) << PAGE_SHIFT, f"{va} is in pool {index}"
            for va in (*node.busy, *node.lazy, *node.pooled()):
                assert id(va) not in seen, f"{va} is in two containers"
                seen.add(id(va))
