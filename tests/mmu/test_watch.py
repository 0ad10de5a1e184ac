"""Uses of stale translations are seen: all of them, each at its first use, and no others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from paging_tables import OPEN, ROOT, USER_TABLE, Tables

from emu.memory import Memory
from emu.mmu.entry import PHYSICAL_MASK, PS, RW, US, XD, A, D, G, P
from emu.mmu.fault import Access, PageFault
from emu.mmu.mmu import Grant, Mmu
from emu.mmu.registers import CR3_NO_INVALIDATE, RESET_CR4, Cr4
from emu.mmu.table_frames import TableFrames
from emu.mmu.tlb import Geometry, Tlb, TlbMode
from emu.mmu.walk import PagingRegisters, walk
from emu.mmu.watch import KERNEL_HALF, StaleUse, Watch

LA = 0x7F00_0000_0000
PA = 0x30_0000
PAGE = 0x1000
HUGE = 0x20_0000
R, W, X = Access.READ, Access.WRITE, Access.FETCH
CR4 = RESET_CR4 | int(Cr4.PGE | Cr4.PCIDE)
GRANTS = {R: Grant.R, W: Grant.W, X: Grant.X}


class Watched:
    """CPUs over one memory whose uses of stale entries are kept."""

    def __init__(self, cpus: int = 1, flags: int = OPEN, level: int = 1, tracked: tuple[int, ...] = ()) -> None:
        self.tables = Tables()
        self.tables.map(LA, PA if level == 1 else 0, flags, level)
        self.uses: list[tuple[int, StaleUse]] = []
        self.drops = [0] * cpus
        shared = TableFrames()
        self.mmus = [Mmu(self.tables.memory) for _ in range(cpus)]
        for number, mmu in enumerate(self.mmus):
            mmu.reset(cr3=ROOT, cr4=CR4)
            mmu.watch = Watch(mmu, shared, lambda use, number=number: self.uses.append((number, use)), tracked)
            mmu.on_drop = lambda number=number: self.drop(number)
        self.mmu = self.mmus[0]

    def drop(self, number: int) -> None:
        self.drops[number] += 1

    def change(self, la: int = LA, level: int = 1, size: int = PAGE, *, set_: int = 0, clear: int = 0) -> None:
        """Change an entry and tell all CPUs."""
        self.tables.change(la, level, set_, clear)
        self.tell(la, la + size)

    def tell(self, start: int, end: int, **how: bool) -> None:
        for mmu in self.mmus:
            assert mmu.watch is not None
            mmu.watch.recheck(start, end, **how)


def test_a_use_after_unmap_is_told_and_still_goes_where_the_entry_says() -> None:
    on = Watched()
    on.mmu.fill(LA, R, True)
    on.change(clear=P)
    assert on.mmu.fill(LA, R, True) == PA | Grant.R
    (_, use), = on.uses
    assert (use.la, use.access, use.pa, use.fresh) == (LA, R, PA, None)
    assert use.fault is not None and not use.fault.error & 1
    assert on.mmu.translate(LA + 8, R, user=True) == PA + 8
    assert len(on.uses) == 2, "the model's own accesses are uses too"


def test_a_flushed_entry_is_watched_no_more() -> None:
    for flush in (
        lambda mmu: mmu.invlpg(LA), lambda mmu: mmu.load_cr3(ROOT), lambda mmu: mmu.invpcid(0, 0, LA),
        lambda mmu: mmu.invpcid(2, 0, 0),
        lambda mmu: mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE)),
    ):
        on = Watched()
        on.mmu.fill(LA, R, True)
        on.change(clear=P)
        assert on.mmu.watch.watched
        flush(on.mmu)
        assert not on.mmu.watch.watched
        with pytest.raises(PageFault):
            on.mmu.fill(LA, R, True)
        assert not on.uses


def test_an_entry_refilled_after_a_flush_is_stale_by_the_next_change_anew() -> None:
    on = Watched()
    for _ in range(3):
        on.mmu.fill(LA, R, True)
        drops = on.drops[0]
        on.change(clear=P)
        assert on.drops[0] > drops, "the soft cache was told to forget"
        on.mmu.fill(LA, R, True)
        on.mmu.invlpg(LA)
        on.tables.change(LA, 1, P)
    assert len(on.uses) == 3


def test_widened_rights_and_flags_are_legal_laziness() -> None:
    on = Watched(flags=P | RW & 0 | US | A)
    on.mmu.fill(LA, R, True)
    on.change(set_=RW | D)
    on.change(clear=A | D)
    assert on.mmu.fill(LA, R, True) & Grant.R
    assert not on.uses and not on.mmu.watch.watched


def test_revoked_rights_are_told_to_the_access_that_needs_them_only() -> None:
    on = Watched()
    on.mmu.fill(LA, W, True)
    on.change(clear=RW)
    assert on.mmu.fill(LA, R, True) == PA | Grant.R, "no right to write is granted unseen"
    assert not on.uses
    assert on.mmu.fill(LA, W, True) & Grant.W
    (_, use), = on.uses
    assert use.fault is not None and use.fault.error & 1 and use.access == W


def test_a_revoked_right_to_execute_is_told_to_a_fetch() -> None:
    on = Watched()
    on.mmu.fill(LA, R, True)
    on.change(set_=XD)
    on.mmu.fill(LA, R, True)
    on.mmu.fill(LA, W, True)
    assert not on.uses
    on.mmu.fill(LA, X, True)
    assert [use.access for _, use in on.uses] == [X]


def test_a_moved_page_is_told_on_the_cpu_that_was_not_flushed() -> None:
    on = Watched(cpus=3)
    for mmu in on.mmus[:2]:
        mmu.fill(LA, R, True)
    on.change(set_=0x40_0000)
    on.mmus[0].invlpg(LA)
    for mmu in on.mmus:
        mmu.fill(LA, R, True)
    assert [number for number, _ in on.uses] == [1]
    assert on.uses[0][1].fresh == PA | 0x40_0000


def test_an_entry_that_memory_says_again_is_fresh_again() -> None:
    on = Watched()
    on.mmu.fill(LA, R, True)
    on.change(clear=P)
    on.change(set_=P)
    assert on.mmu.fill(LA, R, True) == PA | Grant.R | Grant.W
    assert not on.uses and not on.mmu.watch.watched


def test_each_4k_slice_of_a_stale_large_page_is_judged_by_itself() -> None:
    on = Watched(level=2)
    on.mmu.fill(LA, R, True)
    table = on.tables.next_table
    on.tables.next_table += PAGE
    for i in range(512):
        on.tables.memory.write_u64(table + 8 * i, i << 12 | OPEN)
    on.tables.memory.write_u64(table + 8 * 7, 0)
    on.tables.memory.write_u64(on.tables.entry_pa(LA, 2), table | USER_TABLE)
    on.tell(LA, LA + HUGE)
    on.mmu.fill(LA + 6 * PAGE, R, True)
    assert not on.uses
    on.mmu.fill(LA + 7 * PAGE, R, True)
    assert [use.la for _, use in on.uses] == [LA + 7 * PAGE]
    assert on.uses[0][1].entry.size == HUGE


def test_a_walk_through_a_stale_pde_is_told_and_what_it_filled_is_stale_too() -> None:
    on = Watched()
    on.tables.map(LA + PAGE, PA + PAGE)
    on.mmu.fill(LA, R, True)
    on.tables.memory.write_u64(on.tables.entry_pa(LA, 2), 0x80_0000 | OPEN | PS)
    on.tell(LA, LA + HUGE)
    on.mmu.invpcid(0, 0, LA + 5 * HUGE)
    assert on.mmu.fill(LA + PAGE, R, True) & PHYSICAL_MASK == PA + PAGE
    (_, use), = on.uses
    assert use.key.table and use.key.level == 2 and use.fresh == 0x80_1000
    on.mmu.fill(LA + PAGE, W, True)
    assert len(on.uses) == 2 and not on.uses[1][1].key.table


def test_a_read_by_a_stale_pde_that_may_still_read_is_not_granted_the_write_that_it_may_not() -> None:
    on = Watched()
    on.tables.map(LA + PAGE, PA + PAGE)
    on.mmu.fill(LA, R, True)
    on.change(level=2, size=HUGE, clear=RW)
    assert on.mmu.fill(LA + PAGE, R, True) == PA + PAGE | Grant.R
    assert not on.uses
    on.mmu.fill(LA + PAGE, W, True)
    assert [use.access for _, use in on.uses] == [W]


def test_a_global_entry_is_right_while_any_address_space_of_the_cpu_says_so() -> None:
    on = Watched(flags=OPEN | G)
    on.mmu.load_cr3(ROOT | 1)
    on.mmu.fill(LA, W, True)
    Tables(memory=on.tables.memory, root=0x200_0000)
    on.mmu.load_cr3(0x200_0000 | 2)
    on.tell(LA, LA + PAGE)
    assert not on.mmu.watch.watched
    on.change(clear=RW)
    assert on.mmu.watch.watched
    on.mmu.fill(LA, R, True)
    assert not on.uses
    on.mmu.fill(LA, W, True)
    assert len(on.uses) == 1


def test_a_fault_that_only_a_stale_pde_gives_is_told() -> None:
    on = Watched()
    on.mmu.fill(LA, R, True)
    on.tables.memory.write_u64(on.tables.entry_pa(LA, 2), 0x80_0000 | OPEN | PS)
    on.tell(LA, LA + HUGE)
    with pytest.raises(PageFault):
        on.mmu.fill(LA + PAGE, R, True)
    assert [use.pa for _, use in on.uses] == [None]


def test_a_pcid_that_gets_another_root_without_invalidation_uses_what_is_another_ones() -> None:
    on = Watched()
    on.mmu.load_cr3(ROOT | 1)
    on.mmu.fill(LA, R, True)
    other = Tables(memory=on.tables.memory, root=0x200_0000)
    other.map(LA, 0x50_0000)
    roots = []
    on.mmu.watch.on_root = lambda pcid, before, marks: roots.append((pcid, before, len(marks)))
    on.mmu.load_cr3(0x200_0000 | 2)
    assert not roots
    on.mmu.load_cr3(0x200_0000 | 1 | CR3_NO_INVALIDATE)
    assert roots and roots[0][:2] == (1, ROOT | 1)
    assert on.mmu.fill(LA, R, True) & PHYSICAL_MASK == PA
    assert len(on.uses) == 1


def test_the_fill_of_a_tracked_page_is_told_and_the_tlb_is_the_same() -> None:
    plain, tracking = Watched(), Watched(tracked=(LA + PAGE >> 12,))
    told = []
    tracking.mmu.watch.on_fill = lambda la, level: told.append((la, level))
    for on in (plain, tracking):
        on.tables.map(LA + PAGE, PA + PAGE)
        for la in (LA, LA + PAGE, LA, LA + PAGE):
            on.mmu.fill(la, R, True)
        on.mmu.invlpg(LA + PAGE)
        on.mmu.fill(LA + PAGE, R, True)
    assert told == [(LA + PAGE, 1)] * 2
    assert plain.mmu.listing() == tracking.mmu.listing() and plain.mmu.counters() == tracking.mmu.counters()
    assert not tracking.uses


def test_a_table_frame_is_one_that_a_walk_still_reaches() -> None:
    on = Watched()
    leaf_table = on.tables.entry_pa(LA, 1) >> 12
    assert not on.mmu.is_table_frame(leaf_table)
    on.mmu.fill(LA, R, True)
    assert on.mmu.is_table_frame(leaf_table) and on.mmu.is_table_frame(ROOT >> 12)
    assert not on.mmu.is_table_frame(PA >> 12)
    on.tables.memory.write_u64(on.tables.entry_pa(LA, 2), 0)
    assert not on.mmu.is_table_frame(leaf_table)


def test_a_store_of_the_model_to_a_page_table_is_told() -> None:
    on = Watched()
    entry_pa = on.tables.entry_pa(LA, 1)
    on.tables.map(LA + PAGE, entry_pa & -PAGE)
    on.mmu.fill(LA, R, True)
    stores = []
    on.mmu.watch.on_store = lambda *store: stores.append(store)
    on.mmu.write(LA + PAGE + entry_pa % PAGE, bytes(8))
    (frame, before, after), = stores
    assert list(on.mmu.watch.tables.changed(frame, before, after)) == [(LA, LA + PAGE)]
    assert on.tables.entry(LA, 1) == 0


def test_a_change_of_a_top_table_names_canonical_addresses() -> None:
    on = Watched()
    top = KERNEL_HALF | 0x7FFF << 48 | 0x8000_0000_0000
    on.tables.map(top, PA)
    on.mmu.fill(top, R, True)
    before = on.tables.memory.read(ROOT, PAGE)
    after = before[:2048] + bytes(8) + before[2056:]
    assert list(on.mmu.watch.tables.changed(ROOT >> 12, before, after)) == [(top, top + (1 << 39))]


# ---------------------------------------------------------------------------------------------- against an oracle

SHARED_TOP = 0x7F00_0000_0000
PRIVATE = 0x1000_0000_0000
PAGES = [base + offset for base in (SHARED_TOP, PRIVATE) for offset in (0, PAGE, HUGE, HUGE + PAGE, 1 << 30)]
ROOTS = (ROOT, 0x100_0000)


@dataclass
class World:
    """Two address spaces that share what lies at SHARED_TOP, and CPUs with a soft cache above each."""

    memory: Memory
    spaces: list[Tables]
    mmus: list[Mmu]
    uses: list[StaleUse] = field(default_factory=list)
    soft: list[dict[tuple[int, Access, bool], int]] = field(default_factory=list)
    reported: set[tuple[int, int]] = field(default_factory=set)


def world(mode: TlbMode, cpus: int) -> World:
    memory = Memory(64 << 20)
    spaces = [Tables(memory=memory, root=root) for root in ROOTS]
    for base in (0, 1):
        for page in PAGES:
            if page < SHARED_TOP or base == 0:
                spaces[base].map(page, 0, 0)
    shared = memory.read_u64(ROOTS[0] + 8 * (SHARED_TOP >> 39))
    memory.write_u64(ROOTS[1] + 8 * (SHARED_TOP >> 39), shared)
    on = World(memory, spaces, [Mmu(memory, Tlb(mode, Geometry(sets_4k=2, ways_4k=2, pde=2, pdpte=1))) for _ in range(cpus)])
    frames = TableFrames()
    for mmu in on.mmus:
        mmu.reset(cr3=ROOT | 1, cr4=CR4)
        soft: dict[tuple[int, Access, bool], int] = {}
        on.soft.append(soft)
        mmu.on_drop = soft.clear
        mmu.watch = Watch(mmu, frames, on.uses.append)
    return on


def edit(rng: random.Random, on: World) -> None:
    """Change an entry of some level; whoever changes a live one tells, as kernel code does."""
    page = rng.choice(PAGES)
    space = on.spaces[0 if page >= SHARED_TOP else rng.randrange(2)]
    pde = space.entry_pa(page, 2)
    old_pde = on.memory.read_u64(pde)
    frame = rng.randrange(0x2000, 0x2100) << 12
    rights = rng.choice((0, RW)) | rng.choice((0, US)) | rng.choice((0, 0, XD)) | rng.choice((0, A, A | D))
    leaf = rng.choice((0, P)) | rights | frame | (rng.choice((0, G)) if page >= SHARED_TOP else 0)
    match rng.randrange(8):
        case 0:  # a large leaf in place of a table, or back to an empty table
            if old_pde & PS or not old_pde:
                table = space.next_table
                space.next_table += PAGE
                new = table | USER_TABLE
            else:
                new = (leaf | P | PS) & ~(PHYSICAL_MASK & HUGE - 1)
            on.memory.write_u64(pde, new)
            live, size = old_pde & P, HUGE
        case 1 if not old_pde & PS and old_pde & P:  # the rights of a table
            on.memory.write_u64(pde, old_pde ^ rng.choice((RW, US, XD)))
            live, size = P, HUGE
        case _ if not old_pde & PS and old_pde & P:
            where = space.entry_pa(page, 1)
            old = on.memory.read_u64(where)
            if rng.randrange(3) == 0:
                leaf = old ^ rng.choice((RW, US, XD, P, A, D))
            on.memory.write_u64(where, leaf)
            live, size = old & P, PAGE
        case _:
            return
    if live:
        start = page & -size
        for mmu in on.mmus:
            mmu.watch.recheck(start, start + size)
        on.reported = {(cpu, other) for cpu, other in on.reported if not start <= other < start + size}


def invalidate(rng: random.Random, mmu: Mmu) -> None:
    page, pcid = rng.choice(PAGES), rng.choice((1, 2))
    match rng.randrange(6):
        case 0:
            mmu.invlpg(page)
        case 1:
            mmu.invpcid(0, pcid, page)
        case 2 | 3:
            # PCID n is for address space n, as a kernel has it.
            mmu.load_cr3(ROOTS[pcid - 1] | pcid | rng.choice((0, CR3_NO_INVALIDATE, CR3_NO_INVALIDATE)))
        case 4:
            mmu.invpcid(rng.choice((1, 3)), pcid, 0)
        case 5:
            mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))
            mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))


def naive(on: World, mmu: Mmu, page: int, access: Access, user: bool) -> int | PageFault:
    """The frame that memory alone gives to the access, or its fault."""
    regs = mmu.regs
    assert isinstance(regs, PagingRegisters)
    try:
        return walk(on.memory, regs, page, access, user, set_ad=False).pa & ~(PAGE - 1)
    except PageFault as fault:
        return fault


def check_use(rng: random.Random, on: World) -> bool:
    """One access by the way of the soft cache; whatever differs from memory must be told, and nothing else."""
    cpu = rng.randrange(len(on.mmus))
    mmu = on.mmus[cpu]
    page, access, user = rng.choice(PAGES), rng.choice((R, R, W, X)), rng.random() < 0.5
    fresh = naive(on, mmu, page, access, user)
    cached = on.soft[cpu].get((page, access, user))
    on.uses.clear()
    used: int | PageFault
    if cached is not None:
        if cached != fresh:
            assert (cpu, page) in on.reported, "a stale use behind the soft cache was never told"
        return cached != fresh
    try:
        grant = mmu.fill(page, access, user)
        used = grant & PHYSICAL_MASK
        if mmu.tlb.mode is not TlbMode.NONE:
            for kind, right in GRANTS.items():
                if grant & right and not (access is X and kind is W):
                    on.soft[cpu][page, kind, user] = used
    except PageFault as fault:
        used = fault
    if isinstance(used, PageFault):
        # A refused right is laziness, whoever refuses; a page that only a stale structure misses is not.
        wrong = not used.error & 1 and not isinstance(fresh, PageFault)
    else:
        wrong = isinstance(fresh, PageFault) or fresh != used
    assert bool(on.uses) == wrong, (hex(page), access, user, used, fresh, mmu.listing())
    if wrong:
        on.reported.add((cpu, page))
    return wrong


@pytest.mark.parametrize("mode", list(TlbMode))
@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_tell_of_exactly_the_uses_that_memory_would_not_give(seed: int, mode: TlbMode) -> None:
    rng = random.Random(seed)
    on = world(mode, cpus=3)
    stale = 0
    for _ in range(2000):
        if rng.random() < 0.4:
            edit(rng, on)
        if rng.random() < 0.15:
            invalidate(rng, rng.choice(on.mmus))
        for _ in range(2):
            stale += check_use(rng, on)
        if rng.random() < 0.1:
            for mmu in on.mmus:
                mmu.validate()
    assert (stale > 50) == (mode is not TlbMode.NONE), f"{stale} stale uses"
