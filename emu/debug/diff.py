"""What is different between two moments of a run: areas, page tables, what the CPUs cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from emu.kernel.kernel import Kernel
from emu.kernel.pgtable import PageTable
from emu.kernel.vmallocinfo import vmallocinfo
from emu.machine import Machine
from emu.memory import BusError
from emu.mmu.entry import PHYSICAL_MASK, PS, RW, US, XD, A, D, Entry, G, Level, P, is_leaf, page_size
from emu.mmu.mmu import Mmu
from emu.mmu.walk import combine

_FLAGS = (("RW", RW), ("US", US), ("PWT", int(Entry.PWT)), ("PCD", int(Entry.PCD)), ("A", A), ("D", D), ("G", G), ("XD", XD))


@dataclass(frozen=True, slots=True)
class Mapping:
    """Pages of one size that lie behind each other at [start, end) on frames that do, too, from `pa` on: effective flags' names."""

    start: int
    end: int
    pa: int
    page_size: int
    flags: tuple[str, ...]

    @property
    def kind(self) -> tuple[int, int, tuple[str, ...]]:
        """The same for mappings that could be parts of one: how far physical addresses are from linear ones, page size, flags."""
        return self.pa - self.start, self.page_size, self.flags

    def part(self, start: int, end: int) -> Mapping:
        """The pages in [start, end)."""
        return Mapping(start, end, self.pa + start - self.start, self.page_size, self.flags)

    def text(self) -> str:
        """One line."""
        sizes = {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}
        return f"{self.start:#x}-{self.end:#x} {sizes[self.page_size]} pa {self.pa:#x} {' '.join(self.flags) or '-'}"


@dataclass(frozen=True, slots=True)
class Changed:
    """What only the first moment has, and what only the second has, as sorted lines; `name` says of what."""

    name: str
    removed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def anything(self) -> bool:
        """There is a difference."""
        return bool(self.removed or self.added)


@dataclass(frozen=True, slots=True)
class Moment:
    """A machine's state at a step: for each name that is compared what there is, as lines or as mappings."""

    step: int
    parts: dict[str, tuple[str, ...] | tuple[Mapping, ...]]


def moment(machine: Machine, step: int) -> Moment:
    """The areas, the page tables of init_mm and of each other CR3 that a CPU knows, and each CPU's TLB and structure caches."""
    kernel = machine.kernel
    parts: dict[str, tuple[str, ...] | tuple[Mapping, ...]] = {
        "areas": tuple(row.text() for row in vmallocinfo(kernel.vmalloc, kernel.symbol_text))
    }
    init_pgd = kernel.init_mm.pgd
    parts["page tables"] = _mappings(machine, init_pgd, 0)
    for pgd in _other_roots(machine, kernel):
        parts[f"page tables of CR3 {pgd:#x}"] = _mappings(machine, pgd, init_pgd)
    for cpu in machine.cpus:
        parts[f"CPU {cpu.id} registers"] = (f"CR0 {cpu.mmu.cr0:#x}", f"CR3 {cpu.mmu.cr3:#x}", f"CR4 {cpu.mmu.cr4:#x}")
        parts[f"CPU {cpu.id} TLB"] = tuple(_tlb_lines(cpu.mmu))
        parts[f"CPU {cpu.id} structure caches"] = tuple(
            f"{_pcid(context.pcid)} {Level(level).name} {la:#x} table {table:#x} {_rights(rights)}"
            for context, level, la, table, rights in cpu.mmu.tlb.tables()
        )
    return Moment(step, parts)


def diff(first: Moment, second: Moment) -> list[Changed]:
    """What changed, by name in the order in which a moment has them; names without a difference are left out."""
    names = dict.fromkeys((*first.parts, *second.parts))
    found = []
    for name in names:
        before, after = first.parts.get(name, ()), second.parts.get(name, ())
        one = Changed(name, _without(before, after), _without(after, before))
        if one.anything:
            found.append(one)
    return found


def diff_lines(first: Moment, second: Moment) -> list[str]:
    """The difference as text: a headline for each name, - for what went, + for what came."""
    lines = []
    for changed in diff(first, second):
        lines.append(changed.name)
        lines += [f"  - {line}" for line in changed.removed]
        lines += [f"  + {line}" for line in changed.added]
    return lines or [f"nothing changed between steps {first.step} and {second.step}"]


def _without(these: tuple[str, ...] | tuple[Mapping, ...], others: tuple[str, ...] | tuple[Mapping, ...]) -> tuple[str, ...]:
    """The lines of what is in `these` alone; of mappings, the parts that are."""
    there = {one for one in others if isinstance(one, str)}
    # Parts of mappings are equal when they map their addresses alike.
    alike: dict[tuple[int, int, tuple[str, ...]], list[Mapping]] = {}
    for one in others:
        if isinstance(one, Mapping):
            alike.setdefault(one.kind, []).append(one)
    lines: list[str] = []
    for one in these:
        if isinstance(one, str):
            lines += [one] if one not in there else []
        else:
            lines += [part.text() for part in _parts_without(one, alike.get(one.kind, []))]
    return tuple(lines)


def _parts_without(one: Mapping, others: list[Mapping]) -> Iterator[Mapping]:
    """The parts of a mapping that none of `others`, ascending, has."""
    at = one.start
    for other in others:
        if at < other.end and other.start < one.end:
            if at < other.start:
                yield one.part(at, other.start)
            at = max(at, other.end)
    if at < one.end:
        yield one.part(at, one.end)


def _other_roots(machine: Machine, kernel: Kernel) -> list[int]:
    known = [cr3 & PHYSICAL_MASK for cpu in machine.cpus for cr3 in (cpu.mmu.cr3, *cpu.mmu.roots.values())]
    return sorted({*known, *kernel.init_mm.pgds} - {kernel.init_mm.pgd})


# ---------------------------------------------------------------- page tables


def mappings(tables: PageTable, pgd: int, beside: int = 0) -> Iterator[Mapping]:
    """The mappings under a top table, ascending; entries that the top table `beside` has, too, are left out.

    Raises BusError where a table is not in RAM.
    """
    return _joined(_leaves(tables, pgd, tables.levels, 0, (1 << 64) - 1, beside))


def _leaves(tables: PageTable, table: int, level: int, base: int, rights: int, beside: int) -> Iterator[Mapping]:
    entries = tables.memory.table(table).tolist()
    others = tables.memory.table(beside).tolist() if beside else []
    size = page_size(level)
    for i, entry in enumerate(entries):
        if not entry & P or (others and others[i] == entry):
            continue
        la = base + i * size
        if level == tables.levels and i >= 256:
            la |= -(1 << 9 * level + 12) & (1 << 64) - 1
        narrowed = combine(rights, entry)
        if is_leaf(level, entry):
            effective = (entry ^ XD) & narrowed ^ XD
            flags = tuple(name for name, bit in _FLAGS if effective & bit)
            yield Mapping(la, la + size, entry & PHYSICAL_MASK & -size, size, flags)
        elif not entry & PS:
            yield from _leaves(tables, entry & PHYSICAL_MASK, level - 1, la, narrowed, 0)


def _joined(found: Iterable[Mapping]) -> Iterator[Mapping]:
    last: Mapping | None = None
    for one in found:
        if last is not None and (last.end, last.pa + last.end - last.start) == (one.start, one.pa) and (
            last.page_size == one.page_size and last.flags == one.flags
        ):
            last = Mapping(last.start, one.end, last.pa, last.page_size, last.flags)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _mappings(machine: Machine, pgd: int, beside: int) -> tuple[Mapping, ...] | tuple[str, ...]:
    try:
        return tuple(mappings(machine.kernel.init_mm, pgd, beside))
    except BusError as error:
        return (f"the page tables lead out of RAM: {error}",)


# ---------------------------------------------------------------- TLBs


def _tlb_lines(mmu: Mmu) -> Iterator[str]:
    for cached in mmu.listing():
        flags = " ".join(name for name, bit in _FLAGS if cached.entry & bit) or "-"
        sizes = {1: "4K", 2: "2M", 3: "1G"}
        yield f"{_pcid(cached.pcid)} {cached.la:#x} {sizes[cached.level]} pa {cached.pa(cached.la):#x} {flags}"


def _pcid(pcid: int | None) -> str:
    return "global" if pcid is None else f"PCID {pcid:#x}"


def _rights(mask: int) -> str:
    """What a rights mask leaves; bit 63 in it means that execution is permitted."""
    return " ".join((
        "RW" if mask & RW else "ro", "US" if mask & US else "supervisor", "X" if mask & XD else "XD",
    ))
