"""Where the model's code runs: its CPU's flags and preempt_count, guest memory as that CPU sees it, and sleeping.

State that guests can see stands in guest memory, in Linux's structures; a pointer that leads nowhere faults at the access, as on
Linux. Who waits, and in which order, is the model's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emu.kernel.preempt import PREEMPT_OFFSET, PreemptCount
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_RUNNING, TASK_UNINTERRUPTIBLE, Tasks
from emu.kernel.waiting import Host, Waiting
from emu.mmu.fault import NonCanonical, PageFault

IRQ_WORK_VECTOR = 0xF6
X86_EFLAGS_IF = 1 << 9
IDLE = "work"
"""What a thread of the kernel's own waits for when it has nothing to do: no deadlock."""
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


class Execution:
    """The current CPU and thread of one kernel."""

    def __init__(self, host: Host, waiting: Waiting) -> None:
        self.host = host
        self.waiting = waiting
        self.tasks = Tasks(host, waiting)
        # Told when a thread goes to sleep here, and when it goes on.
        self.on_sleep: Callable[[KernelThread], None] = lambda thread: None
        self.on_running: Callable[[KernelThread], None] = lambda thread: None
        self._to_run: dict[int, deque[Callable[[], None]]] = {}

    # ---- the CPU

    @property
    def cpu_id(self) -> int:
        """smp_processor_id()."""
        return self.host.cpus.current

    @property
    def preempt(self) -> PreemptCount:
        """preempt_count of this CPU."""
        return self.host.preempt(self.host.cpus.current)

    @contextmanager
    def process_context(self) -> Iterator[None]:
        """Make something that Linux made in process context at boot, and that is made here when it is first needed."""
        count = self.preempt
        before, count.count = count.count, 0
        try:
            yield
        finally:
            count.count = before

    def preempt_disable(self) -> None:
        """preempt_disable()."""
        self.preempt.add(PREEMPT_OFFSET)

    def preempt_enable(self) -> None:
        """preempt_enable(); with voluntary preemption nothing is scheduled here."""
        self.preempt.add(-PREEMPT_OFFSET)

    @property
    def irqs_disabled(self) -> bool:
        """RFLAGS.IF of this CPU is clear."""
        return not self.host.cpu.reg("rflags") & X86_EFLAGS_IF

    def local_irq_save(self) -> int:
        """Disable interrupts; the RFLAGS of before."""
        cpu = self.host.cpu
        flags = cpu.reg("rflags")
        if flags & X86_EFLAGS_IF:
            cpu.set_reg("rflags", flags & ~X86_EFLAGS_IF)
        return flags

    def local_irq_enable(self) -> None:
        """Enable interrupts."""
        cpu = self.host.cpu
        cpu.set_reg("rflags", cpu.reg("rflags") | X86_EFLAGS_IF)

    def local_irq_restore(self, flags: int) -> None:
        """Enable interrupts if `flags` has IF (v6.12 arch/x86/include/asm/irqflags.h: arch_local_irq_restore)."""
        if flags & X86_EFLAGS_IF:
            self.local_irq_enable()

    def run_on(self, cpu: int, function: Callable[[], None]) -> None:
        """Call `function` in hard interrupt context of a CPU, this one included, as soon as that takes interrupts (irq_work)."""
        queue = self._to_run.setdefault(cpu, deque())
        queue.append(function)
        if len(queue) == 1:
            self.host.send_ipi(cpu, IRQ_WORK_VECTOR)

    def run_irq_work(self) -> None:
        """The interrupt of IRQ_WORK_VECTOR on this CPU: call what waits for it."""
        for function in self._to_run.pop(self.cpu_id, ()):
            function()

    # ---- guest memory: PageFault and NonCanonical come through

    def load8(self, la: int) -> int:
        """The byte at a linear address."""
        return self.host.cpu.read(la & MASK64, 1)[0]

    def load32(self, la: int) -> int:
        """The u32 at a linear address."""
        return int.from_bytes(self.host.cpu.read(la & MASK64, 4), "little")

    def load64(self, la: int) -> int:
        """The u64 at a linear address."""
        return int.from_bytes(self.host.cpu.read(la & MASK64, 8), "little")

    def store8(self, la: int, value: int) -> None:
        """Write a byte."""
        self.host.cpu.write(la & MASK64, bytes((value & 0xFF,)))

    def store32(self, la: int, value: int) -> None:
        """Write a u32."""
        self.host.cpu.write(la & MASK64, (value & MASK32).to_bytes(4, "little"))

    def store64(self, la: int, value: int) -> None:
        """Write a u64."""
        self.host.cpu.write(la & MASK64, (value & MASK64).to_bytes(8, "little"))

    def list_init(self, head: int) -> None:
        """INIT_LIST_HEAD."""
        self.store64(head, head)
        self.store64(head + 8, head)

    def list_add_between(self, entry: int, previous: int, following: int) -> None:
        """__list_add."""
        self.store64(following + 8, entry)
        self.store64(entry, following)
        self.store64(entry + 8, previous)
        self.store64(previous, entry)

    def list_del(self, entry: int) -> None:
        """__list_del_entry: the entry itself stays as it is."""
        following, previous = self.load64(entry), self.load64(entry + 8)
        self.store64(following + 8, previous)
        self.store64(previous, following)

    # ---- waiting

    def current(self) -> KernelThread:
        """The current thread."""
        return self.waiting.current()

    def schedule(self) -> None:
        """schedule(): sleep if the thread's __state says so, else let others run first. It goes on as TASK_RUNNING."""
        thread = self.current()
        tasks = self.tasks
        if tasks.state(thread) == TASK_RUNNING:
            self.waiting.yield_cpu()
            return
        thread.waiting_for = thread.waiting_for or f"wake_up_process, task 0x{tasks.of(thread).address:x}"
        try:
            self.on_sleep(thread)
            # Whoever takes over may have had to wait, and the wake-up come meanwhile.
            if tasks.state(thread) != TASK_RUNNING:
                self.waiting.block()
        finally:
            thread.waiting_for = ""
            tasks.set_state(thread, TASK_RUNNING)
        self.on_running(thread)

    def block(self, reason: str, state: int = TASK_UNINTERRUPTIBLE) -> None:
        """Sleep once; `reason` is what a report says the thread waits for."""
        thread = self.current()
        self.tasks.set_state(thread, state)
        thread.waiting_for = reason
        self.schedule()

    def sleep_until(self, condition: Callable[[], bool], reason: str, state: int = TASK_UNINTERRUPTIBLE) -> None:
        """Sleep until `condition` holds; whoever makes it hold wakes the thread."""
        while not condition():
            self.block(reason, state)

    def cpu_relax(self) -> None:
        """Let a moment pass on this CPU: the others run, and it takes interrupts if it may."""
        looks = iter((False,))
        self.waiting.spin_until(lambda: next(looks, True))

    def spin_until(self, condition: Callable[[], bool], reason: str) -> None:
        """Busy-wait until `condition` holds. A fault that it meets is the waiting thread's own."""
        faults: list[PageFault | NonCanonical] = []

        def holds() -> bool:
            try:
                return condition()
            except (PageFault, NonCanonical) as fault:
                faults.append(fault)
                return True

        thread = self.current()
        before, thread.waiting_for = thread.waiting_for, reason
        try:
            self.waiting.spin_until(holds)
        finally:
            thread.waiting_for = before
        if faults:
            raise faults[0]
