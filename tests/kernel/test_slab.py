from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_floor import make_floor

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.slab import KMALLOC_MAX_SIZE, KMALLOC_SIZES, ZERO_SIZE_PTR, Slab, SlabError


def floor_and_slab(**options):
    floor = make_floor(**options)
    return floor, Slab(floor.pages, floor.layout)


@pytest.mark.parametrize("size", KMALLOC_SIZES)
def test_a_size_is_served_by_its_class_and_aligned_if_a_power_of_two(size):
    floor, slab = floor_and_slab()
    objects = [slab.kmalloc(size) for _ in range(5)]
    assert all(slab.ksize(la) == size for la in objects)
    if size & (size - 1) == 0:
        assert all(la % size == 0 for la in objects)
    assert slab.ksize(slab.kmalloc(size - 1)) == size
    assert all(floor.mm.to_pa(la) == floor.layout.pa(la) for la in objects)
    slab.validate()


def test_above_8_kib_whole_pages_serve():
    _, slab = floor_and_slab()
    la = slab.kmalloc(8193)
    assert la % 4096 == 0
    assert slab.ksize(la) == 16384
    slab.kfree(la)
    assert slab.kmalloc(KMALLOC_MAX_SIZE) is not None
    assert slab.kmalloc(KMALLOC_MAX_SIZE + 1) is None


def test_zero_bytes_are_zero_size_ptr_which_may_be_freed_like_null():
    _, slab = floor_and_slab()
    assert slab.kmalloc(0) == ZERO_SIZE_PTR
    slab.kfree(ZERO_SIZE_PTR)
    slab.kfree(0)
    assert slab.ksize(ZERO_SIZE_PTR) == 0


def test_the_object_freed_last_is_handed_out_next():
    _, slab = floor_and_slab()
    keep, first, second = slab.kmalloc(64), slab.kmalloc(64), slab.kmalloc(64)
    slab.kfree(first)
    slab.kfree(second)
    assert [slab.kmalloc(64), slab.kmalloc(64)] == [second, first]
    slab.kfree(keep)


@pytest.mark.parametrize("size", [64, 96, 20000])
def test_a_double_free_and_a_wild_pointer_raise_and_change_nothing(size):
    floor, slab = floor_and_slab()
    keep = [slab.kmalloc(size), slab.kmalloc(size)]
    slab.kfree(keep[1])
    free = floor.pages.nr_free_pages()
    for bad in (keep[1], keep[0] + 8, floor.layout.vmalloc_start, floor.layout.page_offset, 0x1234):
        with pytest.raises(SlabError, match=r"double free|wild pointer"):
            slab.kfree(bad)
    assert floor.pages.nr_free_pages() == free
    slab.validate()


def test_kzalloc_clears_what_the_last_owner_left():
    floor, slab = floor_and_slab()
    keep, la = slab.kmalloc(128), slab.kmalloc(128)
    floor.memory.fill(floor.layout.pa(la), 128, 0xCC)
    slab.kfree(la)
    assert slab.kzalloc(100) == la
    assert floor.memory.read(floor.layout.pa(la), 128) == bytes(128)
    slab.kfree(keep)


def test_krealloc_keeps_contents_and_the_old_object_on_failure():
    floor, slab = floor_and_slab()
    la = slab.kmalloc(100)
    floor.memory.write(floor.layout.pa(la), b"hello")
    assert slab.krealloc(la, 128) == la
    floor.pages.should_fail = lambda gfp, order: True
    assert slab.krealloc(la, 500) is None
    assert slab.ksize(la) == 128
    floor.pages.should_fail = None
    bigger = slab.krealloc(la, 500)
    assert bigger != la
    assert floor.memory.read(floor.layout.pa(bigger), 5) == b"hello"
    with pytest.raises(SlabError):
        slab.kfree(la)
    assert slab.krealloc(bigger, 0) == ZERO_SIZE_PTR
    assert slab.krealloc(0, 8) is not None


def test_a_slab_goes_back_when_its_last_object_is_freed():
    floor, slab = floor_and_slab()
    free = floor.pages.nr_free_pages()
    objects = [slab.kmalloc(2048) for _ in range(40)]
    for la in objects:
        slab.kfree(la)
    assert floor.pages.nr_free_pages() == free


def test_a_node_is_served_from_its_own_slabs():
    floor, slab = floor_and_slab(nodes=2)
    near, far = slab.kmalloc(64, GFP_KERNEL, 0), slab.kmalloc(64, GFP_KERNEL, 1)
    assert [floor.pages.page_to_nid(floor.layout.pa(la) >> 12) for la in (near, far)] == [0, 1]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20000), st.integers(0, 1 << 20)), max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_kmalloc_and_kfree_keeps_the_invariants(steps):
    floor, slab = floor_and_slab(size=64 << 20)
    free = floor.pages.nr_free_pages()
    held = []
    for is_free, size, choice in steps:
        if is_free and held:
            slab.kfree(held.pop(choice % len(held))[0])
        else:
            la = slab.kmalloc(size)
            held.append((la, slab.ksize(la)))
        slab.validate()
    held.sort()
    assert all(a + size <= b for (a, size), (b, _) in pairwise(held)), "objects do not overlap"
    for la, _ in held:
        slab.kfree(la)
    assert floor.pages.nr_free_pages() == free
    floor.pages.validate()
