"""Wait queues (v6.12 kernel/sched/wait.c). The lists are in guest memory, where inline code of modules walks them too."""

from __future__ import annotations

from collections.abc import Callable

from emu.kernel.execution import MASK64, Execution
from emu.kernel.spinlock import Spinlocks
from emu.kernel.task_struct import TASK_NORMAL, TASK_RUNNING
from emu.kernel.timer import Timers

HEAD_LOCK, HEAD_LIST, HEAD_SIZE = 0, 8, 24
FLAGS, PRIVATE, FUNC, ENTRY, ENTRY_SIZE = 0, 8, 16, 24, 40
WQ_FLAG_EXCLUSIVE, WQ_FLAG_WOKEN, WQ_FLAG_PRIORITY = 1, 2, 16

WakeFunction = Callable[[int, int], int]


class WaitQueues:
    """wait_queue_head_t (spinlock_t, list_head at 8) and its entries: flags, private, func, list_head at 24.

    `functions` are the wake functions of the kernel itself by address; any other is called in the guest.
    """

    def __init__(self, execution: Execution, spinlocks: Spinlocks, timers: Timers) -> None:
        self.execution = execution
        self.spinlocks = spinlocks
        self.timers = timers
        self.functions: dict[int, WakeFunction] = {}
        self.autoremove_address = 0

    def init(self, head: int) -> None:
        """__init_waitqueue_head()."""
        self.execution.store32(head + HEAD_LOCK, 0)
        self.execution.list_init(head + HEAD_LIST)

    # ---- waking

    def default_wake_function(self, entry: int, mode: int) -> int:
        """Wake the task in `private`: whether it slept in one of the states of `mode`."""
        execution = self.execution
        pointer = execution.load64(entry + PRIVATE)
        task = execution.tasks.find(pointer)
        if task is None:
            execution.load32(pointer)
            return 0
        return int(execution.tasks.try_to_wake_up(task.thread, mode))

    def autoremove_wake_function(self, entry: int, mode: int) -> int:
        """default_wake_function, and take the entry off the list if that woke a task."""
        woken = self.default_wake_function(entry, mode)
        if woken:
            self._del_init(entry)
        return woken

    def woken_wake_function(self, entry: int, mode: int) -> int:
        """For wait_woken(): note that it was woken."""
        execution = self.execution
        execution.store32(entry + FLAGS, execution.load32(entry + FLAGS) | WQ_FLAG_WOKEN)
        return self.default_wake_function(entry, mode)

    def wake_up(self, head: int, mode: int = TASK_NORMAL, nr_exclusive: int = 1, key: int = 0) -> int:
        """__wake_up(): wake all that wait not exclusively, and `nr_exclusive` others (0: all): how many were."""
        flags = self.spinlocks.lock_irqsave(head + HEAD_LOCK)
        try:
            return self.wake_up_locked(head, mode, nr_exclusive, key)
        finally:
            self.spinlocks.unlock_irqrestore(head + HEAD_LOCK, flags)

    def wake_up_locked(self, head: int, mode: int, nr_exclusive: int, key: int = 0) -> int:
        """__wake_up_common(): the lock is held."""
        execution = self.execution
        woken = 0
        seen: set[int] = set()
        at = execution.load64(head + HEAD_LIST)
        while at != head + HEAD_LIST:
            if at in seen:
                # A list that was overwritten so that it comes back elsewhere: the walk has no end.
                execution.spin_until(lambda: False, f"wait queue 0x{head:x}, a list without an end")
            seen.add(at)
            entry, at = at - ENTRY, execution.load64(at)
            flags = execution.load32(entry + FLAGS)
            result = self._call(entry, mode, key)
            if result < 0:
                break
            if result:
                woken += 1
                if flags & WQ_FLAG_EXCLUSIVE:
                    nr_exclusive -= 1
                    if not nr_exclusive:
                        break
        return woken

    def _call(self, entry: int, mode: int, key: int) -> int:
        address = self.execution.load64(entry + FUNC)
        function = self.functions.get(address)
        if function is not None:
            return function(entry, mode)
        result = self.execution.waiting.call_guest(address, entry, mode, 0, key, site="__wake_up_common") & 0xFFFF_FFFF
        return result - ((result & 0x8000_0000) << 1)

    # ---- waiting

    def init_entry(self, entry: int, flags: int) -> None:
        """init_wait_entry()."""
        execution = self.execution
        execution.store32(entry + FLAGS, flags)
        execution.store64(entry + PRIVATE, execution.tasks.current().address)
        execution.store64(entry + FUNC, self.autoremove_address)
        execution.list_init(entry + ENTRY)

    def _empty(self, la: int) -> bool:
        return self.execution.load64(la) == la

    def _del_init(self, entry: int) -> None:
        self.execution.list_del(entry + ENTRY)
        self.execution.list_init(entry + ENTRY)

    def add(self, head: int, entry: int, *, exclusive: bool) -> None:
        """add_wait_queue() at the front, behind entries with priority; add_wait_queue_exclusive() at the end."""
        execution = self.execution
        flags = execution.load32(entry + FLAGS) & ~WQ_FLAG_EXCLUSIVE | (WQ_FLAG_EXCLUSIVE if exclusive else 0)
        execution.store32(entry + FLAGS, flags)
        self._locked(head, lambda: self._insert(head, entry, at_end=exclusive))

    def remove(self, head: int, entry: int) -> None:
        """remove_wait_queue()."""
        self._locked(head, lambda: self.execution.list_del(entry + ENTRY))

    def _locked(self, head: int, change: Callable[[], None]) -> None:
        flags = self.spinlocks.lock_irqsave(head + HEAD_LOCK)
        try:
            change()
        finally:
            self.spinlocks.unlock_irqrestore(head + HEAD_LOCK, flags)

    def _insert(self, head: int, entry: int, *, at_end: bool) -> None:
        execution = self.execution
        anchor = head + HEAD_LIST
        if at_end:
            execution.list_add_between(entry + ENTRY, execution.load64(anchor + 8), anchor)
            return
        previous, following = anchor, execution.load64(anchor)
        while following != anchor and execution.load32(following - ENTRY + FLAGS) & WQ_FLAG_PRIORITY:
            previous, following = following, execution.load64(following)
        execution.list_add_between(entry + ENTRY, previous, following)

    def prepare(self, head: int, entry: int, state: int, *, exclusive: bool | None) -> bool:
        """prepare_to_wait(), its exclusive form, or prepare_to_wait_event() with None: whether the list was empty."""
        execution = self.execution
        if exclusive is not None:
            flags = execution.load32(entry + FLAGS) & ~WQ_FLAG_EXCLUSIVE | (WQ_FLAG_EXCLUSIVE if exclusive else 0)
            execution.store32(entry + FLAGS, flags)
        at_end = bool(execution.load32(entry + FLAGS) & WQ_FLAG_EXCLUSIVE)
        was_empty = False

        def change() -> None:
            nonlocal was_empty
            if self._empty(entry + ENTRY):
                was_empty = self._empty(head + HEAD_LIST)
                self._insert(head, entry, at_end=at_end)
            execution.tasks.set_state(execution.current(), state)

        self._locked(head, change)
        execution.current().waiting_for = f"wait queue 0x{head:x}"
        return was_empty

    def finish(self, head: int, entry: int) -> None:
        """finish_wait()."""
        execution = self.execution
        thread = execution.current()
        execution.tasks.set_state(thread, TASK_RUNNING)
        thread.waiting_for = ""
        if not self._empty(entry + ENTRY):
            self._locked(head, lambda: self._del_init(entry))

    def wait_woken(self, entry: int, mode: int, timeout: int) -> int:
        """wait_woken(): sleep unless woken_wake_function was called since; the ticks left."""
        execution = self.execution
        execution.tasks.set_state(execution.current(), mode)
        if not execution.load32(entry + FLAGS) & WQ_FLAG_WOKEN:
            timeout = self.timers.schedule_timeout(timeout, f"wait queue entry 0x{entry & MASK64:x}")
        execution.tasks.set_state(execution.current(), TASK_RUNNING)
        execution.store32(entry + FLAGS, execution.load32(entry + FLAGS) & ~WQ_FLAG_WOKEN)
        return timeout
