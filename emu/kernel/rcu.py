"""Read-copy-update (v6.12 kernel/rcu/tree.c, tree_plugin.h with CONFIG_PREEMPT_RCU).

A grace period ends when every CPU has passed a quiescent state since it began, and every reader that had been switched away by then
has left its section. Quiescent are: a context switch, the idle loop, user mode, and a look at a CPU that is in no read-side section
and has neither preemption nor softirqs disabled. Callbacks run as RCU_SOFTIRQ on the CPU that queued them.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.kernel.execution import Execution
from emu.kernel.preempt import PREEMPT_MASK, SOFTIRQ_MASK
from emu.kernel.softirq import Softirq, Softirqs
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import Task
from emu.kernel.timer import TICK_NSEC

NEXT, FUNC = 0, 8
# The low bits of a grace period's number say that it is under way (kernel/rcu/rcu.h RCU_SEQ_CTR_SHIFT).
_SEQ_CTR_SHIFT = 2

Callback = Callable[[], None]


class Rcu:
    """The grace periods of one kernel. `is_idle(cpu)`: a CPU is in its idle loop."""

    def __init__(self, execution: Execution, softirqs: Softirqs, is_idle: Callable[[int], bool]) -> None:
        self.execution = execution
        self.softirqs = softirqs
        self.is_idle = is_idle
        self.completed = 0
        self.active = False
        self._awaited: set[int] = set()
        # Readers that were switched away in their section: those that this grace period waits for, and all.
        self._blockers: set[Task] = set()
        self._switched_away: set[Task] = set()
        self._next: list[tuple[int, Callback]] = []
        self._waiting: list[tuple[int, Callback]] = []
        self._done: dict[int, list[Callback]] = {}
        self._ticking: set[int] = set()
        self._hurry = 0
        softirqs.actions[Softirq.RCU] = self._do_batch

    # ---- readers

    def read_lock(self) -> None:
        """__rcu_read_lock()."""
        self.execution.tasks.current().rcu_read_lock_nesting += 1

    def read_unlock(self) -> None:
        """__rcu_read_unlock()."""
        task = self.execution.tasks.current()
        task.rcu_read_lock_nesting -= 1
        if task.rcu_read_lock_nesting == 0 and task in self._switched_away:
            self._switched_away.discard(task)
            self._blockers.discard(task)
            self._check()

    # ---- quiescent states

    def note_context_switch(self, cpu: int, previous: KernelThread) -> None:
        """A CPU switches away from a thread. A reader among those is waited for from now on as a task."""
        task = self.execution.tasks.known(previous)
        if task is not None and task.rcu_read_lock_nesting > 0:
            self._switched_away.add(task)
            if cpu in self._awaited:
                self._blockers.add(task)
        self.quiescent(cpu)

    def forget(self, task: Task) -> None:
        """A task is dead, whatever section it was in."""
        self._switched_away.discard(task)
        self._blockers.discard(task)
        self._check()

    def quiescent(self, cpu: int) -> None:
        """A CPU has passed a quiescent state."""
        if cpu in self._awaited:
            self._awaited.discard(cpu)
            self._check()

    def sched_clock_irq(self, cpu: int, user: bool) -> None:
        """Look at what a CPU is doing (rcu_sched_clock_irq): it runs the model or is interrupted, in user mode or not."""
        if cpu not in self._awaited:
            return
        if user or self._idles(cpu):
            self.quiescent(cpu)
            return
        execution = self.execution
        count = execution.host.preempt(cpu).count
        task = execution.tasks.current() if cpu == execution.cpu_id else None
        if task is not None and not task.rcu_read_lock_nesting and not count & (PREEMPT_MASK | SOFTIRQ_MASK):
            self.quiescent(cpu)

    def _idles(self, cpu: int) -> bool:
        return self.is_idle(cpu) and not self.execution.host.preempt(cpu).in_interrupt

    # ---- grace periods

    def _start(self) -> None:
        self.active = True
        self._waiting, self._next = self._next, []
        self._blockers = set(self._switched_away)
        self._awaited = {cpu for cpu in range(self.execution.host.cpus.online) if not self._idles(cpu)}
        self._look()
        self._check()

    def _check(self) -> None:
        """The grace period ends when nobody is left that it waits for."""
        if not self.active or self._awaited or self._blockers:
            return
        self.active = False
        self.completed += 1
        ended, self._waiting = self._waiting, []
        for cpu, callback in ended:
            batch = self._done.setdefault(cpu, [])
            batch.append(callback)
            if len(batch) == 1:
                self.softirqs.raise_on(cpu, Softirq.RCU)
        if self._next:
            self._start()

    def _look(self) -> None:
        """While somebody sleeps for the grace period, look at the CPUs it waits for once a tick."""
        if not self._hurry or not self.active:
            return
        for cpu in sorted(self._awaited - self._ticking):
            self._ticking.add(cpu)
            waiting = self.execution.waiting
            waiting.call_at(waiting.time() + TICK_NSEC, lambda cpu=cpu: self._tick(cpu), cpu)  # type: ignore[misc]

    def _tick(self, cpu: int) -> None:
        self._ticking.discard(cpu)
        self.sched_clock_irq(cpu, False)
        self._look()

    def call_rcu(self, callback: Callback) -> None:
        """Call `callback` as a softirq of this CPU after a grace period that begins from now on."""
        self._next.append((self.execution.cpu_id, callback))
        if not self.active:
            self._start()

    def _do_batch(self) -> None:
        """RCU_SOFTIRQ (rcu_do_batch)."""
        for callback in self._done.pop(self.execution.cpu_id, ()):
            callback()

    # ---- waiting for them

    def _wait_for(self, done: Callable[[], bool], reason: str) -> None:
        # The caller's own CPU passes its quiescent state by going to sleep.
        self._hurry += 1
        try:
            self._look()
            self.execution.sleep_until(done, reason)
        finally:
            self._hurry -= 1

    def synchronize_rcu(self) -> None:
        """Sleep until every reader of now is done."""
        thread = self.execution.current()
        over = False

        def end() -> None:
            nonlocal over
            over = True
            self.execution.tasks.wake(thread)

        self.call_rcu(end)
        self._wait_for(lambda: over, "synchronize_rcu")

    def rcu_barrier(self) -> None:
        """Sleep until every callback queued so far has run."""
        execution = self.execution
        thread = execution.current()
        queued = [*self._next, *self._waiting]
        left = {cpu for cpu, _ in queued} | set(self._done)
        if not left:
            return

        def reach(cpu: int) -> None:
            left.discard(cpu)
            execution.tasks.wake(thread)

        for cpu in sorted(left):
            self._next.append((cpu, lambda cpu=cpu: reach(cpu)))  # type: ignore[misc]
        if not self.active:
            self._start()
        self._wait_for(lambda: not left, "rcu_barrier")

    # ---- polling

    def get_state(self) -> int:
        """get_state_synchronize_rcu(): a cookie for the end of a full grace period from now on."""
        return self.completed + 1 + self.active << _SEQ_CTR_SHIFT

    def start_poll(self) -> int:
        """start_poll_synchronize_rcu(): the cookie, and the grace period is under way."""
        cookie = self.get_state()
        self.call_rcu(lambda: None)
        return cookie

    def poll_state(self, cookie: int) -> bool:
        """poll_state_synchronize_rcu(): whether that grace period is over."""
        return self.completed >= cookie >> _SEQ_CTR_SHIFT

    def validate(self) -> None:
        """Nobody waits for a grace period that is not under way."""
        assert self.active or not (self._awaited or self._blockers or self._waiting or self._next), "no callback is forgotten"
        assert self._blockers <= self._switched_away, "a grace period waits for readers only"
