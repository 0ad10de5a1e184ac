"""Faults that the recorder provoked (faults-*, stale-*), provoked by guests on the emulated CPU: error code and place."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from guest_machine import PAGE, PMD, GuestMachine, Ran
from kernel_floor import recorded_facts
from recorded_oops import messages

from emu.kernel import set_memory
from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.vm_struct import Vm

VERSIONS = ("6.12", "6.1")
Provoke = Callable[[GuestMachine], tuple[int, Ran]]


def recorded_fault(version: str, command: str, log: str = "faults") -> tuple[int, int]:
    """Error code and CR2 that the kernel printed for a command."""
    lines = messages(version, log)
    at = lines.index(f"VMOMARK BEGIN {command}")
    text = "\n".join(lines[at : lines.index(f"VMOMARK END {command}", at)])
    address = re.search(r"unable to handle page fault for address: ([0-9a-f]+)", text)
    code = re.search(r"#PF: error_code\(0x([0-9a-f]+)\)", text)
    assert address and code, text[:400]
    return int(code[1], 16), int(address[1], 16)


def recorded_base(version: str, command: str, log: str = "faults") -> int:
    fact = next(fact for fact in recorded_facts(f"{log}-{version}-4l") if fact["cmd"] == command)
    return int(fact["p"], 16)


def freed(g: GuestMachine, size: int, *, large: bool = False) -> int:
    v = g.kernel.vmalloc
    la = v.vmalloc_huge(size, GFP_KERNEL) if large else v.vmalloc(size)
    v.vfree(la)
    return la


def guard(g: GuestMachine, offset: int, act: Callable[[int], Ran]) -> tuple[int, Ran]:
    la = g.kernel.vmalloc.vmalloc(PAGE)
    return la, act(la + offset)


def read_only(g: GuestMachine) -> tuple[int, Ran]:
    la = g.kernel.vmalloc.vmalloc(PAGE)
    _, flush = set_memory.set_memory_ro(g.kernel.init_mm, la, 1)
    flush.flush(g.kernel.tlb, "test")
    return la, g.write(la, 1)


def executed(g: GuestMachine, large: bool) -> tuple[int, Ran]:
    v = g.kernel.vmalloc
    la = v.vmalloc_huge(PMD, GFP_KERNEL) if large else v.vmalloc(PAGE)
    return la, g.jump(la)


def stale_free(g: GuestMachine, act: str, size: int, large: bool) -> tuple[int, Ran]:
    la = freed(g, size, large=large)
    return la, g.read(la) if act == "read" else g.write(la, 1)


PROVOKED: dict[str, Provoke] = {
    "guard_read": lambda g: guard(g, PAGE, g.read),
    "guard_write": lambda g: guard(g, PAGE + 0x10, lambda la: g.write(la, 1)),
    "uaf_read": lambda g: stale_free(g, "read", PAGE, False),
    "uaf_write": lambda g: stale_free(g, "write", PAGE, False),
    "uaf_huge": lambda g: stale_free(g, "read", PMD, True),
    "unpop": lambda g: (0xFFFFCD0000000000, g.read(0xFFFFCD0000000000)),
    "ro_write": read_only,
    "nx_exec": lambda g: executed(g, False),
    "nx_exec_huge": lambda g: executed(g, True),
    "exec_unmapped": lambda g: guard(g, PAGE, g.jump),
    "straddle": lambda g: guard(g, PAGE - 4, lambda la: g.write(la, 1)),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", PROVOKED)
def test_a_provoked_fault_has_the_recorded_error_code_and_place(version: str, kind: str) -> None:
    code, address = recorded_fault(version, f"fault {kind}")
    base, ran = PROVOKED[kind](GuestMachine(kernel=version))
    assert ran.page_fault is not None
    assert (ran.page_fault[0], ran.page_fault[1] - base) == (code, address - recorded_base(version, f"fault {kind}"))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_did_not_fault_there_does_not_fault_here(version: str) -> None:
    assert next(f for f in recorded_facts(f"faults-{version}-4l") if f["cmd"] == "fault exec_ok")["ok"] == 1
    g = GuestMachine(kernel=version)
    k = g.kernel
    layout = k.layout
    la = k.vmalloc.vmalloc_node_range(
        PAGE, 1, layout.vmalloc_start, layout.vmalloc_end, GFP_KERNEL, k.init_mm.prots.kernel_exec, 0, -1
    )
    k.memory.write(k.vmalloc.vmalloc_to_pfn(la) * PAGE, b"\xc3")
    assert g.jump(la).fault is None
    high = next(f for f in recorded_facts(f"stale-{version}-4l") if f["t"] == "misc")
    made = k.vmalloc.vmalloc_gfp(PAGE, GFP_KERNEL | Gfp.HIGHMEM)
    vm = k.vmalloc.find_vm_area(made)
    assert (vm.size, vm.flags, vm.nr_pages) == (high["va_len"], int(high["vm"]["flags"], 16), high["vm"]["nr_pages"])
    assert g.write(made, 1).fault is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["stale_tlb", "stale_vunmap", "stale_vm_unmap_ram"])
def test_a_stale_entry_is_read_through_as_recorded(version: str, kind: str) -> None:
    fact = next(f for f in recorded_facts(f"stale-{version}-4l") if f["cmd"] == f"fault {kind}")
    g = GuestMachine(kernel=version)
    k = g.kernel
    frames = k.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1)
    free: Callable[[int], None]
    if kind == "stale_tlb":
        la, free = k.vmalloc.vmalloc(PAGE), k.vmalloc.vfree
    elif kind == "stale_vunmap":
        la, free = k.vmap.vmap(frames, 1, int(Vm.MAP), k.init_mm.prots.kernel), k.vmap.vunmap
    else:
        la, free = k.vmap_blocks.vm_map_ram(frames, 1), lambda la: k.vmap_blocks.vm_unmap_ram(la, 1)
    assert g.write(la, fact["val"]).fault is None
    # The frame is free, but nobody else shall write to it in between: the probe needs a stack.
    k.pages.get_page(k.vmalloc.vmalloc_to_pfn(la))
    free(la)
    assert not k.init_mm.lookup(la).present
    survived = fact.get("survived_read_after_vfree", fact.get("survived"))
    ran = g.read(la)
    assert (ran.fault is None, ran.returned) == (bool(survived), fact["val"])


@pytest.mark.parametrize("version", VERSIONS)
def test_after_vm_unmap_aliases_the_read_faults_as_recorded(version: str) -> None:
    g = GuestMachine(kernel=version)
    k = g.kernel
    la = k.vmalloc.vmalloc(PAGE)
    assert g.write(la, 1).fault is None
    k.vmalloc.vfree(la)
    k.vmap_blocks.vm_unmap_aliases()
    code, address = recorded_fault(version, "fault stale_tlb_purged", "stale")
    assert (code, address) == (0, recorded_base(version, "fault stale_tlb_purged", "stale"))
    assert g.read(la).page_fault == (code, la)
    code, address = recorded_fault(version, "fault vmap_block_hole", "stale")
    piece = k.vmap_blocks.vm_map_ram(k.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1), 1)
    assert address == recorded_base(version, "fault vmap_block_hole", "stale") + PAGE
    assert g.read(piece + PAGE).page_fault == (code, piece + PAGE)
