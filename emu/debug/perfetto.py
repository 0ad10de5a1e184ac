"""A trace in the Chrome trace-event format (JSON), which ui.perfetto.dev and chrome://tracing open.

- A track for each CPU, in process 1: which thread it runs, and a mark for each IPI sent, taken and answered, with arrows between.
- A track for each thread, in process 2: exported functions under way, exceptions and interrupts handled, and marks for flushes,
  table changes, tracepoints and log lines.
- Counters: TLB entries of each CPU, lazily freed pages, free frames.

Time: an instruction of any CPU takes a microsecond; what happens between two instructions is 1 ns apart, in its order.
Format: "Trace Event Format" (the document of Chrome's trace viewer): events B, E, X, i, s, t, f, C, M.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from emu.debug.records import (
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
    Returned,
    Sampled,
    Stored,
    Switched,
    Vmalloc,
)
from emu.debug.text import vector_name

CPUS, THREADS = 1, 2
_STEP = 1000


class PerfettoWriter:
    """Gives `write` one JSON object, piece by piece. `instructions`: also a slice for each instruction, on its CPU's track."""

    def __init__(self, write: Callable[[str], object], *, instructions: bool = False) -> None:
        self._write = write
        self._instructions = instructions
        self._first = True
        self._now = 0
        self._step = 0
        # What is open on each track (process, thread), innermost last.
        self._open: dict[tuple[int, int], list[str]] = {}
        self._threads: set[int] = set()
        # IPIs that a CPU has taken and not answered: number by sender.
        self._taken: dict[int, dict[int, int]] = {}
        self._senders: dict[int, int] = {}
        self._sample: Sampled | None = None
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Delivered: self._delivered, Returned: self._returned, CallBegun: self._begun, CallEnded: self._ended_call,
            Stored: lambda r: self._mark(r, f"{r.function} changes entries", start=hex(r.start), end=hex(r.end)),
            FlushAsked: lambda r: self._mark(
                r, f"flush {r.number}", cause=r.cause, start=hex(r.start), end=hex(r.end), cpus=list(r.cpus)
            ),
            Flushed: lambda r: self._mark(r, f"flush {r.number} done", start=hex(r.start), end=hex(r.end)),
            IpiSent: self._sent, IpiTaken: self._ipi_taken, CallDone: self._done, Switched: self._switched,
            Logged: lambda r: self._mark(r, r.text or " "),
            Vmalloc: lambda r: self._mark(r, r.name, fields=r.fields, flags=r.flags),
            Sampled: self._sampled, Ended: lambda r: self._mark(r, f"end: {r.ending}"),
        }
        self._write('{"displayTimeUnit": "ns", "traceEvents": [')
        self._name("process_name", CPUS, 0, "CPUs")
        self._name("process_name", THREADS, 0, "threads")

    def __call__(self, record: AnyRecord) -> None:
        """Write a record."""
        if isinstance(record, Executed):
            self._step = record.step
            if self._instructions:
                self._see(record)
                self._emit(
                    "X", record.text, CPUS, record.cpu, record.step, dur=1, args={"rip": hex(record.rip), "symbol": record.symbol}
                )
            return
        handler = self._handlers.get(type(record))
        if handler is not None:
            self._see(record)
            handler(record)

    def close(self) -> None:
        """End what is open, and the object."""
        for (process, thread), names in sorted(self._open.items()):
            while names:
                self._emit("E", names.pop(), process, thread, self._step)
        self._write("\n]}\n")

    # ---- events

    def _emit(self, kind: str, name: str, process: int, thread: int, step: int, **rest: Any) -> None:
        self._now = max(self._now + 1, step * _STEP)
        self._put({"ph": kind, "name": name, "pid": process, "tid": thread, "ts": self._now / _STEP, **rest})

    def _put(self, event: dict[str, Any]) -> None:
        self._write(f"{'' if self._first else ','}\n{json.dumps(event)}")
        self._first = False

    def _name(self, what: str, process: int, thread: int, name: str) -> None:
        self._put({"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}})

    def _see(self, record: AnyRecord) -> None:
        """Name the tracks of a record when they first appear; a CPU runs the thread of its first record."""
        self._step = max(self._step, record.step)
        if (CPUS, record.cpu) not in self._open:
            self._open[CPUS, record.cpu] = []
            self._name("thread_name", CPUS, record.cpu, f"CPU {record.cpu}")
            self._begin(CPUS, record.cpu, record.step, f"{record.comm}/{record.pid}")
        self._track(record.pid, record.cpu, record.comm)

    def _track(self, pid: int, cpu: int, comm: str) -> int:
        """A thread's track. Idle threads all have number 0: theirs are below."""
        track = pid or -1 - cpu
        if track not in self._threads:
            self._threads.add(track)
            self._name("thread_name", THREADS, track, f"{comm}/{pid}" if pid else f"idle on CPU {cpu}")
        return track

    def _begin(self, process: int, thread: int, step: int, name: str, **args: Any) -> None:
        self._open.setdefault((process, thread), []).append(name)
        self._emit("B", name, process, thread, step, args=args)

    def _end(self, process: int, thread: int, step: int, name: str | None = None, **args: Any) -> None:
        """End the innermost slice, or those down to `name`; nothing where there is none."""
        names = self._open.get((process, thread), [])
        if name is not None and name not in names:
            return
        while names:
            ended = names.pop()
            self._emit("E", ended, process, thread, step, args=args if name in (None, ended) else {})
            if name in (None, ended):
                return

    def _mark(self, record: AnyRecord, name: str, **args: Any) -> None:
        track = self._track(record.pid, record.cpu, record.comm)
        self._emit("i", name, THREADS, track, record.step, s="t", args=args)

    def _delivered(self, record: Delivered) -> None:
        args: dict[str, Any] = {"rip": hex(record.rip)}
        if record.error is not None:
            args["error"] = record.error
        if record.cr2 is not None:
            args |= {"cr2": hex(record.cr2), "place": record.place}
        track = self._track(record.pid, record.cpu, record.comm)
        self._begin(THREADS, track, record.step, vector_name(record.vector), **args)

    def _returned(self, record: Returned) -> None:
        self._end(THREADS, self._track(record.pid, record.cpu, record.comm), record.step)

    def _begun(self, record: CallBegun) -> None:
        track = self._track(record.pid, record.cpu, record.comm)
        self._begin(THREADS, track, record.step, record.name, arguments=[hex(value) for value in record.arguments])

    def _ended_call(self, record: CallEnded) -> None:
        track = self._track(record.pid, record.cpu, record.comm)
        self._end(THREADS, track, record.step, record.name, result=hex(record.result))

    def _switched(self, record: Switched) -> None:
        self._end(CPUS, record.cpu, record.step)
        self._begin(CPUS, record.cpu, record.step, f"{record.next_comm}/{record.next_pid}")
        self._track(record.next_pid, record.cpu, record.next_comm)

    # ---- IPIs: a slice for an arrow to begin or end in

    def _arrow(self, kind: str, record: AnyRecord, name: str, number: int) -> None:
        self._emit("X", name, CPUS, record.cpu, record.step, dur=0.002)
        extra = {"bp": "e"} if kind == "f" else {}
        self._emit(kind, "IPI", CPUS, record.cpu, record.step, cat="ipi", id=number, **extra)

    def _sent(self, record: IpiSent) -> None:
        self._senders[record.number] = record.cpu
        self._arrow("s", record, f"IPI {record.number} to CPU {record.to}, {vector_name(record.vector)}", record.number)

    def _ipi_taken(self, record: IpiTaken) -> None:
        for number in record.numbers:
            self._arrow("t", record, f"takes IPI {number}", number)
            self._taken.setdefault(record.cpu, {})[self._senders.get(number, -1)] = number

    def _done(self, record: CallDone) -> None:
        number = self._taken.get(record.cpu, {}).pop(record.sender, None)
        if number is None:
            # It came with an IPI that another call had sent, or was found without one.
            self._emit("X", f"call for {record.cause} done", CPUS, record.cpu, record.step, dur=0.002)
        else:
            self._arrow("f", record, f"call for {record.cause} done", number)

    def _sampled(self, record: Sampled) -> None:
        before, self._sample = self._sample, record
        for cpu, entries in enumerate(record.tlb_entries):
            if before is None or before.tlb_entries[cpu] != entries:
                self._emit("C", f"TLB entries of CPU {cpu}", CPUS, 0, record.step, args={"entries": entries})
        for name, value, old in (
            ("lazy pages", record.lazy_pages, before and before.lazy_pages),
            ("free frames", record.free_frames, before and before.free_frames),
        ):
            if before is None or value != old:
                self._emit("C", name, CPUS, 0, record.step, args={"pages": value})
