"""What the TLB keeps, and what each operation must remove (SDM vol. 3A 4.10)."""

from collections.abc import Callable

import pytest
from paging_tables import OPEN, ROOT, Tables

from emu.mmu.entry import PKEY_SHIFT, RW, US, XD, A, D, G, Level, P
from emu.mmu.fault import Access, GeneralProtection, PageFault, PfError
from emu.mmu.mmu import Mmu
from emu.mmu.registers import CR3_NO_INVALIDATE, RESET_CR4, Cr0, Cr4, Efer
from emu.mmu.tlb import Geometry, Tlb, TlbMode

LA = 0xFFFF_C900_0000_0000
NEXT = LA + 0x1000
FAR = LA + (1 << 39)
OLD, NEW = 0x30_0000, 0x31_0000
R, W, X = Access.READ, Access.WRITE, Access.FETCH
PGE, PCIDE = int(Cr4.PGE), int(Cr4.PCIDE)


def machine(mode: str = "infinite", cr4: int = RESET_CR4 | PGE, flags: int = OPEN, level: int = 1) -> tuple[Mmu, Tables]:
    """An MMU and tables that map LA to OLD."""
    tables = Tables()
    tables.map(LA, OLD if level == 1 else 0, flags, level)
    mmu = Mmu(tables.memory, mode)
    mmu.reset(cr3=ROOT, cr4=cr4)
    return mmu, tables


def pa(mmu: Mmu, la: int = LA, access: int = R, user: bool = False) -> int:
    return mmu.translate(la, access, user=user)


def dropped_by(operation: Callable[[Mmu], None], cr4: int = RESET_CR4 | PGE, flags: int = OPEN, level: int = 1) -> bool:
    """Whether an operation makes the MMU see that the page of LA has moved."""
    mmu, tables = machine(cr4=cr4, flags=flags, level=level)
    before = pa(mmu)
    tables.map(LA, NEW if level == 1 else 0x20_0000 if level == 2 else 0, flags, level)
    if level == 3:
        tables.change(LA, 3, clear=P)
    operation(mmu)
    mmu.validate()
    try:
        return pa(mmu) != before
    except PageFault:
        return True


def nothing(mmu: Mmu) -> None:
    return None


# ---------------------------------------------------------------------------------------------------- what is kept


def test_an_infinite_tlb_keeps_a_translation_that_memory_no_longer_has() -> None:
    mmu, tables = machine()
    assert pa(mmu) == OLD
    tables.change(LA, 1, clear=P)
    assert pa(mmu, LA + 5) == OLD + 5
    assert mmu.fill(LA, R, False) & ~7 == OLD


def test_mode_none_keeps_nothing() -> None:
    mmu, tables = machine("none")
    assert pa(mmu) == OLD
    tables.map(LA, NEW)
    assert pa(mmu) == NEW
    assert mmu.fill(LA, R, False) & ~7 == NEW
    mmu.validate()


def test_an_absent_page_is_never_cached() -> None:
    mmu, tables = machine()
    with pytest.raises(PageFault):
        pa(mmu, NEXT)
    tables.map(NEXT, NEW)
    assert pa(mmu, NEXT) == NEW
    with pytest.raises(PageFault):
        pa(mmu, FAR)
    tables.map(FAR, NEW)
    assert pa(mmu, FAR) == NEW


def test_a_stale_table_is_used_by_later_walks_of_its_region() -> None:
    mmu, tables = machine()
    pa(mmu)
    tables.map(NEXT, OLD + 0x1000)
    old_table = tables.entry(LA, 2)
    other = 0x20_0000
    tables.memory.write_u64(tables.entry_pa(LA, 2), other | OPEN & ~D)
    tables.memory.write_u64(other + 8, NEW | OPEN)
    assert pa(mmu, NEXT) == OLD + 0x1000, "the PDE cache still names the old table"
    mmu.invlpg(0xFFFF_8000_0000_0000)
    assert pa(mmu, NEXT) == OLD + 0x1000, "the TLB entry of NEXT is another page's business"
    mmu.invlpg(NEXT)
    assert pa(mmu, NEXT) == NEW
    assert old_table & ~0xFFF != other


def test_a_stale_table_carries_the_rights_it_was_cached_with() -> None:
    mmu, tables = machine()
    tables.map(NEXT, NEW)
    tables.change(LA, 4, clear=RW)
    pa(mmu)
    tables.change(LA, 4, set_=RW)
    with pytest.raises(PageFault) as fault:
        pa(mmu, NEXT, W)
    assert fault.value.error == PfError.P | PfError.W
    assert pa(mmu, NEXT, W) == NEW, "the fault dropped the tables cached for its address"


def test_cached_rights_are_judged_by_the_registers_of_the_access() -> None:
    mmu, _ = machine(flags=OPEN & ~RW)
    pa(mmu)
    with pytest.raises(PageFault):
        pa(mmu, access=W)
    pa(mmu)
    mmu.load_cr0(mmu.cr0 & ~int(Cr0.WP))
    assert pa(mmu, access=W) == OLD
    mmu.load_cr4(mmu.cr4 | int(Cr4.SMAP))
    with pytest.raises(PageFault):
        pa(mmu)
    assert mmu.translate(LA, R, ac=True) == OLD


def test_pkru_needs_no_invalidation() -> None:
    mmu, _ = machine(flags=OPEN | 1 << PKEY_SHIFT)
    mmu.load_cr4(mmu.cr4 | int(Cr4.PKE))
    assert pa(mmu, user=True) == OLD
    mmu.load_pkru(1 << 2)
    with pytest.raises(PageFault) as fault:
        pa(mmu, user=True)
    assert fault.value.error == PfError.P | PfError.U | PfError.PK
    mmu.load_pkru(0)
    assert pa(mmu, user=True) == OLD


def test_a_write_through_a_clean_entry_walks_again_and_sets_d() -> None:
    mmu, tables = machine(flags=OPEN & ~D)
    assert mmu.fill(LA, R, False) == OLD | 1, "no write right while D is clear"
    tables.map(LA, NEW, OPEN & ~D)
    assert pa(mmu, access=W) == NEW
    assert tables.entry(LA, 1) & D
    assert pa(mmu) == NEW


def test_a_write_through_a_dirty_entry_does_not_set_d_that_software_cleared() -> None:
    mmu, tables = machine()
    pa(mmu)
    tables.change(LA, 1, clear=D | A)
    assert pa(mmu, access=W) == OLD
    assert not tables.entry(LA, 1) & (A | D)


def test_a_fault_on_a_stale_entry_comes_from_the_entry_and_drops_it() -> None:
    mmu, tables = machine(flags=OPEN & ~RW)
    pa(mmu)
    tables.change(LA, 1, set_=RW)
    with pytest.raises(PageFault) as fault:
        pa(mmu, access=W)
    assert (fault.value.error, fault.value.level) == (PfError.P | PfError.W, Level.PTE)
    assert not fault.value.entry & RW
    assert mmu.query(LA) is None
    assert pa(mmu, access=W) == OLD, "a spurious fault does not recur (SDM 4.10.4.1)"


def test_a_fault_on_a_stale_global_entry_drops_it_too() -> None:
    mmu, tables = machine(flags=(OPEN & ~RW) | G)
    pa(mmu)
    tables.change(LA, 1, set_=RW)
    with pytest.raises(PageFault):
        pa(mmu, access=W)
    assert pa(mmu, access=W) == OLD


def test_a_rewalk_for_d_replaces_the_entry_whatever_size_it_had() -> None:
    mmu, tables = machine(flags=(OPEN & ~D) | G, level=2)
    pa(mmu)
    tables.memory.write_u64(tables.entry_pa(LA, 2), 0)
    tables.map(LA, NEW)
    assert pa(mmu, access=W) == NEW
    assert [(entry.level, entry.pcid) for entry in mmu.listing()] == [(Level.PTE, 0)]


def test_xd_of_a_cached_entry_does_not_count_while_nxe_is_clear() -> None:
    mmu, _ = machine(flags=OPEN | XD)
    pa(mmu)
    mmu.load_efer(mmu.efer & ~int(Efer.NXE))
    assert pa(mmu, access=X) == OLD


def test_a_large_page_is_one_entry() -> None:
    for level, size in ((2, 1 << 21), (3, 1 << 30)):
        mmu, _ = machine(flags=OPEN, level=level)
        pa(mmu)
        pa(mmu, LA + 0x3000)
        assert [(entry.level, entry.la, entry.size) for entry in mmu.listing()] == [(level, LA, size)]
        assert mmu.counters()["fills"] == 1


# ---------------------------------------------------------------------------------------------------- what removes it


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("flags", [OPEN, OPEN | G])
def test_invlpg_removes_a_page_of_any_size_global_or_not(level: int, flags: int) -> None:
    inside = LA + (0 if level == 1 else 0x5000)
    assert not dropped_by(nothing, flags=flags, level=level)
    assert dropped_by(lambda mmu: mmu.invlpg(inside), flags=flags, level=level)
    assert not dropped_by(lambda mmu: mmu.invlpg(LA + (1 << (9 * level + 3))), flags=flags, level=level)


def test_invlpg_of_a_non_canonical_address_does_nothing() -> None:
    assert not dropped_by(lambda mmu: mmu.invlpg(LA & ~(1 << 63)))


def test_invlpg_drops_all_cached_tables_of_the_current_pcid() -> None:
    mmu, tables = machine()
    tables.map(FAR, NEW)
    pa(mmu)
    pa(mmu, FAR)
    mmu.invlpg(0)
    assert list(mmu.tlb.tables()) == []
    assert mmu.query(FAR) is not None


def test_mov_to_cr3_removes_everything_but_global_entries() -> None:
    assert dropped_by(lambda mmu: mmu.load_cr3(ROOT))
    assert not dropped_by(lambda mmu: mmu.load_cr3(ROOT), flags=OPEN | G)


def test_the_global_flag_means_nothing_while_pge_is_clear() -> None:
    assert dropped_by(lambda mmu: mmu.load_cr3(ROOT), flags=OPEN | G, cr4=RESET_CR4)


def test_a_change_of_pge_removes_global_entries_too() -> None:
    assert dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 ^ PGE), flags=OPEN | G)
    assert dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 ^ PGE), cr4=RESET_CR4)


@pytest.mark.parametrize("flags", [OPEN, OPEN | G])
def test_setting_smep_removes_entries_and_clearing_it_does_not(flags: int) -> None:
    smep = int(Cr4.SMEP)
    assert dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 | smep), flags=flags)
    assert not dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 & ~smep), cr4=RESET_CR4 | PGE | smep, flags=flags)


def test_smap_pke_wp_and_nxe_remove_nothing() -> None:
    flags = OPEN & ~US
    assert not dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 | int(Cr4.SMAP)), flags=flags)
    assert not dropped_by(lambda mmu: mmu.load_cr4(mmu.cr4 | int(Cr4.PKE)), flags=flags)
    assert not dropped_by(lambda mmu: mmu.load_cr0(mmu.cr0 ^ int(Cr0.WP)), flags=flags)
    assert not dropped_by(lambda mmu: mmu.load_efer(mmu.efer ^ int(Efer.NXE)), flags=flags)
    assert not dropped_by(lambda mmu: mmu.load_pkru(0xFF), flags=flags)


# ---------------------------------------------------------------------------------------------------- PCID


def contexts() -> tuple[Mmu, Tables]:
    """LA cached under PCIDs 1 and 2, NEXT cached as a global page under 2; then both pages move."""
    mmu, tables = machine(cr4=RESET_CR4 | PGE | PCIDE)
    tables.map(NEXT, OLD, OPEN | G)
    for pcid in (1, 2):
        mmu.load_cr3(ROOT | pcid)
        pa(mmu)
    pa(mmu, NEXT)
    tables.map(LA, NEW)
    tables.map(NEXT, NEW, OPEN | G)
    return mmu, tables


def survivors(mmu: Mmu) -> list[str]:
    """Which of the three entries are left."""
    mmu.validate()
    return [
        "global" if entry.pcid is None else str(entry.pcid) for entry in sorted(mmu.listing(), key=lambda entry: str(entry.pcid))
    ]


def test_pcids_do_not_see_each_other_and_globals_are_everyones() -> None:
    mmu, _ = contexts()
    mmu.load_cr3(ROOT | 3)
    assert pa(mmu) == NEW
    assert pa(mmu, NEXT) == OLD
    mmu.load_cr3(ROOT | 1 | CR3_NO_INVALIDATE)
    assert pa(mmu) == OLD


def test_mov_to_cr3_removes_the_entries_of_the_pcid_it_loads() -> None:
    mmu, _ = contexts()
    mmu.load_cr3(ROOT | 1)
    assert survivors(mmu) == ["2", "global"]


def test_mov_to_cr3_with_bit_63_removes_nothing_and_does_not_store_the_bit() -> None:
    mmu, _ = contexts()
    mmu.load_cr3(ROOT | 1 | CR3_NO_INVALIDATE)
    assert survivors(mmu) == ["1", "2", "global"]
    assert mmu.cr3 == ROOT | 1


def test_invlpg_leaves_other_pcids_alone() -> None:
    mmu, _ = contexts()
    mmu.invlpg(LA)
    assert survivors(mmu) == ["1", "global"]


def test_invpcid_0_removes_one_address_of_one_pcid_and_no_global() -> None:
    mmu, _ = contexts()
    mmu.invpcid(0, 1, LA)
    assert survivors(mmu) == ["2", "global"]
    mmu.invpcid(0, 2, NEXT)
    assert survivors(mmu) == ["2", "global"]
    assert {context.pcid for context, *_ in mmu.tlb.tables()} == set()


def test_invpcid_1_removes_one_pcid_and_no_global() -> None:
    mmu, _ = contexts()
    mmu.invpcid(1, 2, 0)
    assert survivors(mmu) == ["1", "global"]


def test_invpcid_2_removes_everything() -> None:
    mmu, _ = contexts()
    mmu.invpcid(2, 0, 0)
    assert survivors(mmu) == []
    assert list(mmu.tlb.tables()) == []


def test_invpcid_3_removes_everything_but_globals() -> None:
    mmu, _ = contexts()
    mmu.invpcid(3, 0, 0)
    assert survivors(mmu) == ["global"]
    assert list(mmu.tlb.tables()) == []


def test_clearing_pcide_removes_everything() -> None:
    mmu, _ = contexts()
    mmu.load_cr4(mmu.cr4 & ~PCIDE)
    assert survivors(mmu) == []
    assert mmu.pcid == 0


def test_a_fault_leaves_other_pcids_alone() -> None:
    mmu, tables = contexts()
    tables.change(LA, 1, clear=US)
    mmu.invlpg(LA)
    with pytest.raises(PageFault):
        pa(mmu, user=True)
    assert survivors(mmu) == ["1", "global"]


@pytest.mark.parametrize(
    ("kind", "pcid", "la", "pcide"),
    [(4, 0, 0, True), (0, 1 << 12, 0, True), (0, 1, 0, False), (1, 1, 0, False), (0, 1, 1 << 63, True)],
)
def test_invpcid_refuses_unknown_types_and_bad_descriptors(kind: int, pcid: int, la: int, pcide: bool) -> None:
    mmu, _ = machine(cr4=RESET_CR4 | (PCIDE if pcide else 0))
    with pytest.raises(GeneralProtection):
        mmu.invpcid(kind, pcid, la)


# ---------------------------------------------------------------------------------------------------- finite


def test_a_finite_tlb_replaces_the_entry_of_a_set_that_was_filled_first() -> None:
    tables = Tables()
    shape = Geometry(sets_4k=2, ways_4k=2)
    mmu = Mmu(tables.memory, Tlb(TlbMode.FINITE, shape))
    mmu.reset(cr3=ROOT)
    drops = []
    mmu.on_drop = lambda: drops.append(1)
    pages = [LA + number * 0x2000 for number in range(3)]  # one set
    for number, page in enumerate(pages):
        tables.map(page, OLD + number * 0x1000)
    pa(mmu, pages[0])
    pa(mmu, pages[1])
    pa(mmu, pages[0])  # a hit does not make it younger
    assert (mmu.counters()["evictions"], drops) == (0, [])
    pa(mmu, pages[2])
    assert [entry.la for entry in mmu.listing()] == pages[1:]
    assert (mmu.counters()["evictions"], drops) == (1, [1]), "the soft cache may hold the page that had to go"
    mmu.validate()


def test_a_finite_tlb_refills_an_invalidated_way_before_it_evicts() -> None:
    tables = Tables()
    mmu = Mmu(tables.memory, Tlb("finite", Geometry(sets_4k=1, ways_4k=2)))
    mmu.reset(cr3=ROOT)
    for number in range(3):
        tables.map(LA + number * 0x1000, OLD)
    pa(mmu, LA)
    pa(mmu, NEXT)
    mmu.invlpg(LA)
    pa(mmu, LA + 0x2000)
    assert [entry.la for entry in mmu.listing()] == [NEXT, LA + 0x2000]
    assert mmu.counters()["evictions"] == 0


def test_a_finite_structure_cache_forgets_the_oldest_table() -> None:
    tables = Tables()
    mmu = Mmu(tables.memory, Tlb("finite", Geometry(pde=2)))
    mmu.reset(cr3=ROOT)
    for number in range(3):
        tables.map(LA + (number << 21), OLD)
        pa(mmu, LA + (number << 21))
    assert [la for _, level, la, _, _ in mmu.tlb.tables() if level == 2] == [LA + (1 << 21), LA + (2 << 21)]
    mmu.validate()


def test_a_finite_structure_cache_refills_an_invalidated_way_before_it_evicts() -> None:
    tables = Tables()
    mmu = Mmu(tables.memory, Tlb("finite", Geometry(pde=2)))
    mmu.reset(cr3=ROOT)
    for number in range(4):
        tables.map(LA + (number << 21), OLD)
        pa(mmu, LA + (number << 21))
        mmu.invlpg(LA)
    assert list(mmu.tlb.tables()) == []
    mmu.validate()


def test_a_geometry_without_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="ways_4k is 0"):
        Geometry(ways_4k=0)
    with pytest.raises(ValueError, match="forever"):
        Tlb("forever")


# ---------------------------------------------------------------------------------------------------- looking


def test_query_tells_what_an_access_would_still_reach() -> None:
    mmu, tables = machine(flags=OPEN | G)
    assert mmu.query(LA) is None
    pa(mmu)
    tables.change(LA, 1, clear=P)
    cached = mmu.query(LA + 0x10)
    assert cached is not None
    assert (cached.pa(LA + 0x10), cached.pcid, cached.level) == (OLD + 0x10, None, Level.PTE)
    assert cached.entry == OLD | OPEN | G


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"clear": P}, ("P",)), ({"set_": 1 << 45}, ("RSVD",)), ({"clear": RW}, ("RW",)), ({"clear": US}, ("US",)),
        ({"set_": XD}, ("XD",)), ({"clear": D}, ("D",)), ({"set_": G}, ("G",)), ({"set_": 7 << PKEY_SHIFT}, ("PKEY",)),
        ({"set_": 1 << 4}, ("type",)), ({"set_": NEW, "clear": OLD}, ("frame",)), ({"clear": A}, ()),
    ],
)
def test_stale_names_what_memory_no_longer_says(change: dict[str, int], differs: tuple[str, ...]) -> None:
    mmu, tables = machine()
    pa(mmu)
    assert mmu.stale(tables=True) == []
    tables.change(LA, 1, **change)
    assert [entry.differs for entry in mmu.stale(LA)] == ([differs] if differs else [])
    assert mmu.stale(NEXT) == []
    mmu.invlpg(LA)
    assert mmu.stale() == []


def test_stale_sees_a_split_large_page() -> None:
    mmu, tables = machine(level=2)
    pa(mmu)
    tables.memory.write_u64(tables.entry_pa(LA, 2), 0)
    tables.map(LA, 0)
    assert [entry.differs for entry in mmu.stale()] == [("size",)]


def test_stale_sees_cached_tables() -> None:
    mmu, tables = machine()
    pa(mmu)
    tables.change(LA, 3, clear=RW)
    found = [entry for entry in mmu.stale(tables=True) if entry.cached.level > 1]
    assert [(int(entry.cached.level), entry.differs) for entry in found] == [(2, ("RW",)), (3, ("RW",))]
    tables.memory.write_u64(tables.entry_pa(LA, 3), 0)
    assert {entry.differs for entry in mmu.stale(tables=True)} == {("P",)}


def test_stale_compares_each_pcid_with_its_own_root() -> None:
    mmu, tables = machine(cr4=RESET_CR4 | PCIDE)
    other = Tables(memory=tables.memory, root=0x40_0000)
    other.map(LA, NEW)
    mmu.load_cr3(ROOT | 1)
    pa(mmu)
    mmu.load_cr3(0x40_0000 | 2)
    assert pa(mmu) == NEW
    assert mmu.stale(tables=True) == []


# ---------------------------------------------------------------------------------------------------- soft cache


@pytest.mark.parametrize(
    "operation",
    [
        lambda mmu: mmu.invlpg(LA), lambda mmu: mmu.invpcid(1, 0, 0), lambda mmu: mmu.load_cr3(ROOT),
        lambda mmu: mmu.load_cr4(mmu.cr4 | int(Cr4.SMAP)), lambda mmu: mmu.load_cr0(mmu.cr0 ^ int(Cr0.WP)),
        lambda mmu: mmu.load_efer(mmu.efer ^ int(Efer.NXE)), lambda mmu: mmu.load_pkru(1), lambda mmu: mmu.reset(cr3=ROOT),
    ],
)
def test_every_invalidation_and_register_change_drops_the_soft_cache(operation: Callable[[Mmu], None]) -> None:
    mmu, _ = machine()
    drops: list[int] = []
    mmu.on_drop = lambda: drops.append(1)
    operation(mmu)
    assert drops


def test_a_fault_drops_the_soft_cache_only_if_it_dropped_an_entry() -> None:
    mmu, _ = machine(flags=OPEN & ~RW)
    drops: list[int] = []
    mmu.on_drop = lambda: drops.append(1)
    with pytest.raises(PageFault):
        pa(mmu, access=W)
    assert drops == []
    pa(mmu)
    with pytest.raises(PageFault):
        pa(mmu, access=W)
    assert drops == [1]


def test_a_rewalk_for_d_that_finds_another_page_drops_the_soft_cache() -> None:
    mmu, tables = machine(flags=OPEN & ~D)
    drops: list[int] = []
    mmu.on_drop = lambda: drops.append(1)
    pa(mmu)
    pa(mmu, access=W)
    assert drops == []
    tables.change(LA, 1, clear=D)
    mmu.invlpg(LA)
    pa(mmu)
    tables.map(LA, NEW, OPEN & ~D)
    drops.clear()
    assert pa(mmu, access=W) == NEW
    assert drops == [1]


def test_entries_keep_their_places_and_their_order_of_replacement_in_dicts_of_another_kind() -> None:
    class Other(dict[int, object]):
        pass

    tlb = Tlb(TlbMode.FINITE, Geometry(sets_4k=1, ways_4k=2))
    for la in (0x1000, 0x2000):
        tlb.insert(tlb.context(0), 1, la, la | P | A)
    tlb.keep_in(lambda pcid, level, is_table: Other())
    assert isinstance(tlb.context(0).pages[1], Other) and isinstance(tlb.context(7).tables[2], Other)
    assert tlb.insert(tlb.context(0), 1, 0x3000, 0x3000 | P | A)
    assert [la for _, _, la, _ in tlb.entries()] == [0x2000, 0x3000]
    tlb.validate()
