"""A stand-in for what the vmalloc model needs around it: CPUs, TLBs that count flushes, a work queue, a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from emu.kernel.purge import VmapSpace
from emu.kernel.vmap_node import VmapDesign

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

    def flush_tlb_kernel_range(self, start: int, end: int) -> None:
        self.flushed.append((start, end))

    def flush_tlb_all(self) -> None:
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
