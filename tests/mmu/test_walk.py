"""The walker, one statement of the SDM each."""

import dataclasses

import pytest
from paging_tables import OPEN, ROOT, Tables

from emu.memory import BusError, Memory, MmioRegion
from emu.mmu.entry import PKEY_SHIFT, PS, RW, US, XD, A, D, Entry, G, Level, P, describe, is_canonical
from emu.mmu.fault import Access, NonCanonical, PageFault, PfError
from emu.mmu.walk import PagingRegisters, Translation, inspect, walk

LA = 0x0000_1234_5678_9000
LA57 = 0x0012_3456_789A_B000
PA = 0x30_0000
R, W, X = Access.READ, Access.WRITE, Access.FETCH


def regs(**changes: int) -> PagingRegisters:
    return dataclasses.replace(PagingRegisters(cr3=ROOT), **changes)


def error(tables: Tables, access: int, user: bool, la: int = LA, ac: bool = False, implicit: bool = False, **changes: int) -> int:
    """The error code of an access; 0x100 when it is permitted."""
    try:
        walk(tables.memory, regs(levels=tables.levels, **changes), la, access, user, ac, implicit)
    except PageFault as fault:
        assert fault.la == la
        return fault.error
    return 0x100


PERMITTED = 0x100


def tables(flags: int = OPEN, level: int = 1, levels: int = 4, pa: int = PA, la: int = LA) -> Tables:
    built = Tables(levels)
    built.map(la, pa & -(1 << (9 * level + 3)), flags, level)
    return built


def translate(built: Tables, la: int, access: int = R, user: bool = True, **changes: int) -> Translation:
    return walk(built.memory, regs(levels=built.levels, **changes), la, access, user)


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(("level", "size"), [(1, 1 << 12), (2, 1 << 21), (3, 1 << 30)])
def test_a_leaf_keeps_the_low_address_bits_of_its_size(level: int, size: int) -> None:
    built = tables(level=level, pa=0)
    done = translate(built, LA | 0xABC)
    assert done.pa == (LA | 0xABC) & (size - 1)
    assert (done.level, done.page_size) == (level, size)


def test_a_walk_of_five_levels_uses_la_bits_56_48_for_the_pml5e() -> None:
    built = tables(levels=5, la=LA57)
    done = translate(built, LA57 | 7)
    assert done.pa == PA | 7
    assert [level for level, _, _ in done.entries] == [Level.PML5E, Level.PML4E, Level.PDPTE, Level.PDE, Level.PTE]
    assert done.entries[0][1] == ROOT + 8 * (LA57 >> 48)


@pytest.mark.parametrize(
    ("la", "levels", "canonical"),
    [
        (0x7FFF_FFFF_FFFF, 4, True), (0x8000_0000_0000, 4, False), (0xFFFF_8000_0000_0000, 4, True),
        (0xFFFF_7FFF_FFFF_FFFF, 4, False), (0x8000_0000_0000, 5, True), (0xFF_FFFF_FFFF_FFFF, 5, True),
        (0x100_0000_0000_0000, 5, False), (0xFEFF_FFFF_FFFF_FFFF, 5, False), (0xFF00_0000_0000_0000, 5, True),
        (0xFFFF_FFFF_FFFF_FFFF, 4, True),
    ],
)
def test_canonical_means_that_all_bits_above_the_width_equal_its_top_bit(la: int, levels: int, canonical: bool) -> None:
    assert is_canonical(la, levels) is canonical
    if not canonical:
        with pytest.raises(NonCanonical) as fault:
            walk(Tables(levels).memory, regs(levels=levels), la, R, False)
        assert fault.value.la == la


def test_a_table_outside_ram_is_a_bus_error() -> None:
    built = tables()
    built.memory.write_u64(built.entry_pa(LA, 2), 1 << 39 | P | RW | US)
    with pytest.raises(BusError) as error_:
        translate(built, LA)
    assert error_.value.pa >> 12 == 1 << 27


def test_a_table_in_device_memory_is_a_bus_error() -> None:
    built = tables()
    pde = built.entry(LA, 2)
    built.memory.overlay_mmio(MmioRegion(pde & ~0xFFF, 0x1000, lambda *_: 0, lambda *_: None))
    with pytest.raises(BusError):
        translate(built, LA)


# ---------------------------------------------------------------------------------------------------- present and reserved


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_an_absent_entry_of_any_level_is_error_p_clear(level: int) -> None:
    built = tables()
    built.change(LA, level, clear=P, set_=1 << 51 | XD)  # reserved bits of an absent entry are not looked at
    assert error(built, R, False) == 0
    assert error(built, W, True) == PfError.W | PfError.U
    assert error(built, X, True) == PfError.I | PfError.U


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bit", [40, 45, 51])
def test_address_bits_above_maxphyaddr_are_reserved_at_every_level(level: int, bit: int) -> None:
    built = tables(levels=5, la=LA57)
    built.change(LA57, level, set_=1 << bit)
    assert error(built, R, False, LA57) == PfError.P | PfError.RSVD


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_xd_is_reserved_while_nxe_is_clear(level: int) -> None:
    built = tables()
    built.change(LA, level, set_=XD)
    assert error(built, R, False, nxe=False) == PfError.P | PfError.RSVD
    assert error(built, R, False, nxe=True) == PERMITTED


def test_ps_is_reserved_in_a_pml4e_and_a_pml5e() -> None:
    for level in (4, 5):
        built = tables(levels=5, la=LA57)
        built.change(LA57, level, set_=PS)
        assert error(built, W, True, LA57) == PfError.P | PfError.RSVD | PfError.W | PfError.U


def test_ps_is_reserved_in_a_pdpte_of_a_cpu_without_1g_pages() -> None:
    built = tables(level=3, pa=0)
    assert error(built, R, True) == PERMITTED
    assert error(built, R, True, gbpages=False) == PfError.P | PfError.RSVD | PfError.U


@pytest.mark.parametrize(("level", "bits"), [(2, range(13, 21)), (3, range(13, 30))])
def test_a_large_leaf_reserves_the_address_bits_below_its_size_except_pat(level: int, bits: range) -> None:
    for bit in bits:
        built = tables(OPEN | 1 << bit, level, pa=0)
        assert error(built, R, False) == PfError.P | PfError.RSVD, bit
    assert error(tables(OPEN | Entry.PAT_LARGE, level, pa=0), R, False) == PERMITTED
    assert translate(tables(OPEN | Entry.PAT_LARGE, level, pa=0), LA).pa == LA & ((1 << (9 * level + 3)) - 1)


def test_bits_11_to_9_and_62_to_52_are_ignored_at_every_level() -> None:
    built = tables()
    for level in (1, 2, 3, 4):
        built.change(LA, level, set_=0x7FF << 52 | 7 << 9)
    assert error(built, R, True) == PERMITTED


def test_pat_in_a_pte_is_not_ps() -> None:
    assert translate(tables(OPEN | Entry.PAT), LA).level == Level.PTE


def test_a_reserved_bit_above_hides_what_is_wrong_below() -> None:
    built = tables()
    built.change(LA, 3, set_=1 << 40)
    built.change(LA, 1, clear=P)
    assert error(built, R, False) == PfError.P | PfError.RSVD


# ---------------------------------------------------------------------------------------------------- rights


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_rights_of_a_page_are_what_every_level_grants(level: int) -> None:
    readonly, supervisor, data = tables(), tables(), tables()
    readonly.change(LA, level, clear=RW)
    supervisor.change(LA, level, clear=US)
    data.change(LA, level, set_=XD)
    assert error(readonly, W, True) == PfError.P | PfError.W | PfError.U
    assert error(supervisor, R, True) == PfError.P | PfError.U
    assert error(data, X, True) == PfError.P | PfError.U | PfError.I
    assert not translate(readonly, LA).effective & RW
    assert translate(data, LA).effective & XD


def test_supervisor_write_ignores_rw_only_while_cr0_wp_is_clear() -> None:
    readonly = tables(OPEN & ~RW)
    assert error(readonly, W, False, wp=False) == PERMITTED
    assert error(readonly, W, False, wp=True) == PfError.P | PfError.W
    assert error(readonly, W, True, wp=False) == PfError.P | PfError.W | PfError.U


def test_smep_refuses_supervisor_fetches_from_user_pages_only() -> None:
    user, supervisor = tables(), tables(OPEN & ~US)
    assert error(user, X, False, smep=True) == PfError.P | PfError.I
    assert error(user, X, False, smep=False) == PERMITTED
    assert error(supervisor, X, False, smep=True) == PERMITTED
    assert error(user, R, False, smep=True) == PERMITTED
    assert error(user, X, True, smep=True) == PERMITTED


def test_smap_refuses_explicit_supervisor_data_accesses_to_user_pages_unless_ac_is_set() -> None:
    user = tables()
    for access in (R, W):
        assert error(user, access, False, smap=True) == PfError.P | (PfError.W if access is W else 0)
        assert error(user, access, False, ac=True, smap=True) == PERMITTED
        assert error(user, access, True, smap=True) == PERMITTED
    assert error(user, X, False, smap=True) == PERMITTED
    assert error(tables(OPEN & ~US), R, False, smap=True) == PERMITTED


def test_smap_refuses_implicit_supervisor_accesses_whatever_ac_is() -> None:
    user = tables()
    assert error(user, R, False, ac=True, implicit=True, smap=True) == PfError.P
    assert error(user, R, False, ac=True, implicit=True, smap=False) == PERMITTED


def test_an_implicit_access_is_a_supervisor_access_at_any_cpl() -> None:
    supervisor = tables(OPEN & ~US)
    assert error(supervisor, R, True, implicit=True) == PERMITTED
    built = tables()
    built.change(LA, 1, clear=P)
    assert error(built, R, True, implicit=True) == 0


def test_xd_does_not_stop_data_accesses() -> None:
    data = tables(OPEN | XD)
    assert error(data, R, True) == PERMITTED
    assert error(data, W, True) == PERMITTED
    assert error(data, X, False) == PfError.P | PfError.I


def test_the_error_code_has_i_only_with_nxe_or_smep() -> None:
    built = tables()
    built.change(LA, 1, clear=P)
    assert error(built, X, False, nxe=False, smep=False) == 0
    assert error(built, X, False, nxe=True, smep=False) == PfError.I
    assert error(built, X, False, nxe=False, smep=True) == PfError.I


# ---------------------------------------------------------------------------------------------------- protection keys


def keyed(flags: int = OPEN, key: int = 5) -> Tables:
    return tables(flags | key << PKEY_SHIFT)


def test_pkru_ad_refuses_every_data_access_to_a_user_page_and_no_fetch() -> None:
    built = keyed()
    pkru = 1 << 10
    assert error(built, R, True, pke=True, pkru=pkru) == PfError.P | PfError.U | PfError.PK
    assert error(built, R, False, pke=True, pkru=pkru, wp=False) == PfError.P | PfError.PK
    assert error(built, X, True, pke=True, pkru=pkru) == PERMITTED
    assert error(built, R, True, pke=False, pkru=pkru) == PERMITTED


def test_pkru_wd_refuses_writes_and_supervisor_writes_only_with_wp() -> None:
    built = keyed()
    pkru = 2 << 10
    assert error(built, R, True, pke=True, pkru=pkru) == PERMITTED
    assert error(built, W, True, pke=True, pkru=pkru, wp=False) == PfError.P | PfError.W | PfError.U | PfError.PK
    assert error(built, W, False, pke=True, pkru=pkru, wp=True) == PfError.P | PfError.W | PfError.PK
    assert error(built, W, False, pke=True, pkru=pkru, wp=False) == PERMITTED


def test_protection_keys_do_not_touch_supervisor_pages() -> None:
    assert error(keyed(OPEN & ~US), W, False, pke=True, pkru=0xFFFF_FFFF) == PERMITTED


def test_another_key_does_not_restrict() -> None:
    assert error(keyed(), W, True, pke=True, pkru=0xFFFF_FFFF & ~(3 << 10)) == PERMITTED


def test_pk_is_reported_beside_another_violation() -> None:
    readonly = keyed(OPEN & ~RW)
    assert error(readonly, W, True, pke=True, pkru=1 << 10) == PfError.P | PfError.W | PfError.U | PfError.PK
    assert error(keyed(), R, False, smap=True, pke=True, pkru=1 << 10) == PfError.P | PfError.PK


# ---------------------------------------------------------------------------------------------------- accessed and dirty


def bare() -> Tables:
    """One path whose entries have A and D clear."""
    built = tables()
    for level in (1, 2, 3, 4):
        built.change(LA, level, clear=A | D)
    return built


def flags(built: Tables) -> list[int]:
    return [built.entry(LA, level) & (A | D) for level in (4, 3, 2, 1)]


def test_a_read_sets_a_in_every_entry_and_d_in_none() -> None:
    built = bare()
    done = translate(built, LA, R)
    assert flags(built) == [A, A, A, A]
    assert done.effective & (A | D) == A
    assert all(entry & A for _, _, entry in done.entries)


def test_a_write_sets_d_in_the_leaf_only() -> None:
    built = bare()
    assert translate(built, LA, W).effective & D
    assert flags(built) == [A, A, A, A | D]


def test_a_refused_access_sets_a_in_the_tables_and_nothing_in_the_leaf() -> None:
    built = bare()
    built.change(LA, 1, clear=US)
    assert error(built, W, True) == PfError.P | PfError.W | PfError.U
    assert flags(built) == [A, A, A, 0]


def test_an_absent_or_invalid_entry_sets_a_only_above_itself() -> None:
    for change in ({"clear": P}, {"set_": 1 << 40}):
        built = bare()
        built.change(LA, 2, **change)
        assert error(built, R, True) & ~(PfError.P | PfError.RSVD) == PfError.U
        table = built.memory.read_u64(built.root + 8 * (LA >> 39))
        assert table & A
        path = inspect(built.memory, regs(), LA)
        assert [entry & A for _, _, entry in path[:3]] == [A, A, 0]


def test_a_look_without_ad_changes_nothing() -> None:
    built = bare()
    done = walk(built.memory, regs(), LA, W, True, set_ad=False)
    assert done.pa == PA
    assert flags(built) == [0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------- looking


def test_inspect_lists_the_path_down_to_the_entry_that_ends_it() -> None:
    built = tables(OPEN | G)
    path = inspect(built.memory, regs(), LA)
    assert [level for level, _, _ in path] == [4, 3, 2, 1]
    assert path[-1][1:] == (built.entry_pa(LA, 1), PA | OPEN | G)
    built.change(LA, 2, clear=P)
    assert [level for level, _, _ in inspect(built.memory, regs(), LA)] == [4, 3, 2]
    assert inspect(Memory(4 << 20), regs(cr3=1 << 30), LA) == []


def test_the_fault_names_the_level_and_entry_that_refused() -> None:
    built = tables()
    built.change(LA, 2, clear=P)
    with pytest.raises(PageFault) as fault:
        translate(built, LA | 0x123)
    assert (fault.value.la, fault.value.level) == (LA | 0x123, Level.PDE)
    assert fault.value.entry == inspect(built.memory, regs(), LA)[-1][2]
    assert "error 0x4 (U), level 2" in str(fault.value)


def test_entries_are_described_by_frame_and_flag_names() -> None:
    assert describe(PA | OPEN | XD | 3 << PKEY_SHIFT) == "0x300000 P|RW|US|A|D|XD pkey=3"
