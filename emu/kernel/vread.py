"""Reading vmalloc addresses that may be holes, and giving vmalloc memory to user space (v6.12 mm/vmalloc.c)."""

from __future__ import annotations

import errno
from typing import Protocol

from emu.kernel.vm_struct import VM_IOREMAP, VM_SPARSE, VM_UNINITIALIZED, VM_USERMAP, Vm, VmAreas, VmStruct
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, VMAP_BLOCK, VMAP_FLAGS_MASK, VMAP_RAM
from emu.kernel.vmap_block import VMAP_BBMAP_BITS, VmapBlocks

# Offset of page->compound_head, which a NULL page is asked for.
_COMPOUND_HEAD = 8
_USER_MAPPABLE = VM_USERMAP | int(Vm.DMA_COHERENT)


def vread_iter(areas: VmAreas, blocks: VmapBlocks, la: int, count: int) -> bytes:
    """`count` bytes from `la` as /proc/kcore gets them: holes, device, sparse and unfinished areas read as zeros.

    Fewer bytes only where the address space ends. Source: v6.12 vread_iter.
    """
    count = min(count, ULONG_MAX + 1 - la)
    out = bytearray()
    va = areas.nodes.find_exceed_addr(la)
    while va is not None and len(out) < count:
        vm = va.vm if isinstance(va.vm, VmStruct) else None
        flags = va.flags & VMAP_FLAGS_MASK
        following = va.va_end
        addr = la + len(out)
        size = va.va_end - va.va_start if vm is None else vm.get_vm_area_size()
        readable = flags if vm is None else not vm.flags & VM_UNINITIALIZED
        if readable and addr < va.va_start + size:
            out += bytes(min(max(va.va_start - addr, 0), count - len(out)))
            addr = la + len(out)
            n = min(va.va_start + size - addr, count - len(out))
            if flags & VMAP_RAM:
                out += _vmap_ram_vread(areas, blocks, addr, n, flags)
            elif vm is not None and vm.flags & (VM_IOREMAP | VM_SPARSE):
                out += bytes(n)
            else:
                out += _aligned_vread(areas, addr, n)
        va = areas.nodes.find_exceed_addr(following)
    return bytes(out) + bytes(count - len(out))


def _aligned_vread(areas: VmAreas, addr: int, count: int) -> bytes:
    out = bytearray()
    while count > 0:
        length = min(count, PAGE_SIZE - addr % PAGE_SIZE)
        pa = areas.mm.to_pa(addr)
        out += bytes(length) if pa is None else areas.memory.read(pa, length)
        addr += length
        count -= length
    return bytes(out)


def _vmap_ram_vread(areas: VmAreas, blocks: VmapBlocks, addr: int, count: int, flags: int) -> bytes:
    """The used pieces of a block, zeros between them.

    As the kernel does it: each piece is read from its first page at the offset of `addr` in its page, and one page too far,
    so a read that begins beyond the first page of a piece gets the wrong page.
    """
    if not flags & VMAP_BLOCK:
        return _aligned_vread(areas, addr, count)
    block = blocks.find_block(addr)
    out = bytearray()
    if block is not None:
        for first, last in _set_ranges(block.used_map):
            if len(out) == count:
                break
            at = addr + len(out)
            start = block.va.va_start + (first << PAGE_SHIFT)
            out += bytes(min(max(start - at, 0), count - len(out)))
            at = addr + len(out)
            if len(out) == count:
                break
            offset = at % PAGE_SIZE
            n = min(((last - first + 1) << PAGE_SHIFT) - offset, count - len(out))
            out += _aligned_vread(areas, start + offset, n)
    return bytes(out) + bytes(count - len(out))


def _set_ranges(bitmap: int) -> list[tuple[int, int]]:
    """Runs of set bits as (first, one past the last)."""
    runs = []
    bit = 0
    while bitmap >> bit and bit < VMAP_BBMAP_BITS:
        bit += ((bitmap >> bit) & -(bitmap >> bit)).bit_length() - 1
        run = ~(bitmap >> bit)
        length = (run & -run).bit_length() - 1
        runs.append((bit, bit + length))
        bit += length
    return runs


class UserArea(Protocol):
    """A mapping of a user mm (Linux: struct vm_area_struct)."""

    @property
    def vm_start(self) -> int:
        """First address."""

    @property
    def vm_end(self) -> int:
        """The address behind the last."""

    def vm_insert_page(self, uaddr: int, pfn: int) -> int:
        """Map one frame at `uaddr`, taking a reference: 0 or a negative errno."""

    def set_dontexpand_dontdump(self) -> None:
        """vm_flags_set(vma, VM_DONTEXPAND | VM_DONTDUMP)."""


def remap_vmalloc_range_partial(areas: VmAreas, vma: UserArea, uaddr: int, kaddr: int, pgoff: int, size: int) -> int:
    """Map `size` bytes of a VM_USERMAP area, from page `pgoff` behind `kaddr`, at `uaddr`.

    -EINVAL for overflow, misalignment, no area, another kind of area, or beyond its end; else what vm_insert_page says.
    As in Linux the end is measured from the area's start, whatever page of it `kaddr` is, so that the walk may come to the guard
    page: the access to the struct page that is not there faults, unless the mapping ends before. Raises PageFault then.
    """
    offset = pgoff << PAGE_SHIFT
    size = size + PAGE_SIZE - 1 & -PAGE_SIZE & ULONG_MAX
    if offset > ULONG_MAX or uaddr % PAGE_SIZE or kaddr % PAGE_SIZE:
        return -errno.EINVAL
    area = areas.find_vm_area(kaddr)
    if area is None or not area.flags & _USER_MAPPABLE:
        return -errno.EINVAL
    if size + offset > area.get_vm_area_size():
        return -errno.EINVAL
    # Size 0 is not looked at before it has been counted down past 0: mapping ends where one of the ranges does.
    for done in range(0, size or ULONG_MAX, PAGE_SIZE):
        pfn = areas.vmalloc_to_pfn(kaddr + offset + done)
        if pfn is None:
            if vma.vm_start <= uaddr + done < vma.vm_end:
                areas.context.load(_COMPOUND_HEAD)
            return -errno.EFAULT
        err = vma.vm_insert_page(uaddr + done, pfn)
        if err:
            return err
    vma.set_dontexpand_dontdump()
    return 0


def remap_vmalloc_range(areas: VmAreas, vma: UserArea, la: int, pgoff: int) -> int:
    """remap_vmalloc_range_partial for the whole of a user mapping."""
    return remap_vmalloc_range_partial(areas, vma, vma.vm_start, la, pgoff, vma.vm_end - vma.vm_start)
