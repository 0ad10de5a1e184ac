"""Where the model's WARNs and BUGs stand in each kernel: file and line as a splat prints them, and the function's symbol.

Lines are facts of Debian's builds (6.12.117-1~deb12u1, 6.1.192-2), read off their sources and recorded logs. A site that is not
listed is printed without a place, which is what the kernel itself does for a WARN without verbose debug information.
"""

from __future__ import annotations

from dataclasses import dataclass

_VMALLOC = "mm/vmalloc.c"
_IOREMAP = "arch/x86/mm/ioremap.c"
_SET_MEMORY = "arch/x86/mm/pat/set_memory.c"
_IOMEM = "kernel/iomem.c"
_UTIL = "mm/util.c"
_MEMORY = "mm/memory.c"
_STRING = "lib/string_helpers.c"
_VERSIONS = ("6.12", "6.1")


@dataclass(frozen=True, slots=True)
class Site:
    """A WARN or BUG: the symbol it is in, and file:line (line 0: not known)."""

    symbol: str
    file: str = ""
    line: int = 0


# One kernel's (symbol, line), None where it has no such site.
_Place = tuple[str, int] | None


def _both(symbol: str, line_6_12: int, line_6_1: int) -> tuple[_Place, _Place]:
    return (symbol, line_6_12), (symbol, line_6_1)


def _new(symbol: str, line: int) -> tuple[_Place, _Place]:
    return (symbol, line), None


def _old(symbol: str, line: int) -> tuple[_Place, _Place]:
    return None, (symbol, line)


# key: C function, ":what" behind it where one has several; then the place in 6.12 and in 6.1.
_WARNS: dict[str, dict[str, tuple[_Place, _Place]]] = {
    _VMALLOC: {
        "__vmalloc_node_range": (("__vmalloc_node_range_noprof", 3838), ("__vmalloc_node_range", 3227)),
        "remove_vm_area": _new("remove_vm_area", 3291),
        "vfree": _new("vfree", 3426),
        "vunmap": _new("vunmap", 3473),
        "__vunmap:bad": _old("__vunmap", 2752),
        "__vunmap": _old("__vunmap", 2758),
        "vrealloc": _new("vrealloc_noprof", 4148),
        "vrealloc:size": _new("vrealloc_noprof", 4154),
        "vmap:reset_perms": _new("vmap", 3505),
        "vmap:no_guard": _both("vmap", 3512, 2913),
        "vmap_pfn_apply": _both("vmap_pfn_apply", 3551, 2950),
        "vmap_small_pages_range_noflush:busy": _both("vmap_small_pages_range_noflush", 552, 541),
        "vmap_small_pages_range_noflush": _both("vmap_small_pages_range_noflush", 556, 545),
        "vmap_small_pages_range_noflush:pfn": _both("vmap_small_pages_range_noflush", 560, 549),
        "check_sparse_vm_area:0x100": _new("vm_area_map_pages", 726),
        "check_sparse_vm_area:0x40": _new("vm_area_map_pages", 728),
        "check_sparse_vm_area:0x1000": _new("vm_area_map_pages", 730),
        "ioremap_page_range": _new("ioremap_page_range", 384),
        "ioremap_page_range:range": _new("ioremap_page_range", 389),
        "vb_alloc": _both("vb_alloc", 2827, 2129),
        "vm_unmap_ram": _new("vm_unmap_ram", 3016),
        "find_va_links": _both("find_va_links", 1195, 968),
        "__unlink_va": _both("__unlink_va", 1283, 1056),
        "va_alloc": (("va_alloc", 1804), ("__alloc_vmap_area", 1598)),
        "node_pool_del_va": _new("node_pool_del_va", 1950),
        "encode_vn_id": _new("encode_vn_id", 992),
        "decode_vn_id": _new("decode_vn_id", 1011),
        "free_vmap_area_noflush": _new("free_vmap_area_noflush", 2419),
        "pcpu_get_vm_areas": _both("pcpu_get_vm_areas", 4746, 3898),
        "pcpu_get_vm_areas:clip": _both("pcpu_get_vm_areas", 4833, 3986),
    },
    _IOREMAP: {
        "__ioremap_caller": _both("__ioremap_caller", 207, 201),
        "__ioremap_caller:ram": _both("__ioremap_caller", 217, 211),
        "iounmap": _new("iounmap", 461),
    },
    _SET_MEMORY: {
        "change_page_attr_set_clr": _both("change_page_attr_set_clr", 1889, 1814),
        "__cpa_process_fault": _both("__cpa_process_fault", 1635, 1585),
    },
    "arch/x86/mm/pat/memtype.c": {
        "memtype_reserve": _both("memtype_reserve", 536, 601),
        "reserve_ram_pages_type": _both("memtype_reserve", 450, 515),
    },
    "kernel/notifier.c": {"notifier_chain_register": _both("notifier_chain_register", 31, 28)},
    "kernel/smp.c": {
        "smp_call_function_single:irqs_disabled": _both("smp_call_function_single", 652, 760),
        "smp_call_function_single": _both("smp_call_function_single", 661, 769),
        "smp_call_function_many_cond": _both("smp_call_function_many_cond", 815, 923),
    },
    "kernel/time/timer.c": {
        "add_timer": _both("add_timer", 1294, 1242),
        "add_timer_on": _both("add_timer_on", 1353, 1264),
    },
    "arch/x86/mm/tlb.c": {
        "leave_mm": _both("leave_mm", 316, 312),
        "switch_mm_irqs_off": _both("switch_mm_irqs_off", 572, 563),
        "clear_asid_other": _both("clear_asid_other", 197, 194),
    },
    _IOMEM: {
        "memremap:mixed": _both("memremap", 78, 81),
        "memremap:ram": _both("memremap", 104, 107),
    },
    _STRING: {"__fortify_report": _new("__fortify_report", 1032)},
    _UTIL: {"kvmalloc_node": (("__kvmalloc_node_noprof", 670), ("kvmalloc_node", 596))},
    "mm/page_alloc.c": {"__alloc_pages": (("__alloc_pages_noprof", 4832), ("__alloc_pages", 5634))},
    "lib/vsprintf.c": {"vsnprintf": _both("vsnprintf", 2741, 2743)},
    "mm/slub.c": {"free_large_kmalloc": _new("free_large_kmalloc", 4799)},
    "mm/slab_common.c": {"free_large_kmalloc": _old("free_large_kmalloc", 904)},
}
_BUGS: dict[str, dict[str, tuple[_Place, _Place]]] = {
    _VMALLOC: {
        "vunmap": _both("vunmap", 3466, 2878),
        "vfree": _old("vfree", 2854),
        "vfree_atomic": _both("vfree_atomic", 3377, 2818),
        "__get_vm_area_node": _both("__get_vm_area_node", 3177, 2554),
        "free_vm_area": _both("free_vm_area", 4613, 3765),
        "vm_area_add_early": _both("vm_area_add_early", 3113, 2389),
        "vb_free": _both("vb_free", 2909, 2200),
        "vm_unmap_ram:!addr": _both("vm_unmap_ram", 3002, 2281),
        "vm_unmap_ram:addr < VMALLOC_START": _both("vm_unmap_ram", 3003, 2282),
        "vm_unmap_ram:addr > VMALLOC_END": _both("vm_unmap_ram", 3004, 2283),
        "vm_unmap_ram:!PAGE_ALIGNED(addr)": _both("vm_unmap_ram", 3005, 2284),
        "vm_unmap_ram:area": _old("vm_unmap_ram", 2295),
        "alloc_vmap_area": _old("alloc_vmap_area", 1666),
        "pcpu_get_vm_areas": _both("pcpu_get_vm_areas", 4723, 3875),
        "vmap_range_noflush": _both("vmap_range_noflush", 345, 354),
        "__vunmap_range_noflush": _both("__vunmap_range_noflush", 497, 486),
        "vmap_small_pages_range_noflush": _both("__vmap_pages_range_noflush", 637, 626),
        "vmap_pte_range": _both("vmap_range_noflush", 113, 114),
    },
    _IOREMAP: {"iounmap": _both("iounmap", 501, 495)},
    _SET_MEMORY: {"slow_virt_to_phys": _both("slow_virt_to_phys", 825, 775)},
    _MEMORY: {
        "vm_insert_page:mmap_read_trylock": _both("vm_insert_page", 2224, 2054),
        "vm_insert_page:VM_PFNMAP": _both("vm_insert_page", 2225, 2055),
    },
    _STRING: {"__fortify_panic": _new("__fortify_panic", 1040), "fortify_panic": _old("fortify_panic", 1027)},
    "mm/slub.c": {"double free": _both("kfree", 550, 419)},
}


def _of_version(table: dict[str, dict[str, tuple[_Place, _Place]]], column: int) -> dict[str, Site]:
    return {
        key: Site(place[0], file, place[1])
        for file, sites in table.items()
        for key, places in sites.items()
        if (place := places[column]) is not None
    }


_WARN_SITES = {version: _of_version(_WARNS, column) for column, version in enumerate(_VERSIONS)}
_BUG_SITES = {version: _of_version(_BUGS, column) for column, version in enumerate(_VERSIONS)}


def find_site(version: str, key: str) -> Site:
    """The place of a WARN; `key` is its C function, with ":what" behind it where one function has several."""
    return _WARN_SITES.get(version, {}).get(key) or Site(key.partition(":")[0])


def find_bug_site(version: str, function: str, condition: str = "") -> Site:
    """The place of a BUG in a C function, of the one on `condition` where the function has several."""
    sites = _BUG_SITES.get(version, {})
    return sites.get(f"{function}:{condition}") or sites.get(function) or Site(function.partition(":")[0])


def site_symbols(version: str) -> tuple[str, ...]:
    """The functions that the sites of a version stand in, sorted, but for those that vma.py exports later."""
    sites = (*_WARN_SITES.get(version, {}).values(), *_BUG_SITES.get(version, {}).values())
    return tuple(sorted({site.symbol for site in sites if site.file != _MEMORY}))
