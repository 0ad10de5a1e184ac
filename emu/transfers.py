"""Instructions that change the privilege level: SYSCALL, SYSRET, IRET, RETF, INT n, each by its page in SDM vol. 2.

Unicorn would execute them unseen; here every change of privilege is known, its checks are the SDM's, and its exceptions leave the
machine as it was.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from emu.descriptors import CodeType, DataType
from emu.exceptions import CpuException, Source, Vector, deliver, segment_descriptor
from emu.mmu.registers import Efer
from emu.msr import read_msr
from emu.operands import MemoryAccess
from emu.privileged_step import Step, check_canonical
from emu.rflags import IMPLEMENTED, Rflags

if TYPE_CHECKING:
    from emu.cpu import Cpu

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def syscall(step: Step) -> None:
    """SYSCALL (vol. 2B)."""
    cpu = step.cpu
    if not cpu.mmu.efer & Efer.SCE:
        raise CpuException(Vector.UD)
    star, mask = read_msr(cpu, 0xC000_0081), read_msr(cpu, 0xC000_0084)
    rflags = cpu.reg("rflags")
    cpu.set_reg("rcx", step.next_rip)
    cpu.set_reg("r11", rflags & ~Rflags.RF)
    cpu.set_reg("rflags", rflags & ~mask & ~Rflags.RF | Rflags.FIXED)
    selector = star >> 32 & 0xFFFC
    cpu.enter_privilege(0, selector, new_stack=False)
    cpu.set_reg("ss", selector + 8)
    cpu.rip = read_msr(cpu, 0xC000_0082)


def sysret(step: Step) -> None:
    """SYSRET to 64-bit mode (vol. 2B)."""
    cpu = step.cpu
    if not cpu.mmu.efer & Efer.SCE:
        raise CpuException(Vector.UD)
    step.need_privilege()
    target = cpu.reg("rcx")
    if not step.instruction.wide:
        raise CpuException(Vector.UD)
    check_canonical(cpu, target)
    star = read_msr(cpu, 0xC000_0081)
    cpu.set_reg("rflags", cpu.reg("r11") & 0x3C_7FD7 | Rflags.FIXED)
    selector = star >> 48 & 0xFFFF
    cpu.enter_privilege(3, selector + 16 & 0xFFFF | 3, new_stack=False)
    cpu.set_reg("ss", selector + 8 & 0xFFFF | 3)
    cpu.rip = target


def _return_segment(cpu: Cpu, selector: int) -> int:
    """Check a code segment to return to (SDM vol. 2A, IRET and RET): the new privilege level."""
    if not selector & ~3:
        raise CpuException(Vector.GP, 0)
    segment = segment_descriptor(cpu, selector)
    error = CpuException(Vector.GP, selector & 0xFFFC)
    rpl = selector & 3
    if not segment.is_code or rpl < cpu.mmu.cpl or not segment.l or segment.db:
        raise error
    if (segment.dpl > rpl) if segment.type & CodeType.CONFORMING else (segment.dpl != rpl):
        raise error
    if not segment.p:
        raise CpuException(Vector.NP, selector & 0xFFFC)
    return rpl


def _check_return_stack(cpu: Cpu, selector: int, cpl: int) -> None:
    """Check the SS of a return to `cpl`; null is allowed in 64-bit mode below level 3."""
    if not selector & ~3:
        if cpl == 3 or selector & 3 != cpl:
            raise CpuException(Vector.GP, 0)
        return
    segment = segment_descriptor(cpu, selector)
    if selector & 3 != cpl or segment.is_code or not segment.s or not segment.type & DataType.WRITABLE or segment.dpl != cpl:
        raise CpuException(Vector.GP, selector & 0xFFFC)
    if not segment.p:
        raise CpuException(Vector.SS, selector & 0xFFFC)


def _pop(step: Step, count: int) -> tuple[int, ...]:
    rsp = step.cpu.reg("rsp")
    return struct.unpack(f"<{count}Q", step.read(MemoryAccess(rsp, 8 * count, True, False, stack=True)))


def iret(step: Step) -> None:
    """IRETQ (vol. 2A)."""
    cpu = step.cpu
    if not step.instruction.wide:
        raise CpuException(Vector.UD)  # IRET and IRETD return to 16- and 32-bit code, which this machine does not run
    if cpu.reg("rflags") & Rflags.NT:
        raise CpuException(Vector.GP, 0)
    rip, cs, rflags, rsp, ss = _pop(step, 5)
    cs, ss = cs & 0xFFFF, ss & 0xFFFF
    cpl = _return_segment(cpu, cs)
    _check_return_stack(cpu, ss, cpl)
    check_canonical(cpu, rip)
    changeable = IMPLEMENTED
    old = cpu.reg("rflags")
    if cpu.mmu.cpl:
        changeable &= ~Rflags.IOPL
        if cpu.mmu.cpl > (old & Rflags.IOPL) >> 12:
            changeable &= ~Rflags.IF
    _enter_return(cpu, cpl, cs, ss, rsp)
    cpu.set_reg("rflags", old & ~changeable | rflags & changeable | Rflags.FIXED)
    cpu.nmi_blocked = False
    cpu.rip = rip


def _enter_return(cpu: Cpu, cpl: int, cs: int, ss: int, rsp: int) -> None:
    cpu.enter_privilege(cpl, cs, new_stack=False)
    cpu.set_reg("ss", ss)
    cpu.set_reg("rsp", rsp)


def retf(step: Step) -> None:
    """Far return with REX.W (vol. 2B)."""
    cpu = step.cpu
    if not step.instruction.wide:
        raise CpuException(Vector.UD)
    opcode_at = step.instruction.opcode_at
    drop = int.from_bytes(step.code[opcode_at + 1 : opcode_at + 3], "little") if step.code[opcode_at] == 0xCA else 0
    rip, cs = _pop(step, 2)
    cs &= 0xFFFF
    cpl = _return_segment(cpu, cs)
    rsp = cpu.reg("rsp") + 16 + drop
    ss = cpu.reg("ss")
    if cpl != cpu.mmu.cpl:
        rsp, ss = struct.unpack("<QQ", step.read(MemoryAccess(rsp & _MASK64, 16, True, False, stack=True)))
        ss &= 0xFFFF
        _check_return_stack(cpu, ss, cpl)
        rsp += drop
    check_canonical(cpu, rip)
    _enter_return(cpu, cpl, cs, ss, rsp & _MASK64)
    cpu.rip = rip


def int_n(step: Step) -> None:
    """INT n (vol. 2A): a software interrupt; its gate must be open to the current privilege level."""
    cpu = step.cpu
    cpu.rip = step.next_rip
    deliver(cpu, CpuException(step.code[-1]), Source.SOFTWARE, step.rip)
