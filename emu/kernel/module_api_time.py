"""Exported functions: jiffies, timers, sleeping and delays, the clock (v6.12 kernel/time)."""

from __future__ import annotations

from random import Random

from emu.kernel.guest_exports import GuestExports, c_long, c_unsigned
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.sync import Sync
from emu.kernel.timer import jiffies_to_msecs, msecs_to_jiffies

# Up to v6.11 msleep() adds a tick, because timers could run early.
_MSLEEP_EXTRA = {"6.12": 0, "6.1": 1, "5.4": 1}
_NSEC_PER_USEC = 1000


class TimeExports:
    """Time in one kernel, for modules."""

    def __init__(self, exports: GuestExports, sync: Sync) -> None:
        self.exports = exports
        self.sync = sync
        self._jiffies()
        self._timers()
        self._sleeping(_MSLEEP_EXTRA[exports.kernel.profile.name])
        self._clock()

    def _jiffies(self) -> None:
        export, kernel, timers = self.exports.export, self.exports.kernel, self.sync.timers
        la = kernel.symbols.add_data("jiffies_64", 8, exported=True)
        kernel.symbols.add_alias("jiffies", "jiffies_64")
        timers.jiffies_pa = kernel.layout.pa(la)
        export("get_jiffies_64", lambda: timers.jiffies, 0)
        export("__msecs_to_jiffies", msecs_to_jiffies, 1)
        export("__usecs_to_jiffies", lambda us: msecs_to_jiffies(-(-c_unsigned(us) // 1000)), 1)
        export("jiffies_to_msecs", lambda ticks: jiffies_to_msecs(ticks) & 0xFFFF_FFFF, 1)
        export("jiffies_to_usecs", lambda ticks: jiffies_to_msecs(ticks) * 1000 & 0xFFFF_FFFF, 1)

    def _timers(self) -> None:
        export, timers, kernel = self.exports.export, self.sync.timers, self.exports.kernel

        def init(la: int, function: int, flags: int, name: int, key: int) -> None:
            timers.init(la, function, c_unsigned(flags))

        def add(la: int) -> None:
            if timers.pending(la):
                kernel.vmalloc.warn_once("add_timer")
                return
            timers.mod(la, self.sync.execution.load64(la + 16))

        def add_on(la: int, cpu: int) -> None:
            number = c_unsigned(cpu)
            if timers.pending(la):
                kernel.vmalloc.warn_once("add_timer_on")
                return
            timers.mod(la, self.sync.execution.load64(la + 16), number if number < kernel.cpus.online else None)

        export("init_timer_key", init, 5)
        export("add_timer", add, 1)
        export("add_timer_on", add_on, 2, gpl=True)
        export("mod_timer", lambda la, expires: int(timers.mod(la, expires)), 2)
        export("mod_timer_pending", lambda la, expires: int(timers.mod(la, expires, only_pending=True)), 2)
        export("timer_reduce", lambda la, expires: int(timers.mod(la, expires, reduce=True)), 2)
        export("timer_delete", lambda la: int(timers.delete(la)), 1)
        export("timer_delete_sync", lambda la: int(timers.delete_sync(la)), 1)
        export("try_to_del_timer_sync", timers.try_to_delete_sync, 1)
        export("timer_shutdown_sync", lambda la: int(timers.delete_sync(la, shutdown=True)), 1, gpl=True)
        for old, new in (("del_timer", "timer_delete"), ("del_timer_sync", "timer_delete_sync")):
            # Their names up to v6.1, and inline functions since.
            kernel.symbols.add_alias(old, new)

    def _sleeping(self, extra: int) -> None:
        export, timers = self.exports.export, self.sync.timers

        def usleep_range(least: int, most: int) -> None:
            timers.sleep_ns(least * _NSEC_PER_USEC, f"usleep_range({least}, {most})")

        def udelay(microseconds: int) -> None:
            timers.delay(microseconds * _NSEC_PER_USEC)

        def const_udelay(loops: int) -> None:
            # The argument is microseconds * 2**32 / 10**6 (arch/x86/include/asm/delay.h).
            timers.delay(loops * 1_000_000 * _NSEC_PER_USEC >> 32)

        def sleep_interruptible(milliseconds: int) -> int:
            timers.msleep(milliseconds, extra)
            return 0

        export("msleep", lambda ms: timers.msleep(ms, extra), 1)
        export("msleep_interruptible", sleep_interruptible, 1)
        export("usleep_range_state", lambda least, most, state: usleep_range(least, most), 3)
        export("usleep_range", usleep_range, 2)
        export("__udelay", udelay, 1)
        export("__ndelay", lambda ns: timers.delay(ns), 1)
        export("__const_udelay", const_udelay, 1)

    def _clock(self) -> None:
        export, waiting = self.exports.export, self.sync.execution.waiting
        for name in ("ktime_get", "ktime_get_raw", "ktime_get_mono_fast_ns"):
            export(name, waiting.time, 0, gpl=True)
        export("ktime_get_seconds", lambda: waiting.time() // 1_000_000_000, 0, gpl=True)
        export("sched_clock", waiting.time, 0)


class RandomExports:
    """Random numbers, the same for the same seed; and what a module's parameters refer to (kernel/params.c)."""

    def __init__(self, exports: GuestExports) -> None:
        export, kernel = exports.export, exports.kernel
        # Its own generator, so that numbers drawn here change nothing else; oops_id is the first thing that a seed decides.
        random = Random(kernel.oops_state.oops_id)

        def get_random_bytes(la: int, size: int) -> None:
            while size > 0:
                step = min(size, PAGE_SIZE - la % PAGE_SIZE)
                kernel.cpu.write(la, random.randbytes(step))
                la += step
                size -= step

        for bits in (8, 16, 32, 64):
            export(f"get_random_u{bits}", lambda bits=bits: random.getrandbits(bits), 0)
        export("__get_random_u32_below", lambda ceil: random.randrange(max(c_unsigned(ceil), 1)), 1)
        export("get_random_bytes", lambda la, size: get_random_bytes(la, max(c_long(size), 0)), 2)
        for name in ("bool", "int", "uint", "long", "ulong", "short", "ushort", "byte", "charp"):
            kernel.symbols.add_data(f"param_ops_{name}", 32, exported=True)
