"""Calling functions on other CPUs: queues, IPIs, acknowledgements.

A call to another CPU is a call_single_data on that CPU's call_single_queue. An IPI goes out only when the queue was empty before:
a CPU that has not yet taken the last one finds the new call beside the old. Who waits, spins until the call is unlocked.

Source: v6.12 kernel/smp.c; what differs in other versions is in profile.SmpDesign.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.preempt import PREEMPT_OFFSET, PreemptCount
from emu.kernel.profile import SmpDesign
from emu.kernel.ptrace import X86_EFLAGS_IF

CALL_FUNCTION_VECTOR = 0xFC
CALL_FUNCTION_SINGLE_VECTOR = 0xFB
# The function whose loop a CPU stands in while it waits for a call: csd_lock_wait is inlined there.
WAIT_SITE = "smp_call_function_many_cond"

Function = Callable[[int], None]
"""Runs on a CPU in hard interrupt context or with interrupts off; is given the CPU's number."""
Condition = Callable[[int], bool]


class Cpus(Protocol):
    """Which CPU runs the model now; CPUs 0 to online - 1 are online."""

    @property
    def current(self) -> int: ...

    @property
    def online(self) -> int: ...

    @property
    def possible(self) -> int: ...


class SmpKernel(Protocol):
    """What is asked of the kernel here."""

    @property
    def cpus(self) -> Cpus: ...

    def cpu_by_number(self, number: int) -> KernelCpu:
        """CPU `number`."""

    def preempt(self, number: int) -> PreemptCount:
        """The preempt_count of CPU `number`."""

    def send_ipi(self, cpu: int, vector: int) -> None:
        """Interrupt a CPU."""

    def warn(self, function: str, text: str = "") -> None:
        """WARN in C function `function`."""


class Waiting(Protocol):
    """How a CPU waits."""

    def spin_until(self, condition: Callable[[], bool], site: str = ...) -> None:
        """Busy-wait until `condition` holds; the other CPUs run, and this one takes interrupts if it may."""


def _nothing(cpu: int) -> None:
    raise AssertionError(f"CPU {cpu} was asked to run a call that has no function")


@dataclass(slots=True, eq=False)
class CallSingleData:
    """One call (struct __call_single_data). Locked from when it is filled in until it may be filled in again.

    A synchronous one is unlocked after its function has returned, another one before it is called.
    """

    func: Function = _nothing
    cause: str = ""
    sender: int = 0
    locked: bool = False
    sync: bool = False


@dataclass(slots=True)
class SmpCounters:
    """Function-call IPIs sent, by (sending CPU, cause), and received, by (CPU, vector); calls run for others, by (CPU, cause)."""

    sent: Counter[tuple[int, str]] = field(default_factory=Counter)
    received: Counter[tuple[int, int]] = field(default_factory=Counter)
    run: Counter[tuple[int, str]] = field(default_factory=Counter)

    def sent_for(self, cause: str) -> int:
        """IPIs that all CPUs sent for a cause."""
        return sum(count for (_, other), count in self.sent.items() if other == cause)


class SmpCalls:
    """Function calls between the CPUs of one kernel.

    `oops_in_progress` silences the warnings. `set_nr_if_polling(cpu)` true spares the IPI: that CPU polls in its idle loop and will
    call flush_smp_call_function_queue by itself.
    """

    def __init__(self, kernel: SmpKernel, waiting: Waiting, design: SmpDesign) -> None:
        self.kernel = kernel
        self.waiting = waiting
        self.design = design
        self.counters = SmpCounters()
        self.oops_in_progress: Callable[[], bool] = lambda: False
        self.set_nr_if_polling: Callable[[int], bool] = lambda cpu: False
        # Told of each call that a CPU has run for another: the CPU, the one that asked, and for what.
        self.on_done: Callable[[int, int, str], None] | None = None
        possible = range(kernel.cpus.possible)
        self.call_single_queue: list[list[CallSingleData]] = [[] for _ in possible]
        self._csd_data = [CallSingleData() for _ in possible]
        self._cfd_data = [[CallSingleData() for _ in possible] for _ in possible]
        self._executing: list[list[CallSingleData]] = [[] for _ in possible]
        self._kicked = [False for _ in possible]
        self._warned: set[str] = set()

    # ---- to call

    def smp_call_function_single(self, cpu: int, func: Function, wait: bool, *, cause: str = "smp_call_function_single") -> int:
        """Run `func` on one CPU, this one included: 0, or -ENXIO when it is not online.

        Without `wait` the call may still be under way on return, and each CPU has one such call at a time: a second waits for it.
        """
        this_cpu = self.kernel.cpus.current
        preempt = self.kernel.preempt(this_cpu)
        preempt.add(PREEMPT_OFFSET)
        if self._irqs_disabled(this_cpu) and not self.oops_in_progress():
            self._warn_once("smp_call_function_single:irqs_disabled")
        if not self._in_task(this_cpu):
            self._warn_once("smp_call_function_single")
        csd = CallSingleData(locked=True, sync=True)
        if not wait:
            csd = self._csd_data[this_cpu]
            self._csd_lock(csd)
        csd.func, csd.cause = func, cause
        err = self._generic_exec_single(cpu, csd)
        if wait:
            self._csd_lock_wait(csd)
        preempt.add(-PREEMPT_OFFSET)
        return err

    def smp_call_function_single_async(self, cpu: int, csd: CallSingleData) -> int:
        """Run a caller's own call on a CPU without waiting: 0, -EBUSY while it is still queued, -ENXIO when `cpu` is not online.

        Allowed in any context but NMI.
        """
        if csd.locked:
            return -errno.EBUSY
        csd.locked, csd.sync = True, False
        return self._generic_exec_single(cpu, csd)

    def smp_call_function_many(
        self, mask: Collection[int], func: Function, wait: bool, *, cause: str = "smp_call_function_many"
    ) -> None:
        """Run `func` on the online CPUs of `mask` but this one."""
        self._many(mask, func, wait, False, None, cause)

    def smp_call_function(self, func: Function, wait: bool, *, cause: str = "smp_call_function") -> None:
        """Run `func` on all online CPUs but this one."""
        self._many(range(self.kernel.cpus.online), func, wait, False, None, cause)

    def on_each_cpu(self, func: Function, wait: bool, *, cause: str = "on_each_cpu") -> None:
        """Run `func` on all online CPUs."""
        self.on_each_cpu_cond_mask(None, func, wait, range(self.kernel.cpus.online), cause=cause)

    def on_each_cpu_mask(self, mask: Collection[int], func: Function, wait: bool, *, cause: str = "on_each_cpu_mask") -> None:
        """Run `func` on the online CPUs of `mask`, this one included if it is there."""
        self.on_each_cpu_cond_mask(None, func, wait, mask, cause=cause)

    def on_each_cpu_cond_mask(
        self, cond: Condition | None, func: Function, wait: bool, mask: Collection[int], *, cause: str = "on_each_cpu_cond_mask"
    ) -> None:
        """Run `func` on the online CPUs of `mask` for which `cond` holds; it is asked here, one CPU after the other."""
        if self.design.local_call_meanwhile:
            self._many(mask, func, wait, True, cond, cause)
            return
        chosen = [cpu for cpu in self._online(mask) if cond is None or cond(cpu)]
        this_cpu = self.kernel.cpus.current
        preempt = self.kernel.preempt(this_cpu)
        preempt.add(PREEMPT_OFFSET)
        self._many(chosen, func, wait, False, None, cause)
        if this_cpu in chosen:
            self._run_local(this_cpu, func)
        preempt.add(-PREEMPT_OFFSET)

    def _many(
        self, mask: Collection[int], func: Function, wait: bool, run_local: bool, cond: Condition | None, cause: str
    ) -> None:
        """smp_call_function_many_cond; before v5.13 smp_call_function_many."""
        this_cpu = self.kernel.cpus.current
        preempt = self.kernel.preempt(this_cpu)
        preempt.add(PREEMPT_OFFSET)
        if self.design.warns_irqs_off and self._irqs_disabled(this_cpu) and not self.oops_in_progress():
            self._warn_once("smp_call_function_many:irqs_disabled")
        if not self._in_task(this_cpu):
            self._warn_once("smp_call_function_many_cond" if self.design.local_call_meanwhile else "smp_call_function_many")
        online = self._online(mask)
        others = [cpu for cpu in online if cpu != this_cpu]
        if len(others) == 1 and not self.design.single_ipi_for_one_left:
            self.smp_call_function_single(others[0], func, wait, cause=cause)
            preempt.add(-PREEMPT_OFFSET)
            return
        called = self._queue_on(this_cpu, others, func, wait, cond, cause)
        if run_local and this_cpu in online and (cond is None or cond(this_cpu)):
            self._run_local(this_cpu, func)
        if wait:
            for csd in called:
                self._csd_lock_wait(csd)
        preempt.add(-PREEMPT_OFFSET)

    def _queue_on(
        self, this_cpu: int, others: list[int], func: Function, wait: bool, cond: Condition | None, cause: str
    ) -> list[CallSingleData]:
        """Queue the call on `others` and send the IPIs; the calls to wait for."""
        called: list[CallSingleData] = []
        ipi: list[int] = []
        for cpu in others:
            csd = self._cfd_data[this_cpu][cpu]
            if cond is not None and not cond(cpu):
                if self.design.waits_for_refused:
                    called.append(csd)
                continue
            self._csd_lock(csd)
            csd.sync, csd.func, csd.cause = wait, func, cause
            called.append(csd)
            if self._llist_add(cpu, csd):
                ipi.append(cpu)
        if len(ipi) == 1 and self.design.single_ipi_for_one_left:
            self._send_single(ipi[0], cause)
        else:
            for cpu in ipi:
                self._send(cpu, CALL_FUNCTION_VECTOR, cause)
        return called

    def _generic_exec_single(self, cpu: int, csd: CallSingleData) -> int:
        if cpu == self.kernel.cpus.current:
            csd.locked = False
            self._run_local(cpu, csd.func)
            return 0
        if not 0 <= cpu < self.kernel.cpus.online:
            csd.locked = False
            return -errno.ENXIO
        if self._llist_add(cpu, csd):
            self._send_single(cpu, csd.cause)
        return 0

    def _run_local(self, cpu: int, func: Function) -> None:
        """Run a function on this CPU with interrupts off."""
        registers = self.kernel.cpu_by_number(cpu)
        flags = registers.reg("rflags")
        if flags & X86_EFLAGS_IF:
            registers.set_reg("rflags", flags & ~X86_EFLAGS_IF)
        func(cpu)
        if flags & X86_EFLAGS_IF:
            registers.set_reg("rflags", registers.reg("rflags") | X86_EFLAGS_IF)

    def _online(self, mask: Collection[int]) -> list[int]:
        return sorted(cpu for cpu in mask if 0 <= cpu < self.kernel.cpus.online)

    # ---- to be called

    def call_function_interrupt(self, cpu: int, vector: int) -> None:
        """The handler of CALL_FUNCTION_VECTOR and CALL_FUNCTION_SINGLE_VECTOR, interrupts off."""
        self.counters.received[cpu, vector] += 1
        self.flush_smp_call_function_queue(cpu)

    def flush_smp_call_function_queue(self, cpu: int) -> None:
        """Run what is queued on `cpu`, which is this CPU, interrupts off; calls that come meanwhile get an IPI of their own."""
        queue, self.call_single_queue[cpu] = self.call_single_queue[cpu], []
        self._kicked[cpu] = False
        if self.design.sync_calls_first:
            queue = [*(csd for csd in queue if csd.sync), *(csd for csd in queue if not csd.sync)]
        executing = self._executing[cpu]
        executing += queue
        for csd in queue:
            func, cause, sync, sender = csd.func, csd.cause, csd.sync, csd.sender
            if not sync:
                executing.remove(csd)
                self._csd_unlock(csd)
            self.counters.run[cpu, cause] += 1
            func(cpu)
            if sync:
                executing.remove(csd)
                self._csd_unlock(csd)
            if self.on_done is not None:
                self.on_done(cpu, sender, cause)

    # ---- locks and queues

    def _csd_lock_wait(self, csd: CallSingleData) -> None:
        self.waiting.spin_until(lambda: not csd.locked, WAIT_SITE)

    def _csd_lock(self, csd: CallSingleData) -> None:
        self._csd_lock_wait(csd)
        csd.locked = True

    @staticmethod
    def _csd_unlock(csd: CallSingleData) -> None:
        assert csd.locked, f"call for {csd.cause} is unlocked twice"
        csd.locked = False
        csd.sync = False

    def _llist_add(self, cpu: int, csd: CallSingleData) -> bool:
        queue = self.call_single_queue[cpu]
        csd.sender = self.kernel.cpus.current
        queue.append(csd)
        return len(queue) == 1

    def _send_single(self, cpu: int, cause: str) -> None:
        if self.set_nr_if_polling(cpu):
            self._kicked[cpu] = True
        else:
            self._send(cpu, CALL_FUNCTION_SINGLE_VECTOR, cause)

    def _send(self, cpu: int, vector: int, cause: str) -> None:
        self.counters.sent[self.kernel.cpus.current, cause] += 1
        self._kicked[cpu] = True
        self.kernel.send_ipi(cpu, vector)

    # ---- contexts

    def _irqs_disabled(self, cpu: int) -> bool:
        return not self.kernel.cpu_by_number(cpu).reg("rflags") & X86_EFLAGS_IF

    def _in_task(self, cpu: int) -> bool:
        count = self.kernel.preempt(cpu)
        return not (count.in_nmi or count.in_hardirq or count.in_serving_softirq)

    def _warn_once(self, site: str) -> None:
        if site not in self._warned:
            self._warned.add(site)
            self.kernel.warn(site)

    def validate(self) -> None:
        """Every queued or executing call is locked and stands in one place only; no CPU has calls queued and no IPI on its way.

        The CPUs' own calls are locked only while they are queued or executing.
        """
        seen: set[int] = set()
        for cpu, queue in enumerate(self.call_single_queue):
            assert not queue or self._kicked[cpu], f"CPU {cpu} has {len(queue)} calls and nobody told it"
            for csd in (*queue, *self._executing[cpu]):
                assert csd.locked, f"call for {csd.cause} on CPU {cpu} is not locked"
                assert id(csd) not in seen, f"call for {csd.cause} on CPU {cpu} is queued twice"
                seen.add(id(csd))
        for own in (self._csd_data, *self._cfd_data):
            for csd in own:
                assert not csd.locked or id(csd) in seen, f"call for {csd.cause} is locked and nowhere queued"
