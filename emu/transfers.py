"""Instructions that may change the privilege level: SYSCALL, SYSRET, IRET, far RET, JMP and CALL, INT n, by SDM vol. 2.

Unicorn would execute them unseen; here every change of privilege is known, its checks are the SDM's, and its exceptions leave the
machine as it was.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from emu.descriptors import CodeType, DataType
from emu.exceptions import CpuException, Source, Vector, deliver, segment_descriptor
from emu.memory import PAGE_SIZE
from emu.mmu.entry import PAGE_MASK
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.registers import Efer
from emu.msr import IA32_FMASK, IA32_LSTAR, IA32_STAR, read_msr
from emu.operands import MemoryAccess
from emu.privileged_step import Step, check_canonical
from emu.rflags import IMPLEMENTED, Rflags

if TYPE_CHECKING:
    from emu.cpu import Cpu

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_READ = int(Access.READ)
# Measured on real CPUs (emu/operands.py): IRET reads RFLAGS, CS, RIP first, and RETF CS before RIP.
_IRET_ORDER, _RETF_ORDER = (2, 1, 0, 3, 4), (1, 0)
# Plain numbers for IRET, which every exception ends with: an operation on a member of an enum costs ten times as much.
_CONFORMING, _WRITABLE = int(CodeType.CONFORMING), int(DataType.WRITABLE)
_WORD = {2: "H", 4: "I", 8: "Q"}
_CONFORMING, _WRITABLE = int(CodeType.CONFORMING), int(DataType.WRITABLE)
_AC, _NT, _IF, _IOPL, _FIXED = int(Rflags.AC), int(Rflags.NT), int(Rflags.IF), int(Rflags.IOPL), int(Rflags.FIXED)
# RF holds for one instruction, and only against instruction breakpoints, which never match here.
_IRET_FLAGS = IMPLEMENTED & ~int(Rflags.RF)
_ONLY_LEVEL_0 = int(Rflags.IOPL | Rflags.VIF | Rflags.VIP)
# SDM vol. 2B, SYSRET: RFLAGS := (R11 & 3C7FD7H) | 2.
_SYSRET_FLAGS = 0x3C_7FD7


def syscall(step: Step) -> None:
    """SYSCALL (vol. 2B)."""
    cpu = step.cpu
    if not cpu.mmu.efer & Efer.SCE:
        raise CpuException(Vector.UD)
    star, mask = read_msr(cpu, IA32_STAR), read_msr(cpu, IA32_FMASK)
    rflags = cpu.reg("rflags")
    cpu.set_reg("rcx", step.next_rip)
    cpu.set_reg("r11", rflags & ~int(Rflags.RF))
    cpu.set_reg("rflags", rflags & ~mask & ~int(Rflags.RF) | _FIXED)
    selector = star >> 32 & 0xFFFC
    cpu.enter_privilege(0, selector, new_stack=False)
    cpu.set_reg("ss", selector + 8)
    cpu.rip = read_msr(cpu, IA32_LSTAR)


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
    star = read_msr(cpu, IA32_STAR)
    cpu.set_reg("rflags", cpu.reg("r11") & _SYSRET_FLAGS | _FIXED)
    selector = star >> 48 & 0xFFFF
    cpu.enter_privilege(3, selector + 16 & 0xFFFF | 3, new_stack=False)
    cpu.set_reg("ss", selector + 8 & 0xFFFF | 3)
    cpu.rip = target


def _return_segment(cpu: Cpu, selector: int) -> int:
    """Check a code segment to return to (SDM vol. 2A, IRET and RET): the new privilege level."""
    if not selector & ~3:
        raise CpuException(Vector.GP, 0)
    segment = segment_descriptor(cpu, selector)
    rpl = selector & 3
    wrong_dpl = segment.dpl > rpl if segment.type & _CONFORMING else segment.dpl != rpl
    if not segment.is_code or rpl < cpu.mmu.cpl or wrong_dpl or not segment.l or segment.db:
        raise CpuException(Vector.GP, selector & 0xFFFC)
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
    if selector & 3 != cpl or segment.is_code or not segment.s or not segment.type & _WRITABLE or segment.dpl != cpl:
        raise CpuException(Vector.GP, selector & 0xFFFC)
    if not segment.p:
        raise CpuException(Vector.SS, selector & 0xFFFC)


def _width(step: Step) -> int:
    """Operand size in bytes: far transfers have 4 by default even in 64-bit mode."""
    return 8 if step.instruction.wide else 2 if 0x66 in step.instruction.prefixes else 4


def _pop(step: Step, order: tuple[int, ...], la: int, rflags: int) -> tuple[int, ...]:
    """As many words as `order` has at `la` of the stack, read in that order: it decides which word a fault reports."""
    cpu, width = step.cpu, _width(step)
    size = width * len(order)
    first = la + width * order[0] & _MASK64
    if la & PAGE_MASK <= PAGE_SIZE - size:
        try:
            pa = cpu.mmu.translate(first, _READ, user=cpu.mmu.cpl == 3, ac=bool(rflags & _AC))
        except NonCanonical:
            raise CpuException(Vector.SS, 0) from None
        data = cpu.memory.read(pa - (first - la), size)
    else:
        pieces = {n: step.read(MemoryAccess(la + width * n & _MASK64, width, True, False, stack=True)) for n in order}
        data = b"".join(pieces[n] for n in range(len(order)))
    return struct.unpack(f"<{len(order)}{_WORD[width]}", data)


def iret(step: Step) -> None:
    """IRET in 64-bit mode: it always pops RSP and SS too (vol. 2A). A fault on the way unblocks NMIs too (vol. 3A 6.7.1)."""
    cpu = step.cpu
    cpu.nmi_blocked = False
    _, old, stack, _ = cpu.pushed.read()
    if old & _NT:
        raise CpuException(Vector.GP, 0)
    rip, cs, rflags, rsp, ss = _pop(step, _IRET_ORDER, stack, old)
    cs, ss = cs & 0xFFFF, ss & 0xFFFF
    cpl = _return_segment(cpu, cs)
    _check_return_stack(cpu, ss, cpl)
    check_canonical(cpu, rip)
    changeable = _IRET_FLAGS & ((1 << 8 * _width(step)) - 1)
    if cpu.mmu.cpl:
        changeable &= ~_ONLY_LEVEL_0
        if cpu.mmu.cpl > (old & _IOPL) >> 12:
            changeable &= ~_IF
    _enter_return(cpu, cpl, cs, ss, rsp, old & ~changeable | rflags & changeable | _FIXED)
    cpu.rip = rip


def _enter_return(cpu: Cpu, cpl: int, cs: int, ss: int, rsp: int, rflags: int) -> None:
    if cpl > cpu.mmu.cpl:
        for name in ("ds", "es", "fs", "gs"):
            selector = cpu.reg(name)
            if selector & ~3 and not _may_keep(cpu, selector, cpl):
                _null_segment(cpu, name)
        cpu.engine.set_cpl(cpl)
    cpu.pushed.write(cs, rflags, rsp, ss)


def _null_segment(cpu: Cpu, name: str) -> None:
    """Take a data segment register away; unlike a MOV of a null selector this leaves FS.base and GS.base as they are."""
    bases = {base: cpu.reg(base) for base in ("fs_base", "gs_base")}
    cpu.set_reg(name, 0)
    for base, value in bases.items():
        cpu.set_reg(base, value)


def _may_keep(cpu: Cpu, selector: int, cpl: int) -> bool:
    """Whether a data segment register survives a return to an outer level: not one that the new level could not load.

    A CPU looks at what it cached of the descriptor; this one reads it again, and a descriptor that is gone is not kept.
    """
    try:
        segment = segment_descriptor(cpu, selector)
    except (CpuException, PageFault):
        return False
    return segment.dpl >= cpl or (segment.is_code and bool(segment.type & _CONFORMING))


def retf(step: Step) -> None:
    """Far return (vol. 2B)."""
    cpu = step.cpu
    opcode_at = step.instruction.opcode_at
    drop = int.from_bytes(step.code[opcode_at + 1 : opcode_at + 3], "little") if step.code[opcode_at] == 0xCA else 0
    _, rflags, stack, ss = cpu.pushed.read()
    rip, cs = _pop(step, _RETF_ORDER, stack, rflags)
    cs &= 0xFFFF
    cpl = _return_segment(cpu, cs)
    popped = 2 * _width(step) + drop
    rsp = stack + popped
    if cpl != cpu.mmu.cpl:
        rsp, ss = _pop(step, (0, 1), rsp & _MASK64, rflags)
        ss &= 0xFFFF
        _check_return_stack(cpu, ss, cpl)
        rsp += drop
    check_canonical(cpu, rip)
    _enter_return(cpu, cpl, cs, ss, rsp & _MASK64, rflags)
    cpu.rip = rip


def _far_target(step: Step) -> tuple[int, int]:
    """Offset and code selector of a far JMP or CALL, checked (vol. 2A, JMP and CALL).

    Call gates are not implemented: no 64-bit kernel has one. They are refused as a segment that is none, like code segments that
    are not 64-bit code.
    """
    cpu = step.cpu
    width = _width(step)
    pointer = step.read(step.operand(width + 2, write=False))
    offset, selector = int.from_bytes(pointer[:width], "little"), int.from_bytes(pointer[width:], "little")
    if not selector & ~3:
        raise CpuException(Vector.GP, 0)
    segment = segment_descriptor(cpu, selector)
    cpl = cpu.mmu.cpl
    if segment.type & _CONFORMING:
        reachable = segment.dpl <= cpl
    else:
        reachable = segment.dpl == cpl and selector & 3 <= cpl
    if not segment.is_code or not reachable or not segment.l or segment.db:
        raise CpuException(Vector.GP, selector & 0xFFFC)
    if not segment.p:
        raise CpuException(Vector.NP, selector & 0xFFFC)
    check_canonical(cpu, offset)
    return offset, selector & ~3 | cpl


def jmp_far(step: Step) -> None:
    """JMP m16:64 to a code segment (vol. 2A)."""
    offset, selector = _far_target(step)
    step.cpu.set_reg("cs", selector)
    step.cpu.rip = offset


def call_far(step: Step) -> None:
    """CALL m16:64 to a code segment (vol. 2A)."""
    cpu = step.cpu
    offset, selector = _far_target(step)
    width = _width(step)
    rsp = cpu.reg("rsp") - 2 * width & _MASK64
    mask = (1 << 8 * width) - 1
    frame = struct.pack(f"<2{_WORD[width]}", step.next_rip & mask, cpu.reg("cs"))
    step.write(MemoryAccess(rsp, 2 * width, False, True, stack=True), frame)
    cpu.set_reg("rsp", rsp)
    cpu.set_reg("cs", selector)
    cpu.rip = offset


def int_n(step: Step) -> None:
    """INT n (vol. 2A): a software interrupt; its gate must be open to the current privilege level."""
    cpu = step.cpu
    cpu.rip = step.next_rip
    deliver(cpu, CpuException(step.code[-1]), Source.SOFTWARE, step.rip)
