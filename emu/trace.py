"""What a run tells about itself: event records and the sink that takes them.

Nothing here imports the rest of the machine. Events are plain data in the order in which they happened; a sink may print, store or
count them, and must not change the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delivery:
    """An exception or interrupt about to be delivered through the IDT; `rip` is what will be pushed."""

    cpu: int
    vector: int
    error: int | None
    rip: int
    cr2: int | None


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A guest called an exported kernel function, and it returned."""

    cpu: int
    name: str
    arguments: tuple[int, ...]
    result: int


@dataclass(frozen=True, slots=True)
class FlushIssued:
    """Kernel code on `cpu` asked for a flush of [start, end), number `flush`, because of C function `cause`, on the CPUs `cpus`."""

    flush: int
    cpu: int
    start: int
    end: int
    cause: str
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TlbFlushed:
    """A CPU has removed the translations of [start, end) for flush number `flush`; everything when that is all of the addresses."""

    cpu: int
    start: int
    end: int
    flush: int = 0


Event = Delivery | FunctionCall | FlushIssued | TlbFlushed
Sink = Callable[[Event], None]


def discard(event: Event) -> None:
    """The sink of a run that nobody watches."""
