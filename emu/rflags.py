"""RFLAGS (SDM vol. 1 3.4.3)."""

from __future__ import annotations

from enum import IntFlag


class Rflags(IntFlag):
    """The bits that the machine itself reads or writes."""

    CF = 1 << 0
    FIXED = 1 << 1
    ZF = 1 << 6
    TF = 1 << 8
    IF = 1 << 9
    IOPL = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


# What IRET may change at privilege level 0: all but reserved bits and VM (SDM vol. 2A, IRET).
IMPLEMENTED = 0x003D_7FD5
