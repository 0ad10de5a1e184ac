"""The x86-64 address space of Linux, as data.

Below is the map that this file defines: what stands where without KASLR, lowest address first. END addresses are the
last byte, as the kernel's own table has them.

4-level paging (48-bit linear addresses, a PGD entry covers 512 GiB):

    start              end                  size     what
    0000000000000000   00007fffffffffff     128 TiB  user space, one per mm
    0000800000000000   ffff7fffffffffff              not canonical
    ffff800000000000   ffff87ffffffffff       8 TiB  guard hole, left to hypervisors
    ffff880000000000   ffff887fffffffff     0.5 TiB  LDT remap (PTI)
    ffff888000000000   ffffc87fffffffff      64 TiB  direct map of all RAM           PAGE_OFFSET
    ffffc90000000000   ffffe8ffffffffff      32 TiB  vmalloc, vmap and ioremap       VMALLOC_START..VMALLOC_END
    ffffea0000000000   ffffeaffffffffff       1 TiB  array of struct page            VMEMMAP_START
    ffffec0000000000   fffffbffffffffff      16 TiB  KASAN shadow

5-level paging (57-bit linear addresses, a PGD entry covers 256 TiB):

    start              end                  size     what
    0000000000000000   00ffffffffffffff      64 PiB  user space, one per mm
    0100000000000000   feffffffffffffff              not canonical
    ff00000000000000   ff0fffffffffffff       4 PiB  guard hole, left to hypervisors
    ff10000000000000   ff10ffffffffffff    0.25 PiB  LDT remap (PTI)
    ff11000000000000   ff90ffffffffffff      32 PiB  direct map of all RAM           PAGE_OFFSET
    ffa0000000000000   ffd1ffffffffffff    12.5 PiB  vmalloc, vmap and ioremap       VMALLOC_START..VMALLOC_END
    ffd4000000000000   ffd5ffffffffffff     0.5 PiB  array of struct page            VMEMMAP_START
    ffdf000000000000   fffffbffffffffff       8 PiB  KASAN shadow

and for both from here on:

    fffffc0000000000   fffffdffffffffff       2 TiB  hole; KASLR places no region at or above fffffe0000000000
    fffffe0000000000   fffffe7fffffffff     0.5 TiB  per-CPU entry areas             CPU_ENTRY_AREA
    ffffff0000000000   ffffff7fffffffff     0.5 TiB  %esp fixup stacks               ESPFIX_BASE_ADDR
    ffffffef00000000   fffffffeffffffff      64 GiB  EFI runtime services
    ffffffff80000000   ffffffffbfffffff       1 GiB  kernel image, physical 0 on     START_KERNEL_MAP
    ffffffffc0000000   fffffffffeffffff    1008 MiB  modules                         MODULES_VADDR..MODULES_END
    ffffffffff000000   ffffffffffffffff      16 MiB  fixmap, vsyscall page, hole

Sources: v6.12 Documentation/arch/x86/x86_64/mm.rst, arch/x86/include/asm/pgtable_64_types.h, page_64_types.h; KASLR:
arch/x86/mm/kaslr.c kernel_randomize_memory, boot/compressed/kaslr.c, kernel/module/main.c. CONFIG_RANDOMIZE_BASE is on,
which makes KERNEL_IMAGE_SIZE 1 GiB also where a boot option turns KASLR off.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PMD_SHIFT = 21
PMD_SIZE = 1 << PMD_SHIFT
PUD_SHIFT = 30
PUD_SIZE = 1 << PUD_SHIFT
P4D_SHIFT = 39
P4D_SIZE = 1 << P4D_SHIFT
PTRS_PER_TABLE = 512

TB_SHIFT = 40

START_KERNEL_MAP = 0xFFFFFFFF80000000
PHYSICAL_START = 0x1000000
KERNEL_IMAGE_SIZE = 1 << 30
MODULES_VADDR = START_KERNEL_MAP + KERNEL_IMAGE_SIZE
MODULES_END = 0xFFFFFFFFFF000000
CPU_ENTRY_AREA_BASE = 0xFFFFFE0000000000
ESPFIX_BASE_ADDR = 0xFFFFFF0000000000

# The image of this model: text, then read-only data, then data and bss, each in whole 2 MiB leaves.
KERNEL_TEXT_SIZE = 2 * PMD_SIZE
KERNEL_RODATA_SIZE = PMD_SIZE
KERNEL_DATA_SIZE = PMD_SIZE
KERNEL_SIZE = KERNEL_TEXT_SIZE + KERNEL_RODATA_SIZE + KERNEL_DATA_SIZE

SIZEOF_STRUCT_PAGE = 64
PAGES_PER_SECTION = 1 << 15
# Physical address bits that the direct map must be able to hold: v6.12 arch/x86/include/asm/sparsemem.h.
MAX_PHYSMEM_BITS = {4: 46, 5: 52}
VMALLOC_SIZE_TB = {4: 32, 5: 12800}
PAGE_OFFSET_BASE = {4: 0xFFFF888000000000, 5: 0xFF11000000000000}
VMALLOC_BASE = {4: 0xFFFFC90000000000, 5: 0xFFA0000000000000}
VMEMMAP_BASE = {4: 0xFFFFEA0000000000, 5: 0xFFD4000000000000}
LDT_BASE_ADDR = {4: 0xFFFF880000000000, 5: 0xFF10000000000000}
PGDIR_SHIFT = {4: 39, 5: 48}

LOAD_PHYSICAL_ALIGN = PMD_SIZE
MAX_MODULE_LOAD_OFFSET_PAGES = 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands in one machine's kernel address space. Addresses and sizes in bytes.

    `vmalloc_end` is inclusive, as VMALLOC_END is. `modules_vaddr`..`modules_end` is half-open; `module_load_base` is
    where the first module goes (KASLR: 1 to 1024 pages above `modules_vaddr`). `kernel_text` is _text, `kernel_phys`
    the physical address of it.
    """

    levels: int
    page_offset: int
    vmalloc_start: int
    vmemmap_start: int
    kernel_text: int
    kernel_phys: int
    module_load_base: int
    modules_vaddr: int = MODULES_VADDR
    modules_end: int = MODULES_END
    cpu_entry_area: int = CPU_ENTRY_AREA_BASE
    kaslr: bool = False

    @property
    def vmalloc_end(self) -> int:
        """Last byte of the vmalloc region (VMALLOC_END, inclusive)."""
        return self.vmalloc_start + (VMALLOC_SIZE_TB[self.levels] << TB_SHIFT) - 1

    @property
    def pgdir_shift(self) -> int:
        """log2 of what one top-level entry maps: 39 or 48."""
        return PGDIR_SHIFT[self.levels]

    @property
    def pgdir_size(self) -> int:
        """Bytes that one top-level entry maps."""
        return 1 << PGDIR_SHIFT[self.levels]

    @property
    def ldt_remap(self) -> int:
        """LDT_BASE_ADDR: where PTI maps LDTs."""
        return LDT_BASE_ADDR[self.levels]

    @property
    def task_size_max(self) -> int:
        """First address above user space: the last page below the hole is kept free (v6.12 asm/page_64.h)."""
        return (1 << (self.pgdir_shift + 8)) - PAGE_SIZE

    @property
    def kernel_rodata(self) -> int:
        """__start_rodata, which is also _etext here."""
        return self.kernel_text + KERNEL_TEXT_SIZE

    @property
    def kernel_data(self) -> int:
        """_sdata, which is also __end_rodata here."""
        return self.kernel_rodata + KERNEL_RODATA_SIZE

    @property
    def kernel_end(self) -> int:
        """_end: first address behind the kernel image."""
        return self.kernel_text + KERNEL_SIZE

    def is_vmalloc_addr(self, la: int) -> bool:
        """Whether `la` is in the vmalloc region; its very last byte is not (v6.12 mm/vmalloc.c: is_vmalloc_addr)."""
        return self.vmalloc_start <= la < self.vmalloc_end

    def is_module_addr(self, la: int) -> bool:
        """Whether `la` is in the module region."""
        return self.modules_vaddr <= la < self.modules_end

    def is_vmalloc_or_module_addr(self, la: int) -> bool:
        """v6.12 mm/vmalloc.c: is_vmalloc_or_module_addr."""
        return self.is_module_addr(la) or self.is_vmalloc_addr(la)

    def is_kernel_text(self, la: int) -> bool:
        """Whether `la` is in [_text, _etext)."""
        return self.kernel_text <= la < self.kernel_rodata

    def is_kernel_image(self, la: int) -> bool:
        """Whether `la` is in [_text, _end)."""
        return self.kernel_text <= la < self.kernel_end

    def va(self, pa: int) -> int:
        """__va: the direct-map address of physical address `pa`."""
        return self.page_offset + pa

    def pa(self, la: int) -> int:
        """__pa of a direct-map or kernel-image address. Raises ValueError for any other (such as a vmalloc address)."""
        if self.is_kernel_image(la):
            return la - self.kernel_text + self.kernel_phys
        pa = la - self.page_offset
        if not 0 <= pa < 1 << MAX_PHYSMEM_BITS[self.levels]:
            raise ValueError(f"{la:#x} is neither in the direct map nor in the kernel image")
        return pa

    def page_to_la(self, pfn: int) -> int:
        """Address of the struct page of frame `pfn`."""
        return self.vmemmap_start + pfn * SIZEOF_STRUCT_PAGE

    def la_to_pfn(self, page: int) -> int:
        """Frame number of the struct page at `page`. Raises ValueError when no struct page stands there."""
        offset = page - self.vmemmap_start
        if offset % SIZEOF_STRUCT_PAGE or not 0 <= offset < 1 << (MAX_PHYSMEM_BITS[self.levels] - 6):
            raise ValueError(f"{page:#x} is not the address of a struct page")
        return offset // SIZEOF_STRUCT_PAGE

    def validate(self) -> None:
        """The regions keep their order, do not overlap, and stand on the boundaries that their leaves need."""
        assert self.levels in (4, 5)
        half = (1 << 64) - (1 << (self.pgdir_shift + 8))
        physical = 1 << MAX_PHYSMEM_BITS[self.levels]
        assert half <= self.page_offset, "the direct map is in the kernel's half"
        assert self.page_offset + physical <= self.vmalloc_start, "the direct map ends below vmalloc"
        assert self.vmalloc_end < self.vmemmap_start, "vmalloc ends below the struct pages"
        pages = physical >> PAGE_SHIFT
        vmemmap_end = self.vmemmap_start + pages * SIZEOF_STRUCT_PAGE
        assert vmemmap_end <= self.cpu_entry_area, "struct pages end below the CPU entry areas"
        for base in (self.page_offset, self.vmalloc_start, self.vmemmap_start):
            assert base % PUD_SIZE == 0, "regions start on 1 GiB"
        assert self.kernel_text >= START_KERNEL_MAP, "the image is in its 1 GiB"
        assert self.kernel_end <= self.modules_vaddr, "the image is in its 1 GiB"
        assert self.kernel_text % PMD_SIZE == 0, "the image is mapped by 2 MiB leaves"
        assert self.kernel_phys % PMD_SIZE == 0, "the image is mapped by 2 MiB leaves"
        assert self.modules_vaddr <= self.module_load_base < self.modules_end


def make_layout(levels: int, *, memory_size: int = 0, kaslr: Random | None = None) -> Layout:
    """The layout for 4 or 5 paging levels; with a seeded Random, randomised as KASLR does it.

    `memory_size` in bytes bounds where the image may be placed physically. Raises ValueError for other levels.
    Source: v6.12 arch/x86/mm/kaslr.c kernel_randomize_memory (bases, 1 GiB steps, order kept; CONFIG_ZONE_DEVICE is on,
    so the direct map keeps its full size), kernel/module/main.c get_module_load_offset (1 to 1024 pages).
    """
    if levels not in (4, 5):
        raise ValueError(f"number of paging levels is {levels}; it must be 4 or 5")
    if kaslr is None:
        return Layout(
            levels=levels,
            page_offset=PAGE_OFFSET_BASE[levels],
            vmalloc_start=VMALLOC_BASE[levels],
            vmemmap_start=VMEMMAP_BASE[levels],
            kernel_text=START_KERNEL_MAP + PHYSICAL_START,
            kernel_phys=PHYSICAL_START,
            module_load_base=MODULES_VADDR,
        )
    bases = _randomize_memory(levels, kaslr)
    kernel_text = START_KERNEL_MAP + _random_slot(kaslr, KERNEL_IMAGE_SIZE)
    kernel_phys = _random_slot(kaslr, max(memory_size, PHYSICAL_START + KERNEL_SIZE))
    return Layout(
        levels=levels,
        page_offset=bases[0],
        vmalloc_start=bases[1],
        vmemmap_start=bases[2],
        kernel_text=kernel_text,
        kernel_phys=kernel_phys,
        module_load_base=MODULES_VADDR + kaslr.randint(1, MAX_MODULE_LOAD_OFFSET_PAGES) * PAGE_SIZE,
        kaslr=True,
    )


def _random_slot(random: Random, limit: int) -> int:
    """A 2 MiB-aligned offset in [PHYSICAL_START, limit - KERNEL_SIZE]."""
    slots = (limit - KERNEL_SIZE - PHYSICAL_START) // LOAD_PHYSICAL_ALIGN + 1
    return PHYSICAL_START + random.randrange(slots) * LOAD_PHYSICAL_ALIGN


def _randomize_memory(levels: int, random: Random) -> list[int]:
    """Bases of direct map, vmalloc and vmemmap: the free space is shared out, each region moving by whole 1 GiB
    steps.
    """
    physical_tb = 1 << (MAX_PHYSMEM_BITS[levels] - TB_SHIFT)
    vmemmap_size = (physical_tb << (TB_SHIFT - PAGE_SHIFT)) * SIZEOF_STRUCT_PAGE
    sizes_tb = (physical_tb, VMALLOC_SIZE_TB[levels], -(-vmemmap_size >> TB_SHIFT))
    vaddr = PAGE_OFFSET_BASE[levels]
    remain_entropy = CPU_ENTRY_AREA_BASE - vaddr - (sum(sizes_tb) << TB_SHIFT)
    bases = []
    for i, size_tb in enumerate(sizes_tb):
        entropy = remain_entropy // (len(sizes_tb) - i)
        entropy = (random.getrandbits(64) % (entropy + 1)) & ~(PUD_SIZE - 1)
        vaddr += entropy
        bases.append(vaddr)
        vaddr += size_tb << TB_SHIFT
        # At least one byte between regions, rounded up to the step.
        vaddr = (vaddr + 1 + PUD_SIZE - 1) & ~(PUD_SIZE - 1)
        remain_entropy -= entropy
    return bases
