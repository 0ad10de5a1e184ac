"""The `layout` command of every recording: address map, registers, constants, top tables and sample walks of a booted kernel."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from kernel_floor import RecordedFlushes, recorded_facts

from emu.config import MachineConfig
from emu.kernel.kernel import Kernel
from emu.kernel.profile import find_profile
from emu.kernel.task import THREAD_SIZE
from emu.kernel.vm_struct import IOREMAP_MAX_ORDER, Vm
from emu.machine import Machine
from emu.memory import Memory
from emu.mmu.registers import Cr4
from emu.start_cpu import LINUX_CR0, LINUX_CR4, LINUX_EFER, LINUX_PAT

FILES = [
    *(f"main-{version}-{levels}l" for version in ("6.12", "6.1") for levels in (4, 5)),
    "pti-6.12-4l", "pti-6.1-4l", "kaslr1-6.12-4l", "kaslr1-6.1-4l", "nogb-6.12-4l", "ptdump-6.12-4l",
]  # fmt: skip
RAM = (2 << 30) - (4 << 20)
FRAME = 0x0000_00FF_FFFF_F000
GLOBAL, RIGHTS = 1 << 8, 0x8000_0000_0000_0103
ADDRESSES = {
    "PAGE_OFFSET": "page_offset", "VMALLOC_START": "vmalloc_start", "VMALLOC_END": "vmalloc_end", "VMEMMAP_START": "vmemmap_start",
    "MODULES_VADDR": "modules_vaddr", "MODULES_END": "modules_end", "CPU_ENTRY_AREA_BASE": "cpu_entry_area",
}  # fmt: skip
OSXSAVE = 1 << 18


@cache
def booted(name: str) -> Kernel:
    option, version, levels = name.split("-")
    if option == "nogb":
        return Machine(MachineConfig(memory=RAM, kernel=version, levels=int(levels[0]), gbpages=False)).kernel
    return Kernel(
        Memory(RAM), find_profile(version), RecordedFlushes(), levels=int(levels[0]), pti=option == "pti",
        random=Random(1) if option == "kaslr1" else None,
    )  # fmt: skip


def fact(name: str, kind: str) -> dict:
    return next(record for record in recorded_facts(name) if record["t"] == kind)


def number(text: object) -> int:
    return int(str(text), 0)


@pytest.mark.parametrize("name", FILES)
def test_the_address_map_is_the_recorded_one_and_kaslr_moves_only_three_bases(name):
    recorded, layout = fact(name, "layout"), booted(name).layout
    ours = {key: getattr(layout, attribute) for key, attribute in ADDRESSES.items()}
    theirs = {key: number(recorded[key]) for key in ADDRESSES}
    if name.startswith("kaslr1"):
        for key in ("PAGE_OFFSET", "VMALLOC_START", "VMEMMAP_START"):
            assert ours[key] % (1 << 30) == theirs[key] % (1 << 30) == 0
        assert ours["VMALLOC_END"] - ours["VMALLOC_START"] == theirs["VMALLOC_END"] - theirs["VMALLOC_START"]
        for key in ("MODULES_VADDR", "MODULES_END", "CPU_ENTRY_AREA_BASE"):
            assert ours[key] == theirs[key]
    else:
        assert ours == theirs
    assert recorded["GBPAGES"] == int(booted(name).init_mm.gbpages)
    assert recorded["la57"] == int(layout.levels == 5)


@pytest.mark.parametrize("name", FILES)
def test_control_registers_are_the_recorded_ones_but_for_xsave(name):
    recorded = fact(name, "cr")
    # The emulated CPU announces no XSAVE, so CR4.OSXSAVE stays clear.
    cr4 = LINUX_CR4 | OSXSAVE | (Cr4.LA57 if "5l" in name else 0)
    assert (number(recorded["cr0"]), number(recorded["pat"]), number(recorded["efer"])) == (LINUX_CR0, LINUX_PAT, LINUX_EFER)
    assert number(recorded["cr4"]) == cr4


@pytest.mark.parametrize("name", FILES)
def test_constants_and_flags_are_the_recorded_ones(name):
    recorded, flags, k = fact(name, "consts"), fact(name, "flags"), booted(name)
    prots = k.init_mm.prots
    for key, ours in (
        ("PAGE_KERNEL", prots.kernel), ("PAGE_KERNEL_RO", prots.kernel_ro), ("PAGE_KERNEL_EXEC", prots.kernel_exec),
        ("PAGE_KERNEL_ROX", prots.kernel_rox), ("PAGE_KERNEL_NOCACHE", prots.kernel_nocache), ("THREAD_SIZE", THREAD_SIZE),
        ("IOREMAP_MAX_ORDER", IOREMAP_MAX_ORDER), ("lazy_max_pages", k.vmalloc.space.lazy_max_pages()),
        ("sizeof_vm_struct", k.vmalloc.vm_struct_size), ("stack_is_vmalloc", 1),
        ("nr_vmap_nodes", k.profile.nr_vmap_nodes(1) if k.profile.max_vmap_nodes else 0),
    ):  # fmt: skip
        if key in recorded:
            assert number(recorded[key]) == ours, key
    for key, value in flags.items():
        if key.startswith("VM_"):
            assert value == int(Vm[key[3:]]), key


@pytest.mark.parametrize("name", FILES)
def test_top_tables_are_populated_as_recorded(name):
    k = booted(name)
    layout, memory = k.layout, k.memory
    region = fact(name, "pgd_vmalloc")
    shift = 9 * layout.levels + 3
    first, last = layout.vmalloc_start >> shift & 511, layout.vmalloc_end >> shift & 511
    assert last - first == region["idx_end"] - region["idx_start"]
    entries = memory.table(k.init_mm.pgd)[first : last + 1]
    assert entries.all()
    prealloc = fact(name, "prealloc")
    assert prealloc["steps_512G"] == (layout.vmalloc_end + 1 - layout.vmalloc_start) >> 39
    assert prealloc["p4d_table_present"] == prealloc["steps_512G"]
    if layout.levels == 4:
        assert prealloc["pud_table_present"] == prealloc["steps_512G"]
    runs = [record for record in recorded_facts(name) if record["t"] == "pgd_run"]
    assert {number(run["first_entry"]) & 0xFFF for run in runs} == {0x067}
    if not name.startswith("kaslr1"):
        populated = {i for i, entry in enumerate(memory.table(k.init_mm.pgd).tolist()) if entry and i >= 256}
        assert populated == {i for run in runs for i in range(run["from"], run["to"] + 1)}


@pytest.mark.parametrize("name", ["pti-6.12-4l", "pti-6.1-4l"])
def test_the_user_half_s_table_has_the_recorded_kernel_entries_and_none_of_vmalloc(name):
    k = booted(name)
    kernel_pgd = k.init_mm.pgd
    user = k.memory.table(kernel_pgd | 0x1000).tolist()
    recorded = {r["idx"]: r for r in recorded_facts(name) if r["t"] == "user_pgd"}
    present = {i for i, entry in enumerate(user) if entry and i >= 256}
    # Entry 273: a page of the direct map, that of the TSS.
    assert present == set(recorded)
    assert not any(user[402:466])
    for i in present:
        shared = number(recorded[i]["e"]) == number(recorded[i]["kern_e"])
        assert (user[i] == k.memory.table(kernel_pgd)[i]) == shared, i
        assert shared or user[i] & 0xFFF == number(recorded[i]["e"]) & 0xFFF, i


def _places(k: Kernel) -> dict[str, int]:
    module = k.module_loader.load("walked", {"text": 4096, "data": 4096}, 0)
    assert module is not None and k.module_loader.protect(module) == 0
    stack = k.create_thread("walked").stack
    text, data = module.part("text"), module.part("data")
    assert text is not None and data is not None
    return {
        "direct_map": k.layout.va(0x30000000) if k.build.kaslr_offset is not None else k.layout.va(k.layout.kernel_phys),
        # The first 2 MiB have the entry code in them, which page-table isolation makes global.
        "kernel_text": k.layout.kernel_text + (2 << 20), "module_text": text.la, "module_data": data.la, "stack": stack,
        "stack_guard_below": stack - 1, "stack_end": stack + THREAD_SIZE, "vmemmap": k.layout.vmemmap_start + 0x40000,
        "percpu": k.percpu.per_cpu_offset(0) + 0x1000, "cpu_entry_area": k.cpu_entry_area(0).gdt,
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_recorded_walk_finds_entries_with_the_recorded_flags(name):
    k = booted(name)
    places = _places(k)
    compared = 0
    for record in recorded_facts(name):
        if record["t"] != "walk":
            continue
        found, walk = k.init_mm.lookup(places[record["what"]]), record["w"]
        entries = [number(entry) for entry in walk["e"]]
        if record["what"] == "percpu":
            # The same memory, in a leaf that the recorded boot had split.
            assert found.entry & RIGHTS == entries[-1] & RIGHTS
        elif walk["present"]:
            ours = [entry & ~FRAME for entry in found.entries]
            assert ours == [entry & ~FRAME for entry in entries], record
        else:
            assert not found.present, record
        compared += 1
    assert compared == 10
