"""A walk of the page tables drawn level by level, each entry with its bits, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass

from emu.kernel.kernel import Kernel
from emu.memory import BusError
from emu.mmu.entry import PHYSICAL_MASK, PKEY_SHIFT, Entry, Level, is_canonical

# Linux's name of the table level; with 4 levels the p4d is folded into the pgd.
_LINUX_NAMES = {Level.PTE: "pte", Level.PDE: "pmd", Level.PDPTE: "pud", Level.PML4E: "p4d", Level.PML5E: "pgd"}
_SIZES = {Level.PTE: "4 KiB", Level.PDE: "2 MiB", Level.PDPTE: "1 GiB"}
_TABLE_BITS = (Entry.P, Entry.RW, Entry.US, Entry.PWT, Entry.PCD, Entry.A)
_LEAF_BITS = (*_TABLE_BITS, Entry.D)
# By PWT, PCD and PAT, for the PAT that Linux programs.
_MEMORY_TYPES = ("WB", "WC", "UC-", "UC", "WB", "WP", "UC-", "WT")


@dataclass(frozen=True, slots=True)
class WalkStep:
    """One entry of a walk: SDM's and Linux's name of its level, index in its table, physical address, value, names of its bits."""

    level: str
    linux: str
    index: int
    entry_pa: int
    entry: int
    bits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WalkReport:
    """A whole walk. `ends` says how it ended: "mapped", "not present", "not canonical" or "outside RAM".

    When mapped, `pa` is the physical address, `page_size` in bytes; `rights` are those of all entries together: "RW" or "ro",
    "US" or "supervisor", "X" or "XD"; `memory_type` is the PAT's.
    """

    la: int
    cr3: int
    levels: int
    steps: tuple[WalkStep, ...]
    ends: str
    pa: int | None = None
    page_size: int | None = None
    rights: tuple[str, ...] = ()
    memory_type: str | None = None


def walk_report(kernel: Kernel, cr3: int, la: int) -> WalkReport:
    """Walk the tables of a CR3 for `la` as they are now, past every TLB, without judging permissions."""
    levels = kernel.layout.levels
    if not is_canonical(la, levels):
        return WalkReport(la, cr3, levels, (), "not canonical")
    try:
        entries = kernel.entries(cr3, la)
    except BusError:
        entries = []
    if not entries:
        return WalkReport(la, cr3, levels, (), "outside RAM")
    steps = []
    rights, denied = int(Entry.RW | Entry.US), 0
    for level, entry_pa, entry in entries:
        is_leaf = level == Level.PTE or bool(entry & Entry.PS)
        bits = entry_bits(level, entry, is_leaf)
        steps.append(WalkStep(level.name, _linux_name(level, levels), entry_pa >> 3 & 511, entry_pa, entry, bits))
        rights &= entry
        denied |= entry & Entry.XD
    level, _, entry = entries[-1]
    if not entry & Entry.P or (level != Level.PTE and not entry & Entry.PS):
        return WalkReport(la, cr3, levels, tuple(steps), "not present" if not entry & Entry.P else "outside RAM")
    size = 1 << 12 + 9 * (level - 1)
    pat = Entry.PAT if level == Level.PTE else Entry.PAT_LARGE
    kind = _MEMORY_TYPES[bool(entry & Entry.PWT) + 2 * bool(entry & Entry.PCD) + 4 * bool(entry & pat)]
    granted = (
        "RW" if rights & Entry.RW else "ro", "US" if rights & Entry.US else "supervisor", "XD" if denied else "X",
    )
    pa = entry & PHYSICAL_MASK & -size | la & size - 1
    return WalkReport(la, cr3, levels, tuple(steps), "mapped", pa, size, granted, kind)


def _linux_name(level: Level, levels: int) -> str:
    return "pgd" if level == levels else _LINUX_NAMES[level]


def entry_bits(level: Level, entry: int, is_leaf: bool) -> tuple[str, ...]:
    """Names of the bits that are set in an entry, as the SDM has them; none for one that is not present."""
    if not entry & Entry.P:
        return ()
    names = [bit.name or "" for bit in (_LEAF_BITS if is_leaf else _TABLE_BITS) if entry & bit]
    if is_leaf:
        names += ["PS"] if level != Level.PTE else []
        names += ["PAT"] if entry & (Entry.PAT if level == Level.PTE else Entry.PAT_LARGE) else []
        names += ["G"] if entry & Entry.G else []
        key = entry >> PKEY_SHIFT & 15
        names += [f"PK={key}"] if key else []
    return (*names, "XD") if entry & Entry.XD else tuple(names)


def walk_lines(report: WalkReport, place: str) -> list[str]:
    """The report as text; `place` says in words what the address lies in."""
    lines = [f"{report.la:#018x}, CR3 {report.cr3:#x}, {report.levels} levels: {place}"]
    for step in report.steps:
        bits = " ".join(step.bits) if step.bits else "not present"
        lines.append(f"{step.level:<5} {step.linux} [{step.index:3d}] at {step.entry_pa:#012x} = {step.entry:#018x}  {bits}")
    if report.ends != "mapped":
        return [*lines, report.ends]
    size = next(text for level, text in _SIZES.items() if 1 << 12 + 9 * (level - 1) == report.page_size)
    return [*lines, f"{size} page, physical {report.pa:#x}: {' '.join(report.rights)} {report.memory_type}"]
