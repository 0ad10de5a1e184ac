"""Recording what happens to translations: each store to a page table, each entry that a TLB takes in or gives up, each flush.

A machine that nobody records pays nothing: the dicts in which the MMU keeps its entries are replaced by ones that tell
(Mmu.keep_translations_in), and methods by ones that tell first. A record is raw until somebody asks: what costs time to find
out (the instruction inside a block, names) is found out then. emu/debug/history_records.py says what a record means.

All records stand in one list, WIDTH values each: a tuple each would make the garbage collector's work a tenth of a run's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emu.cpu import Cpu
from emu.debug.recorded_tlb import recorded_kinds
from emu.debug.table_stores import Chunk, KnownTables, TableStores
from emu.kernel.init_64 import PTI_USER_PGD
from emu.kernel.task import KernelThread
from emu.machine import Machine
from emu.mmu.entry import PHYSICAL_MASK
from emu.mmu.mmu import Mmu
from emu.mmu.table_frames import TableFrames
from emu.mmu.watch import Watch
from emu.native import NativeEngine
from emu.trace import Event, FlushIssued, TlbFlushed

# A record takes about 200 bytes of the host's memory, and what was stored to tables.
RING = 1 << 19
# What a raw record begins with, besides FILL, SET and DROP, and how many values it has. The last is a Turn.
STORE, GUEST_STORE, ROOT, INVALIDATE, FLUSH, FLUSHED = range(3, 9)
WIDTH = 9
# Of the CPU in charge: its thread, instructions of the other CPUs, and of all when a limit could last have stopped the machine
# since the guest's call (-1: not yet); what its engine may execute after the run under way.
Turn = tuple[KernelThread | None, int, int, int]
# PCID (-1: global), level, whether of the paging-structure caches, linear address above the bits that the level spans.
Key = tuple[int, int, bool, int]
Value = int | tuple[int, int]


class History:
    """The recorder of one machine, from its making to the end of its guest's run.

    At most `ring` records are kept in `raw`: when there are more, `spill` is told up to which index the older half reaches, before
    that is deleted. Raises ValueError for a machine that does not count instructions, or whose TLB is not ours.
    """

    def __init__(self, machine: Machine, *, ring: int = RING) -> None:
        if ring < 2:
            raise ValueError(f"a ring of {ring} records is too small: at least 2")
        if any(isinstance(cpu.engine, NativeEngine) for cpu in machine.cpus):
            raise ValueError("a native machine has no history: its TLB is Unicorn's own")
        if any(cpu.engine.counter is None for cpu in machine.cpus):
            raise ValueError("a machine that does not count instructions has no history")
        self.machine = machine
        self.kernel = machine.kernel
        self.ring = ring
        self.full = ring * WIDTH
        self.raw: list[Any] = []
        self.turn: Turn = None, 0, -1, 0
        self.spill: Callable[[int], None] = lambda stop: None
        visited = machine.tlbsan.tables if machine.tlbsan is not None else TableFrames()
        self.tables = KnownTables(visited)
        self.stores = TableStores(machine.memory, machine.config.levels, self.tables)
        self._sched = self.kernel.sched
        self._cpus = self.kernel.cpus
        # Instructions of all CPUs but the one in charge, since their boot, and the one in charge.
        self._others = 0
        self._counter = machine.cpu.engine.counter
        self._thread: KernelThread | None = None
        self._seen = [0] * len(machine.cpus)
        self._roots: list[tuple[int, int]] = []
        for cpu in machine.cpus:
            self._see_stores(cpu)
        init_mm = self.kernel.init_mm
        for pgd in (init_mm.pgd, *init_mm.pgds):
            self.stores.add_root(pgd)
            if init_mm.pti:
                self.stores.add_root(pgd + PTI_USER_PGD)
        for cpu in machine.cpus:
            for cr3 in (cpu.mmu.cr3, *cpu.mmu.roots.values()):
                self.stores.add_root(cr3 & PHYSICAL_MASK)
        # What the records begin with: tables by frame, and for each CPU its entries and the CR3 of each PCID.
        self.frames = self.stores.contents()
        self.cached = [cached_by(cpu.mmu) for cpu in machine.cpus]
        self.roots = [dict(cpu.mmu.roots) for cpu in machine.cpus]
        self.current = [(cpu.mmu.pcid, cpu.mmu.cr3) for cpu in machine.cpus]
        self._roots = list(self.current)
        for cpu in machine.cpus:
            self._see_translations(cpu)
        self._see_turns()

    # ---------------------------------------------------------------- time and place

    @property
    def start(self) -> int:
        """Instructions of all CPUs before the guest was called: a step is a total less this."""
        return self.machine.hub.started

    @property
    def steps(self) -> int:
        """Instructions that the guest's run has had so far."""
        return (self.machine.hub.total() or 0) - self.start

    def _total(self) -> int:
        counter = self._counter
        assert counter is not None
        return self._others + counter.executed

    def add(self, kind: int, first: Any, second: Any = None, third: Any = None) -> None:
        """Add a record of what the model or a delivery does.

        It ends with instructions so far, the stub or the instruction, the call's return address, the thread, and the turn.
        """
        activation = self._sched.activation
        counter: Any = self._counter
        total = self._others + counter.limit - counter._reserve - counter._left.value
        if activation is not None:
            self.raw.extend((
                kind, first, second, third, total, activation.la, activation.caller, activation.thread, self.turn,
            ))
        else:
            number = self._cpus.current
            rip = self.machine.cpus[number].rip
            self.raw.extend((kind, first, second, third, total, rip, 0, self._sched.running[number], self.turn))
        if len(self.raw) > self.full:
            self.overflow()

    def overflow(self) -> None:
        """Hand over the older half."""
        stop = len(self.raw) // WIDTH // 2 * WIDTH
        self.spill(stop)
        del self.raw[:stop]

    def _see_turns(self) -> None:
        """See which CPU is in charge, and where a limit would stop the machine: before and after each of its runs."""
        hub = self.machine.hub
        execute = hub._execute
        begin = hub.start
        seen, cpus = self._seen, self.machine.cpus
        counters: list[Any] = [cpu.engine.counter for cpu in cpus]
        running = self._sched.running
        before = 0
        started = False

        def start() -> None:
            nonlocal before, started
            begin()
            seen[:] = [counter.executed for counter in counters]
            before = sum(seen)
            started = True
            self.turn = None, 0, before, 0

        def execute_and_tell(number: int, budget: int | None) -> Any:
            nonlocal before
            counter = counters[number]
            others = before - seen[number]
            self._counter, self._others, self._thread = counter, others, running[number]
            result = execute(number, budget)
            seen[number] = executed = counter.limit - counter._reserve - counter._left.value
            before = others + executed
            # Nested runs may have put another CPU in charge.
            self._counter, self._others = counter, others
            # Before the guest's call no limit stops anything.
            self.turn = running[number], others, before if started else -1, 0
            return result

        hub.start = start  # type: ignore[method-assign]
        hub._execute = execute_and_tell  # type: ignore[method-assign]
        for cpu in cpus:
            self._see_runs(cpu)
        sink = self.machine.flushes.sink

        def flush(event: Event) -> None:
            if isinstance(event, FlushIssued):
                self.add(FLUSH, event)
            elif isinstance(event, TlbFlushed):
                self.add(FLUSHED, event)
            sink(event)

        self.machine.flushes.sink = flush

    def _see_runs(self, cpu: Cpu) -> None:
        """A limit stops a CPU also before each run of its engine, and before it takes an interrupt."""
        counter: Any = cpu.engine.counter
        take, allow = cpu._take_pending, counter.allow

        def stop() -> None:
            reserve, others = counter._reserve, self._others
            last = -1 if self.turn[2] < 0 else others + counter.limit - reserve - counter._left.value
            self.turn = self._thread, others, last, reserve

        def take_pending() -> bool:
            stop()
            return take()

        def allow_and_tell(budget: int | None) -> int:
            allowed: int = allow(budget)
            stop()
            return allowed

        cpu._take_pending = take_pending  # type: ignore[method-assign]
        counter.allow = allow_and_tell

    # ---------------------------------------------------------------- page tables

    def _see_stores(self, cpu: Cpu) -> None:
        mmu, engine, tables = cpu.mmu, cpu.engine, self.tables
        if mmu.watch is None:
            mmu.watch = Watch(mmu, tables, lambda use: None)
        watch = mmu.watch
        watch.tables = tables
        if self.machine.tlbsan is not None:
            self.machine.tlbsan.tables = tables
        tables.on_new = self.machine.memory.no_stores_unseen
        told, told_model = engine.on_table_store, watch.on_store
        number = cpu.id

        def guest_store(frame: int, before: bytes, after: bytes) -> None:
            chunks = self.stores.written(frame, before, after)
            if chunks:
                rip, total = cpu.engine.reg("rip"), self._total()
                block = None if engine.block_counter is None else engine.block_counter.running
                if block is not None:
                    # The instruction was a block of its own, and was counted before it ran.
                    rip = block.start
                    total -= block.count
                self.raw.extend((GUEST_STORE, number, chunks, None, total, rip, 0, self._sched.running[number], self.turn))
            told(frame, before, after)

        def model_store(frame: int, before: bytes, after: bytes) -> None:
            self._stored(self.stores.written(frame, before, after), "")
            told_model(frame, before, after)

        engine.tables = tables
        engine.on_table_store = guest_store
        watch.on_store = model_store
        changes = self.kernel.pages.table_changes
        changes.stored = self._range_stored
        changes.stored_entry = lambda entry_pa, function: self._stored(self.stores.stored_entry(entry_pa), function)

    def _range_stored(self, pgd: int, start: int, end: int, function: str, tables: bool) -> None:
        chunks = self.stores.stored(pgd, start, end, tables)
        if chunks:
            self.add(STORE, self._cpus.current, chunks, function)
        if function == "free_pgtables" and all(cpu.mmu.cr3 & PHYSICAL_MASK != pgd for cpu in self.machine.cpus):
            self.stores.drop_root(pgd)

    def _stored(self, chunks: list[Chunk], function: str) -> None:
        if chunks:
            self.add(STORE, self._cpus.current, chunks, function)

    # ---------------------------------------------------------------- TLBs

    def _see_translations(self, cpu: Cpu) -> None:
        mmu, number = cpu.mmu, cpu.id
        pages, tables = recorded_kinds(self, cpu)
        mmu.keep_translations_in(lambda pcid, level, table: (tables if table else pages)(number, pcid, level, table))
        enter = mmu._enter_address_space

        def enter_address_space() -> None:
            enter()
            self._entered(number, mmu)

        mmu._enter_address_space = enter_address_space  # type: ignore[method-assign]
        watch = mmu.watch
        assert watch is not None
        told = watch.on_invalidate

        def invalidated(pcid: int | None, la: int | None, shared: bool) -> None:
            self.add(INVALIDATE, number, _tag(pcid), (-1 if la is None else la, shared))
            told(pcid, la, shared)

        watch.on_invalidate = invalidated

    def _entered(self, number: int, mmu: Mmu) -> None:
        """A CPU's CR3 or PCID may have changed."""
        root = mmu.pcid, mmu.cr3
        if root == self._roots[number]:
            return
        self._roots[number] = root
        self._stored(self.stores.add_root(mmu.cr3 & PHYSICAL_MASK), "")
        self.add(ROOT, number, *root)


def cached_by(mmu: Mmu) -> dict[Key, Value]:
    """All that a CPU caches: packed leaves, and of paging-structure caches (table pa >> 3, rights mask), by what they serve."""
    found: dict[Key, Value] = {}
    for context, level, la, packed in mmu.tlb.entries():
        found[_tag(context.pcid), level, False, la >> 9 * level + 3] = packed
    for context, level, la, table, rights in mmu.tlb.tables():
        found[_tag(context.pcid), level, True, la >> 9 * level + 3] = table >> 3, rights
    return found


def _tag(pcid: int | None) -> int:
    return -1 if pcid is None else pcid
