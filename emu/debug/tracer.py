"""A run seen from inside: every instruction, access and event of it, as records in their order.

The run is the one that nobody watches, to the byte: tests/debug/test_traced_runs_are_the_same.py. What the CPUs do comes from
emu/debug/cpu_tracer.py, what the kernel model does from emu/debug/model_tracer.py.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.config import MachineConfig
from emu.cpu import Cpu
from emu.debug.cpu_tracer import CpuTracer, Line
from emu.debug.model_tracer import ModelTracer
from emu.debug.records import Accessed, AnyRecord, Delivered, Ended, Executed, Returned
from emu.debug.surroundings import Surroundings
from emu.engine import StopReason
from emu.engine_context import EngineError
from emu.exceptions import CpuException, Vector
from emu.guest.directives import MachineOptions
from emu.guest.expect import Outcome
from emu.guest.program import Program
from emu.machine import Machine
from emu.run import RunResult, configure, judged, run_to_end
from emu.tlbsan import NOTHING_TRACKED, Tracking

Observe = Callable[[AnyRecord], None]
_NMI = int(Vector.NMI)


class Untraceable(ValueError):
    """A machine that cannot be traced."""


def trace_program(
    program: Program, overrides: MachineOptions, observe: Observe, *, memory: bool = True
) -> tuple[RunResult, Machine]:
    """Run a guest and give `observe` each record of the run; the result and the machine as `run_to_end`.

    The guest is run once before, unobserved, to know what TLBSan's reports will need. With `memory` false no accesses are told.
    What `observe` raises ends the run and is raised here. Raises as run_to_end, and Untraceable for a native machine or on a host
    whose engine cannot be watched.
    """
    config, limit = configure(program.directives.machine, overrides)
    if config.native:
        raise Untraceable("a native machine cannot be traced: Unicorn's own translations are not seen")
    track = NOTHING_TRACKED
    if config.tlbsan:
        findings = run_to_end(program, overrides)[0].findings
        track = Tracking.of(findings) if findings else NOTHING_TRACKED
    machine, outcome = traced_run(program, config, limit, observe, memory=memory, track=track)
    return judged(program, config, limit, machine, outcome), machine


def traced_run(
    program: Program, config: MachineConfig, limit: int, observe: Observe, *, memory: bool = True, track: Tracking = NOTHING_TRACKED
) -> tuple[Machine, Outcome]:
    """One run of a guest on a new machine, its records given to `observe`. Raises as trace_program."""
    machine = Machine(config, limit=limit, track=track)
    _, linked = machine.load(program)
    tracer = Tracer(machine, observe, memory=memory)
    outcome = machine.run_loaded(program, linked)
    tracer.end(outcome)
    return machine, outcome


class Tracer:
    """Makes the records of a machine whose guest is about to be called. Raises Untraceable."""

    def __init__(self, machine: Machine, observe: Observe, *, memory: bool = True) -> None:
        self.machine = machine
        self.observe = observe
        self.step = 0
        kernel = machine.kernel
        self.surroundings = Surroundings(kernel, None if machine.tlbsan is None else machine.tlbsan.tables)
        self._running = kernel.sched.running
        self._symbolize = kernel.symbolize
        self._executed = [0] * len(machine.cpus)
        self._begun = False
        self._last = machine.cpu
        # An instruction that its CPU carries out now, or a delivery under way.
        self._held: tuple[CpuTracer, Line, int, tuple[Accessed, ...]] | None = None
        self._arriving: Delivered | None = None
        try:
            self.cpus = [CpuTracer(cpu, self, memory=memory) for cpu in machine.cpus]
        except EngineError as error:
            raise Untraceable(str(error)) from error
        for cpu in machine.cpus:
            self._watch(cpu)
        self.model = ModelTracer(machine, self)

    def _watch(self, cpu: Cpu) -> None:
        engine, run, step, deliver, enter = cpu.engine, cpu.engine.run, cpu.engine.step, cpu.on_delivery, cpu.on_entry

        def counted_run(rip: int, budget: int | None = None, *, exact: bool = True) -> StopReason:
            self._begin(cpu)
            return run(rip, budget, exact=exact)

        def counted_step(rip: int) -> StopReason:
            self._begin(cpu)
            return step(rip)

        def on_delivery(exception: CpuException) -> None:
            deliver(exception)
            self._delivering(cpu, exception)

        def on_entry(exception: CpuException) -> None:
            enter(exception)
            self.release()

        engine.run = counted_run  # type: ignore[method-assign]
        engine.step = counted_step  # type: ignore[method-assign]
        cpu.on_delivery = on_delivery
        cpu.on_entry = on_entry

    # ---- counting

    def _begin(self, cpu: Cpu) -> None:
        """A CPU goes on: count what was charged to it since it stopped."""
        counter = cpu.engine.counter
        assert counter is not None, "a traced machine counts"
        if not self._begun:
            self._begun = True
            self._executed = [other.engine.counter.executed for other in self.machine.cpus if other.engine.counter is not None]
            self.step = sum(self._executed) - self.machine.hub.started
        self._executed[self._last.id] = self._last.engine.counter.executed if self._last.engine.counter is not None else 0
        self._executed[cpu.id] = counter.executed
        self._last = cpu
        step = sum(self._executed) - self.machine.hub.started
        if not 0 <= step - self.step <= 1:
            raise EngineError(f"the trace has {self.step} instructions, and the counters say {step}")
        self.release()
        self.step = step

    # ---- CpuTracer's host

    def thread(self, cpu: int) -> tuple[int, str]:
        """Number and name of the thread of a CPU."""
        thread = self._running[cpu]
        return (0, "swapper") if thread is None else (thread.pid, thread.comm)

    def symbol(self, la: int) -> str:
        """The symbol at an address as %pS prints it, or nothing."""
        return self._symbolize(la) or ""

    def hold(self, tracer: CpuTracer, line: Line, step: int, shown: tuple[Accessed, ...]) -> None:
        """An instruction began; what it does is known when its CPU goes on or raises an exception."""
        self._held = tracer, line, step, shown
        tracer.own = []

    def release(self) -> None:
        """Tell what was held."""
        if self._arriving is not None:
            self._delivered()
        if self._held is not None:
            rip = self._held[0].cpu.rip
            if self._executed_held(fault=False).startswith("iret"):
                self._returned(rip)

    def _executed_held(self, *, fault: bool) -> str:
        """Tell of the instruction that was held; its text."""
        assert self._held is not None, "an instruction is held"
        tracer, line, step, shown = self._held
        self._held = None
        own, tracer.own = tracer.own or (), None
        self.observe(Executed(step, tracer.cpu.id, tracer.pid, tracer.comm, *line.shown, (*shown, *own), fault))
        return line.shown[3]

    def _returned(self, rip: int) -> None:
        cpu = self.machine.kernel.cpus.current
        self.observe(Returned(self.step, cpu, *self.thread(cpu), rip))

    # ---- deliveries

    def _delivering(self, cpu: Cpu, exception: CpuException) -> None:
        vector, rip = int(exception.vector), cpu.rip
        if self._arriving is not None:
            self._delivered()
        if self._held is not None:
            tracer, line, *_ = self._held
            self._executed_held(fault=tracer.cpu is cpu and vector < 32 and vector != _NMI and line.rip == rip)
        tracer = self.cpus[cpu.id]
        tracer.own = []
        failed, tracer.failed_fetch = tracer.failed_fetch, None
        if failed is not None and exception.cr2 is not None and failed.la == exception.cr2 & -4096:
            tracer.own.append(failed)
        place = "" if exception.cr2 is None else self.surroundings.place(exception.cr2)
        self._arriving = Delivered(
            self.step, cpu.id, *self.thread(cpu.id), vector, exception.error, rip, exception.cr2, place,
        )

    def _delivered(self) -> None:
        arriving, self._arriving = self._arriving, None
        assert arriving is not None, "a delivery is under way"
        tracer = self.cpus[arriving.cpu]
        own, tracer.own = tracer.own, None
        self.observe(Delivered(
            arriving.step, arriving.cpu, arriving.pid, arriving.comm, arriving.vector, arriving.error, arriving.rip, arriving.cr2,
            arriving.place, tuple(own or ()),
        ))
        self.model.delivered(arriving)

    # ---- the model

    def model_runs(self) -> None:
        """The kernel model goes on: what was known of memory may change."""
        self.release()
        self.surroundings.forget()
        for tracer in self.cpus:
            tracer.forget()

    def here(self, cpu: int) -> tuple[int, int, int, str]:
        """Where a record of a CPU stands."""
        tracer = self.cpus[cpu]
        if tracer.engine.running:
            tracer.drain()
        self.release()
        return self.step, cpu, *self.thread(cpu)

    def end(self, outcome: Outcome) -> None:
        """The run is over."""
        self.release()
        self.step = (self.machine.hub.total() or 0) - self.machine.hub.started
        self.observe(Ended(*self.here(self.machine.kernel.cpus.current), outcome.ended, outcome.returned))
