"""The leaf runs of a recorded kernel's page tables (ptdump-*): what the model maps in their place dumps as the same runs."""

from __future__ import annotations

import numpy as np
import pytest
from guest_machine import GuestMachine
from kernel_floor import make_floor, recorded_facts

from emu.kernel.layout import PMD_SHIFT
from emu.kernel.pgprot import large_prot
from emu.kernel.pgtable import PageTable, PgLevel

PAGE = 4096
FRAME = 0x0000_00FF_FFFF_F000
NAMES = {PgLevel.PG_4K: "PTE", PgLevel.PG_2M: "PMD", PgLevel.PG_1G: "PUD"}
Run = tuple[int, int, str, int]


def runs(mm: PageTable, start: int, end: int) -> list[Run]:
    """Leaves of [start, end) as (start, end, level, flags), joined while level and flags are equal and no hole is between."""
    found: list[list] = []
    for la, entry, level in mm.leaves(start, end):
        size = 1 << (12 + 9 * (level - 1))
        flags = entry & ~(FRAME & -size)
        if found and found[-1][1:] == [la, NAMES[level], flags]:
            found[-1][1] = la + size
        else:
            found.append([la, la + size, NAMES[level], flags])
    return [tuple(run) for run in found]


def recorded() -> list[dict]:
    return [record for record in recorded_facts("ptdump-6.12-4l") if record["t"] == "pt"]


def as_run(record: dict) -> Run:
    return int(record["s"], 16), int(record["e"], 16), record["lvl"], int(record["bits"], 16)


def test_every_run_of_the_vmalloc_region_and_of_modules_dumps_as_it_was_mapped():
    floor = make_floor(size=(2 << 30) - (4 << 20))
    mm, layout = floor.mm, floor.layout
    regions = ((layout.vmalloc_start, layout.vmalloc_end), (layout.modules_vaddr, layout.modules_end))
    wanted = [r for r in recorded() if any(low <= int(r["s"], 16) < high for low, high in regions)]
    for record in wanted:
        start, end, level, bits = as_run(record)
        frame = int(record["pa"], 16) // PAGE
        count = (end - start) // PAGE
        if frame >= floor.pages.max_pfn:
            # Device memory.
            assert mm.vmap_range_noflush(start, end, frame * PAGE, bits, 12) == 0
            continue
        frame = min(frame, floor.pages.max_pfn - count)
        pfns = np.arange(frame, frame + count) if record["contig"] else np.arange(frame + count, frame, -1) - 1
        prot = mm.prots.kernel if level == "PMD" else bits
        assert level == "PTE" or bits == large_prot(prot)
        assert mm.vmap_pages_range_noflush(start, end, prot, pfns, PMD_SHIFT if level == "PMD" else 12) == 0
    assert [run for region in regions for run in runs(mm, *region)] == [as_run(record) for record in wanted]
    assert len(wanted) >= 80


def test_the_recorded_protections_are_those_that_the_model_gives():
    prots = make_floor().mm.prots
    given = {prots.kernel, prots.kernel_ro, prots.kernel_rox, prots.kernel | 0x10, prots.kernel_nocache}
    given |= {large_prot(prot) for prot in given}
    # PAGE_KERNEL_RO with G and RW but D clear: memory freed after boot and made writable again; 0x063: pages out of use.
    freed = {0x8000000000000123, 0x8000000000000063}
    assert {as_run(record)[3] for record in recorded()} <= given | freed


@pytest.mark.parametrize(("start", "end"), [(0xFFFFFE0000000000, 0xFFFFFE0000002000), (0xFFFFFE0000003000, 0xFFFFFE0000015000)])
def test_the_first_cpu_entry_area_has_the_recorded_runs(start, end):
    mm = GuestMachine(memory=(2 << 30) - (4 << 20)).kernel.init_mm
    # The page between the two ranges is the debug store's, which the model has no use for.
    wanted = [as_run(record) for record in recorded() if start <= int(record["s"], 16) < end]
    assert runs(mm, start, end) == wanted
    assert wanted


def test_direct_map_image_and_vmemmap_have_the_recorded_protection():
    floor = make_floor(size=(2 << 30) - (4 << 20))
    layout = floor.layout
    records = [as_run(record) for record in recorded()]
    # (address in the model, address in the recording): the two images differ in size.
    for la, there in (
        (layout.va(0), 0xFFFF888000000000), (layout.va(0x200000), 0xFFFF888000200000), (layout.va(0x10000000), 0xFFFF888010000000),
        (layout.kernel_text, 0xFFFFFFFF81000000), (layout.kernel_rodata, 0xFFFFFFFF82000000),
        (layout.kernel_data, 0xFFFFFFFF82C00000), (0xFFFFEA0000000000, 0xFFFFEA0000000000),
    ):  # fmt: skip
        _, _, level, bits = next(run for run in records if run[0] <= there < run[1])
        found = floor.mm.lookup(la)
        assert (NAMES[found.level], found.entry & ~(FRAME & -found.size)) == (level, bits), hex(la)
