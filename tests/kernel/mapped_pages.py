"""What page tables really map: every present leaf of a tree, and its tables, read without the code under test."""

from __future__ import annotations

import numpy as np

from emu.memory import Memory

PRESENT, PSE = 1, 0x80
FRAME = 0x0000_00FF_FFFF_F000
CANONICAL = {4: 0xFFFF_0000_0000_0000, 5: 0xFE00_0000_0000_0000}


def walk_tables(memory: Memory, pgd: int, levels: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of tables, and per present 4 KiB page of the kernel half its address and frame, both uint64, ascending."""
    tables = 0
    pages: list[np.ndarray] = []
    frames: list[np.ndarray] = []

    def visit(table: int, level: int, base: int) -> None:
        nonlocal tables
        tables += 1
        entries = memory.table(table)
        present = np.flatnonzero(entries & np.uint64(PRESENT))
        if level == levels:
            present = present[present >= 256]
        if level == 1:
            pages.append(np.uint64(base) + (present.astype(np.uint64) << np.uint64(12)))
            frames.append((entries[present] & np.uint64(FRAME)) >> np.uint64(12))
            return
        size = 1 << (9 * level + 3)
        for i in present.tolist():
            entry = int(entries[i])
            la = base + i * size
            if entry & PSE:
                count = size >> 12
                pages.append(np.arange(la, la + size, 4096, dtype=np.uint64))
                first = (entry & FRAME & -size) >> 12
                frames.append(np.arange(first, first + count, dtype=np.uint64))
            else:
                visit(entry & FRAME, level - 1, la)

    visit(pgd, levels, CANONICAL[levels])
    return tables, np.concatenate(pages), np.concatenate(frames)
