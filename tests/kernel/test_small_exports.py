"""Exported functions that are a line or two over the model: what they return and change."""

from __future__ import annotations

import pytest
from guest_machine import PAGE, PMD, GuestMachine

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.vm_struct import Vm

KERNEL = int(GFP_KERNEL)


def test_slow_virt_to_phys_walks_and_is_a_bug_where_a_table_is_missing():
    g = GuestMachine()
    v = g.kernel.vmalloc
    for la in (v.vmalloc(PAGE) + 8, v.vmalloc_huge(PMD, KERNEL) + 0x12345, g.kernel.layout.va(0x1234)):
        assert g.call("slow_virt_to_phys", la).returned == g.kernel.init_mm.to_pa(la)


@pytest.mark.parametrize(("kernel", "line"), [("6.12", 825), ("6.1", 775)])
def test_slow_virt_to_phys_of_what_has_no_table_is_a_bug(kernel, line):
    g = GuestMachine(kernel=kernel)
    g.call("slow_virt_to_phys", 0x1000)
    assert any(f"kernel BUG at arch/x86/mm/pat/set_memory.c:{line}!" in text for text in g.machine.log_lines())


def test_set_pages_uc_and_wb_change_the_direct_map_and_reserve_the_type():
    g = GuestMachine()
    k = g.kernel
    pfn = k.pages.alloc_pages(KERNEL)
    page, la = k.layout.page_to_la(pfn), k.layout.va(pfn * PAGE)
    assert g.call("set_pages_uc", page, 1).returned == 0
    assert k.init_mm.lookup(la).entry & 0x18 == 0x10
    assert g.call("set_pages_uc", page, 1).returned == (1 << 64) - 16
    assert g.call("set_pages_wb", page, 1).returned == 0
    assert k.init_mm.lookup(la).entry & 0x18 == 0
    assert k.ioremap.memtypes.ram_types == {}


def test_arrays_on_a_node_are_zeroed_and_null_when_the_product_overflows():
    g = GuestMachine(nodes=2)
    la = g.call("kvcalloc_node", 8, 1 << 20, KERNEL, 1).returned
    assert {g.kernel.memory.node_of(int(pfn) * PAGE) for pfn in g.kernel.vmalloc.find_vm_area(la).pages} == {1}
    assert g.call("kvmalloc_array_node", 1 << 40, 1 << 40, KERNEL, 0).returned == 0
    assert g.read(la + PAGE).returned == 0


def test_large_pages_are_a_property_of_the_frames():
    g = GuestMachine()
    small, large = g.kernel.vmalloc.vmalloc(PAGE), g.kernel.vmalloc.vmalloc_huge(PMD, KERNEL)
    assert [g.call("is_vm_area_hugepages", la).returned for la in (small, large, large + PAGE, 0x1000)] == [0, 1, 1, 0]


def test_set_vm_flush_reset_perms_lets_vfree_reset_and_ignores_what_is_no_area():
    g = GuestMachine()
    la = g.kernel.vmalloc.vmalloc(PAGE)
    g.call("set_vm_flush_reset_perms", la)
    g.call("set_vm_flush_reset_perms", 0x1000)
    assert g.kernel.vmalloc.find_vm_area(la).flags & Vm.FLUSH_RESET_PERMS
    pfn = g.kernel.vmalloc.vmalloc_to_pfn(la)
    assert g.call("set_memory_ro", la, 1).returned == 0
    alias = g.kernel.layout.va(pfn * PAGE)
    assert not g.kernel.init_mm.lookup(alias).entry & 2
    g.call("vfree", la)
    assert g.kernel.init_mm.lookup(alias).entry & 2
