"""kmalloc and its kin: objects in the direct map, in power-of-two size classes (and 96, 192) cut from pages.

Sizes, slab orders and the rule what goes to whole pages are v6.12's (mm/slab_common.c, mm/slub.c calculate_order with the
default of one CPU's worth of objects). A freed object is the next one handed out, as SLUB's free list has it. Not
modelled: per-CPU slabs and in-object free pointers, so a use after free reads what was last written.

Unlike the kernel, which may not notice, a bad pointer always raises SlabError and changes nothing; whoever models the
caller turns it into the kernel's words.
"""

from __future__ import annotations

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE, Layout
from emu.kernel.page_alloc import MAX_PAGE_ORDER, NUMA_NO_NODE, PageAllocator

ZERO_SIZE_PTR = 16
KMALLOC_SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
KMALLOC_MAX_CACHE_SIZE = 8192
KMALLOC_MAX_SIZE = PAGE_SIZE << MAX_PAGE_ORDER
_SLAB_ORDERS = {8: 0, 16: 0, 32: 0, 64: 0, 96: 0, 128: 0, 192: 0, 256: 0, 512: 1, 1024: 2, 2048: 3, 4096: 3, 8192: 3}
_ZERO = int(Gfp.ZERO)
_COMP = int(Gfp.COMP)


class SlabError(ValueError):
    """A pointer that kmalloc did not return, or one freed twice. `kind` is "double free" or "wild pointer"."""

    def __init__(self, kind: str, la: int) -> None:
        super().__init__(f"{kind}: {la:#x}")
        self.kind = kind
        self.la = la


class _Slab:
    """One block of pages cut into objects; `free` holds the indices of free objects, next one last."""

    __slots__ = ("allocated", "cache", "free", "order", "pfn")

    def __init__(self, cache: KmemCache, pfn: int, order: int, count: int) -> None:
        self.cache = cache
        self.pfn = pfn
        self.order = order
        self.free = list(range(count - 1, -1, -1))
        self.allocated: set[int] = set()


class KmemCache:
    """A cache of equal objects (kmalloc-SIZE). `partial` maps nodes to slabs with free objects, the next one to use last."""

    def __init__(self, size: int) -> None:
        self.name = f"kmalloc-{size // 1024}k" if size >= 1024 else f"kmalloc-{size}"
        self.object_size = size
        self.order = _SLAB_ORDERS[size]
        self.objects = (PAGE_SIZE << self.order) // size
        self.partial: dict[int, dict[int, _Slab]] = {}


def kmalloc_index(size: int) -> int:
    """Index in KMALLOC_SIZES of the class that serves `size`. Raises ValueError above the largest class."""
    for i, class_size in enumerate(KMALLOC_SIZES):
        if size <= class_size:
            return i
    raise ValueError(f"size {size} is above the largest kmalloc class")


class Slab:
    """All kmalloc caches of a machine. Addresses are in the direct map; None is a failed allocation."""

    def __init__(self, pages: PageAllocator, layout: Layout) -> None:
        self.pages = pages
        self.layout = layout
        self.caches = tuple(KmemCache(size) for size in KMALLOC_SIZES)
        self._slabs: dict[int, _Slab] = {}
        self._large: dict[int, int] = {}

    def kmalloc(self, size: int, gfp: int = GFP_KERNEL, node: int = NUMA_NO_NODE) -> int | None:
        """Address of at least `size` bytes: ZERO_SIZE_PTR for 0, None without memory or above KMALLOC_MAX_SIZE.

        Objects of a power-of-two size are aligned to it. __GFP_ZERO clears the object. Above 8 KiB: whole pages.
        """
        gfp = int(gfp)
        if size == 0:
            return ZERO_SIZE_PTR
        if size < 0 or size > KMALLOC_MAX_SIZE:
            return None
        if size > KMALLOC_MAX_CACHE_SIZE:
            order = (size - 1 >> PAGE_SHIFT).bit_length()
            pfn = self.pages.alloc_pages(gfp | _COMP, order, node)
            if pfn is None:
                return None
            self._large[pfn] = order
            return self.layout.va(pfn << PAGE_SHIFT)
        cache = self.caches[kmalloc_index(size)]
        slab = self._slab_for(cache, gfp, node)
        if slab is None:
            return None
        i = slab.free.pop()
        slab.allocated.add(i)
        if not slab.free:
            del cache.partial[self.pages.page_to_nid(slab.pfn)][slab.pfn]
        pa = (slab.pfn << PAGE_SHIFT) + i * cache.object_size
        if gfp & _ZERO or self.pages.init_on_alloc:
            self.pages.memory.fill(pa, cache.object_size)
        return self.layout.va(pa)

    def kzalloc(self, size: int, gfp: int = GFP_KERNEL, node: int = NUMA_NO_NODE) -> int | None:
        """kmalloc with __GFP_ZERO."""
        return self.kmalloc(size, int(gfp) | _ZERO, node)

    def _slab_for(self, cache: KmemCache, gfp: int, node: int) -> _Slab | None:
        partial = cache.partial.get(self.pages.numa_mem_id() if node == NUMA_NO_NODE else node)
        if not partial and node == NUMA_NO_NODE:
            # Before SLUB makes a slab it looks for free objects on the other nodes (v6.12 mm/slub.c get_any_partial).
            partial = next((slabs for _, slabs in sorted(cache.partial.items()) if slabs), None)
        if partial:
            return partial[next(reversed(partial))]
        pfn = self.pages.alloc_pages(gfp & ~_ZERO | _COMP, cache.order, node)
        order = cache.order
        if pfn is None and order:
            # SLUB falls back to the smallest order that holds one object (v6.12 mm/slub.c allocate_slab).
            order = max(0, (cache.object_size - 1 >> PAGE_SHIFT).bit_length())
            pfn = self.pages.alloc_pages(gfp & ~_ZERO | _COMP, order, node)
        if pfn is None:
            return None
        slab = _Slab(cache, pfn, order, (PAGE_SIZE << order) // cache.object_size)
        for i in range(1 << order):
            self._slabs[pfn + i] = slab
        cache.partial.setdefault(self.pages.page_to_nid(pfn), {})[pfn] = slab
        return slab

    def _find(self, la: int) -> tuple[_Slab, int] | tuple[None, int]:
        """The slab and object index of a live object, or (None, order) of live whole pages. Raises SlabError."""
        pa = la - self.layout.page_offset
        pfn = pa >> PAGE_SHIFT
        if pfn in self._large and pa % PAGE_SIZE == 0:
            return None, self._large[pfn]
        slab = self._slabs.get(pfn)
        if slab is None:
            raise SlabError("wild pointer", la)
        i, rest = divmod(pa - (slab.pfn << PAGE_SHIFT), slab.cache.object_size)
        if rest or i >= (PAGE_SIZE << slab.order) // slab.cache.object_size:
            raise SlabError("wild pointer", la)
        if i not in slab.allocated:
            raise SlabError("double free", la)
        return slab, i

    def kfree(self, la: int) -> None:
        """Free an object; NULL and ZERO_SIZE_PTR are nothing. Raises SlabError, changing nothing, for any other pointer."""
        if la in (0, ZERO_SIZE_PTR):
            return
        slab, i = self._find(la)
        if slab is None:
            pfn = la - self.layout.page_offset >> PAGE_SHIFT
            del self._large[pfn]
            self.pages.free_pages(pfn, i)
            return
        slab.allocated.remove(i)
        slab.free.append(i)
        if slab.allocated:
            slab.cache.partial.setdefault(self.pages.page_to_nid(slab.pfn), {})[slab.pfn] = slab
            return
        slab.cache.partial.get(self.pages.page_to_nid(slab.pfn), {}).pop(slab.pfn, None)
        for frame in range(1 << slab.order):
            del self._slabs[slab.pfn + frame]
        self.pages.free_pages(slab.pfn, slab.order)

    def ksize(self, la: int) -> int:
        """Bytes usable at `la`: 0 for NULL and ZERO_SIZE_PTR. Raises SlabError for what is not allocated."""
        if la in (0, ZERO_SIZE_PTR):
            return 0
        slab, order = self._find(la)
        return PAGE_SIZE << order if slab is None else slab.cache.object_size

    def krealloc(self, la: int, size: int, gfp: int = GFP_KERNEL) -> int | None:
        """Grow or shrink: the same address while it fits its class, else a copy; 0 bytes frees and is ZERO_SIZE_PTR.

        None, with the old object kept, without memory. With __GFP_ZERO the bytes behind the old object's are clear.
        Raises SlabError for a pointer that is not allocated. Source: v6.12 mm/slab_common.c krealloc.
        """
        if size == 0:
            self.kfree(la)
            return ZERO_SIZE_PTR
        old_size = self.ksize(la)
        if size <= old_size:
            return la
        new = self.kmalloc(size, gfp)
        if new is not None and old_size:
            memory = self.pages.memory
            memory.write(self.layout.pa(new), memory.read(self.layout.pa(la), old_size))
            self.kfree(la)
        return new

    def is_slab(self, la: int) -> bool:
        """Whether `la` lies in memory that kmalloc holds (an object, free or not, or whole pages)."""
        pfn = la - self.layout.page_offset >> PAGE_SHIFT
        return pfn in self._slabs or any(head <= pfn < head + (1 << order) for head, order in self._large.items())

    def validate(self) -> None:
        """States and asserts what must hold between any two calls."""
        for slab in self._slabs.values():
            cache = slab.cache
            count = (PAGE_SIZE << slab.order) // cache.object_size
            assert sorted([*slab.free, *slab.allocated]) == list(range(count)), "each object is free or allocated"
            assert slab.allocated, "a slab without objects has gone back to the page allocator"
            partial = cache.partial.get(self.pages.page_to_nid(slab.pfn), {})
            assert (slab.pfn in partial) == bool(slab.free), "slabs with free objects are on the partial list"
            assert self.pages.page_count(slab.pfn) == 1, "a slab holds its pages"
        for cache in self.caches:
            for slabs in cache.partial.values():
                for pfn, slab in slabs.items():
                    assert self._slabs.get(pfn) is slab, "the partial list holds live slabs only"
        for pfn in self._large:
            assert pfn not in self._slabs, "whole pages are no slab"
            assert self.pages.page_count(pfn) == 1, "large objects hold their pages"
