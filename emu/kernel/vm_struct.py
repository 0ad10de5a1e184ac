"""Named areas of kernel address space: struct vm_struct and what finds, makes and removes it (v6.12 mm/vmalloc.c).

A vm_struct hangs on a busy vmap_area. Its size includes the guard page that follows every area but those with VM_NO_GUARD.
"""

from __future__ import annotations

import errno
from enum import IntFlag
from typing import Protocol

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.init_64 import InitMm
from emu.kernel.page_alloc import NUMA_NO_NODE, Pfns
from emu.kernel.purge import VmapSpace
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Report, VmapArea

# x86-64: 1 GiB, the largest leaf that an ioremap may use (v6.12 include/linux/vmalloc.h, asm/pgtable_64_types.h).
IOREMAP_MAX_ORDER = 30
# sizeof(struct vm_struct) of the recorded kernels.
SIZEOF_VM_STRUCT = {(6, 12): 72, (6, 1): 64, (5, 4): 64}


class Vm(IntFlag):
    """vm->flags (v6.12 include/linux/vmalloc.h)."""

    IOREMAP = 0x1
    ALLOC = 0x2
    MAP = 0x4
    USERMAP = 0x8
    DMA_COHERENT = 0x10
    UNINITIALIZED = 0x20
    NO_GUARD = 0x40
    KASAN = 0x80
    FLUSH_RESET_PERMS = 0x100
    MAP_PUT_PAGES = 0x200
    ALLOW_HUGE_VMAP = 0x400
    SPARSE = 0x1000


# Plain ints for the hot path: an operation on an IntFlag costs as much as a tree insertion.
VM_IOREMAP = int(Vm.IOREMAP)
VM_ALLOC = int(Vm.ALLOC)
VM_USERMAP = int(Vm.USERMAP)
VM_UNINITIALIZED = int(Vm.UNINITIALIZED)
VM_NO_GUARD = int(Vm.NO_GUARD)
VM_FLUSH_RESET_PERMS = int(Vm.FLUSH_RESET_PERMS)
VM_MAP_PUT_PAGES = int(Vm.MAP_PUT_PAGES)
VM_ALLOW_HUGE_VMAP = int(Vm.ALLOW_HUGE_VMAP)
VM_SPARSE = int(Vm.SPARSE)
_GFP_KERNEL = int(GFP_KERNEL)


class Context(Protocol):
    """The context that the caller runs in, and its accesses to memory by linear address."""

    @property
    def in_interrupt(self) -> bool:
        """In hard or soft interrupt, NMI, or with bottom halves disabled."""

    @property
    def in_nmi(self) -> bool:
        """In an NMI handler."""

    @property
    def fatal_signal_pending(self) -> bool:
        """The current task is being killed."""

    def load(self, la: int) -> int:
        """Read the u64 at linear address `la` as this CPU does. Raises PageFault or NonCanonical."""

    def store(self, la: int, value: int) -> None:
        """Write the u64 at linear address `la` as this CPU does. Raises PageFault or NonCanonical."""

    def schedule_timeout_uninterruptible(self, ticks: int) -> None:
        """Let others run before a __GFP_NOFAIL allocation is tried again."""

    def cond_resched(self) -> None:
        """Let a worker run that waits for this CPU."""


class KernelReport(Report, Protocol):
    """Report, and the message of a failed allocation."""

    def warn_alloc(self, gfp: int, text: str) -> None:
        """warn_alloc(): "COMM: TEXT, mode:..." with stack and memory state, at most once in 10 s (v6.12 mm/page_alloc.c).

        Not called with __GFP_NOWARN.
        """


class Slab(Protocol):
    """Small objects in the direct map."""

    def kmalloc(self, size: int, gfp: int, node: int) -> int | None:
        """Linear address of `size` bytes, or None."""

    def kfree(self, la: int) -> None:
        """Give an object back."""


class VmStruct:
    """A named area (Linux: struct vm_struct).

    `size` in bytes with the guard page; `pages` the frames by 4 KiB page, None for what the area does not own;
    `pages_la` the linear address of Linux's array of them; `caller` a return address in kernel text, 0 for none; `la` where
    the descriptor itself stands.
    """

    __slots__ = (
        "addr",
        "caller",
        "flags",
        "la",
        "nr_pages",
        "page_order",
        "pages",
        "pages_la",
        "phys_addr",
        "requested_size",
        "size",
    )

    def __init__(self, flags: int, caller: int, requested_size: int, la: int) -> None:
        self.addr = 0
        self.size = 0
        self.flags = flags
        self.caller = caller
        self.requested_size = requested_size
        self.la = la
        self.pages: Pfns | None = None
        self.pages_la = 0
        self.nr_pages = 0
        self.page_order = 0
        self.phys_addr = 0

    def __repr__(self) -> str:
        return f"VmStruct({self.addr:#x}-{self.addr + self.size:#x}, {Vm(self.flags)!r}, nr_pages={self.nr_pages})"

    def get_vm_area_size(self) -> int:
        """Bytes of the area without its guard page."""
        return self.size if self.flags & VM_NO_GUARD else self.size - PAGE_SIZE


class VmAreas:
    """The areas of one kernel, over its address space and init_mm's page tables.

    `debug_pagealloc` flushes at every unmapping, as the kernel parameter debug_pagealloc=on does.
    """

    def __init__(
        self,
        space: VmapSpace,
        mm: InitMm,
        slab: Slab,
        report: KernelReport,
        context: Context,
    ) -> None:
        self.space = space
        self.nodes = space.nodes
        self.mm = mm
        self.pages = mm.pages
        self.memory = mm.memory
        self.slab = slab
        self.report = report
        self.context = context
        self.profile = mm.profile
        self.layout = mm.layout
        self.prots = mm.prots
        self.debug_pagealloc = False
        self._sharded = space.design.sharded
        self.vm_struct_size = SIZEOF_VM_STRUCT[mm.profile.version]
        self._nr_nodes = len(mm.memory.nodes)
        self._warned: set[str] = set()
        self._vmlist: list[VmStruct] = []

    def warn_once(self, site: str, text: str = "") -> None:
        """WARN_ON_ONCE and WARN_ONCE: the first time only."""
        if site not in self._warned:
            self._warned.add(site)
            self.report.warn(site, text)

    def slab_node(self, node: int) -> int:
        """The node to take a small object from: SLUB takes any where there is no such node (v6.12 mm/slub.c)."""
        return node if 0 <= node < self._nr_nodes else NUMA_NO_NODE

    # Early areas

    def vm_area_add_early(self, addr: int, size: int, flags: int, caller: int = 0) -> VmStruct:
        """Register an area at a given place before vmalloc_init(); BUG afterwards. Raises ValueError for an overlap."""
        vm = VmStruct(flags, caller, size, 0)
        vm.addr = addr
        vm.size = size
        if self.space.vmap_initialized:
            self.report.bug("vm_area_add_early")
            return vm
        for other in self._vmlist:
            if addr < other.addr + other.size and other.addr < addr + size:
                raise ValueError(f"early area {addr:#x}-{addr + size:#x} overlaps {other!r}")
        self._vmlist.append(vm)
        self._vmlist.sort(key=lambda area: area.addr)
        return vm

    def vm_area_register_early(self, size: int, align: int, flags: int, caller: int = 0) -> VmStruct:
        """Register an area at the lowest free place before vmalloc_init() (Linux: vm_area_register_early)."""
        addr = self.layout.vmalloc_start + align - 1 & -align
        for other in self._vmlist:
            if other.addr - addr >= size:
                break
            addr = other.addr + other.size + align - 1 & -align
        return self.vm_area_add_early(addr, size, flags, caller)

    def vmalloc_init(self) -> None:
        """Make the early areas busy and all else free; from here on areas can be allocated."""
        busy = []
        for vm in self._vmlist:
            va = self.space.cache.alloc(0)
            if va is not None:
                va.va_start, va.va_end, va.vm = vm.addr, vm.addr + vm.size, vm
                busy.append(va)
        self.space.init_free_space(busy)

    # Making an area

    def get_vm_area_node(
        self, size: int, align: int, shift: int, flags: int, start: int, end: int, node: int, gfp: int, caller: int
    ) -> VmStruct | None:
        """Reserve an area of `size` bytes, rounded up to 2^shift, in [start, end), with a guard page; None on failure.

        BUG in interrupt. Source: v6.12 __get_vm_area_node.
        """
        if self.context.in_interrupt:
            self.report.bug("__get_vm_area_node")
            return None
        requested_size = size
        size = size + (1 << shift) - 1 & -(1 << shift) & ULONG_MAX
        if not size:
            return None
        if flags & VM_IOREMAP:
            align = 1 << min(max((size - 1).bit_length(), PAGE_SHIFT), IOREMAP_MAX_ORDER)
        la = self.slab.kmalloc(self.vm_struct_size, gfp, self.slab_node(node))
        if not la:
            return None
        if not flags & VM_NO_GUARD:
            size += PAGE_SIZE
        area = VmStruct(flags, caller, requested_size, la)
        va = self.space.alloc_vmap_area(size & ULONG_MAX, align, start, end, gfp, 0, area)
        if isinstance(va, int):
            self.slab.kfree(la)
            return None
        area.addr = va.va_start
        area.size = size
        return area

    def get_vm_area(self, size: int, flags: int, caller: int = 0) -> VmStruct | None:
        """Reserve an area in the vmalloc region (Linux: get_vm_area, get_vm_area_caller)."""
        layout = self.layout
        return self.get_vm_area_caller(size, flags, layout.vmalloc_start, layout.vmalloc_end, caller)

    def get_vm_area_caller(self, size: int, flags: int, start: int, end: int, caller: int = 0) -> VmStruct | None:
        """Reserve an area in [start, end) (Linux: __get_vm_area_caller)."""
        size &= ULONG_MAX
        return self.get_vm_area_node(size, 1, PAGE_SHIFT, flags, start, end, NUMA_NO_NODE, _GFP_KERNEL, caller)

    # Finding and removing

    def find_vm_area(self, la: int) -> VmStruct | None:
        """The area that contains `la`, guard page included; None for none and for vm_map_ram areas."""
        va = self.nodes.find(la)
        if va is None:
            return None
        vm = va.vm
        return vm if isinstance(vm, VmStruct) else None

    def remove_vm_area(self, la: int) -> VmStruct | None:
        """Unlink and unmap the area that contains `la`, leaving its addresses lazy; None if there is none.

        From v6.12 on an unaligned address is a warning, and an area without a vm_struct is unlinked and lost.
        Source: remove_vm_area of v6.12 and v6.1.
        """
        if self._sharded:
            if la & (PAGE_SIZE - 1):
                self.report.warn("remove_vm_area", f"Trying to vfree() bad address ({la:016x})")
                return None
            va = self.nodes.find_unlink(la)
            if va is None:
                return None
            vm = va.vm
            if not isinstance(vm, VmStruct):
                return None
        else:
            va = self.nodes.find(la)
            if va is None:
                return None
            vm = va.vm
            if not isinstance(vm, VmStruct):
                return None
            va.vm = None
        self.free_unmap_vmap_area(va)
        return vm

    def free_unmap_vmap_area(self, va: VmapArea) -> None:
        """Clear the area's page-table entries and make it lazy; the flush is owed until the purge."""
        debt = self.mm.vunmap_range_noflush(va.va_start, va.va_end)
        if self.debug_pagealloc:
            debt.flush(self.space.tlb, "free_unmap_vmap_area")
        self.space.free_vmap_area_noflush(va)

    def free_vm_area(self, area: VmStruct) -> None:
        """Remove an area and its descriptor; BUG if it is not what stands at its address."""
        if self.remove_vm_area(area.addr) is not area:
            self.report.bug("free_vm_area")
            return
        self.slab.kfree(area.la)

    def vunmap_range(self, start: int, end: int) -> None:
        """Clear [start, end) and flush it now; s >= e: BUG."""
        self.mm.vunmap_range_noflush(start, end).flush(self.space.tlb, "vunmap_range")

    # Queries

    def is_vmalloc_addr(self, la: int) -> bool:
        """In the vmalloc region, whose last byte does not count."""
        return self.layout.is_vmalloc_addr(la)

    def vmalloc_to_pfn(self, la: int) -> int | None:
        """Frame that `la` is mapped to, None if it is not mapped (Linux: vmalloc_to_page)."""
        pa = self.mm.to_pa(la)
        return None if pa is None else pa >> PAGE_SHIFT

    def vmap_pages_range(self, start: int, end: int, prot: int, pfns: Pfns, page_shift: int = PAGE_SHIFT) -> int:
        """Map frames at [start, end): 0 or -ENOMEM with a part mapped."""
        return self.mm.vmap_pages_range_noflush(start, end, prot, pfns, page_shift)

    # Sparse areas

    def _check_sparse(self, area: VmStruct, start: int, end: int) -> int:
        for flag, wrong in ((VM_FLUSH_RESET_PERMS, True), (VM_NO_GUARD, True), (VM_SPARSE, False)):
            if bool(area.flags & flag) == wrong:
                self.warn_once(f"check_sparse_vm_area:{flag:#x}")
                return -errno.EINVAL
        if (end - start & ULONG_MAX) >> PAGE_SHIFT > self.pages.totalram_pages():
            return -errno.E2BIG
        if start < area.addr or end > area.addr + area.get_vm_area_size():
            return -errno.ERANGE
        return 0

    def vm_area_map_pages(self, area: VmStruct, start: int, end: int, pfns: Pfns) -> int:
        """Map frames in a part of a VM_SPARSE area: 0, -EINVAL for other areas, -E2BIG, -ERANGE, -ENOMEM."""
        err = self._check_sparse(area, start, end)
        return err or self.vmap_pages_range(start, end, self.prots.kernel, pfns)

    def vm_area_unmap_pages(self, area: VmStruct, start: int, end: int) -> None:
        """Unmap a part of a VM_SPARSE area and flush it now; nothing if vm_area_map_pages would refuse it."""
        if not self._check_sparse(area, start, end):
            self.vunmap_range(start, end)

    def validate(self) -> None:
        """The address space is sound; every vm_struct spans its vmap_area; owned frames have references.

        A present page-table entry belongs to a busy area; an area that owns its frames maps exactly these.
        """
        self.space.validate()
        for node in self.nodes.nodes:
            for va in node.busy:
                vm = va.vm
                if not isinstance(vm, VmStruct):
                    continue
                assert (vm.addr, vm.addr + vm.size) == (va.va_start, va.va_end), f"{vm!r} hangs on {va}"
                assert vm.nr_pages == (0 if vm.pages is None else len(vm.pages)), f"{vm!r} counts its pages wrongly"
                if vm.pages is None or vm.flags & VM_UNINITIALIZED:
                    continue
                for i, pfn in enumerate(vm.pages.tolist()):
                    assert self.pages.page_count(pfn) > 0, f"{vm!r} holds free frame {pfn:#x}"
                    assert self.mm.to_pa(vm.addr + (i << PAGE_SHIFT)) == pfn << PAGE_SHIFT, f"{vm!r}: page {i}"
            for va in (*node.lazy, *node.pooled()):
                assert not any(True for _ in self.mm.leaves(va.va_start, va.va_end)), f"lazy {va} is mapped"
        # A step of a walk over nothing is 1 GiB at most: looking at all of the region would take a second.
        highest = max((va.va_end for node in self.nodes.nodes for va in node.busy), default=0) + (1 << 30)
        for va in self.space.free:
            low = max(va.va_start, self.layout.vmalloc_start)
            high = min(va.va_end, self.layout.vmalloc_end + 1, highest)
            if low < high:
                assert not any(True for _ in self.mm.leaves(low, high)), f"free {va} is mapped"
