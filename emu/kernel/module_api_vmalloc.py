"""Exported functions: vmalloc and vfree, queries about vmalloc addresses, struct vm_struct (v6.12 mm/vmalloc.c, mm/util.c)."""

from __future__ import annotations

import struct

from emu.kernel.guest_exports import GuestExports, c_int, c_unsigned
from emu.kernel.vm_struct import Vm, VmStruct

# next, addr, size, flags, pages, page_order, nr_pages, phys_addr, caller, requested_size.
_VM_STRUCT = struct.Struct("<QQQQQIIQQQ")
_VM_STRUCT_ADDR = 8


class VmallocExports:
    """The vmalloc family of one kernel, for modules."""

    def __init__(self, exports: GuestExports) -> None:
        self.exports = exports
        self.kernel = exports.kernel
        self.vmalloc = exports.kernel.vmalloc
        self._register_allocation()
        self._register_freeing()
        self._register_queries()

    def _register_allocation(self) -> None:
        kernel, vmalloc, export = self.kernel, self.vmalloc, self.exports.export
        export("vmalloc", lambda size: vmalloc.vmalloc(size, kernel.caller), 1, noprof=True)
        export("vzalloc", lambda size: vmalloc.vzalloc(size, kernel.caller), 1, noprof=True)
        export("vmalloc_node", lambda size, node: vmalloc.vmalloc_node(size, c_int(node), kernel.caller), 2, noprof=True)
        export("vzalloc_node", lambda size, node: vmalloc.vzalloc_node(size, c_int(node), kernel.caller), 2, noprof=True)
        export("vmalloc_user", lambda size: vmalloc.vmalloc_user(size, kernel.caller), 1, noprof=True)
        export("vmalloc_32", lambda size: vmalloc.vmalloc_32(size, kernel.caller), 1, noprof=True)
        export("vmalloc_32_user", lambda size: vmalloc.vmalloc_32_user(size, kernel.caller), 1, noprof=True)
        export("__vmalloc", lambda size, gfp: vmalloc.vmalloc_gfp(size, c_unsigned(gfp), kernel.caller), 2, noprof=True)
        export("__vmalloc_node", self._vmalloc_node, 5, gpl=True, noprof=True)
        if kernel.profile.huge_vmalloc:
            export("vmalloc_huge", self._vmalloc_huge, 2, gpl=True, noprof=True)
        export("vmalloc_array", lambda n, size: vmalloc.vmalloc_array(n, size, caller=kernel.caller), 2, noprof=True)
        export("__vmalloc_array", self._vmalloc_array, 3, noprof=True)
        export("vcalloc", lambda n, size: vmalloc.vcalloc(n, size, caller=kernel.caller), 2, noprof=True)
        export("__vcalloc", self._vcalloc, 3, noprof=True)
        export("vrealloc", self._vrealloc, 3, noprof=True)

    def _vmalloc_node(self, size: int, align: int, gfp: int, node: int, caller: int) -> int:
        return self.vmalloc.vmalloc_node_align(size, align, c_unsigned(gfp), c_int(node), caller)

    def _vmalloc_huge(self, size: int, gfp: int) -> int:
        return self.vmalloc.vmalloc_huge(size, c_unsigned(gfp), self.kernel.caller)

    def _vmalloc_array(self, n: int, size: int, gfp: int) -> int:
        return self.vmalloc.vmalloc_array(n, size, c_unsigned(gfp), self.kernel.caller)

    def _vcalloc(self, n: int, size: int, gfp: int) -> int:
        return self.vmalloc.vcalloc(n, size, c_unsigned(gfp), self.kernel.caller)

    def _vrealloc(self, la: int, size: int, gfp: int) -> int:
        return self.vmalloc.vrealloc(la, size, c_unsigned(gfp), self.kernel.caller)

    def _register_freeing(self) -> None:
        export = self.exports.export
        export("vfree", self.vmalloc.vfree, 1)
        export("vfree_atomic", self.vmalloc.vfree_atomic, 1)
        export("free_vm_area", self._free_vm_area, 1, gpl=True)

    def _register_queries(self) -> None:
        vmalloc, layout, export = self.vmalloc, self.kernel.layout, self.exports.export
        export("vmalloc_to_page", self._vmalloc_to_page, 1)
        export("vmalloc_to_pfn", lambda la: self.exports.page_to_pfn(self._vmalloc_to_page(la)), 1)
        export("is_vmalloc_addr", lambda la: int(vmalloc.is_vmalloc_addr(la)), 1)
        export("is_vmalloc_or_module_addr", lambda la: int(layout.is_vmalloc_or_module_addr(la)), 1, gpl=True)
        export("vmalloc_nr_pages", lambda: vmalloc.nr_vmalloc_pages, 0)
        export("is_vm_area_hugepages", lambda la: int((area := vmalloc.find_vm_area(la)) is not None and area.page_order > 0), 1)
        export("set_vm_flush_reset_perms", self._set_vm_flush_reset_perms, 1)
        export("get_vm_area", self._get_vm_area, 2)
        export("find_vm_area", lambda la: self._store(vmalloc.find_vm_area(la)), 1)
        export("remove_vm_area", lambda la: self._store(vmalloc.remove_vm_area(la)), 1)

    def _set_vm_flush_reset_perms(self, la: int) -> None:
        area = self.vmalloc.find_vm_area(la)
        if area is not None:
            area.flags |= Vm.FLUSH_RESET_PERMS

    def _vmalloc_to_page(self, la: int) -> int:
        pfn = self.vmalloc.vmalloc_to_pfn(la)
        return 0 if pfn is None else self.kernel.layout.page_to_la(pfn)

    # ---- struct vm_struct: the model's own record is what counts; a module gets to see a copy where the descriptor stands

    def _store(self, area: VmStruct | None) -> int:
        if area is None:
            return 0
        words = (
            0, area.addr, area.size, area.flags, area.pages_la, area.page_order, area.nr_pages, area.phys_addr, area.caller,
            area.requested_size,
        )
        layout = self.kernel.layout
        if area.la:
            self.kernel.memory.write(layout.pa(area.la), _VM_STRUCT.pack(*words)[: self.vmalloc.vm_struct_size])
        return area.la

    def _get_vm_area(self, size: int, flags: int) -> int:
        return self._store(self.vmalloc.get_vm_area(size, flags, self.kernel.caller))

    def _free_vm_area(self, descriptor: int) -> None:
        """BUG when the area at descriptor->addr is not this one."""
        addr = self.kernel.load(descriptor + _VM_STRUCT_ADDR & (1 << 64) - 1)
        found = self.vmalloc.find_vm_area(addr)
        if found is None or found.la != descriptor:
            self.vmalloc.remove_vm_area(addr)
            self.kernel.bug("free_vm_area")
        else:
            self.vmalloc.free_vm_area(found)

