"""Exported functions: vmap, vm_map_ram, ioremap and memremap (v6.12 mm/vmalloc.c, arch/x86/mm/ioremap.c, kernel/iomem.c)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emu.kernel.guest_exports import MASK64, GuestExports, c_int, c_unsigned
from emu.kernel.ioremap import Ioremap
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.notifier import BlockingNotifierHead
from emu.kernel.page_alloc import Pfns

_MEMREMAP_WB, _MEMREMAP_WT, _MEMREMAP_WC = 1, 2, 4


class VmapExports:
    """Mappings of existing memory and of device memory in one kernel, for modules."""

    def __init__(self, exports: GuestExports) -> None:
        self.exports = exports
        self.kernel = kernel = exports.kernel
        export = exports.export
        export("vmap", self._vmap, 4)
        export("vunmap", kernel.vmap.vunmap, 1)
        export("vmap_pfn", self._vmap_pfn, 3, gpl=True)
        export("vm_map_ram", self._vm_map_ram, 3)
        export("vm_unmap_ram", lambda la, count: kernel.vmap_blocks.vm_unmap_ram(la, c_unsigned(count)), 2)
        export("vm_unmap_aliases", kernel.vmap_blocks.vm_unmap_aliases, 0, gpl=True)
        self.purge_notifiers = BlockingNotifierHead(kernel, "vmap_notify_list")
        export("register_vmap_purge_notifier", self.purge_notifiers.register, 1, gpl=True)
        export("unregister_vmap_purge_notifier", self.purge_notifiers.unregister, 1, gpl=True)
        kernel.vmalloc.space.notifiers.append(lambda: self.purge_notifiers.call(0))
        self._register_ioremap(kernel.ioremap)

    def _register_ioremap(self, io: Ioremap) -> None:
        kernel, export = self.kernel, self.exports.export
        io.memtypes.current = self._current
        functions: tuple[tuple[str, Callable[[int, int, int], int], bool], ...] = (
            ("ioremap", io.ioremap, False), ("ioremap_uc", io.ioremap_uc, True), ("ioremap_wc", io.ioremap_wc, False),
            ("ioremap_wt", io.ioremap_wt, False), ("ioremap_cache", io.ioremap_cache, False),
        )
        for name, function, gpl in functions:
            export(name, lambda phys, size, map_it=function: map_it(phys, size, kernel.caller), 2, gpl=gpl)
        export("ioremap_prot", lambda phys, size, prot: io.ioremap_prot(phys, size, prot, kernel.caller), 3)
        export("iounmap", io.iounmap, 1)
        export("memremap", self._memremap, 3)
        export("memunmap", self._memunmap, 1)

    def _current(self) -> str:
        thread = self.kernel.current_thread(self.kernel.cpu)
        return f"{thread.comm}:{thread.pid}"

    def _vmap(self, pages: int, count: int, flags: int, prot: int) -> int:
        """The array is read only when there is room for the mapping: until then the wildest pointer does no harm."""
        kernel = self.kernel
        count = c_unsigned(count)
        if not 0 < count <= kernel.pages.totalram_pages():
            return kernel.vmap.vmap(np.empty(0, dtype=np.int64), count, flags, prot, kernel.caller, pages)
        return kernel.vmap.vmap(self.exports.page_array(pages, count), count, flags, prot, kernel.caller, pages)

    def _vmap_pfn(self, pfns: int, count: int, prot: int) -> int:
        kernel = self.kernel
        count = c_unsigned(count)
        found: list[Pfns] = []
        done = 0
        while done < count:
            at = pfns + 8 * done & MASK64
            take = min(count - done, max(1, (PAGE_SIZE - at % PAGE_SIZE) // 8))
            words = np.frombuffer(kernel.cpu.read(at, 8 * take), dtype=np.uint64).astype(np.int64)
            found.append(words)
            done += take
            if bool(np.any((words >= 0) & (words < kernel.pages.max_pfn))):
                break
        frames = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        return kernel.vmap.vmap_pfn(frames, count, prot, kernel.caller)

    def _vm_map_ram(self, pages: int, count: int, node: int) -> int:
        count = c_unsigned(count)
        return self.kernel.vmap_blocks.vm_map_ram(self.exports.page_array(pages, count), count, c_int(node))

    # ---- device memory

    def _is_ram(self, phys: int, size: int) -> tuple[bool, bool]:
        """Whether some and whether all of a physical range is system RAM (Linux: region_intersects)."""
        end = phys + size
        ram = self.kernel.memory.size
        return size > 0 and phys < ram, end <= ram

    def _memremap(self, phys: int, size: int, flags: int) -> int:
        """RAM in the direct map for MEMREMAP_WB, else an ioremap of the first type asked for that can be had."""
        kernel = self.kernel
        some, every = self._is_ram(phys, size)
        if not flags:
            return 0
        if some and not every:
            text = f"memremap attempted on mixed range {phys:#018x} size: {size:#x}"
            kernel.vmalloc.warn_once("memremap:mixed", text)
            return 0
        if flags & _MEMREMAP_WB:
            la = kernel.layout.va(phys) if some else kernel.ioremap.ioremap_cache(phys, size, kernel.caller)
            if la:
                return la
        if some and flags != _MEMREMAP_WB:
            kernel.vmalloc.warn_once("memremap:ram", f"memremap attempted on ram {phys:#018x} size: {size:#x}")
            return 0
        if flags & _MEMREMAP_WT and (la := kernel.ioremap.ioremap_wt(phys, size, kernel.caller)):
            return la
        return kernel.ioremap.ioremap_wc(phys, size, kernel.caller) if flags & _MEMREMAP_WC else 0

    def _memunmap(self, la: int) -> None:
        if self.kernel.layout.is_vmalloc_addr(la):
            self.kernel.ioremap.iounmap(la)
