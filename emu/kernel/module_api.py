"""The functions that a module may call, with their arguments as C passes them: u64 in, u64 out.

Each is one line of glue to the model; what it does stands there. `struct page *` is the address of the frame's descriptor in
vmemmap. Names and exports: v6.12; functions that are macros or inlines there (kmalloc, alloc_pages, vmalloc ...) are exported
under their plain names besides, so that assembly can call them. Where v6.12 says NAME_noprof, that is the symbol's name.

A wild argument ends in what Linux does with it: NULL, a WARN, or a fault at the address that the kernel would have touched.
"""

from __future__ import annotations

from emu.kernel.guest_exports import GuestExports
from emu.kernel.kernel import Kernel
from emu.kernel.module_api_pages import PageExports
from emu.kernel.module_api_print import PrintExports
from emu.kernel.module_api_slab import SlabExports
from emu.kernel.module_api_vmalloc import VmallocExports
from emu.kernel.module_api_vmap import VmapExports
from emu.kernel.sync_boot import boot_sync


class ModuleApi:
    """Registers the functions of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        exports = GuestExports(kernel)
        self.vmalloc = VmallocExports(exports)
        self.vmap = VmapExports(exports)
        self.pages = PageExports(exports)
        self.slab = SlabExports(exports)
        self.printing = PrintExports(exports)
        self.sync = boot_sync(kernel, exports, self.slab.kvfree)
        kernel.add_site_symbols()
