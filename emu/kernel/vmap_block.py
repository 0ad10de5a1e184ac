"""vm_map_ram: short-lived mappings from per-CPU blocks of address space (v6.12 mm/vmalloc.c, "Per cpu kva allocator").

Up to 64 pages come from a vmap_block, a vmap_area without a vm_struct that is handed out from the bottom up and never twice:
a freed piece is dirty until the whole block is purged. Larger requests have an area of their own.
"""

from __future__ import annotations

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.page_alloc import NUMA_NO_NODE, Pfns
from emu.kernel.vmalloc import Vmalloc
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, VMAP_BLOCK, VMAP_RAM, VmapArea

VMAP_MAX_ALLOC = 64
# VMALLOC_PAGES / roundup_pow_of_two(NR_CPUS) / 16 of a kernel built for 8192 CPUs; 1 MiB.
VMAP_BBMAP_BITS = 256
VMAP_BLOCK_SIZE = VMAP_BBMAP_BITS << PAGE_SHIFT
VMAP_PURGE_THRESHOLD = VMAP_BBMAP_BITS // 4
SIZEOF_VMAP_BLOCK = 192

_GFP_KERNEL = int(GFP_KERNEL)


class VmapBlock:
    """A block of VMAP_BBMAP_BITS pages: the first ones handed out, the last `free` untouched (Linux: struct vmap_block).

    `dirty` counts freed pages; [dirty_min, dirty_max) is the page range that still needs a flush. `used_map` has a bit for
    each page in use.
    """

    __slots__ = ("cpu", "dirty", "dirty_max", "dirty_min", "free", "la", "used_map", "va")

    def __init__(self, va: VmapArea, la: int, cpu: int, order: int) -> None:
        self.va = va
        self.la = la
        self.cpu = cpu
        self.free = VMAP_BBMAP_BITS - (1 << order)
        self.dirty = 0
        self.dirty_min = VMAP_BBMAP_BITS
        self.dirty_max = 0
        self.used_map = (1 << (1 << order)) - 1

    @property
    def fragmented(self) -> bool:
        """Nothing is in use, and yet it is not all dirty."""
        return self.free + self.dirty == VMAP_BBMAP_BITS and self.dirty != VMAP_BBMAP_BITS


def get_order(size: int) -> int:
    """log2 of the pages that hold `size` bytes, rounded up; 52 for 0, as Linux's arithmetic has it."""
    return ((size - 1 & ULONG_MAX) >> PAGE_SHIFT).bit_length()


def _bad_address(la: int, start: int, end: int) -> str:
    """Which of vm_unmap_ram's conditions an address breaks first."""
    if not la:
        return "!addr"
    if la < start:
        return "addr < VMALLOC_START"
    return "addr > VMALLOC_END" if la > end else "!PAGE_ALIGNED(addr)"


class VmapBlocks:
    """The blocks of all CPUs, and the areas that vm_map_ram takes beyond 64 pages."""

    def __init__(self, vmalloc: Vmalloc) -> None:
        self.vmalloc = vmalloc
        self.space = vmalloc.space
        self._sharded = self.space.design.sharded
        possible = self.space.cpus.possible
        # Blocks with room, per CPU that made them, oldest first.
        self.free_list: list[dict[VmapBlock, None]] = [{} for _ in range(possible)]
        # By address: one index per CPU since v6.9 (6.12's is chosen by address, not by who made the block), one before.
        self.index: list[dict[int, VmapBlock]] = [{} for _ in range(possible if self._sharded else 1)]
        self.space.purge_fragmented_blocks = self.purge_fragmented_blocks_allcpus
        vmalloc.unmap_aliases = self.unmap_aliases
        vmalloc.mm.unmap_aliases = self.vm_unmap_aliases

    def _index_of(self, la: int) -> dict[int, VmapBlock]:
        return self.index[la // VMAP_BLOCK_SIZE % len(self.index)]

    def find_block(self, la: int) -> VmapBlock | None:
        """The block that `la` lies in, or None."""
        return self._index_of(la).get(la // VMAP_BLOCK_SIZE)

    # Mapping

    def vm_map_ram(self, pfns: Pfns, count: int, node: int = NUMA_NO_NODE) -> int:
        """Map `count` frames with PAGE_KERNEL; the address, or 0. Count 0: WARN and 0."""
        vmalloc = self.vmalloc
        size = count << PAGE_SHIFT
        if count <= VMAP_MAX_ALLOC:
            la = self._vb_alloc(size)
        else:
            flags = VMAP_RAM if self._sharded else 0
            va = self._alloc_area(size, PAGE_SIZE, flags)
            la = 0 if va is None else va.va_start
        if not la:
            return 0
        if vmalloc.vmap_pages_range(la, la + size, vmalloc.prots.kernel, pfns) < 0:
            self.vm_unmap_ram(la, count)
            return 0
        return la

    def _alloc_area(self, size: int, align: int, flags: int) -> VmapArea | None:
        space = self.space
        va = space.alloc_vmap_area(size, align, space.vmalloc_start, space.vmalloc_end, _GFP_KERNEL, flags)
        return None if isinstance(va, int) else va

    def _vb_alloc(self, size: int) -> int:
        if not size:
            self.vmalloc.report.warn("vb_alloc")
            return 0
        order = get_order(size)
        queue = self.free_list[self.space.cpus.current]
        for block in queue:
            if block.free < 1 << order:
                continue
            offset = VMAP_BBMAP_BITS - block.free
            block.free -= 1 << order
            block.used_map |= (1 << (1 << order)) - 1 << offset
            if not block.free:
                del queue[block]
            return block.va.va_start + (offset << PAGE_SHIFT)
        return self._new_vmap_block(order)

    def _new_vmap_block(self, order: int) -> int:
        vmalloc = self.vmalloc
        object_la = vmalloc.slab.kmalloc(SIZEOF_VMAP_BLOCK, _GFP_KERNEL, NUMA_NO_NODE)
        if not object_la:
            return 0
        flags = VMAP_RAM | VMAP_BLOCK if self._sharded else 0
        va = self._alloc_area(VMAP_BLOCK_SIZE, VMAP_BLOCK_SIZE, flags)
        if va is None:
            vmalloc.slab.kfree(object_la)
            return 0
        cpu = self.space.cpus.current
        block = VmapBlock(va, object_la, cpu, order)
        self._index_of(va.va_start)[va.va_start // VMAP_BLOCK_SIZE] = block
        self.free_list[cpu][block] = None
        return va.va_start

    # Unmapping

    def vm_unmap_ram(self, la: int, count: int) -> None:
        """Remove a mapping of vm_map_ram; the flush is owed until a purge or vm_unmap_aliases.

        BUG for 0, an address outside the vmalloc region or not page aligned.
        """
        vmalloc = self.vmalloc
        layout = vmalloc.layout
        if not layout.vmalloc_start <= la <= layout.vmalloc_end or la % PAGE_SIZE:
            vmalloc.report.bug("vm_unmap_ram", _bad_address(la, layout.vmalloc_start, layout.vmalloc_end))
            return
        if count <= VMAP_MAX_ALLOC:
            self._vb_free(la, count << PAGE_SHIFT)
            return
        va = vmalloc.nodes.find_unlink(la) if self._sharded else vmalloc.nodes.find(la)
        if va is not None:
            vmalloc.free_unmap_vmap_area(va)
        elif self._sharded:
            vmalloc.warn_once("vm_unmap_ram")
        else:
            vmalloc.report.bug("vm_unmap_ram:area")

    def _vb_free(self, la: int, size: int) -> None:
        vmalloc = self.vmalloc
        order = get_order(size)
        offset = la % VMAP_BLOCK_SIZE >> PAGE_SHIFT
        block = self.find_block(la)
        if block is None:
            # The kernel takes the lock of a block that is not there: a write to address 0.
            vmalloc.context.store(0, 1)
            return
        if not size:
            vmalloc.report.bug("__vunmap_range_noflush")
            return
        block.used_map &= ~((1 << (1 << order)) - 1 << offset)
        debt = vmalloc.mm.vunmap_range_noflush(la, la + size)
        if vmalloc.debug_pagealloc:
            debt.flush(self.space.tlb, "vb_free")
        block.dirty_min = min(block.dirty_min, offset)
        block.dirty_max = max(block.dirty_max, offset + (1 << order))
        block.dirty += 1 << order
        if block.dirty == VMAP_BBMAP_BITS:
            if block.free:
                vmalloc.report.bug("vb_free")
                return
            self._free_vmap_block(block)

    def _free_vmap_block(self, block: VmapBlock) -> None:
        va = block.va
        del self._index_of(va.va_start)[va.va_start // VMAP_BLOCK_SIZE]
        if self._sharded:
            self.vmalloc.nodes.addr_to_node(va.va_start).busy.unlink(va)
        self.space.free_vmap_area_noflush(va)
        self.vmalloc.slab.kfree(block.la)

    # Purging

    def _purge_fragmented_block(self, block: VmapBlock, purge_list: list[VmapBlock], force: bool) -> bool:
        if not block.fragmented or not (force or block.free < VMAP_PURGE_THRESHOLD):
            return False
        block.free = 0
        block.dirty = VMAP_BBMAP_BITS
        block.dirty_min, block.dirty_max = 0, VMAP_BBMAP_BITS
        del self.free_list[block.cpu][block]
        purge_list.append(block)
        return True

    def purge_fragmented_blocks_allcpus(self) -> None:
        """Make every block lazy in which nothing is in use."""
        for queue in self.free_list:
            purge_list: list[VmapBlock] = []
            for block in list(queue):
                self._purge_fragmented_block(block, purge_list, True)
            for block in purge_list:
                self._free_vmap_block(block)

    def vm_unmap_aliases(self) -> None:
        """Flush all that is unmapped but may still be in a TLB, at most one flush; none if there is nothing."""
        self.unmap_aliases(ULONG_MAX, 0, False)

    def unmap_aliases(self, start: int, end: int, flush: bool) -> None:
        """Flush dirty pieces of blocks, [start, end) if `flush`, and the lazy areas, all at once (_vm_unmap_aliases)."""
        if not self.space.vmap_initialized:
            return
        with self.space.purge_lock:
            purge_list: list[VmapBlock] = []
            for block in self._blocks_to_flush():
                if self._sharded and self._purge_fragmented_block(block, purge_list, False):
                    continue
                if not block.dirty_max or block.dirty == VMAP_BBMAP_BITS:
                    continue
                start = min(start, block.va.va_start + (block.dirty_min << PAGE_SHIFT))
                end = max(end, block.va.va_start + (block.dirty_max << PAGE_SHIFT))
                flush = True
                if self._sharded:
                    block.dirty_min, block.dirty_max = VMAP_BBMAP_BITS, 0
            for block in purge_list:
                self._free_vmap_block(block)
            if not self._sharded:
                self.purge_fragmented_blocks_allcpus()
            if not self.space.purge_vmap_area_lazy(start, end) and flush:
                self.space.tlb.flush_tlb_kernel_range(start, end, cause="_vm_unmap_aliases")

    def _blocks_to_flush(self) -> list[VmapBlock]:
        """All blocks by index; before v6.9 only those that still have room: full ones were forgotten."""
        if self._sharded:
            return [index[key] for index in self.index for key in sorted(index)]
        return [block for queue in self.free_list for block in queue]

    def validate(self) -> None:
        """Each block stands on its size and in one busy area; used, dirty and free pages make up the block.

        Used pages lie below the free ones; a block with room is in the queue of its CPU, a full one in none.
        """
        for index in self.index:
            for key, block in index.items():
                va = block.va
                assert va.va_start == key * VMAP_BLOCK_SIZE and va.va_end - va.va_start == VMAP_BLOCK_SIZE
                assert self.vmalloc.nodes.find(va.va_start) is va, f"{va} is not busy"
                assert block.used_map.bit_count() + block.dirty + block.free == VMAP_BBMAP_BITS
                assert block.used_map.bit_length() <= VMAP_BBMAP_BITS - block.free, "a used page in the free part"
                assert (block in self.free_list[block.cpu]) == (block.free > 0)
        assert sum(map(len, self.free_list)) <= sum(map(len, self.index))
