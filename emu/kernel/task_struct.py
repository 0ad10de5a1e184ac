"""struct task_struct in guest memory: the pointer that names a task to modules, its __state, and who is `current`.

Only the first fields have a place: thread_info, __state, stack, usage, flags (v6.12 include/linux/sched.h,
arch/x86/include/asm/thread_info.h; before v5.16 x86's thread_info had no `cpu`). The object comes from kmalloc.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.task import KernelThread
from emu.kernel.waiting import Host, Waiting

TASK_RUNNING = 0
TASK_INTERRUPTIBLE = 1
TASK_UNINTERRUPTIBLE = 2
TASK_DEAD = 0x80
TASK_WAKEKILL = 0x100
TASK_NORMAL = TASK_INTERRUPTIBLE | TASK_UNINTERRUPTIBLE
TASK_KILLABLE = TASK_WAKEKILL | TASK_UNINTERRUPTIBLE
TASK_NOLOAD = 0x400
TASK_IDLE = TASK_UNINTERRUPTIBLE | TASK_NOLOAD
TASK_PARKED = 0x40
PF_KTHREAD = 0x0020_0000

CPU, STATE, STACK, USAGE, FLAGS = 20, 24, 32, 40, 44
TASK_STRUCT_SIZE = 4096
_GFP = int(GFP_KERNEL | Gfp.ZERO)


@dataclass(slots=True, eq=False)
class Task:
    """A thread with its task_struct at `address`; `allowed` are the CPUs it may run on."""

    thread: KernelThread
    address: int
    allowed: frozenset[int]
    rcu_read_lock_nesting: int = 0
    holds: list[str] = field(default_factory=list)
    owns_memory: bool = True


class Tasks:
    """The tasks of one kernel by thread and by address."""

    def __init__(self, host: Host, waiting: Waiting) -> None:
        self.host = host
        self.waiting = waiting
        self._tasks: dict[KernelThread, Task] = {}
        self._by_address: dict[int, Task] = {}

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def add(self, thread: KernelThread) -> Task:
        """Give a thread its task_struct. Where memory is short it stands at the bottom of the stack, as before v4.9."""
        la = self.host.slab.kmalloc(TASK_STRUCT_SIZE, _GFP)
        task = Task(thread, la or thread.stack, frozenset(range(self.host.cpus.online)), owns_memory=bool(la))
        self._tasks[thread] = task
        self._by_address[task.address] = task
        self._store32(task.address + CPU, thread.cpu)
        self._store32(task.address + STACK, thread.stack & 0xFFFF_FFFF)
        self._store32(task.address + STACK + 4, thread.stack >> 32)
        self._store32(task.address + USAGE, 2)
        self._store32(task.address + FLAGS, PF_KTHREAD)
        return task

    def of(self, thread: KernelThread) -> Task:
        """A thread's task."""
        task = self._tasks.get(thread)
        return task if task is not None else self.add(thread)

    def known(self, thread: KernelThread) -> Task | None:
        """A thread's task, None for one that has no task_struct yet."""
        return self._tasks.get(thread)

    def current(self) -> Task:
        """The current task."""
        return self.of(self.waiting.current())

    def find(self, address: int) -> Task | None:
        """The task whose task_struct stands at an address."""
        return self._by_address.get(address)

    def remove(self, task: Task) -> None:
        """Give a dead thread's task_struct back."""
        del self._tasks[task.thread]
        del self._by_address[task.address]
        if task.owns_memory:
            self.host.slab.kfree(task.address)

    # ---- __state, by physical address: the object is always there

    def _pa(self, la: int) -> int:
        """The page-fault-free way: kmalloc memory lies in the direct map, a stack behind init_mm's tables."""
        layout = self.host.layout
        return layout.pa(la)

    def _store32(self, la: int, value: int) -> None:
        if self.host.layout.is_vmalloc_addr(la):
            self.host.cpu.write(la, value.to_bytes(4, "little"))
        else:
            self.host.memory.write(self._pa(la), value.to_bytes(4, "little"))

    def state(self, thread: KernelThread) -> int:
        """task->__state."""
        la = self.of(thread).address + STATE
        if self.host.layout.is_vmalloc_addr(la):
            return int.from_bytes(self.host.cpu.read(la, 4), "little")
        return int.from_bytes(self.host.memory.read(self._pa(la), 4), "little")

    def set_state(self, thread: KernelThread, state: int) -> None:
        """Set task->__state."""
        self._store32(self.of(thread).address + STATE, state)

    # ---- scheduling

    def try_to_wake_up(self, thread: KernelThread, mode: int = TASK_NORMAL) -> bool:
        """Make a task run whose __state is one of `mode`; false if it is not (v6.12 kernel/sched/core.c).

        A task that has set its state and not called schedule() yet will not sleep.
        """
        if not self.state(thread) & mode:
            return False
        self.wake(thread)
        return True

    def wake(self, thread: KernelThread) -> bool:
        """Wake a thread that sleeps, on a CPU that it may run on."""
        task = self.of(thread)
        if thread.cpu not in task.allowed and thread is not self.waiting.current():
            thread.cpu = min(task.allowed)
            self._store32(task.address + CPU, thread.cpu)
        self.set_state(thread, TASK_RUNNING)
        return self.waiting.wake(thread)
