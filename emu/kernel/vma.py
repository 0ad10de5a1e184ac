"""Mappings of user address spaces as modules see them: struct vm_area_struct in guest memory, and who maps pages into one.

The model reads a vm_area_struct when a function is given one and keeps vm_flags up to date in it. Offsets are those of Debian's
builds of v6.12 and v6.1 and of a v5.4 x86-64 (include/linux/mm_types.h). vm_mm is the mm's PGD at its direct-map address; the
rest of an mm_struct is not modelled. Functions: v6.12 mm/memory.c vm_insert_page, mm/vmalloc.c remap_vmalloc_range.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from emu.kernel.guest_exports import MASK64, GuestExports
from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mm import PAGE_SHARED, PAGE_SHARED_DIRTY, Mm
from emu.kernel.pgprot import NX
from emu.kernel.vread import remap_vmalloc_range, remap_vmalloc_range_partial
from emu.mmu.entry import PHYSICAL_MASK

VM_READ, VM_WRITE, VM_SHARED = 0x1, 0x2, 0x8
VM_MAYREAD, VM_MAYWRITE, VM_MAYEXEC, VM_MAYSHARE = 0x10, 0x20, 0x40, 0x80
VM_PFNMAP = 0x400
VM_DONTEXPAND = 0x40000
VM_DONTDUMP = 0x400_0000
VM_MIXEDMAP = 0x1000_0000
# mmap(PROT_READ | PROT_WRITE, MAP_SHARED) of a file that is open for both.
SHARED_FLAGS = VM_READ | VM_WRITE | VM_SHARED | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC | VM_MAYSHARE
# Enough for every version's struct; what is not named below is zero.
SIZEOF_VM_AREA_STRUCT = 192
_PTE_FLAGS = PAGE_SHARED_DIRTY | NX | ~PHYSICAL_MASK & MASK64


@dataclass(frozen=True, slots=True)
class VmaLayout:
    """Offsets in struct vm_area_struct, in bytes."""

    vm_start: int = 0
    vm_end: int = 8
    vm_mm: int = 16
    vm_page_prot: int = 24
    vm_flags: int = 32


# Before the maple tree a list and a red-black tree stood in front of vm_mm.
_LAYOUTS = {"5.4": VmaLayout(vm_mm=64, vm_page_prot=72, vm_flags=80)}


class GuestVma:
    """A vm_area_struct at `la`. Every access is the current CPU's: it raises PageFault or NonCanonical for a wild pointer."""

    def __init__(self, kernel: Kernel, la: int, mm_at: Callable[[int], Mm | None]) -> None:
        self._kernel = kernel
        self._layout = _LAYOUTS.get(kernel.profile.name, VmaLayout())
        self._mm_at = mm_at
        self.la = la

    def _field(self, offset: int) -> int:
        return self._kernel.load(self.la + offset & MASK64)

    @property
    def vm_start(self) -> int:
        """First address."""
        return self._field(self._layout.vm_start)

    @property
    def vm_end(self) -> int:
        """The address behind the last."""
        return self._field(self._layout.vm_end)

    @property
    def vm_flags(self) -> int:
        """VM_* of include/linux/mm.h."""
        return self._field(self._layout.vm_flags)

    def vm_flags_set(self, flags: int) -> None:
        """Add flags."""
        self._kernel.store(self.la + self._layout.vm_flags & MASK64, self.vm_flags | flags)

    def fill(self, start: int, end: int, vm_mm: int) -> None:
        """Write a new shared mapping's fields; the rest is zero already."""
        layout = self._layout
        for offset, value in (
            (layout.vm_start, start), (layout.vm_end, end), (layout.vm_mm, vm_mm), (layout.vm_page_prot, PAGE_SHARED),
            (layout.vm_flags, SHARED_FLAGS),
        ):
            self._kernel.store(self.la + offset, value)

    def vm_insert_page(self, uaddr: int, pfn: int) -> int:
        """Map one frame: 0, -EFAULT outside the mapping, -EINVAL for a page that nobody holds or of the slab, -EBUSY, -ENOMEM.

        BUG where vm_mm is no mm, whose mmap_lock nobody can hold, and for a VM_PFNMAP mapping.
        """
        kernel = self._kernel
        if not self.vm_start <= uaddr < self.vm_end:
            return -errno.EFAULT
        vm_mm = self._field(self._layout.vm_mm)
        kernel.load(vm_mm)
        mm = self._mm_at(vm_mm)
        if mm is None:
            kernel.bug("vm_insert_page", "mmap_read_trylock")
            return -errno.EINVAL
        flags = self.vm_flags
        if not flags & VM_MIXEDMAP:
            if flags & VM_PFNMAP:
                kernel.bug("vm_insert_page", "VM_PFNMAP")
            self.vm_flags_set(VM_MIXEDMAP)
        if kernel.slab.is_slab(kernel.layout.va(pfn * PAGE_SIZE)):
            return -errno.EINVAL
        try:
            return mm.insert_page(uaddr, pfn, self._field(self._layout.vm_page_prot) & _PTE_FLAGS)
        except ValueError:
            # The struct says that the mapping is where no user mapping can be.
            return -errno.EFAULT

    def set_dontexpand_dontdump(self) -> None:
        """VM_DONTEXPAND and VM_DONTDUMP."""
        self.vm_flags_set(VM_DONTEXPAND | VM_DONTDUMP)


@dataclass(frozen=True, slots=True)
class _Mapping:
    mm: Mm
    start: int
    end: int


class UserMappings:
    """Registers the functions on vm_area_structs of one kernel; `mms` are the mms that guests made, by their PGD."""

    def __init__(self, kernel: Kernel, mms: dict[int, Mm]) -> None:
        self.kernel = kernel
        self.mms = mms
        self._mappings: dict[int, _Mapping] = {}
        self._exports = exports = GuestExports(kernel)
        export = exports.export
        export("remap_vmalloc_range", self._remap_vmalloc_range, 3)
        export("remap_vmalloc_range_partial", self._remap_vmalloc_range_partial, 5)
        export("vm_insert_page", self._vm_insert_page, 3)
        export("vmemu_mmap", self.mmap, 3)
        export("vmemu_munmap", self.munmap, 1)

    def vma(self, la: int) -> GuestVma:
        """The vm_area_struct at an address, whatever is there."""
        return GuestVma(self.kernel, la, self._mm_at)

    def _mm_at(self, vm_mm: int) -> Mm | None:
        layout = self.kernel.layout
        return self.mms.get(vm_mm - layout.va(0))

    def mmap(self, pgd: int, uaddr: int, size: int) -> int:
        """A new shared, writable mapping of an mm with nothing in it: its vm_area_struct.

        0 for no mm, a range that is empty, unaligned, not in user space or in use, and without memory.
        """
        mm = self.mms.get(pgd)
        end = uaddr + (size + PAGE_SIZE - 1 & -PAGE_SIZE)
        if mm is None or not size or uaddr % PAGE_SIZE or end > self.kernel.layout.task_size_max:
            return 0
        if any(other.mm is mm and other.start < end and uaddr < other.end for other in self._mappings.values()):
            return 0
        if next(mm.leaves(uaddr, end), None) is not None:
            return 0
        la = self.kernel.slab.kzalloc(SIZEOF_VM_AREA_STRUCT)
        if la is None:
            return 0
        self.vma(la).fill(uaddr, end, self.kernel.layout.va(pgd))
        self._mappings[la] = _Mapping(mm, uaddr, end)
        return la

    def munmap(self, la: int) -> int:
        """End a mapping of vmemu_mmap: its pages are unmapped, flushed and put, its vm_area_struct is freed. 0 or -EINVAL."""
        mapping = self._mappings.pop(la, None)
        if mapping is None:
            return -errno.EINVAL
        mapping.mm.zap(mapping.start, mapping.end - mapping.start, self.kernel.tlb)
        self.kernel.slab.kfree(la)
        return 0

    def forget(self, mm: Mm) -> None:
        """An mm is going: free the vm_area_structs of its mappings."""
        for la in [la for la, mapping in self._mappings.items() if mapping.mm is mm]:
            del self._mappings[la]
            self._exports.guarded(self.kernel.slab.kfree)(la)

    def _remap_vmalloc_range(self, vma: int, la: int, pgoff: int) -> int:
        return remap_vmalloc_range(self.kernel.vmalloc, self.vma(vma), la, pgoff)

    def _remap_vmalloc_range_partial(self, vma: int, uaddr: int, la: int, pgoff: int, size: int) -> int:
        return remap_vmalloc_range_partial(self.kernel.vmalloc, self.vma(vma), uaddr, la, pgoff, size)

    def _vm_insert_page(self, vma: int, uaddr: int, page: int) -> int:
        user = self.vma(vma)
        if not user.vm_start <= uaddr < user.vm_end:
            return -errno.EFAULT
        pfn = self._exports.frame_of(page)
        return -errno.EINVAL if pfn is None else user.vm_insert_page(uaddr, pfn)
