"""The records of what the kernel model does between two instructions: calls, flushes, IPIs, switches, its log and tracepoints.

Everything is heard where the machine tells it anyway; what is taken over is called as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.cpu import Cpu
from emu.debug.records import (
    CallBegun,
    CallDone,
    CallEnded,
    Delivered,
    FlushAsked,
    Flushed,
    IpiSent,
    IpiTaken,
    Logged,
    Sampled,
    Stored,
    Switched,
    Vmalloc,
)
from emu.exceptions import Vector
from emu.kernel.preempt import PREEMPT_MASK, SOFTIRQ_MASK, SOFTIRQ_OFFSET
from emu.kernel.printk import LogLine
from emu.kernel.ptrace import X86_EFLAGS_IF
from emu.kernel.task import KernelThread
from emu.kernel.vmap_events import tracepoint_text
from emu.machine import Machine
from emu.mmu.tlb import Tlb
from emu.trace import Event, FlushIssued, TlbFlushed

if TYPE_CHECKING:
    from emu.debug.tracer import Tracer

_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_NMI = int(Vector.NMI)


class ModelTracer:
    """Tells `tracer` what the model of a machine does."""

    def __init__(self, machine: Machine, tracer: Tracer) -> None:
        self.machine = machine
        self.kernel = machine.kernel
        self.tracer = tracer
        self._ipis = 0
        # Numbers of the IPIs that a CPU has not taken yet, by CPU and vector.
        self._sent: dict[tuple[int, int], list[int]] = {}
        self._sample: tuple[tuple[int, ...], int, int] | None = None
        self._listen()

    def _listen(self) -> None:
        machine, kernel = self.machine, self.kernel
        machine.sink = self._event
        self._enter_kernel = machine.hub.model.enter_kernel
        machine.hub.model = self
        self._send_ipi, kernel.send_ipi = kernel.send_ipi, self._ipi
        self._send_nmi, kernel.send_nmi = kernel.send_nmi, self._nmi
        kernel.smp.on_done = self._done
        self._on_switch, kernel.sched.on_switch = kernel.sched.on_switch, self._switched
        self._on_line, kernel.log.on_line = kernel.log.on_line, self._logged
        space = kernel.vmalloc.space
        self._tracepoint, space.tracepoint = space.tracepoint, self._vmalloc
        changes = kernel.pages.table_changes
        self._tell, changes.tell = changes.tell, self._changed
        for cpu in machine.cpus:
            self._hear_stores(cpu)

    def _hear_stores(self, cpu: Cpu) -> None:
        tell, tlbsan = cpu.engine.on_table_store, self.machine.tlbsan

        def on_table_store(frame: int, before: bytes, after: bytes) -> None:
            self.tracer.model_runs()
            if tlbsan is not None:
                for start, end in tlbsan.tables.changed(frame, before, after):
                    self.tracer.observe(Stored(*self.tracer.here(cpu.id), start, end, "a store of the guest"))
            tell(frame, before, after)

        cpu.engine.on_table_store = on_table_store

    def _here(self) -> tuple[int, int, int, str]:
        return self.tracer.here(self.kernel.cpus.current)

    # ---- exported functions

    def enter_kernel(self, cpu: Cpu, la: int) -> object:
        """What the hub calls in place of the machine's."""
        tracer = self.tracer
        tracer.model_runs()
        export = self.kernel.symbols.exports.get(la)
        if export is None:
            ending = self._enter_kernel(cpu, la)
            tracer.model_runs()
            self._count()
            return ending
        arguments = tuple(cpu.reg(name) for name in _ARGUMENTS[: export.arguments])
        thread = self.kernel.sched.running[cpu.id]
        depth = 0 if thread is None else max(0, len(thread.activations) - 1)
        self._count()
        tracer.observe(CallBegun(*tracer.here(cpu.id), export.name, arguments, depth))
        ending = self._enter_kernel(cpu, la)
        if ending is None:
            tracer.observe(CallEnded(*tracer.here(cpu.id), export.name, cpu.reg("rax"), depth))
        tracer.model_runs()
        self._count()
        return ending

    def _count(self) -> None:
        """Tell the counters where they have changed."""
        kernel, machine = self.kernel, self.machine
        entries = tuple(_entries(cpu.mmu.tlb) for cpu in machine.cpus)
        free = sum(zone.nr_free for zones in kernel.pages.zones for zone in zones)
        sample = entries, kernel.vmalloc.space.vmap_lazy_nr, free
        if sample != self._sample:
            self._sample = sample
            self.tracer.observe(Sampled(*self._here(), *sample))

    # ---- flushes and interrupts

    def _event(self, event: Event) -> None:
        tracer = self.tracer
        if isinstance(event, FlushIssued):
            tracer.observe(FlushAsked(*tracer.here(event.cpu), event.flush, event.start, event.end, event.cause, event.cpus))
        elif isinstance(event, TlbFlushed):
            tracer.observe(Flushed(*tracer.here(event.cpu), event.flush, event.start, event.end))
            self._count()

    def _ipi(self, cpu: int, vector: int) -> None:
        self._sending(cpu, vector)
        self._send_ipi(cpu, vector)

    def _nmi(self, cpu: int) -> None:
        self._sending(cpu, _NMI)
        self._send_nmi(cpu)

    def _sending(self, cpu: int, vector: int) -> None:
        self._ipis += 1
        self._sent.setdefault((cpu, vector), []).append(self._ipis)
        self.tracer.observe(IpiSent(*self._here(), cpu, vector, self._ipis))

    def delivered(self, delivery: Delivered) -> None:
        """A delivery was told: if IPIs have brought it, they are taken."""
        numbers = self._sent.pop((delivery.cpu, delivery.vector), None)
        if numbers:
            self.tracer.observe(IpiTaken(
                delivery.step, delivery.cpu, delivery.pid, delivery.comm, delivery.vector, tuple(numbers),
            ))

    def _done(self, cpu: int, sender: int, cause: str) -> None:
        self.tracer.observe(CallDone(*self.tracer.here(cpu), sender, cause))

    # ---- threads, log, tracepoints, tables

    def _switched(self, previous: KernelThread, following: KernelThread) -> None:
        tracer = self.tracer
        tracer.model_runs()
        step, cpu, *_ = self._here()
        tracer.observe(Switched(step, cpu, previous.pid, previous.comm, following.pid, following.comm))
        self._on_switch(previous, following)

    def _logged(self, line: LogLine) -> None:
        self.tracer.observe(Logged(*self._here(), line.text))
        if self._on_line is not None:
            self._on_line(line)

    def _vmalloc(self, name: str, values: tuple[int, ...]) -> None:
        self.tracer.observe(Vmalloc(*self._here(), name, tracepoint_text(name, values), self._flags()))
        if self._tracepoint is not None:
            self._tracepoint(name, values)

    def _flags(self) -> str:
        """What trace_print_lat_fmt prints of this CPU (v6.12 kernel/trace/trace_output.c)."""
        kernel = self.kernel
        number = kernel.cpus.current
        count = kernel.preempt(number)
        irqs_off = not kernel.cpu_by_number(number).reg("rflags") & X86_EFLAGS_IF
        bh_off = bool(count.count & SOFTIRQ_MASK & ~SOFTIRQ_OFFSET)
        irqs = ("D" if bh_off else "d") if irqs_off else "b" if bh_off else "."
        resched = "N" if kernel.sched.need_resched[number] else "."
        if count.in_nmi:
            context = "Z" if count.in_hardirq else "z"
        elif count.in_hardirq:
            context = "H" if count.in_serving_softirq else "h"
        else:
            context = "s" if count.in_serving_softirq else "."
        depth = count.count & PREEMPT_MASK & 0xF
        return f"{irqs}{resched}{context}{f'{depth:x}' if depth else '.'}."

    def _changed(self, start: int, end: int, function: str, gone: bool) -> None:
        self.tracer.observe(Stored(*self._here(), start, end, function))
        if self._tell is not None:
            self._tell(start, end, function, gone)


def _entries(tlb: Tlb) -> int:
    """How many translations a TLB holds."""
    return sum(len(pages) for context in (tlb.shared, *tlb.contexts.values()) for pages in context.pages.values())
