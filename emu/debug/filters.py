"""What of a trace is shown: filters, triggers, and the last instructions before a finding.

Each takes records and passes some of them on, unchanged, in their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from emu.debug.records import Accessed, AnyRecord, CallBegun, Delivered, Ended, Executed, Logged, Sampled

Take = Callable[[AnyRecord], None]
ONLY = ("instructions", "memory", "misses", "stale", "events")
# How the kernel's and the machine's own reports begin.
FINDINGS = (
    "BUG: ", "WARNING: ", "kernel BUG at ", "Oops: ", "PANIC: ", "Kernel panic", "traps: PANIC", "general protection fault",
    "double fault", "vmemu: ", "int3: ", "invalid opcode: ", "divide error: ",
)


class BadTrigger(ValueError):
    """A trigger that cannot be understood."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to show: records of these CPUs (none: of all), steps [first, last], instructions in the ranges [start, end) and under
    the symbols (shell patterns), accesses whose place or owner contains one of `areas`, and `only` the kind of ONLY ("": all).
    """

    cpus: frozenset[int] = frozenset()
    steps: tuple[int, int | None] = (0, None)
    ranges: tuple[tuple[int, int], ...] = ()
    symbols: tuple[str, ...] = ()
    areas: tuple[str, ...] = ()
    only: str = ""

    @property
    def everything(self) -> bool:
        """Nothing is left out."""
        return self == Selection()


class Filter:
    """Passes on to `take` what a selection holds. Of an instruction only those accesses are left that it holds."""

    def __init__(self, selection: Selection, take: Take) -> None:
        self._selection = selection
        self._take = take
        self._narrow = bool(selection.ranges or selection.symbols or selection.areas)
        self._by_access = bool(selection.areas) or selection.only in ("memory", "misses", "stale")
        self._symbols: dict[str, bool] = {}

    def __call__(self, record: AnyRecord) -> None:
        """Pass a record on if it is selected."""
        chosen = self._selection
        if chosen.cpus and record.cpu not in chosen.cpus and not isinstance(record, Ended):
            return
        first, last = chosen.steps
        if record.step < first or (last is not None and record.step > last):
            return
        if isinstance(record, Executed):
            self._instruction(record)
        elif chosen.only == "events" or not (self._narrow or chosen.only):
            self._take(record)

    def _instruction(self, record: Executed) -> None:
        chosen = self._selection
        if chosen.only == "events":
            return
        if chosen.ranges and not any(start <= record.rip < end for start, end in chosen.ranges):
            return
        if chosen.symbols and not self._matches(record.symbol):
            return
        if not self._by_access:
            self._take(record)
            return
        accesses = tuple([access for access in record.accesses if self._wants(access)])
        if accesses:
            self._take(record if len(accesses) == len(record.accesses) else msgspec.structs.replace(record, accesses=accesses))

    def _matches(self, symbol: str) -> bool:
        known = self._symbols.get(symbol)
        if known is None:
            name = symbol.partition("+")[0]
            known = self._symbols[symbol] = any(fnmatchcase(name, pattern) for pattern in self._selection.symbols)
        return known

    def _wants(self, access: Accessed) -> bool:
        only, areas = self._selection.only, self._selection.areas
        if only == "misses" and not (access.tlb in ("miss", "none") or access.failed):
            return False
        if only == "stale" and access.tlb != "stale":
            return False
        return not areas or any(area in access.place or area in access.owner for area in areas)


class Trigger:
    """When to begin or end, from its text:

    step:N (N instructions are complete), 0xADDRESS (an instruction there), call:NAME (an exported function), access:ADDRESS,
    log:TEXT (in a line of the kernel log), fault (any exception), or the name of a symbol that an instruction stands at.
    Raises BadTrigger.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        kind, colon, rest = text.partition(":")
        if colon and kind in ("step", "access"):
            self._kind, self._number, self._text = kind, _number(rest, text), ""
        elif colon and kind in ("call", "log") and rest:
            self._kind, self._number, self._text = kind, 0, rest
        elif text == "fault":
            self._kind, self._number, self._text = "fault", 0, ""
        elif text[:1].isdigit():
            self._kind, self._number, self._text = "rip", _number(text, text), ""
        elif text and not colon:
            self._kind, self._number, self._text = "symbol", 0, text
        else:
            raise BadTrigger(
                f"trigger is {text!r}; it must be step:N, 0xADDRESS, a symbol, call:NAME, access:ADDRESS, log:TEXT or fault"
            )

    def fires(self, record: AnyRecord) -> bool:
        """Whether this record is the one."""
        kind = self._kind
        if kind == "step":
            return record.step >= self._number
        if isinstance(record, Executed):
            if kind == "rip":
                return record.rip == self._number
            if kind == "symbol":
                name, _, rest = record.symbol.partition("+")
                return name == self._text and rest.startswith("0x0/")
            if kind == "access":
                return any(access.la <= self._number < access.la + max(access.size, 1) for access in record.accesses)
        if isinstance(record, CallBegun):
            return kind == "call" and record.name == self._text
        if isinstance(record, Logged):
            return kind == "log" and self._text in record.text
        return isinstance(record, Delivered) and kind == "fault" and record.vector < 32


class Triggered:
    """Passes on what comes from the record that `start` fires at to the one that `stop` fires at, both included."""

    def __init__(self, start: Trigger | None, stop: Trigger | None, take: Take) -> None:
        self._start, self._stop, self._take = start, stop, take
        self.started = start is None
        self.stopped = False

    def __call__(self, record: AnyRecord) -> None:
        """Pass a record on between the two."""
        if self.stopped:
            return
        if not self.started:
            assert self._start is not None, "it waits for a trigger"
            self.started = self._start.fires(record)
            if not self.started:
                return
        self._take(record)
        if self._stop is not None:
            self.stopped = self._stop.fires(record)

    def never_fired(self) -> Sequence[str]:
        """The triggers that the whole run did not fire."""
        missing = [] if self.started or self._start is None else [self._start.text]
        return missing if self.stopped or self._stop is None else [*missing, self._stop.text]


class Last:
    """Passes on the last `count` instructions before the first finding with what happened between them, and the log from there.

    A finding is a report of the kernel, of TLBSan or of the machine in the kernel log. Without one, the end of the run counts.
    """

    def __init__(self, count: int, take: Take) -> None:
        self._count, self._take = count, take
        self._kept: deque[AnyRecord] = deque()
        self._instructions = 0
        self._found = False

    def __call__(self, record: AnyRecord) -> None:
        """Keep a record, or pass on what was kept."""
        if self._found:
            if isinstance(record, Logged | Ended):
                self._take(record)
            return
        if isinstance(record, Sampled):
            return
        if isinstance(record, Ended) or (isinstance(record, Logged) and record.text.startswith(FINDINGS)):
            self._found = True
            for kept in self._kept:
                self._take(kept)
            self._kept.clear()
            self._take(record)
            return
        self._kept.append(record)
        if isinstance(record, Executed):
            self._instructions += 1
            while self._instructions > self._count:
                self._instructions -= isinstance(self._kept.popleft(), Executed)


def _number(text: str, whole: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise BadTrigger(f"trigger is {whole!r}; {text!r} is not a number") from None
    if not 0 <= value < 1 << 64:
        raise BadTrigger(f"trigger is {whole!r}; {text} is not a 64-bit number")
    return value
