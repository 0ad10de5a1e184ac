"""A walk drawn level by level."""

from __future__ import annotations

import pytest
from after_run import ran, result_word

from emu.kernel.walk_report import walk_lines, walk_report

VMALLOC = "mov edi, 8192\ncall vmalloc\nmov [result], rax"


@pytest.mark.parametrize("levels", [4, 5])
def test_a_vmalloc_page_is_walked_through_every_level(levels: int) -> None:
    result, machine = ran(VMALLOC, levels=levels)
    la = result_word(result) + 0x1234
    report = walk_report(machine.kernel, machine.cpu.reg("cr3"), la)
    names = ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"][5 - levels :]
    assert [step.level for step in report.steps] == names
    assert [step.linux for step in report.steps] == ["pgd", *["p4d", "pud", "pmd", "pte"][5 - levels :]]
    assert report.ends == "mapped" and report.page_size == 4096
    assert report.pa == machine.kernel.init_mm.to_pa(la)
    assert report.rights == ("RW", "supervisor", "XD") and report.memory_type == "WB"
    assert report.steps[-1].bits == ("P", "RW", "A", "D", "G", "XD")


def test_a_guard_page_ends_at_a_pte_that_is_not_present() -> None:
    result, machine = ran(VMALLOC)
    report = walk_report(machine.kernel, machine.cpu.reg("cr3"), result_word(result) + 8192)
    assert report.ends == "not present" and report.steps[-1].level == "PTE" and report.steps[-1].bits == ()
    assert walk_lines(report, "somewhere")[-1] == "not present"


def test_a_large_leaf_ends_the_walk_with_its_size() -> None:
    result, machine = ran("mov edi, 2 << 20\nmov esi, 0xcc0\ncall vmalloc_huge\nmov [result], rax")
    report = walk_report(machine.kernel, machine.cpu.reg("cr3"), result_word(result) + 0x12345)
    assert report.page_size == 2 << 20 and report.steps[-1].level == "PDE" and "PS" in report.steps[-1].bits
    assert walk_lines(report, "x")[-1].startswith("2 MiB page, physical ")


def test_an_address_that_is_not_canonical_is_not_walked() -> None:
    _, machine = ran("xor eax, eax")
    report = walk_report(machine.kernel, machine.cpu.reg("cr3"), 0x8000_0000_0000)
    assert report.ends == "not canonical" and report.steps == ()


def test_device_memory_has_the_type_it_was_mapped_with() -> None:
    result, machine = ran("mov edi, 0xfed00000\nmov esi, 4096\ncall ioremap_wc\nmov [result], rax")
    report = walk_report(machine.kernel, machine.cpu.reg("cr3"), result_word(result))
    assert report.memory_type == "WC" and report.pa == 0xFED0_0000


def test_each_entry_has_a_line_with_index_place_and_bits() -> None:
    result, machine = ran(VMALLOC)
    la = result_word(result)
    lines = walk_lines(walk_report(machine.kernel, machine.cpu.reg("cr3"), la), "an area")
    assert lines[0] == f"{la:#018x}, CR3 {machine.cpu.reg('cr3'):#x}, 4 levels: an area"
    assert lines[1].startswith("PML4E pgd [402] at 0x") and lines[1].endswith("  P RW US A")
    assert len(lines) == 6
