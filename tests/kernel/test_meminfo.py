"""The vmalloc lines of /proc/meminfo."""

from __future__ import annotations

import pytest
from after_run import ran

from emu.kernel.meminfo import meminfo_figures, meminfo_lines


def test_the_lines_are_aligned_as_the_kernel_prints_them() -> None:
    _, machine = ran("xor eax, eax")
    lines = meminfo_lines(machine.kernel)
    assert lines[0] == "VmallocTotal:   34359738367 kB"
    assert lines[1].startswith("VmallocUsed:    ") and lines[1].endswith(" kB") and len(lines[1]) == 27
    assert lines[2] == "VmallocChunk:          0 kB"
    assert lines[3].startswith("Percpu:         ")


def test_the_total_is_that_of_the_paging_mode() -> None:
    _, machine = ran("xor eax, eax", levels=5)
    assert meminfo_figures(machine.kernel)["VmallocTotal"] == (12800 << 30) - 1


@pytest.mark.parametrize(("call", "pages"), [("mov edi, 5 * 4096\ncall vmalloc", 5), ("mov edi, 600 * 4096\ncall vmalloc", 602)])
def test_used_counts_the_pages_of_allocations_and_of_their_page_arrays(call: str, pages: int) -> None:
    _, before = ran("xor eax, eax")
    _, after = ran(call)
    used = [meminfo_figures(machine.kernel)["VmallocUsed"] for machine in (before, after)]
    assert used[1] - used[0] == 4 * pages


def test_per_cpu_memory_is_whole_pages_of_every_unit() -> None:
    _, machine = ran("xor eax, eax")
    percpu = meminfo_figures(machine.kernel)["Percpu"]
    assert percpu > 0 and percpu % 4 == 0
