"""A trace's vmalloc tracepoints as /sys/kernel/tracing/trace prints them.

An instruction of any CPU takes a microsecond: 0.000015 stands behind the 15th since the guest was called. Source: v6.12
kernel/trace/trace.c print_event_info, print_func_help_header_irq; kernel/trace/trace_output.c trace_print_context,
trace_print_lat_fmt, trace_print_time; include/trace/events/vmalloc.h.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.debug.records import AnyRecord, Sampled, Vmalloc

_LEGEND = (
    "_-----=> irqs-off/BH-disabled", "/ _----=> need-resched", "| / _---=> hardirq/softirq", "|| / _--=> preempt-depth",
    "||| / _-=> migrate-disable", "|||| /     delay",
)
_FLAGS_COLUMN = 31


class FtraceWriter:
    """Gives `write` the whole file when it is closed: the header says how many lines follow."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._lines: list[str] = []
        self._cpus = 1

    def __call__(self, record: AnyRecord) -> None:
        """Take a record; all but tracepoints are left out."""
        if isinstance(record, Vmalloc):
            comm = record.comm if record.pid else "<idle>"
            seconds, microseconds = divmod(record.step, 1_000_000)
            self._lines.append(
                f"{comm:>16}-{record.pid:<7d} [{record.cpu:03d}] {record.flags} {seconds:5d}.{microseconds:06d}: {record.name}: "
                f"{record.fields}\n"
            )
        if isinstance(record, Sampled):
            self._cpus = len(record.tlb_entries)
        elif record.cpu >= self._cpus:
            self._cpus = record.cpu + 1

    def close(self) -> None:
        """Write header and lines."""
        count = len(self._lines)
        self._write(f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {count}/{count}   #P:{self._cpus}\n#\n")
        for number, text in enumerate(_LEGEND):
            self._write(f"#{' ' * (_FLAGS_COLUMN - 1 + max(0, 2 - number))}{text}\n")
        self._write("#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n")
        self._write("#              | |         |   |||||     |         |\n")
        for line in self._lines:
            self._write(line)
