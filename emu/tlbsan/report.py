"""The report of a finding, in the form of KASAN's (v6.12 mm/kasan/report.c)."""

from __future__ import annotations

from typing import Any

from emu.mmu.entry import RW, US, XD, G
from emu.mmu.fault import Access
from emu.mmu.staleness import Cached, CachedTable
from emu.tlbsan.finding import Finding, Store

_RULE = "=" * 66
_SIZES = {1: "4K", 2: "2M", 3: "1G"}
_TABLES = {2: "PDE", 3: "PDPTE", 4: "PML4E", 5: "PML5E"}
_VERBS = {int(Access.READ): "Read", int(Access.WRITE): "Write", int(Access.FETCH): "Instruction fetch"}


def lines(finding: Finding) -> list[str]:
    """The lines that go to the kernel log."""
    size = f" of size {finding.size}" if finding.size else ""
    mode = "user " if finding.user else ""
    return [
        _RULE,
        f"BUG: TLBSan: {finding.kind.value} in {finding.symbol}",
        f"{_VERBS[finding.access]}{size} at addr {finding.la:016x} by {mode}task {finding.comm}/{finding.pid} on CPU {finding.cpu}",
        "",
        *finding.trace,
        "",
        *_entry(finding),
        "",
        *_store(finding.store, finding.la),
        f"Flush: {finding.verdict}",
        f"CPUs that invalidated the page since the store: {', '.join(map(str, finding.reached)) or 'none'}",
        "",
        *_owners(finding),
        _RULE,
    ]


def finding_json(finding: Finding) -> dict[str, Any]:
    """The same as plain data; docs/json.md describes it."""
    entry, fill, store = finding.entry, finding.fill, finding.store
    return {
        "kind": finding.kind.name.lower().replace("_", "-"),
        "title": f"{finding.kind.value} in {finding.symbol}",
        "cpu": finding.cpu,
        "address": finding.la,
        "access": Access(finding.access).name.lower(),
        "size": finding.size,
        "user": finding.user,
        "rip": finding.rip,
        "symbol": finding.symbol,
        "comm": finding.comm,
        "pid": finding.pid,
        "time": finding.time,
        "trace": list(finding.trace),
        "entry": {
            "table": isinstance(entry, CachedTable),
            "level": int(entry.level),
            "address": entry.la,
            "frame": (entry.table if isinstance(entry, CachedTable) else entry.pa(entry.la)) >> 12,
            "pcid": entry.pcid,
            "rights": _rights(entry.rights if isinstance(entry, CachedTable) else entry.entry),
        },
        "frame": None if finding.pa is None else finding.pa >> 12,
        "now": finding.now,
        "filled": None if fill is None else {
            "symbol": fill.rip, "instructions": fill.instructions, "address_owner": fill.address_owner,
            "frame_owner": fill.frame_owner,
        },
        "store": None if store is None else {
            "function": store.function, "call": store.call, "caller": store.caller, "cpu": store.cpu, "time": store.time,
            "start": store.start, "end": store.end, "trace": list(store.trace),
        },
        "flush": finding.verdict,
        "reached": list(finding.reached),
        "address_owner": finding.address_owner,
        "frame_owner": finding.frame_owner,
    }


def _entry(finding: Finding) -> list[str]:
    entry = finding.entry
    went = "its walk faulted" if finding.pa is None else f"went to frame {finding.pa >> 12:#x}"
    found = [f"The access {went}; page tables say: {finding.now}"]
    if isinstance(entry, CachedTable):
        found.append(
            f"It used a {_TABLES[entry.level]} of the paging-structure cache for {entry.la:#018x}:"
            f" table in frame {entry.table >> 12:#x}, {_rights(entry.rights)}, PCID {entry.pcid:#x}"
        )
    else:
        found.append(_page(entry))
    fill = finding.fill
    if fill is None:
        found.append("Filled: not tracked in this run")
    else:
        found.append(f"Filled by {fill.rip}" + (f", instruction {fill.instructions} of the CPU" if fill.instructions else ""))
    return found


def _page(entry: Cached) -> str:
    owner = "global" if entry.pcid is None else f"PCID {entry.pcid:#x}"
    space = ", global bit" if entry.pcid is not None and entry.entry & G else ""
    return (
        f"It used the TLB entry of {entry.la:#018x}: {_SIZES[entry.level]} page, frame {entry.pa(entry.la) >> 12:#x},"
        f" {_rights(entry.entry)}, {owner}{space}"
    )


def _rights(entry: int) -> str:
    who = "user" if entry & US else "supervisor"
    return f"r{'w' if entry & RW else '-'}{'-' if entry & XD else 'x'} {who}"


def _store(store: Store | None, la: int) -> list[str]:
    if store is None:
        return ["Made stale by: no store that was seen"]
    by = f" in {store.call}" if store.call else ""
    caller = f" called from {store.caller}" if store.call and store.caller else f" at {store.caller}" if store.caller else ""
    found = [f"Made stale by {store.function}{by}{caller} on CPU {store.cpu} at {store.time} ns (store {store.number})"]
    if not (store.start <= la < store.end and store.end - store.start == 4096) and store.end - store.start < 1 << 64:
        found.append(f" it changed entries of {store.start:#x}-{store.end:#x}")
    return found + list(store.trace)


def _owners(finding: Finding) -> list[str]:
    found = []
    if finding.fill is not None:
        found.append(f"The address was, when the entry was filled: {finding.fill.address_owner}")
    found.append(f"The address is now: {finding.address_owner}")
    if finding.fill is not None:
        found.append(f"The frame was, when the entry was filled: {finding.fill.frame_owner}")
    found.append(f"The frame is now: {finding.frame_owner}")
    return found
