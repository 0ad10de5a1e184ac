"""vmalloc and vfree: memory that is contiguous in kernel addresses only (v6.12 mm/vmalloc.c).

An allocation reserves an area, then gets the array of its pages, the pages, and maps them; what fails on the way is undone
through vfree, so its addresses become lazy rather than free. Every function returns the address of its memory, 0 for NULL.
Linux's names with leading underscores, which Python would mangle, appear without them: vmalloc_node_range is
__vmalloc_node_range, vmalloc_gfp is __vmalloc, vmalloc_node_align is __vmalloc_node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emu.kernel.gfp import GFP_KERNEL, GFP_RECLAIM, Gfp
from emu.kernel.init_64 import InitMm
from emu.kernel.layout import PMD_SHIFT, PMD_SIZE, PTRS_PER_TABLE, SIZEOF_STRUCT_PAGE
from emu.kernel.page_alloc import NUMA_NO_NODE, Pfns
from emu.kernel.purge import VmapSpace
from emu.kernel.set_memory import set_direct_map_default, set_direct_map_invalid
from emu.kernel.vm_struct import (
    VM_ALLOC,
    VM_ALLOW_HUGE_VMAP,
    VM_FLUSH_RESET_PERMS,
    VM_MAP_PUT_PAGES,
    VM_UNINITIALIZED,
    VM_USERMAP,
    Context,
    KernelReport,
    Slab,
    VmAreas,
    VmStruct,
)
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX

# A request to the bulk allocator is bounded, so that it does not hold the CPU for long (v6.12 vm_area_alloc_pages).
BULK_PAGES = 100
SIZEOF_POINTER = 8
# Where struct pglist_data has its zonelists: some pages from its start; the exact offset depends on the configuration.
NODE_ZONELISTS = 0x2000
# x86: shared mappings need no more than page alignment.
SHMLBA = PAGE_SIZE

_KERNEL = int(GFP_KERNEL)
_ZERO = int(Gfp.ZERO)
_NOWARN = int(Gfp.NOWARN)
_NOFAIL = int(Gfp.NOFAIL)
_HIGHMEM = int(Gfp.HIGHMEM)
_DMA_ZONES = int(Gfp.DMA | Gfp.DMA32)
_VMALLOC32 = int(Gfp.DMA32 | GFP_KERNEL)
# v6.12 mm/internal.h: GFP_RECLAIM_MASK.
_RECLAIM_MASK = int(
    GFP_RECLAIM
    | Gfp.HIGH
    | Gfp.IO
    | Gfp.FS
    | Gfp.NOWARN
    | Gfp.RETRY_MAYFAIL
    | Gfp.NOFAIL
    | Gfp.NORETRY
    | Gfp.MEMALLOC
    | Gfp.NOMEMALLOC
)
# Below this many pages the exact comparison with totalram_pages is spared: no machine that boots has less.
_SURELY_THERE = 64


class Vmalloc(VmAreas):
    """The vmalloc family of one kernel.

    `vmap_allow_huge` is false after the kernel parameter nohugevmalloc. `nr_vmalloc_pages` counts the pages that
    allocations hold (VmallocUsed). `init_on_alloc` and `init_on_free` are the kernel parameters of these names.
    `unmap_aliases(start, end, flush)` is _vm_unmap_aliases; the owner of the vmap blocks replaces it.
    """

    def __init__(
        self,
        space: VmapSpace,
        mm: InitMm,
        slab: Slab,
        report: KernelReport,
        context: Context,
    ) -> None:
        super().__init__(space, mm, slab, report, context)
        self.vmap_allow_huge = mm.profile.huge_vmalloc
        self.nr_vmalloc_pages = 0
        self.init_on_alloc = False
        self.init_on_free = False
        self.unmap_aliases: Callable[[int, int, bool], None] = self._purge_aliases
        # Head of the list of deferred frees, per CPU: addresses of memory that holds the next one in its first word.
        self._deferred: dict[int, int] = {}

    # Allocation

    def vmalloc_node_range(
        self,
        size: int,
        align: int,
        start: int,
        end: int,
        gfp: int,
        prot: int,
        vm_flags: int,
        node: int,
        caller: int = 0,
    ) -> int:
        """Allocate `size` bytes at `align` in [start, end), on `node` if it is not NUMA_NO_NODE.

        With VM_ALLOW_HUGE_VMAP sizes from 2 MiB (per online node where none is named) are tried with 2 MiB pages first.
        0 for size 0 (WARN_ON_ONCE), more than all memory, no address space or no memory. __GFP_NOFAIL tries for ever.
        Source: v6.12 __vmalloc_node_range_noprof.
        """
        size &= ULONG_MAX
        if not size:
            self.warn_once("__vmalloc_node_range")
            return 0
        if size >> PAGE_SHIFT > _SURELY_THERE and size >> PAGE_SHIFT > self.pages.totalram_pages():
            self._warn_alloc(gfp, f"vmalloc error: size {size}, exceeds total pages")
            return 0
        shift = PAGE_SHIFT
        real_align = align
        if vm_flags & VM_ALLOW_HUGE_VMAP and self.vmap_allow_huge:
            size_per_node = size // len(self.memory.nodes) if node == NUMA_NO_NODE else size
            if size_per_node >= PMD_SIZE:
                shift = PMD_SHIFT
            align = max(real_align, 1 << shift)
        flags = VM_ALLOC | VM_UNINITIALIZED | vm_flags
        while True:
            area = self.get_vm_area_node(size, align, shift, flags, start, end, node, gfp, caller)
            if area is None:
                nofail = gfp & _NOFAIL
                retrying = ". Retrying." if nofail else ""
                self._warn_alloc(gfp, f"vmalloc error: size {size}, vm_struct allocation failed{retrying}")
                if nofail:
                    self.context.schedule_timeout_uninterruptible(1)
                    continue
            elif self._vmalloc_area_node(area, gfp, prot, shift, node):
                area.flags &= ~VM_UNINITIALIZED
                return area.addr
            if shift == PAGE_SHIFT:
                return 0
            shift = PAGE_SHIFT
            align = real_align

    def _vmalloc_area_node(self, area: VmStruct, gfp: int, prot: int, page_shift: int, node: int) -> bool:
        """Give an area its pages and map them; false after undoing everything (v6.12 __vmalloc_area_node)."""
        nested_gfp = gfp & _RECLAIM_MASK | _ZERO
        nofail = gfp & _NOFAIL
        nr_small_pages = area.get_vm_area_size() >> PAGE_SHIFT
        array_size = nr_small_pages * SIZEOF_POINTER
        if not self._sharded:
            gfp |= _NOWARN
        if not gfp & _DMA_ZONES:
            gfp |= _HIGHMEM
        if array_size > PAGE_SIZE:
            area.pages_la = self.vmalloc_node_align(array_size, 1, nested_gfp, node, area.caller)
        else:
            area.pages_la = self.slab.kmalloc(array_size, nested_gfp, self.slab_node(node)) or 0
        if not area.pages_la:
            self._warn_alloc(
                gfp,
                f"vmalloc error: size {nr_small_pages * PAGE_SIZE}, "
                f"failed to allocated page array size {array_size}",
            )
            self.free_vm_area(area)
            return False
        order = area.page_order = page_shift - PAGE_SHIFT
        page_gfp = (gfp & ~_NOFAIL if order else gfp) | _NOWARN
        pages = area.pages = self._vm_area_alloc_pages(page_gfp, node, order, nr_small_pages)
        area.nr_pages = len(pages)
        self._store_page_array(area, pages)
        self.nr_vmalloc_pages += area.nr_pages
        if area.nr_pages != nr_small_pages:
            # A lack of large pages or a dying task is no news: the former falls back, the latter is expected.
            if not self.context.fatal_signal_pending and (not self._sharded or order == 0):
                page_order = "" if self._sharded else f"page order {order}, "
                size = area.nr_pages * PAGE_SIZE
                self._warn_alloc(gfp, f"vmalloc error: size {size}, {page_order}failed to allocate pages")
            self.vfree(area.addr)
            return False
        end = area.addr + (nr_small_pages << PAGE_SHIFT)
        while self.mm.vmap_pages_range_noflush(area.addr, end, prot, pages, page_shift) < 0:
            if not nofail:
                self._warn_alloc(gfp, f"vmalloc error: size {area.nr_pages * PAGE_SIZE}, failed to map pages")
                self.vfree(area.addr)
                return False
            self.context.schedule_timeout_uninterruptible(1)
        return True

    def _vm_area_alloc_pages(self, gfp: int, node: int, order: int, nr_pages: int) -> Pfns:
        """Up to `nr_pages` frames, in blocks of 2^order that are split; fewer when memory or the task ends."""
        pages = self.pages
        if node != NUMA_NO_NODE and self.slab_node(node) == NUMA_NO_NODE:
            # NODE_DATA() of a node that is not there is NULL, and the allocator reads its zonelists.
            self.context.load(NODE_ZONELISTS)
        if order == 0 and nr_pages == 1:
            # The bulk allocator hands a request for one page to the ordinary one.
            pfn = pages.alloc_pages(gfp, 0, node)
            return np.array(() if pfn is None else (pfn,), dtype=np.int64)
        chunks: list[Pfns] = []
        nr_allocated = 0
        while order == 0 and nr_allocated < nr_pages:
            wanted = min(BULK_PAGES, nr_pages - nr_allocated)
            got = pages.alloc_pages_bulk(gfp, node, wanted)
            chunks.append(got)
            nr_allocated += len(got)
            if len(got) != wanted:
                break
        while nr_allocated < nr_pages:
            if not gfp & _NOFAIL and self.context.fatal_signal_pending:
                break
            pfn = pages.alloc_pages(gfp, order, node)
            if pfn is None and gfp & _NOFAIL:
                # The page allocator itself does not come back before it has a page.
                self.context.schedule_timeout_uninterruptible(1)
                continue
            if pfn is None:
                break
            if order:
                pages.split_page(pfn, order)
            chunks.append(np.arange(pfn, pfn + (1 << order), dtype=np.int64))
            nr_allocated += 1 << order
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks or [np.empty(0, dtype=np.int64)])

    def _store_page_array(self, area: VmStruct, pages: Pfns) -> None:
        """Write vm->pages, the array of struct page pointers, where it stands: one kmalloc object or a nested area."""
        vmemmap = self.layout.vmemmap_start
        memory = self.memory
        nested = self.find_vm_area(area.pages_la) if self.is_vmalloc_addr(area.pages_la) else None
        if nested is None:
            pa = self.layout.pa(area.pages_la)
            if len(pages) == 1:
                memory.write_u64(pa, vmemmap + int(pages[0]) * SIZEOF_STRUCT_PAGE)
                return
            memory.view_u64(pa, len(pages))[:] = pages.astype(np.uint64) * np.uint64(SIZEOF_STRUCT_PAGE) + np.uint64(vmemmap)
            return
        pointers = pages.astype(np.uint64) * np.uint64(SIZEOF_STRUCT_PAGE) + np.uint64(vmemmap)
        assert nested.pages is not None, f"{nested!r} holds a page array and has no pages"
        for first, pfn in zip(range(0, len(pointers), PTRS_PER_TABLE), nested.pages.tolist(), strict=False):
            part = pointers[first : first + PTRS_PER_TABLE]
            memory.view_u64(pfn << PAGE_SHIFT, len(part))[:] = part

    def _warn_alloc(self, gfp: int, text: str) -> None:
        if not gfp & _NOWARN:
            self.report.warn_alloc(gfp, text)

    def vmalloc_node_align(self, size: int, align: int, gfp: int, node: int, caller: int = 0) -> int:
        """Anywhere in the vmalloc region with PAGE_KERNEL (Linux: __vmalloc_node)."""
        layout = self.layout
        prot = self.prots.kernel
        return self.vmalloc_node_range(
            size, align, layout.vmalloc_start, layout.vmalloc_end, gfp, prot, 0, node, caller
        )

    def _vmalloc_flags(self, size: int, align: int, gfp: int, vm_flags: int, caller: int) -> int:
        layout = self.layout
        prot = self.prots.kernel
        return self.vmalloc_node_range(
            size, align, layout.vmalloc_start, layout.vmalloc_end, gfp, prot, vm_flags, NUMA_NO_NODE, caller
        )

    def vmalloc_gfp(self, size: int, gfp: int, caller: int = 0) -> int:
        """With the caller's gfp flags (Linux: __vmalloc)."""
        return self.vmalloc_node_align(size, 1, gfp, NUMA_NO_NODE, caller)

    def vmalloc(self, size: int, caller: int = 0) -> int:
        """GFP_KERNEL memory, in 4 KiB pages."""
        return self.vmalloc_node_align(size, 1, _KERNEL, NUMA_NO_NODE, caller)

    def vzalloc(self, size: int, caller: int = 0) -> int:
        """Zeroed memory."""
        return self.vmalloc_node_align(size, 1, _KERNEL | _ZERO, NUMA_NO_NODE, caller)

    def vmalloc_node(self, size: int, node: int, caller: int = 0) -> int:
        """Memory preferably of `node`."""
        return self.vmalloc_node_align(size, 1, _KERNEL, node, caller)

    def vzalloc_node(self, size: int, node: int, caller: int = 0) -> int:
        """Zeroed memory preferably of `node`."""
        return self.vmalloc_node_align(size, 1, _KERNEL | _ZERO, node, caller)

    def vmalloc_user(self, size: int, caller: int = 0) -> int:
        """Zeroed memory that remap_vmalloc_range may map to user space."""
        return self._vmalloc_flags(size, SHMLBA, _KERNEL | _ZERO, VM_USERMAP, caller)

    def vmalloc_32(self, size: int, caller: int = 0) -> int:
        """Memory whose frames lie below 4 GiB."""
        return self.vmalloc_node_align(size, 1, _VMALLOC32, NUMA_NO_NODE, caller)

    def vmalloc_32_user(self, size: int, caller: int = 0) -> int:
        """Zeroed memory below 4 GiB that may be mapped to user space."""
        return self._vmalloc_flags(size, SHMLBA, _VMALLOC32 | _ZERO, VM_USERMAP, caller)

    def vmalloc_huge(self, size: int, gfp: int, caller: int = 0) -> int:
        """Memory in 2 MiB pages if it can be had, else in 4 KiB pages."""
        return self._vmalloc_flags(size, 1, gfp, VM_ALLOW_HUGE_VMAP, caller)

    def vmalloc_array(self, n: int, size: int, gfp: int = _KERNEL, caller: int = 0) -> int:
        """n * size bytes; 0 without a word if the product overflows (Linux: vmalloc_array, __vmalloc_array)."""
        return 0 if n * size > ULONG_MAX else self.vmalloc_gfp(n * size, gfp, caller)

    def vcalloc(self, n: int, size: int, gfp: int = _KERNEL, caller: int = 0) -> int:
        """n * size zeroed bytes; 0 without a word if the product overflows (Linux: vcalloc, __vcalloc)."""
        return self.vmalloc_array(n, size, gfp | _ZERO, caller)

    def vrealloc(self, la: int, size: int, gfp: int, caller: int = 0) -> int:
        """Change the size of vmalloc memory, in place if its pages suffice, else by moving it.

        Size 0 frees and returns 0; `la` 0 allocates. `la` stays valid when the new memory cannot be had. Shrinking keeps the
        pages. Source: v6.12 vrealloc_noprof.
        """
        size &= ULONG_MAX
        if not size:
            self.vfree(la)
            return 0
        vm: VmStruct | None = None
        alloced_size = old_size = 0
        if la:
            vm = self.find_vm_area(la)
            if vm is None:
                self.report.warn("vrealloc", f"Trying to vrealloc() nonexistent vm area ({la:016x})")
                return 0
            alloced_size = vm.get_vm_area_size()
            old_size = vm.requested_size
            if alloced_size < old_size:
                self.report.warn(
                    "vrealloc:size", f"vrealloc() has mismatched area vs requested sizes ({la:016x})"
                )
                return 0
        if vm is not None and size <= alloced_size:
            if size < old_size and (self.init_on_free or self.init_on_alloc or gfp & _ZERO):
                self._fill_zero(la + size, old_size - size)
            vm.requested_size = size
            return la
        new = self.vmalloc_gfp(size, gfp, caller)
        if new and la:
            self._copy(new, la, old_size)
            self.vfree(la)
        return new

    def _pieces(self, la: int, size: int) -> list[tuple[int, int]]:
        """The physical (address, length) pieces behind [la, la + size), within pages. Raises PageFault where nothing is mapped."""
        pieces = []
        while size > 0:
            length = min(size, PAGE_SIZE - la % PAGE_SIZE)
            pa = self.mm.to_pa(la)
            if pa is None:
                self.context.load(la & -SIZEOF_POINTER)
            else:
                pieces.append((pa, length))
            la += length
            size -= length
        return pieces

    def _fill_zero(self, la: int, size: int) -> None:
        for pa, length in self._pieces(la, size):
            self.memory.fill(pa, length)

    def _copy(self, to: int, source: int, size: int) -> None:
        data = b"".join(self.memory.read(pa, length) for pa, length in self._pieces(source, size))
        offset = 0
        for pa, length in self._pieces(to, size):
            self.memory.write(pa, data[offset : offset + length])
            offset += length

    # Freeing

    def vfree(self, la: int) -> None:
        """Free vmalloc memory by any address in its area that is page aligned; 0 is nothing.

        In interrupt it is deferred to a worker, in NMI a BUG. A bad pointer is a warning and frees nothing.
        Source: v6.12 vfree, v6.1 vfree, __vunmap.
        """
        if self.context.in_nmi and not self._sharded:
            self.report.bug("vfree")
            return
        if self.context.in_interrupt:
            self.vfree_atomic(la)
            return
        if not la:
            return
        vm = self.unlink_for_free(la, "vfree")
        if vm is None:
            return
        if vm.flags & VM_FLUSH_RESET_PERMS:
            self._vm_reset_perms(vm)
        if vm.pages is not None:
            self._free_page_references(vm.pages)
            # A drain that this free has queued runs here, before the array below becomes lazy.
            self.context.cond_resched()
        if not vm.flags & VM_MAP_PUT_PAGES:
            self.nr_vmalloc_pages -= vm.nr_pages
        if vm.pages_la:
            self.kvfree(vm.pages_la)
        self.slab.kfree(vm.la)

    def unlink_for_free(self, la: int, function: str) -> VmStruct | None:
        """remove_vm_area for vfree or vunmap (`function`), with the warnings that the version gives."""
        if self._sharded:
            vm = self.remove_vm_area(la)
            if vm is None:
                self.report.warn(function, f"Trying to {function}() nonexistent vm area ({la:016x})")
            return vm
        if la & (PAGE_SIZE - 1):
            self.report.warn("__vunmap:bad", f"Trying to vfree() bad address ({la:016x})")
            return None
        vm = self.find_vm_area(la)
        if vm is None:
            self.report.warn("__vunmap", f"Trying to vfree() nonexistent vm area ({la:016x})")
            return None
        return self.remove_vm_area(vm.addr)

    def _free_page_references(self, pfns: Pfns) -> None:
        """__free_page for each; a frame that somebody freed before is a bad page, and stays as it is."""
        pages = self.pages
        if len(pfns) >= 8:
            try:
                pages.free_pages_bulk(pfns)
                return
            except ValueError:
                # Nothing was freed: a frame is there twice, or free already. The frames are looked at one by one.
                pass
        for pfn in pfns.tolist():
            if pages.page_count(pfn) > 0:
                pages.put_page(pfn)
            else:
                self.report.printk(f"BUG: Bad page state  pfn:{pfn:05x}")

    def kvfree(self, la: int) -> None:
        """Free memory of vmalloc or kmalloc, whichever it is."""
        if self.layout.is_vmalloc_addr(la):
            self.vfree(la)
        elif la:
            self.slab.kfree(la)

    def _vm_reset_perms(self, vm: VmStruct) -> None:
        """Make the direct map of the area's frames default again, with no TLB keeping what the area allowed.

        The frames are unmapped there before the one flush, which covers both the area and its direct map.
        """
        start, end, flush = ULONG_MAX, 0, False
        frames = [] if vm.pages is None else vm.pages.tolist()
        for pfn in frames[:: 1 << vm.page_order]:
            la = self.layout.va(pfn << PAGE_SHIFT)
            start = min(start, la)
            end = max(end, la + (PAGE_SIZE << vm.page_order))
            flush = True
        for pfn in frames:
            set_direct_map_invalid(self.mm, pfn)
        self.unmap_aliases(start, end, flush)
        for pfn in frames:
            set_direct_map_default(self.mm, pfn)

    def _purge_aliases(self, start: int, end: int, flush: bool) -> None:
        with self.space.purge_lock:
            if not self.space.purge_vmap_area_lazy(start, end) and flush:
                self.space.tlb.flush_tlb_kernel_range(start, end, cause="_vm_unmap_aliases")

    def vfree_atomic(self, la: int) -> None:
        """Free vmalloc memory later, from a worker; allowed in any context but NMI (BUG).

        Overwrites the first word of the memory, which must be mapped: the list of waiting frees goes through it.
        """
        if self.context.in_nmi:
            self.report.bug("vfree_atomic")
            return
        if not la:
            return
        cpu = self.space.cpus.current
        head = self._deferred.get(cpu, 0)
        self.context.store(la, head)
        self._deferred[cpu] = la
        if not head:
            self.space.work.schedule_work(lambda: self._delayed_vfree_work(cpu))

    def _delayed_vfree_work(self, cpu: int) -> None:
        la = self._deferred.pop(cpu, 0)
        while la:
            following = self.context.load(la)
            self.vfree(la)
            la = following
