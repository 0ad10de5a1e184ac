"""Recorded sessions come out of the model as they did of the kernel, absolute addresses and lazy counts included."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from kernel_floor import ORACLE
from session import Session, number

from emu.kernel.vm_struct import Vm, VmStruct
from emu.kernel.vmallocinfo import vmallocinfo_rows

FILES = [f"main-{version}-{levels}l" for version in ("6.12", "6.1") for levels in (4, 5)]
COMMANDS = ("", "basic", "variants", "huge", "range", "vmap", "ioremap", "deferred", "reuse", "hold")
TAGS = {
    "ioremap": Vm.IOREMAP, "vmalloc": Vm.ALLOC, "vmap": Vm.MAP, "user": Vm.USERMAP, "dma-coherent": Vm.DMA_COHERENT,
    "sparse": Vm.SPARSE,
}  # fmt: skip


@cache
def played(name: str) -> Session:
    return Session(name).play()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command or "boot")
@pytest.mark.parametrize("name", FILES)
def test_every_call_of_a_session_has_its_recorded_outcome(name, command):
    session = played(name)
    assert [difference for difference in session.differences if difference.command == command] == []
    assert sum(count for (other, _), count in session.compared.items() if other == command) >= 1


@pytest.mark.parametrize("name", FILES)
def test_a_session_has_all_its_calls_and_leaves_a_sound_kernel(name):
    session = played(name)
    assert sum(session.compared.values()) >= 700
    assert session.k.task.warnings == ["vmap:no_guard: "]
    assert session.k.task.bugs == []
    session.k.space.validate()
    session.k.blocks.validate()


def rows_of(path: str) -> list[str]:
    text = ORACLE / "vmallocinfo" / path
    if not text.exists():
        pytest.skip(f"recordings of real kernels are not at {ORACLE} (set VMEMU_ORACLE)")
    return [line for line in text.read_text().splitlines() if line.startswith("0x")]


def described(row: str, callers: dict[int, str], arrays: int) -> VmStruct | None:
    """The vm_struct that a row of boot was printed from; None for an area without one."""
    bounds, size, *words = row.split()
    if words[0] in ("unpurged", "vm_map_ram"):
        return None
    vm = VmStruct(0, 0, 0, 0)
    vm.addr, vm.size = int(bounds.partition("-")[0], 16), int(size)
    if "+0x" in words[0]:
        vm.caller = 0xFFFF_FFFF_8100_0000 + len(callers)
        callers[vm.caller] = words.pop(0)
    for word in words:
        name, _, value = word.partition("=")
        if name == "pages":
            vm.nr_pages = int(value)
            vm.pages = np.arange(1024, 1024 + vm.nr_pages, dtype=np.int64)
        elif name == "phys":
            vm.phys_addr = int(value, 16)
        elif name == "vpages":
            vm.pages_la = arrays
        elif name != "N0":
            vm.flags |= TAGS[name]
    return vm


@pytest.mark.parametrize("name", ["main-6.12-4l", "main-6.1-4l"])
def test_vmallocinfo_prints_the_recorded_text_after_a_session(name):
    boot, wanted = rows_of(f"{name}.boot.txt"), rows_of(f"{name}.after-hold.txt")
    session = Session(name)
    callers: dict[int, str] = {}
    # Of areas that the recorder's own processes got between boot and the session only the later text tells.
    by_start = {row.partition("-")[0]: row for row in (*wanted, *boot)}
    for node in session.k.space.nodes.nodes:
        for va in node.busy:
            vm = described(by_start[f"0x{va.va_start:016x}"], callers, session.k.vmalloc.layout.vmalloc_start)
            if vm is not None:
                session.describe(va.va_start, vm)
    session.play()
    rows = {int(row.partition("-")[0], 16): row for row in wanted}
    for record in session.facts:
        # A piece of a vmap block has no row of its own.
        if record["t"] == "hold" and number(record["a"]) in rows:
            callers[session.caller_of(record)] = " ".join(rows[number(record["a"])].split()[2:4])
    assert list(vmallocinfo_rows(session.k.vmalloc, callers.__getitem__)) == wanted


@pytest.mark.parametrize("name", ["main-6.12-4l", "main-6.1-4l"])
def test_every_row_of_boot_is_printed_from_what_it_says(name):
    session = Session(name)
    callers: dict[int, str] = {}
    kept: list[str] = []
    for row in rows_of(f"{name}.boot.txt"):
        vm = described(row, callers, session.k.vmalloc.layout.vmalloc_start)
        # A few areas came and went between this text and the dump that the session starts from.
        if vm is not None and session.k.vmalloc.find_vm_area(vm.addr) is not None:
            session.describe(vm.addr, vm)
            kept.append(row)
    assert len(kept) >= 60
    printed = list(vmallocinfo_rows(session.k.vmalloc, lambda la: callers.get(la, "")))
    assert [row for row in printed if row in set(kept)] == kept
