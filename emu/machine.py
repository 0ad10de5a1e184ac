"""A whole machine: memory, CPUs, a booted kernel, and a guest program run on it to its end.

A guest runs as a module's init function in a kernel thread of its own. Python is in charge between two runs of the engine: it
handles exported functions and exception entries, and stops when the guest returns, dies, or reaches its bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from emu.config import DEFAULT_MAX_INSTRUCTIONS, MachineConfig
from emu.cpu import Cpu, Halted, LimitReached, Livelock
from emu.engine import Engine
from emu.exceptions import CpuException, Vector
from emu.guest.expect import Fault, Outcome, Unreadable
from emu.guest.link import Linked
from emu.guest.program import Program
from emu.hub import Final, Finish, Hub
from emu.kernel.entry import End, Ending
from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT
from emu.kernel.mm_api import MmApi
from emu.kernel.mmu_context import MmContext
from emu.kernel.module import Module
from emu.kernel.module_api import ModuleApi
from emu.kernel.percpu_api import register_percpu
from emu.kernel.places import place_of
from emu.kernel.profile import find_profile
from emu.kernel.ptrace import PtRegs
from emu.kernel.sched import NeedsClock
from emu.kernel.show_state import blocked_lines, cpu_lines
from emu.kernel.task import KernelThread, ThreadState, comm_of
from emu.kernel.tlbflush import TlbFlushes
from emu.load_module import load_module, module_name
from emu.memory import PAGE_SIZE, BusError, Memory
from emu.mmu.entry import PHYSICAL_MASK
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.registers import Features
from emu.mmu.tlb import Tlb, TlbMode
from emu.mmu.walk import walk
from emu.native import NativeEngine
from emu.start_cpu import start_cpu
from emu.tlbsan import NOTHING_TRACKED, Scene, TlbSan, Tracking, kernel_scene, lines
from emu.trace import Delivery, Event, FlushIssued, FunctionCall, Sink, TlbFlushed, discard
from emu.turns import Alone, Policy, RoundRobin, Scheduled, parse_schedule
from emu.watchdog import Watchdog, WatchdogExpired

# No engine runs faster than this on any host, so a run that ends within limit / PEAK seconds cannot have passed the limit.
PEAK_INSTRUCTIONS_PER_SECOND = 10_000_000_000
KEPT_FAULTS = 1024
UNBOUNDED = 1 << 61
_NMI = int(Vector.NMI)
_GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)


@dataclass(slots=True)
class Statistics:
    """What a run counted: the same in every run with the same seed."""

    exceptions: Counter[int] = field(default_factory=Counter)
    kernel_calls: Counter[str] = field(default_factory=Counter)
    flushes: int = 0
    full_flushes: int = 0


class Machine:
    """A booted machine. `limit` bounds the guest's instructions exactly; without it the caller must bound the run otherwise.

    Raises ValueError or MemoryError for a machine that cannot be: RAM too small, an unknown kernel.
    """

    def __init__(
        self, config: MachineConfig, *, limit: int | None = None, sink: Sink = discard, track: Tracking = NOTHING_TRACKED
    ) -> None:
        self.config = config
        self.sink = sink
        self.statistics = Statistics()
        self._flushes: TlbFlushes | None = None
        profile = find_profile(config.kernel)
        self.memory = Memory(config.memory, config.nodes)
        features = Features(la57=config.levels == 5, gbpages=config.gbpages)
        self.kernel = Kernel(
            self.memory, profile, self, levels=config.levels, nr_cpus=config.cpus,
            random=Random(config.seed) if config.kaslr else None, seed=config.seed, gbpages=features.gbpages,
            direct_gbpages=not config.nogbpages, hugevmalloc=not config.nohugevmalloc, hugeiomap=not config.nohugeiomap,
            pti=config.pti, pcid=config.pcid, gp_access=self._gp_access,
        )
        self.kernel.sync = ModuleApi(self.kernel).sync
        register_percpu(self.kernel)
        self.mm_api = MmApi(self.kernel)
        if (config.cpus > 1 or config.schedule) and limit is None:
            limit = DEFAULT_MAX_INSTRUCTIONS
        # The hub keeps the bound, over all CPUs and from the guest's first instruction on; the engines only count.
        counted = None if limit is None else UNBOUNDED
        engine = NativeEngine if config.native else Engine
        self.cpus = [
            Cpu(
                number, self.memory, features=features, levels=config.levels, tlb=Tlb(config.tlb), is_stub=self.kernel.is_stub,
                limit=counted, engine=engine,
            )
            for number in range(config.cpus)
        ]
        self.cpu = self.cpus[0]
        # (vector, error, CR2, RIP, general registers): a Fault each would cost a page fault a twentieth of its time.
        self._arriving: tuple[int, int | None, int | None, int, list[int]] | None = None
        self._entered: list[tuple[int, int | None, int | None, int, list[int]]] = []
        self._general = [cpu.engine.batch(*_GENERAL) for cpu in self.cpus]
        for cpu in self.cpus:
            cpu.on_delivery = partial(self._on_delivery, cpu)
            cpu.on_entry = self._on_entry
            start_cpu(cpu, self.kernel, levels=config.levels, pcid=config.pcid)
        self.kernel.send_ipi = self._send_ipi
        self.kernel.send_nmi = lambda number: self.cpus[number].raise_nmi()
        kernel = self.kernel
        kernel.attach_cpus(list(self.cpus))
        self._flushes = TlbFlushes(
            kernel.smp, kernel.contexts, self._on_flush, task_size_max=kernel.layout.task_size_max,
            invpcid=features.invpcid and config.pcid, invlpgb=config.invlpgb,
        )
        kernel.vmalloc.debug_pagealloc = config.debug_pagealloc
        self.hub = Hub(self.cpus, kernel.sched, kernel.text, self, self._policy(), limit)
        self.hub.on_turn = self._on_turn
        self.tlbsan = TlbSan(kernel, track=track, time=lambda: self.hub.total() or 0) if self._sanitizes else None
        if self.tlbsan is not None:
            self.tlbsan.on_finding = lambda finding: kernel.print_lines(lines(finding))
            for cpu in self.cpus:
                self._sanitize(self.tlbsan, cpu)
            self.tlbsan.tables.on_new = self.memory.no_stores_unseen
        self._thread: KernelThread | None = None
        self._returned: int | None = None
        self._registers: dict[str, int] = {}
        # What the counters showed when the guest was called.
        self._counted: dict[str, int] = {}

    def _on_turn(self, number: int) -> None:
        self.kernel.on_turn(number)
        if self.tlbsan is not None:
            self.tlbsan.turn_over()

    @property
    def _sanitizes(self) -> bool:
        """Without a TLB nothing is stale, and Unicorn's own cannot be seen."""
        return self.config.tlbsan and not self.config.native and self.config.tlb != TlbMode.NONE

    def _policy(self) -> Policy:
        return Alone() if self.config.cpus == 1 else RoundRobin(self.config.quantum)

    def _sanitize(self, tlbsan: TlbSan, cpu: Cpu) -> None:
        """Let TLBSan see a CPU's translations, and its stores to page tables."""
        tlbsan.attach(cpu.mmu, cpu.id, partial(self._scene, cpu, True), partial(self._scene, cpu, False))
        cpu.engine.tables = tlbsan.tables
        cpu.engine.on_table_store = partial(tlbsan.tables_written, cpu.id)

    def _scene(self, cpu: Cpu, sized: bool) -> Scene:
        """Who makes the access under way on a CPU, for TLBSan; `sized`: with address and size, which takes decoding."""
        reg = cpu.engine.reg if cpu.engine.running else cpu.reg
        found = cpu.memory_accesses(reg("rip")) if sized else ()
        operands = tuple((one.la, one.size, one.write) for one in found)
        return kernel_scene(self.kernel, cpu.id, cpu.mmu, reg, 0, self.hub.executed(cpu.id), operands)

    def _send_ipi(self, number: int, vector: int) -> None:
        """A fixed interrupt through the local APIC; it merges with one of its vector that is pending (SDM vol. 3A 12.8.4)."""
        cpu = self.cpus[number]
        if vector not in cpu.pending_interrupts:
            cpu.raise_interrupt(vector)

    # ---- TlbFlush, as the kernel asks for it

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "flush_tlb_kernel_range") -> None:
        """Remove the translations of kernel [start, end) from every CPU; nothing while boot has started none."""
        if self._flushes is not None:
            self._flushes.flush_tlb_kernel_range(start, end, cause=cause)

    def flush_tlb_all(self, *, cause: str = "flush_tlb_all") -> None:
        """Remove every translation from every CPU; nothing while boot has started none."""
        if self._flushes is not None:
            self._flushes.flush_tlb_all(cause=cause)

    def flush_tlb_mm_range(
        self, mm: MmContext, start: int, end: int, stride_shift: int = PAGE_SHIFT, freed_tables: bool = True, *,
        cause: str = "flush_tlb_mm_range",
    ) -> None:
        """Remove the translations of user [start, end) of an mm from the CPUs that use it."""
        if self._flushes is not None:
            self._flushes.flush_tlb_mm_range(mm, start, end, stride_shift, freed_tables, cause=cause)

    @property
    def flushes(self) -> TlbFlushes:
        """TLB maintenance of the machine's kernel, and what it counted."""
        assert self._flushes is not None, "the CPUs are started"
        return self._flushes

    def _on_flush(self, event: Event) -> None:
        if isinstance(event, FlushIssued):
            if event.end - event.start >> 64:
                self.statistics.full_flushes += 1
            else:
                self.statistics.flushes += 1
            if self.tlbsan is not None:
                self.tlbsan.flush_issued(event.flush, event.cpu, event.start, event.end, event.cause, event.cpus)
        elif isinstance(event, TlbFlushed) and self.tlbsan is not None:
            self.tlbsan.flushed(event.flush, event.cpu)
        self.sink(event)

    # ---- what the CPU tells

    def _on_delivery(self, cpu: Cpu, exception: CpuException) -> None:
        vector = exception.vector
        if vector != _NMI and vector < 32 and len(self._entered) < KEPT_FAULTS:
            self._arriving = (vector, exception.error, exception.cr2, cpu.rip, self._general[cpu.id].read())
        if self.sink is not discard:
            self.sink(Delivery(cpu.id, exception.vector, exception.error, cpu.rip, exception.cr2))

    def _on_entry(self, exception: CpuException) -> None:
        self.statistics.exceptions[exception.vector] += 1
        if self._arriving is not None:
            self._entered.append(self._arriving)
            self._arriving = None

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The first exceptions that were entered, at most KEPT_FAULTS, in their order."""
        return tuple(
            Fault(vector, error, cr2, rip, dict(zip(_GENERAL, registers, strict=True)) | {"rip": rip})
            for vector, error, cr2, rip, registers in self._entered
        )

    def forget_faults(self) -> None:
        """Start the record of faults anew."""
        self._entered.clear()

    def _gp_access(self, regs: PtRegs) -> tuple[int, int] | None:
        """Address and size of the memory operand of the instruction that raised #GP, for the text of its oops."""
        cpu = self.cpus[self.kernel.cpus.current]
        found = cpu.memory_accesses(regs.ip, _reader(regs, cpu))
        return (found[0].la, found[0].size) if found else None

    # ---- a guest

    def load(self, program: Program) -> tuple[Module, Linked]:
        """Load a program as a module: allocate its areas, link, write, protect. Raises GuestError."""
        return load_module(program, self.kernel, self.write)

    def run(self, program: Program, *, timeout: float | None = None) -> Outcome:
        """Load a program, call its entry in a new thread, and run it to its end.

        `timeout` in seconds of host time stops an uncounted run: raises WatchdogExpired. Raises GuestError for a program that
        cannot be loaded, MemoryError when RAM is too small for its thread.
        """
        _, linked = self.load(program)
        return self.run_loaded(program, linked, timeout=timeout)

    def run_loaded(self, program: Program, linked: Linked, *, timeout: float | None = None) -> Outcome:
        """`run`, for a program that `load` has loaded. Raises WatchdogExpired, MemoryError."""
        ended, returned = self.call(linked.entry, comm=comm_of(module_name(program.path)), timeout=timeout)
        return self._outcome(ended, returned, linked)

    def call(
        self, function: int, *, argument: int = 0, comm: str = "vmemu", timeout: float | None = None, interrupt: bool = False,
        **registers: int,
    ) -> tuple[str, int | None]:
        """Call guest code in a new thread on CPU 0 and run the machine until it returns or dies: how that ended, and RAX.

        Then whatever else can run does, until every CPU has nothing to do. `interrupt`: call it as an interrupt handler;
        `registers`: by name, what other registers hold at first.
        Raises as run.
        """
        kernel = self.kernel
        if self._thread is not None and self._thread.state is not ThreadState.DEAD:
            kernel.abandon(self._thread)
        kernel.cpus.current = 0
        thread = self._thread = kernel.create_thread(comm, function=function, argument=argument, runs=False, **registers)
        thread.on_exit = self._main_returned
        self._returned = None
        self._registers = {}
        self._counted = self._count()
        if self.config.schedule:
            # A schedule counts from here: the loading of the guest must not use it up.
            self.hub.policy = Scheduled(parse_schedule(self.config.schedule, self.config.cpus))
        self.hub.start()
        kernel.sched.start(thread)
        if interrupt:
            kernel.preempt(0).hardirq += 1
        if timeout is None:
            finish = self._run(thread)
        else:
            with Watchdog(timeout, self.cpu.engine.stop) as watchdog:
                finish = self._run(thread)
            if watchdog.late:
                raise WatchdogExpired
        ended = self._ending(finish)
        if not self._registers:
            self._registers = self._read_registers(self.cpus[finish.cpu])
        if interrupt:
            kernel.preempt(0).count = 0
        return ended, self._returned if ended == "returned" else None

    @property
    def thread(self) -> KernelThread:
        """The thread that the last guest ran in. Raises ValueError before the first."""
        if self._thread is None:
            raise ValueError("no guest has run")
        return self._thread

    def _run(self, thread: KernelThread) -> Finish:
        try:
            finish = self.hub.run(lambda: thread.state is ThreadState.DEAD)
            return self.hub.quiesce() if finish.final is Final.DONE else finish
        except NeedsClock:
            raise WatchdogExpired from None

    def _main_returned(self, value: int) -> None:
        self._returned = value
        self._registers = self._read_registers(self.cpus[self.kernel.cpus.current])

    def _read_registers(self, cpu: Cpu) -> dict[str, int]:
        return {name: cpu.reg(name) for name in _GENERAL}

    def _ending(self, finish: Finish) -> str:
        """How a run ended, in a word; what no kernel message tells is printed."""
        printk, number = self.kernel.printk, finish.cpu
        match finish:
            case Finish(final=Final.DONE):
                return "returned"
            case Finish(final=Final.ENDED, stop=Ending() as ending):
                return _ended(ending)
            case Finish(final=Final.TRIPLE_FAULT, stop=fault):
                printk(f"vmemu: triple fault, CPU {number} stops: {fault}")
                return "triple fault"
            case Finish(final=Final.BUS_ERROR, stop=error):
                printk(f"vmemu: CPU {number} stops at RIP {self.cpus[number].rip:#x}: {error}")
                return "bus error"
            case Finish(final=Final.HALTED, stop=Halted(rip=rip, interrupts=interrupts)):
                state = "on and none to come" if interrupts else "off"
                printk(f"vmemu: CPU {number} halted at RIP {rip:#x} with interrupts {state}")
                return "halted"
            case Finish(final=Final.LIMIT, stop=LimitReached(rip=rip)):
                printk(f"vmemu: CPU {number} reached the instruction limit at RIP {rip:#x}")
                if len(self.cpus) > 1:
                    self.kernel.print_lines(cpu_lines(self.kernel))
                return "limit"
            case Finish(final=Final.LIVELOCK, stop=Livelock(rip=rip)):
                printk(f"vmemu: CPU {number} delivers exceptions without end at RIP {rip:#x}: no handler can be fetched")
                return "livelock"
            case Finish(final=Final.INTERRUPTED):
                raise WatchdogExpired
        self.kernel.print_lines(blocked_lines(self.kernel))
        return "deadlock"

    def enter_kernel(self, cpu: Cpu, la: int) -> Ending | None:
        """Let the kernel model handle a stop in its text, inside an activation."""
        kernel = self.kernel
        if la == kernel.text.kthread_exit:
            kernel.thread_returned(cpu, cpu.reg("rax"))
            return None
        export = kernel.symbols.exports.get(la)
        if export is None:
            return kernel.enter(cpu, la)
        self.statistics.kernel_calls[export.name] += 1
        if self.sink is discard:
            return kernel.enter(cpu, la)
        arguments = tuple(cpu.reg(name) for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9"))
        ending = kernel.enter(cpu, la)
        self.sink(FunctionCall(cpu.id, export.name, arguments[: export.arguments], cpu.reg("rax")))
        return ending

    def _outcome(self, ended: str, returned: int | None, linked: Linked) -> Outcome:
        def symbol(name: str) -> int | None:
            if name in linked.symbols:
                return linked.symbols[name]
            try:
                return self.kernel.symbol(name)
            except ValueError:
                return None

        def read_u64(la: int) -> int:
            try:
                return int.from_bytes(self.read(la, 8), "little")
            except (PageFault, NonCanonical, BusError) as error:
                raise Unreadable(f"{la:#x} cannot be read: {error}") from None

        log = tuple(self.log_lines())
        return Outcome(ended, returned, self.faults, log, self._registers, symbol, read_u64, self.counts(), self.reports)

    def counts(self) -> dict[str, int]:
        """What was counted since the guest was called, by the names of directives.COUNTS."""
        return {name: count - self._counted.get(name, 0) for name, count in self._count().items()}

    def _count(self) -> dict[str, int]:
        flushed, kernel = self.flushes.counters, self.kernel
        return {
            "ipi": kernel.smp.counters.sent.total(), "switch": kernel.sched.switches,
            "flush": self.statistics.flushes, "full-flush": self.statistics.full_flushes,
            "invlpg": flushed.invlpg.total(), "invlpgb": flushed.invlpgb.total(),
        }

    @property
    def reports(self) -> tuple[str, ...]:
        """The first line of each report of TLBSan."""
        return () if self.tlbsan is None else tuple(lines(finding)[1] for finding in self.tlbsan.findings)

    def log_lines(self) -> Iterable[str]:
        """The kernel log, a line each."""
        return (line.text for line in self.kernel.log.lines)

    def place_of(self, la: int) -> str:
        """What a linear address lies in, in words: an area and offset, its guard page, or the part of the address map."""
        return place_of(self.kernel, la)

    def user_pgd(self) -> int:
        """Physical address of the top table that user mode would run on: CR3's, with page-table isolation the page behind it."""
        pgd = self.cpu.reg("cr3") & PHYSICAL_MASK
        return pgd | PAGE_SIZE if self.config.pti else pgd

    # ---- memory as init_mm's tables show it now, past every TLB

    def _pieces(self, la: int, size: int) -> Iterable[tuple[int, int]]:
        regs = self.cpu.mmu.regs
        end = la + size
        while la < end:
            step = min(end - la, 4096 - (la & 4095))
            yield walk(self.memory, regs, la, Access.READ, False, ac=True, set_ad=False).pa, step
            la += step

    def read(self, la: int, size: int) -> bytes:
        """Bytes at a linear address by a fresh walk. Raises PageFault, NonCanonical, BusError."""
        return b"".join(self.memory.read(pa, step) for pa, step in self._pieces(la, size))

    def write(self, la: int, data: bytes) -> None:
        """Store bytes by a fresh walk, whatever the entries permit. Raises PageFault, NonCanonical, BusError."""
        offset = 0
        for pa, step in self._pieces(la, len(data)):
            self.memory.write(pa, data[offset : offset + step])
            offset += step


def _ended(ending: Ending) -> str:
    return {End.OOPS: "oops", End.PANIC: "panic", End.SIGNAL: "signal"}[ending.end]


def _reader(regs: PtRegs, cpu: Cpu) -> dict[str, int]:
    """The registers of an interrupted context by their lower-case names."""
    names = {"ax": "rax", "bx": "rbx", "cx": "rcx", "dx": "rdx", "si": "rsi", "di": "rdi", "bp": "rbp", "sp": "rsp"}
    values = {long: getattr(regs, short) for short, long in names.items()}
    values |= {f"r{n}": getattr(regs, f"r{n}") for n in range(8, 16)}
    return values | {"rip": regs.ip, "rflags": regs.flags, "fs_base": cpu.reg("fs_base"), "gs_base": cpu.reg("gs_base")}
