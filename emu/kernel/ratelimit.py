"""Limits on how often the kernel says a thing (v6.12 lib/ratelimit.c, include/linux/ratelimit_types.h)."""

from __future__ import annotations

from emu.kernel.printk import KernelLog, LogLevel

_NS_PER_SECOND = 1_000_000_000


class RatelimitState:
    """At most `burst` messages in `interval` seconds of the log's time; `name` is the function that asks."""

    def __init__(self, name: str, interval: int, burst: int) -> None:
        self.name = name
        self.interval = interval * _NS_PER_SECOND
        self.burst = burst
        self.printed = 0
        self.missed = 0
        self.begin: int | None = None

    def allows(self, log: KernelLog) -> bool:
        """___ratelimit(): whether to print now. The first one of a new interval tells how many were kept back in the last."""
        now = log.now()
        if self.begin is None:
            self.begin = now
        if now > self.begin + self.interval:
            if self.missed:
                log.log(LogLevel.WARNING, f"{self.name}: {self.missed} callbacks suppressed")
            self.begin, self.printed, self.missed = now, 0, 0
        if self.printed < self.burst:
            self.printed += 1
            return True
        self.missed += 1
        return False
