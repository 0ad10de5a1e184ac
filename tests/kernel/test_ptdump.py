"""The page-table dump: rows, markers, columns; the recorded runs of a real kernel's CPU entry area."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from after_run import ran
from kernel_floor import make_floor, recorded_facts

from emu.kernel.layout import make_layout
from emu.kernel.pgprot import GLOBAL, NX, PAGE_TABLE, PAT, PCD, PRESENT, PSE, PWT, RW, USER
from emu.kernel.ptdump import Marker, PtDump, Row, Skipped, prot_text, row_text
from emu.memory import Memory

SIZE = 64 << 20
PGD, PUD, PMD, PTE = 0x1000, 0x2000, 0x3000, 0x4000
LINE = re.compile(r"0x[0-9a-f]{16}-0x[0-9a-f]{16}   [ 0-9]{8}\d[BKMGTPE] .{30}(pgd|p4d|pud|pmd|pte)")


def tables(la: int, entries: dict[int, int], *, upper: int = PAGE_TABLE) -> PtDump:
    """Four levels with one PTE table, for the 2 MiB of `la`."""
    memory = Memory(SIZE)
    memory.table(PGD)[la >> 39 & 511] = PUD | PAGE_TABLE
    memory.table(PUD)[la >> 30 & 511] = PMD | PAGE_TABLE
    memory.table(PMD)[la >> 21 & 511] = PTE | upper
    for index, entry in entries.items():
        memory.table(PTE)[index] = entry
    return PtDump(memory, make_layout(4), PGD)


def present(dump: PtDump) -> list[tuple[int, int, int]]:
    """(start, end, flags) of the rows of present entries."""
    return [(row.start, row.end, row.prot) for row in dump.rows() if isinstance(row, Row) and row.prot & PRESENT]


LA = 0xFFFF_C900_0000_0000
KERNEL = 0x163 | NX


def test_neighbours_with_equal_flags_are_one_row_wherever_their_frames_are() -> None:
    dump = tables(LA, {4: 0x10000 | KERNEL, 5: 0x90000 | KERNEL, 6: 0x11000 | KERNEL, 9: 0x12000 | KERNEL})
    assert present(dump) == [(LA + 0x4000, LA + 0x7000, KERNEL), (LA + 0x9000, LA + 0xA000, KERNEL)]


def test_the_dirty_bit_parts_rows_that_look_the_same() -> None:
    dump = tables(LA, {4: 0x10000 | KERNEL, 5: 0x11000 | KERNEL & ~0x40})
    assert len(present(dump)) == 2


def test_a_table_that_forbids_writing_parts_rows_though_their_entries_are_equal() -> None:
    memory = tables(LA, {511: 0x10000 | KERNEL}).memory
    memory.table(PMD)[1] = 0x5000 | PAGE_TABLE & ~RW
    memory.table(0x5000)[0] = 0x11000 | KERNEL
    rows = present(PtDump(memory, make_layout(4), PGD))
    assert rows == [(LA + 0x1FF000, LA + 0x200000, KERNEL), (LA + 0x200000, LA + 0x201000, KERNEL)]


def test_a_hole_in_the_top_table_is_one_of_the_pgd_with_four_levels() -> None:
    dump = tables(LA, {})
    assert {row.level for row in dump.rows() if isinstance(row, Row) and row.end - row.start > 1 << 40} == {0}


def test_the_last_row_ends_at_address_0() -> None:
    last = [row for row in tables(LA, {}).rows() if isinstance(row, Row)][-1]
    assert last.end == 0
    assert row_text(last).startswith("0xffffff0000000000-0x0000000000000000           1T ")


def test_the_esp_fixup_area_prints_16_rows_and_counts_the_rest() -> None:
    la = 0xFFFF_FF00_0000_0000
    dump = tables(la, dict.fromkeys(range(0, 40, 2), 65536 | KERNEL))
    dump.memory.table(PGD)[511] = 0x6000 | PAGE_TABLE
    rows = list(dump.rows())
    begin = rows.index(next(row for row in rows if isinstance(row, Marker) and row.name == "ESPfix Area"))
    assert all(isinstance(row, Row) for row in rows[begin + 1 : begin + 17])
    # 20 pages, 20 holes between and behind them, the rest of the PMD, PUD and top table; the first page stands before the marker.
    assert rows[begin + 17] == Skipped(42 - 16)
    assert rows[begin + 18] == Marker(0xFFFF_FFEF_0000_0000, "EFI Runtime Services")
    assert row_text(Skipped(1)) == "... 1 entry skipped ... " and row_text(Skipped(2)) == "... 2 entries skipped ... "


@pytest.mark.parametrize(("prot", "level", "text"), [
    (0, 4, " " * 30),
    (PRESENT | RW | GLOBAL | NX, 4, "    RW                 GLB NX "),
    (PRESENT | USER, 4, "USR ro                     x  "),
    (PRESENT | RW | PWT | PCD | PSE | GLOBAL | NX, 3, "    RW PWT PCD PSE     GLB NX "),
    (PRESENT | RW | PAT | NX, 4, "    RW             PAT     NX "),
])
def test_flags_stand_in_their_columns(prot: int, level: int, text: str) -> None:
    assert prot_text(prot, level) == text


def test_a_size_is_given_in_the_largest_unit_that_divides_it() -> None:
    assert row_text(Row(0, 0x200000, 3, 0)) == f"0x0000000000000000-0x0000000000200000           2M {' ' * 30}pmd"
    assert row_text(Row(0, 0x1000, 4, 0)).split()[1] == "4K"
    assert row_text(Row(0, 0x201000, 4, 0)).split()[1] == "2052K"


@pytest.mark.parametrize("levels", [4, 5])
def test_every_line_of_a_booted_machine_has_the_kernels_form_and_rows_follow_each_other(levels: int) -> None:
    _, machine = ran("xor eax, eax", levels=levels)
    rows = list(PtDump(machine.memory, machine.kernel.layout, machine.kernel.init_mm.pgd).rows())
    names = [row.name for row in rows if isinstance(row, Marker)]
    assert names[:6] == ["User Space", "Kernel Space", "LDT remap", "Low Kernel Mapping", "vmalloc() Area", "Vmemmap"]
    runs = [row for row in rows if isinstance(row, Row)]
    assert all(LINE.fullmatch(row_text(row)) for row in runs)
    assert all(one.end == other.start for one, other in pairwise(runs))


def test_the_dump_shows_each_leaf_that_the_tables_have() -> None:
    _, machine = ran("xor eax, eax")
    mm, layout = machine.kernel.init_mm, machine.kernel.layout
    shown = np.zeros(0, dtype=np.int64)
    for start, end, _ in present(PtDump(machine.memory, layout, mm.pgd)):
        if layout.vmalloc_start <= start < layout.vmalloc_end:
            shown = np.append(shown, np.arange(start - layout.vmalloc_start, end - layout.vmalloc_start, 4096))
    leaves = [la - layout.vmalloc_start for la, _, _ in mm.leaves(layout.vmalloc_start, layout.vmalloc_start + (1 << 30))]
    assert shown.tolist() == leaves


def test_the_runs_of_the_cpu_entry_area_are_those_of_the_recorded_kernel() -> None:
    recorded = [
        (int(fact["s"], 0), int(fact["e"], 0), int(fact["bits"], 0)) for fact in recorded_facts("ptdump-6.12-4l")
        if fact["t"] == "pt" and fact["s"].startswith("0xfffffe")
    ]
    _, machine = ran("xor eax, eax")
    rows = present(PtDump(machine.memory, machine.kernel.layout, machine.kernel.init_mm.pgd))
    accessed = 0x20
    ours = [(s, e, bits | accessed) for s, e, bits in rows if 0xFFFF_FE00_0000_0000 <= s < 0xFFFF_FE80_0000_0000]
    assert ours == recorded


def test_the_recorded_leaves_of_vmalloc_and_direct_map_have_flags_that_ours_have() -> None:
    recorded = {
        (fact["lvl"], int(fact["bits"], 0)) for fact in recorded_facts("ptdump-6.12-4l")
        if fact["t"] == "pt" and fact["s"] < "0xfffffe"
    }
    floor = make_floor()
    prots = floor.mm.prots
    ours = {("PTE", prots.kernel), ("PTE", prots.kernel_ro), ("PMD", prots.kernel_large), ("PMD", prots.kernel_ro | PSE)}
    assert ours <= recorded
