"""Random sequences of page-table edits, accesses and invalidations against the rules of SDM vol. 3A 4.10.4, stated apart."""

import random

import pytest
from paging_tables import OPEN, ROOT, Tables

from emu.mmu.entry import PHYSICAL_MASK, G, P
from emu.mmu.fault import Access, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.registers import CR3_NO_INVALIDATE, RESET_CR4, Cr4
from emu.mmu.tlb import Geometry, Tlb, TlbMode

PAGES = [0x7F00_0000_0000 + page for page in (0, 0x1000, 0x20_0000, 0x4000_0000, 1 << 39)]
PCIDS = (1, 2, 3)
SHARED = 0


class Rules:
    """Which leaf values each PCID (and, as SHARED, everyone) may still use for each page.

    `may[owner][page]` are all values that the leaf had since the last operation that must remove the owner's translation;
    `kept[owner][page]` is the value that a TLB which forgets nothing of its own accord holds.
    """

    def __init__(self) -> None:
        self.leaf = dict.fromkeys(PAGES, 0)
        self.may = {owner: {page: {0} for page in PAGES} for owner in (SHARED, *PCIDS)}
        self.kept: dict[int, dict[int, int]] = {owner: {} for owner in (SHARED, *PCIDS)}
        self.pcid = PCIDS[0]

    def edit(self, page: int, leaf: int) -> None:
        self.leaf[page] = leaf
        for owner in self.may.values():
            owner[page].add(leaf)

    def remove(self, owners: tuple[int, ...], pages: list[int]) -> None:
        for owner in owners:
            for page in pages:
                self.may[owner][page] = {self.leaf[page]}
                self.kept[owner].pop(page, None)

    def expected(self, page: int) -> int:
        """The leaf that an access uses in a TLB that forgets nothing; 0 for a fault."""
        for owner in (SHARED, self.pcid):
            if page in self.kept[owner]:
                return self.kept[owner][page]
        leaf = self.leaf[page]
        if leaf:
            self.kept[SHARED if leaf & G else self.pcid][page] = leaf
        return leaf

    def permitted(self, page: int) -> set[int]:
        """All leaves that an access may use."""
        return self.may[self.pcid][page] | {leaf for leaf in self.may[SHARED][page] if leaf & G} | {self.leaf[page]}


def step(rng: random.Random, mmu: Mmu, tables: Tables, rules: Rules) -> None:
    """One edit or invalidation, told to both."""
    page = rng.choice(PAGES)
    pcid = rng.choice(PCIDS)
    everyone = (SHARED, *PCIDS)
    match rng.randrange(9):
        case 0 | 1 | 2:
            leaf = 0 if rng.randrange(4) == 0 else rng.randrange(1, 64) << 12 | OPEN | rng.choice((0, G))
            tables.memory.write_u64(tables.entry_pa(page, 1), leaf)
            rules.edit(page, leaf)
        case 3:
            mmu.invlpg(page | 0xABC)
            rules.remove((SHARED, rules.pcid), [page])
        case 4:
            mmu.invpcid(0, pcid, page)
            rules.remove((pcid,), [page])
        case 5:
            mmu.load_cr3(ROOT | pcid | CR3_NO_INVALIDATE)
            rules.pcid = pcid
        case 6:
            mmu.load_cr3(ROOT | pcid)
            rules.pcid = pcid
            rules.remove((pcid,), PAGES)
        case 7:
            kind = rng.choice((1, 2, 3))
            mmu.invpcid(kind, pcid, 0)
            rules.remove({1: (pcid,), 2: everyone, 3: PCIDS}[kind], PAGES)
        case 8:
            mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))
            mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))
            rules.remove(everyone, PAGES)


def used(mmu: Mmu, page: int) -> int:
    """The frame that an access uses; 0 for a fault."""
    try:
        return mmu.fill(page, Access.READ, False) & PHYSICAL_MASK
    except PageFault as fault:
        assert not fault.error & P
        return 0


@pytest.mark.parametrize("mode", list(TlbMode))
@pytest.mark.parametrize("seed", range(4))
def test_an_access_uses_a_translation_that_nothing_had_to_remove(seed: int, mode: TlbMode) -> None:
    rng = random.Random(seed)
    tables = Tables()
    for page in PAGES:
        tables.map(page, 0, 0)
    mmu = Mmu(tables.memory, Tlb(mode, Geometry(sets_4k=2, ways_4k=2, pde=2, pdpte=1)))
    mmu.reset(cr3=ROOT | PCIDS[0], cr4=RESET_CR4 | int(Cr4.PGE | Cr4.PCIDE))
    rules = Rules()
    stale = 0
    for _ in range(2500):
        step(rng, mmu, tables, rules)
        page = rng.choice(PAGES)
        frame = used(mmu, page)
        assert frame in {leaf & PHYSICAL_MASK for leaf in rules.permitted(page)}
        if mode is TlbMode.INFINITE:
            assert frame == rules.expected(page) & PHYSICAL_MASK
        elif mode is TlbMode.NONE:
            assert frame == rules.leaf[page] & PHYSICAL_MASK
        stale += frame != rules.leaf[page] & PHYSICAL_MASK
        mmu.validate()
    assert (stale > 100) == (mode is not TlbMode.NONE), "the sequences do meet stale entries"
