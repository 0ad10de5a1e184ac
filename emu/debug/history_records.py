"""What a history consists of, and how it is made of what the recorder kept.

`step` is the number of instructions of all CPUs that were complete, since the guest's call, when it happened. A machine that runs
with limit N has done exactly what has `since` <= N: a limit stops it before the next instruction, and before what a CPU does
between two turns. Neither of the two ever descends in `since`, so a state is a prefix of the records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from emu.debug.history import (
    BEGIN,
    DROP,
    FILL,
    FLUSH,
    FLUSHED,
    GUEST_STORE,
    INVALIDATE,
    ROOT,
    SET,
    START,
    STOP,
    STORE,
    History,
    Raw,
    Recorded,
)


class Change(msgspec.Struct, frozen=True, gc=False, tag_field="type"):
    """When, on which CPU, in which thread. `call` names the exported function or entry point that the kernel model executed, and
    `place` is where that was called from; for an instruction of the guest `call` is empty and `place` is the instruction.
    """

    step: int
    since: int
    cpu: int
    pid: int
    comm: str
    call: str
    place: str


class TableStored(Change, frozen=True, gc=False, tag="store"):
    """Words of page tables hold `chunks` of bytes now, by physical address; `function` is the C function that stores, or ""."""

    function: str
    chunks: tuple[tuple[int, bytes], ...]


class TlbFilled(Change, frozen=True, gc=False, tag="fill"):
    """The CPU caches page `number` of a level with packed leaf `value`, or the table at pa `value` << 3 with mask `rights`."""

    pcid: int
    level: int
    table: bool
    number: int
    value: int
    rights: int


class TlbDropped(Change, frozen=True, gc=False, tag="drop"):
    """The CPU no longer caches page or table `number` of a level, -1: any of that level and PCID. `access`: an access did that."""

    pcid: int
    level: int
    table: bool
    number: int
    access: bool


class RootLoaded(Change, frozen=True, gc=False, tag="root"):
    """The CPU is under PCID `pcid` now, with this CR3."""

    pcid: int
    cr3: int


class Invalidated(Change, frozen=True, gc=False, tag="invalidate"):
    """The CPU has executed an invalidation: of one PCID (-1: all), one page (-1: all); `shared`: of global entries too."""

    pcid: int
    la: int
    shared: bool


class FlushAsked(Change, frozen=True, gc=False, tag="flush"):
    """The kernel asks `cpus` to flush the addresses from `start` to `last`, included; everything when that is all of them."""

    number: int
    start: int
    last: int
    cause: str
    cpus: tuple[int, ...]


class Flushed(Change, frozen=True, gc=False, tag="flushed"):
    """The CPU has done its part of flush `number`."""

    number: int


AnyChange: TypeAlias = TableStored | TlbFilled | TlbDropped | RootLoaded | Invalidated | FlushAsked | Flushed


class Reader:
    """Makes changes of raw records, in their order; what it must remember between two batches it keeps."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._since = 0
        self._started = False
        self._threads: dict[int, Any] = {}
        self._others: dict[int, int] = {}
        self._limits = {cpu.id: _limit(cpu) for cpu in history.machine.cpus}
        self._names: dict[int, str] = {}

    def read(self, raw: list[Raw]) -> list[AnyChange]:
        """The changes that raw records stand for."""
        start = self.history.start
        changes: list[AnyChange] = []
        for at, record in enumerate(raw):
            kind = record[0]
            if kind == BEGIN:
                _, cpu, thread, total, self._others[cpu] = record
                self._threads[cpu] = thread
                self._stop(total - start)
            elif kind == STOP:
                self._stop(record[1] - start)
            elif kind == START:
                self._started = True
                self._stop(0)
            elif kind == FILL:
                _, kept, number, value, rip, left, block = record
                page = record if not kept.table else _page_of(raw, at)
                scene = self._inside(kept.cpu, rip, left, block, start, rip >> 9 * page[1].level + 3 == page[2])
                changes.append(_filled(scene, kept, number, value))
            else:
                changes.append(self._change(record, start))
        return changes

    def _stop(self, step: int) -> None:
        """Here a limit of `step` would have stopped the machine."""
        if self._started:
            self._since = max(self._since, step + 1)

    def _change(self, record: Raw, start: int) -> AnyChange:
        match record[0]:
            case 1:  # SET
                _, kept, number, value, *scene = record
                return _filled(self._model(kept.cpu, scene, start), kept, number, value)
            case 2:  # DROP
                return self._dropped(record, start)
            case 3:  # STORE
                _, cpu, chunks, function, *scene = record
                return _made(TableStored, self._model(cpu, scene, start), function, tuple(chunks))
            case 4:  # GUEST_STORE
                _, cpu, chunks, total, rip, thread = record
                return _made(TableStored, self._instruction(cpu, total - start, rip, thread), "", tuple(chunks))
            case 7:  # ROOT
                _, cpu, pcid, cr3, *scene = record
                return _made(RootLoaded, self._model(cpu, scene, start), pcid, cr3)
            case 8:  # INVALIDATE
                _, cpu, pcid, la, shared, *scene = record
                return _made(Invalidated, self._model(cpu, scene, start), pcid, la, shared)
            case 9:  # FLUSH
                _, event, *scene = record
                what = event.flush, event.start, event.end - 1, event.cause, event.cpus
                return _made(FlushAsked, self._model(event.cpu, scene, start), *what)
            case _:
                _, event, *scene = record
                return _made(Flushed, self._model(event.cpu, scene, start), event.flush)

    def _dropped(self, record: Raw, start: int) -> AnyChange:
        _, kept, number, access, *rest = record
        if access:
            rip, left, block = rest
            scene = self._inside(kept.cpu, rip, left, block, start, False)
        else:
            scene = self._model(kept.cpu, rest, start)
        return _made(TlbDropped, scene, kept.pcid, kept.level, kept.table, number, access)

    def _inside(self, cpu: int, rip: int, left: int, block: Any, start: int, own_page: bool) -> tuple[Any, ...]:
        """The scene of an access that the engine makes; `own_page`: to the page that RIP is in.

        The count has the whole block that runs, of which part is yet to come, but not the one that is about to be fetched: that is
        fetched even where a limit stops the engine before it.
        """
        step = self._others.get(cpu, 0) + self._limits[cpu] - left - start
        counter = self.history.machine.cpus[cpu].engine.block_counter
        if counter is None:
            fetch = own_page
            step -= not fetch
        else:
            inside = block is not None and block.start <= rip < block.start + block.size
            fetch = not inside or (own_page and rip == block.start)
            if not fetch:
                step -= block.count - counter.index(block, rip)
        return self._instruction(cpu, step, rip, self._threads.get(cpu), fetch)

    def _instruction(self, cpu: int, step: int, rip: int, thread: Any, fetch: bool = False) -> tuple[Any, ...]:
        self._since = max(self._since, step + (not fetch))
        return (step, self._since, cpu, *_thread(thread), "", self._name(rip))

    def _model(self, cpu: int, scene: list[Any], start: int) -> tuple[Any, ...]:
        total, la, caller, thread = scene
        self._since = max(self._since, total - start)
        exports = self.history.kernel.symbols.exports
        call = ""
        if la in exports:
            call, la = exports[la].name, caller
        elif self.history.kernel.layout.is_kernel_text(la):
            call, la = self._name(la).partition("+")[0], caller
        return (max(0, total - start), self._since, cpu, *_thread(thread), call, self._name(la) if la else "")

    def _name(self, la: int) -> str:
        name = self._names.get(la)
        if name is None:
            name = self._names[la] = self.history.kernel.symbol_text(la)
        return name


def _page_of(raw: list[Raw], at: int) -> Raw:
    """The page that the walk was for whose tables are cached from record `at` on: it is cached right behind them."""
    return next((record for record in raw[at + 1 : at + 12] if record[0] == FILL and not record[1].table), raw[at])


def _made(kind: Callable[..., AnyChange], scene: tuple[Any, ...], *fields: Any) -> AnyChange:
    return kind(*scene, *fields)


def _filled(scene: tuple[Any, ...], kept: Recorded, number: int, value: Any) -> AnyChange:
    packed, rights = value if kept.table else (value, 0)
    return _made(TlbFilled, scene, kept.pcid, kept.level, kept.table, number, packed, rights)


def _thread(thread: Any) -> tuple[int, str]:
    return (0, "swapper") if thread is None else (thread.pid, thread.comm)


def _limit(cpu: Any) -> int:
    limit: int = cpu.engine.counter.limit
    return limit


assert (FILL, SET, DROP, STORE, GUEST_STORE, ROOT, INVALIDATE, FLUSH, FLUSHED) == (0, 1, 2, 3, 4, 7, 8, 9, 10)
