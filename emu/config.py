"""Which machine to build, checked."""

from __future__ import annotations

from dataclasses import dataclass

from emu.mmu.tlb import TlbMode
from emu.turns import DEFAULT_QUANTUM, parse_schedule

DEFAULT_MEMORY = 1 << 30
DEFAULT_MAX_INSTRUCTIONS = 1_000_000_000
MAX_CPUS = 64


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What machine to build. `memory` in bytes; `kernel` a profile's name; `tlb` a TlbMode's value.

    `pcid`: the kernel turns PCIDs on; `invlpgb`: the CPUs have INVLPGB and the kernel uses it in place of IPIs.
    `debug_pagealloc`, a kernel parameter, flushes at every unmapping; `tlbsan` reports uses of stale translations.
    `quantum` in instructions is the turn of one of several CPUs, unless `schedule` (see emu/turns.py) decides.
    `gbpages` false: a CPU without 1 GiB pages. `nogbpages`, `nohugevmalloc`, `nohugeiomap`: the kernel parameters of these names.
    """

    levels: int = 4
    cpus: int = 1
    memory: int = DEFAULT_MEMORY
    nodes: int = 1
    kernel: str = "6.12"
    tlb: str = "infinite"
    native: bool = False
    kaslr: bool = False
    pti: bool = False
    pcid: bool = False
    invlpgb: bool = False
    debug_pagealloc: bool = False
    tlbsan: bool = True
    quantum: int = DEFAULT_QUANTUM
    schedule: str = ""
    gbpages: bool = True
    nogbpages: bool = False
    nohugevmalloc: bool = False
    nohugeiomap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ValueError(f"number of CPUs is {self.cpus}; it must be 1 to {MAX_CPUS}")
        if self.native and self.cpus != 1:
            raise ValueError(f"number of CPUs is {self.cpus}; a native machine has one")
        if self.levels not in (4, 5):
            raise ValueError(f"paging levels is {self.levels}; it must be 4 or 5")
        if self.tlb not in {mode.value for mode in TlbMode}:
            raise ValueError(f"TLB mode is {self.tlb!r}; it must be one of {', '.join(mode.value for mode in TlbMode)}")
        if self.native and self.tlb != TlbMode.INFINITE:
            raise ValueError(f"TLB mode is {self.tlb!r}; a native machine has Unicorn's own TLB, whose mode cannot be chosen")
        if self.schedule:
            parse_schedule(self.schedule, self.cpus)
        if self.invlpgb and self.pti:
            raise ValueError("invlpgb and pti are both set; no processor with INVLPGB needs page-table isolation")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be 0 to 2^64-1")
