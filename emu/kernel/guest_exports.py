"""Exporting functions of the model to modules: C's argument types, and bad pointers as the kernel answers them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from emu.kernel.exports import KernelFunction
from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE, SIZEOF_STRUCT_PAGE
from emu.kernel.page_alloc import Pfns
from emu.kernel.slab import SlabError

MASK64 = (1 << 64) - 1
INT_MAX = 0x7FFF_FFFF
_PAGE_SHIFT_OF_STRUCT = SIZEOF_STRUCT_PAGE.bit_length() - 1
_WORDS_AT_ONCE = 512
# struct page: flags, compound_head, ..., _refcount (v6.12 include/linux/mm_types.h).
_REFCOUNT_OFFSET = 0x34


def c_int(value: int) -> int:
    """A C int argument: the low 32 bits, signed."""
    return (value & 0xFFFF_FFFF) - ((value & 0x8000_0000) << 1)


def c_unsigned(value: int) -> int:
    """A C unsigned int argument."""
    return value & 0xFFFF_FFFF


def c_long(value: int) -> int:
    """A C long argument."""
    return (value & MASK64) - ((value & 1 << 63) << 1)


class GuestExports:
    """What every family of exported functions needs of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def export(
        self, name: str, function: KernelFunction, arguments: int, *, gpl: bool = False, varargs: bool = False, noprof: bool = False
    ) -> None:
        """Export `function` as `name`; with `noprof` the kernel's symbol is NAME_noprof where the version has such names.

        `name` itself is a macro there; assembly may call it all the same. Functions that free through the slab allocator end
        in its BUG or WARN when the pointer is bad.
        """
        symbols = self.kernel.symbols

        symbol = self.kernel.profile.symbol(name) if noprof else name
        address = symbols.register(symbol, self.guarded(function), arguments, varargs=varargs, gpl=gpl)
        if symbol != name:
            symbols.add_alias(name, symbol)
            symbols.exports[address] = dataclasses.replace(symbols.exports[address], name=name)

    def guarded(self, function: KernelFunction) -> KernelFunction:
        """`function`, ending as bad_object says where it frees what is no object."""

        return functools.partial(self._call, function)

    def _call(self, function: KernelFunction, *arguments: object) -> int | None:
        try:
            return function(*arguments)
        except SlabError as error:
            self.bad_object(error)
            return 0

    def bad_object(self, error: SlabError) -> None:
        """kfree() and its kin were given a pointer that kmalloc did not return.

        Twice the same object: the BUG of CONFIG_SLAB_FREELIST_HARDENED. An address without a struct page: a page fault where it
        would be. Any other page: WARN_ON_ONCE, and a bad page that stays as it is (v6.12 mm/slub.c: free_large_kmalloc).
        """
        kernel = self.kernel
        if error.kind == "double free":
            kernel.bug(error.kind)
        page = self.virt_to_page(error.la)
        kernel.cpu.read(page + 8 & MASK64, 8)
        kernel.vmalloc.warn_once("free_large_kmalloc")
        kernel.printk(f"object pointer: 0x{error.la:016x}")
        kernel.printk(f"BUG: Bad page state in process {kernel.current_thread(kernel.cpu).comm}  pfn:{self.page_to_pfn(page):05x}")

    # ---- struct page

    def page_to_pfn(self, page: int) -> int:
        """page_to_pfn() as C computes it: any pointer gives a number, which need not be a frame's."""
        return c_long(page - self.kernel.layout.vmemmap_start) >> _PAGE_SHIFT_OF_STRUCT

    def pfn_to_page(self, pfn: int) -> int:
        """pfn_to_page(): any number gives a pointer."""
        return self.kernel.layout.vmemmap_start + (pfn << _PAGE_SHIFT_OF_STRUCT) & MASK64

    def virt_to_page(self, la: int) -> int:
        """virt_to_page(): right for the direct map and the kernel image only."""
        layout = self.kernel.layout
        if layout.is_kernel_image(la):
            return layout.page_to_la(layout.pa(la) >> PAGE_SHIFT)
        return self.pfn_to_page((la - layout.page_offset & MASK64) >> PAGE_SHIFT)

    def frame_of(self, page: int) -> int | None:
        """The frame whose struct page stands at `page`; None for a pointer into other memory that is mapped.

        Raises PageFault or NonCanonical when nothing is mapped there, as the access to page->_refcount does.
        """
        kernel = self.kernel
        offset = page - kernel.layout.vmemmap_start
        if not offset % SIZEOF_STRUCT_PAGE and 0 <= offset >> _PAGE_SHIFT_OF_STRUCT < kernel.pages.max_pfn:
            return offset >> _PAGE_SHIFT_OF_STRUCT
        kernel.cpu.read(page + _REFCOUNT_OFFSET & MASK64, 4)
        return None

    def page_array(self, la: int, count: int) -> Pfns:
        """The frames that an array of `count` struct page pointers names, up to the piece with the first bad one.

        NULL is -1, another wild pointer the number that C's arithmetic makes of it. Raises PageFault or NonCanonical where the
        array is not mapped.
        """
        kernel = self.kernel
        parts: list[Pfns] = []
        done = 0
        while done < count:
            at = la + 8 * done & MASK64
            # A piece ends with its page, so that a fault is not met before its turn.
            take = min(count - done, max(1, (PAGE_SIZE - at % PAGE_SIZE) // 8), _WORDS_AT_ONCE)
            words = np.frombuffer(kernel.cpu.read(at, 8 * take), dtype=np.uint64)
            pfns = (words - np.uint64(kernel.layout.vmemmap_start)).view(np.int64) >> _PAGE_SHIFT_OF_STRUCT
            pfns[words == 0] = -1
            parts.append(pfns)
            done += take
            if pfns.min() < 0 or pfns.max() >= kernel.pages.max_pfn:
                break
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
