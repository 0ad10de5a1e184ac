"""One machine's kernel: boot, and what a CPU that stops in kernel text wants of it.

Everything that several parts of the model need of each other meets here: the address map, init_mm, the allocators, the symbols, the
log, the current thread. The kernel sees CPUs through KernelCpu and asks for flushes through TlbFlush; it does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import TYPE_CHECKING

from emu.kernel import vmap_node
from emu.kernel.callers import CALLERS, FORK
from emu.kernel.cpu_entry_area import CPU_ENTRY_AREA_RO_IDT, CpuEntryArea, cpu_entry_areas, map_cpu_entry_areas
from emu.kernel.cpus import CpuTables, OnlineCpus
from emu.kernel.descriptors import gdt, tss
from emu.kernel.entry import End, Ending, ExceptionEntry
from emu.kernel.exports import KernelSymbols
from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.init_64 import setup_kernel_memory
from emu.kernel.ioremap import Ioremap
from emu.kernel.irq import Irqs
from emu.kernel.irq_stack import map_irq_stack
from emu.kernel.kernel_cpu import KernelCpu, TlbFlush
from emu.kernel.kernel_text import KernelText
from emu.kernel.kernel_threads import KernelThreads
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE, make_layout
from emu.kernel.mempolicy import TaskMempolicy
from emu.kernel.mmu_context import MmuContexts
from emu.kernel.module import Module, ModuleLoader
from emu.kernel.oops import KERNEL_TEXT, KernelBuild, OopsState
from emu.kernel.percpu import PerCpu
from emu.kernel.preempt import PreemptCount
from emu.kernel.printk import KernelLog
from emu.kernel.profile import Profile
from emu.kernel.ptrace import X86_EFLAGS_IF, PtRegs
from emu.kernel.purge import VmapSpace
from emu.kernel.ratelimit import RatelimitState
from emu.kernel.sched import Scheduler
from emu.kernel.slab import Slab
from emu.kernel.sleep_lock import SleepLock
from emu.kernel.smp import SmpCalls
from emu.kernel.taint import Taint
from emu.kernel.thread_stack import ThreadStacks
from emu.kernel.traps import BugEntry, idt
from emu.kernel.vmalloc import Vmalloc
from emu.kernel.vmap import Vmap
from emu.kernel.vmap_block import VmapBlocks
from emu.kernel.vsprintf import Formatter
from emu.kernel.warn_sites import find_bug_site, find_site, site_symbols
from emu.memory import Memory
from emu.mmu.entry import Level
from emu.mmu.fault import NonCanonical, PageFault
from emu.mmu.walk import PagingRegisters, inspect

if TYPE_CHECKING:
    from emu.kernel.sync import Sync

HARDWARE = "vmemu emulated x86-64 machine"
_UD2 = b"\x0f\x0b"


class TaskEnded(Exception):
    """The current task cannot go on: raised inside an exported function, to unwind the model's own stack."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


class Kernel(KernelThreads):
    """A booted kernel over `memory`.

    `random` is the machine's generator, None without KASLR. `gp_access` decodes an instruction's memory operand for the text of a
    #GP. `direct_gbpages`, `hugevmalloc` and `hugeiomap` are false after the kernel parameters nogbpages, nohugevmalloc and
    nohugeiomap. Raises ValueError or MemoryError when RAM is too small to boot.
    """

    def __init__(
        self, memory: Memory, profile: Profile, tlb: TlbFlush, *, levels: int, nr_cpus: int = 1, random: Random | None = None,
        seed: int = 0, gbpages: bool = True, direct_gbpages: bool = True, hugevmalloc: bool = True, hugeiomap: bool = True,
        smep: bool = True, smap: bool = True, pti: bool = False, pcid: bool = False,
        gp_access: Callable[[PtRegs], tuple[int, int] | None] = lambda regs: None,
    ) -> None:
        super().__init__(nr_cpus)
        self.memory = memory
        self.profile = profile
        self.tlb = tlb
        self.smep, self.smap = smep, smap
        self.formatter = Formatter(self._read_for_format, self.symbolize, hash_key=seed.to_bytes(8, "little"))
        self.log = KernelLog()
        self._nopage_rs = RatelimitState("warn_alloc", 10, 1)
        self.layout = make_layout(levels, memory_size=memory.size, kaslr=random)
        self.cpus = OnlineCpus(nr_cpus, len(memory.nodes))
        floor = setup_kernel_memory(
            memory, self.layout, profile, self, gbpages=gbpages, direct_gbpages=direct_gbpages, pti=pti, nr_cpus=nr_cpus,
            cpu_to_node=self.cpus.cpu_to_node,
        )
        self.pages, self.init_mm = floor.pages, floor.init_mm
        self.sched = Scheduler(nr_cpus, self.cpus, self.cpu_by_number, lambda cpu, vector: self.send_ipi(cpu, vector))
        self.sched.schedule_debug = self._schedule_debug
        self._entered = False
        # How an interrupt or an NMI is sent to a CPU; the machine sets both.
        self.send_ipi: Callable[[int, int], None] = lambda cpu, vector: None
        self.send_nmi: Callable[[int], None] = lambda cpu: None
        if len(memory.nodes) > 1:
            self.pages.policy = TaskMempolicy(
                len(memory.nodes), self.cpus.numa_node_id, self._mempolicy, lambda: self.in_interrupt
            )
        self.slab = Slab(self.pages, self.layout)
        design = vmap_node.V6_12 if profile.max_vmap_nodes else vmap_node.V6_1
        space = VmapSpace(design, (self.layout.vmalloc_start, self.layout.vmalloc_end), self.cpus, tlb, self, self)
        if not profile.syncs_mappings:
            space.vmalloc_sync_unmappings = self.init_mm.vmalloc_sync_unmappings
        space.purge_lock = SleepLock("vmap_purge_lock", self.sched)
        self.vmalloc = Vmalloc(space, self.init_mm, self.slab, self, self)
        self.vmalloc.vmap_allow_huge &= hugevmalloc
        self.vmap = Vmap(self.vmalloc)
        if not hugeiomap:
            self.vmap.ioremap_max_page_shift = PAGE_SHIFT
        self.vmap_blocks = VmapBlocks(self.vmalloc)
        self.ioremap = Ioremap(self.vmap, floor.memblock, self._dump_stack)
        self.vmalloc.vmalloc_init()
        self.module_loader = ModuleLoader(self.vmalloc, self.init_mm, tlb)
        self.modules: list[Module] = []
        self.smp = SmpCalls(self, self.sched, profile.smp)
        self.contexts = MmuContexts(self, self.init_mm.pgd, profile.tlb, pcid=pcid, pti=pti)
        self.contexts.sync_current_stack = self._sync_current_stack
        self.init_mm.tlb = tlb
        self.sched.on_switch = self._context_switch
        self.symbols = KernelSymbols(self.layout, memory)
        self.oops_text = KERNEL_TEXT[profile.name]
        kaslr_offset = self.layout.kernel_text - 0xFFFF_FFFF_8100_0000 if random is not None else None
        self.build = KernelBuild(profile.release, profile.build, HARDWARE, kaslr_offset=kaslr_offset)
        self.oops_state = OopsState(oops_id=Random(seed).getrandbits(64))
        self.exceptions = ExceptionEntry(self, gp_access)
        self.irqs = Irqs(self)
        self.irqs.take_calls(lambda vector: self.smp.call_function_interrupt(self.cpus.current, vector))
        self._warned_once: set[int] = set()
        self._bugs: dict[int, BugEntry] = {}
        self._work: list[Callable[[], None]] = []
        self._rcu_callbacks: list[Callable[[], None]] = []
        self._caller = 0
        self.text = self.sched.text = KernelText(memory, self.layout, self.symbols, profile.name, pti=pti)
        self.percpu = PerCpu(
            self.vmalloc, floor.percpu, self.cpus.cpu_to_node, self._dump_stack,
            callers=self._callers("pcpu_create_chunk"), caller=self._callers("pcpu_get_vm_areas")[0],
        )
        self._percpu = [self.percpu.per_cpu_offset(cpu) for cpu in range(nr_cpus)]
        caller = self._callers("irq_init_percpu_irqstack")[0]
        self.irq_stacks = [map_irq_stack(self.vmap, self.percpu, cpu, caller) for cpu in range(nr_cpus)]
        self.thread_stacks = ThreadStacks(self.vmalloc, self.percpu, self.call_rcu, self._callers(FORK[profile.name])[0])
        self._areas = cpu_entry_areas(profile.name, nr_cpus, random.randrange if random is not None else None)
        self._gdt_direct: list[int] = []
        self._fill_cpu_entry_areas()
        if pti:
            self.init_mm.pti_init(self.layout.kernel_text)

    # ---- boot

    def _callers(self, function: str) -> tuple[int, ...]:
        """The return addresses in an internal function that calls an allocator."""
        address = self.symbol(function)
        return tuple(address + offset for offset in CALLERS[self.profile.name][function].returns)

    def _fill_cpu_entry_areas(self) -> None:
        idt_pa = self._boot_pages(PAGE_SIZE)
        placed = map_cpu_entry_areas(self._areas, self.init_mm, idt_pa, self._boot_pages)
        self.memory.write(idt_pa, idt(self.profile.name, self.symbol))
        for number, area in enumerate(self._areas):
            geometry = area.geometry
            node = self.memory.node_of(self.layout.pa(self._percpu[number]))
            self._gdt_direct.append(self.layout.va(placed[area.gdt]))
            self.memory.write(placed[area.gdt], gdt(number, node, area.tss, geometry.tss_limit))
            self.memory.write(placed[area.tss], tss(area.entry_stack[1], area.ist(), geometry.iomap_base))
        # The I/O bitmap that iomap_base points behind is not there: every port is the kernel's own.

    def _boot_pages(self, size: int) -> int:
        order = max(0, (size - 1 >> PAGE_SHIFT).bit_length())
        pfn = self.pages.alloc_pages(int(GFP_KERNEL | Gfp.ZERO), order)
        if pfn is None:
            raise MemoryError(f"memory size is {self.memory.size:#x}; no room for the CPU entry areas")
        return pfn << PAGE_SHIFT

    def cpu_tables(self, cpu: int) -> CpuTables:
        """Where CPU number `cpu` finds its tables."""
        return CpuTables(
            CPU_ENTRY_AREA_RO_IDT, PAGE_SIZE - 1, self._areas[cpu].gdt, self._gdt_direct[cpu], 16 * 8 - 1, 0x40, self._percpu[cpu]
        )

    def cpu_entry_area(self, cpu: int) -> CpuEntryArea:
        """The CPU's entry area."""
        return self._areas[cpu]

    def _read_for_format(self, la: int, size: int) -> bytes | None:
        try:
            return self.cpu.read(la, size)
        except (PageFault, NonCanonical):
            return None

    # ---- symbols

    def symbol(self, name: str) -> int:
        """Address of a kernel symbol. Raises ValueError."""
        return self.symbols.address_of(name)

    def add_site_symbols(self) -> None:
        """Give the functions that WARN or BUG, and are not exported, their place in kernel text."""
        for name in site_symbols(self.profile.name):
            if self.symbol_or(name, 0) == 0:
                self.symbols.add_code(name, _UD2)

    def symbol_or(self, name: str, otherwise: int) -> int:
        """Address of a kernel symbol, or `otherwise` where the image has none of that name."""
        try:
            return self.symbols.address_of(name)
        except ValueError:
            return otherwise

    @property
    def mems_allowed(self) -> str:
        """The nodes that have memory, as a cpuset's list."""
        nodes = len(self.memory.nodes)
        return "0" if nodes == 1 else f"0-{nodes - 1}"

    def symbolize(self, la: int) -> str | None:
        """ "name+0x1f/0x40", with the module's name behind a module's symbol; None outside of text and data."""
        return self.symbols.symbolize(la)

    def symbol_text(self, la: int) -> str:
        """An address as %pS prints it: the symbol, or the number where there is none."""
        return self.symbolize(la) or f"{la:#x}"

    def is_text(self, la: int) -> bool:
        """Whether an address may be a return address: kernel text or a module's text."""
        if self.layout.is_kernel_text(la):
            return True
        return any(p.kind == "text" and p.la <= la < p.la + p.size for m in self.modules for p in m.parts)

    def module_list(self) -> tuple[str, ...]:
        """The modules as the "Modules linked in:" line names them: out of tree and unsigned."""
        return tuple(f"{module.name}(OE)" for module in reversed(self.modules))

    def entries(self, cr3: int, la: int) -> list[tuple[Level, int, int]]:
        """A walk for an oops: the entries on the way to `la` under a CR3, without any check."""
        return inspect(self.memory, PagingRegisters(cr3=cr3, levels=self.layout.levels), la)

    # ---- modules

    def add_module(self, module: Module, symbols: list[tuple[str, int, int]], bugs: dict[int, BugEntry]) -> None:
        """Make a loaded module known: its symbols, and the rows of its __bug_table by address."""
        self.modules.append(module)
        self.symbols.add_module(module.name, symbols)
        self._bugs.update(bugs)
        self.oops_state.tainted |= Taint.OOT_MODULE | Taint.UNSIGNED_MODULE

    def bug_entry(self, ip: int) -> BugEntry | None:
        """The row of the bug tables for an UD2."""
        return self._bugs.get(ip)

    def warned(self, entry: BugEntry) -> bool:
        """Whether a WARN_ONCE has been printed."""
        return id(entry) in self._warned_once

    def note_warned(self, entry: BugEntry) -> None:
        """Remember that a WARN_ONCE has been printed."""
        self._warned_once.add(id(entry))

    # ---- a CPU stopped in kernel text

    def enter(self, cpu: KernelCpu, la: int) -> Ending | None:
        """Handle the HLT at `la` that a CPU executed in kernel text. None when the CPU goes on.

        Raises PageFault or NonCanonical when the model's access to guest memory faults: an exception at the stub.
        """
        self._entered = True
        self.cpus.current = cpu.id
        vector = self.text.vectors.get(la)
        try:
            if vector is not None:
                return self.exceptions.handle(cpu, vector)
            if la in (self.text.syscall_entry, self.text.syscall_exit):
                pti = self.exceptions.pti
                (pti.to_kernel if la == self.text.syscall_entry else pti.to_user)(cpu)
                cpu.set_reg("rip", la + 1)
            else:
                self._call(cpu, la)
        except TaskEnded as ended:
            return ended.ending
        return None

    def is_stub(self, la: int) -> bool:
        """Whether an HLT at `la` is the model's to handle."""
        return la in self.symbols.exports or self.text.is_stop(la)

    def _call(self, cpu: KernelCpu, la: int) -> None:
        export = self.symbols.exports[la]
        cpu.set_reg("rip", la)
        rsp = cpu.reg("rsp")
        self.caller = int.from_bytes(cpu.read(rsp, 8), "little")
        registers = [cpu.reg(name) for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9")]
        arguments: list[object] = list(registers[: export.arguments])
        if export.varargs:
            arguments.append(_NextArgument(cpu, registers[export.arguments :], rsp + 8))
        result = export.function(*arguments)
        self._run_work()
        if result is not None:
            cpu.set_reg("rax", result & 0xFFFF_FFFF_FFFF_FFFF)
        cpu.set_reg("rip", la + 1)
        if self.sched.need_resched[cpu.id] and self._preemptible:
            self.sched.yield_cpu()

    # ---- the CPUs

    def cpu_by_number(self, number: int) -> KernelCpu:
        """CPU `number`. Raises IndexError for one that is not there."""
        return self._cpus[number]

    def preempt(self, number: int) -> PreemptCount:
        """preempt_count of a CPU."""
        return self._preempt[number]

    @property
    def _cpu(self) -> KernelCpu | None:
        """The CPU that runs the model; None before one has entered it."""
        return self._cpus[self.cpus.current] if self._entered else None

    @property
    def caller(self) -> int:
        """The return address of the exported function under way."""
        activation = self.sched.activation
        return self._caller if activation is None else activation.caller

    @caller.setter
    def caller(self, value: int) -> None:
        if self.sched.activation is None:
            self._caller = value
        else:
            self.sched.activation.caller = value

    # ---- what the allocators ask of their kernel (WorkQueue, KernelReport, Context)

    @property
    def cpu(self) -> KernelCpu:
        """The CPU that runs the model now."""
        assert self._cpu is not None, "no CPU has entered the kernel yet"
        return self._cpu

    @property
    def _concurrent(self) -> Sync | None:
        """What runs deferred work by threads of its own: only where another CPU may see that it is late."""
        return self.sync if self.cpus.online > 1 and self.sched.in_thread else None

    def on_turn(self, cpu: int) -> None:
        """A CPU's turn is over: RCU looks at what it was doing, and jiffies go on, as with the tick of a real clock."""
        if self.sync is not None and self.sched.clock() is not None:
            self.sync.sched_clock_irq(cpu, self._cpus[cpu].reg("cpl") == 3)
            self.sync.timers.jiffies  # noqa: B018  # reading it brings the word that guests see up to date

    def schedule_work(self, work: Callable[[], None]) -> None:
        """Queue work: it runs in task context, when the exported function under way is done or by a worker's thread.

        With one CPU a worker is needed only where the function may not be followed by another thread.
        """
        if self.sync is not None and self.sched.in_thread and (self.cpus.online > 1 or not self._preemptible):
            self.sync.workqueues.schedule_work(work)
        else:
            self._work.append(work)

    @property
    def _preemptible(self) -> bool:
        """Another thread could run on this CPU now (v6.12 include/linux/preempt.h preemptible)."""
        if self._preempt[self.cpus.current].in_atomic:
            return False
        return not self.sched.in_thread or bool(self._cpus[self.cpus.current].reg("rflags") & X86_EFLAGS_IF)

    def _run_work(self) -> None:
        while (self._work or self._rcu_callbacks) and self._preemptible:
            if self._work:
                self._work.pop(0)()
            else:
                self._rcu_core()

    def call_rcu(self, callback: Callable[[], None]) -> None:
        """Run `callback`, as an interrupt does, once every reader of now is done: with one CPU, when its task has returned."""
        if self._concurrent is not None:
            self._concurrent.rcu.call_rcu(callback)
        else:
            self._rcu_callbacks.append(callback)

    def _rcu_core(self) -> None:
        callbacks, self._rcu_callbacks = self._rcu_callbacks, []
        count = self._preempt[self.cpus.current]
        count.softirq += 1
        for callback in callbacks:
            callback()
        count.softirq -= 1

    def rcu_barrier(self) -> None:
        """Let a grace period pass: run what waits for it, and the work that comes of it."""
        self._run_work()

    @property
    def in_interrupt(self) -> bool:
        """In interrupt context."""
        return self._preempt[self.cpus.current].in_interrupt

    @property
    def in_nmi(self) -> bool:
        """In an NMI handler."""
        return self._preempt[self.cpus.current].in_nmi

    @property
    def fatal_signal_pending(self) -> bool:
        """The current task is being killed."""
        return False

    def load(self, la: int) -> int:
        """The u64 at `la` as the current CPU reads it."""
        if self._cpu is None:
            return self.memory.read_u64(self._mapped(la))
        return int.from_bytes(self.cpu.read(la, 8), "little")

    def store(self, la: int, value: int) -> None:
        """Write the u64 at `la` as the current CPU does."""
        if self._cpu is None:
            self.memory.write_u64(self._mapped(la), value)
            return
        self.cpu.write(la, value.to_bytes(8, "little"))

    def _mapped(self, la: int) -> int:
        pa = self.init_mm.to_pa(la)
        assert pa is not None, f"boot code accesses {la:#x}, which is not mapped"
        return pa

    def schedule_timeout_uninterruptible(self, ticks: int) -> None:
        """A __GFP_NOFAIL allocation cannot be met, and the OOM killer finds nobody to kill (v6.12 mm/oom_kill.c out_of_memory)."""
        self.print_lines(("Out of memory and no killable processes...",))
        message = "System is deadlocked on memory"
        self.exceptions.panic(self.cpu, message)
        raise TaskEnded(Ending(End.PANIC, message))

    def cond_resched(self) -> None:
        """Let the waiting work run, and another thread of this CPU if the scheduler wants one to."""
        self._run_work()
        if self.sched.in_thread and self.sched.need_resched[self.cpus.current] and self._preemptible:
            self.sched.yield_cpu()

    def warn(self, function: str, text: str = "") -> None:
        """WARN in C function `function`."""
        if self._cpu is not None:
            self.exceptions.report_warn(self._cpu, find_site(self.profile.name, function), text or None)

    def bug(self, function: str, text: str = "") -> None:
        """BUG in C function `function`: the task ends."""
        raise TaskEnded(self.exceptions.report_bug(self.cpu, find_bug_site(self.profile.name, function, text)))

    def printk(self, text: str) -> None:
        """A line of the kernel log."""
        self.print_lines((text,))

    def print_lines(self, lines: Iterable[str]) -> None:
        """Whole lines that the kernel prints itself."""
        self.log.print_lines(lines)

    def warn_alloc(self, gfp: int, text: str) -> None:
        """A failed allocation's message, with the stack of the caller."""
        if self._cpu is None or not self._nopage_rs.allows(self.log):
            return
        self.exceptions.report_alloc(self._cpu, gfp, text)

    def _dump_stack(self) -> None:
        if self._cpu is not None:
            self.exceptions.dump_stack(self._cpu)


class _NextArgument:
    """The variable arguments of a call: what is left in registers, then the stack."""

    def __init__(self, cpu: KernelCpu, registers: list[int], stack: int) -> None:
        self._cpu = cpu
        self._registers = registers
        self._stack = stack

    def __call__(self) -> int:
        if self._registers:
            return self._registers.pop(0)
        value = int.from_bytes(self._cpu.read(self._stack, 8), "little")
        self._stack += 8
        return value


