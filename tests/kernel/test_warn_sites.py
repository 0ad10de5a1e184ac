"""Where WARNs and BUGs of the model stand in the recorded kernels."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from kernel_floor import ORACLE

from emu.kernel.warn_sites import Site, find_bug_site, find_site, site_symbols

EMU = Path(__file__).resolve().parents[2] / "emu" / "kernel"


def test_a_site_is_file_line_and_symbol_of_its_version() -> None:
    assert find_site("6.12", "vfree") == Site("vfree", "mm/vmalloc.c", 3426)
    assert find_site("6.1", "__vunmap") == Site("__vunmap", "mm/vmalloc.c", 2758)
    assert find_site("6.12", "__vmalloc_node_range").symbol == "__vmalloc_node_range_noprof"
    assert find_site("6.1", "__vmalloc_node_range").symbol == "__vmalloc_node_range"


def test_a_site_that_is_not_known_keeps_the_functions_name_and_has_no_line() -> None:
    assert find_site("5.4", "vmap:no_guard") == Site("vmap")
    assert find_site("6.12", "no_such_function:what") == Site("no_such_function")
    assert find_bug_site("5.4", "vunmap") == Site("vunmap")


@pytest.mark.parametrize(("condition", "line"), [
    ("!addr", 3002), ("addr < VMALLOC_START", 3003), ("addr > VMALLOC_END", 3004), ("!PAGE_ALIGNED(addr)", 3005),
])
def test_each_condition_of_vm_unmap_ram_has_its_own_line(condition: str, line: int) -> None:
    assert find_bug_site("6.12", "vm_unmap_ram", condition).line == line


def test_a_function_may_warn_and_bug_at_different_lines() -> None:
    assert find_site("6.12", "vunmap").line == 3473
    assert find_bug_site("6.12", "vunmap").line == 3466


def test_every_warning_that_the_model_gives_has_a_place_in_some_version() -> None:
    keys = set()
    for path in EMU.glob("*.py"):
        keys |= set(re.findall(r'(?:report\.warn|warn_once|kernel\.warn)\(\s*"([\w:]+)"', path.read_text()))
    unknown = {key for key in keys if not any(find_site(version, key).line for version in ("6.12", "6.1"))}
    # Before v5.13 only, whose lines are not known.
    assert unknown <= {"pcpu_alloc", "smp_call_function_many:irqs_disabled"}


def test_symbols_are_the_functions_that_the_sites_stand_in() -> None:
    assert {"vfree", "remove_vm_area", "vb_alloc", "__ioremap_caller"} <= set(site_symbols("6.12"))
    assert "remove_vm_area" not in site_symbols("6.1") and site_symbols("5.4") == ()


@pytest.mark.parametrize("version", ["6.12", "6.1"])
def test_recorded_warnings_stand_where_the_table_says(version: str) -> None:
    places: dict[str, set[int]] = {}
    for path in sorted((ORACLE / "messages").glob(f"*-{version}-4l.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode("latin-1")
        for file_line, function in re.findall(r"WARNING: CPU: \d+ PID: \d+ at (mm/vmalloc\.c:\d+) (\w+)\+", text):
            places.setdefault(function, set()).add(int(file_line.rpartition(":")[2]))
    if not places:
        pytest.skip(f"no recorded messages of {version} under {ORACLE}")
    ours = {find_site(version, key) for key in (
        "__vmalloc_node_range", "remove_vm_area", "vfree", "vunmap", "__vunmap", "__vunmap:bad", "vmap:no_guard",
        "vmap:reset_perms",
        "vmap_small_pages_range_noflush", "vmap_small_pages_range_noflush:busy", "vb_alloc", "vm_unmap_ram", "vrealloc",
        "vrealloc:size",
        "vmap_small_pages_range_noflush:pfn", "vmap_pfn_apply",
    )}
    known = {(site.symbol, site.line) for site in ours}
    assert {(function, line) for function, lines in places.items() for line in lines} <= known
