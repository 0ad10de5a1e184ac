"""What locks, timers and threads ask of the scheduler and of the kernel they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.layout import Layout
from emu.kernel.percpu import PerCpu
from emu.kernel.preempt import PreemptCount
from emu.kernel.slab import Slab
from emu.kernel.task import KernelThread
from emu.memory import Memory


class Waiting(Protocol):
    """How code of the model waits: emu/kernel/sched.py."""

    def spin_until(self, condition: Callable[[], bool], site: str = ...) -> None:
        """Keep this CPU busy until `condition` holds; it takes interrupts if RFLAGS.IF is set."""

    def block(self) -> None:
        """The current thread sleeps until it is woken. A wake before it is lost."""

    def yield_cpu(self) -> None:
        """Let the other runnable threads of this CPU run first."""

    def wake(self, thread: KernelThread) -> bool:
        """Make a sleeping thread runnable on its CPU; false if it was not asleep."""

    def call_guest(self, function: int, *arguments: int, site: str = ...) -> int:
        """Call guest code on the current stack; returns RAX."""

    def current(self) -> KernelThread:
        """The thread of the CPU that runs the model now."""

    def time(self) -> int:
        """Machine time in nanoseconds."""

    def call_at(self, time: int, function: Callable[[], None], cpu: int) -> Any:
        """Call `function` in hard interrupt context of a CPU once time() has come to `time`; a handle."""

    def cancel(self, timer: Any) -> bool:
        """Forget a call; false if it was made or forgotten before."""


class CpuNumbers(Protocol):
    """Which CPUs there are."""

    current: int
    online: int


class ThreadExit(Protocol):
    """Where kernel text ends a thread."""

    kthread_exit: int


class Host(Protocol):
    """The kernel, as far as waiting code knows it."""

    memory: Memory
    layout: Layout
    slab: Slab
    percpu: PerCpu

    @property
    def cpus(self) -> CpuNumbers:
        """Which CPUs there are, and which one runs the model."""

    @property
    def text(self) -> ThreadExit:
        """Addresses in kernel text."""

    @property
    def cpu(self) -> KernelCpu:
        """The CPU that runs the model now."""

    def preempt(self, cpu: int) -> PreemptCount:
        """preempt_count of a CPU."""

    def send_ipi(self, cpu: int, vector: int) -> None:
        """Send an interrupt to a CPU, which may be the one that asks."""

    def create_thread(
        self, comm: str, cpu: int = ..., node: int = ..., *, function: int = ..., argument: int = ..., runs: bool = ...
    ) -> KernelThread:
        """A thread that will call `function` in kernel or module text once it is woken. Raises MemoryError."""

    def exit_thread(self, thread: KernelThread) -> None:
        """A thread that is dead and off its CPU gives its stack back."""

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print lines to the log."""
