"""jiffies, timers and sleeping for a time (v6.12 kernel/time/timer.c).

The wheel itself is not modelled, only what it does to a timer: the farther away, the coarser the tick at which it expires. There is
no periodic tick: a CPU's clock interrupt comes when its first timer is due, and `jiffies` is brought up to date whenever the kernel
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.kernel.completion import MAX_SCHEDULE_TIMEOUT
from emu.kernel.execution import MASK64, Execution
from emu.kernel.softirq import Softirq, Softirqs
from emu.kernel.task_struct import TASK_RUNNING, TASK_UNINTERRUPTIBLE

HZ = 250
NSEC_PER_SEC = 1_000_000_000
TICK_NSEC = NSEC_PER_SEC // HZ
INITIAL_JIFFIES = -300 * HZ & 0xFFFF_FFFF
MAX_JIFFY_OFFSET = ((1 << 63) - 1 >> 1) - 1

# struct timer_list
ENTRY, PPREV, EXPIRES, FUNCTION, FLAGS, SIZE = 0, 8, 16, 24, 32, 40
TIMER_CPUMASK = 0x3FFFF
LIST_POISON2 = 0xDEAD_0000_0000_0122

LVL_DEPTH = 9
_LVL_BITS = 6
_LVL_CLK_SHIFT = 3


def _lvl_start(level: int) -> int:
    return (1 << _LVL_BITS) - 1 << (level - 1) * _LVL_CLK_SHIFT


WHEEL_TIMEOUT_CUTOFF = _lvl_start(LVL_DEPTH)
WHEEL_TIMEOUT_MAX = WHEEL_TIMEOUT_CUTOFF - (1 << (LVL_DEPTH - 1) * _LVL_CLK_SHIFT)


def bucket_expiry(expires: int, clk: int) -> int:
    """The jiffy at which the wheel runs a timer for `expires`, enqueued at `clk` (calc_wheel_index)."""
    delta = expires - clk
    if delta < 0:
        return clk
    level = next((n for n in range(LVL_DEPTH - 1) if delta < _lvl_start(n + 1)), LVL_DEPTH - 1)
    if delta >= WHEEL_TIMEOUT_CUTOFF:
        expires = clk + WHEEL_TIMEOUT_MAX
    shift = level * _LVL_CLK_SHIFT
    # One more, as a timer must not run early: at the finest level too, since a tick may be about to come when it is armed.
    return (expires >> shift) + 1 << shift


def msecs_to_jiffies(milliseconds: int) -> int:
    """Rounded up; a negative int means for ever."""
    milliseconds &= 0xFFFF_FFFF
    return MAX_JIFFY_OFFSET if milliseconds & 0x8000_0000 else -(-milliseconds * HZ // 1000)


def jiffies_to_msecs(ticks: int) -> int:
    """Milliseconds of a number of ticks."""
    return ticks * 1000 // HZ


@dataclass(slots=True, eq=False)
class _Armed:
    """A timer on a CPU's wheel; `function` runs it."""

    key: object
    when: int
    number: int
    cpu: int
    function: Callable[[], None]


class Timers:
    """The timers of one kernel: of guests, by the address of their timer_list, and of the model's own."""

    def __init__(self, execution: Execution, softirqs: Softirqs) -> None:
        self.execution = execution
        self.softirqs = softirqs
        softirqs.actions[Softirq.TIMER] = self._run_timers
        self._armed: dict[object, _Armed] = {}
        self._running: dict[int, object] = {}
        self._clock: dict[int, tuple[int, object]] = {}
        self._number = 0
        # Physical address of the `jiffies` that guests read; None without one.
        self.jiffies_pa: int | None = None

    # ---- time

    @property
    def jiffies(self) -> int:
        """Ticks since INITIAL_JIFFIES, which is 5 minutes before 32 bits overflow."""
        now = INITIAL_JIFFIES + self.execution.waiting.time() // TICK_NSEC
        if self.jiffies_pa is not None:
            self.execution.host.memory.write_u64(self.jiffies_pa, now)
        return now

    # ---- the wheel

    def _arm(self, key: object, expires: int, cpu: int, function: Callable[[], None]) -> None:
        now = self.jiffies
        self._number += 1
        # While a CPU runs its timers, the wheel has turned past this tick.
        when = bucket_expiry(expires, now + (cpu in self._running))
        self._armed[key] = _Armed(key, when, self._number, cpu, function)
        self._program(cpu)

    def _program(self, cpu: int) -> None:
        """Have the CPU's clock interrupt come for its first timer."""
        waiting = self.execution.waiting
        first = min((timer.when for timer in self._armed.values() if timer.cpu == cpu), default=None)
        programmed = self._clock.get(cpu)
        if first is None or (programmed is not None and programmed[0] <= first):
            return
        if programmed is not None:
            waiting.cancel(programmed[1])

        def tick() -> None:
            self._clock.pop(cpu, None)
            self.softirqs.raise_softirq(Softirq.TIMER)

        self._clock[cpu] = (first, waiting.call_at((first - INITIAL_JIFFIES) * TICK_NSEC, tick, cpu))

    def _run_timers(self) -> None:
        """TIMER_SOFTIRQ: run what has expired, oldest first."""
        cpu, now = self.execution.cpu_id, self.jiffies
        while True:
            due = [timer for timer in self._armed.values() if timer.cpu == cpu and timer.when <= now]
            if not due:
                break
            timer = min(due, key=lambda timer: (timer.when, timer.number))
            del self._armed[timer.key]
            self._running[cpu] = timer.key
            try:
                timer.function()
            finally:
                del self._running[cpu]
        self._program(cpu)

    # ---- struct timer_list

    def pending(self, la: int) -> bool:
        """timer_pending()."""
        return bool(self.execution.load64(la + PPREV))

    def init(self, la: int, function: int, flags: int) -> None:
        """init_timer_key()."""
        execution = self.execution
        execution.store64(la + ENTRY, 0)
        execution.store64(la + PPREV, 0)
        execution.store64(la + FUNCTION, function)
        execution.store32(la + FLAGS, flags | execution.cpu_id)

    def mod(self, la: int, expires: int, cpu: int | None = None, *, only_pending: bool = False, reduce: bool = False) -> bool:
        """mod_timer(), mod_timer_pending(), timer_reduce(), and add_timer_on() with `cpu`: whether it was pending."""
        execution = self.execution
        was = self.pending(la)
        if (only_pending and not was) or (reduce and was and execution.load64(la + EXPIRES) <= expires):
            return was
        if not execution.load64(la + FUNCTION):
            # Shut down.
            return False
        flags = execution.load32(la + FLAGS)
        if cpu is None:
            # A timer whose function runs stays where it runs.
            cpu = next((number for number, key in self._running.items() if key == la), execution.cpu_id)
        execution.store64(la + EXPIRES, expires)
        execution.store32(la + FLAGS, flags & ~TIMER_CPUMASK | cpu)
        execution.store64(la + PPREV, la)
        self._armed.pop(la, None)
        self._arm(la, expires, cpu, lambda: self._expire(la))
        return was

    def _expire(self, la: int) -> None:
        execution = self.execution
        self._detach(la)
        execution.waiting.call_guest(execution.load64(la + FUNCTION), la, site="call_timer_fn")

    def _detach(self, la: int) -> None:
        self.execution.store64(la + PPREV, 0)
        self.execution.store64(la + ENTRY, LIST_POISON2)

    def delete(self, la: int) -> bool:
        """timer_delete(): whether it was pending."""
        if not self.pending(la):
            return False
        self._armed.pop(la, None)
        self._detach(la)
        return True

    def is_running(self, la: int) -> bool:
        """Whether a CPU is in the timer's function."""
        return la in self._running.values()

    def try_to_delete_sync(self, la: int) -> int:
        """try_to_del_timer_sync(): -1 while its function runs."""
        self.execution.load64(la + PPREV)
        return -1 if self.is_running(la) else int(self.delete(la))

    def delete_sync(self, la: int, *, shutdown: bool = False) -> bool:
        """timer_delete_sync(), timer_shutdown_sync(): spin while the function runs on another CPU, for ever on this one."""
        while (result := self.try_to_delete_sync(la)) < 0:
            self.execution.spin_until(lambda: not self.is_running(la), f"timer 0x{la:x}")
        if shutdown:
            self.execution.store64(la + FUNCTION, 0)
        return result > 0

    # ---- sleeping for a time

    def sleep(self, ticks: int, reason: str, state: int = TASK_UNINTERRUPTIBLE) -> int:
        """Block once, for at most `ticks`: the ticks left."""
        self.execution.tasks.set_state(self.execution.current(), state)
        return self.schedule_timeout(ticks, reason)

    def schedule_timeout(self, ticks: int, reason: str = "") -> int:
        """schedule_timeout(): sleep in the state that is set, for at most `ticks`: the ticks left.

        Less than 0 is an error that is printed; without a state the thread only lets others run.
        """
        execution = self.execution
        tasks, thread = execution.tasks, execution.current()
        if ticks < 0:
            execution.host.print_lines((f"schedule_timeout: wrong timeout value {ticks & MASK64:x}",))
            tasks.set_state(thread, TASK_RUNNING)
            return 0
        if ticks == MAX_SCHEDULE_TIMEOUT:
            thread.waiting_for = reason or thread.waiting_for
            execution.schedule()
            return ticks
        expires = self.jiffies + ticks
        key = object()

        def wake() -> None:
            tasks.try_to_wake_up(thread)

        self._arm(key, expires, execution.cpu_id, wake)
        thread.waiting_for = reason or f"{ticks} ticks"
        try:
            execution.schedule()
        finally:
            self._armed.pop(key, None)
        return max(expires - self.jiffies, 0)

    def msleep(self, milliseconds: int, extra: int = 0) -> None:
        """msleep(); `extra` ticks are 1 up to v6.11."""
        left = msecs_to_jiffies(milliseconds) + extra
        while left:
            left = self.sleep(left, f"msleep({milliseconds & 0xFFFF_FFFF})")

    def sleep_ns(self, nanoseconds: int, reason: str) -> None:
        """Sleep for a time by the clock rather than by ticks (usleep_range, hrtimers)."""
        execution = self.execution
        waiting, thread = execution.waiting, execution.current()
        until = waiting.time() + nanoseconds

        def wake() -> None:
            execution.tasks.wake(thread)

        handle = waiting.call_at(until, wake, execution.cpu_id)
        try:
            execution.sleep_until(lambda: waiting.time() >= until, reason)
        finally:
            waiting.cancel(handle)

    def delay(self, nanoseconds: int) -> None:
        """udelay() and its kin: keep the CPU busy."""
        execution = self.execution
        waiting = execution.waiting
        until = waiting.time() + nanoseconds
        handle = waiting.call_at(until, lambda: None, execution.cpu_id)
        try:
            execution.spin_until(lambda: waiting.time() >= until, f"udelay, {nanoseconds} ns")
        finally:
            waiting.cancel(handle)

    def validate(self) -> None:
        """Every timer of a guest on the wheel is pending in its memory, and each CPU's interrupt comes for its first timer."""
        for key, timer in self._armed.items():
            assert not isinstance(key, int) or self.pending(key), "a timer on the wheel has pprev"
            assert self._clock[timer.cpu][0] <= timer.when, "the clock interrupt is not later than the first timer"
