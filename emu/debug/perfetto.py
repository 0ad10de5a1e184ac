"""A trace in the Chrome trace-event format (JSON), which ui.perfetto.dev and chrome://tracing open; docs/perfetto.md tells of it.

- A track for each CPU: which thread it runs, and a mark for each IPI sent, taken and answered, with arrows between them.
- A track for each thread: exported functions under way, exceptions and interrupts handled, and marks for flushes, table changes,
  tracepoints and log lines.
- Counters: TLB entries of each CPU, lazily freed pages, free frames.

Time: an instruction of any CPU takes a microsecond; what happens between two instructions is nanoseconds apart, in its order.
Format: "Trace Event Format", the document of Chrome's trace viewer: events B, E, X, i, s, t, f, C, M. What is written besides is
chosen so that Perfetto's importer of it (src/trace_processor/importers/json) takes everything in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

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
from emu.kernel.smp import CALL_FUNCTION_SINGLE_VECTOR, CALL_FUNCTION_VECTOR

CPUS, THREADS = 1, 2
# Perfetto looks names of tracks up by tid alone: no thread has a number from PID_MAX_LIMIT on, so these are nobody else's.
CPU_TRACK = 1 << 22
IDLE_TRACK = CPU_TRACK + 4096
# Nanoseconds: of an instruction, of a mark that an arrow begins or ends in, and to the next event. Perfetto cuts off what a
# double lacks to a nanosecond, so that an event may come one earlier: the next begins behind the mark all the same.
STEP, MARK, AFTER_MARK = 1000, 3, 4
# Handlers that never return would nest for ever; Perfetto shows 512 levels.
DEEPEST = 100
# IPIs that a filter keeps from being seen taken.
MOST_PENDING = 4096
CALLS = (CALL_FUNCTION_VECTOR, CALL_FUNCTION_SINGLE_VECTOR)
IPI_NAMES = {CALL_FUNCTION_VECTOR: "call function", CALL_FUNCTION_SINGLE_VECTOR: "call function single", 0xFD: "reschedule"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _Track:
    """What is open on a track, innermost last: categories and names. `deeper` handlers are not shown."""

    __slots__ = ("deeper", "open")

    def __init__(self) -> None:
        self.open: list[tuple[str, str]] = []
        self.deeper = 0


class PerfettoWriter:
    """Gives `write` one JSON object, piece by piece. `instructions`: also a slice for each instruction, on its CPU's track."""

    def __init__(self, write: Callable[[str], object], *, instructions: bool = False) -> None:
        self._write = write
        self._encode = msgspec.json.Encoder().encode
        self._instructions = instructions
        self._first = True
        # Nanoseconds of the last event, and how many to the next.
        self._now, self._gap = 0, 1
        self._step = 0
        # By process and tid.
        self._tracks: dict[tuple[int, int], _Track] = {}
        # Senders of IPIs under way by number; of what a CPU took last, the calls not yet answered: number by sender.
        self._senders: dict[int, int] = {}
        self._taken: dict[int, dict[int, int]] = {}
        self._sample: Sampled | None = None
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Delivered: self._delivered, Returned: self._returned, CallBegun: self._begun, CallEnded: self._ended_call,
            Stored: lambda r: self._mark(r, "table", f"{r.function} changes entries", start=hex(r.start), end=hex(r.end)),
            FlushAsked: lambda r: self._mark(
                r, "flush", f"flush {r.number}", cause=r.cause, start=hex(r.start), end=hex(r.end), cpus=list(r.cpus)
            ),
            Flushed: lambda r: self._mark(r, "flushed", f"flush {r.number} done", start=hex(r.start), end=hex(r.end)),
            IpiSent: self._sent, IpiTaken: self._ipi_taken, CallDone: self._done, Switched: self._switched,
            Logged: lambda r: self._mark(r, "printk", _clean(r.text) or " "),
            Vmalloc: lambda r: self._mark(r, "tracepoint", r.name, fields=r.fields, flags=r.flags),
            Sampled: self._sampled, Ended: lambda r: self._mark(r, "end", f"end: {r.ending}"),
        }
        self._write('{"traceEvents": [')
        self._name("process_name", CPUS, CPUS, "CPUs")
        self._name("process_name", THREADS, THREADS, "threads")

    def __call__(self, record: AnyRecord) -> None:
        """Write a record."""
        self._step = max(self._step, record.step)
        if isinstance(record, Executed):
            if self._instructions:
                self._cpu(record)
                self._executed(record)
            return
        handler = self._handlers.get(type(record))
        if handler is not None:
            self._cpu(record)
            handler(record)

    def close(self) -> None:
        """End what is open, and the object."""
        for (process, tid), track in sorted(self._tracks.items()):
            while track.open:
                self._emit("E", *track.open.pop(), process, tid, self._step)
        self._write("\n]}\n")

    # ---- events

    def _emit(
        self, kind: str, category: str, name: str, process: int, tid: int, step: int, args: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self._now = max(self._now + self._gap, step * STEP)
        self._gap = AFTER_MARK if "dur" in rest else 1
        event = {"ph": kind, "cat": category, "name": name, "pid": process, "tid": tid, "ts": self._now / 1000, **rest}
        if args:
            event["args"] = args
        self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        self._write(f"{'' if self._first else ','}\n{self._encode(event).decode()}")
        self._first = False

    def _name(self, what: str, process: int, tid: int, name: str) -> None:
        self._put({"ph": "M", "name": what, "pid": process, "tid": tid, "args": {"name": _clean(name)}})

    def _executed(self, record: Executed) -> None:
        """The microsecond before the step that counts the instruction, as far as other events leave it."""
        start = max(self._now + self._gap, (record.step - 1) * STEP)
        end = max(start + 1, record.step * STEP - 1)
        self._put({
            "ph": "X", "cat": "instruction", "name": record.text, "pid": CPUS, "tid": CPU_TRACK + record.cpu, "ts": start / 1000,
            "dur": (end - start) / 1000, "args": {"rip": hex(record.rip), "symbol": record.symbol},
        })
        self._now, self._gap = end, 1

    def _cpu(self, record: AnyRecord) -> None:
        """Name a CPU's track when it first appears; the CPU runs the thread of its first record."""
        tid = CPU_TRACK + record.cpu
        if (CPUS, tid) not in self._tracks:
            self._tracks[CPUS, tid] = _Track()
            self._name("thread_name", CPUS, tid, f"CPU {record.cpu}")
            self._begin(CPUS, tid, record.step, "thread", _thread(record.pid, record.comm, record.cpu))
            self._thread(record.pid, record.cpu, record.comm)

    def _thread(self, pid: int, cpu: int, comm: str) -> int:
        """The tid of a thread's track. Idle threads all have number 0."""
        tid = pid or IDLE_TRACK + cpu
        if (THREADS, tid) not in self._tracks:
            self._tracks[THREADS, tid] = _Track()
            self._name("thread_name", THREADS, tid, _thread(pid, comm, cpu))
        return tid

    def _track(self, record: AnyRecord) -> int:
        return self._thread(record.pid, record.cpu, record.comm)

    def _begin(self, process: int, tid: int, step: int, category: str, name: str, **args: Any) -> None:
        name = _clean(name)
        self._tracks[process, tid].open.append((category, name))
        self._emit("B", category, name, process, tid, step, args=args)

    def _end(self, process: int, tid: int, step: int, category: str, name: str | None = None, **args: Any) -> None:
        """End the innermost slice of this category, and name if given, and those in it; nothing where there is none."""
        slices = self._tracks[process, tid].open
        fits = [at for at, slice in enumerate(slices) if slice[0] == category and name in (None, slice[1])]
        if not fits:
            return
        while len(slices) > fits[-1] + 1:
            self._emit("E", *slices.pop(), process, tid, step)
        self._emit("E", *slices.pop(), process, tid, step, args=args)

    def _mark(self, record: AnyRecord, category: str, name: str, **args: Any) -> None:
        self._emit("i", category, name, THREADS, self._track(record), record.step, s="t", args=args)

    def _delivered(self, record: Delivered) -> None:
        args: dict[str, Any] = {"rip": hex(record.rip)}
        if record.error is not None:
            args["error"] = record.error
        if record.cr2 is not None:
            args |= {"cr2": hex(record.cr2), "place": _clean(record.place)}
        tid, name = self._track(record), _vector(record.vector)
        track = self._tracks[THREADS, tid]
        if len(track.open) < DEEPEST:
            self._begin(THREADS, tid, record.step, "handler", name, **args)
        else:
            track.deeper += 1
            self._mark(record, "handler", name, **args)

    def _returned(self, record: Returned) -> None:
        tid = self._track(record)
        track = self._tracks[THREADS, tid]
        if track.deeper:
            track.deeper -= 1
        else:
            self._end(THREADS, tid, record.step, "handler")

    def _begun(self, record: CallBegun) -> None:
        arguments = [hex(value) for value in record.arguments]
        self._begin(THREADS, self._track(record), record.step, "call", record.name, depth=record.depth, arguments=arguments)

    def _ended_call(self, record: CallEnded) -> None:
        self._end(THREADS, self._track(record), record.step, "call", record.name, result=hex(record.result))

    def _switched(self, record: Switched) -> None:
        tid = CPU_TRACK + record.cpu
        self._end(CPUS, tid, record.step, "thread")
        self._begin(CPUS, tid, record.step, "thread", _thread(record.next_pid, record.next_comm, record.cpu))
        self._thread(record.next_pid, record.cpu, record.next_comm)

    # ---- IPIs: an arrow begins and ends in a short slice

    def _short(self, record: AnyRecord, name: str, arrow: str = "", number: int = 0) -> None:
        process, tid = CPUS, CPU_TRACK + record.cpu
        self._emit("X", "ipi", name, process, tid, record.step, dur=MARK / 1000)
        if arrow:
            start = self._now
            self._put({
                "ph": arrow, "name": "IPI", "cat": "ipi", "id": number, "pid": process, "tid": tid, "ts": (start + 1) / 1000,
                **({} if arrow == "s" else {"bp": "e"}),
            })

    def _sent(self, record: IpiSent) -> None:
        self._senders[record.number] = record.cpu
        if len(self._senders) > MOST_PENDING:
            del self._senders[next(iter(self._senders))]
        self._short(record, f"send IPI {record.number} ({_vector(record.vector)}) to CPU {record.to}", "s", record.number)

    def _ipi_taken(self, record: IpiTaken) -> None:
        """A call's arrow goes on to its answer; others end here."""
        answered = record.vector in CALLS
        if answered:
            self._taken[record.cpu] = {}
        for number in record.numbers:
            name, sender = f"take IPI {number} ({_vector(record.vector)})", self._senders.pop(number, None)
            if sender is None:
                self._short(record, name)
                continue
            self._short(record, name, "t" if answered else "f", number)
            if answered:
                self._taken[record.cpu][sender] = number

    def _done(self, record: CallDone) -> None:
        """The first call of a sender since the CPU took its IPI answers it; others came with it, or without one."""
        number = self._taken.get(record.cpu, {}).pop(record.sender, None)
        name = f"{record.cause} done for CPU {record.sender}"
        if number is None:
            self._short(record, name)
        else:
            self._short(record, name, "f", number)

    # ---- counters: Perfetto names a counter's track by the event and the key

    def _sampled(self, record: Sampled) -> None:
        before, self._sample = self._sample, record
        entries = {f"CPU {cpu}": count for cpu, count in enumerate(record.tlb_entries)}
        if before is None or before.tlb_entries != record.tlb_entries:
            self._count(record, "TLB entries of", entries)
        if before is None or before.lazy_pages != record.lazy_pages:
            self._count(record, "lazy", {"pages": record.lazy_pages})
        if before is None or before.free_frames != record.free_frames:
            self._count(record, "free", {"frames": record.free_frames})

    def _count(self, record: Sampled, name: str, values: dict[str, int]) -> None:
        self._emit("C", "counter", name, CPUS, CPUS, record.step, args=values)


def _thread(pid: int, comm: str, cpu: int) -> str:
    return f"{comm}/{pid}" if pid else f"idle on CPU {cpu}"


def _vector(vector: int) -> str:
    return IPI_NAMES.get(vector) or vector_name(vector)


def _clean(text: str) -> str:
    """Text without control characters: Perfetto's importer takes neither them nor \\u escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
