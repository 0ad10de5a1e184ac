"""The history of one address: when it became mapped, writable, cached, stale, flushed, unmapped, by whom, on which CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from emu.debug.history import Key
from emu.debug.history_records import AnyChange, FlushAsked, Invalidated, RootLoaded, TableStored, TlbDropped, TlbFilled
from emu.debug.replay import Replay
from emu.mmu.entry import PHYSICAL_MASK, RW, US, XD, Level, P, is_canonical, page_size
from emu.mmu.staleness import Cached, CachedTable, compare_page, compare_table, effective
from emu.mmu.walk import inspect

_KERNEL_HALF = 1 << 63


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """What happened to an address.

    `what` is one of "mapped", "unmapped", "moved" (to another frame or page size), "writable", "read-only", "executable",
    "not executable", "user" and "supervisor" (whom the page is open to), "cached" and "table cached" (a TLB, or a paging-structure
    cache, took it in), "dropped" and "table dropped" (gone from there: by a flush, a fault or for want of room), "stale" (cached
    entries no longer say what memory does), "fresh" (they do again). `function` is the C function, or "" where an instruction of
    the guest or an access did it. `call` names the exported function that was under way, `place` the instruction or where the call
    came from; "boot" if it was so before anything was recorded. `cpus` are those whose caches are concerned. `root` is the top
    table through which the address is translated, `entry` the effective leaf then, 0 for none, and `page_size` what it maps.
    `differs` says in what a stale entry does.
    """

    step: int
    cpu: int
    pid: int
    comm: str
    what: str
    function: str
    call: str
    place: str
    cpus: tuple[int, ...] = ()
    root: int = 0
    entry: int = 0
    page_size: int = 0
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """What tables say of an address: level of its leaf, effective entry; level 0: nothing. Accessed and dirty do not count."""

    level: int
    entry: int

    @property
    def pa_base(self) -> int:
        """The first byte of the page."""
        return self.entry & PHYSICAL_MASK & -page_size(self.level)


_NOTHING = View(0, 0)


class AddressHistory:
    """Follows one address through a replay. Raises ValueError for an address that is not canonical."""

    def __init__(self, replay: Replay, la: int, init_pgd: int) -> None:
        if not is_canonical(la, replay.regs.levels):
            raise ValueError(f"{la:#x} is not a canonical address")
        self.replay = replay
        self.la = la
        self.events: list[AddressEvent] = []
        self._roots: list[int] = [init_pgd] if la >= _KERNEL_HALF else []
        for known in replay.roots:
            self._roots += [cr3 & PHYSICAL_MASK for cr3 in known.values()]
        self._roots = list(dict.fromkeys(self._roots))
        self._path: set[int] = set()
        self._views = {root: self._view(root) for root in self._roots}
        self._cause = ""
        self._stale = self._find_stale()
        for root, view in self._views.items():
            if view.level:
                size = page_size(view.level)
                self.events.append(AddressEvent(0, 0, 0, "swapper", "mapped", "", "", "boot", (), root, view.entry, size))
                break

    def follow(self, changes: Iterable[AnyChange]) -> list[AddressEvent]:
        """Go through changes; returns the events of all that were gone through."""
        for change in changes:
            if isinstance(change, TlbFilled):
                # What is cached for other addresses is not followed.
                if self.la >> 9 * change.level + 3 == change.number:
                    self._filled(change)
            elif isinstance(change, TlbDropped):
                if self.la >> 9 * change.level + 3 == change.number:
                    self._dropped(change)
            elif isinstance(change, Invalidated):
                self._invalidated(change)
            else:
                self.replay.apply(change)
                if isinstance(change, TableStored):
                    self._stored(change)
                elif isinstance(change, RootLoaded):
                    self._add_root(change)
                elif isinstance(change, FlushAsked):
                    self._cause = change.cause
        return self.events

    # ---------------------------------------------------------------- tables

    def _view(self, root: int) -> View:
        regs = replace(self.replay.regs, cr3=root)
        self._path.update(entry_pa for _, entry_pa, _ in inspect(self.replay.tables, regs, self.la))
        level, entry, reserved = effective(self.replay.tables, regs, self.la)
        return View(level, entry) if level and not reserved else _NOTHING

    def _stored(self, change: TableStored) -> None:
        if not any(pa <= at < pa + len(data) for pa, data in change.chunks for at in self._path):
            return
        self._path.clear()
        found: dict[tuple[View, View], int] = {}
        for root in self._roots:
            before, now = self._views[root], self._view(root)
            self._views[root] = now
            found.setdefault((before, now), root)
        for (before, now), root in found.items():
            for what in _differences(before, now):
                self._add(change, what, change.function, root=root, view=now)
        self._check_stale(change)

    def _add_root(self, change: RootLoaded) -> None:
        root = change.cr3 & PHYSICAL_MASK
        if root not in self._views:
            self._roots.append(root)
            self._views[root] = now = self._view(root)
            if now not in [self._views[other] for other in self._roots[:-1]]:
                for what in _differences(_NOTHING, now):
                    self._add(change, what, "MOV to CR3", root=root, view=now)
        self._check_stale(change)

    # ---------------------------------------------------------------- caches

    def _filled(self, change: TlbFilled) -> None:
        news = self.replay.fill_is_news(change)
        self.replay.apply(change)
        if not news:
            return
        if not change.table:
            view = View(change.level, (change.value | P) ^ XD)
            self._add(change, "cached", "", cpus=(change.cpu,), view=view)
        elif change.level == Level.PDE:
            self._add(change, "table cached", "", cpus=(change.cpu,))
        self._check_stale(change)

    def _dropped(self, change: TlbDropped) -> None:
        key = change.pcid, change.level, change.table, change.number
        if key in self.replay.tlbs[change.cpu]:
            self.replay.apply(change)
            self._gone(change, [key], "#PF" if change.access else self._cause if change.call else "")

    def _invalidated(self, change: Invalidated) -> None:
        gone = self.replay.holds(change, self.la)
        if gone:
            self.replay.apply(change)
            self._gone(change, gone, self._cause if change.call else "")

    def _gone(self, change: AnyChange, keys: list[Key], cause: str) -> None:
        if any(not table for _, _, table, _ in keys):
            self._add(change, "dropped", cause, cpus=(change.cpu,))
        if any(table and level == Level.PDE for _, level, table, _ in keys):
            self._add(change, "table dropped", cause, cpus=(change.cpu,))
        self._check_stale(change)

    def _find_stale(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """Cached entries for the address that memory no longer says: by CPU and key, in what they differ."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        replay = self.replay
        for cpu, tlb in enumerate(replay.tlbs):
            pcids = [-1, *replay.roots[cpu]]
            for pcid in pcids:
                cr3 = replay.current[cpu][1] if pcid < 0 else replay.roots[cpu][pcid]
                regs = replace(replay.regs, cr3=cr3)
                for level in (1, 2, 3):
                    number = self.la >> 9 * level + 3
                    packed = tlb.get((pcid, level, False, number))
                    if isinstance(packed, int):
                        base = number << 9 * level + 3
                        page = Cached(base, Level(level), None if pcid < 0 else pcid, packed ^ XD)
                        # A large page is compared where it matters: at the address itself.
                        differs = compare_page(replay.tables, regs, page if level == 1 else _slice(page, self.la))
                        if differs is not None:
                            found[cpu, 0, pcid, level] = differs.differs
                for level in range(2, replay.regs.levels + 1):
                    number = self.la >> 9 * level + 3
                    kept = tlb.get((pcid, level, True, number))
                    if isinstance(kept, tuple):
                        rights = (kept[1] ^ XD) & (RW | US | XD)
                        table = CachedTable(number << 9 * level + 3, Level(level), pcid, kept[0] << 3, rights)
                        differs = compare_table(replay.tables, regs, table)
                        if differs is not None:
                            found[cpu, 1, pcid, level] = differs.differs
        return found

    def _check_stale(self, change: AnyChange) -> None:
        now = self._find_stale()
        if now == self._stale:
            return
        new = {key: differs for key, differs in now.items() if self._stale.get(key) != differs}
        if new:
            cpus = tuple(sorted({key[0] for key in new}))
            differs = tuple(dict.fromkeys(name for names in new.values() for name in names))
            function = change.function if isinstance(change, TableStored) else ""
            self._add(change, "stale", function, cpus=cpus, differs=differs)
        gone = {key[0] for key in self._stale if key not in now} - {key[0] for key in now}
        if gone and isinstance(change, TableStored):
            self._add(change, "fresh", change.function, cpus=tuple(sorted(gone)))
        self._stale = now

    def _add(
        self, change: AnyChange, what: str, function: str, *, cpus: tuple[int, ...] = (), root: int = 0, view: View = _NOTHING,
        differs: tuple[str, ...] = (),
    ) -> None:
        size = page_size(view.level) if view.level else 0
        self.events.append(AddressEvent(
            change.step, change.cpu, change.pid, change.comm, what, function, change.call, change.place, cpus, root, view.entry,
            size, differs,
        ))


def _slice(page: Cached, la: int) -> Cached:
    """A large page seen from the 4 KiB page at `la`: `pa` and rights are the same, and so is its level."""
    return Cached(la & -(1 << 12), page.level, page.pcid, page.entry)


def _differences(before: View, now: View) -> list[str]:
    if before == now:
        return []
    if not now.level:
        return ["unmapped"]
    changed = [] if before.level else ["mapped"]
    if before.level and (before.level != now.level or before.pa_base != now.pa_base):
        changed.append("moved")
    bits = (now.entry ^ before.entry) if before.level else 0
    for bit, on, off in ((RW, "writable", "read-only"), (XD, "not executable", "executable"), (US, "user", "supervisor")):
        if bits & bit:
            changed.append(on if now.entry & bit else off)
    return changed
