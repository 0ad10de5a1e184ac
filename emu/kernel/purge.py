"""Handing out ranges of kernel addresses, and taking them back lazily (v6.12 mm/vmalloc.c).

A freed area is unmapped at once, but other CPUs may still hold translations of it. So it waits among the lazy areas, where
no request can get it, until a purge flushes the TLBs once for all of them and makes them free again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from emu.kernel.kernel_cpu import TlbFlush
from emu.kernel.vmap_area import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ULONG_MAX,
    FreeVmapAreas,
    Report,
    VmapArea,
    VmapAreaCache,
    VmapAreaTree,
)
from emu.kernel.vmap_node import Cpus, VmapDesign, VmapNode, VmapNodes

_PURGE = "__purge_vmap_area_lazy"
EINVAL = 22
ENOMEM = 12
EBUSY = 16
GFP_NOWARN = 0x2000
# printk_ratelimit allows 10 lines in 5 s; no time passes inside a run, so the burst is all there is.
PRINTK_RATELIMIT_BURST = 10
LAZY_PAGES_PER_LOG = (32 << 20) >> PAGE_SHIFT

Tracepoint = Callable[[str, tuple[int, ...]], None]


class WorkQueue(Protocol):
    """Where work waits for a worker thread (Linux: schedule_work on system_wq)."""

    def schedule_work(self, work: Callable[[], None]) -> None:
        """Run `work` later, in process context."""


class PurgeNotifier(Protocol):
    """Frees address space when there is none left (Linux: register_vmap_purge_notifier)."""

    def __call__(self) -> int:
        """Free what can be freed; returns how much, in any unit: more than 0 makes the allocation try again."""


class VmapSpace:
    """The whole kernel address space by areas: free, busy, lazy and pooled.

    The free space at first is [1, ULONG_MAX) less what is busy already. `default_range` is [VMALLOC_START, VMALLOC_END],
    the upper bound inclusive as Linux defines it: only requests for exactly it are served from the size pools.
    """

    def __init__(
        self,
        design: VmapDesign,
        default_range: tuple[int, int],
        cpus: Cpus,
        tlb: TlbFlush,
        work: WorkQueue,
        report: Report,
    ) -> None:
        self.design = design
        self.vmalloc_start, self.vmalloc_end = default_range
        self.cpus = cpus
        self.tlb = tlb
        self.work = work
        self.report = report
        self.cache = VmapAreaCache()
        self.free = FreeVmapAreas(self.cache, report)
        self.nodes = VmapNodes(design, cpus.possible, self.cache, report)
        self.vmap_lazy_nr = 0
        # Before v5.8: what x86 does about top-level entries ahead of a purge; see InitMm.vmalloc_sync_unmappings.
        self.vmalloc_sync_unmappings: Callable[[], None] = lambda: None
        self.vmap_initialized = False
        self.tracepoint: Tracepoint | None = None
        self.notifiers: list[PurgeNotifier] = []
        self.purge_fragmented_blocks: Callable[[], None] | None = None
        # vmap_purge_lock: who flushes waits for other CPUs, and nobody else may purge meanwhile.
        self.purge_lock: AbstractContextManager[None] = nullcontext()
        self._drain_pending = False
        self._ratelimit_left = PRINTK_RATELIMIT_BURST

    def init_free_space(self, busy: list[VmapArea]) -> None:
        """Take the early areas as busy and the gaps between them as free (Linux: vmalloc_init, vmap_init_free_space)."""
        start = 1
        for va in sorted(busy, key=lambda area: area.va_start):
            self.nodes.addr_to_node(va.va_start).busy.insert(va)
            if va.va_start > start:
                self._add_free(start, va.va_start)
            start = va.va_end
        if start < ULONG_MAX:
            self._add_free(start, ULONG_MAX)
        self.vmap_initialized = True

    def _add_free(self, start: int, end: int) -> None:
        va = self.cache.alloc(0)
        if va is not None:
            va.va_start, va.va_end = start, end
            self.free.insert(va)

    def lazy_max_pages(self) -> int:
        """How many pages may be lazy before a purge is queued: 32 MiB times the bit length of the number of CPUs."""
        return self.cpus.online.bit_length() * LAZY_PAGES_PER_LOG

    def alloc_vmap_area(
        self, size: int, align: int, vstart: int, vend: int, gfp: int = 0, va_flags: int = 0, vm: object | None = None
    ) -> VmapArea | int:
        """Reserve `size` bytes at `align` in [vstart, vend); returns the busy area, or a negative errno.

        -EINVAL for a size that is 0 or no multiple of the page or an align that is no power of two (up to v6.8: BUG), -EBUSY
        too early or without room after a purge and the notifiers, -ENOMEM without a descriptor.
        Source: v6.12 alloc_vmap_area.
        """
        if size <= 0 or size & (PAGE_SIZE - 1) or align <= 0 or align & (align - 1):
            if not self.design.sharded:
                self.report.bug("alloc_vmap_area")
            return -EINVAL
        if not self.vmap_initialized:
            return -EBUSY
        nodes = self.nodes
        cpu = self.cpus.current
        va: VmapArea | None = None
        addr = vend
        if nodes.nr > 1 and vstart == self.vmalloc_start and vend == self.vmalloc_end:
            node_id = cpu % nodes.nr
            va = nodes.nodes[node_id].pool_del(size, align, vstart, vend, self.report)
            va_flags |= (node_id + 1) << 8
            if va is not None:
                addr = va.va_start
        if va is None:
            va = self.cache.alloc(gfp)
            if va is None:
                return -ENOMEM
        if addr == vend:
            addr = self._alloc_from_free(size, align, vstart, vend, cpu, gfp)
            if addr == vend:
                self.cache.free(va)
                return -EBUSY
        elif self.tracepoint is not None:
            self.tracepoint("alloc_vmap_area", (addr, size, align, vstart, vend, 0))
        va.va_start = addr
        va.va_end = addr + size
        va.flags = va_flags
        va.vm = vm
        nodes.nodes[addr // nodes.zone_size % nodes.nr].busy.insert(va)
        return va

    def _alloc_from_free(self, size: int, align: int, vstart: int, vend: int, cpu: int, gfp: int) -> int:
        """An address from the free tree, purging and notifying while that may help; `vend` if there is none."""
        free = self.free
        purged = False
        while True:
            if cpu not in free.spare:
                free.preload(cpu, gfp)
            addr = free.alloc(size, align, vstart, vend, cpu)
            if self.tracepoint is not None:
                self.tracepoint("alloc_vmap_area", (addr, size, align, vstart, vend, int(addr == vend)))
            if addr != vend:
                return addr
            if not purged:
                self.reclaim_and_purge()
                purged = True
                continue
            if sum(notifier() for notifier in self.notifiers) > 0:
                purged = False
                continue
            if not gfp & GFP_NOWARN and self._ratelimit_left > 0:
                self._ratelimit_left -= 1
                self.report.printk(self._exhausted_text(size, vstart, vend))
            return vend

    def _exhausted_text(self, size: int, vstart: int, vend: int) -> str:
        if self.design.sharded:
            return (
                f"vmalloc_node_range for size {size} failed: "
                f"Address range restricted to {vstart:#x} - {vend:#x}"
            )
        return f"vmap allocation for size {size} failed: use vmalloc=<size> to increase size"

    def free_vmap_area(self, va: VmapArea) -> None:
        """Free a busy area directly: only right while no CPU can hold a translation of it."""
        self.nodes.addr_to_node(va.va_start).busy.unlink(va)
        self.free.merge_or_add(va)

    def free_vmap_area_noflush(self, va: VmapArea) -> None:
        """Add an unmapped area to the lazy ones; queues the drain above lazy_max_pages.

        The area is in no container; up to v6.8 it is still busy and unlinked here.
        """
        nodes = self.nodes
        if self.design.merges_lazy:
            nodes.nodes[0].busy.unlink(va)
        elif va.list_next is not None:
            self.report.warn("free_vmap_area_noflush")
            return
        va_start = va.va_start
        self.vmap_lazy_nr += (va.va_end - va_start) >> PAGE_SHIFT
        nr_lazy = self.vmap_lazy_nr
        if self.design.merges_lazy:
            nodes.nodes[0].lazy.merge_or_add(va)
        else:
            owner = nodes.owner(va)
            (nodes.addr_to_node(va_start) if owner is None else owner).lazy.insert(va)
        lazy_max = self.lazy_max_pages()
        if self.tracepoint is not None:
            self.tracepoint("free_vmap_area_noflush", (va_start, nr_lazy, lazy_max))
        if nr_lazy > lazy_max and not self._drain_pending:
            self._drain_pending = True
            self.work.schedule_work(self.drain)

    def drain(self) -> None:
        """The work item queued above lazy_max_pages (Linux: drain_vmap_area_work)."""
        self._drain_pending = False
        with self.purge_lock:
            self.purge_vmap_area_lazy(ULONG_MAX, 0)
        while self.design.drain_rechecks and self.vmap_lazy_nr > self.lazy_max_pages():
            with self.purge_lock:
                self.purge_vmap_area_lazy(ULONG_MAX, 0)

    def reclaim_and_purge(self) -> None:
        """Get back all that can be had: fragmented blocks, lazy areas, pools (Linux: reclaim_and_purge_vmap_areas)."""
        with self.purge_lock:
            if self.purge_fragmented_blocks is not None:
                self.purge_fragmented_blocks()
            self.purge_vmap_area_lazy(ULONG_MAX, 0, full_pool_decay=True)

    def purge_vmap_area_lazy(self, start: int, end: int, full_pool_decay: bool = False) -> bool:
        """Flush the TLBs once for [start, end) and all lazy areas, and free these; false if there were none.

        Then nothing was flushed either. The caller holds `purge_lock`. Source: __purge_vmap_area_lazy of v6.1 and v6.12.
        """
        if self.design.merges_lazy:
            return self._purge_merged(start, end)
        purge_nodes: list[VmapNode] = []
        for node in self.nodes.nodes:
            node.skip_populate = full_pool_decay
            if node.pool:
                self._decay_pools(node, full_pool_decay)
            if node.lazy.rb_node is None:
                continue
            node.purge_list = node.lazy.detach()
            start = min(start, node.purge_list[0].va_start)
            end = max(end, node.purge_list[-1].va_end)
            purge_nodes.append(node)
        nr_purged_areas = 0
        if purge_nodes:
            self.tlb.flush_tlb_kernel_range(start, end, cause=_PURGE)
            helpers = max(1, min(self.vmap_lazy_nr // self.lazy_max_pages(), len(purge_nodes))) - 1
            # The first `helpers` nodes go to workers, which begin when this CPU waits for them.
            for node in (*purge_nodes[helpers:], *purge_nodes[:helpers]):
                self._purge_node(node)
                nr_purged_areas += node.nr_purged
        if self.tracepoint is not None:
            self.tracepoint("purge_vmap_area_lazy", (start, end, nr_purged_areas))
        return nr_purged_areas > 0

    def _purge_merged(self, start: int, end: int) -> bool:
        lazy = self.nodes.nodes[0].lazy
        if lazy.rb_node is None:
            return False
        areas = lazy.detach()
        self.vmalloc_sync_unmappings()
        self.tlb.flush_tlb_kernel_range(min(start, areas[0].va_start), max(end, areas[-1].va_end), cause=_PURGE)
        for va in areas:
            nr_pages = (va.va_end - va.va_start) >> PAGE_SHIFT
            if self.free.merge_or_add(va) is not None:
                self.vmap_lazy_nr -= nr_pages
        return True

    def _purge_node(self, node: VmapNode) -> None:
        """Free the areas on a node's purge list, to its pools or to the free tree (Linux: purge_vmap_node)."""
        areas, node.purge_list = node.purge_list, []
        to_global: list[VmapArea] = []
        nr_purged_pages = 0
        for va in areas:
            nr_purged_pages += (va.va_end - va.va_start) >> PAGE_SHIFT
            if self.nodes.owner(va) is not None and not node.skip_populate and node.pool_add(va):
                continue
            to_global.append(va)
        node.nr_purged = len(areas)
        self.vmap_lazy_nr -= nr_purged_pages
        for va in reversed(to_global):
            self.free.merge_or_add(va)

    def _decay_pools(self, node: VmapNode, full_decay: bool) -> None:
        """Give a quarter of each pool back to the free tree, or all of it (Linux: decay_va_pool_node).

        A pool of fewer than 4 is emptied: v6.12 counts a quarter of 0 down past 0.
        """
        decayed = VmapAreaTree(self.cache, self.report)
        for index in sorted(node.pool):
            pool = node.pool[index]
            n_decay = len(pool) >> 2
            if full_decay or n_decay == 0:
                n_decay = len(pool)
            for _ in range(n_decay):
                decayed.merge_or_add(pool.popleft())
            if not pool:
                del node.pool[index]
        for va in decayed.detach():
            self.free.merge_or_add(va)

    def validate(self) -> None:
        """The trees are sound, and free, busy, lazy and pooled areas cover [1, ULONG_MAX) exactly once.

        vmap_lazy_nr is the number of lazy pages. The cache counts every descriptor, and the spares.
        """
        self.free.validate()
        self.nodes.validate()
        areas = list(self.free)
        lazy = 0
        for node in self.nodes.nodes:
            areas += node.busy
            areas += node.lazy
            areas += node.pooled()
            lazy += sum(va.va_end - va.va_start for va in node.lazy)
        assert lazy >> PAGE_SHIFT == self.vmap_lazy_nr, f"{lazy >> PAGE_SHIFT} lazy pages, {self.vmap_lazy_nr} counted"
        areas.sort(key=lambda va: va.va_start)
        end = 1
        for va in areas:
            assert va.va_start == end, f"{va} does not start where its lower neighbour ends, {end:#x}"
            end = va.va_end
        assert end == ULONG_MAX, f"the areas end at {end:#x}"
        descriptors = len(areas) + len(self.free.spare)
        assert self.cache.live == descriptors, f"{self.cache.live} descriptors for {descriptors}"
