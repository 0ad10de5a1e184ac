"""A stand-in for what the vmalloc model needs around it: CPUs, TLBs that count flushes, a work queue, a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.init_64 import InitMm, setup_kernel_memory
from emu.kernel.layout import make_layout
from emu.kernel.memblock import Memblock
from emu.kernel.page_alloc import PageAllocator
from emu.kernel.profile import V6_12, Profile
from emu.kernel.purge import VmapSpace
from emu.kernel.slab import Slab
from emu.kernel.vmalloc import Vmalloc
from emu.kernel.vmap import Vmap
from emu.kernel.vmap_block import VmapBlocks
from emu.kernel.vmap_node import VmapDesign, design_of
from emu.memory import Memory

VMALLOC_START = 0xFFFFC90000000000
VMALLOC_END = 0xFFFFE8FFFFFFFFFF


@dataclass
class Machine:
    possible: int = 1
    online: int = 1
    current: int = 0
    flushed: list[tuple[int, int]] = field(default_factory=list)
    work: list[Callable[[], None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "") -> None:
        self.flushed.append((start, end))

    def flush_tlb_all(self, *, cause: str = "") -> None:
        self.flushed.append((0, (1 << 64) - 1))

    def schedule_work(self, work: Callable[[], None]) -> None:
        self.work.append(work)

    def run_work(self) -> None:
        while self.work:
            self.work.pop(0)()

    def warn(self, function: str, text: str = "") -> None:
        self.warnings.append(f"{function}: {text}")

    def bug(self, function: str, text: str = "") -> None:
        raise AssertionError(f"BUG in {function}: {text}")

    def printk(self, text: str) -> None:
        self.log.append(text)


def space(design: VmapDesign, cpus: int = 1) -> tuple[VmapSpace, Machine]:
    """An address space with nothing busy, and its machine of `cpus` CPUs."""
    machine = Machine(possible=cpus, online=cpus)
    made = VmapSpace(design, (VMALLOC_START, VMALLOC_END), machine, machine, machine, machine)
    made.init_free_space([])
    return made, machine


@dataclass
class Task(Machine):
    """A Machine that is also the context of a kernel task, with memory behind it."""

    in_interrupt: bool = False
    in_nmi: bool = False
    fatal_signal_pending: bool = False
    bugs: list[str] = field(default_factory=list)
    warn_allocs: list[tuple[int, str]] = field(default_factory=list)
    timeouts: int = 0
    # Whether workers get the CPU where a task offers it.
    yields: bool = False
    mm: InitMm | None = None

    def bug(self, function: str, text: str = "") -> None:
        self.bugs.append(function)

    def warn_alloc(self, gfp: int, text: str) -> None:
        self.warn_allocs.append((gfp, text))

    def _pa(self, la: int) -> int:
        pa = self.mm.to_pa(la)
        if pa is None:
            raise LookupError(f"page fault at {la:#x}")
        return pa

    def load(self, la: int) -> int:
        return self.mm.memory.read_u64(self._pa(la))

    def store(self, la: int, value: int) -> None:
        self.mm.memory.write_u64(self._pa(la), value)

    def schedule_timeout_uninterruptible(self, ticks: int) -> None:
        self.timeouts += ticks

    def cond_resched(self) -> None:
        if self.yields:
            self.run_work()


@dataclass
class Kernel:
    task: Task
    mm: InitMm
    pages: PageAllocator
    slab: Slab
    space: VmapSpace
    vmalloc: Vmalloc
    vmap: Vmap
    blocks: VmapBlocks
    memblock: Memblock

    def frames(self, count: int) -> np.ndarray:
        """Frames of their own for a mapping."""
        return np.array([self.pages.alloc_pages(GFP_KERNEL) for _ in range(count)], dtype=np.int64)

    def validate(self) -> None:
        self.vmalloc.validate()
        self.blocks.validate()
        self.pages.validate()
        self.slab.validate()

    def addresses(self, kind: str) -> list[tuple[int, int]]:
        """Ranges of all "busy" or "lazy" areas."""
        return [(va.va_start, va.va_end) for node in self.space.nodes.nodes for va in getattr(node, kind)]


def kernel(
    profile: Profile = V6_12,
    *,
    size: int = 64 << 20,
    nodes: int = 1,
    cpus: int = 1,
    levels: int = 4,
    pti: bool = False,
    gbpages: bool = True,
    busy: tuple[tuple[int, int], ...] = (),
) -> Kernel:
    """A booted kernel whose vmalloc region is empty but for the ranges `busy`, where boot has put something."""
    memory = Memory(size, nodes)
    layout = make_layout(levels, memory_size=size)
    task = Task(possible=cpus, online=cpus)
    floor = setup_kernel_memory(memory, layout, profile, task, pti=pti, gbpages=gbpages)
    task.mm = floor.init_mm
    slab = Slab(floor.pages, layout)
    bounds = (layout.vmalloc_start, layout.vmalloc_end)
    made = VmapSpace(design_of(profile), bounds, task, task, task, task)
    vmalloc = Vmalloc(made, floor.init_mm, slab, task, task)
    for start, end in busy:
        vmalloc.vm_area_add_early(start, end - start, 0)
    vmalloc.vmalloc_init()
    return Kernel(task, floor.init_mm, floor.pages, slab, made, vmalloc, Vmap(vmalloc), VmapBlocks(vmalloc), floor.memblock)
