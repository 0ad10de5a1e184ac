"""Arithmetic on blocks of frames, and sparse arrays with an element for each frame."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from emu.memory import MAP_NORESERVE

MAX_PAGE_ORDER = 10
Pfns = npt.NDArray[np.int64]


def sparse_map(size: int) -> mmap.mmap:
    """Zeroed host memory that costs nothing until touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def aligned_blocks(start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) as the fewest (pfn, order) blocks that are aligned to their size, ascending."""
    blocks = []
    while start < end:
        order = min(MAX_PAGE_ORDER, (end - start).bit_length() - 1)
        if start:
            order = min(order, (start & -start).bit_length() - 1)
        blocks.append((start, order))
        start += 1 << order
    return blocks


def consecutive_runs(pfns: Pfns) -> list[tuple[int, int]]:
    """Maximal stretches of consecutive frame numbers, in the array's order, as (first, last + 1)."""
    if not len(pfns):
        return []
    breaks = np.flatnonzero(np.diff(pfns) != 1)
    firsts = np.concatenate((pfns[:1], pfns[breaks + 1]))
    lasts = np.concatenate((pfns[breaks], pfns[-1:]))
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
