"""What recorded kernels made of each call, compared call by call: area, flags, pages, leaves.

Compared are the records of the commands basic, variants, huge, range and vmap of main-*, pti-* and nohugevmalloc-*. Addresses
are those of one boot and are compared by traces elsewhere; here only what does not depend on what boot had allocated.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from booted import machine, parts
from kernel_floor import ORACLE, recorded_facts
from vmap_machine import Kernel, kernel

from emu.kernel.gfp import GFP_ATOMIC, GFP_KERNEL, GFP_NOFS, GFP_NOWAIT, Gfp
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.pgprot import PWT
from emu.kernel.pgtable import PgLevel
from emu.kernel.profile import find_profile
from emu.kernel.vm_struct import Vm

PAGE = 4096
FILES = [
    *(f"main-{version}-{levels}l" for version in ("6.12", "6.1") for levels in (4, 5)),
    *(f"{option}-{version}-4l" for option in ("pti", "nohugevmalloc") for version in ("6.12", "6.1")),
]
LEVELS = {PgLevel.PG_4K: "PTE", PgLevel.PG_2M: "PMD", PgLevel.PG_1G: "PUD"}
ENTRY_FLAGS = 0xFFF0000000000FFF
KINDS = ("basic", "variant", "huge", "range", "vmap", "vmap_pfn")
GFPS = {
    "GFP_KERNEL | __GFP_ZERO": GFP_KERNEL | Gfp.ZERO,
    "GFP_NOFS": GFP_NOFS,
    "GFP_ATOMIC": GFP_ATOMIC,
    "GFP_NOWAIT": GFP_NOWAIT,
}


def booted(name: str) -> Kernel:
    option, version, levels = name.split("-")
    if option == "nohugevmalloc":
        return parts(machine(kernel=version, levels=int(levels[0]), memory=1 << 30, nohugevmalloc=True).kernel)
    return kernel(find_profile(version), size=1 << 30, levels=int(levels[0]), pti=option == "pti")


def number(text: str) -> int:
    return int(text, 0)


def prot_of(k: Kernel, name: str) -> int:
    if name.startswith("pgprot_writecombine"):
        return k.mm.prots.kernel | PWT
    return getattr(k.mm.prots, name.removeprefix("PAGE_").lower())


def flags_of(text: str) -> int:
    return sum(Vm[name.strip().removeprefix("VM_")] for name in text.split("|") if name.strip() != "0")


def vnr(k: Kernel, record: dict, args: str) -> int:
    size, align, prot, flags = re.fullmatch(r"(\w+),al=(\w+),(\w+),fl=(.*)", args).groups()
    layout = k.vmalloc.layout
    start, end = layout.vmalloc_start, layout.vmalloc_end
    if record["ret"] is None:
        start = end - PAGE
    return k.vmalloc.vmalloc_node_range(
        number(size), number(align), start, end, GFP_KERNEL, prot_of(k, prot), flags_of(flags), NUMA_NO_NODE
    )


def vmap(k: Kernel, record: dict, args: str) -> int:
    if "contiguous" in args:
        head = k.pages.alloc_pages(GFP_KERNEL, 9)
        k.pages.split_page(head, 9)
        flags = Vm.MAP | (Vm.ALLOW_HUGE_VMAP if "HUGE" in args else 0)
        return k.vmap.vmap(np.arange(head, head + 512), 512, flags, k.mm.prots.kernel)
    count, flags, *prot = args.split(",")
    frames = k.frames(number(count)) if number(count) else k.frames(1)
    return k.vmap.vmap(frames, number(count), flags_of(flags), prot_of(k, prot[0] if prot else "PAGE_KERNEL"))


def call(k: Kernel, record: dict) -> int:
    """Make the recorded call on the model."""
    v = k.vmalloc
    name, args = re.fullmatch(r"(\w+)(?:\((.*)\))?", record["how"]).groups()
    if name == "vnr":
        return vnr(k, record, args)
    if name == "vmap":
        return vmap(k, record, args)
    if name == "vmap_pfn":
        return k.vmap.vmap_pfn(np.array([0xFED00, 0xFED01]), 2, k.mm.prots.kernel)
    if name == "__vmalloc":
        return v.vmalloc_gfp(4096, GFPS[args.split(", ")[1]])
    if name == "vmalloc_huge":
        return v.vmalloc_huge(number(args), GFP_KERNEL)
    function: Callable[..., int] = getattr(v, name)
    return function(*(number(arg) for arg in args.split(", "))) if args else function(record["req"])


def present_runs(text: str) -> list[str]:
    return [run for run in text.split() if not run.startswith("!")]


def model_runs(k: Kernel, la: int, size: int) -> list[str]:
    runs: list[list] = []
    for _, _, level in k.mm.leaves(la, la + size):
        if runs and runs[-1][0] == level:
            runs[-1][1] += 1
        else:
            runs.append([level, 1])
    return [f"{LEVELS[level]}x{count}" for level, count in runs]


@pytest.mark.parametrize("name", FILES)
def test_every_recorded_call_makes_the_recorded_area_and_leaves(name):
    facts = recorded_facts(name)
    k = booted(name)
    compared = 0
    last = last_recorded = 0
    for record in facts:
        kind = record["t"]
        if kind in KINDS and "how" in record:
            last = la = call(k, record)
            last_recorded = number(record["ret"] or "0")
            compared += 1
            if not last_recorded:
                assert la == 0, record
                continue
            vm = k.vmalloc.find_vm_area(la)
            wanted = record["vm"]
            got = {"size": vm.size, "flags": vm.flags, "nr_pages": vm.nr_pages, "order": vm.page_order}
            assert got == {key: int(str(wanted[key]), 0) for key in got}, record
            assert record["va_len"] == vm.size
        elif kind.endswith(".walk") and kind.removesuffix(".walk") in KINDS and last:
            found = k.mm.lookup(last)
            walk = record["first"]
            assert LEVELS[found.level] == walk["end"], record
            assert found.entry & ENTRY_FLAGS & ~(0x1000 if walk["end"] != "PTE" else 0) == number(walk["e"][-1]) & ENTRY_FLAGS
            offset = number(record["at_reqend"]["a"]) - number(walk["a"])
            assert k.mm.lookup(last + offset).present == bool(record["at_reqend"]["present"]), record
        elif kind == "leafscan" and number(record["a"]) == last_recorded:
            assert model_runs(k, last, record["len"]) == present_runs(record["runs"]), record
        elif kind == "kvmalloc":
            last = last_recorded = 0
    assert compared >= 14
    assert set(k.task.warnings) <= {"vmap:no_guard: "}
    k.validate()


@pytest.mark.parametrize("name", FILES[:4])
def test_pieces_of_vm_map_ram_lie_as_recorded(name):
    records = [record for record in recorded_facts(name) if record["t"] == "vm_map_ram"]
    k = booted(name)
    pieces = [k.blocks.vm_map_ram(k.frames(record["count"]), record["count"]) for record in records]
    for record, la in zip(records, pieces, strict=True):
        recorded = int(record["ret"], 16)
        va = k.space.nodes.find(la)
        assert la - va.va_start == recorded - int(record["va"][0], 16)
        assert va.va_end - va.va_start == int(record["va"][1], 16) - int(record["va"][0], 16)
        assert va.vm is None and record["vm"] == 0
        assert k.mm.lookup(la).entry & ENTRY_FLAGS == number(record["w"]["e"][-1]) & ENTRY_FLAGS


def test_the_covered_recordings_exist():
    if not ORACLE.exists():
        pytest.skip(f"recordings of real kernels are not at {ORACLE} (set VMEMU_ORACLE)")
    assert all((ORACLE / "facts" / f"{name}.jsonl.gz").exists() for name in FILES)
