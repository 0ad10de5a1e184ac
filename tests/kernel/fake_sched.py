"""A scheduler, CPUs and memory without a machine: guest code is Python that calls the model, one greenlet for each activation.

Linear address BASE + n is byte n of memory; everything else faults. Time counts switches, and jumps when nobody can go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

from greenlet import getcurrent, greenlet

from emu.kernel.preempt import PreemptCount
from emu.kernel.task import KernelThread, ThreadState
from emu.memory import Memory
from emu.mmu.fault import PageFault

BASE = 0xFFFF_8880_0000_0000
SIZE = 4 << 20
IF = 1 << 9
TIMER = 0xEC


class Deadlock(Exception):
    """Nobody can go on: what each thread waits for."""


class FakeCpu:
    def __init__(self, number: int, memory: Memory) -> None:
        self.id = number
        self.memory = memory
        self.registers = {"rflags": 0x202, "rsp": BASE + SIZE - 64}

    def reg(self, name: str) -> int:
        return self.registers.get(name, 0)

    def set_reg(self, name: str, value: int) -> None:
        self.registers[name] = value

    def _pa(self, la: int, size: int, error: int) -> int:
        if not BASE <= la <= BASE + SIZE - size:
            raise PageFault(la, error, 0, 0)
        return la - BASE

    def read(self, la: int, size: int) -> bytes:
        return self.memory.read(self._pa(la, size, 0), size)

    def write(self, la: int, data: bytes) -> None:
        self.memory.write(self._pa(la, len(data), 2), data)


@dataclass(eq=False)
class Act:
    greenlet: greenlet
    condition: Callable[[], bool] | None = None


@dataclass(eq=False)
class FakeKernel:
    """The kernel (Host) and its scheduler (Waiting)."""

    nr_cpus: int = 2
    guest: dict[int, Callable[..., int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = Memory(SIZE)
        self.layout = SimpleNamespace(pa=lambda la: la - BASE, is_vmalloc_addr=lambda la: False)
        self._next = 0x40000
        self.freed: list[int] = []
        self.slab = SimpleNamespace(kmalloc=lambda size, gfp: self.room(size), kfree=self.freed.append)
        self.cpus = SimpleNamespace(current=0, online=self.nr_cpus)
        self.text = SimpleNamespace(kthread_exit=BASE + 0x10)
        self.all_cpus = [FakeCpu(n, self.memory) for n in range(self.nr_cpus)]
        self.counts = [PreemptCount() for _ in range(self.nr_cpus)]
        self.lines: list[str] = []
        self.queues: list[deque[KernelThread]] = [deque() for _ in range(self.nr_cpus)]
        self.idle = [KernelThread(0, f"swapper/{n}", 0, n) for n in range(self.nr_cpus)]
        self.running = list(self.idle)
        self.threads: list[KernelThread] = []
        self.vectors: list[deque[int]] = [deque() for _ in range(self.nr_cpus)]
        self.on_irq: dict[int, Callable[[], None]] = {TIMER: self._run_timers}
        self.irq_exit: Callable[[], None] = lambda: None
        self.on_switch: Callable[[int, KernelThread], None] = lambda cpu, previous: None
        self.now = 0
        self._timers: list[list[object]] = []
        self.acts: dict[KernelThread, list[Act]] = {thread: [] for thread in self.idle}
        self._next_pid = 100

    def room(self, size: int) -> int:
        la = BASE + self._next
        self._next += size + 63 & -64
        return la

    # ---- Host

    @property
    def cpu(self) -> FakeCpu:
        return self.all_cpus[self.cpus.current]

    def preempt(self, cpu: int) -> PreemptCount:
        return self.counts[cpu]

    def send_ipi(self, cpu: int, vector: int) -> None:
        self.vectors[cpu].append(vector)

    def print_lines(self, lines) -> None:
        self.lines += lines

    def create_thread(self, comm, cpu=0, node=-1, *, function=0, argument=0, runs=False) -> KernelThread:
        thread = KernelThread(self._next_pid, comm, 0, cpu)
        self._next_pid += 1

        def body() -> None:
            result = self.guest[function](argument)
            if thread.on_exit is not None:
                thread.on_exit(result or 0)

        self.acts[thread] = [Act(greenlet(body))]
        self.threads.append(thread)
        return thread

    def exit_thread(self, thread: KernelThread) -> None:
        self.acts[thread] = []

    # ---- tests

    def function(self, body: Callable[..., int | None]) -> int:
        """An address at which guest code `body` stands."""
        address = 0xFFFF_FFFF_C000_0000 + 16 * len(self.guest)
        self.guest[address] = body
        return address

    def start(self, body: Callable[[], object], cpu: int = 0, comm: str = "guest") -> KernelThread:
        """A thread that runs `body`, runnable at once."""
        address = self.function(lambda argument: body() and 0)
        thread = self.create_thread(comm, cpu, function=address)
        self.queues[cpu].append(thread)
        return thread

    def pause(self) -> None:
        """Guest code executes something: interrupts are taken and the other CPUs run."""
        self._leave(None)

    # ---- Waiting

    def current(self) -> KernelThread:
        return self.running[self.cpus.current]

    def _leave(self, condition: Callable[[], bool] | None) -> None:
        self.acts[self.current()][-1].condition = condition
        self.hub.switch()

    def spin_until(self, condition: Callable[[], bool], site: str = "") -> None:
        if not condition():
            self._leave(condition)

    def block(self) -> None:
        self.current().state = ThreadState.BLOCKED
        self._switch()

    def yield_cpu(self) -> None:
        if self.queues[self.cpus.current]:
            self.queues[self.cpus.current].append(self.current())
            self._switch()

    def _switch(self) -> None:
        cpu, thread = self.cpus.current, self.current()
        thread.context = dict(self.cpu.registers)
        self.running[cpu] = self.idle[cpu]
        self.cpu.registers["rflags"] = 0x202
        self.on_switch(cpu, thread)
        self.hub.switch()

    def wake(self, thread: KernelThread) -> bool:
        if thread.state is not ThreadState.BLOCKED:
            return False
        thread.state = ThreadState.RUNNABLE
        self.queues[thread.cpu].append(thread)
        return True

    def call_guest(self, function: int, *arguments: int, site: str = "") -> int:
        if function not in self.guest:
            raise PageFault(function, 0x10, 0, 0)
        return self.guest[function](*arguments) or 0

    def time(self) -> int:
        return self.now

    def call_at(self, time: int, function: Callable[[], None], cpu: int) -> object:
        timer = [time, len(self._timers), cpu, function]
        self._timers.append(timer)
        return timer

    def cancel(self, timer: object) -> bool:
        pending = timer[3] is not None
        timer[3] = None
        return pending

    def _run_timers(self) -> None:
        cpu = self.cpus.current
        due = [timer for timer in self._timers if timer[3] is not None and timer[0] <= self.now and timer[2] == cpu]
        for timer in sorted(due, key=lambda timer: timer[:2]):
            function, timer[3] = timer[3], None
            function()

    # ---- the hub

    def run(self, limit: int = 20000) -> None:
        """Until every thread is dead or asleep for good. Raises Deadlock, AssertionError after `limit` rounds."""
        self.hub = getcurrent()
        for _ in range(limit):
            went_on = [self._step(cpu) for cpu in range(self.nr_cpus)]
            if not any(went_on) and not self._jump():
                stuck = [thread for thread in self.threads if self.acts[thread] and thread.waiting_for != "work"]
                if stuck:
                    raise Deadlock({thread.comm: thread.waiting_for for thread in stuck})
                return
        raise AssertionError("no end")

    def _jump(self) -> bool:
        times = [timer[0] for timer in self._timers if timer[3] is not None]
        if not times:
            return False
        self.now = max(self.now + 1, min(times))
        return True

    def _step(self, cpu: int) -> bool:
        self.cpus.current = cpu
        due = any(timer[3] is not None and timer[0] <= self.now and timer[2] == cpu for timer in self._timers)
        if due and TIMER not in self.vectors[cpu]:
            self.vectors[cpu].append(TIMER)
        if self.vectors[cpu] and self.cpu.reg("rflags") & IF:
            self._interrupt(self.vectors[cpu].popleft())
            return True
        if not self.acts[self.running[cpu]] and self.queues[cpu]:
            thread = self.running[cpu] = self.queues[cpu].popleft()
            if thread.context is not None:
                self.cpu.registers = thread.context
        acts = self.acts[self.running[cpu]]
        if not acts or (acts[-1].condition is not None and not acts[-1].condition()):
            return False
        acts[-1].condition = None
        self._go(cpu, self.running[cpu], acts[-1])
        return True

    def _go(self, cpu: int, thread: KernelThread, act: Act) -> None:
        self.now += 1
        act.greenlet.parent = getcurrent()
        act.greenlet.switch()
        if act.greenlet.dead:
            self.acts[thread].remove(act)
            if not self.acts[thread] and thread is not self.idle[cpu]:
                thread.state = ThreadState.DEAD
                self.running[cpu] = self.idle[cpu]
                self.on_switch(cpu, thread)

    def _interrupt(self, vector: int) -> None:
        cpu, count = self.cpu, self.counts[self.cpus.current]

        def body() -> None:
            flags = cpu.reg("rflags")
            cpu.set_reg("rflags", flags & ~IF)
            count.hardirq += 1
            self.on_irq[vector]()
            count.hardirq -= 1
            self.irq_exit()
            cpu.set_reg("rflags", flags)

        thread = self.current()
        act = Act(greenlet(body))
        self.acts[thread].append(act)
        self._go(cpu.id, thread, act)
