"""Delivery of exceptions and interrupts in 64-bit mode, by the book: SDM vol. 3A chapter 6 (6.12 to 6.15).

The IDT, GDT and TSS are read from guest memory through the MMU at every delivery; the frame is pushed through the MMU too, so
that a push onto a guard page faults, becomes #DF, and a #DF that cannot be delivered stops the machine.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING

from emu.descriptors import CodeType, Gate, Segment, SystemType, decode_gate, decode_segment, selector_error_code
from emu.memory import PAGE_SHIFT
from emu.mmu.entry import is_canonical
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.rflags import Rflags

if TYPE_CHECKING:
    from emu.cpu import Cpu


class Vector(IntEnum):
    """Exception vectors (SDM vol. 3A table 6-1)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21


HAS_ERROR_CODE = frozenset((Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC, Vector.CP))
_CONTRIBUTORY = frozenset((Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP))
# Faults push RFLAGS with RF set, so that an instruction breakpoint does not fire again (SDM vol. 3B 17.3.1.1).
_FAULTS = frozenset((
    Vector.DE, Vector.BR, Vector.UD, Vector.NM, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.MF, Vector.AC,
    Vector.XM, Vector.VE, Vector.CP,
))
_EXT = 1
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_TSS_RSP0, _TSS_IST1 = 4, 36
_IF, _RF = int(Rflags.IF), int(Rflags.RF)
_FLAGS_CLEARED = int(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM)


class Source(Enum):
    """Where an event comes from; it decides about DPL checks and the EXT bit (SDM vol. 3A 6.12.1.3, 6.13)."""

    EXCEPTION = auto()
    EXTERNAL = auto()
    SOFTWARE = auto()


class CpuException(Exception):
    """An exception of an instruction or of a delivery: vector, error code (None where it has none), CR2 for #PF."""

    def __init__(self, vector: int, error: int | None = None, cr2: int | None = None) -> None:
        super().__init__(vector, error, cr2)
        self.vector = vector
        self.error = error
        self.cr2 = cr2

    def __str__(self) -> str:
        name = Vector(self.vector).name if self.vector in Vector._value2member_map_ else f"vector {self.vector}"
        error = "" if self.error is None else f", error code {self.error:#x}"
        return f"#{name}{error}" + ("" if self.cr2 is None else f", CR2 {self.cr2:#x}")


class TripleFault(Exception):
    """#DF could not be delivered: the processor shuts down (SDM vol. 3A 6.15, interrupt 8). `chain` is what led there."""

    def __init__(self, chain: tuple[CpuException, ...]) -> None:
        super().__init__(chain)
        self.chain = chain

    def __str__(self) -> str:
        return " while delivering ".join(str(exception) for exception in reversed(self.chain))


@dataclass(frozen=True, slots=True)
class Frame:
    """What a delivery pushed (SDM vol. 3A figure 6-9)."""

    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


def double_fault_follows(first: int, second: int) -> bool:
    """True when `second`, raised while `first` is delivered, makes a #DF (SDM vol. 3A table 6-5)."""
    if first in _CONTRIBUTORY:
        return second in _CONTRIBUTORY
    if first == Vector.PF:
        return second in _CONTRIBUTORY or second == Vector.PF
    return False


def deliver(
    cpu: Cpu, exception: CpuException, source: Source = Source.EXCEPTION, instruction_rip: int | None = None
) -> None:
    """Enter the handler of an exception or interrupt; RIP is the value to push.

    What goes wrong on the way is delivered in turn, with `instruction_rip` to push where the event is a software interrupt, since
    its faults restart the INT instruction. Raises TripleFault.
    """
    chain = [exception]
    while True:
        cpu.on_delivery(chain[-1])
        try:
            _enter(cpu, chain[-1], source)
            return
        except CpuException as error:
            second = error
        except PageFault as error:
            second = CpuException(Vector.PF, error.error, error.la)
        first = chain[-1]
        chain.append(second)
        if instruction_rip is not None:
            cpu.rip = instruction_rip
        if first.vector == Vector.DF and (second.vector in _CONTRIBUTORY or second.vector == Vector.PF):
            raise TripleFault(tuple(chain))
        if double_fault_follows(first.vector, second.vector):
            if second.vector == Vector.PF:
                cpu.cr2 = second.cr2 or 0
            chain.append(CpuException(Vector.DF, 0))
        source = Source.EXCEPTION


def read_system(cpu: Cpu, la: int, size: int, error: CpuException) -> bytes:
    """An implicit supervisor read of a descriptor table or TSS; `error` is raised when `la` is not canonical."""
    try:
        return cpu.mmu.read(la, size, user=False, implicit=True)
    except NonCanonical:
        raise error from None


def segment_descriptor(cpu: Cpu, selector: int, ext: int = 0) -> Segment:
    """The descriptor of a selector in GDT or LDT. Raises CpuException #GP(selector) outside the table."""
    error = CpuException(Vector.GP, selector & 0xFFFC | ext)
    table = cpu.ldtr if selector & 4 else cpu.gdtr
    if (selector & 0xFFF8) + 7 > table.limit:
        raise error
    return decode_segment(int.from_bytes(read_system(cpu, table.base + (selector & 0xFFF8), 8, error), "little"))


def _gate(cpu: Cpu, vector: int, source: Source, ext: int) -> Gate:
    error = CpuException(Vector.GP, selector_error_code(vector, idt=True, ext=bool(ext)))
    if 16 * vector + 15 > cpu.idtr.limit:
        raise error
    gate = decode_gate(read_system(cpu, cpu.idtr.base + 16 * vector, 16, error))
    if gate.type not in (SystemType.INTERRUPT_GATE, SystemType.TRAP_GATE):
        raise error
    if source is Source.SOFTWARE and gate.dpl < cpu.mmu.cpl:
        raise error
    if not gate.p:
        raise CpuException(Vector.NP, selector_error_code(vector, idt=True, ext=bool(ext)))
    return gate


def _target_cpl(cpu: Cpu, gate: Gate, ext: int) -> int:
    """Privilege level of the handler (SDM vol. 3A 6.14.1, 6.12.1)."""
    if not gate.selector & ~3:
        raise CpuException(Vector.GP, ext)
    segment = segment_descriptor(cpu, gate.selector, ext)
    error = CpuException(Vector.GP, gate.selector & 0xFFFC | ext)
    if not segment.is_code or segment.dpl > cpu.mmu.cpl or not segment.l or segment.db:
        raise error
    if not segment.p:
        raise CpuException(Vector.NP, gate.selector & 0xFFFC | ext)
    return cpu.mmu.cpl if segment.type & CodeType.CONFORMING else segment.dpl


def _tss_stack(cpu: Cpu, offset: int, ext: int) -> int:
    error = CpuException(Vector.TS, cpu.tr & 0xFFFC | ext)
    if offset + 7 > cpu.tss.limit:
        raise error
    rsp = int.from_bytes(read_system(cpu, cpu.tss.base + offset, 8, error), "little")
    if not is_canonical(rsp, cpu.mmu.regs.levels):
        raise CpuException(Vector.SS, ext)
    return rsp


def _enter(cpu: Cpu, exception: CpuException, source: Source) -> None:
    vector = exception.vector
    ext = 0 if source is Source.SOFTWARE else _EXT
    if vector == Vector.PF:
        cpu.cr2 = exception.cr2 or 0
    gate = _gate(cpu, vector, source, ext)
    target = _target_cpl(cpu, gate, ext)
    frame = Frame(cpu.rip, cpu.reg("cs") & ~3 | cpu.mmu.cpl, cpu.reg("rflags"), cpu.reg("rsp"), cpu.reg("ss"))
    pushed_flags = frame.rflags | _RF if source is Source.EXCEPTION and vector in _FAULTS else frame.rflags
    if gate.ist:
        rsp = _tss_stack(cpu, _TSS_IST1 + 8 * (gate.ist - 1), ext)
    elif target < cpu.mmu.cpl:
        rsp = _tss_stack(cpu, _TSS_RSP0 + 8 * target, ext)
    else:
        rsp = frame.rsp
    words = [frame.rip, frame.cs, pushed_flags, frame.rsp, frame.ss]
    if exception.error is not None:
        words.insert(0, exception.error)
    rsp = (rsp & ~0xF) - 8 * len(words) & _MASK64
    _push(cpu, rsp, words, ext)
    if not is_canonical(gate.offset, cpu.mmu.regs.levels):
        raise CpuException(Vector.GP, ext)
    cpu.enter_privilege(target, gate.selector & ~3 | target, new_stack=target < cpu.mmu.cpl)
    cpu.set_reg("rsp", rsp)
    cleared = _FLAGS_CLEARED | (_IF if gate.clears_if else 0)
    cpu.set_reg("rflags", frame.rflags & ~cleared)
    cpu.rip = gate.offset
    if vector == Vector.NMI:
        cpu.nmi_blocked = True


def _push(cpu: Cpu, rsp: int, words: list[int], ext: int) -> None:
    """Push downwards: a stack that ends in mid-frame faults at the word a CPU faults at."""
    mmu = cpu.mmu
    ac = cpu.read_ac()
    top = rsp + 8 * (len(words) - 1) & _MASK64
    try:
        if rsp >> PAGE_SHIFT == top >> PAGE_SHIFT:
            mmu.translate(top, Access.WRITE, ac=ac)
            mmu.write(rsp, struct.pack(f"<{len(words)}Q", *words), ac=ac)
            return
        for n in range(len(words) - 1, -1, -1):
            mmu.write(rsp + 8 * n & _MASK64, words[n].to_bytes(8, "little"), ac=ac)
    except NonCanonical:
        raise CpuException(Vector.SS, ext) from None
