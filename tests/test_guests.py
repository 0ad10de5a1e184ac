"""Every guest program under guest/ ends as its header says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emu.guest.directives import MachineOptions
from emu.run import run_file

GUEST = Path(__file__).resolve().parent.parent / "guest"
PROGRAMS = sorted(path for path in GUEST.iterdir() if path.suffix in (".asm", ".c", ".S"))
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: .c and .S guests cannot be compiled")


def test_there_are_guests_for_every_statement_that_the_readme_promises() -> None:
    assert len(PROGRAMS) >= 25


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=NEEDS_GCC if p.suffix != ".asm" else (), id=p.name) for p in PROGRAMS]
)
def test_the_guest_ends_as_its_header_says(path: Path) -> None:
    result = run_file(str(path), MachineOptions())
    assert result.failures == ()


@pytest.mark.parametrize("path", [p for p in PROGRAMS if p.suffix == ".asm"], ids=lambda p: p.name)
def test_every_assembly_guest_states_an_expectation(path: Path) -> None:
    result = run_file(str(path), MachineOptions(max_instructions=1))
    assert not result.ok or path.name == "endless.asm"


@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("tlb", ["infinite", "finite", "none"])
def test_the_guard_page_holds_on_every_kernel_paging_depth_and_tlb(kernel: str, levels: int, tlb: str) -> None:
    result = run_file(str(GUEST / "guard_page.asm"), MachineOptions(kernel=kernel, levels=levels, tlb=tlb))
    assert [(f.vector, f.error) for f in result.outcome.faults] == [(14, 0)]
    assert result.outcome.ended == "oops"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [4, 5])
def test_the_guard_page_holds_wherever_kaslr_puts_the_region(seed: int, levels: int) -> None:
    result = run_file(str(GUEST / "guard_page.asm"), MachineOptions(kaslr=True, seed=seed, levels=levels))
    assert result.failures == ()
