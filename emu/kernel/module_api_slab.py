"""Exported functions: kmalloc and kvmalloc and what frees them (v6.12 mm/slub.c, mm/slab_common.c, mm/util.c)."""

from __future__ import annotations

import errno

from emu.kernel.gfp import GFP_USER, Gfp, gfpflags_allow_blocking
from emu.kernel.guest_exports import INT_MAX, MASK64, GuestExports, c_int, c_unsigned
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.slab import ZERO_SIZE_PTR
from emu.kernel.vm_struct import VM_ALLOW_HUGE_VMAP
from emu.mmu.fault import NonCanonical, PageFault

_ZERO = int(Gfp.ZERO)
_NOWARN = int(Gfp.NOWARN)
_NORETRY = int(Gfp.NORETRY)
_RETRY_MAYFAIL = int(Gfp.RETRY_MAYFAIL)
_NOFAIL = int(Gfp.NOFAIL)
_GFP_USER = int(GFP_USER)
_COPY_CHUNK = 1 << 16


def kmalloc_gfp_adjust(gfp: int, size: int) -> int:
    """How kvmalloc asks kmalloc: above a page without warning, OOM killer or __GFP_NOFAIL, as vmalloc can serve instead."""
    if size > PAGE_SIZE:
        gfp |= _NOWARN
        if not gfp & _RETRY_MAYFAIL:
            gfp |= _NORETRY
        gfp &= ~_NOFAIL
    return gfp


class SlabExports:
    """The kmalloc and kvmalloc families of one kernel, for modules."""

    def __init__(self, exports: GuestExports) -> None:
        self.exports = exports
        self.kernel = exports.kernel
        self.slab = exports.kernel.slab
        self.vmalloc = exports.kernel.vmalloc
        self._sized_kvrealloc = exports.kernel.profile.version < (6, 12)
        self._register_kmalloc()
        self._register_kvmalloc()

    def _register_kmalloc(self) -> None:
        export = self.exports.export
        export("kmalloc", lambda size, gfp: self._kmalloc(size, c_unsigned(gfp)), 2)
        export("kzalloc", lambda size, gfp: self._kmalloc(size, c_unsigned(gfp) | _ZERO), 2)
        export("kmalloc_node", lambda size, gfp, node: self._kmalloc(size, c_unsigned(gfp), c_int(node)), 3)
        export("kzalloc_node", lambda size, gfp, node: self._kmalloc(size, c_unsigned(gfp) | _ZERO, c_int(node)), 3)
        export("kmalloc_array", lambda n, size, gfp: self._kmalloc(n * size, c_unsigned(gfp)), 3)
        export("kcalloc", lambda n, size, gfp: self._kmalloc(n * size, c_unsigned(gfp) | _ZERO), 3)
        export("krealloc", lambda la, size, gfp: self._krealloc(la, size, c_unsigned(gfp)), 3, noprof=True)
        export("kmemdup", lambda la, size, gfp: self._copy(self._kmalloc(size, c_unsigned(gfp)), la, size), 3, noprof=True)
        export("ksize", self.slab.ksize, 1)
        export("kfree", self.slab.kfree, 1)
        export("kfree_sensitive", self._kfree_sensitive, 1)

    def _register_kvmalloc(self) -> None:
        export = self.exports.export
        export("kvmalloc", lambda size, gfp: self.kvmalloc_node(size, c_unsigned(gfp)), 2)
        export("kvzalloc", lambda size, gfp: self.kvmalloc_node(size, c_unsigned(gfp) | _ZERO), 2)
        export("kvmalloc_node", lambda size, gfp, node: self.kvmalloc_node(size, c_unsigned(gfp), c_int(node)), 3)
        export("kvzalloc_node", lambda size, gfp, node: self.kvmalloc_node(size, c_unsigned(gfp) | _ZERO, c_int(node)), 3)
        export("kvmalloc_array", lambda n, size, gfp: self._kvmalloc_array(n, size, c_unsigned(gfp)), 3)
        export("kvcalloc", lambda n, size, gfp: self._kvmalloc_array(n, size, c_unsigned(gfp) | _ZERO), 3)
        export("kvmalloc_array_node", self._kvmalloc_array_node, 4)
        export("kvcalloc_node", lambda n, size, gfp, node: self._kvmalloc_array_node(n, size, gfp | _ZERO, node), 4)
        if self._sized_kvrealloc:
            export("kvrealloc", self._kvrealloc_6_1, 4)
        else:
            export("kvrealloc", lambda la, size, gfp: self._kvrealloc(la, size, c_unsigned(gfp)), 3, noprof=True)
        export("kvfree", self.kvfree, 1)
        export("kvfree_sensitive", self._kvfree_sensitive, 2)
        export("kvmemdup", lambda la, size, gfp: self._copy(self.kvmalloc_node(size, c_unsigned(gfp)), la, size), 3)
        export("vmemdup_user", self._vmemdup_user, 2)

    # ---- kmalloc

    def _kmalloc(self, size: int, gfp: int, node: int = NUMA_NO_NODE) -> int:
        return self.slab.kmalloc(size, gfp, self.vmalloc.slab_node(node)) or 0

    def _krealloc(self, la: int, size: int, gfp: int) -> int:
        return self.slab.krealloc(la, size, gfp) or 0

    def _kfree_sensitive(self, la: int) -> None:
        size = self.slab.ksize(la)
        self._wipe(la, size)
        self.slab.kfree(la)

    def _wipe(self, la: int, size: int) -> None:
        for done in range(0, size, _COPY_CHUNK):
            self.kernel.cpu.write(la + done & MASK64, bytes(min(_COPY_CHUNK, size - done)))

    def _copy(self, to: int, source: int, size: int) -> int:
        """memcpy to what was just allocated, if it was: `to`. Raises PageFault where the source is not mapped."""
        if to and to != ZERO_SIZE_PTR:
            for done in range(0, size, _COPY_CHUNK):
                piece = self.kernel.cpu.read(source + done & MASK64, min(_COPY_CHUNK, size - done))
                self.kernel.cpu.write(to + done, piece)
        return to

    # ---- kvmalloc

    def kvmalloc_node(self, size: int, gfp: int, node: int = NUMA_NO_NODE) -> int:
        """kmalloc, and vmalloc where that fails above a page (v6.12 mm/util.c: __kvmalloc_node_noprof)."""
        la = self._kmalloc(size, kmalloc_gfp_adjust(gfp, size), node)
        if la or size <= PAGE_SIZE or not gfpflags_allow_blocking(gfp):
            return la
        if size > INT_MAX:
            if not gfp & _NOWARN:
                self.vmalloc.warn_once("kvmalloc_node")
            return 0
        layout = self.kernel.layout
        return self.vmalloc.vmalloc_node_range(
            size, 1, layout.vmalloc_start, layout.vmalloc_end, gfp, self.vmalloc.prots.kernel, VM_ALLOW_HUGE_VMAP, node,
            self.kernel.caller,
        )

    def _kvmalloc_array(self, n: int, size: int, gfp: int) -> int:
        return 0 if n * size > MASK64 else self.kvmalloc_node(n * size, gfp)

    def _kvmalloc_array_node(self, n: int, size: int, gfp: int, node: int) -> int:
        return 0 if n * size > MASK64 else self.kvmalloc_node(n * size, c_unsigned(gfp), c_int(node))

    def _kvrealloc(self, la: int, size: int, gfp: int) -> int:
        """v6.12: vrealloc for vmalloc memory, else krealloc, and kvmalloc with a copy where that fails."""
        if self.vmalloc.is_vmalloc_addr(la):
            return self.vmalloc.vrealloc(la, size, gfp, self.kernel.caller)
        new = self._krealloc(la, size, kmalloc_gfp_adjust(gfp, size))
        if new:
            return new
        new = self.kvmalloc_node(size, gfp)
        if new and la:
            self._copy(new, la, self.slab.ksize(la))
            self.slab.kfree(la)
        return new

    def _kvrealloc_6_1(self, la: int, old_size: int, size: int, gfp: int) -> int:
        """v6.1: the caller tells the old size; memory never shrinks."""
        if old_size >= size:
            return la
        new = self.kvmalloc_node(size, c_unsigned(gfp))
        if new:
            self._copy(new, la, old_size)
            self.kvfree(la)
        return new

    def kvfree(self, la: int) -> None:
        """vfree or kfree. Raises SlabError for a bad pointer that is no vmalloc address."""
        if self.vmalloc.is_vmalloc_addr(la):
            self.vmalloc.vfree(la)
        else:
            self.slab.kfree(la)

    def _kvfree_sensitive(self, la: int, size: int) -> None:
        if la not in (0, ZERO_SIZE_PTR):
            self._wipe(la, size)
            self.kvfree(la)

    def _vmemdup_user(self, source: int, size: int) -> int:
        la = self.kvmalloc_node(size, _GFP_USER)
        if not la:
            return -errno.ENOMEM
        if source + size > self.kernel.layout.task_size_max:
            self.kvfree(la)
            return -errno.EFAULT
        try:
            return self._copy(la, source, size)
        except (PageFault, NonCanonical):
            self.kvfree(la)
            return -errno.EFAULT
