"""A kernel floor to test on, and the recordings of real kernels to compare it with."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from emu.kernel.init_64 import InitMm, setup_kernel_memory
from emu.kernel.layout import Layout, make_layout
from emu.kernel.memblock import Memblock
from emu.kernel.mmu_context import MmContext
from emu.kernel.page_alloc import PageAllocator
from emu.kernel.profile import V6_12, Profile
from emu.memory import Memory

GIB = 1 << 30
MIB = 1 << 20
ORACLE = Path(os.environ.get("VMEMU_ORACLE", Path(__file__).resolve().parents[2].parent / "shared" / "oracle"))


@dataclass
class RecordedReport:
    """Collects what the kernel would print."""

    warnings: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def warn(self, function: str, text: str = "") -> None:
        self.warnings.append(function)

    def bug(self, function: str, text: str = "") -> None:
        self.bugs.append(function)

    def printk(self, text: str) -> None:
        self.lines.append(text)


@dataclass
class RecordedFlushes:
    """A TlbFlush that remembers what it was asked for; None stands for everything."""

    ranges: list[tuple[int, int] | None] = field(default_factory=list)

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "") -> None:
        self.ranges.append((start, end))

    def flush_tlb_all(self, *, cause: str = "") -> None:
        self.ranges.append(None)

    def flush_tlb_mm_range(
        self, mm: MmContext, start: int, end: int, stride_shift: int = 12, freed_tables: bool = True, *, cause: str = ""
    ) -> None:
        self.ranges.append((start, end))


@dataclass
class Floor:
    memory: Memory
    layout: Layout
    memblock: Memblock
    pages: PageAllocator
    mm: InitMm
    report: RecordedReport


def make_floor(
    levels: int = 4,
    *,
    size: int = GIB,
    nodes: int = 1,
    profile: Profile = V6_12,
    gbpages: bool = True,
    pti: bool = False,
    kaslr: int | None = None,
) -> Floor:
    memory = Memory(size, nodes)
    layout = make_layout(levels, memory_size=size, kaslr=None if kaslr is None else Random(kaslr))
    report = RecordedReport()
    kernel = setup_kernel_memory(memory, layout, profile, report, gbpages=gbpages, pti=pti)
    return Floor(memory, layout, kernel.memblock, kernel.pages, kernel.init_mm, report)


def recorded_facts(name: str) -> list[dict]:
    """Records of one facts file; skips the test where the recordings are not at hand."""
    path = ORACLE / "facts" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"recordings of real kernels are not at {ORACLE} (set VMEMU_ORACLE)")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def recorded_fact(name: str, kind: str) -> dict:
    return next(fact for fact in recorded_facts(name) if fact["t"] == kind)


def recorded_walk(name: str, what: str) -> dict:
    return next(fact["w"] for fact in recorded_facts(name) if fact["t"] == "walk" and fact["what"] == what)


def flags_of(entry: int) -> int:
    """An entry without the frame that it names: 40 physical address bits."""
    return entry & ~0xFF_FFFF_F000
