"""Compare the walker with Unicorn's own, over the product of everything that decides whether an access is permitted.

A case is a set of paging-structure entries along one path, a set of control registers, a privilege and a kind of access. Both
walkers translate it; compared are whether it faults, the error code, CR2, the frame reached, and every entry's bits after
it. A difference must fall under one of RULES, each of which names the section of the SDM that decides; any other is a failure.

    python tools/permissions.py                    200,000 cases drawn with seed 0
    python tools/permissions.py --cases N --seed S
    python tools/permissions.py --all --jobs 2     every leaf x every state of one upper entry x every register setting

Exit code 0: no unexplained difference, 1: some (the first ones are printed), 2: bad usage or no Unicorn.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

try:
    from native_walker import (
        DATA,
        FETCH,
        FRAME,
        IMPLICIT,
        KEY,
        KINDS,
        LA,
        PATH,
        PKRU_SETTINGS,
        PS,
        READ,
        ROOT,
        RW,
        US,
        WRITE,
        XD,
        A,
        Case,
        D,
        G,
        NativeWalker,
        Outcome,
        P,
        Setting,
        build_memory,
        slots,
    )

    from emu.memory import Memory
    from emu.mmu.entry import Level, describe, page_size
    from emu.mmu.fault import Access, PageFault, PfError
    from emu.mmu.walk import PagingRegisters, walk
except ImportError as missing:
    print(f"permissions: {missing}", file=sys.stderr)
    sys.exit(2)


class OurWalker:
    """The walker under test over the same memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._slots = {levels: [pa >> 3 for pa in slots(levels)] for levels in (4, 5)}
        self._registers: dict[Setting, PagingRegisters] = {}

    def run(self, case: Case) -> Outcome:
        """What our walker makes of a case."""
        setting = case.setting
        u64 = self.memory.u64
        where = self._slots[setting.levels]
        for slot, entry in zip(where, case.entries, strict=False):
            u64[slot] = entry
        regs = self._registers.get(setting)
        if regs is None:
            regs = self._registers[setting] = setting.registers(ROOT[setting.levels])
        kind = setting.kind
        access = WRITE_ACCESS if kind == WRITE else FETCH_ACCESS if kind == FETCH else READ_ACCESS
        la = LA[setting.levels] + (0 if kind == FETCH else DATA)
        wrong = ""
        error: int | None = None
        try:
            done = walk(self.memory, regs, la, access, setting.cpl == 3, setting.ac, kind == IMPLICIT)
        except PageFault as fault:
            error = fault.error
            if fault.la != la:
                wrong = f"fault at {fault.la:#x}, not {la:#x}"
        else:
            if done.pa != FRAME + (la & 0xFFF) or done.level != case.leaf:
                wrong = f"translated to {done.pa:#x} by a level {done.level} leaf"
        return Outcome(error, tuple(u64[slot] for slot, _ in zip(where, case.entries, strict=False)), wrong)


READ_ACCESS, WRITE_ACCESS, FETCH_ACCESS = int(Access.READ), int(Access.WRITE), int(Access.FETCH)

# ------------------------------------------------------------------------------------------------ differences explained


@dataclass(frozen=True, slots=True)
class Rule:
    """A known difference: which section of the SDM decides, and how. `deviate` turns our outcome of a case into Unicorn's."""

    name: str
    section: str
    text: str
    deviate: Callable[[OurWalker, Case, Outcome], Outcome]


def _accessed_1g_leaf(walker: OurWalker, case: Case, ours: Outcome) -> Outcome:
    """Unicorn sets A in a present PDPTE without bits 51:40 before it knows whether it is a leaf and permits the access."""
    entry = ours.entries[-1]
    high = (1 << 52) - (1 << 40) | (0 if case.setting.nxe else XD)
    reached = all(upper & A for upper in ours.entries[:-1])
    if case.leaf != Level.PDPTE or ours.error is None or not reached or not entry & P or entry & high:
        return ours
    return ours._replace(entries=(*ours.entries[:-1], entry | A))


def _implicit_heeds_ac(walker: OurWalker, case: Case, ours: Outcome) -> Outcome:
    """Unicorn judges an implicit access at CPL0 by RFLAGS.AC, as if it were an explicit one."""
    if case.setting.kind != IMPLICIT or case.setting.cpl == 3 or not (case.setting.smap and case.setting.ac):
        return ours
    return walker.run(case._replace(setting=case.setting._replace(kind=READ)))


RULES: tuple[Rule, ...] = (
    Rule(
        "accessed flag of a 1G leaf that refuses", "SDM vol. 3A 6.15, interrupt 14, footnote on the accessed flag",
        "Unicorn sets A in a 1G leaf before it checks it, in a 4K or 2M leaf after. The SDM leaves the leaf's A on a refused "
        "access to the processor model; we set it in a leaf of any size only with a permitted access.",
        _accessed_1g_leaf,
    ),
    Rule(
        "implicit supervisor access with AC set", "SDM vol. 3A 4.6.1",
        "Unicorn lets RFLAGS.AC override SMAP for a descriptor-table read at CPL0. The SDM refuses implicit supervisor "
        "accesses to user pages whatever AC is.",
        _implicit_heeds_ac,
    ),
)


def classify(walker: OurWalker, case: Case, ours: Outcome, native: Outcome) -> Rule | None:
    """The rule that explains a difference, or None. Where it takes several, the last one applied is named."""
    for rule in RULES:
        if rule.deviate(walker, case, ours) == native:
            return rule
    combined = ours
    named = None
    for rule in reversed(RULES):
        deviated = rule.deviate(walker, case, combined)
        if deviated != combined:
            combined, named = deviated, named or rule
    return named if combined == native else None


# ------------------------------------------------------------------------------------------------ cases

TABLE_FLAGS = (P, RW, US, XD, A)


def low_reserved(level: int) -> list[int]:
    """Reserved bits below the frame of a large leaf, or PS where no leaf is possible."""
    if level > Level.PDPTE:
        return [7]
    return list(range(13, 9 * level + 3)) if level > 1 else []


def target(levels: int, level: int, leaf: int) -> int:
    """Address bits of the path's entry of `level`: the frame, or the table below."""
    return FRAME | (PS if leaf > 1 else 0) if level == leaf else PATH[level - 1]


def draw(rng: random.Random) -> Case:
    """One case of the whole product; permissive bits are likelier, so that many cases reach the leaf."""
    bits = rng.getrandbits
    levels = 4 + bits(1)
    leaf = 1 + rng.randrange(3)
    cpl = 3 * bits(1)
    kind = KINDS[bits(2)]
    setting = Setting(
        levels, cpl, kind, bool(bits(1)), bool(bits(1)), bool(bits(1)), bool(bits(1)), bits(2) != 0,
        PKRU_SETTINGS[rng.randrange(len(PKRU_SETTINGS))],
    )
    entries = []
    user = bits(3)  # per case, lest US be clear somewhere in nearly all
    for level in range(levels, leaf - 1, -1):
        noise = bits(64)
        entry = target(levels, level, leaf) | (noise & (0x7F << 52 | 7 << 9 | 3 << 3))
        entry |= 0 if not noise & 0xF << 12 else P
        entry |= 0 if not noise & 0x7 << 16 else RW
        entry |= 0 if user == 0 or (user < 4 and noise & 3 << 20 == 0) else US
        entry |= XD if (not noise & 0xF << 22 and setting.nxe) or not noise & 0x1F << 26 else 0
        entry |= A if noise & 1 << 31 else 0
        if level == leaf:
            entry |= noise & (D | G)
            entry |= KEY << 59 if noise & 3 << 32 else 0
            entry |= noise & (PS if level == 1 else 1 << 12)  # PAT is free to be set
        if not noise & 0xF << 34:
            low = low_reserved(level) if level == leaf or level > 3 else []
            choices = [*range(40, 52), *low]
            entry |= 1 << choices[(noise >> 38) % len(choices)]
        entries.append(entry)
    return Case(setting, leaf, tuple(entries))


def every_setting() -> Iterator[Setting]:
    """Every register setting, privilege and access kind."""
    flags = (False, True)
    for levels, cpl, kind, wp, smep, smap, ac, nxe, pkru in itertools.product(
        (4, 5), (0, 3), KINDS, flags, flags, flags, flags, flags, PKRU_SETTINGS
    ):
        yield Setting(levels, cpl, kind, wp, smep, smap, ac, nxe, pkru)


def every_leaf(level: int) -> list[int]:
    """Every combination of the leaf's P, RW, US, XD, A, D, and of the first four with each kind of reserved bit."""
    leaves = []
    low = low_reserved(level)
    for flags in itertools.product(*((0, flag) for flag in (P, RW, US, XD, A, D))):
        leaves.append(sum(flags) | KEY << 59)
        if not sum(flags) & (A | D):
            leaves += [sum(flags) | 1 << bit | KEY << 59 for bit in (40, 51, *low[:1], *low[-1:])]
    return leaves


def every_table(level: int) -> list[int]:
    """The states of one upper entry: every RW, US, XD, A while present, absent, and each kind of reserved bit."""
    states = [P | sum(flags) for flags in itertools.product(*((0, flag) for flag in (RW, US, XD, A)))]
    states += [RW | US | A, P | RW | US | A | 1 << 40]
    if level > Level.PDPTE:
        states.append(P | RW | US | A | PS)
    return states


def every_case(settings: Iterable[Setting]) -> Iterator[Case]:
    """The structured product: every leaf x every state of one upper entry, the others permissive, for each setting."""
    for setting in settings:
        levels = setting.levels
        for leaf in (1, 2, 3):
            permissive = [target(levels, level, leaf) | P | RW | US | A for level in range(levels, leaf, -1)]
            leaves = [target(levels, leaf, leaf) | flags for flags in every_leaf(leaf)]
            for position, level in enumerate(range(levels, leaf, -1)):
                for state in every_table(level):
                    if state == P | RW | US | A and position:
                        continue  # the permissive path once, not once a level
                    upper = list(permissive)
                    upper[position] = target(levels, level, leaf) | state
                    for entry in leaves:
                        yield Case(setting, leaf, (*upper, entry))


# ------------------------------------------------------------------------------------------------ the run


@dataclass(slots=True)
class Report:
    """What a run found: cases, outcomes by kind, differences by rule, and the unexplained ones in words."""

    cases: int
    outcomes: Counter[str]
    explained: Counter[str]
    unexplained: list[str]
    unexplained_count: int = 0

    def add(self, other: Report) -> None:
        """Take in another worker's findings."""
        self.cases += other.cases
        self.outcomes += other.outcomes
        self.explained += other.explained
        self.unexplained_count += other.unexplained_count
        self.unexplained = (self.unexplained + other.unexplained)[:MAX_SHOWN]


MAX_SHOWN = 10


def error_name(error: int | None) -> str:
    """An error code by its flag names."""
    if error is None:
        return "permitted"
    return f"#PF {error:#04x} ({PfError(error).name or 0})"


def describe_difference(case: Case, ours: Outcome, native: Outcome) -> str:
    """A difference with flag names, level by level."""
    lines = [f"{case.setting.describe()}, {page_size(case.leaf) >> 10} KiB leaf"]
    for level, before, mine, theirs in zip(
        range(case.setting.levels, 0, -1), case.entries, ours.entries, native.entries, strict=False
    ):
        changed = "" if mine == theirs else f"  -> ours {describe(mine)}, Unicorn {describe(theirs)}"
        lines.append(f"    {Level(level).name:6}{before:#018x} {describe(before)}{changed}")
    lines.append(f"    ours    {error_name(ours.error)} {ours.wrong}")
    lines.append(f"    Unicorn {error_name(native.error)} {native.wrong}")
    return "\n".join(lines)


def compare(cases: Iterable[Case], memory: Memory | None = None) -> Report:
    """Run every case through both walkers."""
    memory = memory or build_memory()
    native_walker, our_walker = NativeWalker(memory), OurWalker(memory)
    report = Report(0, Counter(), Counter(), [])
    outcomes: Counter[int | None] = Counter()
    for case in cases:
        native = native_walker.run(case)
        ours = our_walker.run(case)
        report.cases += 1
        outcomes[ours.error] += 1
        if ours == native and not ours.wrong:
            continue
        rule = classify(our_walker, case, ours, native)
        if rule is not None:
            report.explained[rule.name] += 1
        else:
            report.unexplained_count += 1
            if len(report.unexplained) < MAX_SHOWN:
                report.unexplained.append(describe_difference(case, ours, native))
    report.outcomes = Counter({error_name(error): count for error, count in outcomes.items()})
    return report


def sample(cases: int, seed: int) -> Iterator[Case]:
    """`cases` cases drawn with `seed`."""
    rng = random.Random(seed)
    for _ in range(cases):
        yield draw(rng)


def _worker(task: tuple[str, int, int, int]) -> Report:
    kind, first, second, jobs = task
    if kind == "sample":
        return compare(sample(first, second))
    return compare(every_case(itertools.islice(every_setting(), first, None, jobs)))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="compare the walker with Unicorn's own")
    parser.add_argument("--cases", type=int, default=200_000, help="cases to draw (default 200000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--all", action="store_true", help="the whole structured product instead of a sample")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default 1)")
    options = parser.parse_args(arguments)
    if options.cases < 1 or options.jobs < 1:
        parser.error("--cases and --jobs must be at least 1")
    jobs = options.jobs
    if options.all:
        tasks = [("all", job, 0, jobs) for job in range(jobs)]
    else:
        share = -(-options.cases // jobs)
        tasks = [("sample", min(share, options.cases - job * share), options.seed * jobs + job, jobs) for job in range(jobs)]
    began = time.perf_counter()
    if jobs == 1:
        report = _worker(tasks[0])
    else:
        report = Report(0, Counter(), Counter(), [])
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for part in pool.imap(_worker, tasks):
                report.add(part)
    seconds = time.perf_counter() - began
    print(f"{report.cases} cases in {seconds:.1f} s ({report.cases / seconds:.0f}/s)")
    for name, count in sorted(report.outcomes.items()):
        print(f"  {count:9} {name}")
    for rule in RULES:
        print(f"{report.explained[rule.name]:9} differences: {rule.name} ({rule.section})\n          {rule.text}")
    print(f"{report.unexplained_count:9} differences unexplained")
    for text in report.unexplained:
        print(text)
    return 1 if report.unexplained_count else 0


if __name__ == "__main__":
    sys.exit(main())
