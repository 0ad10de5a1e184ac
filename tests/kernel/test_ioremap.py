"""ioremap, against recorded kernels and by statement."""

from __future__ import annotations

import re

import booted
import pytest
from kernel_floor import recorded_facts
from test_vmalloc_facts import ENTRY_FLAGS, LEVELS, model_runs, number, present_runs
from vmap_machine import Kernel, kernel

from emu.kernel.ioremap import Ioremap, PageCacheMode
from emu.kernel.profile import V6_1, find_profile
from emu.kernel.vm_struct import Vm
from emu.kernel.vmallocinfo import vmallocinfo_rows

PAGE = 4096
BAR = 0xFD000000
FILES = ["main-6.12-4l", "main-6.12-5l", "main-6.1-4l", "main-6.1-5l", "nogb-6.12-4l", "nohugeiomap-6.12-4l"]
# The recorded nogb is a CPU without 1 GiB pages.
OPTIONS = {"nogb": "gbpages", "nohugeiomap": "nohugeiomap"}


def machine(name: str = "main-6.12-4l") -> tuple[Kernel, Ioremap]:
    option, version, levels = name.split("-")
    if option != "main":
        made = booted.machine(kernel=version, levels=int(levels[0]), **{OPTIONS[option]: option != "nogb"}).kernel
        return booted.parts(made), made.ioremap
    k = kernel(find_profile(version), levels=int(levels[0]))
    return k, Ioremap(k.vmap, k.memblock)


@pytest.mark.parametrize("name", FILES)
def test_every_recorded_ioremap_makes_the_recorded_area_and_leaves(name):
    k, io = machine(name)
    # The recorded kernel has the HPET and the local APIC mapped uncached before.
    io.ioremap(0xFED00000, PAGE)
    io.ioremap(0xFEE00000, PAGE)
    bar = la = 0
    compared = 0
    for record in recorded_facts(name):
        if record["t"] == "pci_bar":
            bar = number(record["start"])
        if record["t"] == "ioremap":
            vm = record.get("vm")
            phys = bar + 4096 if "bar+4096" in record["how"] else number(vm["phys"]) if vm else 0x1000000
            if "0xfed00010" in record["how"]:
                phys = 0xFED00010
            function = getattr(io, re.match(r"\w+", record["how"]).group())
            la = function(phys, record["req"])
            compared += 1
            if vm is None:
                assert la == 0
                continue
            area = k.vmalloc.find_vm_area(la)
            assert (area.size, area.flags, area.phys_addr) == (record["va_len"], Vm.IOREMAP, number(vm["phys"]))
            assert la % PAGE == number(record["ret"]) % PAGE
        elif record["t"] == "ioremap.walk":
            found = k.mm.lookup(la)
            assert LEVELS[found.level] == record["first"]["end"], record
            assert found.entry & ENTRY_FLAGS == number(record["first"]["e"][-1]) & ENTRY_FLAGS, record
        elif record["t"] == "leafscan" and "ioremap" in record["how"]:
            assert model_runs(k, la & -PAGE, record["len"]) == present_runs(record["runs"]), record
            io.iounmap(la)
    assert compared == 19
    assert k.task.warnings == []
    k.validate()


@pytest.mark.parametrize("name", FILES)
def test_memremap_of_ram_is_its_recorded_address_in_the_direct_map(name):
    (recorded,) = (record for record in recorded_facts(name) if record["t"] == "memremap")
    option, version, levels = name.split("-")
    options = {} if option == "main" else {OPTIONS[option]: option != "nogb"}
    on = booted.machine(kernel=version, levels=int(levels[0]), **options)
    code = "    sub rsp, 8\n    mov edi, 0x1000000\n    mov esi, 4096\n    mov edx, 1\n    call memremap\n    add rsp, 8\n    ret"
    la = booted.run(on, code).returned
    assert (la, on.kernel.layout.is_vmalloc_addr(la)) == (number(recorded["ret"]), bool(recorded["isvm"]))


def test_ram_in_use_is_refused_with_a_warning_and_reserved_ram_is_mapped():
    k, io = machine()
    assert io.ioremap(32 << 20, PAGE) == 0
    assert k.task.warnings == ["__ioremap_caller:ram: ioremap on RAM at 0x0000000002000000 - 0x0000000002000fff"]
    assert io.ioremap(k.vmalloc.layout.kernel_phys, PAGE)


def test_size_0_and_wraparound_are_null_and_an_address_beyond_the_width_warns():
    k, io = machine()
    assert io.ioremap(BAR, 0) == 0
    assert io.ioremap(BAR, (1 << 64) - PAGE) == 0
    assert k.task.warnings == []
    assert io.ioremap(1 << 40, PAGE) == 0
    assert k.task.log == ["ioremap: invalid physical address 10000000000"]
    assert k.task.warnings == ["__ioremap_caller: "]


@pytest.mark.parametrize(
    ("function", "bits"),
    [("ioremap", 0x10), ("ioremap_uc", 0x18), ("ioremap_wc", 0x08), ("ioremap_wt", 0x98), ("ioremap_cache", 0)],
)
def test_each_function_has_its_cache_bits(function, bits):
    k, io = machine()
    assert k.mm.lookup(getattr(io, function)(BAR, PAGE)).entry & 0x98 == bits


def test_a_second_mapping_gets_the_type_of_the_first_until_that_is_gone():
    k, io = machine()
    first = io.ioremap(BAR, PAGE)
    second = io.ioremap_wc(BAR, PAGE)
    assert k.mm.lookup(second).entry & 0x18 == 0x10
    io.iounmap(first)
    io.iounmap(second)
    assert io.memtypes.entries == []
    assert k.mm.lookup(io.ioremap_wc(BAR, PAGE)).entry & 0x18 == 0x08


def test_an_uncached_mapping_of_what_is_mapped_write_back_is_refused():
    k, io = machine()
    io.ioremap_cache(BAR, 2 * PAGE)
    assert io.ioremap(BAR + PAGE, PAGE) == 0
    assert k.task.log == [
        f"ioremap error for 0x{BAR + PAGE:x}-0x{BAR + 2 * PAGE:x}, "
        f"requested 0x{PageCacheMode.UC_MINUS:x}, got 0x{PageCacheMode.WB:x}"
    ]
    assert len(k.addresses("busy")) == 1


def test_a_mapping_that_fails_leaves_nothing_reserved():
    k, io = machine()
    k.pages.should_fail = lambda gfp, order: True
    assert io.ioremap(BAR, PAGE) == 0
    k.pages.should_fail = None
    assert io.memtypes.entries == []
    k.validate()


def test_iounmap_makes_the_area_lazy_and_a_second_one_is_reported():
    k, io = machine()
    la = io.ioremap(BAR + 0x10, 16)
    assert next(iter(vmallocinfo_rows(k.vmalloc, hex))).endswith(f"8192 phys=0x{BAR:016x} ioremap")
    io.iounmap(la)
    assert not k.mm.lookup(la).present
    assert k.space.vmap_lazy_nr == 2
    io.iounmap(la)
    assert k.task.log == [f"iounmap: bad address {la & -PAGE:016x}"]
    io.iounmap(0x1000)
    assert k.task.warnings == ["iounmap: "]
    k.validate()


def test_up_to_6_1_iounmap_of_another_address_is_silent():
    k, io = machine(f"main-{V6_1.name}-4l")
    io.iounmap(0x1000)
    assert k.task.warnings == k.task.log == []
