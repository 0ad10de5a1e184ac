"""Threads taking turns on a CPU, and how the model's own code waits.

Kernel code of the model runs while its CPU stands still, in a greenlet of its own: an activation. A thread has a stack of them, as
it would have frames of C functions: an exported function that it called, an interrupt that came while that one waited, an exported
function that the interrupt's handler called. Only the innermost can go on. Between two waits an activation is not interrupted.

How an activation waits:
- `spin_until`: its CPU stands at a loop in kernel text, takes interrupts if RFLAGS.IF is set, and the other CPUs run;
- `block`: its thread sleeps, and another thread gets the CPU;
- `call_guest`: its CPU executes guest code until that returns.

Source for the names and for who is woken where: v6.12 kernel/sched/core.c. Each CPU has a queue of its own, first in, first out; a
thread stays on the CPU it was started on. Nothing is preempted in kernel mode but at the end of an exported function.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from greenlet import getcurrent, greenlet

from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.ptrace import PtRegs
from emu.kernel.task import KernelThread, ThreadState

RESCHEDULE_VECTOR = 0xFD
LOCAL_TIMER_VECTOR = 0xEC
SPIN_SITE = "native_queued_spin_lock_slowpath"
_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_MASK64 = (1 << 64) - 1


class NeedsClock(Exception):
    """The run asks for the time, which only a machine that counts instructions has."""


class Park(Enum):
    """Why an activation does not go on."""

    RUNS = auto()
    SPINS = auto()
    CALLS = auto()
    SWITCHED = auto()


class Activation:
    """One call into the model: what it needs when it goes on after a wait.

    `la` is the stub by which it was entered, `caller` the return address of an exported call.
    """

    __slots__ = ("caller", "condition", "entry_regs", "greenlet", "la", "park", "thread")

    def __init__(self, thread: KernelThread, la: int, body: Callable[[], object]) -> None:
        self.thread = thread
        self.la = la
        self.greenlet = greenlet(body)
        self.park = Park.RUNS
        self.condition: Callable[[], bool] = lambda: True
        self.caller = 0
        self.entry_regs: dict[int, PtRegs] = {}


class Cpus(Protocol):
    """Which CPU runs the model now."""

    current: int


class KernelText(Protocol):
    """Where kernel text has the loops and call sites that a waiting CPU stands at."""

    def spin_site(self, name: str) -> int:
        """Address of the HLT of the loop in function `name`."""

    def call_site(self, name: str) -> int:
        """Return address of the indirect call in function `name`."""


@dataclass(order=True, slots=True)
class Timer:
    """A function to call in interrupt context on a CPU at `time`; None once cancelled or run."""

    time: int
    number: int
    cpu: int = field(compare=False)
    function: Callable[[], None] | None = field(compare=False)


class Scheduler:
    """The threads of one kernel. `cpu(n)` gives CPU n; `clock` the executed instructions of all CPUs, None when not counted."""

    def __init__(
        self, nr_cpus: int, cpus: Cpus, cpu: Callable[[int], KernelCpu], send_ipi: Callable[[int, int], None],
    ) -> None:
        self.cpus = cpus
        self.cpu = cpu
        self.send_ipi = send_ipi
        self.text: KernelText | None = None
        self.clock: Callable[[], int | None] = lambda: 0
        self.skipped = 0
        self.switches = 0
        self.queues: list[deque[KernelThread]] = [deque() for _ in range(nr_cpus)]
        self.idle: list[KernelThread] = []
        self.running: list[KernelThread | None] = [None] * nr_cpus
        # The CPU stands at the loop of its innermost activation, or at the HLT of the idle loop.
        self.spinning = [False] * nr_cpus
        self.idling = [False] * nr_cpus
        self.need_resched = [False] * nr_cpus
        self.activation: Activation | None = None
        self.hub = getcurrent()
        self.timers: list[list[Timer]] = [[] for _ in range(nr_cpus)]
        self._timer_number = 0
        # Runs the other CPUs until a condition holds: for whoever calls the kernel from outside every activation.
        self.run_others: Callable[[Callable[[], bool]], None] = _nobody_runs
        # Told of each switch: previous and next thread.
        self.on_switch: Callable[[KernelThread, KernelThread], None] = lambda previous, following: None
        # What a thread that may not sleep does when it does (v6.12 kernel/sched/core.c schedule_debug).
        self.schedule_debug: Callable[[KernelThread], None] = lambda thread: None

    # ---- the threads

    @property
    def in_thread(self) -> bool:
        """The model runs for a thread; false while it is called from outside, as boot and Python code do."""
        return self.activation is not None

    def current(self) -> KernelThread:
        """The thread of the CPU that runs the model. Raises AssertionError before there is one."""
        thread = self.running[self.cpus.current]
        assert thread is not None, f"CPU {self.cpus.current} has no thread yet"
        return thread

    def start(self, thread: KernelThread) -> None:
        """Make a new or woken thread runnable on its CPU (Linux: ttwu_queue)."""
        thread.state = ThreadState.RUNNABLE
        self.queues[thread.cpu].append(thread)
        self.need_resched[thread.cpu] = True
        if thread.cpu != self.cpus.current:
            running = self.running[thread.cpu]
            if running is not None and running is self.idle[thread.cpu]:
                self.send_ipi(thread.cpu, RESCHEDULE_VECTOR)

    def wake(self, thread: KernelThread) -> bool:
        """Make a sleeping thread runnable; false if it does not sleep (Linux: try_to_wake_up)."""
        if thread.state is not ThreadState.BLOCKED:
            return False
        self.start(thread)
        return True

    def block(self) -> None:
        """The current thread sleeps until somebody wakes it. What it waits for must be tested in a loop."""
        self.current().state = ThreadState.BLOCKED
        self.schedule()

    def sleep_until(self, condition: Callable[[], bool]) -> None:
        """Sleep until `condition` holds; whoever makes it true must wake the thread."""
        while not condition():
            if self.activation is None:
                self.run_others(condition)
                return
            self.block()

    def yield_cpu(self) -> None:
        """Let another thread of this CPU run, if one is runnable (Linux: cond_resched)."""
        if self.queues[self.cpus.current] and self.activation is not None:
            self.schedule()

    def schedule(self) -> None:
        """Give the CPU to the next runnable thread; returns when the current thread is chosen again (Linux: __schedule)."""
        number = self.cpus.current
        activation = self.activation
        previous = self.current()
        self.schedule_debug(previous)
        following = self._pick(number, previous)
        if following is previous:
            return
        assert activation is not None, f"{previous.comm} sleeps outside of the model"
        activation.park = Park.SWITCHED
        previous.context = self.cpu(number).save_context()
        self._switch(number, previous, following)
        self._wait()

    def exit_current(self) -> None:
        """The current thread is dead: its CPU goes on with another one as soon as the activation ends."""
        number = self.cpus.current
        previous = self.current()
        previous.state = ThreadState.DEAD
        self._switch(number, previous, self._pick(number, previous))

    def leave_idle(self, number: int) -> None:
        """A CPU in its idle loop takes the next runnable thread."""
        idle = self.idle[number]
        self.cpus.current = number
        self.idling[number] = False
        idle.context = self.cpu(number).save_context()
        self._switch(number, idle, self._pick(number, idle))

    def _pick(self, number: int, previous: KernelThread) -> KernelThread:
        queue = self.queues[number]
        self.need_resched[number] = False
        runs_on = previous.state is ThreadState.RUNNABLE
        if not queue:
            return previous if runs_on else self.idle[number]
        if runs_on and previous is not self.idle[number]:
            queue.append(previous)
        return queue.popleft()

    def _switch(self, number: int, previous: KernelThread, following: KernelThread) -> None:
        self.running[number] = following
        self.switches += 1
        assert following.context is not None, f"{following.comm} has nowhere to go on"
        self.cpu(number).load_context(following.context)
        following.context = None
        self.on_switch(previous, following)

    # ---- activations, as the hub drives them

    def enter(self, number: int, la: int, body: Callable[[], object]) -> object:
        """A CPU has stopped at a stub: run `body` for it. Its result, or None when it waits. Raises what `body` raises."""
        thread = self.running[number]
        assert thread is not None, f"CPU {number} has no thread yet"
        activation = Activation(thread, la, body)
        thread.activations.append(activation)
        return self._go(number, activation)

    def resume(self, number: int) -> object:
        """Go on with the innermost activation of a CPU's thread. Results as `enter`."""
        thread = self.running[number]
        assert thread is not None and thread.activations, f"CPU {number} has nothing that waits"
        self.spinning[number] = False
        return self._go(number, thread.activations[-1])

    def innermost(self, number: int) -> Activation | None:
        """The innermost activation of a CPU's thread."""
        thread = self.running[number]
        return thread.activations[-1] if thread is not None and thread.activations else None

    def _go(self, number: int, activation: Activation) -> object:
        self.cpus.current = number
        self.activation = activation
        activation.park = Park.RUNS
        self.hub = getcurrent()
        activation.greenlet.parent = self.hub
        try:
            return activation.greenlet.switch()
        finally:
            self.activation = None
            if activation.greenlet.dead:
                assert activation.thread.activations[-1] is activation, "the innermost activation ends first"
                activation.thread.activations.pop()

    def _wait(self) -> None:
        self.hub.switch(None)

    # ---- waiting

    def spin_until(self, condition: Callable[[], bool], site: str = SPIN_SITE) -> None:
        """Keep the CPU busy until `condition` holds: it takes interrupts if it may, and the other CPUs run meanwhile.

        `site` is the kernel function whose loop the CPU stands in.
        """
        if condition():
            return
        activation = self.activation
        if activation is None:
            self.run_others(condition)
            return
        number = self.cpus.current
        cpu = self.cpu(number)
        rip = cpu.reg("rip")
        assert self.text is not None, "kernel text is placed at boot"
        cpu.set_reg("rip", self.text.spin_site(site))
        activation.park = Park.SPINS
        activation.condition = condition
        self.spinning[number] = True
        self._wait()
        cpu.set_reg("rip", rip)

    def call_guest(self, function: int, *arguments: int, site: str = "process_one_work", stack: int | None = None) -> int:
        """Call guest code and return its RAX. All other registers are as before.

        `site` is the kernel function that calls; `stack` the RSP to call on, that of now without it. Raises PageFault where the
        return address cannot be pushed, ValueError for more than six arguments, AssertionError outside of an activation.
        """
        if len(arguments) > len(_ARGUMENTS):
            raise ValueError(f"{len(arguments)} arguments; only {len(_ARGUMENTS)} come in registers")
        activation = self.activation
        assert activation is not None, "guest code is called from inside the kernel only"
        assert self.text is not None, "kernel text is placed at boot"
        cpu = self.cpu(self.cpus.current)
        saved = cpu.save_context()
        rsp = ((stack if stack is not None else cpu.reg("rsp")) & -16) - 8 & _MASK64
        cpu.write(rsp, self.text.call_site(site).to_bytes(8, "little"))
        for name, value in zip(_ARGUMENTS, arguments, strict=False):
            cpu.set_reg(name, value & _MASK64)
        cpu.set_reg("rsp", rsp)
        cpu.set_reg("rip", function)
        activation.park = Park.CALLS
        self._wait()
        result = cpu.reg("rax")
        cpu.load_context(saved)
        return result

    # ---- time

    def time(self) -> int:
        """Machine time in nanoseconds: an instruction of any CPU takes one; it jumps when nobody has anything else to do.

        Raises NeedsClock when instructions are not counted.
        """
        executed = self.clock()
        if executed is None:
            raise NeedsClock
        return executed + self.skipped

    def call_at(self, time: int, function: Callable[[], None], cpu: int) -> Timer:
        """Call `function` in hard interrupt context of a CPU as soon as time() is `time`. Raises NeedsClock."""
        self.time()
        self._timer_number += 1
        timer = Timer(time, self._timer_number, cpu, function)
        heapq.heappush(self.timers[cpu], timer)
        return timer

    def cancel(self, timer: Timer) -> bool:
        """Forget a timer; false if it has run or was cancelled before."""
        pending = timer.function is not None
        timer.function = None
        return pending

    def next_timer(self) -> Timer | None:
        """The timer that is due first."""
        first: Timer | None = None
        for queue in self.timers:
            while queue and queue[0].function is None:
                heapq.heappop(queue)
            if queue and (first is None or queue[0] < first):
                first = queue[0]
        return first

    def run_timers(self, number: int) -> None:
        """The timer interrupt of a CPU: call what is due."""
        queue = self.timers[number]
        while queue and (queue[0].function is None or queue[0].time <= self.time()):
            function = heapq.heappop(queue)
            call, function.function = function.function, None
            if call is not None:
                call()

    def advance(self, time: int) -> None:
        """Nobody has anything to do before `time`."""
        self.skipped += max(0, time - self.time())


def _nobody_runs(condition: Callable[[], bool]) -> None:
    raise AssertionError("the kernel waits for another CPU, and no machine runs them")
