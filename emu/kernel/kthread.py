"""Kernel threads that modules start (v6.12 kernel/kthread.c).

A thread is made asleep and begins at its first wake_up_process(). When its function returns, its task_struct goes back after a
grace period: kthread_stop() on a thread that may have ended by itself is the use after free that it is on Linux.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from emu.kernel.execution import MASK64, Execution
from emu.kernel.task import KernelThread, ThreadState, comm_of
from emu.kernel.task_struct import FLAGS, PF_KTHREAD, TASK_PARKED, TASK_UNINTERRUPTIBLE, Task

NUMA_NO_NODE = -1
_EINTR = -errno.EINTR & MASK64
_ENOSYS = -errno.ENOSYS & MASK64


@dataclass(slots=True, eq=False)
class Kthread:
    """struct kthread: a thread with its function and what others asked of it. `references` keep the task_struct."""

    task: Task
    function: int
    data: int
    bound: bool = False
    started: bool = False
    should_stop: bool = False
    should_park: bool = False
    parked: bool = False
    exited: bool = False
    result: int = 0
    references: int = 0
    waiters: list[KernelThread] = field(default_factory=list)


class Kthreads:
    """The kernel threads of one kernel. `call_rcu` runs a function after a grace period."""

    def __init__(self, execution: Execution, call_rcu: Callable[[Callable[[], None]], None]) -> None:
        self.execution = execution
        self.call_rcu = call_rcu
        self._by_task: dict[Task, Kthread] = {}

    # ---- making

    def create(self, function: int, data: int, name: str, *, node: int = NUMA_NO_NODE, cpu: int | None = None) -> int:
        """kthread_create_on_node(): the task_struct of a new thread that sleeps; -ENOMEM. `cpu` binds it."""
        execution = self.execution
        where = self.select_cpu() if cpu is None else cpu
        try:
            thread = execution.host.create_thread(comm_of(name), where, node, function=function, argument=data, runs=False)
        except MemoryError:
            return -errno.ENOMEM & MASK64
        thread.state = ThreadState.BLOCKED
        task = execution.tasks.of(thread)
        execution.tasks.set_state(thread, TASK_UNINTERRUPTIBLE)
        kthread = Kthread(task, function, data)
        self._by_task[task] = kthread
        if cpu is not None:
            self._bind(kthread, frozenset((cpu,)))
        thread.waiting_for = "wake_up_process, not started yet"
        thread.on_exit = lambda result: self._exit(kthread, result)
        return task.address

    def select_cpu(self) -> int:
        """The online CPU with the fewest of these threads to run; of several the first behind this one."""
        host = self.execution.host
        online, here = host.cpus.online, host.cpus.current
        load = [0] * online
        for kthread in self._by_task.values():
            thread = kthread.task.thread
            if not kthread.started or thread.state is ThreadState.RUNNABLE:
                load[thread.cpu] += 1
        load[here] += 1
        return min(range(online), key=lambda cpu: (load[cpu], (cpu - here) % online))

    def find(self, address: int) -> Kthread | None:
        """The thread whose task_struct stands at an address."""
        task = self.execution.tasks.find(address)
        return None if task is None else self._by_task.get(task)

    def current(self) -> Kthread | None:
        """The current thread, None for one that was not made here."""
        return self._by_task.get(self.execution.tasks.current())

    def _to_kthread(self, address: int) -> Kthread | None:
        """to_kthread(): reads task->flags, then follows worker_private, which is NULL in memory that is no thread's.

        Raises PageFault for either; None only where address 0 is mapped.
        """
        found = self.find(address)
        if found is None:
            self.execution.load32(address + FLAGS)
            self.execution.load64(0)
        return found

    # ---- where it runs

    def _bind(self, kthread: Kthread, cpus: frozenset[int]) -> None:
        kthread.bound = True
        kthread.task.allowed = cpus
        if kthread.task.thread.cpu not in cpus and not kthread.started:
            kthread.task.thread.cpu = min(cpus)

    def bind(self, address: int, cpu: int) -> None:
        """kthread_bind(), for a thread that has not run. A number that is no CPU's leaves the thread where it is."""
        kthread = self._to_kthread(address)
        if kthread is not None and cpu < self.execution.host.cpus.online:
            self._bind(kthread, frozenset((cpu,)))

    def set_cpus_allowed(self, address: int, cpus: Iterable[int]) -> int:
        """set_cpus_allowed_ptr(): 0, -EINVAL without an online CPU. A thread that sleeps moves when it wakes."""
        execution = self.execution
        task = execution.tasks.find(address)
        allowed = frozenset(cpu for cpu in cpus if cpu < execution.host.cpus.online)
        if task is None:
            execution.load32(address + FLAGS)
            return -errno.EINVAL
        if not allowed:
            return -errno.EINVAL
        task.allowed = allowed
        kthread = self._by_task.get(task)
        if kthread is not None and not kthread.started and task.thread.cpu not in allowed:
            task.thread.cpu = min(allowed)
        if task.thread is execution.current() and task.thread.cpu not in allowed:
            self._migrate(task)
        return 0

    def _migrate(self, task: Task) -> None:
        """Go on on another CPU (Linux's migration thread): wake up there, out of an interrupt that finds this thread asleep."""
        execution = self.execution
        thread = task.thread
        target = min(task.allowed)

        def move() -> None:
            thread.cpu = target
            execution.waiting.wake(thread)

        execution.run_on(thread.cpu, move)
        while thread.cpu != target:
            execution.block(f"migration to CPU {target}")

    # ---- running and stopping

    def wake_up_process(self, address: int) -> bool:
        """wake_up_process(): false when the task was not asleep."""
        execution = self.execution
        task = execution.tasks.find(address)
        if task is None:
            execution.load32(address + FLAGS)
            return False
        kthread = self._by_task.get(task)
        if kthread is not None and not kthread.started:
            kthread.started = True
            kthread.task.thread.waiting_for = ""
        return execution.tasks.try_to_wake_up(task.thread)

    def _wake(self, kthread: Kthread) -> None:
        self.wake_up_process(kthread.task.address)

    def should_stop(self) -> bool:
        """kthread_should_stop()."""
        kthread = self.current()
        return kthread is not None and kthread.should_stop

    def should_park(self) -> bool:
        """kthread_should_park()."""
        kthread = self.current()
        return kthread is not None and kthread.should_park

    def stop(self, address: int) -> int:
        """kthread_stop(): what the thread's function returned, as 32 bits; -EINTR when it never ran.

        Raises PageFault for a pointer that is no thread's.
        """
        kthread = self._to_kthread(address)
        if kthread is None:
            return _EINTR
        kthread.references += 1
        kthread.should_stop = True
        self._unpark(kthread)
        if not kthread.started:
            self._exit(kthread, _EINTR)
            kthread.task.thread.state = ThreadState.DEAD
            self.execution.host.exit_thread(kthread.task.thread)
        else:
            self._wake(kthread)
        result = self._join(kthread)
        self.put(kthread)
        return result

    def join(self, address: int) -> int:
        """Wait for a thread to return, without asking it to stop: its result; -ESRCH for no thread."""
        kthread = self.find(address)
        if kthread is None:
            return -errno.ESRCH & MASK64
        result = self._join(kthread)
        self.put(kthread)
        return result

    def _join(self, kthread: Kthread) -> int:
        thread = self.execution.current()
        kthread.waiters.append(thread)
        other = kthread.task.thread
        try:
            self.execution.sleep_until(lambda: kthread.exited, f"exit of {other.comm}/{other.pid}")
        finally:
            kthread.waiters.remove(thread)
        return kthread.result

    def _exit(self, kthread: Kthread, result: int) -> None:
        kthread.exited = True
        kthread.result = result
        self._tell(kthread)
        if not kthread.references:
            self._free(kthread)

    def _tell(self, kthread: Kthread) -> None:
        for waiter in kthread.waiters:
            self.execution.tasks.wake(waiter)

    def get(self, kthread: Kthread) -> None:
        """get_task_struct()."""
        kthread.references += 1

    def put(self, kthread: Kthread) -> None:
        """put_task_struct()."""
        kthread.references -= 1
        if kthread.exited and not kthread.references:
            self._free(kthread)

    def _free(self, kthread: Kthread) -> None:
        del self._by_task[kthread.task]
        self.call_rcu(lambda: self.execution.tasks.remove(kthread.task))

    def exit(self, result: int) -> None:
        """kthread_exit(): the function that called does not go on; the thread ends as if its function had returned `result`."""
        cpu = self.execution.host.cpu
        cpu.write(cpu.reg("rsp"), self.execution.host.text.kthread_exit.to_bytes(8, "little"))
        cpu.set_reg("rax", result & MASK64)

    # ---- parking

    def park(self, address: int) -> int:
        """kthread_park(): 0 once the thread has parked itself, -ENOSYS when it has ended, -EBUSY when it is parked already."""
        kthread = self._to_kthread(address)
        if kthread is None or kthread.exited:
            return _ENOSYS
        if kthread.should_park:
            return -errno.EBUSY & MASK64
        kthread.should_park = True
        if kthread.task.thread is self.execution.current():
            return 0
        self._wake(kthread)
        thread, other = self.execution.current(), kthread.task.thread
        kthread.waiters.append(thread)
        try:
            self.execution.sleep_until(lambda: kthread.parked or kthread.exited, f"parking of {other.comm}/{other.pid}")
        finally:
            kthread.waiters.remove(thread)
        return _ENOSYS if kthread.exited else 0

    def unpark(self, address: int) -> None:
        """kthread_unpark()."""
        kthread = self._to_kthread(address)
        if kthread is not None:
            self._unpark(kthread)

    def _unpark(self, kthread: Kthread) -> None:
        kthread.should_park = False
        if kthread.parked:
            self.execution.tasks.wake(kthread.task.thread)

    def parkme(self) -> None:
        """kthread_parkme(): sleep while somebody wants this thread parked."""
        kthread = self.current()
        if kthread is None:
            return
        try:
            while kthread.should_park:
                kthread.parked = True
                self._tell(kthread)
                self.execution.block("kthread_unpark", TASK_PARKED)
        finally:
            kthread.parked = False

    def validate(self) -> None:
        """Every thread here has a task whose task_struct says it is a kernel thread's, and who has exited is kept by somebody."""
        for task, kthread in self._by_task.items():
            assert self.execution.tasks.find(task.address) is task, "a thread's task_struct is not given back while it is known"
            assert self.execution.load32(task.address + FLAGS) & PF_KTHREAD, "a kernel thread's task has PF_KTHREAD"
            assert not kthread.exited or kthread.references, "an ended thread is kept by a reference"
