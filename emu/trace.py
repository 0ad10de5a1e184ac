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
class TlbFlushed:
    """The kernel flushed the translations of [start, end) on a CPU; everything when it is the whole address space."""

    cpu: int
    start: int
    end: int


Event = Delivery | FunctionCall | TlbFlushed
Sink = Callable[[Event], None]


def discard(event: Event) -> None:
    """The sink of a run that nobody watches."""
