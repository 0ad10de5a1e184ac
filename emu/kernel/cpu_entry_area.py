"""The cpu_entry_area: each CPU's GDT, entry stack, TSS and guarded exception stacks at fixed addresses.

v6.12 arch/x86/include/asm/cpu_entry_area.h and arch/x86/mm/cpu_entry_area.c; v5.4 the same files. From 0xfffffe0000000000:

    +0                      IDT, read-only, one page for all CPUs
    +0x1000 + slot * size   struct cpu_entry_area of the CPU in that slot:
        gdt                 1 page, read-only: also the guard below the entry stack
        entry_stack_page    1 page
        tss                 5 pages (v5.4: 3), read-only
        estacks             for each of DF, NMI, DB, MCE, VC, VC2: an unmapped guard page, then the stack (8 KiB);
                            one more guard page on top
        cpu_debug_store     1 page, mapped on Intel CPUs only
        cpu_debug_buffers   32 pages, never mapped until used

Without KASLR the slot is the CPU number. The stacks of #VC are mapped only in encrypted guests, so never here.
The area is a plan: `pages` says what must be mapped where, the caller maps it and writes the contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Protocol

from emu.kernel.unwind import StackInfo, StackType

PAGE_SIZE = 4096
CPU_ENTRY_AREA_BASE = 0xFFFFFE0000000000
CPU_ENTRY_AREA_RO_IDT = CPU_ENTRY_AREA_BASE
CPU_ENTRY_AREA_PER_CPU = CPU_ENTRY_AREA_RO_IDT + PAGE_SIZE
CPU_ENTRY_AREA_MAP_SIZE = 1 << 39

_DEBUG_STORE_PAGES = 1
_DEBUG_BUFFER_PAGES = 32


class Ist(IntEnum):
    """IST_INDEX_*: index into the TSS's ist[] array. A gate's IST field is one more."""

    DF = 0
    NMI = 1
    DB = 2
    MCE = 3


class PageKind(IntEnum):
    """What a mapped run of pages of the area holds."""

    IDT = 0
    GDT = 1
    ENTRY_STACK = 2
    TSS = 3
    DF_STACK = 4
    NMI_STACK = 5
    DB_STACK = 6
    MCE_STACK = 7


@dataclass(frozen=True, slots=True)
class CeaPages:
    """A run to map: linear address, size in bytes, what it holds, and PAGE_KERNEL (writable) or PAGE_KERNEL_RO."""

    la: int
    size: int
    kind: PageKind
    writable: bool


@dataclass(frozen=True, slots=True)
class CeaGeometry:
    """What differs between versions. `estacks`: the stacks in ascending order, with None for one that is never mapped."""

    estacks: tuple[PageKind | None, ...]
    exception_stksz: int
    entry_stack_size: int
    tss_pages: int
    tss_limit: int
    iomap_base: int
    random_slots: bool

    @property
    def estacks_size(self) -> int:
        """sizeof(struct cea_exception_stacks): each stack with its guard, and the guard on top."""
        return len(self.estacks) * (PAGE_SIZE + self.exception_stksz) + PAGE_SIZE

    @property
    def size(self) -> int:
        """CPU_ENTRY_AREA_SIZE."""
        fixed = 2 + self.tss_pages + _DEBUG_STORE_PAGES + _DEBUG_BUFFER_PAGES
        return fixed * PAGE_SIZE + self.estacks_size


_ESTACKS = (PageKind.DF_STACK, PageKind.NMI_STACK, PageKind.DB_STACK, PageKind.MCE_STACK, None, None)
# v5.4: DB2 is a hole, DB1 the stack of a #DB nested in the #DB entry; nothing nests here, so only DB is mapped.
_ESTACKS_5_4 = (PageKind.DF_STACK, PageKind.NMI_STACK, None, None, PageKind.DB_STACK, PageKind.MCE_STACK)

GEOMETRY: Mapping[str, CeaGeometry] = MappingProxyType(
    {
        "6.12": CeaGeometry(_ESTACKS, 2 * PAGE_SIZE, PAGE_SIZE, 5, 0x4087, 0x4088, random_slots=True),
        # Randomised slots came with v6.2 and were not taken back to 6.1.
        "6.1": CeaGeometry(_ESTACKS, 2 * PAGE_SIZE, PAGE_SIZE, 5, 0x4087, 0x4088, random_slots=False),
        "5.4": CeaGeometry(_ESTACKS_5_4, PAGE_SIZE, 512, 3, 0x206F, 0x8000, random_slots=False),
    }
)

_STACK_TYPES = {
    PageKind.DF_STACK: StackType.DF,
    PageKind.NMI_STACK: StackType.NMI,
    PageKind.DB_STACK: StackType.DB,
    PageKind.MCE_STACK: StackType.MCE,
}
_IST_KINDS = (PageKind.DF_STACK, PageKind.NMI_STACK, PageKind.DB_STACK, PageKind.MCE_STACK)


@dataclass(frozen=True, slots=True)
class CpuEntryArea:
    """One CPU's area: `base` is the address of its struct cpu_entry_area."""

    base: int
    geometry: CeaGeometry

    @property
    def gdt(self) -> int:
        """Address of the GDT."""
        return self.base

    @property
    def entry_stack(self) -> tuple[int, int]:
        """[begin, end) of the entry stack; its end is the TSS's RSP0."""
        begin = self.base + PAGE_SIZE
        return begin, begin + self.geometry.entry_stack_size

    @property
    def tss(self) -> int:
        """Address of the TSS."""
        return self.base + 2 * PAGE_SIZE

    @property
    def estacks(self) -> int:
        """Address of struct cea_exception_stacks, whose first page is the guard below the DF stack."""
        return self.tss + self.geometry.tss_pages * PAGE_SIZE

    def exception_stack(self, kind: PageKind) -> tuple[int, int]:
        """[begin, end) of an exception stack. Raises ValueError for a kind that is none."""
        size = self.geometry.exception_stksz
        begin = self.estacks + self.geometry.estacks.index(kind) * (PAGE_SIZE + size) + PAGE_SIZE
        return begin, begin + size

    def ist(self) -> tuple[int, int, int, int]:
        """The TSS's IST1 to IST4: the tops of the DF, NMI, DB and MCE stacks (common.c: tss_setup_ist)."""
        df, nmi, db, mce = (self.exception_stack(kind)[1] for kind in _IST_KINDS)
        return df, nmi, db, mce

    def guard_pages(self) -> tuple[int, ...]:
        """The pages below, between and above the exception stacks that stay unmapped, ascending."""
        step = PAGE_SIZE + self.geometry.exception_stksz
        return tuple(self.estacks + index * step for index in range(len(self.geometry.estacks) + 1))

    def pages(self) -> Iterator[CeaPages]:
        """What to map, ascending. The IDT's page is not among it: see `ro_idt`."""
        yield CeaPages(self.gdt, PAGE_SIZE, PageKind.GDT, writable=False)
        yield CeaPages(self.entry_stack[0], PAGE_SIZE, PageKind.ENTRY_STACK, writable=True)
        yield CeaPages(self.tss, self.geometry.tss_pages * PAGE_SIZE, PageKind.TSS, writable=False)
        for kind in self.geometry.estacks:
            if kind is not None:
                yield CeaPages(self.exception_stack(kind)[0], self.geometry.exception_stksz, kind, writable=True)

    def stack_infos(self, next_sp: Callable[[int], int] = lambda end: 0) -> tuple[StackInfo, ...]:
        """The exception stacks and the entry stack for the unwinder, in its lookup order.

        `next_sp(end)` gives the RSP saved in the frame at the top of an exception stack, 0 while it is not in use.
        """
        infos = []
        for kind in _IST_KINDS:
            begin, end = self.exception_stack(kind)
            infos.append(StackInfo(_STACK_TYPES[kind], begin, end, next_sp(end)))
        return (*infos, StackInfo(StackType.ENTRY, *self.entry_stack))


def ro_idt() -> CeaPages:
    """The page through which every CPU reads the IDT."""
    return CeaPages(CPU_ENTRY_AREA_RO_IDT, PAGE_SIZE, PageKind.IDT, writable=False)


def cpu_entry_areas(version: str, nr_cpus: int, below: Callable[[int], int] | None = None) -> tuple[CpuEntryArea, ...]:
    """The areas of all CPUs. `below(n)` draws from [0, n) and is given with KASLR only (init_cea_offsets)."""
    geometry = GEOMETRY[version]
    slots: list[int] = list(range(nr_cpus))
    if below is not None and geometry.random_slots:
        max_cea = (CPU_ENTRY_AREA_MAP_SIZE - PAGE_SIZE) // geometry.size
        slots = []
        while len(slots) < nr_cpus:
            slot = below(max_cea)
            if slot not in slots:
                slots.append(slot)
    return tuple(CpuEntryArea(CPU_ENTRY_AREA_PER_CPU + slot * geometry.size, geometry) for slot in slots)


class CeaMapper(Protocol):
    """The page-table writer the area is mapped by: cea_set_pte for one page."""

    def cea_set_pte(self, la: int, pa: int, *, writable: bool) -> None:
        """Map the page at `la` to the frame at `pa`, PAGE_KERNEL or PAGE_KERNEL_RO, global."""

    def add_cpu_tss_rw(self, pa: int) -> None:
        """A CPU's TSS is at `pa`."""


def map_cpu_entry_areas(
    areas: Sequence[CpuEntryArea], mapper: CeaMapper, idt_pa: int, allocate: Callable[[int], int]
) -> Mapping[int, int]:
    """Map the IDT's page and all areas; `allocate(size)` gives zeroed contiguous frames. Returns la -> pa of every run."""
    placed: dict[int, int] = {CPU_ENTRY_AREA_RO_IDT: idt_pa}
    mapper.cea_set_pte(CPU_ENTRY_AREA_RO_IDT, idt_pa, writable=False)
    for area in areas:
        for run in area.pages():
            pa = placed[run.la] = allocate(run.size)
            for offset in range(0, run.size, PAGE_SIZE):
                mapper.cea_set_pte(run.la + offset, pa + offset, writable=run.writable)
            if run.kind is PageKind.TSS:
                mapper.add_cpu_tss_rw(pa)
    return placed
