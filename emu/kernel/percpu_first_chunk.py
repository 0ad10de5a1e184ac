"""The first chunk of per-CPU memory: memblock memory in the direct map, one unit for each CPU (v6.12 mm/percpu.c).

CPUs of one node form a group; a group's units adjoin, groups lie wherever their node has room. A unit is

    [0, static_size)        the kernel's own per-CPU variables, addressed by GS:symbol
    [.., + reserved_size)   those of modules, so that 32-bit displacements reach them
    [.., + dyn_size)        the first part that alloc_percpu hands out

and what is left of the unit goes back to memblock. Every later chunk has the same distances between its units, so a CPU's copy
of a variable is one addition away whatever chunk it is in. Source: v6.12 pcpu_build_alloc_info, pcpu_embed_first_chunk,
pcpu_setup_first_chunk; arch/x86/kernel/setup_percpu.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from emu.kernel.layout import PAGE_SIZE, PMD_SIZE, Layout
from emu.kernel.memblock import Memblock, OutOfMemoryAtBoot
from emu.kernel.profile import Profile

PCPU_MIN_UNIT_SIZE = 32 << 10
_INT_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class PcpuSizes:
    """Bytes of a first chunk's parts: __per_cpu_end - __per_cpu_start, PERCPU_FIRST_CHUNK_RESERVE, PERCPU_DYNAMIC_RESERVE."""

    static: int
    reserved: int
    dynamic: int
    dynamic_early: int


# The static sizes are those of distribution kernels. 6.12 has CONFIG_RANDOM_KMALLOC_CACHES, whose caches need more at boot.
PCPU_SIZES = {
    "6.12": PcpuSizes(0x36000, 8 << 10, 28 << 12, 20 << 12),
    "6.1": PcpuSizes(0x34000, 8 << 10, 28 << 10, 20 << 10),
    "5.4": PcpuSizes(0x2C000, 8 << 10, 28 << 10, 20 << 10),
}


@dataclass(frozen=True, slots=True)
class PcpuGroup:
    """CPUs of one node: `cpu_map` names the CPU of each unit, None for a unit that nobody uses."""

    cpu_map: tuple[int | None, ...]
    base_offset: int

    @property
    def nr_units(self) -> int:
        """Units of the group, unused ones included."""
        return len(self.cpu_map)


@dataclass(frozen=True, slots=True)
class PcpuAllocInfo:
    """struct pcpu_alloc_info with its base: sizes in bytes, `base` the linear address that all offsets count from."""

    static_size: int
    reserved_size: int
    dyn_size: int
    unit_size: int
    atom_size: int
    alloc_size: int
    groups: tuple[PcpuGroup, ...]
    base: int = 0

    @property
    def size_sum(self) -> int:
        """Bytes of a unit that are in use."""
        return self.static_size + self.reserved_size + self.dyn_size

    @property
    def unit_offsets(self) -> dict[int, int]:
        """pcpu_unit_offsets: distance of each CPU's unit from the base of a chunk."""
        return {
            cpu: group.base_offset + i * self.unit_size
            for group in self.groups
            for i, cpu in enumerate(group.cpu_map)
            if cpu is not None
        }

    def line(self) -> str:
        """What boot prints."""
        sizes = f"s{self.static_size} r{self.reserved_size} d{self.dyn_size} u{self.unit_size}"
        return f"percpu: Embedded {self.size_sum // PAGE_SIZE} pages/cpu {sizes}"


def pcpu_build_alloc_info(sizes: PcpuSizes, atom_size: int, nr_cpus: int, cpu_to_node: Callable[[int], int]) -> PcpuAllocInfo:
    """Group the CPUs and choose the size of a unit; `base` and the groups' offsets are as if all groups adjoined.

    Units share an allocation of whole atoms as long as no more than a third as many as there are CPUs stay unused.
    """
    size_sum = sizes.static + sizes.reserved + max(sizes.dynamic, sizes.dynamic_early)
    size_sum = size_sum + PAGE_SIZE - 1 & -PAGE_SIZE
    min_unit_size = max(size_sum, PCPU_MIN_UNIT_SIZE)
    alloc_size = -(-min_unit_size // atom_size) * atom_size
    members: dict[int, list[int]] = {}
    for cpu in range(nr_cpus):
        members.setdefault(cpu_to_node(cpu), []).append(cpu)
    best_upa, last_allocs = 0, _INT_MAX
    for upa in range(alloc_size // min_unit_size, 0, -1):
        if alloc_size % upa or alloc_size // upa % PAGE_SIZE:
            continue
        allocs = sum(-(-len(cpus) // upa) for cpus in members.values())
        wasted = allocs * upa - nr_cpus
        if wasted > nr_cpus // 3:
            continue
        if allocs > last_allocs:
            break
        last_allocs, best_upa = allocs, upa
    unit_size = alloc_size // best_upa
    groups: list[PcpuGroup] = []
    unit = 0
    for cpus in members.values():
        nr_units = -(-len(cpus) // best_upa) * best_upa
        groups.append(PcpuGroup((*cpus, *(None,) * (nr_units - len(cpus))), unit * unit_size))
        unit += nr_units
    dyn_size = size_sum - sizes.static - sizes.reserved
    return PcpuAllocInfo(sizes.static, sizes.reserved, dyn_size, unit_size, atom_size, alloc_size, tuple(groups))


def pcpu_embed_first_chunk(
    memblock: Memblock, layout: Layout, profile: Profile, nr_cpus: int, cpu_to_node: Callable[[int], int]
) -> PcpuAllocInfo:
    """Take the first chunk from memblock, zeroed, on 2 MiB boundaries. Raises OutOfMemoryAtBoot when a node has no room."""
    info = pcpu_build_alloc_info(PCPU_SIZES[profile.name], PMD_SIZE, nr_cpus, cpu_to_node)
    areas = []
    for group in info.groups:
        first = next(cpu for cpu in group.cpu_map if cpu is not None)
        areas.append(_alloc(memblock, group.nr_units * info.unit_size, info.atom_size, cpu_to_node(first)))
    for group, pa in zip(info.groups, areas, strict=True):
        for i, cpu in enumerate(group.cpu_map):
            unit = pa + i * info.unit_size
            used = 0 if cpu is None else info.size_sum
            memblock.memory.fill(unit, used)
            if used < info.unit_size:
                memblock.free(unit + used, unit + info.unit_size)
    base = min(areas)
    groups = tuple(replace(group, base_offset=pa - base) for group, pa in zip(info.groups, areas, strict=True))
    return replace(info, groups=groups, base=layout.va(base))


def _alloc(memblock: Memblock, size: int, align: int, node: int) -> int:
    """Memory of a node, else of any (memblock_alloc_try_nid). Raises OutOfMemoryAtBoot."""
    try:
        return memblock.alloc(size, align, node)
    except OutOfMemoryAtBoot:
        others = [other.id for other in memblock.memory.nodes if other.id != node]
        for other in others:
            if any((end - size & -align) >= start for start, end in _free_of(memblock, other)):
                return memblock.alloc(size, align, other)
        raise


def _free_of(memblock: Memblock, node: int) -> list[tuple[int, int]]:
    where = memblock.memory.nodes[node]
    return memblock.free_ranges(where.start, where.end)


# Names, offsets and sizes of the static variables that the model keeps. A compiler's stack canary is at GS:40.
IRQ_STACK_SIZE = 4 * PAGE_SIZE
IRQ_STACK_BACKING_STORE = PAGE_SIZE
NR_CACHED_STACKS = 2
_FIRST_VARIABLE = IRQ_STACK_BACKING_STORE + IRQ_STACK_SIZE

STATIC_VARIABLES: dict[str, tuple[int, int]] = {
    "fixed_percpu_data": (0, 48),
    "irq_stack_backing_store": (IRQ_STACK_BACKING_STORE, IRQ_STACK_SIZE),
    "this_cpu_off": (_FIRST_VARIABLE, 8),
    "cpu_number": (_FIRST_VARIABLE + 8, 4),
    "numa_node": (_FIRST_VARIABLE + 12, 4),
    "hardirq_stack_ptr": (_FIRST_VARIABLE + 16, 8),
    "cached_stacks": (_FIRST_VARIABLE + 24, 8 * NR_CACHED_STACKS),
    "pcpu_hot": (_FIRST_VARIABLE + 64, 64),
}
"""Offset from the unit's base, which is the symbol's value (__per_cpu_start is 0 on x86-64), and size in bytes."""
