"""What changed between two steps: areas, page tables, TLBs, against a comparison page by page."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_history_replay import RandomGuest

from emu.debug.at import machine_at
from emu.debug.diff import Mapping, Moment, diff, diff_lines, mappings, moment
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import Machine
from emu.mmu.entry import RW, XD, A, D, G
from emu.mmu.staleness import effective

GUEST = Path(__file__).resolve().parent.parent.parent / "guest"
PLAIN = MachineOptions()
PWT = 8


def between(program: Program, first: int, second: int) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What `diff` says of two steps, by name."""
    before, after = (moment(machine_at(program, PLAIN, step)[1], step) for step in (first, second))
    return {one.name: (one.removed, one.added) for one in diff(before, after)}


def test_a_vfree_changes_area_and_page_tables_and_leaves_the_tlb() -> None:
    program = load(str(GUEST / "stale_tlb.asm"))
    found = between(program, 9, 14)
    assert found == {
        "areas": (
            ("0xffffc90000005000-0xffffc90000007000    8192 init_module+0xa/0x43 [stale_tlb] pages=1 vmalloc N0=1",),
            ("0xffffc90000005000-0xffffc90000007000    8192 unpurged vm_area",),
        ),
        "page tables": (("0xffffc90000005000-0xffffc90000006000 4K pa 0x3eec8000 RW A D G XD",), ()),
    }


def test_a_flush_changes_the_tlb_alone() -> None:
    program = load(str(GUEST / "stale_tlb.asm"))
    found = between(program, 17, 18)
    removed, _ = found["CPU 0 TLB"]
    assert "global 0xffffc90000005000 4K pa 0x3eec8000 RW A D G XD" in removed
    assert "page tables" not in found


def test_nothing_changes_between_a_step_and_itself() -> None:
    program = load(str(GUEST / "stale_tlb.asm"))
    first = moment(machine_at(program, PLAIN, 9)[1], 9)
    assert diff(first, moment(machine_at(program, PLAIN, 9)[1], 9)) == []
    assert diff_lines(first, first) == ["nothing changed between steps 9 and 9"]


def test_the_later_step_may_come_first() -> None:
    program = load(str(GUEST / "stale_tlb.asm"))
    forth, back = between(program, 8, 14), between(program, 14, 8)
    assert {name: (added, removed) for name, (removed, added) in forth.items()} == back


def test_what_only_a_part_of_a_run_of_pages_lost_is_told_of_that_part() -> None:
    one = Mapping(0x1000, 0x9000, 0x40_1000, 4096, ("RW",))
    parts = one.part(0x1000, 0x3000), one.part(0x4000, 0x9000)
    text = diff_lines(Moment(0, {"page tables": (one,)}), Moment(1, {"page tables": parts}))
    assert text == ["page tables", "  - 0x3000-0x4000 4K pa 0x403000 RW"]


def pages(machine: Machine) -> dict[int, tuple[int, int]]:
    """Each mapped page of the vmalloc region's first 64 MiB, by a walk of its own: frame and rights."""
    layout, regs = machine.kernel.layout, machine.cpu.mmu.regs
    found = {}
    for la in range(layout.vmalloc_start, layout.vmalloc_start + (64 << 20), 4096):
        level, entry, _ = effective(machine.memory, regs, la)
        if level:
            found[la] = entry & 0xFF_FFFF_F000, entry & (RW | XD | A | D | G | PWT)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_mappings_are_those_that_a_walk_of_each_page_finds(seed: int) -> None:
    program = assemble(RandomGuest(seed).text, "guest.asm")
    for step in (30, 90):
        _, machine = machine_at(program, PLAIN, step)
        layout = machine.kernel.layout
        found = {}
        bits = {"RW": RW, "XD": XD, "A": A, "D": D, "G": G, "PWT": PWT}
        for one in mappings(machine.kernel.init_mm, machine.kernel.init_mm.pgd):
            if layout.vmalloc_start <= one.start < layout.vmalloc_start + (64 << 20):
                for la in range(one.start, one.end, 4096):
                    found[la] = one.pa + la - one.start, sum(bits[flag] for flag in one.flags)
        assert found == pages(machine)
