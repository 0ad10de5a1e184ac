"""Exported functions: spinlocks, rwlocks, mutexes, rw_semaphores, semaphores, completions, wait queues.

Sources: v6.12 kernel/locking, kernel/sched/completion.c, swait.c, wait.c. Signals do not exist here: what is killable or
interruptible is not interrupted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from emu.kernel.completion import MAX_SCHEDULE_TIMEOUT
from emu.kernel.execution import MASK64, Execution
from emu.kernel.guest_exports import GuestExports, c_int, c_long, c_unsigned
from emu.kernel.preempt import PREEMPT_OFFSET
from emu.kernel.sync import Sync
from emu.kernel.task_struct import TASK_INTERRUPTIBLE, TASK_KILLABLE, TASK_UNINTERRUPTIBLE

_STATES = {"": TASK_UNINTERRUPTIBLE, "_killable": TASK_KILLABLE, "_interruptible": TASK_INTERRUPTIBLE}


class SyncExports:
    """The locks of one kernel, for modules."""

    def __init__(self, exports: GuestExports, sync: Sync) -> None:
        self.export = exports.export
        self.sync = sync
        self.execution: Execution = sync.execution
        self._spinlocks()
        for kind in ("read", "write"):
            self._rwlocks(kind)
        self._mutexes()
        self._rwsems()
        self._completions()
        self._wait_queues(exports)

    def _spinlocks(self) -> None:
        export, locks, execution = self.export, self.sync.spinlocks, self.execution

        def lock_irq(la: int) -> None:
            locks.lock_irqsave(la)

        def trylock_bh(la: int) -> int:
            taken = locks.trylock_bh(la)
            if not taken:
                self._enable_bh()
            return int(taken)

        def unlock_bh(la: int) -> None:
            locks.release(la)
            self._enable_bh()

        export("_raw_spin_lock", locks.lock, 1)
        export("_raw_spin_trylock", lambda la: int(locks.trylock(la)), 1)
        export("_raw_spin_lock_irqsave", locks.lock_irqsave, 1)
        export("_raw_spin_lock_irq", lock_irq, 1)
        export("_raw_spin_lock_bh", locks.lock_bh, 1)
        export("_raw_spin_trylock_bh", trylock_bh, 1)
        export("_raw_spin_unlock", locks.unlock, 1)
        export("_raw_spin_unlock_irqrestore", locks.unlock_irqrestore, 2)
        export("_raw_spin_unlock_irq", locks.unlock_irq, 1)
        export("_raw_spin_unlock_bh", unlock_bh, 1)
        export("queued_spin_lock_slowpath", lambda la, word: locks.acquire(la), 2)
        export("preempt_count_add", lambda value: execution.preempt.add(c_int(value)), 1)
        export("preempt_count_sub", lambda value: execution.preempt.add(-c_int(value)), 1)

    def _enable_bh(self) -> None:
        """__local_bh_enable_ip() of a lock: preemption is enabled with softirqs."""
        self.sync.softirqs.local_bh_enable()
        self.execution.preempt.add(-PREEMPT_OFFSET)

    def _rwlocks(self, kind: str) -> None:
        """_raw_read_lock() and its kin, or those for writing."""
        export, locks, execution = self.export, self.sync.rwlocks, self.execution
        acquire = locks.read_acquire if kind == "read" else locks.write_acquire
        try_acquire = locks.try_read_acquire if kind == "read" else locks.try_write_acquire
        release = locks.read_release if kind == "read" else locks.write_release

        def lock(la: int) -> None:
            execution.preempt_disable()
            acquire(la)

        def trylock(la: int) -> int:
            execution.preempt_disable()
            taken = try_acquire(la)
            if not taken:
                execution.preempt_enable()
            return int(taken)

        def lock_irqsave(la: int) -> int:
            flags = execution.local_irq_save()
            lock(la)
            return flags

        def lock_irq(la: int) -> None:
            lock_irqsave(la)

        def lock_bh(la: int) -> None:
            self.sync.softirqs.local_bh_disable()
            lock(la)

        def unlock(la: int) -> None:
            release(la)
            execution.preempt_enable()

        def unlock_irqrestore(la: int, flags: int) -> None:
            release(la)
            execution.local_irq_restore(flags)
            execution.preempt_enable()

        def unlock_irq(la: int) -> None:
            release(la)
            execution.local_irq_enable()
            execution.preempt_enable()

        def unlock_bh(la: int) -> None:
            release(la)
            self._enable_bh()

        export(f"_raw_{kind}_lock", lock, 1)
        export(f"_raw_{kind}_trylock", trylock, 1)
        export(f"_raw_{kind}_lock_irqsave", lock_irqsave, 1)
        export(f"_raw_{kind}_lock_irq", lock_irq, 1)
        export(f"_raw_{kind}_lock_bh", lock_bh, 1)
        export(f"_raw_{kind}_unlock", unlock, 1)
        export(f"_raw_{kind}_unlock_irqrestore", unlock_irqrestore, 2)
        export(f"_raw_{kind}_unlock_irq", unlock_irq, 1)
        export(f"_raw_{kind}_unlock_bh", unlock_bh, 1)

    def _mutexes(self) -> None:
        export, mutexes = self.export, self.sync.mutexes
        export("__mutex_init", lambda la, name, key: mutexes.init(la), 3)
        export("mutex_unlock", mutexes.unlock, 1)
        export("mutex_trylock", lambda la: int(mutexes.trylock(la)), 1)
        export("mutex_is_locked", lambda la: int(mutexes.is_locked(la)), 1)
        export("mutex_lock", mutexes.lock, 1)
        export("mutex_lock_io", mutexes.lock, 1, gpl=True)
        for suffix in ("_killable", "_interruptible"):
            export(f"mutex_lock{suffix}", _uninterrupted(mutexes.lock, _STATES[suffix]), 1)

    def _rwsems(self) -> None:
        export, rwsems, semaphores = self.export, self.sync.rwsems, self.sync.semaphores
        export("__init_rwsem", lambda la, name, key: rwsems.init(la), 3)
        export("down_read", rwsems.down_read, 1)
        export("down_write", rwsems.down_write, 1)
        export("down_read_killable", _uninterrupted(rwsems.down_read, TASK_KILLABLE), 1)
        export("down_read_interruptible", _uninterrupted(rwsems.down_read, TASK_INTERRUPTIBLE), 1)
        export("down_write_killable", _uninterrupted(rwsems.down_write, TASK_KILLABLE), 1)
        export("down_read_trylock", lambda la: int(rwsems.down_read_trylock(la)), 1)
        export("down_write_trylock", lambda la: int(rwsems.down_write_trylock(la)), 1)
        export("up_read", rwsems.up_read, 1)
        export("up_write", rwsems.up_write, 1)
        export("downgrade_write", rwsems.downgrade_write, 1)

        def down_timeout(la: int, timeout: int) -> int:
            return 0 if semaphores.down(la, c_long(timeout)) else -errno.ETIME

        def down(la: int) -> None:
            semaphores.down(la)

        export("down", down, 1)
        for suffix in ("_killable", "_interruptible"):
            export(
                f"down{suffix}",
                lambda la, state=_STATES[suffix]: 0 if semaphores.down(la, MAX_SCHEDULE_TIMEOUT, state) else -errno.EINTR, 1,
            )
        export("down_trylock", lambda la: int(not semaphores.down_trylock(la)), 1)
        export("down_timeout", down_timeout, 2)
        export("up", semaphores.up, 1)

    def _completions(self) -> None:
        export, completions = self.export, self.sync.completions
        export("complete", completions.complete, 1)
        export("complete_all", completions.complete_all, 1)
        export("try_wait_for_completion", lambda la: int(completions.try_wait(la)), 1)
        export("completion_done", lambda la: int(completions.done(la)), 1)

        def wait(la: int) -> None:
            completions.wait(la)

        def wait_in(la: int, state: int) -> None:
            completions.wait(la, MAX_SCHEDULE_TIMEOUT, state)

        def wait_timeout(la: int, timeout: int) -> int:
            return completions.wait(la, _ticks(timeout))

        for io in ("", "_io"):
            export(f"wait_for_completion{io}", wait, 1)
            export(f"wait_for_completion{io}_timeout", wait_timeout, 2)
        for suffix in ("_killable", "_interruptible"):
            state = _STATES[suffix]
            export(f"wait_for_completion{suffix}", _uninterrupted(wait_in, state), 1)
            export(f"wait_for_completion{suffix}_timeout", lambda la, t, s=state: completions.wait(la, _ticks(t), s), 2)

    def _wait_queues(self, exports: GuestExports) -> None:
        export, queues, symbols = self.export, self.sync.wait_queues, exports.kernel.symbols

        def prepare(exclusive: bool | None) -> Callable[[int, int, int], int]:
            def call(head: int, entry: int, state: int) -> int:
                was_empty = queues.prepare(head, entry, c_unsigned(state), exclusive=exclusive)
                return int(was_empty) if exclusive else 0

            return call

        def wake_up(head: int, mode: int, nr: int, key: int) -> int:
            return queues.wake_up(head, c_unsigned(mode), c_int(nr), key)

        def wake_up_sync(head: int, mode: int) -> None:
            queues.wake_up(head, c_unsigned(mode))

        def wake_up_locked(head: int, mode: int, nr: int) -> None:
            queues.wake_up_locked(head, c_unsigned(mode), c_int(nr))

        def wake_up_locked_key(head: int, mode: int, key: int) -> None:
            queues.wake_up_locked(head, c_unsigned(mode), 1, key)

        export("__init_waitqueue_head", lambda head, name, key: queues.init(head), 3)
        export("__wake_up", wake_up, 4)
        export("__wake_up_sync", wake_up_sync, 2, gpl=True)
        export("__wake_up_locked", wake_up_locked, 3, gpl=True)
        export("__wake_up_locked_key", wake_up_locked_key, 3, gpl=True)
        export("init_wait_entry", lambda entry, flags: queues.init_entry(entry, c_unsigned(flags)), 2)
        export("add_wait_queue", lambda head, entry: queues.add(head, entry, exclusive=False), 2)
        export("add_wait_queue_exclusive", lambda head, entry: queues.add(head, entry, exclusive=True), 2)
        export("remove_wait_queue", queues.remove, 2)
        export("prepare_to_wait", prepare(False), 3)
        export("prepare_to_wait_exclusive", prepare(True), 3)
        export("prepare_to_wait_event", prepare(None), 3)
        export("finish_wait", queues.finish, 2)
        export(
            "wait_woken", lambda entry, mode, timeout: queues.wait_woken(entry, c_unsigned(mode), c_long(timeout)) & MASK64, 3
        )
        for name, function in (
            ("default_wake_function", queues.default_wake_function),
            ("autoremove_wake_function", queues.autoremove_wake_function),
            ("woken_wake_function", queues.woken_wake_function),
        ):
            export(name, lambda entry, mode, flags, key, f=function: f(entry, c_unsigned(mode)), 4)
            queues.functions[symbols.address_of(name)] = function
        queues.autoremove_address = symbols.address_of("autoremove_wake_function")


def _ticks(timeout: int) -> int:
    """An unsigned timeout as schedule_timeout() takes it."""
    return min(timeout, MAX_SCHEDULE_TIMEOUT)


def _uninterrupted(take: Callable[[int, int], None], state: int) -> Callable[[int], int]:
    """A function that takes a lock in `state` and returns 0, as no signal comes."""

    def call(la: int) -> int:
        take(la, state)
        return 0

    return call
