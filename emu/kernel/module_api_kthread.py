"""Exported functions: kernel threads, schedule() and its kin, preemption, `current`; and vmemu_run_on and other calls of ours.

Sources: v6.12 kernel/kthread.c, kernel/sched/core.c. The vmemu_* functions are what an assembly guest needs to use several CPUs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from emu.kernel.execution import MASK64
from emu.kernel.guest_exports import GuestExports, c_int, c_long, c_unsigned
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.percpu_first_chunk import STATIC_VARIABLES
from emu.kernel.sync import Sync
from emu.kernel.task_struct import TASK_IDLE, TASK_INTERRUPTIBLE, TASK_KILLABLE, TASK_UNINTERRUPTIBLE
from emu.kernel.vsprintf import NextArgument

_MAX_NAME_FORMAT = 256
_CPUMASK_BYTES = 8192 // 8


class KthreadExports:
    """Threads of one kernel, for modules.

    `send_nmi(cpu)` and `send_ipi(cpu, vector)` interrupt a CPU; `request_irq(vector, function)` has `function` called in hard
    interrupt context for a vector, and is false for one that is not to be had.
    """

    def __init__(
        self, exports: GuestExports, sync: Sync, *, send_nmi: Callable[[int], None], send_ipi: Callable[[int, int], None],
        request_irq: Callable[[int, Callable[[], None]], bool],
    ) -> None:
        self.exports = exports
        self.kernel = exports.kernel
        self.sync = sync
        self.execution = sync.execution
        self._send_nmi, self._send_ipi, self._request_irq = send_nmi, send_ipi, request_irq
        self._kthreads()
        self._scheduling()
        self._bodies()
        self._own()
        self._data()

    def _string(self, la: int) -> str:
        data = b""
        while b"\0" not in data and len(data) < _MAX_NAME_FORMAT:
            step = min(64, PAGE_SIZE - (la + len(data)) % PAGE_SIZE)
            data += self.kernel.cpu.read(la + len(data) & MASK64, step)
        return data.partition(b"\0")[0].decode("latin-1")

    def format(self, fmt: int, next_argument: NextArgument) -> str:
        """A formatted string: the format in guest memory, the arguments after it."""
        return self.kernel.formatter.format(self._string(fmt), next_argument)

    def cpumask(self, la: int) -> list[int]:
        """The online CPUs of a struct cpumask in guest memory."""
        words = -(-self.kernel.cpus.online // 64)
        bits = int.from_bytes(self.kernel.cpu.read(la, 8 * words), "little")
        return [cpu for cpu in range(self.kernel.cpus.online) if bits >> cpu & 1]

    # ---- kthread.c

    def _kthreads(self) -> None:
        export, threads = self.exports.export, self.sync.kthreads

        def create(function: int, data: int, node: int, fmt: int, next_argument: NextArgument) -> int:
            return threads.create(function, data, self.format(fmt, next_argument), node=c_int(node))

        def create_on_cpu(function: int, data: int, cpu: int, fmt: int) -> int:
            number = c_unsigned(cpu)
            values: Iterator[int] = iter((number,))
            name = self.format(fmt, lambda: next(values, 0))
            return threads.create(function, data, name, cpu=number if number < self.kernel.cpus.online else None)

        def exit_thread(result: int) -> None:
            threads.exit(c_long(result))

        def complete_and_exit(completion: int, code: int) -> None:
            if completion:
                self.sync.completions.complete(completion)
            threads.exit(c_long(code))

        def current_data(task: int) -> int:
            found = threads.find(task)
            return self.execution.load64(0) if found is None else found.data

        def current_function(task: int) -> int:
            found = threads.find(task)
            return self.execution.load64(0) if found is None else found.function

        export("kthread_create_on_node", create, 4, varargs=True)
        export("kthread_create_on_cpu", create_on_cpu, 4)
        export("kthread_bind", lambda task, cpu: threads.bind(task, c_unsigned(cpu)), 2)
        export("kthread_stop", threads.stop, 1)
        export("kthread_should_stop", lambda: int(threads.should_stop()), 0)
        export("kthread_should_park", lambda: int(threads.should_park()), 0, gpl=True)
        export("kthread_park", threads.park, 1, gpl=True)
        export("kthread_unpark", threads.unpark, 1, gpl=True)
        export("kthread_parkme", threads.parkme, 0, gpl=True)
        export("kthread_data", current_data, 1, gpl=True)
        export("kthread_func", current_function, 1, gpl=True)
        export("kthread_exit", exit_thread, 1)
        export("kthread_complete_and_exit", complete_and_exit, 2)
        export("wake_up_process", lambda task: int(threads.wake_up_process(task)), 1)
        export("set_cpus_allowed_ptr", lambda task, mask: threads.set_cpus_allowed(task, self.cpumask(mask)), 2, gpl=True)

    # ---- sched/core.c

    def _scheduling(self) -> None:
        export, execution, timers = self.exports.export, self.execution, self.sync.timers

        def cond_resched() -> int:
            execution.waiting.yield_cpu()
            return 0

        def timeout_in(state: int) -> Callable[[int], int]:
            def call(ticks: int) -> int:
                execution.tasks.set_state(execution.current(), state)
                return timers.schedule_timeout(c_long(ticks))

            return call

        export("schedule", execution.schedule, 0)
        export("io_schedule", execution.schedule, 0)
        export("yield", execution.waiting.yield_cpu, 0)
        for name in ("__cond_resched", "__SCT__cond_resched", "__SCT__might_resched"):
            export(name, cond_resched, 0)
        for name in ("preempt_schedule", "preempt_schedule_notrace", "__SCT__preempt_schedule", "__SCT__preempt_schedule_notrace"):
            # With voluntary preemption these do nothing.
            export(name, lambda: None, 0)
        export("schedule_timeout", lambda ticks: timers.schedule_timeout(c_long(ticks)), 1)
        export("schedule_timeout_interruptible", timeout_in(TASK_INTERRUPTIBLE), 1)
        export("schedule_timeout_uninterruptible", timeout_in(TASK_UNINTERRUPTIBLE), 1)
        export("schedule_timeout_killable", timeout_in(TASK_KILLABLE), 1)
        export("schedule_timeout_idle", timeout_in(TASK_IDLE), 1)
        export("migrate_disable", lambda: None, 0, gpl=True)
        export("migrate_enable", lambda: None, 0, gpl=True)

    def _bodies(self) -> None:
        """What the kernel's own threads begin in; a module cannot make a thread a worker by calling them."""
        register, sync = self.kernel.symbols.register, self.sync
        sync.workqueues.entry = register("worker_thread", sync.workqueues.worker_thread, 0)
        sync.ksoftirqds.entry = register("smpboot_thread_fn", sync.ksoftirqds.run, 0)

    # ---- functions of ours

    def _own(self) -> None:
        export, threads, online = self.exports.export, self.sync.kthreads, self.kernel.cpus.online

        def run_on(cpu: int, function: int, argument: int) -> int:
            if cpu >= online:
                return 0
            task = threads.create(function, argument, f"vmemu/{cpu}", cpu=cpu)
            kthread = threads.find(task)
            if kthread is None:
                return 0
            # The handle stays good until vmemu_join.
            threads.get(kthread)
            threads.wake_up_process(task)
            return task

        def send_nmi(cpu: int) -> int:
            if cpu >= online:
                return -errno.EINVAL
            self._send_nmi(cpu)
            return 0

        def send_irq(cpu: int, vector: int) -> int:
            if cpu >= online or not 0x20 <= vector <= 0xFF:
                return -errno.EINVAL
            self._send_ipi(cpu, vector)
            return 0

        def request_irq(vector: int, handler: int, data: int) -> int:
            def call() -> None:
                self.execution.waiting.call_guest(handler, vector, data, site="__handle_irq_event_percpu")

            return 0 if 0x20 <= vector <= 0xFF and self._request_irq(vector, call) else -errno.EINVAL

        export("vmemu_run_on", run_on, 3)
        export("vmemu_join", threads.join, 1)
        export("vmemu_send_nmi", send_nmi, 1)
        export("vmemu_send_irq", send_irq, 2)
        export("vmemu_request_irq", request_irq, 3)
        export("vmemu_in_interrupt", lambda: int(self.execution.preempt.in_interrupt), 0)

    def _data(self) -> None:
        """Data that inline code reads: struct pcpu_hot, the masks and numbers of CPUs. A struct cpumask has 8192 bits."""
        kernel = self.kernel
        symbols = kernel.symbols
        hot = STATIC_VARIABLES["pcpu_hot"][0]
        symbols.add_absolute("pcpu_hot", hot)
        symbols.add_absolute("const_pcpu_hot", hot)
        symbols.add_absolute("current_task", hot)
        symbols.add_absolute("__preempt_count", hot + 8)
        symbols.add_absolute("cpu_number", hot + 12)
        for name in ("numa_node", "this_cpu_off"):
            symbols.add_absolute(name, STATIC_VARIABLES[name][0])
        online = kernel.cpus.online
        mask = ((1 << online) - 1).to_bytes(_CPUMASK_BYTES, "little")
        for name in ("__cpu_possible_mask", "__cpu_online_mask", "__cpu_present_mask", "__cpu_active_mask"):
            kernel.memory.write(kernel.layout.pa(symbols.add_data(name, _CPUMASK_BYTES, exported=True)), mask)
        kernel.memory.write(
            kernel.layout.pa(symbols.add_data("cpu_all_bits", _CPUMASK_BYTES, exported=True)), b"\xff" * _CPUMASK_BYTES
        )
        for name in ("nr_cpu_ids", "__num_online_cpus"):
            kernel.memory.write(kernel.layout.pa(symbols.add_data(name, 4, exported=True)), online.to_bytes(4, "little"))
