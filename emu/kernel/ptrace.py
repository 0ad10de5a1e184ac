"""struct pt_regs: the registers of an interrupted context, as exception entry pushes them.

Layout and names: v6.12 arch/x86/include/asm/ptrace.h. The five words at the top are what the CPU pushes itself
(SDM vol. 3A 6.14.2); orig_ax is the error code slot, which the entry code overwrites with -1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

_WORDS = struct.Struct("<21Q")
_NONE = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PtRegs:
    """One register frame; fields stand in memory order, lowest address first."""

    r15: int = 0
    r14: int = 0
    r13: int = 0
    r12: int = 0
    bp: int = 0
    bx: int = 0
    r11: int = 0
    r10: int = 0
    r9: int = 0
    r8: int = 0
    ax: int = 0
    cx: int = 0
    dx: int = 0
    si: int = 0
    di: int = 0
    orig_ax: int = _NONE
    ip: int = 0
    cs: int = 0
    flags: int = 0
    sp: int = 0
    ss: int = 0

    @property
    def user_mode(self) -> bool:
        """Whether the interrupted code ran at CPL 3."""
        return self.cs & 3 == 3


PT_REGS_SIZE = _WORDS.size
PT_REGS_IP = 16 * 8
"""Offset of `ip` in the frame."""

X86_EFLAGS_IF = 1 << 9
X86_EFLAGS_AC = 1 << 18

_GENERAL = ("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di")


def pack_pt_regs(regs: PtRegs) -> bytes:
    """The 168 bytes of the frame in memory."""
    return _WORDS.pack(*(getattr(regs, name) for name in PtRegs.__dataclass_fields__))


def unpack_pt_regs(data: bytes) -> PtRegs:
    """The frame of 168 bytes. Raises ValueError for any other size."""
    if len(data) != PT_REGS_SIZE:
        raise ValueError(f"a pt_regs frame has {PT_REGS_SIZE} bytes, not {len(data)}")
    return PtRegs(*_WORDS.unpack(data))


def read_pt_regs(reg: Callable[[str], int], *, ip: int, cs: int, flags: int, sp: int, ss: int) -> PtRegs:
    """The frame of a CPU whose general registers `reg` reads by SDM name; the five others come from its exception frame."""
    general = {name: reg(name if name[1].isdigit() else "r" + name) for name in _GENERAL}
    return PtRegs(**general, ip=ip, cs=cs, flags=flags, sp=sp, ss=ss)
