"""From an IDT gate to Linux's handler and back: what arch/x86/entry/entry_64.S and traps.c do around a decision.

The CPU has pushed the hardware frame and executes the HLT of an entry stub. Here the rest of struct pt_regs is pushed, the
decision of emu/kernel/traps.py or fault.py is taken and printed, and the context is resumed by IRETQ, or ends.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from emu.kernel import fault, traps
from emu.kernel.gfp import gfp_text
from emu.kernel.interrupts import ENOSYS, EarlyException, Interrupts, Syscall
from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.oops import Controls, DieContext, OopsReport, OopsSource, dump_stack, panic, show_trace
from emu.kernel.percpu_first_chunk import IRQ_STACK_SIZE
from emu.kernel.pti import PageTableIsolation
from emu.kernel.ptrace import PT_REGS_IP, X86_EFLAGS_IF, PtRegs, pack_pt_regs, read_pt_regs
from emu.kernel.task import KernelThread
from emu.kernel.unwind import StackInfo, Stacks, StackSection, StackType, Unwinder
from emu.kernel.warn_sites import Site
from emu.mmu.fault import NonCanonical, PageFault

if TYPE_CHECKING:
    from emu.kernel.kernel import Kernel

_WORD = 8
# RIP, CS, RFLAGS, RSP, SS as the CPU pushes them.
_FRAME = struct.Struct("<5Q")


class End(Enum):
    """How a guest's run ends in the kernel."""

    OOPS = "oops"
    PANIC = "panic"
    SIGNAL = "signal"


@dataclass(frozen=True, slots=True)
class Ending:
    """The task or the machine is finished: `text` is the panic message or names the signal."""

    end: End
    text: str = ""


class ExceptionEntry:
    """The exception side of one kernel; `gp_access` decodes the memory operand of the instruction at an address."""

    def __init__(self, kernel: Kernel, gp_access: Callable[[PtRegs], tuple[int, int] | None]) -> None:
        self.kernel = kernel
        self.gp_access = gp_access
        self.interrupts = Interrupts(kernel.profile.name)
        self.pti = PageTableIsolation(kernel.contexts)
        self._last_regs: dict[int, PtRegs] = {}

    def handle(self, cpu: KernelCpu, vector: int) -> Ending | None:
        """Handle the exception whose stub `cpu` has entered. None when execution goes on, with RIP and RSP set to do so.

        Raises PageFault when the stack has no room for the registers: another exception at the stub.
        """
        rsp = cpu.reg("rsp")
        error = 0
        if traps.pushes_error_code(vector):
            error = int.from_bytes(cpu.read(rsp, _WORD), "little")
            frame_la = rsp + _WORD
        else:
            frame_la = rsp
        ip, cs, flags, sp, ss = _FRAME.unpack(cpu.read(frame_la, _FRAME.size))
        self.pti.enter(cpu, vector, cs, frame_la)
        regs = read_pt_regs(cpu.reg, ip=ip, cs=cs, flags=flags, sp=sp, ss=ss)
        regs_la = frame_la - PT_REGS_IP
        cpu.write(regs_la, pack_pt_regs(regs)[:PT_REGS_IP])
        cpu.set_reg("rsp", regs_la)
        activation = self.kernel.sched.activation
        if activation is None:
            self._last_regs = {regs_la: regs}
        else:
            activation.entry_regs = {regs_la: regs}
        # What interrupts is served before anything is gathered that only a report shows.
        if vector >= traps.FIRST_EXTERNAL_VECTOR and vector != traps.IA32_SYSCALL_VECTOR and self.kernel.irqs.handle(vector):
            if regs.user_mode:
                self.kernel.sched.yield_cpu()
            self._resume(cpu, regs, regs.ip, frame_la)
            return None
        if vector == traps.Trap.NMI and self.kernel.irqs.nmi():
            self._resume(cpu, regs, regs.ip, frame_la)
            return None
        address = cpu.reg("cr2")
        source = self.oops_source(cpu)
        if vector == traps.Trap.PF:
            return self._page_fault(cpu, source, regs, error, address, frame_la)
        if vector not in traps.HANDLED:
            return self._interrupt(cpu, source, vector, regs, error, frame_la)
        facts = traps.TrapFacts(
            version=self.kernel.profile.name, task=self.kernel.oops_task(cpu), stacks=self._stacks(cpu),
            bug=self.kernel.bug_entry, warned=self.kernel.warned, code=lambda la, size: self._peek(cpu, la, size),
            gp_access=self.gp_access, levels=self.kernel.layout.levels, context=self._context(cpu),
        )
        action = traps.handle_trap(facts, vector, regs, error, address)
        return self._act(cpu, source, action, regs, frame_la)

    def _entry_regs(self, thread: KernelThread) -> dict[int, PtRegs]:
        """The registers on the stacks of a thread, by address: one set for each exception and interrupt under way."""
        activations = thread.activations
        return self._last_regs | {la: regs for activation in activations for la, regs in activation.entry_regs.items()}

    def _context(self, cpu: KernelCpu) -> DieContext:
        """in_interrupt and preempt_count of the interrupted code."""
        count = self.kernel.preempt(cpu.id)
        return DieContext(in_interrupt=count.in_interrupt, preempt_count=count.count)

    def _interrupt(
        self, cpu: KernelCpu, source: OopsSource, vector: int, regs: PtRegs, error: int, frame_la: int
    ) -> Ending | None:
        action = self.interrupts.handle(vector, regs, error, cpu.reg("cr2"), cpu.id)
        match action:
            case Syscall():
                cpu.set_reg("rax", -ENOSYS & (1 << 64) - 1)
                self._resume(cpu, regs, regs.ip, frame_la)
                return None
            case EarlyException(lines=lines):
                self.kernel.print_lines(lines)
                return Ending(End.PANIC, lines[0])
        return self._act(cpu, source, action, regs, frame_la)

    def _act(
        self, cpu: KernelCpu, source: OopsSource, action: traps.Action, regs: PtRegs, frame_la: int
    ) -> Ending | None:
        report = traps.report(source, self.kernel.oops_state, action, regs)
        self.kernel.print_lines(report.lines)
        match action:
            case traps.Resume(ip=ip):
                self._resume(cpu, regs, ip, frame_la)
                return None
            case traps.Warn(ip=ip, bug=bug):
                self.kernel.note_warned(bug)
                self._resume(cpu, regs, ip, frame_la)
                return None
            case traps.Signal(signal=signal):
                return Ending(End.SIGNAL, f"signal {signal}")
        return self._end(report)

    def _end(self, report: OopsReport) -> Ending:
        return Ending(End.PANIC, report.panic) if report.panic is not None else Ending(End.OOPS)

    def _page_fault(
        self, cpu: KernelCpu, source: OopsSource, regs: PtRegs, error: int, address: int, frame_la: int
    ) -> Ending | None:
        kernel = self.kernel
        facts = fault.FaultFacts(
            version=kernel.profile.name, levels=kernel.layout.levels, task=kernel.oops_task(cpu), stacks=self._stacks(cpu),
            entries=kernel.entries(cpu.reg("cr3"), address), init_entries=kernel.entries(kernel.init_mm.pgd, address),
            is_vmalloc_addr=kernel.layout.is_vmalloc_addr, smap=kernel.smap, smep=kernel.smep,
            vmalloc_fault=lambda la: self.vmalloc_fault(cpu, la), context=self._context(cpu),
        )
        outcome = fault.handle_page_fault(facts, regs, error, address)
        report = fault.report(source, kernel.oops_state, outcome, regs)
        kernel.print_lines(report.lines)
        match outcome:
            case fault.Fixed(ip=ip):
                self._resume(cpu, regs, ip, frame_la)
                return None
            case fault.FaultSignal(signal=signal):
                return Ending(End.SIGNAL, f"signal {signal.signal}")
        return self._end(report)

    def vmalloc_fault(self, cpu: KernelCpu, la: int) -> bool:
        """Before v5.8: copy init_mm's top-level entry for `la` into the tables of CR3; false if that cannot be the remedy."""
        kernel = self.kernel
        region = range(kernel.layout.vmalloc_start, kernel.layout.vmalloc_end)
        found = fault.vmalloc_fault(kernel.memory.read_u64, cpu.reg("cr3"), kernel.init_mm.pgd, la, kernel.layout.levels, region)
        if found.store is not None:
            kernel.init_mm.set_pgd(*found.store)
        return found.handled

    def _resume(self, cpu: KernelCpu, regs: PtRegs, ip: int, frame_la: int) -> None:
        """Go back by the IRETQ of the common exit."""
        if ip != regs.ip:
            cpu.write(frame_la, ip.to_bytes(_WORD, "little"))
        self.pti.leave(cpu, regs.cs, frame_la)
        cpu.set_reg("rsp", frame_la)
        cpu.set_reg("rip", self.kernel.symbol("common_interrupt_return"))

    def report_warn(self, cpu: KernelCpu, site: Site, message: str | None) -> None:
        """Print the splat of a WARN in kernel code that the model executes: the registers are those of the call that led there."""
        regs = self._regs_at(cpu, site)
        entry = traps.BugEntry(site.file, site.line, True, False, message)
        report = traps.report(self.oops_source(cpu), self.kernel.oops_state, traps.Warn(entry, regs.ip), regs)
        self.kernel.print_lines(report.lines)

    def report_bug(self, cpu: KernelCpu, site: Site) -> Ending:
        """Print the oops of a BUG in kernel code that the model executes."""
        regs = self._regs_at(cpu, site)
        context = dataclasses.replace(self._context(cpu), irqs_disabled=not regs.flags & X86_EFLAGS_IF)
        action = traps.Die("invalid opcode", 0, context, bug=traps.BugEntry(site.file, site.line))
        report = traps.report(self.oops_source(cpu), self.kernel.oops_state, action, regs)
        self.kernel.print_lines(report.lines)
        return self._end(report)

    def report_alloc(self, cpu: KernelCpu, gfp: int, text: str) -> None:
        """warn_alloc's message (v6.12 mm/page_alloc.c): who asked for what, and the stack. Memory statistics are not modelled."""
        comm = self.kernel.current_thread(cpu).comm
        mode = f"mode:{gfp:#x}({gfp_text(gfp)}), nodemask=(null),cpuset=/,mems_allowed={self.kernel.mems_allowed}"
        self.kernel.print_lines((f"{comm}: {text}, {mode}", *dump_stack(self.oops_source(cpu), self.kernel.oops_state)))

    def dump_stack(self, cpu: KernelCpu) -> None:
        """dump_stack(): the current thread and its call trace."""
        self.kernel.print_lines(dump_stack(self.oops_source(cpu), self.kernel.oops_state))

    def thread_trace(self, thread: KernelThread) -> tuple[str, ...]:
        """The call trace of a thread, wherever it stands."""
        cpu = self.kernel.cpu_by_number(thread.cpu)
        regs = self.current_regs(cpu)
        if thread.context is not None:
            saved = cpu.context_registers(thread.context)
            regs = PtRegs(ip=saved["rip"], sp=saved["rsp"], bp=saved["rbp"])
        return show_trace(self.oops_source(cpu, thread), self.kernel.oops_state, regs)

    def panic(self, cpu: KernelCpu, message: str) -> None:
        """panic(): its text; the caller ends the machine."""
        self.kernel.print_lines(panic(self.oops_source(cpu), self.kernel.oops_state, message).lines)

    def _regs_at(self, cpu: KernelCpu, site: Site) -> PtRegs:
        return dataclasses.replace(self.current_regs(cpu), ip=self.kernel.symbol_or(site.symbol, cpu.reg("rip")))

    def current_regs(self, cpu: KernelCpu) -> PtRegs:
        """The context in which an exported function was called."""
        return read_pt_regs(
            cpu.reg, ip=cpu.reg("rip"), cs=cpu.reg("cs"), flags=cpu.reg("rflags"), sp=cpu.reg("rsp"), ss=cpu.reg("ss")
        )

    def _peek(self, cpu: KernelCpu, la: int, size: int) -> bytes | None:
        try:
            return cpu.read(la, size)
        except (PageFault, NonCanonical):
            return None

    def _stacks(self, cpu: KernelCpu, thread: KernelThread | None = None) -> Stacks:
        """The stacks the kernel knows, each with where it was entered from; that of `thread` if not the current one."""
        thread = thread or self.kernel.current_thread(cpu)

        def saved_rsp(end: int) -> int:
            return self._word(cpu, end - 2 * _WORD)

        task = StackInfo(StackType.TASK, thread.stack, thread.stack_end)
        irq_end = self.kernel.irq_stacks[cpu.id] + IRQ_STACK_SIZE
        irq = StackInfo(StackType.IRQ, irq_end - IRQ_STACK_SIZE, irq_end, self._word(cpu, irq_end - _WORD))
        *exceptions, entry = self.kernel.cpu_entry_area(cpu.id).stack_infos(saved_rsp)
        return Stacks((task, *exceptions, irq, entry))

    def _word(self, cpu: KernelCpu, la: int) -> int:
        data = self._peek(cpu, la, _WORD)
        return 0 if data is None else int.from_bytes(data, "little")

    def oops_source(self, cpu: KernelCpu, thread: KernelThread | None = None) -> OopsSource:
        kernel = self.kernel
        thread = thread or kernel.current_thread(cpu)
        stacks = self._stacks(cpu, thread)

        def read(la: int, size: int) -> bytes:
            try:
                return cpu.read(la, size)
            except PageFault as error:
                cpu.set_reg("cr2", error.la)
                raise

        unwinder = Unwinder(
            lambda la, size: self._peek(cpu, la, size), kernel.is_text, kernel.symbolize, entry_regs=self._entry_regs(thread)
        )

        def trace(regs: PtRegs | None) -> tuple[StackSection, ...]:
            at = regs if regs is not None else self.current_regs(cpu)
            return unwinder.show_trace(stacks, sp=at.sp, ip=at.ip, bp=at.bp)

        return OopsSource(
            text=kernel.oops_text, build=kernel.build, task=kernel.oops_task(cpu), read=read,
            controls=lambda: _controls(cpu), symbolize=kernel.symbolize, trace=trace,
            modules=kernel.module_list(),
        )


def _controls(cpu: KernelCpu) -> Controls:
    return Controls(
        cr0=cpu.reg("cr0"), cr2=cpu.reg("cr2"), cr3=cpu.reg("cr3"), cr4=cpu.reg("cr4"), fs_base=cpu.reg("fs_base"),
        gs_base=cpu.reg("gs_base"), kernel_gs_base=cpu.reg("kernel_gs_base"), pkru=cpu.reg("pkru"),
    )
