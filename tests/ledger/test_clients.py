"""Ledger rows about who uses these mappings and how: the families of functions, their options, what users get to read."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from guest_machine import PAGE, PMD, GuestMachine

from emu.kernel.gfp import GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT, Gfp
from emu.kernel.pgtable_types import LEVEL_NAMES
from emu.kernel.vm_struct import Vm
from emu.kernel.vmallocinfo import vmallocinfo_rows

ROOT = Path(__file__).resolve().parents[2]
HPET = 0xFED00000
KMALLOC_MAX = 4 << 20


def rows(g: GuestMachine) -> list[str]:
    return list(vmallocinfo_rows(g.kernel.vmalloc, lambda la: g.kernel.symbolize(la) or hex(la)))


def row(g: GuestMachine, la: int) -> str:
    """The words that /proc/vmallocinfo prints for the area at `la`, from its size on."""
    found = next(text for text in rows(g) if text.startswith(f"0x{la & -PAGE:016x}-"))
    return " ".join(found.split()[1:])


def free_of_high_orders(g: GuestMachine, order: int) -> None:
    """No blocks of `order` or more are to be had, as in a fragmented machine."""
    g.kernel.pages.should_fail = lambda gfp, asked: asked >= order


def page_array(g: GuestMachine, count: int) -> int:
    """An array of struct page pointers in the direct map."""
    frames = [g.kernel.pages.alloc_pages(GFP_KERNEL) for _ in range(count)]
    la = g.kernel.slab.kmalloc(8 * count)
    for i, pfn in enumerate(frames):
        g.kernel.memory.write_u64(g.kernel.layout.pa(la) + 8 * i, g.kernel.layout.page_to_la(pfn))
    return la


# Who uses it


def test_C03_C46_R11_each_client_has_a_row_with_its_tag():
    g = GuestMachine()
    k = g.kernel
    pages = page_array(g, 2)
    vmalloced = g.call("vmalloc", PAGE).returned
    mapped = g.call("vmap", pages, 2, int(Vm.MAP), k.init_mm.prots.kernel).returned
    device = g.call("ioremap", HPET, PAGE).returned
    kv = g.call("kvmalloc", KMALLOC_MAX + 1, int(GFP_KERNEL)).returned
    ram = g.call("vm_map_ram", pages, 2, 0xFFFF_FFFF).returned
    user = g.call("vmalloc_user", PAGE).returned
    assert re.fullmatch(r"8192 init_module\+\S+ \[guest1\] pages=1 vmalloc N0=1", row(g, vmalloced))
    assert re.fullmatch(r"12288 init_module\+\S+ \[guest2\] vmap", row(g, mapped))
    assert re.fullmatch(rf"8192 init_module\+\S+ \[guest3\] phys=0x{HPET:016x} ioremap", row(g, device))
    assert re.fullmatch(r"6295552 init_module\+\S+ \[guest4\] pages=1536 vmalloc vpages N0=1536", row(g, kv))
    assert row(g, ram) == f"{1 << 20} vm_map_ram"
    assert re.fullmatch(r"8192 init_module\+\S+ \[guest6\] pages=1 vmalloc user N0=1", row(g, user))
    # The kernel's own clients: the interrupt stack, thread stacks, modules.
    names = {words[2].partition("+")[0] for words in (text.split() for text in rows(g)) if len(words) > 3}
    assert {"irq_init_percpu_irqstack", "kernel_clone", "load_module"} <= names
    # Reservations that get their pages later.
    sparse = k.vmalloc.get_vm_area(PAGE, Vm.SPARSE)
    coherent = k.vmalloc.get_vm_area(PAGE, Vm.DMA_COHERENT)
    assert row(g, sparse.addr) == "8192 sparse"
    assert row(g, coherent.addr) == "8192 dma-coherent"
    assert k.vmalloc.vm_area_map_pages(sparse, sparse.addr, sparse.addr + PAGE, k.pages.alloc_pages_bulk(GFP_KERNEL, 0, 1)) == 0
    assert g.write(sparse.addr, 1).fault is None
    assert g.write(coherent.addr, 1).page_fault == (2, coherent.addr)


def test_C04_the_model_covers_the_files_that_the_subsystem_is_made_of():
    # Not covered, as a decision: mm/kasan/shadow.c (no KASAN kernel is modelled) and mm/nommu.c (there is an MMU).
    text = "\n".join(path.read_text() for path in sorted((ROOT / "emu").rglob("*.py")))
    for source in (
        "mm/vmalloc.c", "include/linux/vmalloc.h", "mm/util.c", "mm/percpu-vm.c", "mm/percpu.c", "mm/execmem.c", "kernel/fork.c",
        "arch/x86/mm/pgtable.c", "arch/x86/mm/init_64.c", "arch/x86/mm/tlb.c", "arch/x86/mm/ioremap.c",
        "arch/x86/mm/pat/set_memory.c",
    ):  # fmt: skip
        assert source in text, f"no part of the model names {source} as its source"


# Large leaves on request


@pytest.mark.parametrize(("version", "there"), [("6.12", True), ("6.1", True), ("5.4", False)])
def test_C30_vmalloc_huge_is_there_since_5_18_and_kvmalloc_asks_for_large_leaves_by_itself(version, there):
    g = GuestMachine(kernel=version)
    assert ("vmalloc_huge" in {export.name for export in g.kernel.symbols.exports.values()}) == there
    la = g.call("kvmalloc", KMALLOC_MAX + 1, int(GFP_KERNEL)).returned
    assert g.write(la + KMALLOC_MAX, 1).fault is None
    assert g.machine.cpu.mmu.query(la + KMALLOC_MAX).level == (2 if there else 1)


def test_C31_who_may_have_large_leaves_is_decided_by_parameter_flag_and_size():
    # The row names CPUID.PSE and MTRRs besides: every x86-64 CPU has PSE, and MTRRs are not modelled.
    g = GuestMachine()
    v, mm = g.kernel.vmalloc, g.kernel.init_mm
    layout = v.layout

    def level(flags: int, size: int) -> int:
        la = v.vmalloc_node_range(
            size, 1, layout.vmalloc_start, layout.vmalloc_end, GFP_KERNEL, mm.prots.kernel, flags, -1
        )
        assert g.write(la + size - 8, 1).fault is None
        return int(g.machine.cpu.mmu.query(la + size - 8).level)

    assert [level(0, PMD), level(Vm.ALLOW_HUGE_VMAP, PMD - PAGE), level(Vm.ALLOW_HUGE_VMAP, PMD)] == [1, 1, 2]
    g = GuestMachine(nohugevmalloc=True, nohugeiomap=True)
    v, mm = g.kernel.vmalloc, g.kernel.init_mm
    assert level(Vm.ALLOW_HUGE_VMAP, PMD) == 1
    device = g.call("ioremap", 1 << 38, PMD).returned
    assert mm.lookup(device).level == 1


# The kv family


def test_R06_kvmalloc_takes_the_slab_then_vmalloc_and_never_vmalloc_for_a_page():
    g = GuestMachine()
    small = g.call("kvmalloc", 64 << 10, int(GFP_KERNEL)).returned
    assert not g.kernel.layout.is_vmalloc_addr(small)
    free_of_high_orders(g, 3)
    large = g.call("kvmalloc", 64 << 10, int(GFP_KERNEL)).returned
    assert g.kernel.layout.is_vmalloc_addr(large)
    assert g.write(large + (64 << 10) - 8, 1).fault is None
    before = len(rows(g))
    served = g.call("kvmalloc", 64 << 10, int(GFP_NOWAIT)).returned
    assert served == 0, "without direct reclaim there is no vmalloc behind it"
    pages = g.kernel.pages
    while pages.alloc_pages(GFP_KERNEL) is not None:
        pass
    pages.should_fail = None
    # Nothing is left: no module can be loaded any more, so the call is the model's.
    kvmalloc = next(export for export in g.kernel.symbols.exports.values() if export.name == "kvmalloc").function
    g.kernel.slab.kmalloc = lambda *args: None
    assert kvmalloc(PAGE, int(GFP_KERNEL)) == 0
    assert len(rows(g)) <= before + 2


def test_R06_more_than_int_max_warns_once_and_is_null():
    g = GuestMachine()
    assert g.call("kvmalloc", 1 << 31, int(GFP_KERNEL)).returned == 0
    assert g.call("kvmalloc", 1 << 45, int(GFP_KERNEL)).returned == 0
    assert len([line for line in g.machine.log_lines() if line.startswith("WARNING: ")]) == 1


def test_R07_kvfree_frees_both_kinds_and_gives_the_frames_back():
    g = GuestMachine()
    pages = g.kernel.pages
    program = (
        "push rbx", "mov edi, {size}", "mov esi, 0xcc0", "call kvmalloc", "mov rbx, rax", "mov [rbx], rax", "mov rdi, rax",
        "call kvfree", "mov rax, rbx", "pop rbx",
    )  # fmt: skip
    kinds = []
    for size in (4096, KMALLOC_MAX + 1):
        la = g.execute(*(line.format(size=size) for line in program)).returned
        kinds.append(g.kernel.layout.is_vmalloc_addr(la))
        assert g.kernel.vmalloc.find_vm_area(la) is None
        pfn = None if kinds[-1] else g.kernel.layout.pa(la) // PAGE
        assert pfn is None or pages.page_count(pfn) == 0 or g.kernel.slab.is_slab(la)
    assert kinds == [False, True]
    assert g.kernel.vmalloc.nr_vmalloc_pages == sum(
        va.vm.nr_pages for node in g.kernel.vmalloc.nodes.nodes for va in node.busy if va.vm is not None and va.vm.flags & Vm.ALLOC
    )


def test_R07_kvrealloc_moves_from_the_slab_to_vmalloc_and_keeps_the_bytes():
    g = GuestMachine()
    ran = g.execute(
        "push rbx", "mov edi, 4096", "mov esi, 0xcc0", "call kvmalloc", "mov rbx, 0x1122334455667788", "mov [rax + 4088], rbx",
        "mov rdi, rax", f"mov esi, {KMALLOC_MAX + PAGE}", "mov edx, 0xcc0", "call kvrealloc", "mov rbx, rax",
        "mov rdi, rax", f"mov esi, {KMALLOC_MAX + 2 * PAGE}", "mov edx, 0xcc0", "call kvrealloc",
        "mov rax, [rax + 4088]", "pop rbx",
    )  # fmt: skip
    assert ran.returned == 0x1122334455667788


# Names, sizes, style


@pytest.mark.parametrize(("levels", "kib"), [(4, 34359738367), (5, 13743895347199)])
def test_R08_the_region_has_its_exact_size_whatever_the_seed(levels, kib):
    for seed in range(6):
        layout = GuestMachine(levels=levels, kaslr=True, seed=seed).kernel.layout
        assert layout.vmalloc_end - layout.vmalloc_start >> 10 == kib
        assert layout.vmalloc_start % (1 << 30) == 0
        assert layout.vmalloc_end < 0xFFFF_FE00_0000_0000


def test_R09_a_walk_names_its_levels_and_a_leaf_has_the_size_of_its_level():
    g = GuestMachine()
    v, mm = g.kernel.vmalloc, g.kernel.init_mm
    device = g.call("ioremap", 1 << 38, 1 << 30).returned
    for la, name, size in (
        (v.vmalloc(PAGE), "PTE", 1 << 12), (v.vmalloc_huge(PMD, GFP_KERNEL), "PMD", 1 << 21), (device, "PUD", 1 << 30),
    ):  # fmt: skip
        found = mm.lookup(la)
        assert (LEVEL_NAMES[found.level], found.size) == (name, size)
    walked = g.kernel.entries(mm.pgd, v.vmalloc(PAGE))
    assert [level.value for level, _, _ in walked] == [4, 3, 2, 1]


def test_R10_adjacent_pages_of_an_area_need_not_be_adjacent_frames():
    g = GuestMachine()
    pages = g.kernel.pages
    held = [pages.alloc_pages(GFP_KERNEL) for _ in range(64)]
    for pfn in sorted(held)[::2]:
        pages.put_page(pfn)
    la = g.kernel.vmalloc.vmalloc(16 * PAGE)
    frames = g.kernel.vmalloc.find_vm_area(la).pages.tolist()
    assert any(abs(high - low) != 1 for low, high in pairwise(frames))
    assert g.write(la + PAGE - 4, 0x1111_1111_2222_2222).fault is None
    assert g.kernel.memory.read(frames[0] * PAGE + PAGE - 4, 4) == b"\x22" * 4
    assert g.kernel.memory.read(frames[1] * PAGE, 4) == b"\x11" * 4


def test_R12_the_name_is_vmalloc_everywhere():
    wrong = "vcm" + "a"
    for folder, pattern in (("emu", "*.py"), ("docs", "*.md"), ("guest", "*.*"), ("tools", "*.py")):
        for path in (ROOT / folder).rglob(pattern):
            if path.is_file():
                assert wrong not in path.read_text(encoding="utf-8", errors="replace").lower(), path


# Flags of a request


def test_O04_atomic_requests_are_served_without_a_word_and_dma32_stays_below_4_gib():
    # The row expects a might_sleep splat for GFP_NOWAIT: recorded kernels, built without DEBUG_ATOMIC_SLEEP, just serve it.
    g = GuestMachine(memory=6 << 30)
    made = [g.call("__vmalloc", PAGE, int(gfp)).returned for gfp in (GFP_NOWAIT, GFP_ATOMIC, GFP_KERNEL | Gfp.HIGHMEM)]
    assert all(made)
    assert not any("WARNING" in line or "BUG" in line for line in g.machine.log_lines())
    low = g.call("vmalloc_32", 64 * PAGE).returned
    assert max(g.kernel.vmalloc.find_vm_area(low).pages.tolist()) < 1 << 20
    high = g.kernel.vmalloc.vmalloc(64 * PAGE)
    assert min(g.kernel.vmalloc.find_vm_area(high).pages.tolist()) >= 1 << 20


def test_O04_an_allocation_in_interrupt_is_a_bug():
    g = GuestMachine()
    ended = g.call_in_interrupt("vmalloc", PAGE)
    assert (ended.returned, ended.fault and ended.fault.vector) in ((None, None), (None, 6))
    assert any(line.startswith("kernel BUG at mm/vmalloc.c:") for line in g.machine.log_lines())


def test_O11_a_row_is_printed_to_the_letter():
    g = GuestMachine()
    k = g.kernel
    start = k.layout.vmalloc_start + (1 << 30)
    window = (start, start + (1 << 30))
    la = k.vmalloc.vmalloc_node_range(
        5 * PAGE, 1, *window, GFP_KERNEL, k.init_mm.prots.kernel, Vm.USERMAP, -1, k.symbol("vmalloc") + 1
    )
    assert f"0x{la:016x}-0x{la + 6 * PAGE:016x}   24576 vmalloc_noprof+0x1/0x10 pages=5 vmalloc user N0=5" in rows(g)
    k.vmalloc.vfree(la)
    assert rows(g)[-1] == f"0x{la:016x}-0x{la + 6 * PAGE:016x}   24576 unpurged vm_area"
