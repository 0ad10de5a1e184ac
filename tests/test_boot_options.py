"""Kernel parameters and CPU features as machine options: what a guest sees of them."""

from __future__ import annotations

import pytest

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions, parse_directives
from emu.kernel.pgtable import PgLevel
from emu.machine import Machine
from emu.run import configure

GIB = 1 << 30
OPTIONS = ("gbpages", "nogbpages", "nohugevmalloc", "nohugeiomap")


def machine(**options: object) -> Machine:
    return Machine(MachineConfig(**{"memory": 2 * GIB, **options}), limit=100_000)


def direct_leaf(of: Machine) -> PgLevel:
    return of.kernel.init_mm.lookup(of.kernel.layout.va(GIB)).level


def device_leaf(of: Machine) -> PgLevel:
    return of.kernel.init_mm.lookup(of.kernel.ioremap.ioremap(1 << 38, GIB)).level


def vmalloc_leaf(of: Machine) -> PgLevel:
    return of.kernel.init_mm.lookup(of.kernel.vmalloc.vmalloc_huge(2 << 20, 0xCC0)).level


def test_without_options_every_kind_has_its_largest_leaf():
    made = machine()
    assert (direct_leaf(made), device_leaf(made), vmalloc_leaf(made)) == (PgLevel.PG_1G, PgLevel.PG_1G, PgLevel.PG_2M)


def test_a_cpu_without_1_gib_pages_has_none_anywhere_and_does_not_announce_them():
    made = machine(gbpages=False)
    assert (direct_leaf(made), device_leaf(made), vmalloc_leaf(made)) == (PgLevel.PG_2M,) * 3
    lines = ("section .text", "init_module:", "mov eax, 0x80000001", "cpuid", "mov eax, edx", "shr eax, 26", "and eax, 1", "ret\n")
    assert made.run(assemble("\n".join(lines), "a.asm")).returned == 0


def test_nogbpages_is_about_the_direct_map_alone():
    made = machine(nogbpages=True)
    assert (direct_leaf(made), device_leaf(made), vmalloc_leaf(made)) == (PgLevel.PG_2M, PgLevel.PG_1G, PgLevel.PG_2M)


def test_nohugevmalloc_is_about_vmalloc_alone():
    made = machine(nohugevmalloc=True)
    assert (direct_leaf(made), device_leaf(made), vmalloc_leaf(made)) == (PgLevel.PG_1G, PgLevel.PG_1G, PgLevel.PG_4K)


def test_nohugeiomap_is_about_device_memory_alone():
    made = machine(nohugeiomap=True)
    assert (direct_leaf(made), device_leaf(made), vmalloc_leaf(made)) == (PgLevel.PG_1G, PgLevel.PG_4K, PgLevel.PG_2M)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_guest_may_ask_for_an_option_and_the_command_line_wins(option):
    asked = parse_directives(f"; vmemu: {option}=off\n", "a.asm", "asm").machine
    assert getattr(configure(asked, MachineOptions())[0], option) is False
    assert getattr(configure(asked, MachineOptions(**{option: True}))[0], option) is True
