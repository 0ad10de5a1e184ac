"""The plan of the cpu_entry_area."""

from __future__ import annotations

from itertools import pairwise

import pytest

from emu.kernel.cpu_entry_area import (
    CPU_ENTRY_AREA_RO_IDT,
    GEOMETRY,
    CeaPages,
    Ist,
    PageKind,
    cpu_entry_areas,
    map_cpu_entry_areas,
    ro_idt,
)
from emu.kernel.unwind import StackInfo, Stacks, StackType

BASE = 0xFFFFFE0000001000
VERSIONS = tuple(GEOMETRY)


def test_the_whole_plan_of_cpu_0_on_6_12() -> None:
    (area,) = cpu_entry_areas("6.12", 1)
    assert list(area.pages()) == [
        CeaPages(BASE, 0x1000, PageKind.GDT, False),
        CeaPages(BASE + 0x1000, 0x1000, PageKind.ENTRY_STACK, True),
        CeaPages(BASE + 0x2000, 0x5000, PageKind.TSS, False),
        CeaPages(BASE + 0x8000, 0x2000, PageKind.DF_STACK, True),
        CeaPages(BASE + 0xB000, 0x2000, PageKind.NMI_STACK, True),
        CeaPages(BASE + 0xE000, 0x2000, PageKind.DB_STACK, True),
        CeaPages(BASE + 0x11000, 0x2000, PageKind.MCE_STACK, True),
    ]
    assert ro_idt() == CeaPages(0xFFFFFE0000000000, 0x1000, PageKind.IDT, False)


@pytest.mark.parametrize(("version", "size"), [("6.12", 0x3B000), ("6.1", 0x3B000), ("5.4", 0x33000)])
def test_areas_of_neighbouring_cpus_adjoin(version: str, size: int) -> None:
    first, second = cpu_entry_areas(version, 2)
    assert (first.base, second.base) == (BASE, BASE + size)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_exception_stack_has_an_unmapped_page_below_and_above(version: str) -> None:
    area = cpu_entry_areas(version, 3)[2]
    mapped = {la for run in area.pages() for la in range(run.la, run.la + run.size, 0x1000)}
    for kind in (PageKind.DF_STACK, PageKind.NMI_STACK, PageKind.DB_STACK, PageKind.MCE_STACK):
        begin, end = area.exception_stack(kind)
        assert begin - 0x1000 in area.guard_pages()
        assert begin - 0x1000 not in mapped
        assert end not in mapped
    assert not mapped.intersection(area.guard_pages())


@pytest.mark.parametrize("version", VERSIONS)
def test_mapped_runs_do_not_overlap_and_stay_inside_the_area(version: str) -> None:
    area = cpu_entry_areas(version, 1)[0]
    runs = list(area.pages())
    assert all(low.la + low.size <= high.la for low, high in pairwise(runs))
    assert runs[-1].la + runs[-1].size <= area.base + area.geometry.size


def test_ist_entries_are_the_stack_tops_in_the_order_df_nmi_db_mce() -> None:
    area = cpu_entry_areas("6.12", 1)[0]
    ist = area.ist()
    assert ist[Ist.DF] == BASE + 0xA000
    assert ist[Ist.NMI] == BASE + 0xD000
    assert ist[Ist.DB] == BASE + 0x10000
    assert ist[Ist.MCE] == BASE + 0x13000


def test_the_tss_limit_covers_both_io_bitmaps_and_the_base_lies_behind_it() -> None:
    for version in ("6.12", "6.1"):
        geometry = GEOMETRY[version]
        assert geometry.tss_limit == 0x68 + 0x10 + 2 * 0x2008 - 1
        assert geometry.iomap_base == geometry.tss_limit + 1


def test_kaslr_draws_distinct_slots_since_6_2_only() -> None:
    draws = iter([7, 7, 3])
    size = GEOMETRY["6.12"].size
    areas = cpu_entry_areas("6.12", 2, lambda n: next(draws))
    assert [area.base for area in areas] == [BASE + 7 * size, BASE + 3 * size]
    assert cpu_entry_areas("6.1", 1, lambda n: 9)[0].base == BASE


def test_a_push_below_the_df_stack_hits_the_guard_of_that_stack() -> None:
    area = cpu_entry_areas("6.12", 1)[0]
    stacks = Stacks(area.stack_infos(lambda end: 0x1234))
    begin, end = area.exception_stack(PageKind.DF_STACK)
    assert stacks.get_stack_guard_info(begin - 8) == StackInfo(StackType.DF, begin, end, 0x1234)
    assert stacks.get_stack_guard_info(begin) is None
    assert stacks.get_stack_info(area.entry_stack[0]) == StackInfo(StackType.ENTRY, *area.entry_stack)


def test_mapping_covers_the_idt_and_every_planned_page() -> None:
    pages: dict[int, tuple[int, bool]] = {}
    allocated = [0x100000]
    tss: list[int] = []

    class Mapper:
        def add_cpu_tss_rw(self, pa: int) -> None:
            tss.append(pa)

        def cea_set_pte(self, la: int, pa: int, *, writable: bool) -> None:
            assert la not in pages
            pages[la] = (pa, writable)

    def allocate(size: int) -> int:
        allocated.append(allocated[-1] + size)
        return allocated[-2]

    areas = cpu_entry_areas("6.12", 2)
    placed = map_cpu_entry_areas(areas, Mapper(), 0x5000, allocate)
    assert pages[CPU_ENTRY_AREA_RO_IDT] == (0x5000, False)
    assert len(pages) == 1 + 2 * 15
    assert tss == [placed[area.tss] for area in areas]
    assert pages[areas[1].tss + 0x4000] == (placed[areas[1].tss] + 0x4000, False)
