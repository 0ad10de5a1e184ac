"""What a history consists of, and how it is made of what the recorder kept.

`step` is the number of instructions of all CPUs that were complete, since the guest's call, when it happened. A machine that runs
with limit N has done exactly what has `since` <= N: a limit stops it before the next instruction, and before what a CPU does
between two turns. Neither of the two ever descends in `since`, so a state is a prefix of the records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from emu.debug.history import FLUSH, FLUSHED, GUEST_STORE, INVALIDATE, ROOT, STORE, WIDTH, History
from emu.debug.recorded_tlb import DROP, FILL, SET, Recorded

# The place of what happens while the guest is loaded.
BEFORE = "before the guest's call"


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
    """The CPU no longer caches page or table `number` of a level: for want of room, or since an access to it faulted (`access`),
    or by INVLPG or INVPCID of one address, which is told next.
    """

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
    """The CPU has executed an invalidation: of one PCID (-1: all), one page (-1: all); `shared`: of global entries too. That of a
    page with `shared` is INVLPG, which removes all of the PCID's paging-structure caches.
    """

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
        self._limits = {cpu.id: _limit(cpu) for cpu in history.machine.cpus}
        self._names: dict[int, str] = {}

    def read(self, raw: list[Any], stop: int | None = None) -> list[AnyChange]:
        """The changes that raw records stand for, those before index `stop`."""
        return [self._change(raw, at) for at in range(0, len(raw) if stop is None else stop, WIDTH)]

    def _change(self, raw: list[Any], at: int) -> AnyChange:
        kind, first, second, third, *scene = raw[at : at + WIDTH]
        last_stop = scene[-1][2]
        if last_stop >= 0:
            # There a limit would have stopped the machine.
            self._since = max(self._since, last_stop - self.history.start + 1)
        match kind:
            case 0:  # FILL
                if first.table:
                    page, number, scene = _page_of(raw, at)
                else:
                    page, number = first, second
                return _filled(self._inside(first.cpu, scene, scene[0] >> 9 * page.level + 3 == number), first, second, third)
            case 1:  # SET
                return _filled(self._model(first.cpu, scene), first, second, third)
            case 2:  # DROP
                where = self._inside(first.cpu, scene, False) if third else self._model(first.cpu, scene)
                return _made(TlbDropped, where, first.pcid, first.level, first.table, second, third)
            case 3:  # STORE
                return _made(TableStored, self._model(first, scene), third, tuple(second))
            case 4:  # GUEST_STORE
                total, rip, _, thread, _ = scene
                return _made(TableStored, self._instruction(first, total - self.history.start, rip, thread), "", tuple(second))
            case 5:  # ROOT
                return _made(RootLoaded, self._model(first, scene), second, third)
            case 6:  # INVALIDATE
                return _made(Invalidated, self._model(first, scene), second, *third)
            case 7:  # FLUSH
                what = first.flush, first.start, first.end - 1, first.cause, first.cpus
                return _made(FlushAsked, self._model(first.cpu, scene), *what)
            case _:
                return _made(Flushed, self._model(first.cpu, scene), first.flush)

    def _inside(self, cpu: int, scene: list[Any], own_page: bool) -> tuple[Any, ...]:
        """The scene of an access that the engine makes; `own_page`: to the page that RIP is in.

        The count has the whole block that runs, of which part is yet to come, but not the one that is about to be fetched: that is
        fetched even where a limit stops the engine before it.
        """
        rip, left, block, _, turn = scene
        thread, others, _, reserve = turn
        step = others + self._limits[cpu] - reserve - left - self.history.start
        counter = self.history.machine.cpus[cpu].engine.block_counter
        if counter is None:
            fetch = own_page
            step -= not fetch
        else:
            inside = block is not None and block.start <= rip < block.start + block.size
            fetch = not inside or (own_page and rip == block.start)
            if not fetch:
                step -= block.count - counter.index(block, rip)
        return self._instruction(cpu, step, rip, thread, fetch)

    def _instruction(self, cpu: int, step: int, rip: int, thread: Any, fetch: bool = False) -> tuple[Any, ...]:
        self._since = max(self._since, step + (not fetch))
        return (step, self._since, cpu, *_thread(thread), "", self._name(rip))

    def _model(self, cpu: int, scene: list[Any]) -> tuple[Any, ...]:
        total, la, caller, thread, turn = scene
        step = total - self.history.start
        if turn[2] < 0:
            return (0, self._since, cpu, *_thread(thread), "", BEFORE)
        self._since = max(self._since, step)
        exports = self.history.kernel.symbols.exports
        call = ""
        if la in exports:
            call, la = exports[la].name, caller
        elif self.history.kernel.layout.is_kernel_text(la):
            call, la = self._name(la).partition("+")[0], caller
        return (max(0, step), self._since, cpu, *_thread(thread), call, self._name(la) if la else "")

    def _name(self, la: int) -> str:
        name = self._names.get(la)
        if name is None:
            name = self._names[la] = self.history.kernel.symbol_text(la)
        return name


def _page_of(raw: list[Any], at: int) -> tuple[Recorded, int, list[Any]]:
    """The page that the walk was for whose tables are cached from record `at` on, and its scene: it is cached right behind them."""
    while raw[at] != FILL or raw[at + 1].table:
        at += WIDTH
    return raw[at + 1], raw[at + 2], raw[at + 4 : at + WIDTH]


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


assert tuple(range(9)) == (FILL, SET, DROP, STORE, GUEST_STORE, ROOT, INVALIDATE, FLUSH, FLUSHED)
