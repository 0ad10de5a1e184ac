"""The lines of /proc/meminfo about vmalloc and per-CPU memory (v6.12 fs/proc/meminfo.c)."""

from __future__ import annotations

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SHIFT

_KB = PAGE_SHIFT - 10


def meminfo_figures(kernel: Kernel) -> dict[str, int]:
    """The figures in kB, in the order of /proc/meminfo. VmallocChunk is not counted since v4.4 and always 0."""
    layout = kernel.layout
    return {
        "VmallocTotal": layout.vmalloc_end - layout.vmalloc_start >> 10,
        "VmallocUsed": kernel.vmalloc.nr_vmalloc_pages << _KB,
        "VmallocChunk": 0,
        "Percpu": pcpu_nr_pages(kernel) << _KB,
    }


def pcpu_nr_pages(kernel: Kernel) -> int:
    """Populated pages of all per-CPU chunks, times the number of units (v6.12 mm/percpu.c: pcpu_nr_pages)."""
    percpu = kernel.percpu
    info = percpu.info
    first = info.static_size + info.reserved_size + info.dyn_size >> PAGE_SHIFT
    others = sum(sum(chunk.populated) for chunk in percpu.chunks() if not chunk.immutable)
    return (first + others) * len(percpu.unit_offsets)


def meminfo_lines(kernel: Kernel) -> list[str]:
    """The lines as they are printed."""
    return [f"{name + ':':<16}{value:8d} kB" for name, value in meminfo_figures(kernel).items()]
