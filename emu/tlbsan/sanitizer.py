"""Which CPU holds what is stale, since which store; judging each use of it.

The page tables' writers tell of changes, each CPU's Watch finds what they left stale there and tells of its uses. Everything is
ordered by `moment`, a count of what happened; nothing depends on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.kernel.kernel import Kernel
from emu.mmu.mmu import Mmu
from emu.mmu.staleness import CachedTable
from emu.mmu.table_frames import TableFrames
from emu.mmu.watch import Key, Mark, StaleUse, Watch
from emu.tlbsan.finding import Counters, Fill, Finding, Flush, Kind, Store, Tracking
from emu.tlbsan.flushes import Flushes, Invalidation
from emu.tlbsan.owners import address_owner, area_at, frame_owner, is_lazy
from emu.tlbsan.scene import Scene
from emu.trace import Event, FlushIssued, TlbFlushed

GUEST_STORE = "a store of the program"
NOTHING_TRACKED = Tracking()
USER_END = 1 << 63
_FEW = 1024


@dataclass(slots=True)
class _Cpu:
    mmu: Mmu
    watch: Watch
    describe: Callable[[], Scene]
    describe_store: Callable[[], Scene]
    # The stores since each watched entry was last fresh, with how it then differed.
    stores: dict[Key, list[tuple[Store, tuple[str, ...]]]]
    fills: dict[int, Fill]
    limit: int = _FEW


class TlbSan:
    """The sanitizer of one machine.

    `time()` is the machine's time; `on_finding` is told each finding at once, in the middle of the access; `track` what a
    repeated run shall remember. `tables` tells whose frames are page tables, and when that changes.
    """

    def __init__(self, kernel: Kernel, *, track: Tracking = NOTHING_TRACKED, time: Callable[[], int] = lambda: 0) -> None:
        self.kernel = kernel
        self.track = track
        self.time = time
        self.on_finding: Callable[[Finding], None] = lambda finding: None
        self.findings: list[Finding] = []
        self.counters = Counters()
        self.tables = TableFrames()
        self.flushes = Flushes()
        self._cpus: dict[int, _Cpu] = {}
        self._moment = 0
        self._stores = 0
        self._seen: set[tuple[int, int, int]] = set()
        # CPUs that made a use which is legal for now: what their soft cache took from it must not hide a later one.
        self._allowed: set[int] = set()
        kernel.pages.table_changes.tell = self.on_change

    def attach(
        self, mmu: Mmu, cpu: int, describe: Callable[[], Scene], describe_store: Callable[[], Scene] | None = None
    ) -> None:
        """Watch a CPU; `describe` is called in the middle of its accesses.

        `describe_store` (or else `describe`) is called where it runs a store that leaves entries stale, which is far more often;
        the size of the access does not matter then.
        """
        tracked = [page for number, page in self.track.fills if number == cpu]
        watch = Watch(mmu, self.tables, lambda use: self._used(cpu, use), tracked)
        watch.on_fill = lambda la, level: self._filled(cpu, la)
        watch.on_root = lambda pcid, before, marks: self._root_changed(cpu, marks)
        watch.on_invalidate = lambda pcid, la, shared: self._invalidated(cpu, pcid, la, shared)
        watch.on_store = lambda frame, before, after: self.tables_written(cpu, frame, before, after, "a store of the kernel")
        self._cpus[cpu] = _Cpu(mmu, watch, describe, describe_store or describe, {}, {})
        mmu.watch = watch

    # ---------------------------------------------------------------- what makes entries stale

    def on_change(self, start: int, end: int, function: str, gone: bool = False) -> None:
        """Entries that translate [start, end) were changed in memory by the kernel function; `gone`: no 4 KiB leaf is left."""
        self._change(self.kernel.cpus.current, start, end, function, gone)

    def tables_written(self, cpu: int, frame: int, before: bytes, after: bytes, function: str = GUEST_STORE) -> None:
        """A store of `cpu` changed the table frame's 4096 bytes from `before` to `after`."""
        for start, end in self.tables.changed(frame, before, after):
            self._change(cpu, start, end, function, False)

    def _change(self, cpu: int, start: int, end: int, function: str, gone: bool) -> None:
        marks: list[tuple[_Cpu, list[Mark]]] = []
        for number in self._cpus:
            one = self._cpus[number]
            found = one.watch.recheck(start, end, gone=gone)
            if found:
                marks.append((one, found))
        if marks:
            store = self._store(cpu, start, end, function)
            for one, found in marks:
                self._attribute(one, found, store)

    def _root_changed(self, cpu: int, marks: list[Mark]) -> None:
        store = self._store(cpu, 0, 1 << 64, "MOV to CR3 without invalidation")
        self._attribute(self._cpus[cpu], marks, store)

    def _store(self, cpu: int, start: int, end: int, function: str) -> Store:
        self._stores += 1
        self._moment += 1
        self.counters.stores += 1
        kernel = self.kernel
        kernel.pages.epoch = self._stores
        one = self._cpus.get(cpu)
        scene = one.describe_store() if one is not None else Scene(0)
        by_guest = function == GUEST_STORE
        where = scene.rip if by_guest else scene.caller
        return Store(
            self._stores, self._moment, self.time(), cpu, start, end, function, None if by_guest else scene.call,
            kernel.symbol_text(where) if where else None,
            scene.trace() if self._stores in self.track.stores else (), area_at(kernel, start), self._under_way(),
        )

    def _under_way(self) -> Callable[[], bool]:
        activation = self.kernel.sched.activation
        if activation is None:
            return lambda: False
        return lambda: activation in activation.thread.activations

    def turn_over(self) -> None:
        """A CPU's turn is over: what was allowed while a call was under way may not be allowed in the next turn."""
        if self._allowed:
            for number in sorted(self._allowed):
                self._cpus[number].mmu.on_drop()
            self._allowed.clear()

    def _attribute(self, cpu: _Cpu, marks: list[Mark], store: Store) -> None:
        self.counters.marked += len(marks)
        for mark in marks:
            if mark.before:
                cpu.stores.setdefault(mark.key, []).append((store, mark.differs))
            else:
                cpu.stores[mark.key] = [(store, mark.differs)]
        if len(cpu.stores) > cpu.limit:
            cpu.stores = {key: stores for key, stores in cpu.stores.items() if cpu.watch.holds(key)}
            cpu.limit = 2 * len(cpu.stores) + _FEW

    # ---------------------------------------------------------------- what removes them

    def note(self, event: Event) -> None:
        """An event of the machine's trace: flushes are remembered."""
        if isinstance(event, FlushIssued):
            self.flush_issued(event.flush, event.cpu, event.start, event.end, event.cause, event.cpus)
        elif isinstance(event, TlbFlushed):
            self.flushed(event.flush, event.cpu)

    def flush_issued(self, number: int, cpu: int, start: int, end: int, cause: str, cpus: tuple[int, ...]) -> None:
        """Kernel code on `cpu` asked the CPUs `cpus` to flush [start, end); everything when it spans 2^64."""
        self._moment += 1
        self.flushes.issued(Flush(number, self._moment, self.time(), cpu, start, end, cause, cpus))

    def flushed(self, number: int, cpu: int) -> None:
        """A CPU has done what flush `number` asks of it."""
        self._moment += 1
        self.flushes.done(number, cpu, self._moment)

    def _invalidated(self, cpu: int, pcid: int | None, la: int | None, shared: bool) -> None:
        self._moment += 1
        self.flushes.invalidations.append(Invalidation(self._moment, cpu, pcid, la, shared))

    # ---------------------------------------------------------------- fills and uses

    def _filled(self, cpu: int, la: int) -> None:
        one = self._cpus[cpu]
        scene = one.describe()
        cached = one.mmu.query(la)
        frame = "" if cached is None else frame_owner(self.kernel, cached.pa(la) >> 12)
        one.fills[la >> 12] = Fill(
            scene.instructions, self.kernel.symbol_text(scene.rip), address_owner(self.kernel, la), frame
        )

    def _used(self, cpu: int, use: StaleUse) -> None:
        one = self._cpus[cpu]
        store, differs = self._culprit(one, use)
        kind = self._kind(use, store, differs)
        if store is not None and _is_allowed_yet(kind, use, store):
            self._allowed.add(cpu)
            return
        seen = cpu, use.la >> 12, 0 if store is None else store.number
        if seen in self._seen:
            self.counters.repeated += 1
            return
        self._seen.add(seen)
        kernel = self.kernel
        scene = one.describe()
        la, size = scene.access(use.la, use.access)
        frame = use.pa if use.pa is not None else use.entry.table if isinstance(use.entry, CachedTable) else 0
        if store is None:
            verdict = "unknown: no store was seen that made the entry stale"
        else:
            verdict = self.flushes.verdict(use.key, use.la, cpu, store, lazy=is_lazy(kernel, use.la))
        finding = Finding(
            kind, cpu, la, use.access, use.user, size, scene.rip,
            kernel.symbol_text(scene.rip), scene.comm, scene.pid, self.time(), scene.trace(), use.entry, use.pa, _now(use), differs,
            one.fills.get(use.key.la >> 12), store, verdict, self.flushes.reached(use.key, store),
            address_owner(kernel, la), frame_owner(kernel, frame >> 12),
        )
        self.findings.append(finding)
        self.counters.findings += 1
        self.on_finding(finding)

    def _culprit(self, cpu: _Cpu, use: StaleUse) -> tuple[Store | None, tuple[str, ...]]:
        """The first store since which the entry has differed in the way that matters to this use, and how it differs now."""
        stores = cpu.stores.get(use.key, [])
        if not stores:
            return None, ()
        differs = stores[-1][1]
        # Each store to a part of a large page concerns that part.
        there = [(store, how) for store, how in stores if store.start <= use.la < store.end] or stores
        at = len(there) - 1
        if "size" not in there[at][1]:
            wanted = {"P", "RSVD", "frame"}
            if use.fault is not None and use.fault.error & 1:
                wanted = {"RW", "US", "XD", "PKEY", "RSVD"}
            while at and not wanted.isdisjoint(there[at - 1][1]):
                at -= 1
        return there[at][0], differs

    def _kind(self, use: StaleUse, store: Store | None, differs: tuple[str, ...]) -> Kind:
        if use.key.table:
            return Kind.STALE_STRUCTURE
        if store is not None and store.function.startswith("MOV to CR3"):
            return Kind.OTHER_ADDRESS_SPACE
        if use.fault is not None and use.fault.error & 1 and not use.fault.error & 8:
            return Kind.REVOKED_RIGHTS
        if store is None:
            return Kind.MOVED if use.fresh is not None else Kind.USE_AFTER_UNMAP
        area = area_at(self.kernel, use.la)
        if use.fresh is not None and area is not None and area is not store.area:
            return Kind.ADDRESS_REUSED
        if use.pa is not None and self.kernel.pages.handed_out(use.pa >> 12) >= store.number:
            return Kind.FRAME_REUSED
        return Kind.MOVED if use.fresh is not None else Kind.USE_AFTER_UNMAP

    def counts(self) -> Counters:
        """The counters, those of the CPUs' watches added."""
        self.counters.uses = sum(cpu.watch.uses for cpu in self._cpus.values())
        self.counters.legal = self.counters.uses - self.counters.findings - self.counters.repeated
        return self.counters


def _is_allowed_yet(kind: Kind, use: StaleUse, store: Store) -> bool:
    """Whether the use is one that only the return of the call that made the store forbids.

    set_memory_ro and its like promise their protection when they return: they change entries first and flush then (v6.12
    arch/x86/mm/pat/set_memory.c), and an access of another CPU meanwhile comes before or after as hardware likes. So it is with
    user addresses, whose frames are freed after the flush. A kernel address that is unmapped nobody may use even before that.
    """
    if kind is Kind.REVOKED_RIGHTS or (kind is Kind.USE_AFTER_UNMAP and use.la < USER_END):
        return store.is_under_way()
    return False


def _now(use: StaleUse) -> str:
    if use.fresh is not None:
        return f"frame {use.fresh >> 12:#x}"
    if use.fault is None:
        return "a table that is not in RAM"
    if not use.fault.error & 1:
        return "not mapped"
    return "a reserved bit" if use.fault.error & 8 else "mapped, without the right to this access"
