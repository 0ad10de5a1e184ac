"""A trace as text: an instruction a line, its accesses and their walks below it, the events between.

The layout is that of docs/trace.md. A line is put together in 2 us: what an instruction shows every time is formatted once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emu.debug.records import (
    Accessed,
    AnyRecord,
    CallBegun,
    CallDone,
    CallEnded,
    Delivered,
    Ended,
    Executed,
    FlushAsked,
    Flushed,
    IpiSent,
    IpiTaken,
    Logged,
    Record,
    Returned,
    Sampled,
    Stored,
    Switched,
    Vmalloc,
)
from emu.guest.directives import VECTOR_NAMES

_INDENT = " " * 36
_SIZES = {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}
_RESET = "\x1b[0m"
# By what is shown: SGR codes that are legible on light and dark backgrounds.
_COLORS = {
    "instruction": "", "access": "\x1b[2m", "miss": "\x1b[33m", "stale": "\x1b[35;1m", "failed": "\x1b[31;1m",
    "delivery": "\x1b[31;1m", "call": "\x1b[36m", "flush": "\x1b[34m", "switch": "\x1b[32m", "log": "\x1b[1m", "event": "\x1b[34m",
}


def vector_name(vector: int) -> str:
    """ "#PF" and its like; "vector 0xfc" for an interrupt."""
    return VECTOR_NAMES.get(vector, f"vector {vector:#x}")


class TextWriter:
    """Gives `write` the lines of a trace, newline included.

    `color`: with SGR codes. `counters`: also what was sampled. `walks` false: no walks but those of failed accesses, and no
    accesses of deliveries.
    """

    def __init__(
        self, write: Callable[[str], object], *, color: bool = False, counters: bool = False, walks: bool = True
    ) -> None:
        self._write = write
        self._walks = walks
        self._color = color
        self._heads: dict[tuple[int, int, str], str] = {}
        self._codes: dict[tuple[int, str], str] = {}
        self._events: dict[type[Any], Callable[[Any], str]] = {
            Delivered: self._delivered,
            Returned: lambda r: self._line("delivery", r, f"iret to {r.rip:#x}"),
            CallBegun: self._begun,
            CallEnded: lambda r: self._line("call", r, f"{'  ' * r.depth}{r.name} returns {r.result:#x}"),
            Stored: lambda r: self._line("flush", r, f"{r.function} changes the entries of {r.start:#x}-{r.end:#x}"),
            FlushAsked: self._flush,
            Flushed: lambda r: self._line("flush", r, f"flush {r.number} is done here: {_range(r.start, r.end)}"),
            IpiSent: lambda r: self._line("event", r, f"IPI {r.number} to CPU {r.to}, {vector_name(r.vector)}"),
            IpiTaken: lambda r: self._line(
                "event", r, f"takes IPI {', '.join(map(str, r.numbers))} as {vector_name(r.vector)}"
            ),
            CallDone: lambda r: self._line("event", r, f"has run the call of CPU {r.sender} for {r.cause}"),
            Switched: lambda r: self._line("switch", r, f"switch to {r.next_comm}/{r.next_pid}"),
            Logged: lambda r: self._line("log", r, f"printk: {r.text}"),
            Vmalloc: lambda r: self._line("event", r, f"{r.name}: {r.fields}"),
            Ended: lambda r: self._line("log", r, _ending(r)),
        }
        if counters:
            self._events[Sampled] = lambda r: self._line(
                "event", r, f"TLB entries {' '.join(map(str, r.tlb_entries))}, lazy pages {r.lazy_pages}, free frames "
                f"{r.free_frames}",
            )

    def __call__(self, record: AnyRecord) -> None:
        """Write a record."""
        if type(record) is Executed:
            place = record.cpu, record.pid, record.comm
            head = self._heads.get(place) or self._head(record)
            known = record.rip, record.code
            code = self._codes.get(known) or self._code(record)
            if record.fault or record.accesses:
                self._write(f"{head}{record.step:9d}: {code}{self._accesses(record)}")
            else:
                self._write(f"{head}{record.step:9d}: {code}")
            return
        event = self._events.get(type(record))
        if event is not None:
            self._write(event(record))

    def close(self) -> None:
        """Nothing is left to write."""

    # ---- instructions

    def _head(self, record: Record) -> str:
        head = self._heads[record.cpu, record.pid, record.comm] = f"{f'{record.comm}-{record.pid}':>20} [{record.cpu:03d}] "
        return head

    def _code(self, record: Executed) -> str:
        symbol = f" <{record.symbol}>" if record.symbol else ""
        text = f"{record.rip:016x}{symbol} {record.code:<14} {record.text}\n"
        self._codes[record.rip, record.code] = text
        return text

    def _accesses(self, record: Executed) -> str:
        text = "".join([self._access(access) for access in record.accesses])
        return f"{text}{_INDENT}{self._painted('failed', 'did not complete')}\n" if record.fault else text

    def _access(self, access: Accessed) -> str:
        kind = "fetch" if access.fetch else "write" if access.write else "read"
        if access.failed:
            line = self._painted("failed", f"{kind} {access.la:016x} fails, TLB {access.tlb}; {access.place}")
        else:
            value = "" if access.fetch or not access.size else f" = {access.value:#x}"
            size = f" {access.size}" if access.size else ""
            line = (
                f"{kind}{size} {access.la:016x}{value} TLB {access.tlb} {_SIZES.get(access.page_size, '?')} "
                f"{'|'.join(access.bits)} pa {access.pa:x}; {access.place}; {access.owner}"
            )
            if self._color:
                line = self._painted(access.tlb if access.tlb in _COLORS else "access", line)
        if not access.walk or not (self._walks or access.failed):
            return f"{_INDENT}{line}\n"
        return f"{_INDENT}{line}\n" + "".join([
            f"{_INDENT}  {one.level}[{one.index}] at {one.pa:x} = {one.value:016x} {'|'.join(one.bits) or 'not present'}\n"
            for one in access.walk
        ])

    # ---- events

    def _line(self, kind: str, record: Record, text: str) -> str:
        head = self._heads.get((record.cpu, record.pid, record.comm)) or self._head(record)
        return f"{head}{record.step:9d}: {self._painted(kind, text)}\n"

    def _painted(self, kind: str, text: str) -> str:
        return f"{_COLORS[kind]}{text}{_RESET}" if self._color and _COLORS[kind] else text

    def _delivered(self, record: Delivered) -> str:
        error = "" if record.error is None else f" error {record.error:#06x}"
        address = "" if record.cr2 is None else f" at {record.cr2:#x}, {record.place}"
        line = self._line("delivery", record, f"{vector_name(record.vector)}{error} from {record.rip:#x}{address}")
        return line + "".join([self._access(access) for access in record.accesses if self._walks or access.failed])

    def _begun(self, record: CallBegun) -> str:
        arguments = ", ".join(f"{value:#x}" for value in record.arguments)
        return self._line("call", record, f"{'  ' * record.depth}{record.name}({arguments})")

    def _flush(self, record: FlushAsked) -> str:
        cpus = ", ".join(map(str, record.cpus))
        return self._line(
            "flush", record, f"{record.cause} asks for flush {record.number} of {_range(record.start, record.end)} on CPU {cpus}"
        )


def _range(start: int, end: int) -> str:
    return "all addresses" if end - start >> 64 else f"{start:#x}-{end:#x}"


def _ending(record: Ended) -> str:
    return f"returned {record.returned:#x}" if record.returned is not None else f"ended by {record.ending}"
