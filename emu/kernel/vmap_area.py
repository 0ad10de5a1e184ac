"""Ranges of kernel virtual addresses and the trees that hold them (v6.12 mm/vmalloc.c, "Global kva allocator").

A vmap_area is a range [va_start, va_end). It is in one container at a time: the free tree, a busy tree, a lazy tree, a
size pool, or nowhere while it changes hands. A tree here is Linux's pair of a red-black tree and a list in address order;
the free tree is augmented with the largest range in each subtree, which makes the search for the lowest fit logarithmic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from emu.kernel.rbtree import RB_EMPTY, RbNode, RbRoot, rb_erase, rb_insert_color, rb_link_node, rb_nodes
from emu.kernel.rbtree import validate as validate_rbtree

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ULONG_MAX = (1 << 64) - 1

# va->flags (v6.12 mm/vmalloc.c); bits 8 and up hold the number of the vmap_node plus one, 0 for none.
VMAP_RAM = 0x1
VMAP_BLOCK = 0x2
VMAP_FLAGS_MASK = 0x3


class Report(Protocol):
    """What the kernel has to say: the receiver turns a warning into Linux's whole splat, and ends the machine on a BUG."""

    def warn(self, function: str, text: str = "") -> None:
        """WARN: `function` is the C function that warns, `text` its message without the newline, empty for WARN_ON."""

    def bug(self, function: str, text: str = "") -> None:
        """BUG or BUG_ON in C function `function`. The caller returns at once if this returns."""

    def printk(self, text: str) -> None:
        """A line of the kernel log."""


class VmapArea(RbNode):
    """A range of addresses (Linux: struct vmap_area). `vm` and `subtree_max_size` share a word there."""

    __slots__ = ("flags", "list_next", "list_prev", "subtree_max_size", "va_end", "va_start", "vm")

    rb_parent: VmapArea | None
    rb_left: VmapArea | None
    rb_right: VmapArea | None
    list_prev: VmapArea | None
    list_next: VmapArea | None

    def __init__(self, va_start: int = 0, va_end: int = 0) -> None:
        self.rb_parent = self.rb_left = self.rb_right = None
        self.rb_color = RB_EMPTY
        self.va_start = va_start
        self.va_end = va_end
        self.subtree_max_size = 0
        self.flags = 0
        self.vm: object | None = None
        self.list_prev = self.list_next = None

    def __repr__(self) -> str:
        return f"VmapArea({self.va_start:#x}-{self.va_end:#x})"


class VmapAreaCache:
    """The slab of vmap_area descriptors (Linux: vmap_area_cachep).

    `live` counts descriptors out of the cache. `refuse`, when set, is asked before each allocation with its gfp flags;
    if it answers true the allocation fails as it would without memory.
    """

    __slots__ = ("live", "refuse")

    def __init__(self) -> None:
        self.live = 0
        self.refuse: Callable[[int], bool] | None = None

    def alloc(self, gfp: int) -> VmapArea | None:
        """A fresh descriptor, or None."""
        if self.refuse is not None and self.refuse(gfp):
            return None
        self.live += 1
        return VmapArea()

    def free(self, va: VmapArea) -> None:
        """Take back a descriptor that is in no container."""
        assert va.rb_color == RB_EMPTY, f"{va} is freed while in a tree"
        self.live -= 1


class VmapAreaTree(RbRoot):
    """Disjoint vmap_areas by address: a red-black tree and a list (Linux: struct rb_list)."""

    __slots__ = ("cache", "head", "report")

    rb_node: VmapArea | None

    def __init__(self, cache: VmapAreaCache, report: Report) -> None:
        self.rb_node = None
        self.cache = cache
        self.report = report
        self.head = VmapArea()
        self.head.list_prev = self.head.list_next = self.head

    def __iter__(self) -> Iterator[VmapArea]:
        """The areas in ascending order. Do not change the tree meanwhile."""
        head = self.head
        va = head.list_next
        while va is not head:
            assert va is not None
            yield va
            va = va.list_next

    def first(self) -> VmapArea | None:
        """The lowest area, or None."""
        va = self.head.list_next
        return None if va is self.head else va

    def last(self) -> VmapArea | None:
        """The highest area, or None."""
        va = self.head.list_prev
        return None if va is self.head else va

    def find(self, addr: int) -> VmapArea | None:
        """The area that contains `addr`, or None (Linux: __find_vmap_area)."""
        node = self.rb_node
        while node is not None:
            if addr < node.va_start:
                node = node.rb_left
            elif addr >= node.va_end:
                node = node.rb_right
            else:
                return node
        return None

    def find_exceed_addr(self, addr: int) -> VmapArea | None:
        """The lowest area that ends above `addr`, or None (Linux: __find_vmap_area_exceed_addr)."""
        found = None
        node = self.rb_node
        while node is not None:
            if node.va_end > addr:
                found = node
                if node.va_start <= addr:
                    break
                node = node.rb_left
            else:
                node = node.rb_right
        return found

    def find_links(self, va: VmapArea, node: VmapArea | None) -> tuple[VmapArea | None, bool] | None:
        """Where `va` belongs below `node`: (parent, is it the left side). Overlap: a warning and None."""
        start = va.va_start
        end = va.va_end
        parent = None
        left = False
        while node is not None:
            parent = node
            if end <= node.va_start:
                left = True
                node = node.rb_left
            elif start >= node.va_end:
                left = False
                node = node.rb_right
            else:
                self.report.warn(
                    "find_va_links",
                    f"vmalloc bug: {start:#x}-{end:#x} overlaps with {node.va_start:#x}-{node.va_end:#x}",
                )
                return None
        return parent, left

    def _list_add(self, va: VmapArea, parent: VmapArea | None, left: bool) -> None:
        if parent is None:
            before: VmapArea | None = self.head
        else:
            before = parent.list_prev if left else parent
        assert before is not None
        after = before.list_next
        assert after is not None
        va.list_prev = before
        va.list_next = after
        before.list_next = va
        after.list_prev = va

    def _list_del(self, va: VmapArea) -> None:
        before = va.list_prev
        after = va.list_next
        assert before is not None and after is not None
        before.list_next = after
        after.list_prev = before
        va.list_prev = va.list_next = None

    def link(self, va: VmapArea, parent: VmapArea | None, left: bool) -> None:
        """Insert `va` at the place that find_links gave (Linux: link_va)."""
        self._list_add(va, parent, left)
        rb_link_node(va, parent, left, self)
        rb_insert_color(va, self)

    def unlink(self, va: VmapArea) -> None:
        """Take `va` out (Linux: unlink_va). A va that is in no tree: WARN and nothing else."""
        if va.rb_color == RB_EMPTY:
            self.report.warn("__unlink_va")
            return
        rb_erase(va, self)
        self._list_del(va)

    def insert(self, va: VmapArea) -> None:
        """Insert `va` without merging (Linux: insert_vmap_area). Overlap: a warning, and `va` stays outside."""
        place = self.find_links(va, self.rb_node)
        if place is not None:
            self.link(va, *place)

    def merge_or_add(self, va: VmapArea) -> VmapArea | None:
        """Insert `va`, joined with neighbours that it touches; returns the area that covers it, None on overlap.

        Descriptors that became part of another go back to the cache. Source: v6.12 __merge_or_add_vmap_area.
        """
        place = self.find_links(va, self.rb_node)
        if place is None:
            return None
        parent, left = place
        if parent is None:
            self.link(va, parent, left)
            return va
        head = self.head
        following = parent if left else parent.list_next
        assert following is not None
        preceding = following.list_prev
        assert preceding is not None
        merged = False
        if following is not head and following.va_start == va.va_end:
            following.va_start = va.va_start
            self.cache.free(va)
            va = following
            merged = True
        if preceding is not head and preceding.va_end == va.va_start:
            # The upper one goes before the lower one grows: its rotations would otherwise carry a value too old.
            if merged:
                self.unlink(va)
            preceding.va_end = va.va_end
            self.cache.free(va)
            va = preceding
            merged = True
        if not merged:
            self.link(va, parent, left)
        return va

    def detach(self) -> list[VmapArea]:
        """Empty the tree; returns its areas in ascending order, in no container (Linux: list_replace_init)."""
        areas = list(self)
        for va in areas:
            va.rb_parent = va.rb_left = va.rb_right = None
            va.rb_color = RB_EMPTY
            va.list_prev = va.list_next = None
        self.rb_node = None
        self.head.list_prev = self.head.list_next = self.head
        return areas

    def validate(self) -> None:
        """The tree is red-black; list order is tree order; areas are not empty, ascend and do not overlap."""
        count = validate_rbtree(self)
        listed = list(self)
        assert listed == list(rb_nodes(self)), "the list and the tree differ"
        assert len(listed) == count
        previous = self.head
        end = 0
        for va in listed:
            assert va.list_prev is previous, f"{va}: the list is not linked both ways"
            assert va.va_start < va.va_end, f"{va} is empty"
            assert va.va_start >= end, f"{va} starts below {end:#x}"
            end = va.va_end
            previous = va
        assert self.head.list_prev is previous, "the list's last element is not the head's predecessor"


class _SubtreeMax:
    """Keeps subtree_max_size (Linux: free_vmap_area_rb_augment_cb, from RB_DECLARE_CALLBACKS_MAX)."""

    __slots__ = ()

    def copy(self, old: VmapArea, new: VmapArea) -> None:
        new.subtree_max_size = old.subtree_max_size

    def propagate(self, node: VmapArea | None, stop: VmapArea | None) -> None:
        while node is not stop:
            assert node is not None
            largest = node.va_end - node.va_start
            child = node.rb_left
            if child is not None and child.subtree_max_size > largest:
                largest = child.subtree_max_size
            child = node.rb_right
            if child is not None and child.subtree_max_size > largest:
                largest = child.subtree_max_size
            if node.subtree_max_size == largest:
                return
            node.subtree_max_size = largest
            node = node.rb_parent

    def rotate(self, old: VmapArea, new: VmapArea) -> None:
        new.subtree_max_size = old.subtree_max_size
        largest = old.va_end - old.va_start
        child = old.rb_left
        if child is not None and child.subtree_max_size > largest:
            largest = child.subtree_max_size
        child = old.rb_right
        if child is not None and child.subtree_max_size > largest:
            largest = child.subtree_max_size
        old.subtree_max_size = largest


_SUBTREE_MAX = _SubtreeMax()


def is_within_this_va(va: VmapArea, size: int, align: int, vstart: int) -> bool:
    """Does a piece of `size` bytes at `align`, not below `vstart`, fit into `va`? Arithmetic is that of 64 bits."""
    start = va.va_start if va.va_start > vstart else vstart
    start = (start + align - 1) & -align & ULONG_MAX
    end = start + size
    return vstart <= start and end <= ULONG_MAX and end <= va.va_end


class FreeVmapAreas(VmapAreaTree):
    """The free address space (Linux: free_vmap_area_root and free_vmap_area_list), augmented with subtree_max_size.

    `spare` is the descriptor that a split of the middle of a range takes (Linux: ne_fit_preload_node, per CPU there).
    """

    __slots__ = ("spare",)

    def __init__(self, cache: VmapAreaCache, report: Report) -> None:
        super().__init__(cache, report)
        self.spare: dict[int, VmapArea] = {}

    def link(self, va: VmapArea, parent: VmapArea | None, left: bool) -> None:
        """Insert `va`; its subtree_max_size is 0 until the caller propagates (Linux: link_va_augment)."""
        self._list_add(va, parent, left)
        rb_link_node(va, parent, left, self)
        rb_insert_color(va, self, _SUBTREE_MAX)  # type: ignore[arg-type]
        va.subtree_max_size = 0

    def unlink(self, va: VmapArea) -> None:
        """Take `va` out (Linux: unlink_va_augment)."""
        if va.rb_color == RB_EMPTY:
            self.report.warn("__unlink_va")
            return
        rb_erase(va, self, _SUBTREE_MAX)  # type: ignore[arg-type]
        self._list_del(va)

    def insert(self, va: VmapArea, below: VmapArea | None = None) -> None:
        """Insert `va` without merging, searching from `below` (Linux: insert_vmap_area_augment)."""
        place = self.find_links(va, self.rb_node if below is None else below)
        if place is not None:
            self.link(va, *place)
            _SUBTREE_MAX.propagate(va, None)

    def merge_or_add(self, va: VmapArea) -> VmapArea | None:
        """As VmapAreaTree.merge_or_add, with the maxima brought up to date (Linux: merge_or_add_vmap_area_augment)."""
        covering = super().merge_or_add(va)
        if covering is not None:
            _SUBTREE_MAX.propagate(covering, None)
        return covering

    def find_lowest_match(self, size: int, align: int, vstart: int, adjust_search_size: bool) -> VmapArea | None:
        """The free area to serve a request from, or None (Linux: find_vmap_lowest_match).

        With adjust_search_size the descent looks for size + align - 1 bytes, yet takes any node on its way that fits as
        it is; so the answer depends on the shape of the tree.
        """
        length = (size + align - 1) & ULONG_MAX if adjust_search_size else size
        last = align - 1
        mask = ULONG_MAX ^ last
        node = self.rb_node
        while node is not None:
            va_start = node.va_start
            if vstart < va_start:
                left = node.rb_left
                if left is not None and left.subtree_max_size >= length:
                    node = left
                    continue
                start = (va_start + last) & mask
            else:
                start = (vstart + last) & mask
            end = start + size
            if end <= node.va_end and vstart <= start:
                return node
            right = node.rb_right
            if right is not None and right.subtree_max_size >= length:
                node = right
                continue
            node = node.rb_parent
            while node is not None:
                if is_within_this_va(node, size, align, vstart):
                    return node
                right = node.rb_right
                if right is not None and right.subtree_max_size >= length and vstart <= node.va_start:
                    # One past the parent's start keeps the search out of the left side, which has been seen.
                    vstart = node.va_start + 1
                    node = right
                    break
                node = node.rb_parent
        return None

    def clip(self, va: VmapArea, nva_start_addr: int, size: int, cpu: int = 0) -> bool:
        """Cut [nva_start_addr, +size) out of the free area `va`: all of it, its left or right edge, or its middle.

        The middle needs a descriptor for the lower rest. False if the range is not inside or no descriptor was to be had.
        Source: v6.12 classify_va_fit_type, va_clip (v6.1 adjust_va_to_fit_type).
        """
        end = nva_start_addr + size
        if nva_start_addr < va.va_start or end > va.va_end:
            return False
        if va.va_start == nva_start_addr:
            if va.va_end == end:
                self.unlink(va)
                self.cache.free(va)
                return True
            va.va_start = end
            _SUBTREE_MAX.propagate(va, None)
            return True
        if va.va_end == end:
            va.va_end = nva_start_addr
            _SUBTREE_MAX.propagate(va, None)
            return True
        lower = self.spare.pop(cpu, None)
        if lower is None:
            lower = self.cache.alloc(0)
            if lower is None:
                return False
        lower.va_start = va.va_start
        lower.va_end = nva_start_addr
        va.va_start = end
        _SUBTREE_MAX.propagate(va, None)
        self.insert(lower, va)
        return True

    def preload(self, cpu: int, gfp: int) -> None:
        """Give `cpu` a spare descriptor if it has none (Linux: preload_this_cpu_lock). clip meets a failure."""
        if cpu not in self.spare:
            va = self.cache.alloc(gfp)
            if va is not None:
                self.spare[cpu] = va

    def alloc(self, size: int, align: int, vstart: int, vend: int, cpu: int = 0) -> int:
        """Cut the lowest fit in [vstart, vend) out; returns its address, or `vend` if there is none.

        Source: v6.12 __alloc_vmap_area, va_alloc. A split that gets no descriptor: WARN_ON_ONCE and `vend`.
        """
        adjust = align > PAGE_SIZE and vend - vstart != size
        va = self.find_lowest_match(size, align, vstart, adjust)
        if va is None:
            return vend
        start = va.va_start if va.va_start > vstart else vstart
        start = (start + align - 1) & -align
        if start + size > vend:
            return vend
        if not self.clip(va, start, size, cpu):
            self.report.warn("va_alloc")
            return vend
        return start

    def validate(self) -> None:
        """As VmapAreaTree, and: no two areas touch; subtree_max_size is the largest size in each subtree."""
        super().validate()
        end = 0
        for va in self:
            assert va.va_start != end, f"{va} touches its lower neighbour"
            end = va.va_end
            largest = va.va_end - va.va_start
            for child in (va.rb_left, va.rb_right):
                if child is not None:
                    largest = max(largest, child.subtree_max_size)
            assert va.subtree_max_size == largest, f"{va}: subtree_max_size {va.subtree_max_size} is not {largest}"
