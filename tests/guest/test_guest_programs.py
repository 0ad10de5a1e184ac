"""The programs under guest/: each says what it expects, needs only exported functions, and the pure ones compute right."""

from __future__ import annotations

import shutil
from pathlib import Path

import capstone
import pytest
from flat_run import FlatRun

from emu.config import MachineConfig
from emu.guest.directives import Return
from emu.guest.link import link
from emu.guest.load import SUFFIXES, load
from emu.guest.program import Program
from emu.machine import Machine

GUESTS = Path(__file__).resolve().parents[2] / "guest"
PROGRAMS = sorted(p for p in GUESTS.iterdir() if p.suffix in SUFFIXES)
MACHINES = [Machine(MachineConfig(kernel=kernel)) for kernel in ("6.12", "6.1", "5.4")]
EXPORTED = sorted({name for machine in MACHINES for name in machine.kernel.symbols.exported_names()})


def loaded(path: Path) -> Program:
    if path.suffix in (".c", ".S") and shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return load(path)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_a_program_states_what_it_expects_and_links_against_exported_functions(path: Path) -> None:
    program = loaded(path)
    program.validate()
    assert program.directives.expectations
    assert set(program.undefined()) <= set(EXPORTED)
    bases, at = {}, 0xFFFFFFFFC0000000
    for kind, area in program.areas().items():
        bases[kind] = at
        at += (area.size + 0xFFFF) & ~0xFFFF
    linked = link(program, bases, lambda name: 0xFFFFFFFF81000000 + 16 * EXPORTED.index(name))
    assert linked.where(linked.entry) is not None
    code = linked.images[".text"][1]
    if path.suffix != ".c":
        assert sum(i.size for i in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, 0)) == len(code)


@pytest.mark.parametrize(
    "name",
    ["hello.asm", "off_by_one_last_page.asm", "self_modifying.asm", "sieve.c", "kmalloc.c", "copy_backwards.S", "stream.asm"],
)
def test_a_pure_program_returns_what_it_expects_on_flat_memory(name: str) -> None:
    program = loaded(GUESTS / name)
    expected = next(e for e in program.directives.expectations if isinstance(e, Return))
    run = FlatRun(program)
    assert str(run.returned & 0xFFFFFFFF) == str(expected.value)


def test_the_stream_sums_every_word_it_wrote() -> None:
    run = FlatRun(loaded(GUESTS / "stream.asm"))
    words = (64 << 20) // 8
    assert int.from_bytes(run.uc.mem_read(run.linked.symbols["sum"], 8), "little") == words * (words - 1) // 2


def test_hello_prints_its_line_with_a_level() -> None:
    assert FlatRun(loaded(GUESTS / "hello.asm")).log == [b"\x016hello from the guest\n"]
