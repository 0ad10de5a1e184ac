"""Several CPUs without an engine: MMUs over one memory, interrupts taken when somebody waits, everything else real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kernel_floor import make_floor

from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mm import Mm
from emu.kernel.mmu_context import MmuContexts
from emu.kernel.preempt import HARDIRQ_OFFSET, PreemptCount
from emu.kernel.profile import V6_12, Profile
from emu.kernel.smp import SmpCalls
from emu.kernel.tlbflush import TlbFlushes
from emu.mmu.fault import Access, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.registers import RESET_CR4, Cr4
from emu.trace import Event, FlushIssued, TlbFlushed

IF = 1 << 9
USER = 0x4000_0000


class Deadlock(AssertionError):
    """A CPU waits for something that no other will ever do."""


class FakeCpu:
    """A CPU that executes nothing but what the kernel asks of it."""

    def __init__(self, number: int, mmu: Mmu) -> None:
        self.id = number
        self.mmu = mmu
        self.rflags = 2 | IF
        self.pending: list[int] = []
        self.taken: list[int] = []
        self.invlpgs: list[int] = []
        self.cr3_writes: list[int] = []
        self.cr4_writes: list[int] = []

    def reg(self, name: str) -> int:
        return self.rflags if name == "rflags" else getattr(self.mmu, name)

    def set_reg(self, name: str, value: int) -> None:
        if name == "rflags":
            self.rflags = value
        else:
            getattr(self, f"{name}_writes").append(value)
            getattr(self.mmu, f"load_{name}")(value)

    def invlpg(self, la: int) -> None:
        self.invlpgs.append(la)
        self.mmu.invlpg(la)

    def invpcid(self, kind: int, pcid: int, la: int) -> None:
        self.mmu.invpcid(kind, pcid, la)

    def sees(self, la: int, user: bool = False) -> int | None:
        """The pa behind a linear address as this CPU has it, None for a page fault."""
        try:
            return self.mmu.translate(la, Access.READ, user=user, ac=True)
        except PageFault:
            return None


@dataclass
class SmpMachine:
    """The kernel's side: the current CPU, preempt_counts, IPIs that are taken when some CPU spins."""

    cpus_online: int
    profile: Profile = V6_12
    pcid: bool = False
    pti: bool = False
    invpcid: bool = False
    invlpgb: bool = False
    warnings: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    ipis: list[tuple[int, int, int]] = field(default_factory=list)
    current: int = 0

    def __post_init__(self) -> None:
        self.online = self.possible = self.cpus_online
        self.floor = make_floor(profile=self.profile, pti=self.pti)
        self.init_mm = self.floor.mm
        self.cpu = []
        for number in range(self.online):
            mmu = Mmu(self.floor.memory)
            mmu.reset(cr3=self.init_mm.pgd, cr4=int(RESET_CR4 | Cr4.PGE | (Cr4.PCIDE if self.pcid else 0)))
            self.cpu.append(FakeCpu(number, mmu))
        self._preempt = [PreemptCount() for _ in self.cpu]
        self.smp = SmpCalls(self, self, self.profile.smp)
        self.contexts = MmuContexts(self, self.init_mm.pgd, self.profile.tlb, pcid=self.pcid, pti=self.pti)
        self.contexts.guests_write_cr3 = False
        self.tlb = TlbFlushes(
            self.smp, self.contexts, self.events.append, task_size_max=self.floor.layout.task_size_max, invpcid=self.invpcid,
            invlpgb=self.invlpgb,
        )
        for cpu in self.cpu:
            self.contexts.initialize_tlbstate_and_flush(cpu.id)
            cpu.cr3_writes.clear()

    # ---- SmpKernel and Waiting

    @property
    def cpus(self) -> SmpMachine:
        return self

    def cpu_by_number(self, number: int) -> FakeCpu:
        return self.cpu[number]

    def preempt(self, number: int) -> PreemptCount:
        return self._preempt[number]

    def send_ipi(self, cpu: int, vector: int) -> None:
        self.ipis.append((self.current, cpu, vector))
        if vector not in self.cpu[cpu].pending:
            self.cpu[cpu].pending.append(vector)

    def warn(self, function: str, text: str = "") -> None:
        self.warnings.append(function)

    def spin_until(self, condition: Callable[[], bool], site: str = "") -> None:
        this_cpu = self.current
        while not condition():
            if not self.all_take_interrupts():
                raise Deadlock(f"CPU {this_cpu} waits for ever")
            self.current = this_cpu

    # ---- what a test does

    def take_interrupts(self, number: int) -> bool:
        """Let a CPU handle what is pending, if its interrupts are on; false if it had nothing to do."""
        cpu = self.cpu[number]
        taken = False
        while cpu.pending and cpu.rflags & IF:
            taken = True
            previous, self.current = self.current, number
            vector = cpu.pending.pop(0)
            cpu.taken.append(vector)
            cpu.rflags &= ~IF
            self._preempt[number].add(HARDIRQ_OFFSET)
            self.smp.call_function_interrupt(number, vector)
            self._preempt[number].add(-HARDIRQ_OFFSET)
            cpu.rflags |= IF
            self.current = previous
        return taken

    def all_take_interrupts(self) -> bool:
        """take_interrupts of every CPU; whether one had something to do."""
        return sum(self.take_interrupts(cpu) for cpu in range(self.online)) > 0

    def settle(self) -> None:
        """Let every CPU handle what is pending."""
        while self.all_take_interrupts():
            pass

    def on(self, number: int) -> SmpMachine:
        """Go on as CPU `number`."""
        self.current = number
        return self

    def map_kernel(self, la: int, pages: int = 1) -> None:
        """Map pages of the kernel's."""
        pfns = self.floor.pages.alloc_pages_bulk(0xCC0, 0, pages)
        prot = self.init_mm.prots.kernel
        assert not self.init_mm.vmap_pages_range_noflush(la, la + pages * PAGE_SIZE, prot, pfns)

    def unmap_kernel(self, la: int, pages: int = 1) -> None:
        """Unmap them, flushing nothing."""
        self.init_mm.vunmap_range_noflush(la, la + pages * PAGE_SIZE).defer()

    def mm(self, pages: int = 1, prot: int = 0x67) -> Mm:
        """A user mm with pages at USER."""
        mm = Mm(self.init_mm)
        assert not mm.map_user(USER, pages * PAGE_SIZE, prot)
        return mm

    def switch(self, number: int, mm: Mm | None) -> FakeCpu:
        """Load an mm on a CPU (None: init_mm), interrupts off as the scheduler has them."""
        previous, self.current = self.current, number
        self.contexts.switch_mm_irqs_off(self.contexts.init_mm if mm is None else mm.context)
        self.current = previous
        return self.cpu[number]

    def lazy(self, number: int) -> None:
        """A kernel thread begins on a CPU."""
        previous, self.current = self.current, number
        self.contexts.enter_lazy_tlb()
        self.current = previous

    def sent(self) -> list[tuple[int, int]]:
        """The IPIs so far as (CPU, vector)."""
        return [(cpu, vector) for _, cpu, vector in self.ipis]

    def issued(self) -> list[FlushIssued]:
        return [event for event in self.events if isinstance(event, FlushIssued)]

    def flushed(self) -> list[TlbFlushed]:
        return [event for event in self.events if isinstance(event, TlbFlushed)]
