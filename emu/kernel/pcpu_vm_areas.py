"""Congruent areas for the per-CPU allocator, from the top of the vmalloc region down (v6.12 mm/vmalloc.c: pcpu_get_vm_areas).

Each chunk of per-CPU memory needs one area per group of CPUs, at the same distances in every chunk, so that a CPU's copy of a
variable is a single addition away.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.vm_struct import SIZEOF_VM_STRUCT, VM_ALLOC, VmAreas, VmStruct
from emu.kernel.vmap_area import PAGE_SIZE, FreeVmapAreas, VmapArea

_GFP_KERNEL = int(GFP_KERNEL)


def pcpu_get_vm_areas(
    areas: VmAreas, offsets: Sequence[int], sizes: Sequence[int], align: int, caller: int = 0
) -> list[VmStruct] | None:
    """Reserve areas at base + offsets[i] of sizes[i] bytes, all or none, for the highest base that fits; None on failure.

    No guard pages. BUG for an alignment that is no power of two of at least a page, and for offsets or sizes that are
    misaligned or overlap; WARN and None for what the whole region cannot hold. Without room lazy areas are purged once.
    """
    if align % PAGE_SIZE or align <= 0 or align & (align - 1) or not _congruent(offsets, sizes, align):
        areas.report.bug("pcpu_get_vm_areas")
        return None
    space = areas.space
    last_area = max(range(len(offsets)), key=offsets.__getitem__)
    low = -(-space.vmalloc_start // align) * align
    high = space.vmalloc_end & -align
    if high - low < offsets[last_area] + sizes[last_area]:
        areas.report.warn("pcpu_get_vm_areas")
        return None
    vms = _descriptors(areas, offsets, caller)
    if vms is None:
        return None
    vas: list[VmapArea] = []
    for _ in offsets:
        va = space.cache.alloc(_GFP_KERNEL)
        if va is None:
            _give_up(areas, vms, vas)
            return None
        vas.append(va)
    base = _find_base(space.free, offsets, sizes, align, low, high)
    if base is None:
        space.reclaim_and_purge()
        base = _find_base(space.free, offsets, sizes, align, low, high)
    if base is None or not _clip(areas, base, offsets, sizes, vas):
        _give_up(areas, vms, vas)
        return None
    for va, vm in zip(vas, vms, strict=True):
        va.vm = vm
        vm.addr = va.va_start
        vm.size = vm.requested_size = va.va_end - va.va_start
        space.nodes.addr_to_node(va.va_start).busy.insert(va)
    return vms


def pcpu_free_vm_areas(areas: VmAreas, vms: Sequence[VmStruct]) -> None:
    """Give the areas of pcpu_get_vm_areas back; what is mapped there must have been unmapped and flushed."""
    for vm in vms:
        areas.free_vm_area(vm)


def _congruent(offsets: Sequence[int], sizes: Sequence[int], align: int) -> bool:
    spans = sorted((start, start + size) for start, size in zip(offsets, sizes, strict=True))
    apart = all(spans[i][1] <= spans[i + 1][0] for i in range(len(spans) - 1))
    return apart and bool(spans) and not any((start | end) % align for start, end in spans)


def _descriptors(areas: VmAreas, offsets: Sequence[int], caller: int) -> list[VmStruct] | None:
    vms: list[VmStruct] = []
    for _ in offsets:
        la = areas.slab.kmalloc(SIZEOF_VM_STRUCT[areas.profile.version], _GFP_KERNEL, NUMA_NO_NODE)
        if not la:
            _give_up(areas, vms, [])
            return None
        vms.append(VmStruct(VM_ALLOC, caller, 0, la))
    return vms


def _give_up(areas: VmAreas, vms: list[VmStruct], vas: list[VmapArea]) -> None:
    for vm in vms:
        areas.slab.kfree(vm.la)
    for va in vas:
        areas.space.cache.free(va)


def _enclosing(free: FreeVmapAreas, addr: int) -> VmapArea | None:
    """The free area that contains `addr`, or the highest one below it (Linux: pvm_find_va_enclose_addr)."""
    found = None
    node = free.rb_node
    while node is not None:
        if node.va_start <= addr:
            found = node
            if node.va_end >= addr:
                break
            node = node.rb_right
        else:
            node = node.rb_left
    return found


def _end_from_reverse(
    free: FreeVmapAreas, va: VmapArea | None, align: int, high: int
) -> tuple[VmapArea | None, int]:
    """The first area from `va` downwards with an aligned end inside, and that end (pvm_determine_end_from_reverse)."""
    while va is not None and va is not free.head:
        end = min(va.va_end & -align, high)
        if va.va_start < end:
            return va, end
        va = va.list_prev
    return None, 0


def _find_base(
    free: FreeVmapAreas, offsets: Sequence[int], sizes: Sequence[int], align: int, low: int, high: int
) -> int | None:
    """The highest base at which every area lies in a free range, or None.

    The areas are looked at in turn, from the last one down; one that does not fit moves the base down and begins a new turn.
    """
    nr_vms = len(offsets)
    area = term_area = max(range(nr_vms), key=offsets.__getitem__)
    start, end = offsets[area], offsets[area] + sizes[area]
    va, top = _end_from_reverse(free, _enclosing(free, high), align, high)
    base = top - end
    while True:
        if va is None or base < low:
            return None
        if base + end > va.va_end:
            va, top = _end_from_reverse(free, va, align, high)
        elif base + start < va.va_start:
            va, top = _end_from_reverse(free, va.list_prev, align, high)
        else:
            area = (area - 1) % nr_vms
            if area == term_area:
                return base
            start, end = offsets[area], offsets[area] + sizes[area]
            va = _enclosing(free, base + end)
            continue
        base = top - end
        term_area = area


def _clip(areas: VmAreas, base: int, offsets: Sequence[int], sizes: Sequence[int], vas: list[VmapArea]) -> bool:
    """Take every area out of the free tree; false after putting back what was taken, when a descriptor is missing."""
    free = areas.space.free
    cpu = areas.space.cpus.current
    for i, va in enumerate(vas):
        start = base + offsets[i]
        enclosing = _enclosing(free, start)
        if enclosing is None or not free.clip(enclosing, start, sizes[i], cpu):
            areas.warn_once("pcpu_get_vm_areas:clip")
            for taken in vas[:i]:
                free.merge_or_add(taken)
            del vas[:i]
            return False
        va.va_start = start
        va.va_end = start + sizes[i]
    return True
