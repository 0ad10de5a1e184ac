"""The kernel's own page tables, as boot leaves them (v6.12 arch/x86/mm/init_64.c, arch/x86/kernel/head_64.S).

    direct map     [0, 2 MiB) in 4 KiB leaves, then 2 MiB, then 1 GiB leaves where they fit; the alias of the kernel's text
                   and read-only data is read-only
    kernel image   2 MiB leaves: text read-only and executable, rodata read-only, data writable
    vmemmap        2 MiB leaves, one per 128 MiB of RAM
    vmalloc        top-level entries only: 64 PUD tables with 4 levels, 50 P4D tables with 5 (one more when KASLR's base is
                   not aligned to them)
    espfix         its top-level entry

The tables for the kernel image and espfix stand in the image's data; all others come from the page allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emu.kernel.gfp import GFP_PGTABLE_KERNEL
from emu.kernel.layout import (
    ESPFIX_BASE_ADDR,
    KERNEL_DATA_SIZE,
    KERNEL_RODATA_SIZE,
    KERNEL_SIZE,
    KERNEL_TEXT_SIZE,
    MODULES_VADDR,
    PAGE_SHIFT,
    PAGE_SIZE,
    PAGES_PER_SECTION,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SHIFT,
    SIZEOF_STRUCT_PAGE,
    START_KERNEL_MAP,
    Layout,
)
from emu.kernel.memblock import Memblock
from emu.kernel.page_alloc import PageAllocator
from emu.kernel.percpu_first_chunk import PcpuAllocInfo, pcpu_embed_first_chunk
from emu.kernel.pgprot import GLOBAL, KERNPG_TABLE, PAGE_TABLE, large_prot, make_pgprots
from emu.kernel.pgtable import PageTable
from emu.kernel.profile import Profile
from emu.kernel.set_memory import change_page_attr
from emu.memory import Memory
from emu.mmu.entry import PHYSICAL_MASK

if TYPE_CHECKING:
    from emu.kernel.vmap_area import Report

SECTION_SIZE = PAGES_PER_SECTION << PAGE_SHIFT
SECTION_MEMMAP_SIZE = PAGES_PER_SECTION * SIZEOF_STRUCT_PAGE
FIRST_MIB = 1 << 20

# Offsets of the static tables in the image's data. The page behind init_top_pgt is its user PGD with page-table isolation.
INIT_TOP_PGT = 0x0000
LEVEL4_KERNEL_PGT = 0x2000
LEVEL3_KERNEL_PGT = 0x3000
LEVEL2_KERNEL_PGT = 0x4000
LEVEL2_FIXMAP_PGT = 0x5000
ESPFIX_PUD_PAGE = 0x6000
STATIC_TABLES_SIZE = 0x7000
# kernel_to_user_pgdp: bit 12 of a PGD's address chooses between the two (v6.12 arch/x86/include/asm/pgtable.h).
PTI_USER_PGD = PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Vmemmap:
    """Struct pages: [la, la + size) mapped to [pa, pa + size)."""

    la: int
    pa: int
    size: int


class InitMm(PageTable):
    """init_mm's page tables. `pgds` holds the PGDs of all other mms. Addresses by `layout`, protections in `prots`."""

    def __init__(
        self,
        memory: Memory,
        pages: PageAllocator,
        layout: Layout,
        profile: Profile,
        report: Report,
        *,
        gbpages: bool = True,
        direct_gbpages: bool = True,
        pti: bool = False,
    ) -> None:
        self.static_tables = layout.pa(layout.kernel_data)
        memory.fill(self.static_tables, STATIC_TABLES_SIZE)
        super().__init__(memory, pages, layout.levels, self.static_tables + INIT_TOP_PGT, report, gbpages=gbpages)
        self.layout = layout
        self.profile = profile
        self.prots = make_pgprots(profile, pti=pti)
        self.pti = pti
        self.direct_gbpages = direct_gbpages
        # Where each CPU's TSS stands: per-CPU data in Linux (cpu_tss_rw).
        self._cpu_tss_rw: list[int] = []
        self.sync_pgds = profile.syncs_mappings

    def build(self, vmemmap: tuple[Vmemmap, ...]) -> None:
        """Make all boot mappings. Raises MemoryError when RAM is too small for the tables."""
        self._map_kernel_image()
        self._map_direct()
        for part in vmemmap:
            self._boot_map(part.la, part.size, part.pa, self.prots.kernel, PMD_SHIFT)
        if self.profile.preallocated_vmalloc:
            self.preallocate_vmalloc_pages()

    def _entry(self, table_offset: int, index: int, target_offset: int, flags: int) -> None:
        pa = self.static_tables + table_offset + 8 * index
        self.memory.write_u64(pa, self.static_tables + target_offset | flags)

    def _map_kernel_image(self) -> None:
        """The tables of head_64.S: level3_kernel_pgt holds the kernel's 1 GiB and the one of modules and fixmap."""
        top = LEVEL3_KERNEL_PGT
        if self.levels == 5:
            top = LEVEL4_KERNEL_PGT
            self._entry(LEVEL4_KERNEL_PGT, START_KERNEL_MAP >> 39 & 511, LEVEL3_KERNEL_PGT, PAGE_TABLE)
        self._entry(INIT_TOP_PGT, 511, top, PAGE_TABLE)
        self._entry(LEVEL3_KERNEL_PGT, START_KERNEL_MAP >> PUD_SHIFT & 511, LEVEL2_KERNEL_PGT, KERNPG_TABLE)
        self._entry(LEVEL3_KERNEL_PGT, MODULES_VADDR >> PUD_SHIFT & 511, LEVEL2_FIXMAP_PGT, PAGE_TABLE)
        # espfix: v6.12 arch/x86/kernel/espfix_64.c init_espfix_bsp. Nothing is mapped there before an IRET to 16 bits.
        espfix_table = INIT_TOP_PGT if self.levels == 4 else LEVEL4_KERNEL_PGT
        self._entry(espfix_table, ESPFIX_BASE_ADDR >> 39 & 511, ESPFIX_PUD_PAGE, PAGE_TABLE)
        layout = self.layout
        pmds = self.memory.table(self.static_tables + LEVEL2_KERNEL_PGT)
        for la, size, prot in (
            (layout.kernel_text, KERNEL_TEXT_SIZE, self.prots.kernel_rox),
            (layout.kernel_rodata, KERNEL_RODATA_SIZE, self.prots.kernel_ro),
            (layout.kernel_data, KERNEL_DATA_SIZE, self.prots.kernel),
        ):
            for offset in range(0, size, PMD_SIZE):
                pmds[la + offset >> PMD_SHIFT & 511] = layout.pa(la + offset) | large_prot(prot)

    def _map_direct(self) -> None:
        size = self.memory.size
        self._boot_map(self.layout.va(0), PMD_SIZE, 0, self.prots.kernel, PAGE_SHIFT)
        # v6.12 arch/x86/mm/init.c probe_page_size_mask.
        max_page_shift = PUD_SHIFT if self.direct_gbpages else PMD_SHIFT
        self._boot_map(self.layout.va(PMD_SIZE), size - PMD_SIZE, PMD_SIZE, self.prots.kernel, max_page_shift)
        # mark_rodata_ro: no CPU runs yet, so nothing can be stale.
        alias = self.layout.va(self.layout.kernel_phys)
        pages = (KERNEL_TEXT_SIZE + KERNEL_RODATA_SIZE) >> PAGE_SHIFT
        clear = self.prots.kernel & ~self.prots.kernel_ro
        if change_page_attr(self, alias, pages, set_mask=0, clear_mask=clear)[0]:
            raise MemoryError("RAM is too small for the kernel's page tables")

    def _boot_map(self, la: int, size: int, pa: int, prot: int, max_page_shift: int) -> None:
        if self.vmap_range_noflush(la, la + size, pa, prot, max_page_shift):
            raise MemoryError("RAM is too small for the kernel's page tables")

    def cea_set_pte(self, la: int, pa: int, *, writable: bool) -> None:
        """Map one page of the CPU entry areas, which no CPU has used yet: PAGE_KERNEL or _RO, global also with PTI.

        Raises MemoryError without memory for a table. Source: v6.12 arch/x86/mm/cpu_entry_area.c cea_set_pte.
        """
        prots = make_pgprots(self.profile)
        if isinstance(self.set_pte(la, pa | (prots.kernel if writable else prots.kernel_ro)), int):
            raise MemoryError("RAM is too small for the CPU entry areas' page tables")

    def add_cpu_tss_rw(self, pa: int) -> None:
        """A CPU's TSS is at `pa`: its writable alias in the direct map is what the kernel's own code uses."""
        self._cpu_tss_rw.append(pa)

    def pti_init(self, entry_text: int) -> None:
        """Give user mode's page tables what entering the kernel needs: CPU entry areas, espfix, and the leaf of the entry text.

        Besides, of the direct map, the first page of each CPU's TSS, in which SYSCALL's entry code spills a register. The entry
        text's leaf becomes global, in both tables, as it is the same in every address space. Raises MemoryError without memory.
        Source: v6.12 arch/x86/mm/pti.c pti_clone_user_shared, pti_setup_espfix64, pti_clone_entry_text.
        """
        for pa in self._cpu_tss_rw:
            self.set_pgd(self._pti_walk(self.layout.va(pa), 1), pa | self.prots.kernel)
        for la in (self.layout.cpu_entry_area, ESPFIX_BASE_ADDR):
            self._pti_clone(la, 4)
        found = self.lookup(entry_text)
        self.write_entry(found.entry_pa, found.entry | GLOBAL, entry_text, found.size).defer()
        self._pti_clone(entry_text, found.level)

    def _pti_clone(self, la: int, level: int) -> None:
        """Copy init_mm's entry of `level` for `la` into the user tables, making the tables above it as _KERNPG_TABLE."""
        kernel = self.pgd
        for at in range(self.levels, level, -1):
            kernel = self.memory.read_u64(kernel + _offset(la, at)) & PHYSICAL_MASK
        self.set_pgd(self._pti_walk(la, level), self.memory.read_u64(kernel + _offset(la, level)))

    def _pti_walk(self, la: int, level: int) -> int:
        """Where the user tables' entry of `level` for `la` stands, with the tables above it made (pti_user_pagetable_walk_*)."""
        user = self.pgd + PTI_USER_PGD
        for at in range(self.levels, level, -1):
            target = user + _offset(la, at)
            if not self.memory.read_u64(target):
                pfn = self.pages.alloc_pages(int(GFP_PGTABLE_KERNEL))
                if pfn is None:
                    raise MemoryError("RAM is too small for the page tables of user mode")
                self.set_pgd(target, pfn << PAGE_SHIFT | KERNPG_TABLE)
            user = self.memory.read_u64(target) & PHYSICAL_MASK
        return user + _offset(la, level)

    def sync_current_stack_to_mm(self, pgd: int, la: int) -> None:
        """Before v5.8: give a PGD that is about to be loaded the top-level entry of the stack in use, `la` an address in it.

        Without it the first push faults, the fault's frame cannot be pushed either, and a double fault ends it. Source: v5.4
        arch/x86/mm/tlb.c sync_current_stack_to_mm.
        """
        offset = _offset(la, self.levels)
        entry = self.memory.read_u64(self.pgd + offset)
        if entry and not self.memory.read_u64(pgd + offset):
            self.set_pgd(pgd + offset, entry)

    def vmalloc_sync_mappings(self) -> None:
        """Before v5.8: give every mm all top-level entries of the vmalloc region at once, so that no access to it faults.

        Linux does it where a fault could not be handled, such as before an NMI handler is registered.
        """
        self.sync(self.layout.vmalloc_start, self.layout.vmalloc_end + 1)

    def vmalloc_sync_unmappings(self) -> None:
        """Before v5.8, ahead of every purge: the same, as x86-64 never takes a top-level entry away."""
        self.vmalloc_sync_mappings()

    def preallocate_vmalloc_pages(self) -> None:
        """Populate every top-level entry of the vmalloc region, so that no mm's PGD ever lacks one.

        Source: v6.12 arch/x86/mm/init_64.c preallocate_vmalloc_pages. Raises MemoryError where Linux panics.
        """
        addr = self.layout.vmalloc_start
        while addr <= self.layout.vmalloc_end:
            if self.alloc_table(addr, self.levels - 1) < 0:
                raise MemoryError("RAM is too small to preallocate the page tables of the vmalloc region")
            addr = (addr & -self.layout.pgdir_size) + self.layout.pgdir_size


def _offset(la: int, level: int) -> int:
    return (la >> (9 * level + 3) & 511) << 3


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """The floor that the kernel stands on once boot has set up its memory."""

    memblock: Memblock
    pages: PageAllocator
    init_mm: InitMm
    percpu: PcpuAllocInfo


def setup_kernel_memory(
    memory: Memory,
    layout: Layout,
    profile: Profile,
    report: Report,
    *,
    gbpages: bool = True,
    direct_gbpages: bool = True,
    pti: bool = False,
    nr_cpus: int = 1,
    cpu_to_node: Callable[[int], int] = lambda cpu: 0,
) -> KernelMemory:
    """Reserve what boot needs, the CPUs' first per-CPU units included, start the page allocator and build init_mm's tables.

    Raises ValueError when the kernel image is not in RAM, OutOfMemoryAtBoot or MemoryError when RAM is too small.
    """
    if memory.size < layout.kernel_phys + KERNEL_SIZE:
        raise ValueError(
            f"memory size is {memory.size:#x}; the kernel image alone ends at {layout.kernel_phys + KERNEL_SIZE:#x}"
        )
    memblock = Memblock(memory)
    # Firmware data and the trampoline for other CPUs: v6.12 arch/x86/realmode/init.c reserve_real_mode.
    memblock.reserve(0, FIRST_MIB)
    memblock.reserve(layout.kernel_phys, layout.kernel_phys + KERNEL_SIZE)
    vmemmap = _alloc_vmemmap(memory, memblock, layout)
    percpu = pcpu_embed_first_chunk(memblock, layout, profile, nr_cpus, cpu_to_node)
    pages = PageAllocator(memory, memblock)
    init_mm = InitMm(memory, pages, layout, profile, report, gbpages=gbpages, direct_gbpages=direct_gbpages, pti=pti)
    init_mm.build(vmemmap)
    return KernelMemory(memblock, pages, init_mm, percpu)


def _alloc_vmemmap(memory: Memory, memblock: Memblock, layout: Layout) -> tuple[Vmemmap, ...]:
    """Struct pages of each section in the node of the section's first frame (v6.12 mm/sparse-vmemmap.c)."""
    parts = []
    for node in memory.nodes:
        first = -(-node.start // SECTION_SIZE)
        sections = -(-node.end // SECTION_SIZE) - first
        if sections > 0:
            size = sections * SECTION_MEMMAP_SIZE
            pa = memblock.alloc(size, PMD_SIZE, node.id)
            parts.append(Vmemmap(layout.page_to_la(first * PAGES_PER_SECTION), pa, size))
    return tuple(parts)
