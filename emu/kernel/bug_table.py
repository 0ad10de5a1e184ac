"""__bug_table: which UD2 instructions of a module are BUG() or WARN() (v6.12 arch/x86/include/asm/bug.h, lib/bug.c)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntFlag

from emu.kernel.traps import BugEntry

# Distance to the instruction, distance to the file name, line, flags; each distance is from its own field.
_ROW = struct.Struct("<iiHH")


class BugFlag(IntFlag):
    """BUGFLAG_* (v6.12 include/asm-generic/bug.h)."""

    WARNING = 1 << 0
    ONCE = 1 << 1
    DONE = 1 << 2
    NO_CUT_HERE = 1 << 3


def parse_bug_table(la: int, data: bytes, read_string: Callable[[int], str | None]) -> dict[int, BugEntry]:
    """The rows of the table at `la` by the address of their instruction. A file name that cannot be read is left out."""
    table: dict[int, BugEntry] = {}
    for offset in range(0, len(data) - _ROW.size + 1, _ROW.size):
        to_instruction, to_file, line, flags = _ROW.unpack_from(data, offset)
        file = read_string(la + offset + 4 + to_file)
        table[la + offset + to_instruction] = BugEntry(
            file or "", line if file else 0, warning=bool(flags & BugFlag.WARNING), once=bool(flags & BugFlag.ONCE),
            cut_here=not flags & BugFlag.NO_CUT_HERE,
        )
    return table
