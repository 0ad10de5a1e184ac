"""Refused requests: what each returns, and the words that the kernel has for it, against the recordings errors2-* and faults-*."""

from __future__ import annotations

import re

import numpy as np
import pytest
from guest_machine import PAGE, GuestMachine
from kernel_floor import recorded_facts
from recorded_oops import messages

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.vm_struct import Vm

VERSIONS = ("6.12", "6.1")
RAM = (2 << 30) - (4 << 20)
SPOKEN = re.compile(r"vmalloc error|vmalloc_node_range for size|vmap allocation for size|WARNING: |kernel BUG at")


def spoken(lines: list[str]) -> list[str]:
    """The first line of each report, without who and where: command, CPU, PID, size of functions."""
    found = []
    for line in lines:
        if SPOKEN.search(line) and not line.startswith("VMO"):
            line = re.sub(r"^\S+: vmalloc", "COMM: vmalloc", line)
            line = re.sub(r"CPU: \d+ PID: \d+", "CPU PID", line)
            found.append(re.sub(r"\+0x\w+/0x\w+.*", "", line))
    return found


def recorded_calls(version: str) -> list[list[str]]:
    """What each call of errors2 made the kernel say."""
    said: list[list[str]] = []
    for line in messages(version, "errors2"):
        if line.startswith("VMOMARK BEGIN"):
            said.append([])
        elif said:
            said[-1].append(line)
    return [spoken(lines) for lines in said]


# By their places among the calls of errors2. The fourth took all memory and met the OOM killer, which is not modelled; the fifth
# has a test of its own.
CALLS = {
    0: ("vmalloc", 1 << 45),
    1: ("vmalloc", (1 << 64) - 1),
    2: ("vmalloc", (1 << 64) - PAGE),
    5: ("vmalloc_huge", 1 << 45, int(GFP_KERNEL)),
    6: ("kvmalloc", 1 << 45, int(GFP_KERNEL)),
    7: ("kvmalloc", 0x7FFF_F000, int(GFP_KERNEL)),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("index", CALLS)
def test_a_refused_request_says_what_the_recorded_one_said(version, index):
    wanted = recorded_calls(version)[index]
    g = GuestMachine(kernel=version, memory=RAM)
    assert g.call(*CALLS[index]).returned == 0
    assert spoken(list(g.machine.log_lines())) == wanted
    assert len(wanted) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_window_too_small_is_named_and_the_failure_reported(version):
    said = recorded_calls(version)[4]
    g = GuestMachine(kernel=version, memory=RAM)
    v = g.kernel.vmalloc
    start = v.layout.vmalloc_start + (1 << 40)
    window = (start, start + 0x8000)
    g.kernel.symbols.register(
        "small_window", lambda: v.vmalloc_node_range(0x10000, 1, *window, GFP_KERNEL, v.prots.kernel, 0, -1), 0
    )
    assert g.call("small_window").returned == 0
    assert spoken(list(g.machine.log_lines())) == said
    assert len(said) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_vmalloc_in_interrupt_is_the_recorded_bug(version):
    wanted = [line for line in spoken(messages(version, "errors2")) if "kernel BUG at" in line]
    g = GuestMachine(kernel=version)
    g.call_in_interrupt("vmalloc", PAGE)
    assert [line for line in spoken(list(g.machine.log_lines())) if "kernel BUG at" in line] == wanted
    assert len(wanted) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_with_preemption_off_vmalloc_just_succeeds(version):
    fact = next(fact for fact in recorded_facts(f"errors2-{version}-4l") if fact["t"] == "fault")
    assert fact["kind"] == "vmalloc_preempt_disabled"
    # Preemption off is no interrupt context; the recorded kernels do not check more.
    g = GuestMachine(kernel=version)
    assert bool(g.call("vmalloc", PAGE).returned) == (fact["ret"] != "0x0")
    assert spoken(list(g.machine.log_lines())) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_array_of_more_than_512_pages_is_an_area_of_its_own(version):
    records = [fact for fact in recorded_facts(f"errors2-{version}-4l") if fact["t"] == "nested"]
    k = GuestMachine(kernel=version).kernel
    for record in records[:2]:
        vm = k.vmalloc.find_vm_area(k.vmalloc.vmalloc(record["n"] * PAGE))
        assert k.vmalloc.is_vmalloc_addr(vm.pages_la) == bool(record["pages_is_vmalloc"])
    array, wanted = k.vmalloc.find_vm_area(vm.pages_la), records[2]
    assert array.requested_size == wanted["req"]
    assert (array.size, array.flags, array.nr_pages) == (wanted["va_len"], int(wanted["vm"]["flags"], 16), wanted["vm"]["nr_pages"])
    assert k.init_mm.lookup(array.addr).entry & 0xFFF0_0000_0000_0FFF == 0x8000_0000_0000_0163


def refused(g: GuestMachine, call: str) -> object:
    """The call of faults-*, on the model."""
    v, vmap = g.kernel.vmalloc, g.kernel.vmap
    prot, start = v.prots.kernel, v.layout.vmalloc_start + (1 << 40)
    total = v.pages.totalram_pages()
    page = int(v.pages.alloc_pages(GFP_KERNEL))
    match call:
        case "vmalloc(0)":
            return v.vmalloc(0)
        case "vmalloc(totalram_pages() * PAGE_SIZE + 4096)":
            return v.vmalloc((total + 1) * PAGE)
        case "vmalloc(1UL << 45)":
            return v.vmalloc(1 << 45)
        case "vmalloc(-1UL)":
            return v.vmalloc((1 << 64) - 1)
        case "vmalloc(~0xfffUL)":
            return v.vmalloc((1 << 64) - PAGE)
        case "vzalloc(0)":
            return v.vzalloc(0)
        case "__vmalloc(0, GFP_KERNEL | __GFP_NOWARN)":
            return v.vmalloc_gfp(0, GFP_KERNEL | Gfp.NOWARN)
        case "__vmalloc(1UL << 45, GFP_KERNEL | __GFP_NOWARN)":
            return v.vmalloc_gfp(1 << 45, GFP_KERNEL | Gfp.NOWARN)
        case "vmap(totalram+1)":
            return vmap.vmap(np.array([page]), total + 1, Vm.MAP, prot)
        case "vmalloc_to_page(unmapped)":
            return v.vmalloc_to_pfn(start) or 0
        case "vmap({pg,NULL})":
            return vmap.vmap(np.array([page, -1]), 2, Vm.MAP, prot)
        case "vfree(p+8)" | "vfree(p+4096)":
            la = v.vmalloc(3 * PAGE)
            v.vfree(la + int(call[8:-1]))
            return int(v.find_vm_area(la) is not None)
        case "vfree(vmap)":
            v.vfree(vmap.vmap(np.array([page]), 1, Vm.MAP, prot))
            return v.pages.page_count(page)
    if call.startswith("vnr(0x10000"):
        return v.vmalloc_node_range(0x10000, 1, start, start + 0x8000, GFP_KERNEL, prot, 0, -1)
    return v.vmalloc_node_range(PAGE, PAGE, start + 1, start + 0x2000, GFP_KERNEL, prot, 0, -1)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_recorded_error_has_its_result(version):
    g = GuestMachine(kernel=version, memory=RAM)
    # A CPU has entered the kernel, so that warnings have a task to name.
    g.call("is_vmalloc_addr", 0)
    compared = 0
    for fact in recorded_facts(f"faults-{version}-4l"):
        if fact["t"] != "err":
            continue
        wanted = fact.get("still", fact.get("page_count_after", 0 if fact.get("ret") == "0x0" else None))
        assert refused(g, fact["call"]) == wanted, fact
        compared += 1
    assert compared == 16
