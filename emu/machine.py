"""A whole machine: memory, one CPU, a booted kernel, and a guest program run on it to its end.

A guest runs as a module's init function in a kernel thread of its own. Python is in charge between two runs of the engine: it
handles exported functions and exception entries, and stops when the guest returns, dies, or reaches its bound.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Self

from emu.cpu import Cpu, Halted, Interrupted, KernelEntry, LimitReached, Livelock
from emu.descriptors import TableRegister
from emu.engine import Engine
from emu.exceptions import CpuException, TripleFault, Vector
from emu.guest.error import GuestError
from emu.guest.expect import Fault, Outcome, Unreadable
from emu.guest.link import Linked, link
from emu.guest.program import Program, SectionKind
from emu.kernel.bug_table import parse_bug_table
from emu.kernel.entry import End, Ending
from emu.kernel.kernel import Kernel
from emu.kernel.mm_api import MmApi
from emu.kernel.module import DATA, RO_AFTER_INIT, RODATA, TEXT, Module
from emu.kernel.module_api import ModuleApi
from emu.kernel.percpu_api import register_percpu
from emu.kernel.places import place_of
from emu.kernel.profile import find_profile
from emu.kernel.ptrace import PtRegs
from emu.kernel.task import comm_of, initial_rsp
from emu.kernel.traps import BugEntry
from emu.memory import PAGE_SIZE, BusError, Memory
from emu.mmu.entry import PHYSICAL_MASK
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.registers import Cr0, Cr4, Efer, Features
from emu.mmu.tlb import Tlb, TlbMode
from emu.mmu.walk import walk
from emu.msr import IA32_FMASK, IA32_LSTAR, IA32_PAT, IA32_STAR
from emu.native import NativeEngine
from emu.trace import Delivery, FunctionCall, Sink, TlbFlushed, discard

DEFAULT_MEMORY = 1 << 30
DEFAULT_MAX_INSTRUCTIONS = 1_000_000_000
# No engine runs faster than this on any host, so a run that ends within limit / PEAK seconds cannot have passed the limit.
PEAK_INSTRUCTIONS_PER_SECOND = 10_000_000_000
# v6.12 arch/x86/mm/tlb.c: tlb_single_page_flush_ceiling.
FLUSH_CEILING = 33
KEPT_FAULTS = 1024
_NMI = int(Vector.NMI)
LINUX_CR0 = int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG)
LINUX_CR4 = int(
    Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.SMEP | Cr4.SMAP | Cr4.PKE
)
LINUX_EFER = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
# WB, WT, UC-, UC, WB, WP, UC-, WT: v6.12 arch/x86/mm/pat/memtype.c pat_bp_init.
LINUX_PAT = 0x0407_0506_0007_0106
LINUX_PKRU = 0x5555_5554
LINUX_FMASK = 0x0025_7FD5
# Padding in front of a module's first function, as CONFIG_CALL_PADDING has it; an oops shows 42 bytes of code before RIP.
_TEXT_HEADROOM = 64
_NOP = b"\x90"
_GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)
_PART_OF = {
    SectionKind.TEXT: TEXT, SectionKind.RODATA: RODATA, SectionKind.RO_AFTER_INIT: RO_AFTER_INIT, SectionKind.DATA: DATA,
    SectionKind.BSS: DATA,
}


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What machine to build. `memory` in bytes; `kernel` a profile's name; `tlb` a TlbMode's value.

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
    gbpages: bool = True
    nogbpages: bool = False
    nohugevmalloc: bool = False
    nohugeiomap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cpus != 1:
            raise ValueError(f"number of CPUs is {self.cpus}; this machine has one")
        if self.levels not in (4, 5):
            raise ValueError(f"paging levels is {self.levels}; it must be 4 or 5")
        if self.tlb not in {mode.value for mode in TlbMode}:
            raise ValueError(f"TLB mode is {self.tlb!r}; it must be one of {', '.join(mode.value for mode in TlbMode)}")
        if self.native and self.tlb != TlbMode.INFINITE:
            raise ValueError(f"TLB mode is {self.tlb!r}; a native machine has Unicorn's own TLB, whose mode cannot be chosen")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be 0 to 2^64-1")


class _Watchdog:
    """Calls `stop` after `timeout` seconds, and again until its block is left: a stop between two runs of the engine is lost."""

    REPEAT = 0.005

    def __init__(self, timeout: float, stop: Callable[[], None]) -> None:
        self._timeout = timeout
        self._stop = stop
        self.late = False
        self._start = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        wait = self._timeout
        while not self._left.wait(wait):
            self._stop()
            wait = self.REPEAT

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.late = time.perf_counter() - self._start > self._timeout
        self._left.set()
        self._thread.join()


class WatchdogExpired(Exception):
    """An uncounted run took too long to be sure that it kept its bound: it must be repeated with a counter."""


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

    def __init__(self, config: MachineConfig, *, limit: int | None = None, sink: Sink = discard) -> None:
        self.config = config
        self.sink = sink
        self.statistics = Statistics()
        profile = find_profile(config.kernel)
        self.memory = Memory(config.memory, config.nodes)
        features = Features(la57=config.levels == 5, gbpages=config.gbpages)
        self.kernel = Kernel(
            self.memory, profile, self, levels=config.levels, random=Random(config.seed) if config.kaslr else None,
            seed=config.seed, gbpages=features.gbpages, direct_gbpages=not config.nogbpages, hugevmalloc=not config.nohugevmalloc,
            hugeiomap=not config.nohugeiomap, pti=config.pti, gp_access=self._gp_access,
        )
        ModuleApi(self.kernel)
        register_percpu(self.kernel)
        self.mm_api = MmApi(self.kernel)
        self.cpu = Cpu(
            0, self.memory, features=features, levels=config.levels, tlb=Tlb(config.tlb), is_stub=self.kernel.is_stub, limit=limit,
            engine=NativeEngine if config.native else Engine,
        )
        self.cpu.on_delivery = self._on_delivery
        self.cpu.on_entry = self._on_entry
        # (vector, error, CR2, RIP, general registers): a Fault each would cost a page fault a twentieth of its time.
        self._arriving: tuple[int, int | None, int | None, int, list[int]] | None = None
        self._entered: list[tuple[int, int | None, int | None, int, list[int]]] = []
        self._general = self.cpu.engine.batch(*_GENERAL)
        self._start_cpu()

    def _start_cpu(self) -> None:
        """Bring the CPU to where Linux has brought it when it runs its first thread."""
        cpu, kernel = self.cpu, self.kernel
        cr4 = LINUX_CR4 | (Cr4.LA57 if self.config.levels == 5 else 0)
        cpu.mmu.reset(LINUX_CR0, kernel.init_mm.pgd, cr4, LINUX_EFER, LINUX_PKRU)
        cpu.sync_engine_registers()
        tables = kernel.cpu_tables(0)
        cpu.gdtr = TableRegister(tables.gdt_direct, tables.gdt_limit)
        cpu.load_task_register(tables.tss_selector)
        cpu.gdtr = TableRegister(tables.gdt, tables.gdt_limit)
        cpu.idtr = TableRegister(tables.idt, tables.idt_limit)
        cpu.load_tables()
        cpu.enter_privilege(0, 0x10, new_stack=False)
        cpu.set_reg("ss", 0x18)
        cpu.set_reg("gs_base", tables.percpu)
        cpu.msrs[IA32_PAT] = LINUX_PAT
        cpu.msrs[IA32_STAR] = 0x0023_0010 << 32
        cpu.msrs[IA32_LSTAR] = kernel.symbol("entry_SYSCALL_64")
        cpu.msrs[IA32_FMASK] = LINUX_FMASK

    # ---- TlbFlush, as the kernel asks for it

    def flush_tlb_kernel_range(self, start: int, end: int) -> None:
        """v6.12 arch/x86/mm/tlb.c flush_tlb_kernel_range: page by page, or everything above the ceiling."""
        if end - start > FLUSH_CEILING << 12:
            self.flush_tlb_all()
            return
        self.statistics.flushes += 1
        self.sink(TlbFlushed(0, start, end))
        for la in range(start, end, 4096):
            self.cpu.mmu.invlpg(la)

    def flush_tlb_all(self) -> None:
        """v6.12 __flush_tlb_global: a toggle of CR4.PGE."""
        self.statistics.full_flushes += 1
        self.sink(TlbFlushed(0, 0, 1 << 64))
        cr4 = self.cpu.mmu.cr4
        self.cpu.mmu.load_cr4(cr4 ^ Cr4.PGE)
        self.cpu.mmu.load_cr4(cr4)

    # ---- what the CPU tells

    def _on_delivery(self, exception: CpuException) -> None:
        cpu = self.cpu
        vector = exception.vector
        if vector != _NMI and vector < 32 and len(self._entered) < KEPT_FAULTS:
            self._arriving = (vector, exception.error, exception.cr2, cpu.rip, self._general.read())
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
        found = self.cpu.memory_accesses(regs.ip, _reader(regs, self.cpu))
        return (found[0].la, found[0].size) if found else None

    # ---- a guest

    def load(self, program: Program) -> tuple[Module, Linked]:
        """Load a program as a module: allocate its areas, link, write, protect. Raises GuestError."""
        kernel = self.kernel
        sizes: dict[str, int] = {}
        offsets: dict[SectionKind, int] = {}
        for kind, area in program.areas().items():
            part = _PART_OF[kind]
            start = sizes.get(part, _TEXT_HEADROOM if part == TEXT else 0)
            offsets[kind] = start + area.align - 1 & -area.align
            sizes[part] = offsets[kind] + area.size
        name = _module_name(program.path)
        module = kernel.module_loader.load(name, sizes, kernel.symbol("load_module") + 1)
        if module is None:
            raise GuestError(program.path, 0, f"no memory for the module: {sum(sizes.values()):#x} bytes")
        bases: dict[SectionKind | str, int] = {}
        for kind, offset in offsets.items():
            part_of = module.part(_PART_OF[kind])
            assert part_of is not None
            bases[kind] = part_of.la + offset
        try:
            linked = link(program, bases, kernel.symbols.exported_address)
        except GuestError:
            kernel.module_loader.unload(module)
            raise
        for la, data in linked.images.values():
            self.write(la, data)
        text = module.part(TEXT)
        if text is not None:
            self.write(text.la, _NOP * _TEXT_HEADROOM)
        if kernel.module_loader.protect(module):
            raise GuestError(program.path, 0, "no memory to protect the module's text")
        kernel.add_module(module, _module_symbols(linked), _bug_table(linked))
        return module, linked

    def run(self, program: Program, *, timeout: float | None = None) -> Outcome:
        """Load a program, call its entry in a new thread, and run it to its end.

        `timeout` in seconds of host time stops an uncounted run: raises WatchdogExpired. Raises GuestError for a program that
        cannot be loaded, MemoryError when RAM is too small for its thread.
        """
        _, linked = self.load(program)
        thread = self.kernel.create_thread(comm_of(_module_name(program.path)))
        cpu = self.cpu
        cpu.set_reg("rsp", initial_rsp(thread))
        cpu.set_reg("rbx", linked.entry)
        cpu.set_reg("rflags", 0x202)
        cpu.rip = self.kernel.symbol("ret_from_fork_asm")
        if timeout is None:
            ended, returned = self._run()
        else:
            with _Watchdog(timeout, cpu.engine.stop) as watchdog:
                ended, returned = self._run()
            if watchdog.late:
                raise WatchdogExpired
        return self._outcome(ended, returned, linked)

    def _run(self) -> tuple[str, int | None]:
        cpu, kernel = self.cpu, self.kernel
        while True:
            try:
                stop = cpu.run()
            except TripleFault as fault:
                kernel.printk(f"vmemu: triple fault, CPU 0 stops: {fault}")
                return "triple fault", None
            except BusError as error:
                return self._bus_error(error)
            match stop:
                case KernelEntry(la=la):
                    if la == kernel.kthread_exit:
                        return "returned", cpu.reg("rax")
                    try:
                        ending = self._enter_kernel(la)
                    except BusError as error:
                        return self._bus_error(error)
                    if ending is not None:
                        return _ended(ending), None
                case Halted(rip=rip, interrupts=interrupts):
                    state = "on and none to come" if interrupts else "off"
                    kernel.printk(f"vmemu: CPU 0 halted at RIP {rip:#x} with interrupts {state}")
                    return "halted", None
                case LimitReached(rip=rip):
                    kernel.printk(f"vmemu: CPU 0 reached the instruction limit at RIP {rip:#x}")
                    return "limit", None
                case Livelock(rip=rip):
                    kernel.printk(f"vmemu: CPU 0 delivers exceptions without end at RIP {rip:#x}: no handler can be fetched")
                    return "livelock", None
                case Interrupted():
                    raise WatchdogExpired

    def _bus_error(self, error: BusError) -> tuple[str, int | None]:
        self.kernel.printk(f"vmemu: CPU 0 stops at RIP {self.cpu.rip:#x}: {error}")
        return "bus error", None

    def _enter_kernel(self, la: int) -> Ending | None:
        """Let the kernel model handle an HLT in its text; its own faults are exceptions at the stub."""
        cpu = self.cpu
        export = self.kernel.symbols.exports.get(la)
        arguments = tuple(cpu.reg(name) for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9"))
        try:
            ending = self.kernel.enter(cpu, la)
        except PageFault as error:
            cpu.rip = la
            cpu.raise_exception(CpuException(Vector.PF, error.error, error.la))
            return None
        except NonCanonical:
            cpu.rip = la
            cpu.raise_exception(CpuException(Vector.GP, 0))
            return None
        if export is not None:
            self.statistics.kernel_calls[export.name] += 1
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

        registers = {name: self.cpu.reg(name) for name in _GENERAL}
        return Outcome(ended, returned, self.faults, tuple(self.log_lines()), registers, symbol, read_u64)

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


def _module_name(path: str) -> str:
    name = path.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    return "".join(c if c.isalnum() else "_" for c in name) or "guest"


def _module_symbols(linked: Linked) -> list[tuple[str, int, int]]:
    """(name, address, size) of a guest's symbols; a symbol reaches to the next one in its section, or to the section's end."""
    symbols = []
    for start, data in linked.images.values():
        inside = sorted((la, name) for name, la in linked.symbols.items() if start <= la < start + len(data))
        for n, (la, name) in enumerate(inside):
            end = next((other for other, _ in inside[n + 1 :] if other > la), start + len(data))
            symbols.append((name, la, end - la))
    return symbols


def _bug_table(linked: Linked) -> dict[int, BugEntry]:
    def read_string(la: int) -> str | None:
        where = linked.where(la)
        if where is None:
            return None
        name, offset = where
        return linked.images[name][1][offset:].partition(b"\0")[0].decode("latin-1")

    if "__bug_table" not in linked.images:
        return {}
    return parse_bug_table(*linked.images["__bug_table"], read_string)


def _reader(regs: PtRegs, cpu: Cpu) -> dict[str, int]:
    """The registers of an interrupted context by their lower-case names."""
    names = {"ax": "rax", "bx": "rbx", "cx": "rcx", "dx": "rdx", "si": "rsi", "di": "rdi", "bp": "rbp", "sp": "rsp"}
    values = {long: getattr(regs, short) for short, long in names.items()}
    values |= {f"r{n}": getattr(regs, f"r{n}") for n in range(8, 16)}
    return values | {"rip": regs.ip, "rflags": regs.flags, "fs_base": cpu.reg("fs_base"), "gs_base": cpu.reg("gs_base")}
