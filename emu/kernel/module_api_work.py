"""Exported functions: workqueues, softirqs and tasklets, irq_work, RCU, calls to other CPUs.

Sources: v6.12 kernel/workqueue.c, softirq.c, irq_work.c, rcu/tree.c, smp.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection
from typing import Protocol

from emu.kernel.execution import MASK64
from emu.kernel.guest_exports import GuestExports, c_int, c_unsigned
from emu.kernel.module_api_kthread import KthreadExports
from emu.kernel.rcu import FUNC as RCU_FUNC
from emu.kernel.rcu import NEXT as RCU_NEXT
from emu.kernel.softirq import Softirq
from emu.kernel.sync import Sync
from emu.kernel.vsprintf import NextArgument
from emu.kernel.workqueue import WORKQUEUE_STRUCT_SIZE, WQ_HIGHPRI, WQ_UNBOUND

_SYSTEM_QUEUES = {
    "system_wq": ("events", 0),
    "system_highpri_wq": ("events_highpri", WQ_HIGHPRI),
    "system_long_wq": ("events_long", 0),
    "system_unbound_wq": ("events_unbound", WQ_UNBOUND),
    "system_freezable_wq": ("events_freezable", 0),
    "system_power_efficient_wq": ("events_power_efficient", 0),
}


class Calls(Protocol):
    """Calls to other CPUs: emu/kernel/smp.py."""

    def smp_call_function_single(self, cpu: int, func: Callable[[int], None], wait: bool) -> int:
        """Call `func` on a CPU: 0 or -ENXIO."""

    def smp_call_function_many(self, mask: Collection[int], func: Callable[[int], None], wait: bool) -> None:
        """Call `func` on CPUs other than this one."""

    def on_each_cpu_cond_mask(
        self, cond: Callable[[int], bool] | None, func: Callable[[int], None], wait: bool, mask: Collection[int]
    ) -> None:
        """Call `func` on those of `mask` for which `cond` holds."""


class WorkExports:
    """Deferred work of one kernel, for modules. `kvfree` frees what kvmalloc returned."""

    def __init__(
        self, exports: GuestExports, sync: Sync, threads: KthreadExports, calls: Calls, kvfree: Callable[[int], None]
    ) -> None:
        self.exports = exports
        self.kernel = exports.kernel
        self.sync = sync
        self.execution = sync.execution
        self.threads = threads
        self.calls = calls
        self.kvfree = kvfree
        self._workqueues()
        self._work()
        self._softirqs()
        self._rcu()
        self._smp()

    # ---- workqueues

    def _workqueues(self) -> None:
        export, queues, symbols = self.exports.export, self.sync.workqueues, self.kernel.symbols

        def alloc(fmt: int, flags: int, max_active: int, next_argument: NextArgument) -> int:
            name = self.threads.format(fmt, next_argument)
            return queues.alloc(name, c_unsigned(flags), c_int(max_active))

        def flush(la: int) -> None:
            queue = queues.find(la)
            if queue is not None:
                queues.flush(queue)

        def drain(la: int) -> None:
            queue = queues.find(la)
            if queue is not None:
                queues.drain(queue)

        export("alloc_workqueue", alloc, 3, varargs=True)
        export("destroy_workqueue", queues.destroy, 1, gpl=True)
        export("__flush_workqueue", flush, 1)
        # Its name up to v5.18, and a macro since.
        symbols.add_alias("flush_workqueue", "__flush_workqueue")
        export("drain_workqueue", drain, 1, gpl=True)
        for name, (text, flags) in _SYSTEM_QUEUES.items():
            la = symbols.add_data(name, 8, exported=True)
            queue = symbols.add_data(f"{name}_struct", WORKQUEUE_STRUCT_SIZE)
            queues.add(queue, text, flags)
            self.kernel.memory.write_u64(self.kernel.layout.pa(la), queue)

    def _work(self) -> None:
        export, queues, delayed = self.exports.export, self.sync.workqueues, self.sync.delayed_works

        def queue_work_on(cpu: int, la: int, work: int) -> int:
            queue = queues.find(la)
            return int(queue is not None and queues.queue_work_on(c_unsigned(cpu), queue, work))

        def queue_delayed_work_on(cpu: int, la: int, dwork: int, delay: int) -> int:
            queue = queues.find(la)
            return int(queue is not None and delayed.queue_on(c_unsigned(cpu), queue, dwork, delay))

        def mod_delayed_work_on(cpu: int, la: int, dwork: int, delay: int) -> int:
            queue = queues.find(la)
            return int(queue is not None and delayed.mod_on(c_unsigned(cpu), queue, dwork, delay))

        export("queue_work_on", queue_work_on, 3)
        export("flush_work", lambda work: int(queues.flush_work(work)), 1)
        export("cancel_work", lambda work: int(queues.cancel(work)), 1)
        export("cancel_work_sync", lambda work: int(queues.cancel_sync(work)), 1, gpl=True)
        export("work_busy", queues.busy, 1, gpl=True)
        export("queue_delayed_work_on", queue_delayed_work_on, 4)
        export("mod_delayed_work_on", mod_delayed_work_on, 4, gpl=True)
        export("delayed_work_timer_fn", delayed.timer_fn, 1)
        export("flush_delayed_work", lambda dwork: int(delayed.flush(dwork)), 1)
        export("cancel_delayed_work", lambda dwork: int(delayed.cancel(dwork)), 1)
        export("cancel_delayed_work_sync", lambda dwork: int(delayed.cancel_sync(dwork)), 1)

    # ---- softirqs

    def _softirqs(self) -> None:
        export, softirqs, tasklets, works = self.exports.export, self.sync.softirqs, self.sync.tasklets, self.sync.irq_works
        export("__local_bh_disable_ip", lambda ip, count: self.execution.preempt.add(c_int(count)), 2)
        export("__local_bh_enable_ip", lambda ip, count: softirqs.local_bh_enable(), 2)
        export("tasklet_init", lambda la, function, data: tasklets.init(la, function, data, callback=False), 3)
        export("tasklet_setup", lambda la, function: tasklets.init(la, function, 0, callback=True), 2)
        export("__tasklet_schedule", lambda la: tasklets.enqueue(la, Softirq.TASKLET), 1)
        export("__tasklet_hi_schedule", lambda la: tasklets.enqueue(la, Softirq.HI), 1)
        export("tasklet_kill", tasklets.kill, 1)
        export("tasklet_unlock_wait", tasklets.unlock_wait, 1, gpl=True)
        export("tasklet_unlock_spin_wait", tasklets.unlock_wait, 1)
        export("irq_work_queue", lambda la: int(works.queue(la)), 1, gpl=True)
        export("irq_work_queue_on", lambda la, cpu: int(works.queue(la, min(c_unsigned(cpu), self.kernel.cpus.online - 1))), 2)
        export("irq_work_sync", works.sync, 1, gpl=True)

    # ---- RCU

    def _rcu(self) -> None:
        export, rcu = self.exports.export, self.sync.rcu

        def call_rcu(head: int, function: int) -> None:
            self.execution.store64(head + RCU_FUNC, function)
            self.execution.store64(head + RCU_NEXT, 0)
            rcu.call_rcu(lambda: self._callback(head))

        def cond_synchronize(cookie: int) -> None:
            if not rcu.poll_state(cookie):
                rcu.synchronize_rcu()

        export("__rcu_read_lock", rcu.read_lock, 0, gpl=True)
        export("__rcu_read_unlock", rcu.read_unlock, 0, gpl=True)
        export("call_rcu", call_rcu, 2, gpl=True)
        export("call_rcu_hurry", call_rcu, 2, gpl=True)
        for name in ("synchronize_rcu", "synchronize_rcu_expedited"):
            export(name, rcu.synchronize_rcu, 0, gpl=True)
        export("kvfree_call_rcu", self._kvfree_call_rcu, 2, gpl=True)
        export("rcu_barrier", rcu.rcu_barrier, 0, gpl=True)
        export("get_state_synchronize_rcu", rcu.get_state, 0, gpl=True)
        export("start_poll_synchronize_rcu", rcu.start_poll, 0, gpl=True)
        export("poll_state_synchronize_rcu", lambda cookie: int(rcu.poll_state(cookie)), 1, gpl=True)
        export("cond_synchronize_rcu", cond_synchronize, 1, gpl=True)

    def _callback(self, head: int) -> None:
        """rcu_do_batch() for one: the function is taken out of the head before it is called."""
        execution = self.execution
        function = execution.load64(head + RCU_FUNC)
        execution.store64(head + RCU_FUNC, 0)
        execution.waiting.call_guest(function, head, site="rcu_do_batch")

    def _kvfree_call_rcu(self, head: int, pointer: int) -> None:
        """kvfree_rcu(): free after a grace period, in a worker. Up to v6.1 `pointer` is the head's offset, if there is a head."""
        if head and pointer < 1 << 12:
            pointer = head - pointer & MASK64
        free = self.exports.guarded(self.kvfree)

        def free_in_worker() -> None:
            free(pointer)

        self.sync.rcu.call_rcu(lambda: self.sync.workqueues.schedule_work(free_in_worker))

    # ---- other CPUs

    def _smp(self) -> None:
        export, calls, threads = self.exports.export, self.calls, self.threads

        def guest(function: int, info: int) -> Callable[[int], None]:
            def call(cpu: int) -> None:
                self.execution.waiting.call_guest(function, info, site="__flush_smp_call_function_queue")

            return call

        def single(cpu: int, function: int, info: int, wait: int) -> int:
            number = c_int(cpu)
            if not 0 <= number < self.kernel.cpus.online:
                return -errno.ENXIO
            return calls.smp_call_function_single(number, guest(function, info), bool(c_int(wait)))

        def many(mask: int, function: int, info: int, wait: int) -> None:
            calls.smp_call_function_many(threads.cpumask(mask), guest(function, info), bool(wait & 1))

        def all_others(function: int, info: int, wait: int) -> None:
            calls.smp_call_function_many(range(self.kernel.cpus.online), guest(function, info), bool(c_int(wait)))

        def each(cond: int, function: int, info: int, wait: int, mask: int) -> None:
            def holds(cpu: int) -> bool:
                return bool(self.execution.waiting.call_guest(cond, cpu, info, site="__flush_smp_call_function_queue") & 0xFF)

            which = threads.cpumask(mask)
            calls.on_each_cpu_cond_mask(holds if cond else None, guest(function, info), bool(wait & 1), which)

        def on_each_cpu(function: int, info: int, wait: int) -> None:
            online = range(self.kernel.cpus.online)
            calls.on_each_cpu_cond_mask(None, guest(function, info), bool(c_int(wait)), online)

        export("smp_call_function_single", single, 4)
        export("smp_call_function_many", many, 4)
        export("smp_call_function", all_others, 3)
        export("on_each_cpu_cond_mask", each, 5)
        # A macro in C.
        export("on_each_cpu", on_each_cpu, 3)
