"""The functions that a module may call, with their arguments as C passes them: u64 in, u64 out.

Each is one line of glue to the model; what it does stands there. `struct page *` is the address of the frame's descriptor in
vmemmap. Names and exports: v6.12; functions that are macros or inlines there (kmalloc, alloc_pages, vmalloc ...) are exported
under their plain names besides, so that assembly can call them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emu.kernel import set_memory
from emu.kernel.entry import End, Ending
from emu.kernel.gfp import Gfp
from emu.kernel.init_64 import InitMm
from emu.kernel.kernel import Kernel, TaskEnded
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.page_alloc import NUMA_NO_NODE, Pfns
from emu.kernel.pgtable_types import FlushRange
from emu.kernel.slab import SlabError
from emu.kernel.vsprintf import NextArgument

Change = Callable[[InitMm, int, int], tuple[int, FlushRange]]
_MASK64 = (1 << 64) - 1
_MAX_ORDER = 10
_MAX_PAGE_ARRAY = 1 << 24
_C_STRING_CHUNK = 256
_MAX_C_STRING = 1 << 16


def _int(value: int) -> int:
    """A C int argument: the low 32 bits, signed."""
    return (value & 0xFFFF_FFFF) - ((value & 0x8000_0000) << 1)


def _unsigned(value: int) -> int:
    """A C unsigned int argument."""
    return value & 0xFFFF_FFFF


class ModuleApi:
    """Registers the functions of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._register_vmalloc()
        self._register_vmap()
        self._register_pages()
        self._register_slab()
        self._register_set_memory()
        self._register_printk()
        kernel.add_site_symbols()

    def _register_vmalloc(self) -> None:
        kernel, export = self.kernel, self.kernel.symbols.register
        vmalloc = kernel.vmalloc
        export("vmalloc", lambda size: vmalloc.vmalloc(size, kernel.caller), 1)
        export("vzalloc", lambda size: vmalloc.vzalloc(size, kernel.caller), 1)
        export("vmalloc_node", lambda size, node: vmalloc.vmalloc_node(size, _int(node), kernel.caller), 2)
        export("vzalloc_node", lambda size, node: vmalloc.vzalloc_node(size, _int(node), kernel.caller), 2)
        export("vmalloc_user", lambda size: vmalloc.vmalloc_user(size, kernel.caller), 1)
        export("vmalloc_32", lambda size: vmalloc.vmalloc_32(size, kernel.caller), 1)
        export("vmalloc_32_user", lambda size: vmalloc.vmalloc_32_user(size, kernel.caller), 1)
        export("__vmalloc", lambda size, gfp: vmalloc.vmalloc_gfp(size, _unsigned(gfp), kernel.caller), 2)
        export("vmalloc_huge", lambda size, gfp: vmalloc.vmalloc_huge(size, _unsigned(gfp), kernel.caller), 2, gpl=True)
        export("vmalloc_array", lambda n, size: vmalloc.vmalloc_array(n, size, caller=kernel.caller), 2)
        export("vcalloc", lambda n, size: vmalloc.vcalloc(n, size, caller=kernel.caller), 2)
        export("vfree", vmalloc.vfree, 1)
        export("vmalloc_to_page", self._vmalloc_to_page, 1)
        export("vmalloc_to_pfn", lambda la: vmalloc.vmalloc_to_pfn(la) or 0, 1)
        export("is_vmalloc_addr", lambda la: int(vmalloc.is_vmalloc_addr(la)), 1)
        export("kvmalloc", lambda size, gfp: self._kvmalloc(size, _unsigned(gfp)), 2)
        export("kvzalloc", lambda size, gfp: self._kvmalloc(size, _unsigned(gfp) | int(Gfp.ZERO)), 2)
        export("kvfree", self._kvfree, 1)

    def _register_vmap(self) -> None:
        kernel, export = self.kernel, self.kernel.symbols.register
        export("vmap", self._vmap, 4)
        export("vunmap", kernel.vmap.vunmap, 1)
        export("vm_map_ram", self._vm_map_ram, 3)
        export("vm_unmap_ram", lambda la, count: kernel.vmap_blocks.vm_unmap_ram(la, _unsigned(count)), 2)
        export("vm_unmap_aliases", kernel.vmap_blocks.vm_unmap_aliases, 0, gpl=True)

    def _register_pages(self) -> None:
        kernel, export = self.kernel, self.kernel.symbols.register
        layout, pages = kernel.layout, kernel.pages
        export("alloc_pages", lambda gfp, order: self._alloc_pages(_unsigned(gfp), _unsigned(order), NUMA_NO_NODE), 2)
        export("alloc_pages_node", lambda node, gfp, order: self._alloc_pages(_unsigned(gfp), _unsigned(order), _int(node)), 3)
        export("__free_pages", lambda page, order: self._free_pages(page, _unsigned(order)), 2)
        export("page_address", lambda page: layout.va(layout.la_to_pfn(page) << PAGE_SHIFT), 1)
        export("page_to_pfn", layout.la_to_pfn, 1)
        export("pfn_to_page", layout.page_to_la, 1)
        export("virt_to_page", lambda la: layout.page_to_la(layout.pa(la) >> PAGE_SHIFT), 1)
        export("page_count", lambda page: pages.page_count(layout.la_to_pfn(page)), 1)
        export("get_page", lambda page: pages.get_page(layout.la_to_pfn(page)), 1)
        export("put_page", lambda page: pages.put_page(layout.la_to_pfn(page)), 1)
        export("lookup_address", self._lookup_address, 2, gpl=True)

    def _register_slab(self) -> None:
        slab, export = self.kernel.slab, self.kernel.symbols.register
        export("kmalloc", lambda size, gfp: slab.kmalloc(size, _unsigned(gfp)) or 0, 2)
        export("kzalloc", lambda size, gfp: slab.kmalloc(size, _unsigned(gfp) | int(Gfp.ZERO)) or 0, 2)
        export("krealloc", lambda la, size, gfp: slab.krealloc(la, size, _unsigned(gfp)) or 0, 3)
        export("ksize", self._ksize, 1)
        export("kfree", self._kfree, 1)

    def _register_set_memory(self) -> None:
        export = self.kernel.symbols.register
        for name, function in (
            ("set_memory_ro", set_memory.set_memory_ro), ("set_memory_rw", set_memory.set_memory_rw),
            ("set_memory_x", set_memory.set_memory_x), ("set_memory_nx", set_memory.set_memory_nx),
        ):
            export(name, lambda la, count, change=function: self._set_memory(change, la, _int(count)), 2, gpl=True)

    def _register_printk(self) -> None:
        kernel, export = self.kernel, self.kernel.symbols.register
        export("_printk", self._printk, 1, varargs=True)
        kernel.symbols.add_alias("printk", "_printk")
        export("snprintf", self._snprintf, 3, varargs=True)
        export("panic", self._panic, 1, varargs=True)
        export("__warn_printk", self._warn_printk, 1, varargs=True)
        export("dump_stack", self._dump_stack, 0)

    # ---- pages

    def _alloc_pages(self, gfp: int, order: int, node: int) -> int:
        if order > _MAX_ORDER:
            return 0
        pfn = self.kernel.pages.alloc_pages(gfp, order, node)
        return 0 if pfn is None else self.kernel.layout.page_to_la(pfn)

    def _free_pages(self, page: int, order: int) -> None:
        pfn = self.kernel.layout.la_to_pfn(page)
        if order == 0:
            self.kernel.pages.put_page(pfn)
        else:
            self.kernel.pages.free_pages(pfn, order)

    def _vmalloc_to_page(self, la: int) -> int:
        pfn = self.kernel.vmalloc.vmalloc_to_pfn(la)
        return 0 if pfn is None else self.kernel.layout.page_to_la(pfn)

    def _lookup_address(self, la: int, level_la: int) -> int:
        """Address of the leaf entry in the direct map, 0 when a table is missing (v6.12 mm/pat/set_memory.c)."""
        found = self.kernel.init_mm.lookup(la)
        if not found.present and found.level > 1:
            return 0
        self.kernel.cpu.write(level_la, int(found.level).to_bytes(4, "little"))
        return self.kernel.layout.va(found.entry_pa)

    def _page_array(self, la: int, count: int) -> Pfns:
        """The frames that an array of `struct page *` names. Raises PageFault where the array is not mapped."""
        words = np.frombuffer(self.kernel.cpu.read(la, 8 * count), dtype=np.uint64)
        return np.array([self.kernel.layout.la_to_pfn(int(word)) for word in words], dtype=np.int64)

    # ---- mapping

    def _vmap(self, pages: int, count: int, flags: int, prot: int) -> int:
        count = _unsigned(count)
        if count > self.kernel.pages.totalram_pages():
            return 0
        return self.kernel.vmap.vmap(self._page_array(pages, count), count, flags, prot, self.kernel.caller, pages)

    def _vm_map_ram(self, pages: int, count: int, node: int) -> int:
        count = _unsigned(count)
        if count > _MAX_PAGE_ARRAY:
            return 0
        return self.kernel.vmap_blocks.vm_map_ram(self._page_array(pages, count), count, _int(node))

    def _set_memory(self, change: Change, la: int, count: int) -> int:
        if count <= 0:
            return 0
        err, flush = change(self.kernel.init_mm, la & -PAGE_SIZE, count)
        flush.flush(self.kernel.tlb)
        return err

    # ---- slab and kvmalloc

    def _kfree(self, la: int) -> None:
        try:
            self.kernel.slab.kfree(la)
        except SlabError as error:
            self.kernel.bug(error.kind, str(error))

    def _ksize(self, la: int) -> int:
        try:
            return self.kernel.slab.ksize(la)
        except SlabError as error:
            self.kernel.bug(error.kind, str(error))
            return 0

    def _kvmalloc(self, size: int, gfp: int) -> int:
        """kmalloc, and vmalloc where that fails (v6.12 mm/util.c __kvmalloc_node_noprof)."""
        kernel = self.kernel
        small = size <= PAGE_SIZE
        attempt = gfp if small else (gfp | int(Gfp.NOWARN) | int(Gfp.NORETRY)) & ~int(Gfp.NOFAIL)
        la = kernel.slab.kmalloc(size, attempt)
        if la is not None or small:
            return la or 0
        if size > 0x7FFF_FFFF:
            return 0
        return kernel.vmalloc.vmalloc_huge(size, gfp, kernel.caller)

    def _kvfree(self, la: int) -> None:
        if self.kernel.layout.is_vmalloc_addr(la):
            self.kernel.vmalloc.vfree(la)
        else:
            self._kfree(la)

    # ---- printing

    def _c_string(self, la: int) -> str:
        """A NUL-terminated string of the guest. Raises PageFault where it is not mapped."""
        data = b""
        while len(data) < _MAX_C_STRING:
            step = min(_C_STRING_CHUNK, PAGE_SIZE - (la + len(data) & PAGE_SIZE - 1))
            piece = self.kernel.cpu.read(la + len(data) & _MASK64, step)
            data += piece
            if b"\0" in piece:
                break
        return data.partition(b"\0")[0].decode("latin-1")

    def _printk(self, fmt: int, next_argument: NextArgument) -> int:
        return self.kernel.log.printk(self._format(fmt, next_argument))

    def _format(self, fmt: int, next_argument: NextArgument) -> str:
        return self.kernel.formatter.format(self._c_string(fmt), next_argument)

    def _snprintf(self, buffer: int, size: int, fmt: int, next_argument: NextArgument) -> int:
        text = self._format(fmt, next_argument).encode("latin-1", "replace")
        if size:
            self.kernel.cpu.write(buffer, text[: size - 1] + b"\0")
        return len(text)

    def _warn_printk(self, fmt: int, next_argument: NextArgument) -> None:
        self.kernel.print_lines(("------------[ cut here ]------------",))
        self.kernel.log.printk(self._format(fmt, next_argument))

    def _dump_stack(self) -> None:
        self.kernel.exceptions.dump_stack(self.kernel.cpu)

    def _panic(self, fmt: int, next_argument: NextArgument) -> None:
        message = self._format(fmt, next_argument)
        self.kernel.exceptions.panic(self.kernel.cpu, message)
        raise TaskEnded(Ending(End.PANIC, message))


