"""Per-CPU memory: alloc_percpu and free_percpu over chunks of one unit per CPU (v6.12 mm/percpu.c, mm/percpu-vm.c).

A pointer to per-CPU memory is no address: it is what GS adds its base to. The first chunk stands in the direct map; later ones
are congruent vmalloc areas from the top of the region down, whose pages are there only where something is allocated, in every
unit alike. Pages that became empty are given back by a worker, which keeps a few populated for atomic requests.

Within a chunk the lowest room that fits is taken; Linux's hints, which only speed up the same search, are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np

from emu.kernel.gfp import GFP_KERNEL, Gfp, gfpflags_allow_blocking
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.page_alloc import Pfns
from emu.kernel.pcpu_vm_areas import pcpu_free_vm_areas, pcpu_get_vm_areas
from emu.kernel.percpu_chunk import PcpuChunk
from emu.kernel.percpu_first_chunk import PCPU_MIN_UNIT_SIZE, STATIC_VARIABLES, PcpuAllocInfo
from emu.kernel.vmalloc import Vmalloc

PCPU_MIN_ALLOC_SIZE = 4
PCPU_SLOT_BASE_SHIFT = 5
PCPU_EMPTY_POP_PAGES_LOW = 2
PCPU_EMPTY_POP_PAGES_HIGH = 4
# Offset in struct page of the word that names the page's chunk.
PAGE_INDEX_OFFSET = 0x20
_ALLOWED_GFP = int(GFP_KERNEL | Gfp.NORETRY | Gfp.NOWARN)
_BALANCE_GFP = int(GFP_KERNEL | Gfp.NORETRY | Gfp.NOWARN)
_NOWARN, _HIGHMEM = int(Gfp.NOWARN), int(Gfp.HIGHMEM)
_WARN_LIMIT = 10
_MASK64 = (1 << 64) - 1
# What a chunk keeps beside its struct, where the kernel allocates it: alloc_map, bound_map, md_blocks, obj_exts.
CREATE_CHUNK_CALLS = (0x4E, 0x75, 0x92, 0x167)
_SIZEOF_PCPU_BLOCK_MD = 32


class PerCpu:
    """The per-CPU allocator of one kernel, over the first chunk that boot has embedded.

    `cpu_to_node(cpu)` says where a CPU's pages come from; `dump_stack` prints the caller's stack behind a failure;
    `callers` are the return addresses in pcpu_create_chunk of its four allocations.
    """

    def __init__(
        self, vmalloc: Vmalloc, info: PcpuAllocInfo, cpu_to_node: Callable[[int], int],
        dump_stack: Callable[[], None] = lambda: None, *, callers: tuple[int, ...] = (), caller: int = 0,
    ) -> None:
        self.vmalloc = vmalloc
        self.info = info
        self.cpu_to_node = cpu_to_node
        self.dump_stack = dump_stack
        self.callers = callers or (0,) * len(CREATE_CHUNK_CALLS)
        self.caller = caller
        self.unit_offsets = info.unit_offsets
        self.sidelined_slot = _size_to_slot(info.unit_size) + 1
        self.free_slot = self.sidelined_slot + 1
        self.to_depopulate_slot = self.free_slot + 1
        self.lists: list[list[PcpuChunk]] = [[] for _ in range(self.to_depopulate_slot + 1)]
        self._balancing = False
        self._atomic_failed = False
        self._warnings_left = _WARN_LIMIT
        self._pages_la = 0
        self.reserved_chunk = self._first_chunk(info.static_size, info.reserved_size)
        self.first_chunk = self._first_chunk(info.static_size + info.reserved_size, info.dyn_size)
        self._relocate(self.first_chunk, -1)
        self._fill_static()

    def _first_chunk(self, offset: int, size: int) -> PcpuChunk:
        start = offset % PAGE_SIZE
        base = self.info.base + offset - start
        return PcpuChunk(base, start, size, -(-(start + size) // PAGE_SIZE), immutable=True)

    def _fill_static(self) -> None:
        for cpu in self.unit_offsets:
            self.write_static("this_cpu_off", cpu, self.per_cpu_offset(cpu))
            self.write_static("cpu_number", cpu, cpu)
            self.write_static("numa_node", cpu, self.cpu_to_node(cpu))

    def write_static(self, name: str, cpu: int, value: int) -> None:
        """Set a static variable of a CPU. Raises KeyError for an unknown name."""
        offset, size = STATIC_VARIABLES[name]
        pa = self.vmalloc.layout.pa(self.per_cpu_offset(cpu) + offset)
        self.vmalloc.memory.write(pa, value.to_bytes(min(size, 8), "little"))

    # Addresses

    def per_cpu_offset(self, cpu: int) -> int:
        """__per_cpu_offset[cpu], which is also the CPU's GS base: __per_cpu_start is 0. Raises KeyError for no such CPU."""
        return self.info.base + self.unit_offsets[cpu]

    def per_cpu_ptr(self, ptr: int, cpu: int) -> int:
        """Linear address of a CPU's copy."""
        return ptr + self.per_cpu_offset(cpu) & _MASK64

    def this_cpu_ptr(self, ptr: int) -> int:
        """Linear address of the current CPU's copy."""
        return self.per_cpu_ptr(ptr, self.vmalloc.space.cpus.current)

    def _chunk_addr(self, chunk: PcpuChunk, cpu: int, page: int) -> int:
        return chunk.base_addr + self.unit_offsets[cpu] + (page << PAGE_SHIFT)

    def chunks(self) -> Iterator[PcpuChunk]:
        """Every chunk, those of the first one before the others."""
        yield self.reserved_chunk
        for chunks in self.lists:
            yield from chunks

    # Slots

    def _chunk_slot(self, chunk: PcpuChunk) -> int:
        if chunk.free_bytes < PCPU_MIN_ALLOC_SIZE:
            return 0
        return self._slot_of(chunk.contig_hint)

    def _slot_of(self, size: int) -> int:
        return self.free_slot if size == self.info.unit_size else _size_to_slot(size)

    def _move(self, chunk: PcpuChunk, slot: int, *, front: bool) -> None:
        if chunk.slot >= 0:
            self.lists[chunk.slot].remove(chunk)
        self.lists[slot].insert(0 if front else len(self.lists[slot]), chunk)
        chunk.slot = slot

    def _relocate(self, chunk: PcpuChunk, old: int) -> None:
        slot = self._chunk_slot(chunk)
        if chunk is not self.reserved_chunk and not chunk.isolated and (old != slot or chunk.slot < 0):
            self._move(chunk, slot, front=old < slot)

    def _reintegrate(self, chunk: PcpuChunk) -> None:
        if chunk.isolated:
            chunk.isolated = False
            self._relocate(chunk, -1)

    @property
    def nr_empty_pop_pages(self) -> int:
        """Empty populated pages in chunks that may be allocated from."""
        return sum(len(chunk.empty_populated()) for chunk in self.chunks() if not chunk.isolated and chunk.slot >= 0)

    # Allocation

    def alloc_percpu(self, size: int, align: int, gfp: int = int(GFP_KERNEL), *, reserved: bool = False) -> int:
        """`size` zeroed bytes for every CPU; a pointer to add a CPU's offset to, 0 on failure.

        At most 32 KiB and page alignment, else WARN and 0. A request that must not block gets populated pages only.
        Source: v6.12 pcpu_alloc_noprof.
        """
        atomic = not gfpflags_allow_blocking(gfp)
        warn = not gfp & _NOWARN
        align = max(align, PCPU_MIN_ALLOC_SIZE)
        wanted = size
        size = size + PCPU_MIN_ALLOC_SIZE - 1 & -PCPU_MIN_ALLOC_SIZE
        if not size or size > PCPU_MIN_UNIT_SIZE or align > PAGE_SIZE or align & align - 1:
            if warn:
                text = f"illegal size ({size if size else wanted}) or align ({align}) for percpu allocation"
                self.vmalloc.report.warn("pcpu_alloc", text)
            return 0
        found = self._find_room(size, align, gfp, atomic=atomic, reserved=reserved)
        if isinstance(found, str):
            return self._fail(size, align, found, atomic=atomic, warn=warn)
        chunk, off = found
        if not atomic:
            for first, end in chunk.runs(off >> PAGE_SHIFT, off + size + PAGE_SIZE - 1 >> PAGE_SHIFT, populated=False):
                if not self._populate(chunk, first, end, gfp & _ALLOWED_GFP):
                    self._free_area(chunk, off)
                    return self._fail(size, align, "failed to populate", atomic=atomic, warn=warn)
        if self.nr_empty_pop_pages < PCPU_EMPTY_POP_PAGES_LOW:
            self._schedule_balance()
        for cpu in self.unit_offsets:
            self._zero(self._chunk_addr(chunk, cpu, 0) + off, size)
        return chunk.base_addr + off - self.info.base

    def _find_room(self, size: int, align: int, gfp: int, *, atomic: bool, reserved: bool) -> tuple[PcpuChunk, int] | str:
        if reserved:
            off = self.reserved_chunk.find_block_fit(size, align, pop_only=atomic)
            if off < 0:
                return "alloc from reserved chunk failed"
            self.reserved_chunk.alloc_area(off, size)
            return self.reserved_chunk, off
        while True:
            for slot in range(self._slot_of(size), self.free_slot + 1):
                for chunk in tuple(self.lists[slot]):
                    off = chunk.find_block_fit(size, align, pop_only=atomic)
                    if off >= 0:
                        chunk.alloc_area(off, size)
                        self._relocate(chunk, slot)
                        self._reintegrate(chunk)
                        return chunk, off
            if atomic:
                return "atomic alloc failed, no space left"
            created = self._create_chunk(gfp & _ALLOWED_GFP)
            if created is None:
                return "failed to allocate new chunk"
            self._relocate(created, -1)

    def _fail(self, size: int, align: int, why: str, *, atomic: bool, warn: bool) -> int:
        if warn and self._warnings_left:
            text = f"percpu: allocation failed, size={size} align={align} atomic={int(atomic)}, {why}"
            self.vmalloc.report.printk(text)
            if not atomic:
                self.dump_stack()
            self._warnings_left -= 1
            if not self._warnings_left:
                self.vmalloc.report.printk("percpu: limit reached, disable warning")
        if atomic:
            self._atomic_failed = True
            self._schedule_balance()
        return 0

    def _zero(self, la: int, size: int) -> None:
        while size > 0:
            length = min(size, PAGE_SIZE - la % PAGE_SIZE)
            pa = self.vmalloc.mm.to_pa(la)
            assert pa is not None, f"per-CPU memory at {la:#x} is allocated but not mapped"
            self.vmalloc.memory.fill(pa, length)
            la += length
            size -= length

    # Freeing

    def free_percpu(self, ptr: int) -> None:
        """Free per-CPU memory; 0 is nothing. Raises PageFault for a pointer into no chunk, as the kernel does.

        As in Linux a pointer into an allocation frees its rest, and a second free goes unnoticed.
        """
        if not ptr:
            return
        addr = ptr + self.info.base & _MASK64
        chunk = self._addr_search(addr)
        if chunk is None:
            # The address has no struct page, and the kernel asks it for its chunk.
            self.vmalloc.context.load(PAGE_INDEX_OFFSET)
            return
        self._free_area(chunk, addr - chunk.base_addr)
        if not chunk.isolated and chunk.free_bytes == self.info.unit_size:
            if any(other is not chunk for other in self.lists[self.free_slot]):
                self._schedule_balance()
        elif self._should_reclaim(chunk):
            chunk.isolated = True
            self._move(chunk, self.to_depopulate_slot, front=True)
            self._schedule_balance()

    def _free_area(self, chunk: PcpuChunk, off: int) -> None:
        slot = self._chunk_slot(chunk)
        chunk.free_area(off)
        self._relocate(chunk, slot)

    def _addr_search(self, addr: int) -> PcpuChunk | None:
        for chunk in self.chunks():
            start = chunk.base_addr + chunk.start
            if start <= addr < start + chunk.size:
                return chunk
        return None

    def _should_reclaim(self, chunk: PcpuChunk) -> bool:
        if chunk.immutable:
            return False
        empty = len(chunk.empty_populated())
        if chunk.isolated:
            return empty > 0
        return self.nr_empty_pop_pages > PCPU_EMPTY_POP_PAGES_HIGH + empty and empty >= chunk.nr_pages // 4

    # Chunks and their pages

    def _metadata(self, size: int, gfp: int, caller: int) -> int:
        gfp |= int(Gfp.ZERO)
        if size <= PAGE_SIZE:
            return self.vmalloc.slab.kmalloc(size, gfp, -1) or 0
        return self.vmalloc.vmalloc_gfp(size, gfp, caller)

    def _create_chunk(self, gfp: int) -> PcpuChunk | None:
        unit = self.info.unit_size
        bits = unit // PCPU_MIN_ALLOC_SIZE
        blocks = unit // PAGE_SIZE
        chunk = PcpuChunk(0, 0, unit, blocks)
        sizes = (bits // 8, (bits + 64) // 8, blocks * _SIZEOF_PCPU_BLOCK_MD, bits * 8)
        for size, caller in zip(sizes, self.callers, strict=True):
            la = self._metadata(size, gfp, caller)
            if not la:
                self._free_metadata(chunk)
                return None
            chunk.metadata.append(la)
        offsets = [group.base_offset for group in self.info.groups]
        areas = [group.nr_units * unit for group in self.info.groups]
        vms = pcpu_get_vm_areas(self.vmalloc, offsets, areas, self.info.atom_size, self.caller)
        if vms is None:
            self._free_metadata(chunk)
            return None
        chunk.vms = vms
        chunk.base_addr = vms[0].addr - offsets[0]
        return chunk

    def _free_metadata(self, chunk: PcpuChunk) -> None:
        for la in reversed(chunk.metadata):
            self.vmalloc.kvfree(la)
        chunk.metadata = []

    def _destroy_chunk(self, chunk: PcpuChunk) -> None:
        pcpu_free_vm_areas(self.vmalloc, chunk.vms)
        self._free_metadata(chunk)

    def _populate(self, chunk: PcpuChunk, first: int, end: int, gfp: int) -> bool:
        """Give pages [first, end) of every unit frames of the CPU's node, and map them (pcpu_populate_chunk)."""
        if not self._pages_la:
            nr_units = sum(group.nr_units for group in self.info.groups)
            self._pages_la = self._metadata(nr_units * (self.info.unit_size >> PAGE_SHIFT) * 8, int(GFP_KERNEL), 0)
            if not self._pages_la:
                return False
        frames = self._alloc_pages(end - first, gfp)
        if frames is None:
            return False
        mm = self.vmalloc.mm
        for cpu, pfns in frames.items():
            start = self._chunk_addr(chunk, cpu, first)
            if mm.vmap_pages_range_noflush(start, start + (end - first << PAGE_SHIFT), self.vmalloc.prots.kernel, pfns) < 0:
                self._unmap(chunk, first, end)
                self._flush(chunk, first, end)
                for taken in frames.values():
                    self.vmalloc.pages.free_pages_bulk(taken)
                return False
        chunk.populated[first:end] = [True] * (end - first)
        return True

    def _alloc_pages(self, count: int, gfp: int) -> Mapping[int, Pfns] | None:
        pages = self.vmalloc.pages
        frames: dict[int, list[int]] = {}
        for cpu in self.unit_offsets:
            frames[cpu] = []
            for _ in range(count):
                pfn = pages.alloc_pages(gfp | _HIGHMEM, 0, self.cpu_to_node(cpu))
                if pfn is None:
                    for taken in frames.values():
                        for frame in taken:
                            pages.free_pages(frame)
                    return None
                frames[cpu].append(pfn)
        return {cpu: np.array(taken, dtype=np.int64) for cpu, taken in frames.items()}

    def _unmap(self, chunk: PcpuChunk, first: int, end: int) -> None:
        for cpu in self.unit_offsets:
            start = self._chunk_addr(chunk, cpu, first)
            # One flush for all units and ranges follows, before a frame of theirs can be mapped here again.
            self.vmalloc.mm.vunmap_range_noflush(start, start + (end - first << PAGE_SHIFT)).defer()

    def _flush(self, chunk: PcpuChunk, first: int, end: int) -> None:
        low = min(self.unit_offsets.values())
        high = max(self.unit_offsets.values())
        start = chunk.base_addr + low + (first << PAGE_SHIFT)
        last = chunk.base_addr + high + (end << PAGE_SHIFT)
        self.vmalloc.space.tlb.flush_tlb_kernel_range(start, last, cause="pcpu_post_unmap_tlb_flush")

    def _depopulate(self, chunk: PcpuChunk, first: int, end: int) -> None:
        """Unmap pages [first, end) of every unit and free the frames; the flush is the caller's (pcpu_depopulate_chunk)."""
        pages, mm = self.vmalloc.pages, self.vmalloc.mm
        frames = []
        for cpu in self.unit_offsets:
            for page in range(first, end):
                pa = mm.to_pa(self._chunk_addr(chunk, cpu, page))
                assert pa is not None, "a populated page is mapped"
                frames.append(pa >> PAGE_SHIFT)
        self._unmap(chunk, first, end)
        pages.free_pages_bulk(np.array(frames, dtype=np.int64))
        chunk.populated[first:end] = [False] * (end - first)

    # The worker

    def _schedule_balance(self) -> None:
        if not self._balancing:
            self._balancing = True
            self.vmalloc.space.work.schedule_work(self._balance_work)

    def _balance_work(self) -> None:
        self._balancing = False
        self._balance_free(empty_only=False)
        self._reclaim_populated()
        self._balance_populated()
        self._balance_free(empty_only=True)

    def _balance_free(self, *, empty_only: bool) -> None:
        """Destroy all free chunks but the first."""
        for chunk in tuple(self.lists[self.free_slot][1:]):
            if empty_only and chunk.empty_populated():
                continue
            self.lists[self.free_slot].remove(chunk)
            for first, end in chunk.runs(0, chunk.nr_pages, populated=True):
                # The areas are lazy once they are freed, so the purge will flush them.
                self._depopulate(chunk, first, end)
            self._destroy_chunk(chunk)

    def _reclaim_populated(self) -> None:
        """Give back the empty pages of isolated chunks, highest first, with one flush for each chunk."""
        waiting = self.lists[self.to_depopulate_slot]
        while waiting:
            chunk = waiting[0]
            low, high = chunk.nr_pages, 0
            reintegrate = False
            while empty := chunk.empty_populated():
                if self.nr_empty_pop_pages < PCPU_EMPTY_POP_PAGES_HIGH:
                    reintegrate = True
                    break
                end = empty[-1] + 1
                first = end - 1
                while first - 1 in empty:
                    first -= 1
                self._depopulate(chunk, first, end)
                low, high = min(low, first), max(high, end)
            if low < high:
                self._flush(chunk, low, high)
            if reintegrate or chunk.free_bytes == self.info.unit_size:
                self._reintegrate(chunk)
            else:
                self._move(chunk, self.sidelined_slot, front=False)

    def _balance_populated(self) -> None:
        """Populate pages ahead, for atomic requests: the fullest chunk's first, in a new chunk when all are full."""
        high = PCPU_EMPTY_POP_PAGES_HIGH
        while True:
            nr_to_pop = high if self._atomic_failed else max(0, high - self.nr_empty_pop_pages)
            self._atomic_failed = False
            for slot in range(self._slot_of(PAGE_SIZE), self.free_slot + 1):
                chunk = next((c for c in self.lists[slot] if not all(c.populated)), None)
                for first, end in chunk.runs(0, chunk.nr_pages, populated=False) if chunk is not None and nr_to_pop else ():
                    nr = min(end - first, nr_to_pop)
                    assert chunk is not None
                    nr_to_pop = nr_to_pop - nr if self._populate(chunk, first, first + nr, _BALANCE_GFP) else 0
                    if not nr_to_pop:
                        break
            if not nr_to_pop:
                return
            created = self._create_chunk(_BALANCE_GFP)
            if created is None:
                return
            self._relocate(created, -1)

    def validate(self) -> None:
        """Free and allocated ranges partition each chunk; exactly the populated pages are mapped; a chunk knows its list."""
        for chunk in self.chunks():
            spans = sorted([*chunk.free, *((off, off + size) for off, size in chunk.allocated.items())])
            assert spans[0][0] == chunk.start and spans[-1][1] == chunk.start + chunk.size, "the ranges span the chunk"
            assert all(a[1] == b[0] for a, b in pairwise(spans)), "the ranges adjoin"
            for cpu in self.unit_offsets if not chunk.immutable else ():
                for page, populated in enumerate(chunk.populated):
                    mapped = self.vmalloc.mm.to_pa(self._chunk_addr(chunk, cpu, page)) is not None
                    assert mapped == populated, f"page {page} of CPU {cpu}'s unit"
        for slot, chunks in enumerate(self.lists):
            for chunk in chunks:
                assert chunk.slot == slot, "a chunk knows its list"


def _size_to_slot(size: int) -> int:
    return max(size.bit_length() - PCPU_SLOT_BASE_SHIFT + 2, 1)
