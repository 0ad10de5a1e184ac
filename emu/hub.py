"""Several CPUs over one memory, one at a time: who runs, what a stop means, and when nobody can go on.

One loop drives everything, so a run is the same to the byte whenever seed, options and schedule are: the policy (emu/turns.py)
picks a CPU that is ready and a number of instructions; the CPU runs until those are executed or it needs the kernel model, whose
code runs here between two instructions (emu/kernel/sched.py); interrupts are taken at instruction boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from emu.cpu import Cpu, Halted, Interrupted, KernelEntry, LimitReached, Livelock, TurnOver
from emu.exceptions import CpuException, TripleFault, Vector
from emu.kernel.kernel_text import KernelText
from emu.kernel.sched import LOCAL_TIMER_VECTOR, Park, Scheduler
from emu.memory import BusError
from emu.mmu.fault import NonCanonical, PageFault
from emu.turns import NMI, NOBODY, Policy


class Final(Enum):
    """Why the machine as a whole stopped."""

    DONE = auto()          # what was waited for has happened
    ENDED = auto()         # the kernel model ended the run: `result`
    TRIPLE_FAULT = auto()
    BUS_ERROR = auto()
    HALTED = auto()
    LIMIT = auto()
    LIVELOCK = auto()
    INTERRUPTED = auto()
    DEADLOCK = auto()      # no CPU can go on, and nothing will change that


@dataclass(frozen=True, slots=True)
class Finish:
    """How a run of the machine ended: on which CPU, the stop or error, what the kernel model returned."""

    final: Final
    cpu: int
    stop: object = None


class Model(Protocol):
    """The kernel as the hub calls it."""

    def enter_kernel(self, cpu: Cpu, la: int) -> object:
        """Handle a stop in kernel text, inside an activation; a result other than None ends the run."""


class Hub:
    """The CPUs of a machine and their turns. `policy` may be changed between two runs."""

    def __init__(
        self, cpus: list[Cpu], sched: Scheduler, text: KernelText, model: Model, policy: Policy, limit: int | None = None
    ) -> None:
        self.cpus = cpus
        self.sched = sched
        self.text = text
        self.model = model
        self.policy = policy
        self.limit = limit
        self._end: int | None = None
        self._last = NOBODY
        self._paused = False
        # The last turn ended because it was given no more, which the policy may have done for its own sake only.
        self._cut = False
        self._start = [0] * len(cpus)
        counters = [cpu.engine.counter for cpu in cpus if cpu.engine.counter is not None]
        # None where instructions are not counted: all CPUs count, or none does.
        self._counters = counters if len(counters) == len(cpus) else None
        # Told of the CPU whose turn is over.
        self.on_turn: Callable[[int], None] = lambda cpu: None
        sched.clock = self.total
        sched.run_others = self.run_others
        for cpu in cpus:
            cpu.engine.pause_yields = len(cpus) > 1

    # ---- counting

    def executed(self, cpu: int) -> int:
        """Instructions of a CPU since the last start; 0 where they are not counted."""
        return 0 if self._counters is None else self._counters[cpu].executed - self._start[cpu]

    def total(self) -> int | None:
        """Instructions of all CPUs since boot; None where they are not counted."""
        if self._counters is None:
            return None
        total = 0
        for counter in self._counters:
            total += counter.executed
        return total

    @property
    def started(self) -> int:
        """Instructions of all CPUs before the last start."""
        return sum(self._start)

    def start(self) -> None:
        """Count the CPUs' instructions, and bound them all together, from here; the next turn is CPU 0's."""
        total = self.total()
        self._end = None if self.limit is None or total is None else total + self.limit
        self._start = [0] * len(self.cpus)
        self._start = [self.executed(cpu.id) for cpu in self.cpus]
        self._last = NOBODY
        self._paused = self._cut = False

    def _left(self) -> int | None:
        """Instructions that may still be executed; None without a bound."""
        if self._end is None:
            return None
        return max(0, self._end - (self.total() or 0))

    # ---- the loop

    def run(self, done: Callable[[], bool]) -> Finish:
        """Let the CPUs take turns until `done`, or until the machine stops."""
        while not done():
            self._fire_timers()
            ready = [cpu.id for cpu in self.cpus if self.is_ready(cpu.id)]
            if ready and self._left() == 0:
                return Finish(Final.LIMIT, self._last, LimitReached(self.cpus[max(0, self._last)].rip))
            if not ready:
                self._end_turn()
                timer = self.sched.next_timer()
                if timer is None:
                    return Finish(Final.DEADLOCK, self._last)
                self.sched.advance(timer.time)
                continue
            finish = self._turn(ready)
            if not self._cut:
                self.on_turn(self._last)
            if finish is not None:
                return finish
        return Finish(Final.DONE, self._last)

    def run_others(self, condition: Callable[[], bool]) -> None:
        """Kernel code called from outside waits on its CPU: let the others run until it need not. Raises AssertionError."""
        here = self.sched.cpus.current
        while not condition():
            ready = [cpu.id for cpu in self.cpus if cpu.id != here and self.is_ready(cpu.id)]
            finish = self._turn(ready) if ready else Finish(Final.DEADLOCK, here)
            assert finish is None, f"CPU {here} waits for what never comes: {finish}"
            self._cut = False
            self.sched.cpus.current = here

    def quiesce(self) -> Finish:
        """Run what still can run, timers aside, until every CPU has nothing to do."""
        return self.run(lambda: not any(self.is_ready(cpu.id) for cpu in self.cpus))

    def is_ready(self, number: int) -> bool:
        """Whether a CPU would do anything in its turn."""
        sched, cpu = self.sched, self.cpus[number]
        if sched.idling[number]:
            return bool(sched.queues[number]) or cpu.interruptible
        if sched.spinning[number]:
            activation = sched.innermost(number)
            assert activation is not None, f"CPU {number} spins for nobody"
            return activation.condition() or cpu.interruptible
        return True

    def _timer_is_due(self) -> bool:
        timer = self.sched.next_timer()
        return timer is not None and timer.time <= self.sched.time()

    def _fire_timers(self) -> None:
        timer = self.sched.next_timer()
        if timer is None or timer.time > self.sched.time():
            return
        cpu = self.cpus[timer.cpu]
        if LOCAL_TIMER_VECTOR not in cpu.pending_interrupts:
            cpu.raise_interrupt(LOCAL_TIMER_VECTOR)

    def _turn(self, ready: Sequence[int]) -> Finish | None:
        turn = self.policy.turn(ready, self._last, self._paused, self)
        if turn.fresh or turn.cpu != self._last:
            self._end_turn()
        self._cut = False
        number = self._last = turn.cpu
        self._paused = False
        cpu, sched = self.cpus[number], self.sched
        budget, left = turn.budget, self._left()
        if left is not None:
            budget = left if budget is None else min(budget, left)
        end = None if budget is None else self.executed(number) + self._until_timer(budget)
        while True:
            for vector in self.policy.due(number, self.executed(number)):
                cpu.raise_nmi() if vector == NMI else cpu.raise_interrupt(vector)
            if sched.idling[number]:
                if sched.queues[number]:
                    sched.leave_idle(number)
                elif cpu.interruptible:
                    sched.idling[number] = False
                else:
                    return None
            activation = sched.innermost(number)
            if sched.spinning[number] and activation is not None and not cpu.interruptible and not activation.condition():
                return None
            if activation is not None and (activation.park is Park.SWITCHED or (sched.spinning[number] and not cpu.interruptible)):
                result: TurnOver | Finish | None = self._in_model(number, activation.la, lambda: sched.resume(number))
            else:
                sched.spinning[number] = False
                left = None if end is None else end - self.executed(number)
                if left is not None and left <= 0:
                    self._cut = not self._timer_is_due()
                    return None
                result = self._execute(number, left)
            if isinstance(result, TurnOver):
                self._paused = result.paused
                self._cut = not (result.paused or self._timer_is_due())
                return None
            if isinstance(result, Finish):
                return result
            if turn.until_company and any(cpu.id != number and self.is_ready(cpu.id) for cpu in self.cpus):
                self._cut = not self._timer_is_due()
                return None
            if end is not None and self.executed(number) >= end:
                self._cut = not self._timer_is_due()
                return None

    def _end_turn(self) -> None:
        """A turn that was cut is over after all."""
        if self._cut:
            self._cut = False
            self.on_turn(self._last)

    def _execute(self, number: int, budget: int | None) -> TurnOver | Finish | None:
        """Run a CPU until it stops, and do what the stop asks for."""
        try:
            stop = self.cpus[number].run(budget)
        except TripleFault as fault:
            return Finish(Final.TRIPLE_FAULT, number, fault)
        except BusError as error:
            return Finish(Final.BUS_ERROR, number, error)
        match stop:
            case KernelEntry(la=la):
                return self._kernel_entry(number, la)
            case TurnOver():
                return stop
            case Halted():
                return Finish(Final.HALTED, number, stop)
            case LimitReached():
                return Finish(Final.LIMIT, number, stop)
            case Livelock():
                return Finish(Final.LIVELOCK, number, stop)
            case Interrupted():
                return Finish(Final.INTERRUPTED, number, stop)

    def _until_timer(self, budget: int) -> int:
        timer = self.sched.next_timer()
        return budget if timer is None else max(1, min(budget, timer.time - self.sched.time()))

    def _kernel_entry(self, number: int, la: int) -> Finish | None:
        sched, cpu = self.sched, self.cpus[number]
        if la == self.text.idle:
            sched.idling[number] = True
            return None
        if la in self.text.spins:
            cpu.rip = la
            sched.spinning[number] = True
            return None
        if la in self.text.returns:
            activation = sched.innermost(number)
            if activation is None or activation.park is not Park.CALLS:
                # A jump into kernel text, not a return: whoever jumps there halts.
                return Finish(Final.HALTED, number, Halted(la, True))
            return self._in_model(number, activation.la, lambda: sched.resume(number))
        return self._in_model(number, la, lambda: sched.enter(number, la, lambda: self.model.enter_kernel(cpu, la)))

    def _in_model(self, number: int, la: int, go: Callable[[], object]) -> Finish | None:
        """Run model code for a CPU; its own faults are exceptions at the stub `la` that it entered by."""
        cpu = self.cpus[number]
        try:
            try:
                result = go()
            except PageFault as error:
                cpu.rip = la
                cpu.raise_exception(CpuException(Vector.PF, error.error, error.la))
                return None
            except NonCanonical:
                cpu.rip = la
                cpu.raise_exception(CpuException(Vector.GP, 0))
                return None
        except TripleFault as fault:
            return Finish(Final.TRIPLE_FAULT, number, fault)
        except BusError as error:
            return Finish(Final.BUS_ERROR, number, error)
        return None if result is None else Finish(Final.ENDED, number, result)
