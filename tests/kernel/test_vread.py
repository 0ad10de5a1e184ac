"""vread_iter and remap_vmalloc_range."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from vmap_machine import VMALLOC_START, Kernel, kernel

from emu.kernel.vm_struct import Vm
from emu.kernel.vread import remap_vmalloc_range, remap_vmalloc_range_partial, vread_iter

PAGE = 4096


def read(k: Kernel, la: int, count: int) -> bytes:
    got = vread_iter(k.vmalloc, k.blocks, la, count)
    assert len(got) == count
    return got


def fill(k: Kernel, la: int, pages: int, byte: int) -> None:
    for i in range(pages):
        k.pages.memory.fill(k.mm.to_pa(la + i * PAGE), PAGE, byte)


def test_O09_a_read_across_area_guard_and_next_area_is_data_zeros_data():
    k = kernel()
    first, second = k.vmalloc.vmalloc(2 * PAGE), k.vmalloc.vmalloc(PAGE)
    fill(k, first, 2, 0x11)
    fill(k, second, 1, 0x22)
    assert second == first + 3 * PAGE
    assert read(k, first + 100, 4 * PAGE) == bytes([0x11]) * (2 * PAGE - 100) + bytes(PAGE) + bytes([0x22]) * PAGE + bytes(100)


def test_O09_holes_device_sparse_and_unfinished_areas_read_as_zeros():
    k = kernel()
    sparse = k.vmalloc.get_vm_area(PAGE, Vm.SPARSE)
    frames = k.frames(1)
    k.pages.memory.fill(int(frames[0]) * PAGE, PAGE, 0x33)
    k.vmalloc.vm_area_map_pages(sparse, sparse.addr, sparse.addr + PAGE, frames)
    la = k.vmalloc.vmalloc(PAGE)
    fill(k, la, 1, 0x44)
    vm = k.vmalloc.find_vm_area(la)
    vm.flags |= Vm.UNINITIALIZED
    assert read(k, VMALLOC_START, 16 * PAGE) == bytes(16 * PAGE)
    vm.flags &= ~Vm.UNINITIALIZED
    assert read(k, la, PAGE) == bytes([0x44]) * PAGE
    assert read(k, 0xFFFFC80000000000, 64) == bytes(64)


def test_O09_only_the_used_pieces_of_a_block_are_read():
    k = kernel()
    pieces = []
    for byte in (0x51, 0x52, 0x53):
        frames = k.frames(1)
        k.pages.memory.fill(int(frames[0]) * PAGE, PAGE, byte)
        pieces.append(k.blocks.vm_map_ram(frames, 1))
    k.blocks.vm_unmap_ram(pieces[1], 1)
    wanted = bytes([0x51]) * PAGE + bytes(PAGE) + bytes([0x53]) * PAGE + bytes(PAGE)
    assert read(k, pieces[0], 4 * PAGE) == wanted
    assert read(k, pieces[0] + 7, 9) == bytes([0x51]) * 9


def test_a_read_at_the_end_of_the_address_space_is_cut_there():
    k = kernel()
    assert vread_iter(k.vmalloc, k.blocks, (1 << 64) - 16, 100) == bytes(16)


@dataclass
class User:
    """A user mapping that remembers what was inserted."""

    vm_start: int
    vm_end: int
    inserted: list[tuple[int, int]] = field(default_factory=list)
    fixed: bool = False

    def vm_insert_page(self, uaddr: int, pfn: int) -> int:
        if len(self.inserted) == 5:
            return -errno.EBUSY
        self.inserted.append((uaddr, pfn))
        return 0

    def set_dontexpand_dontdump(self) -> None:
        self.fixed = True


def test_O08_a_user_area_is_mapped_frame_by_frame():
    k = kernel()
    la = k.vmalloc.vmalloc_user(4 * PAGE)
    user = User(0x10000, 0x13000)
    assert remap_vmalloc_range(k.vmalloc, user, la, 1) == 0
    frames = [k.vmalloc.vmalloc_to_pfn(la + i * PAGE) for i in (1, 2, 3)]
    assert user.inserted == list(zip((0x10000, 0x11000, 0x12000), frames, strict=True))
    assert user.fixed


@pytest.mark.parametrize(
    ("uaddr", "offset", "pgoff", "size"),
    [(0x10001, 0, 0, PAGE), (0x10000, 8, 0, PAGE), (0x10000, 0, 1 << 60, PAGE), (0x10000, 0, 4, PAGE), (0x10000, 0, 0, 5 * PAGE)],
)
def test_O08_bad_ranges_are_einval(uaddr, offset, pgoff, size):
    k = kernel()
    la = k.vmalloc.vmalloc_user(4 * PAGE)
    user = User(0x10000, 0x20000)
    assert remap_vmalloc_range_partial(k.vmalloc, user, uaddr, la + offset, pgoff, size) == -errno.EINVAL
    assert user.inserted == []


def test_O08_plain_vmalloc_memory_and_holes_are_einval_and_an_insertion_error_is_passed_on():
    k = kernel()
    user = User(0x10000, 0x11000)
    assert remap_vmalloc_range(k.vmalloc, user, k.vmalloc.vmalloc(PAGE), 0) == -errno.EINVAL
    assert remap_vmalloc_range(k.vmalloc, user, VMALLOC_START + (1 << 30), 0) == -errno.EINVAL
    user = User(0x10000, 0x18000)
    assert remap_vmalloc_range(k.vmalloc, user, k.vmalloc.vmalloc_user(8 * PAGE), 0) == -errno.EBUSY
    assert not user.fixed
