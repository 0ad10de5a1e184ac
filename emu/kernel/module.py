"""Module memory: the vmalloc areas of a loaded module, and their protections.

Source: v6.12 kernel/module/main.c (module_memory_alloc, layout_sections), kernel/module/strict_rwx.c, mm/execmem.c,
arch/x86/mm/init.c execmem_arch_setup; v6.1 kernel/module/main.c (core_layout), arch/x86/kernel/module.c module_alloc. Modules of
6.12 have one area per kind of memory, of 6.1 and before one for everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.init_64 import InitMm
from emu.kernel.kernel_cpu import TlbFlush
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.set_memory import set_memory_ro, set_memory_x
from emu.kernel.vm_struct import Vm
from emu.kernel.vmalloc import Vmalloc

TEXT, DATA, RODATA, RO_AFTER_INIT = "text", "data", "rodata", "ro_after_init"
# The order of the parts in the single area of the older layout.
_CORE_ORDER = (TEXT, RODATA, RO_AFTER_INIT, DATA)


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of a module's memory: page-aligned address and size in bytes, rounded up to pages."""

    kind: str
    la: int
    size: int


@dataclass(frozen=True, slots=True)
class Module:
    """A loaded module's memory; `areas` are the addresses to vfree."""

    name: str
    parts: tuple[Part, ...]
    areas: tuple[int, ...]

    def part(self, kind: str) -> Part | None:
        """The memory of a kind, None when the module has none."""
        return next((part for part in self.parts if part.kind == kind), None)

    def contains(self, la: int) -> bool:
        """Whether an address lies in the module."""
        return any(part.la <= la < part.la + part.size for part in self.parts)


class ModuleLoader:
    """Gives modules their memory out of [MODULES_VADDR, MODULES_END)."""

    def __init__(self, vmalloc: Vmalloc, init_mm: InitMm, tlb: TlbFlush) -> None:
        self.vmalloc = vmalloc
        self.init_mm = init_mm
        self.tlb = tlb

    def _alloc(self, size: int, caller: int) -> int:
        layout = self.vmalloc.layout
        return self.vmalloc.vmalloc_node_range(
            size, PAGE_SIZE, layout.module_load_base, layout.modules_end, int(GFP_KERNEL), self.vmalloc.prots.kernel,
            int(Vm.FLUSH_RESET_PERMS), NUMA_NO_NODE, caller,
        )

    def load(self, name: str, sizes: Mapping[str, int], caller: int) -> Module | None:
        """Allocate the memory of a module; `sizes` in bytes by kind. All parts are writable and not executable at first.

        None, with everything given back, when memory or address space is short.
        """
        pages = {kind: size + PAGE_SIZE - 1 & -PAGE_SIZE for kind, size in sizes.items() if size}
        if self.vmalloc.profile.module_areas == ("core",):
            start = self._alloc(sum(pages.values()), caller)
            if not start:
                return None
            parts, la = [], start
            for kind in _CORE_ORDER:
                if kind in pages:
                    parts.append(Part(kind, la, pages[kind]))
                    la += pages[kind]
            return Module(name, tuple(parts), (start,))
        parts = []
        for kind in self.vmalloc.profile.module_areas:
            if kind in pages:
                la = self._alloc(pages[kind], caller)
                if not la:
                    for part in parts:
                        self.vmalloc.vfree(part.la)
                    return None
                parts.append(Part(kind, la, pages[kind]))
        return Module(name, tuple(parts), tuple(part.la for part in parts))

    def protect(self, module: Module) -> int:
        """Make text read-only and executable, rodata read-only (module_enable_text_rox, module_enable_rodata_ro).

        0, or -ENOMEM when the direct map's leaves could not be split.
        """
        for kind, operations in ((TEXT, (set_memory_ro, set_memory_x)), (RODATA, (set_memory_ro,)), (RO_AFTER_INIT, ())):
            part = module.part(kind)
            if part is None:
                continue
            for operation in operations:
                err, flush = operation(self.init_mm, part.la, part.size >> PAGE_SHIFT)
                flush.flush(self.tlb, "cpa_flush")
                if err:
                    return err
        return 0

    def unload(self, module: Module) -> None:
        """Give a module's memory back."""
        for la in module.areas:
            self.vmalloc.vfree(la)
