from random import Random

import pytest
from kernel_floor import recorded_fact

from emu.kernel.layout import MODULES_VADDR, make_layout

STEP = 1 << 30
NAMES = {
    "PAGE_OFFSET": "page_offset",
    "VMALLOC_START": "vmalloc_start",
    "VMALLOC_END": "vmalloc_end",
    "VMEMMAP_START": "vmemmap_start",
    "MODULES_VADDR": "modules_vaddr",
    "MODULES_END": "modules_end",
    "CPU_ENTRY_AREA_BASE": "cpu_entry_area",
}


@pytest.mark.parametrize("kernel", ["6.12", "6.1"])
@pytest.mark.parametrize("levels", [4, 5])
def test_the_address_map_is_that_of_a_recorded_kernel(kernel, levels):
    recorded = recorded_fact(f"main-{kernel}-{levels}l", "layout")
    layout = make_layout(levels)
    assert {name: getattr(layout, ours) for name, ours in NAMES.items()} == {name: int(recorded[name], 16) for name in NAMES}


def test_vmalloc_is_32_tib_with_4_levels_and_12800_tib_with_5():
    for levels, tib in ((4, 32), (5, 12800)):
        layout = make_layout(levels)
        assert layout.vmalloc_end + 1 - layout.vmalloc_start == tib << 40


def test_the_last_byte_of_vmalloc_is_not_a_vmalloc_address():
    layout = make_layout(4)
    assert layout.is_vmalloc_addr(layout.vmalloc_start)
    assert layout.is_vmalloc_addr(layout.vmalloc_end - 1)
    assert not layout.is_vmalloc_addr(layout.vmalloc_end)
    assert not layout.is_vmalloc_addr(layout.vmalloc_start - 1)


def test_a_module_address_is_a_vmalloc_or_module_address_only():
    layout = make_layout(4)
    assert not layout.is_vmalloc_addr(MODULES_VADDR)
    assert layout.is_vmalloc_or_module_addr(MODULES_VADDR)
    assert not layout.is_vmalloc_or_module_addr(layout.modules_end)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("seed", range(50))
def test_kaslr_moves_regions_in_1_gib_steps_and_keeps_their_order(levels, seed):
    layout = make_layout(levels, memory_size=STEP, kaslr=Random(seed))
    layout.validate()
    assert layout.vmalloc_end + 1 - layout.vmalloc_start == (32 if levels == 4 else 12800) << 40
    assert 1 <= (layout.module_load_base - MODULES_VADDR) >> 12 <= 1024
    assert layout.kernel_phys + 0x800000 <= STEP


def test_kaslr_is_the_same_for_the_same_seed():
    assert make_layout(4, kaslr=Random(7)) == make_layout(4, kaslr=Random(7))
    assert make_layout(4, kaslr=Random(7)) != make_layout(4, kaslr=Random(8))


def test_a_recorded_kaslr_layout_keeps_the_rules_of_ours():
    recorded = recorded_fact("kaslr1-6.12-4l", "layout")
    base, vmalloc, vmemmap = (int(recorded[n], 16) for n in ("PAGE_OFFSET", "VMALLOC_START", "VMEMMAP_START"))
    assert base % STEP == vmalloc % STEP == vmemmap % STEP == 0
    assert base + (64 << 40) <= vmalloc
    assert vmalloc + (32 << 40) <= vmemmap


def test_pa_undoes_va_and_knows_the_kernel_image():
    layout = make_layout(5)
    assert layout.pa(layout.va(0x1234567)) == 0x1234567
    assert layout.pa(layout.kernel_text + 0x10) == layout.kernel_phys + 0x10
    with pytest.raises(ValueError, match="neither in the direct map"):
        layout.pa(layout.vmalloc_start)


def test_struct_pages_are_64_bytes_from_vmemmap_start():
    layout = make_layout(4)
    assert layout.page_to_la(0x1000) == 0xFFFFEA0000040000
    assert layout.la_to_pfn(0xFFFFEA0000040000) == 0x1000
    with pytest.raises(ValueError, match="struct page"):
        layout.la_to_pfn(0xFFFFEA0000040008)


def test_other_numbers_of_levels_are_refused():
    with pytest.raises(ValueError, match="it must be 4 or 5"):
        make_layout(3)
