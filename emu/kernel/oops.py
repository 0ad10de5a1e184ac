"""The text of an oops, a WARN, a BUG and a panic, line by line as each kernel version prints it.

Sources: v6.12 and v6.1 arch/x86/kernel/dumpstack.c (__die_header, oops_end, show_opcodes), process_64.c (__show_regs),
lib/dump_stack.c (dump_stack_print_info), kernel/panic.c (__warn, panic, print_oops_end_marker), lib/bug.c (report_bug),
kernel/exit.c (make_task_dead), arch/x86/kernel/traps.c (handle_stack_overflow). v5.4 has the same files with the
differences listed in KERNEL_TEXT.

Nothing is printed here: every function returns lines, without line ends, and records in OopsState what later oopses
depend on (the [#n] counter, the registers of the first oops, the taint).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from emu.kernel.ptrace import PtRegs
from emu.kernel.taint import TAINT_FLAGS, Taint, print_tainted, print_tainted_verbose
from emu.kernel.unwind import (
    StackInfo,
    StackSection,
    StackType,
    Symbolize,
    TraceLine,
    sprint_backtrace,
    sprint_symbol,
    stack_type_name,
)
from emu.mmu.fault import NonCanonical, PageFault

CUT_HERE = "------------[ cut here ]------------"
_PROLOGUE_SIZE = 42
_OPCODE_BUFSIZE = 64
_MASK = (1 << 64) - 1
_CR4_PKE = 1 << 22
_DR_DEFAULT = (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
SIGKILL = 9
SIGSEGV = 11


@dataclass(frozen=True, slots=True)
class OopsText:
    """What differs between the texts of kernel versions."""

    die_prefix: str = "Oops: "
    prints_uid: bool = True
    prints_tainted_verbose: bool = True
    taint_flags: int = len(TAINT_FLAGS)
    task_stack_tag: bool = True
    opcodes_failure: str = "Code: Unable to access opcode bytes at 0x{la:x}."
    stack_guard_names_stack: bool = True
    irqs_disabled_note: bool = True
    end_trace_id: bool = False


KERNEL_TEXT: Mapping[str, OopsText] = MappingProxyType(
    {
        "6.12": OopsText(),
        "6.1": OopsText(die_prefix="", prints_uid=False, prints_tainted_verbose=False),
        "5.4": OopsText(
            die_prefix="",
            prints_uid=False,
            prints_tainted_verbose=False,
            taint_flags=18,
            task_stack_tag=False,
            opcodes_failure="Code: Bad RIP value.",
            stack_guard_names_stack=False,
            irqs_disabled_note=False,
            end_trace_id=True,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """What a kernel says of itself. `build` is what follows the release: version and package.

    `preempt` is "", "PREEMPT" or "PREEMPT_RT"; `pti` None: built without it.
    """

    release: str
    build: str = "#1"
    hardware: str = ""
    preempt: str = "PREEMPT"
    smp: bool = True
    debug_pagealloc: bool = False
    kasan: bool = False
    pti: bool | None = False
    kaslr_offset: int | None = None
    panic_on_oops: bool = False
    panic_timeout: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """The current task, and `worker`: the name and function of the work item it runs, if it runs one."""

    comm: str
    pid: int
    cpu: int = 0
    uid: int = 0
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Controls:
    """The registers __show_regs reads from the CPU itself, at the time of printing."""

    cr0: int
    cr2: int
    cr3: int
    cr4: int
    fs_base: int = 0
    gs_base: int = 0
    kernel_gs_base: int = 0
    fs: int = 0
    gs: int = 0
    ds: int = 0
    es: int = 0
    pkru: int = 0
    debug_registers: tuple[int, int, int, int, int, int] = _DR_DEFAULT
    """DR0, DR1, DR2, DR3, DR6, DR7."""


@dataclass(slots=True)
class OopsState:
    """What one machine's oopses leave behind for the next."""

    tainted: Taint = field(default_factory=lambda: Taint(0))
    die_counter: int = 0
    exec_summary_regs: PtRegs | None = None
    oops_id: int = 0
    """v5.4 only: the number in "end trace"; drawn from the machine's seed, one more with each oops."""


@dataclass(frozen=True, slots=True)
class OopsSource:
    """Where a report gets its facts.

    `read(la, size)` gives bytes of mapped memory and raises PageFault or NonCanonical. `controls()` is read after the
    code bytes: a failing read of those leaves its address in CR2, as copy_from_kernel_nofault does.
    `trace(regs)` gives the call trace of an interrupted context, or of the caller for None.
    """

    text: OopsText
    build: KernelBuild
    task: Task
    read: Callable[[int, int], bytes]
    controls: Callable[[], Controls]
    symbolize: Symbolize
    trace: Callable[[PtRegs | None], Sequence[StackSection]]
    modules: Sequence[str] = ()
    last_unloaded: str = ""
    pointer: Callable[[int], str] = "{:016x}".format
    """How %p prints an address: in full as with no_hash_pointers, or hashed."""


@dataclass(frozen=True, slots=True)
class OopsReport:
    """The lines to print, and what happens then: panic (the machine stops), or the task dies by `signal`, or neither."""

    lines: tuple[str, ...]
    panic: str | None = None
    signal: int = 0


@dataclass(slots=True)
class _Printer:
    src: OopsSource
    state: OopsState
    lines: list[str] = field(default_factory=list)
    cr2: int | None = None

    def add(self, *lines: str) -> None:
        self.lines.extend(lines)

    def print_info(self) -> None:
        """dump_stack_print_info."""
        text, build, task, tainted = self.src.text, self.src.build, self.src.task, self.state.tainted
        uid = f"UID: {task.uid} " if text.prints_uid else ""
        self.add(
            f"CPU: {task.cpu} {uid}PID: {task.pid} Comm: {task.comm[:20]} {print_tainted(tainted, text.taint_flags)}"
            f" {build.release} {build.build}"
        )
        if tainted and text.prints_tainted_verbose:
            self.add(print_tainted_verbose(tainted))
        if build.hardware:
            self.add(f"Hardware name: {build.hardware}")
        if task.worker:
            self.add(f"Workqueue: {task.worker}")

    def _read_code(self, la: int, user: bool) -> bytes | None:
        # copy_from_kernel_nofault refuses user addresses before it touches them, so CR2 stays what it was.
        if not user and not la >> 63:
            return None
        try:
            first = min(_OPCODE_BUFSIZE, (1 << 64) - la)
            data = self.src.read(la, first)
            return data + self.src.read(0, _OPCODE_BUFSIZE - first) if first < _OPCODE_BUFSIZE else data
        except PageFault as fault:
            self.cr2 = fault.la
        except NonCanonical:
            return None
        return None

    def show_opcodes(self, regs: PtRegs) -> None:
        prologue = (regs.ip - _PROLOGUE_SIZE) & _MASK
        code = self._read_code(prologue, regs.user_mode)
        if code is None:
            self.add(self.src.text.opcodes_failure.format(la=prologue))
            return
        before, after = code[:_PROLOGUE_SIZE].hex(" "), code[_PROLOGUE_SIZE + 1 :].hex(" ")
        self.add(f"Code: {before} <{code[_PROLOGUE_SIZE]:02x}> {after}")

    def show_regs_short(self, regs: PtRegs) -> None:
        """show_iret_regs and the general registers."""
        self.add(f"RIP: {regs.cs:04x}:{sprint_symbol(self.src.symbolize, regs.ip)}")
        self.show_opcodes(regs)
        orig = "" if regs.orig_ax == _MASK else f" ORIG_RAX: {regs.orig_ax:016x}"
        self.add(
            f"RSP: {regs.ss:04x}:{regs.sp:016x} EFLAGS: {regs.flags:08x}{orig}",
            f"RAX: {regs.ax:016x} RBX: {regs.bx:016x} RCX: {regs.cx:016x}",
            f"RDX: {regs.dx:016x} RSI: {regs.si:016x} RDI: {regs.di:016x}",
            f"RBP: {regs.bp:016x} R08: {regs.r8:016x} R09: {regs.r9:016x}",
            f"R10: {regs.r10:016x} R11: {regs.r11:016x} R12: {regs.r12:016x}",
            f"R13: {regs.r13:016x} R14: {regs.r14:016x} R15: {regs.r15:016x}",
        )

    def show_regs_all(self, regs: PtRegs) -> None:
        """__show_regs with SHOW_REGS_ALL."""
        self.show_regs_short(regs)
        now = self.src.controls()
        cr2 = now.cr2 if self.cr2 is None else self.cr2
        self.add(
            f"FS:  {now.fs_base:016x}({now.fs:04x}) GS:{now.gs_base:016x}({now.gs:04x}) knlGS:{now.kernel_gs_base:016x}",
            f"CS:  {regs.cs:04x} DS: {now.ds:04x} ES: {now.es:04x} CR0: {now.cr0:016x}",
            f"CR2: {cr2:016x} CR3: {now.cr3:016x} CR4: {now.cr4:016x}",
        )
        if now.debug_registers != _DR_DEFAULT:
            dr0, dr1, dr2, dr3, dr6, dr7 = now.debug_registers
            self.add(
                f"DR0: {dr0:016x} DR1: {dr1:016x} DR2: {dr2:016x}",
                f"DR3: {dr3:016x} DR6: {dr6:016x} DR7: {dr7:016x}",
            )
        if now.cr4 & _CR4_PKE:
            self.add(f"PKRU: {now.pkru:08x}")

    def show_regs_user(self, regs: PtRegs) -> None:
        """__show_regs with SHOW_REGS_USER."""
        self.show_regs_short(regs)
        now = self.src.controls()
        self.add(f"FS:  {now.fs_base:016x} GS:  {now.kernel_gs_base:016x}")

    def call_trace(self, regs: PtRegs | None) -> None:
        self.add("Call Trace:")
        for section in self.src.trace(regs):
            name = stack_type_name(section.type)
            if section.type is StackType.TASK and not self.src.text.task_stack_tag:
                name = None
            if name:
                self.add(f" <{name}>")
            for item in section.items:
                if isinstance(item, TraceLine):
                    self.add(f" {'' if item.reliable else '? '}{sprint_backtrace(self.src.symbolize, item.la)}")
                else:
                    self.show_regs_short(item)
            if name:
                self.add(f" </{name}>")

    def show_regs(self, regs: PtRegs) -> None:
        self.print_info()
        if regs.user_mode:
            self.show_regs_user(regs)
            return
        self.show_regs_all(regs)
        self.call_trace(regs)

    def modules(self) -> None:
        unloaded = f" [last unloaded: {self.src.last_unloaded}]" if self.src.last_unloaded else ""
        self.add("Modules linked in:" + "".join(f" {module}" for module in self.src.modules) + unloaded)

    def end_trace(self) -> None:
        trace_id = 0
        if self.src.text.end_trace_id:
            trace_id = self.state.oops_id
            self.state.oops_id = (trace_id + 1) & _MASK
        self.add(f"---[ end trace {trace_id:016x} ]---")

    def die_header(self, description: str, regs: PtRegs, error: int) -> None:
        if self.state.exec_summary_regs is None:
            self.state.exec_summary_regs = regs
        self.state.die_counter += 1
        build = self.src.build
        words = [build.preempt] if build.preempt else []
        words += [word for word, on in (("SMP", build.smp), ("DEBUG_PAGEALLOC", build.debug_pagealloc)) if on]
        words += ["KASAN"] if build.kasan else []
        if build.pti is not None:
            words.append("PTI" if build.pti else "NOPTI")
        header = f"{self.src.text.die_prefix}{description}: {error & 0xFFFF:04x} [#{self.state.die_counter}]"
        # A description may hold a line end of its own ("Split lock detected"): the log shows two lines then.
        self.add(*" ".join([header, *words]).split("\n"))

    def panic(self, message: str) -> None:
        build = self.src.build
        self.add(f"Kernel panic - not syncing: {message}")
        if not self.state.tainted & Taint.DIE:
            self.print_info()
            self.call_trace(None)
        if build.kaslr_offset is None:
            self.add("Kernel Offset: disabled")
        else:
            self.add(
                f"Kernel Offset: 0x{build.kaslr_offset:x} from 0xffffffff81000000"
                " (relocation range: 0xffffffff80000000-0xffffffffbfffffff)"
            )
        if build.panic_timeout > 0:
            self.add(f"Rebooting in {build.panic_timeout} seconds..")
        if build.panic_timeout == 0:
            self.add(f"---[ end Kernel panic - not syncing: {message} ]---")


@dataclass(frozen=True, slots=True)
class DieContext:
    """The state of the CPU that decides what becomes of the task after die().

    `in_interrupt` counts NMI-like entries (#DF, #DB, int3, NMI, #MC from kernel mode) as well as interrupts.
    """

    irqs_disabled: bool = False
    in_interrupt: bool = False
    preempt_count: int = 0
    signal: int = SIGSEGV


def die(
    src: OopsSource,
    state: OopsState,
    description: str,
    regs: PtRegs,
    error: int,
    context: DieContext,
    *,
    before: Iterable[str] = (),
    after: Iterable[str] = (),
) -> OopsReport:
    """die(): header, registers, trace, end marker, summary of the first oops, and the end of the task.

    `before` are the lines printed ahead of the header, `after` those between the module list and the end marker
    ("CR2: ..." of a page fault).
    """
    out = _Printer(src, state)
    out.add(*before)
    out.die_header(description, regs, error)
    out.show_regs(regs)
    out.modules()
    out.add(*after)
    state.tainted |= Taint.DIE
    out.end_trace()
    if state.exec_summary_regs is not None:
        out.show_regs_all(state.exec_summary_regs)
    message = _end_of_task(out, context)
    return OopsReport(tuple(out.lines), message, 0 if message else context.signal)


def _end_of_task(out: _Printer, context: DieContext) -> str | None:
    """What follows oops_end: a panic, or make_task_dead with its notes. Returns the panic message."""
    task, message = out.src.task, None
    if context.in_interrupt:
        message = "Fatal exception in interrupt"
    elif out.src.build.panic_on_oops:
        message = "Fatal exception"
    elif task.pid == 0:
        message = "Attempted to kill the idle task!"
    else:
        if context.irqs_disabled and out.src.text.irqs_disabled_note:
            out.add(f"note: {task.comm}[{task.pid}] exited with irqs disabled")
        if context.preempt_count:
            out.add(f"note: {task.comm}[{task.pid}] exited with preempt_count {context.preempt_count}")
        if task.pid == 1:
            message = f"Attempted to kill init! exitcode=0x{context.signal:08x}"
    if message is not None:
        out.panic(message)
    return message


def panic(
    src: OopsSource, state: OopsState, message: str, *, before: Iterable[str] = (), regs: PtRegs | None = None
) -> OopsReport:
    """panic(): the message, a stack dump unless an oops came before it, and the kernel offset.

    `before` are lines printed ahead of it; with `regs` show_regs() follows them.
    """
    out = _Printer(src, state)
    out.add(*before)
    if regs is not None:
        out.show_regs(regs)
    out.panic(message)
    return OopsReport(tuple(out.lines), message)


def warn(
    src: OopsSource,
    state: OopsState,
    regs: PtRegs,
    *,
    file: str = "",
    line: int = 0,
    message: str | None = None,
    taint: Taint = Taint.WARN,
    cut_here: bool = True,
) -> OopsReport:
    """A WARN() splat: `message` is the text of WARN(cond, fmt), None for WARN_ON. An empty file leaves the place out.

    `cut_here` is false where the marker was printed before.
    """
    out = _Printer(src, state)
    if cut_here:
        out.add(CUT_HERE)
    if message is not None:
        out.add(*message.removesuffix("\n").split("\n"))
    place = f"{file}:{line} " if file else ""
    where = sprint_symbol(src.symbolize, regs.ip)
    out.add(f"WARNING: CPU: {src.task.cpu} PID: {src.task.pid} at {place}{where}")
    out.modules()
    out.show_regs(regs)
    out.end_trace()
    state.tainted |= taint
    return OopsReport(tuple(out.lines))


def bug_lines(src: OopsSource, regs: PtRegs, file: str = "", line: int = 0) -> tuple[str, ...]:
    """What report_bug prints for BUG() ahead of the invalid opcode oops."""
    if file:
        return CUT_HERE, f"kernel BUG at {file}:{line}!"
    return CUT_HERE, f"Kernel BUG at {sprint_backtrace(src.symbolize, regs.ip)} [verbose debug info unavailable]"


def stack_guard_lines(src: OopsSource, fault_address: int, info: StackInfo) -> tuple[str, ...]:
    """The line handle_stack_overflow prints first; all its addresses are %p."""
    if src.text.stack_guard_names_stack:
        name, end = f"{stack_type_name(info.type)} ", info.end
    else:
        name, end = "", info.end - 1
    hit, begin, last = (src.pointer(la) for la in (fault_address, info.begin, end))
    return (f"BUG: {name}stack guard page was hit at {hit} (stack is {begin}..{last})",)


def opcodes_line(src: OopsSource, state: OopsState, regs: PtRegs) -> str:
    """The Code: line on its own, as show_signal_msg prints it."""
    out = _Printer(src, state)
    out.show_opcodes(regs)
    return out.lines[0]


def show_trace(src: OopsSource, state: OopsState, regs: PtRegs | None) -> tuple[str, ...]:
    """The call trace alone, of the caller or of a context that stands elsewhere."""
    out = _Printer(src, state)
    out.call_trace(regs)
    return tuple(out.lines)


def dump_stack(src: OopsSource, state: OopsState) -> tuple[str, ...]:
    """dump_stack(): who runs, and the call trace of the caller."""
    out = _Printer(src, state)
    out.print_info()
    out.call_trace(None)
    return tuple(out.lines)
