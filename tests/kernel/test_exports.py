import pytest
from kernel_floor import make_floor

from emu.kernel.exports import KernelSymbols


def symbols():
    floor = make_floor()
    return floor, KernelSymbols(floor.layout, floor.memory)


def test_an_exported_function_is_a_stub_in_kernel_text_that_its_address_finds():
    floor, known = symbols()

    @known.export("vmalloc", 1)
    def vmalloc(size):
        return size + 1

    la = known.address_of("vmalloc")
    assert floor.layout.is_kernel_text(la)
    assert floor.memory.read(floor.layout.pa(la), 16) == bytes.fromhex("f4c3") + b"\xcc" * 14
    assert known.exports[la].function(41) == 42
    assert floor.mm.to_pa(la) == floor.layout.pa(la)
    known.validate()


def test_stubs_are_16_bytes_apart_and_symbols_reach_to_the_next():
    _, known = symbols()
    first = known.register("vmalloc", lambda size: 0, 1)
    assert known.register("vfree", lambda la: None, 1) == first + 16
    assert known.symbolize(first) == "vmalloc+0x0/0x10"
    assert known.symbolize(first + 17) == "vfree+0x1/" + known.symbolize(first + 16).split("/")[1]


def test_symbols_of_modules_carry_the_module_until_it_is_removed():
    floor, known = symbols()
    la = floor.layout.modules_vaddr + 0x1000
    known.add_module("guard_page", [("init_module", la, 0x40), ("helper", la + 0x40, 0x20)])
    assert known.symbolize(la + 0x3F) == "init_module+0x3f/0x40 [guard_page]"
    assert known.symbolize(la + 0x60) is None
    with pytest.raises(ValueError, match="loaded already"):
        known.add_module("guard_page", [])
    known.remove_module("guard_page")
    assert known.symbolize(la) is None
    with pytest.raises(ValueError, match="not loaded"):
        known.remove_module("guard_page")


def test_a_module_links_to_exported_symbols_only_and_to_gpl_ones_only_under_the_gpl():
    _, known = symbols()
    known.register("vmalloc", lambda size: 0, 1)
    known.register("vmalloc_huge", lambda size, gfp: 0, 2, gpl=True)
    known.add_code("asm_exc_page_fault", b"\xf4")
    assert known.exported_address("vmalloc", gpl=False) == known.address_of("vmalloc")
    assert known.exported_address("vmalloc_huge", gpl=False) is None
    assert known.exported_address("vmalloc_huge") is not None
    assert known.exported_address("asm_exc_page_fault") is None
    assert known.address_of("asm_exc_page_fault")
    assert known.exported_names() == ("vmalloc", "vmalloc_huge")


def test_an_alias_is_another_name_for_the_same_address_and_not_the_one_printed():
    _, known = symbols()
    la = known.register("vmalloc_noprof", lambda size: 0, 1)
    known.add_alias("vmalloc", "vmalloc_noprof")
    assert known.exported_address("vmalloc") == la
    assert known.symbolize(la).startswith("vmalloc_noprof+0x0/")


def test_data_symbols_stand_in_the_image_clear_of_the_static_page_tables():
    floor, known = symbols()
    la = known.add_data("numa_node", 4, exported=True)
    floor.memory.fill(floor.layout.pa(la), 4, 0xFF)
    floor.mm.validate()
    assert known.exported_address("numa_node") == la
    assert known.symbolize(la).startswith("numa_node+0x0/")


def test_addresses_outside_kernel_and_modules_have_no_symbol():
    floor, known = symbols()
    for la in (0, floor.layout.page_offset, floor.layout.kernel_text - 1, floor.layout.kernel_end):
        assert known.symbolize(la) is None
    assert known.symbolize(floor.layout.kernel_text) == "_text+0x0/0x1000"


def test_a_second_definition_and_too_many_arguments_are_refused():
    _, known = symbols()
    known.register("vmalloc", lambda size: 0, 1)
    with pytest.raises(ValueError, match="vmalloc is defined twice"):
        known.register("vmalloc", lambda size: 0, 1)
    with pytest.raises(ValueError, match="seven takes 7 arguments"):
        known.register("seven", lambda *a: 0, 7)
    with pytest.raises(ValueError, match="unknown kernel symbol nothing"):
        known.address_of("nothing")
    with pytest.raises(ValueError, match="text is full"):
        known.add_code("huge", bytes(16 << 20))


def test_kallsyms_lists_every_symbol_by_address():
    _, known = symbols()
    known.add_string_ops()
    listed = known.kallsyms()
    assert [s.address for s in listed] == sorted(s.address for s in listed)
    assert {"_text", "memset", "strlen", "__fentry__"} <= {s.name for s in listed}
    assert known.address_of("__memset") == known.address_of("memset")
    known.validate()
