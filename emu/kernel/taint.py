"""The kernel's taint flags and how they are printed (v6.12 kernel/panic.c: taint_flags, print_tainted_seq)."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class Taint(IntFlag):
    """One bit per TAINT_* number of include/linux/panic.h; the value is 1 << number."""

    PROPRIETARY_MODULE = 1 << 0
    FORCED_MODULE = 1 << 1
    CPU_OUT_OF_SPEC = 1 << 2
    FORCED_RMMOD = 1 << 3
    MACHINE_CHECK = 1 << 4
    BAD_PAGE = 1 << 5
    USER = 1 << 6
    DIE = 1 << 7
    OVERRIDDEN_ACPI_TABLE = 1 << 8
    WARN = 1 << 9
    CRAP = 1 << 10
    FIRMWARE_WORKAROUND = 1 << 11
    OOT_MODULE = 1 << 12
    UNSIGNED_MODULE = 1 << 13
    SOFTLOCKUP = 1 << 14
    LIVEPATCH = 1 << 15
    AUX = 1 << 16
    RANDSTRUCT = 1 << 17
    TEST = 1 << 18


class TaintFlag(NamedTuple):
    """How one flag is printed: when set, when clear, and whether a module's own flags show it."""

    flag: Taint
    c_true: str
    c_false: str
    module: bool


TAINT_FLAGS: tuple[TaintFlag, ...] = (
    TaintFlag(Taint.PROPRIETARY_MODULE, "P", "G", True),
    TaintFlag(Taint.FORCED_MODULE, "F", " ", True),
    TaintFlag(Taint.CPU_OUT_OF_SPEC, "S", " ", False),
    TaintFlag(Taint.FORCED_RMMOD, "R", " ", False),
    TaintFlag(Taint.MACHINE_CHECK, "M", " ", False),
    TaintFlag(Taint.BAD_PAGE, "B", " ", False),
    TaintFlag(Taint.USER, "U", " ", False),
    TaintFlag(Taint.DIE, "D", " ", False),
    TaintFlag(Taint.OVERRIDDEN_ACPI_TABLE, "A", " ", False),
    TaintFlag(Taint.WARN, "W", " ", False),
    TaintFlag(Taint.CRAP, "C", " ", True),
    TaintFlag(Taint.FIRMWARE_WORKAROUND, "I", " ", False),
    TaintFlag(Taint.OOT_MODULE, "O", " ", True),
    TaintFlag(Taint.UNSIGNED_MODULE, "E", " ", True),
    TaintFlag(Taint.SOFTLOCKUP, "L", " ", False),
    TaintFlag(Taint.LIVEPATCH, "K", " ", True),
    TaintFlag(Taint.AUX, "X", " ", True),
    TaintFlag(Taint.RANDSTRUCT, "T", " ", True),
    TaintFlag(Taint.TEST, "N", " ", True),
)


def print_tainted(tainted: Taint, flags: int = len(TAINT_FLAGS)) -> str:
    """The word after Comm: in a CPU line, one character per flag. `flags`: how many flags the version has."""
    if not tainted:
        return "Not tainted"
    return "Tainted: " + "".join(row.c_true if tainted & row.flag else row.c_false for row in TAINT_FLAGS[:flags])


def print_tainted_verbose(tainted: Taint) -> str:
    """The line that v6.12 adds below the CPU line: every flag that is set, by letter and name."""
    if not tainted:
        return "Not tainted"
    return "Tainted: " + ", ".join(f"[{row.c_true}]={row.flag.name}" for row in TAINT_FLAGS if tainted & row.flag)


def module_flags(tainted: Taint) -> str:
    """The flags behind a module's name in "Modules linked in:", with parentheses; empty when it has none."""
    letters = "".join(row.c_true for row in TAINT_FLAGS if row.module and tainted & row.flag)
    return f"({letters})" if letters else ""
