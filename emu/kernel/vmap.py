"""Mapping memory that exists already: vmap, vmap_pfn and the physical ranges of ioremap (v6.12 mm/vmalloc.c)."""

from __future__ import annotations

import errno

from emu.kernel.layout import PUD_SHIFT
from emu.kernel.page_alloc import Pfns
from emu.kernel.pgprot import NX
from emu.kernel.vm_struct import (
    VM_FLUSH_RESET_PERMS,
    VM_IOREMAP,
    VM_MAP_PUT_PAGES,
    VM_NO_GUARD,
    VmStruct,
)
from emu.kernel.vmalloc import Vmalloc
from emu.kernel.vmap_area import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX

# An ignored bit of a PTE: no struct page stands behind the frame (v6.12 asm/pgtable_types.h: _PAGE_BIT_SPECIAL).
PAGE_SPECIAL = 1 << 9


class Vmap:
    """Mappings of given frames, beside the vmalloc family whose areas they share.

    `ioremap_max_page_shift` bounds the leaves of vmap_page_range; the kernel parameter nohugeiomap makes it 12.
    """

    def __init__(self, vmalloc: Vmalloc) -> None:
        self.vmalloc = vmalloc
        self.ioremap_max_page_shift = PUD_SHIFT
        self._resets_are_refused = vmalloc.profile.version >= (6, 12)

    def vmap(self, pfns: Pfns, count: int, flags: int, prot: int, caller: int = 0, pages_la: int = 0) -> int:
        """Map `count` frames side by side, never executable, in 4 KiB leaves; the address, or 0.

        With VM_MAP_PUT_PAGES vfree() gives up the frames and the caller's array of them at `pages_la`.
        """
        vmalloc = self.vmalloc
        if flags & VM_FLUSH_RESET_PERMS and self._resets_are_refused:
            vmalloc.warn_once("vmap:reset_perms")
            return 0
        if flags & VM_NO_GUARD:
            vmalloc.warn_once("vmap:no_guard")
            flags &= ~VM_NO_GUARD
        if count > vmalloc.pages.totalram_pages():
            return 0
        area = vmalloc.get_vm_area(count << PAGE_SHIFT, flags, caller)
        if area is None:
            return 0
        if vmalloc.vmap_pages_range(area.addr, area.addr + (count << PAGE_SHIFT), prot | NX, pfns) < 0:
            self.vunmap(area.addr)
            return 0
        if flags & VM_MAP_PUT_PAGES:
            area.pages = pfns[:count].copy()
            area.nr_pages = count
            area.pages_la = pages_la
        return area.addr

    def vunmap(self, la: int) -> None:
        """Remove a mapping; its frames stay as they are. 0 is nothing; BUG in interrupt; a bad pointer is a warning."""
        vmalloc = self.vmalloc
        if vmalloc.context.in_interrupt:
            vmalloc.report.bug("vunmap")
            return
        if not la:
            return
        vm = vmalloc.unlink_for_free(la, "vunmap")
        if vm is None:
            return
        if vm.flags & VM_FLUSH_RESET_PERMS and not self._resets_are_refused:
            vmalloc.unmap_aliases(ULONG_MAX, 0, False)
        vmalloc.slab.kfree(vm.la)

    def vmap_pfn(self, pfns: Pfns, count: int, prot: int, caller: int = 0) -> int:
        """Map frames that have no struct page, with special PTEs; the address, or 0. A frame of RAM: WARN_ON_ONCE, 0."""
        vmalloc = self.vmalloc
        area = vmalloc.get_vm_area(count << PAGE_SHIFT, VM_IOREMAP, caller)
        if area is None:
            return 0
        for i, pfn in enumerate(pfns[:count].tolist()):
            if pfn < vmalloc.pages.max_pfn:
                vmalloc.warn_once("vmap_pfn_apply")
                vmalloc.free_vm_area(area)
                return 0
            entry = pfn << PAGE_SHIFT | prot | NX | PAGE_SPECIAL
            if isinstance(vmalloc.mm.set_pte(area.addr + i * PAGE_SIZE, entry), int):
                vmalloc.free_vm_area(area)
                return 0
        return area.addr

    def vmap_page_range(self, start: int, end: int, phys: int, prot: int) -> int:
        """Map a physical run, never executable, in leaves as large as they go: 0 or -ENOMEM."""
        return self.vmalloc.mm.vmap_range_noflush(start, end, phys, prot | NX, self.ioremap_max_page_shift)

    def ioremap_page_range(self, start: int, end: int, phys: int, prot: int) -> int:
        """vmap_page_range for a whole VM_IOREMAP area: -EINVAL for another, -ERANGE for a part, each with WARN_ONCE."""
        vmalloc = self.vmalloc
        if self._resets_are_refused:
            area = vmalloc.find_vm_area(start)
            if area is None or not area.flags & VM_IOREMAP:
                text = f"vm_area at addr {start:x} is not marked as VM_IOREMAP"
                vmalloc.warn_once("ioremap_page_range", text)
                return -errno.EINVAL
            area_end = area.addr + area.get_vm_area_size()
            if start != area.addr or end != area_end:
                vmalloc.warn_once(
                    "ioremap_page_range:range",
                    f"ioremap request [{start:x},{end:x}) doesn't match vm_area [{area.addr:x}, {area_end:x})",
                )
                return -errno.ERANGE
        return self.vmap_page_range(start, end, phys, prot)

    def alloc_ioremap_area(self, size: int, phys: int, caller: int = 0) -> VmStruct | None:
        """Reserve an area for `size` bytes of device memory at `phys`, aligned to its size (arch ioremap's first half)."""
        area = self.vmalloc.get_vm_area(size, VM_IOREMAP, caller)
        if area is not None:
            area.phys_addr = phys
        return area
