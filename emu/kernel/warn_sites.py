"""Where the model's WARNs and BUGs stand in each kernel: file and line as a splat prints them, and the function's symbol.

Lines are facts of Debian's builds (6.12.117-1~deb12u1, 6.1.192-2), read off their sources and recorded logs. A site that is not
listed is printed without a place, which is what the kernel itself does for a WARN without verbose debug information.
"""

from __future__ import annotations

from dataclasses import dataclass

_VMALLOC = "mm/vmalloc.c"


@dataclass(frozen=True, slots=True)
class Site:
    """A WARN or BUG: the symbol it is in, and file:line (line 0: not known)."""

    symbol: str
    file: str = ""
    line: int = 0


_SITES: dict[str, dict[str, Site]] = {
    "6.12": {
        "__vmalloc_node_range": Site("__vmalloc_node_range_noprof", _VMALLOC, 3838),
        "remove_vm_area": Site("remove_vm_area", _VMALLOC, 3291),
        "vfree": Site("vfree", _VMALLOC, 3426),
        "__vunmap": Site("vfree", _VMALLOC, 3426),
        "vunmap": Site("vunmap", _VMALLOC, 3473),
        "vmap_small_pages_range_noflush": Site("vmap_small_pages_range_noflush", _VMALLOC, 556),
        "__get_vm_area_node": Site("__get_vm_area_node", _VMALLOC, 3177),
    },
    "6.1": {
        "__vmalloc_node_range": Site("__vmalloc_node_range", _VMALLOC, 3227),
        "__vunmap:bad": Site("__vunmap", _VMALLOC, 2752),
        "__vunmap": Site("__vunmap", _VMALLOC, 2758),
        "vmap_small_pages_range_noflush": Site("vmap_small_pages_range_noflush", _VMALLOC, 545),
        "__get_vm_area_node": Site("__get_vm_area_node", _VMALLOC, 2554),
    },
    "5.4": {},
}


def find_site(version: str, key: str) -> Site:
    """The place of a site; `key` is its C function, with ":what" behind it where one function has several."""
    return _SITES[version].get(key) or Site(key.partition(":")[0])


def site_symbols(version: str) -> tuple[str, ...]:
    """The functions that the sites of a version stand in, sorted."""
    return tuple(sorted({site.symbol for site in _SITES[version].values()}))
