"""Delivery of exceptions and interrupts in 64-bit mode, by the book: SDM vol. 3A chapter 6 (6.12 to 6.15).

The IDT, GDT and TSS are read from guest memory through the MMU at every delivery; the frame is pushed through the MMU too, so
that a push onto a guard page faults, becomes #DF, and a #DF that cannot be delivered stops the machine.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum, auto
from functools import lru_cache
from typing import TYPE_CHECKING

from emu.descriptors import CodeType, Gate, Segment, SystemType, decode_gate, decode_segment, selector_error_code
from emu.memory import PAGE_SHIFT, PAGE_SIZE
from emu.mmu.entry import PAGE_MASK, is_canonical
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
# Plain numbers for the path that every exception takes: an operation on a member of an enum costs ten times as much.
_GP, _READ, _WRITE = int(Vector.GP), int(Access.READ), int(Access.WRITE)
_GATES = frozenset((int(SystemType.INTERRUPT_GATE), int(SystemType.TRAP_GATE)))
_CONFORMING = int(CodeType.CONFORMING)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_TSS_RSP0, _TSS_IST1 = 4, 36
_IF, _RF, _AC = int(Rflags.IF), int(Rflags.RF), int(Rflags.AC)
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
    cpu.on_delivery(exception)
    try:
        _enter(cpu, exception, source)
        cpu.on_entry(exception)
        return
    except CpuException as error:
        second = error
    except PageFault as error:
        second = CpuException(Vector.PF, error.error, error.la)
    if instruction_rip is not None:
        cpu.rip = instruction_rip
    chain = [exception]
    # Interrupts, external or by INT n, are benign whatever their vector (SDM vol. 3A table 6-4).
    first = exception.vector if source is Source.EXCEPTION else int(Vector.NMI)
    while True:
        chain.append(second)
        if second.vector == Vector.PF:
            cpu.cr2 = second.cr2 or 0
        if first == Vector.DF and (second.vector in _CONTRIBUTORY or second.vector == Vector.PF):
            raise TripleFault(tuple(chain))
        if double_fault_follows(first, second.vector):
            chain.append(CpuException(Vector.DF, 0))
        first = chain[-1].vector
        cpu.on_delivery(chain[-1])
        try:
            _enter(cpu, chain[-1], Source.EXCEPTION)
            cpu.on_entry(chain[-1])
            return
        except CpuException as error:
            second = error
        except PageFault as error:
            second = CpuException(Vector.PF, error.error, error.la)


# Descriptors are read from memory at every use; only what their bits mean is kept.
_segment = lru_cache(1024)(decode_segment)
_decoded_gate = lru_cache(1024)(decode_gate)


def read_system(cpu: Cpu, la: int, size: int, vector: int, error: int) -> bytes:
    """An implicit supervisor read of a descriptor table or TSS. Raises PageFault, and CpuException(vector, error) off canonical."""
    mmu = cpu.mmu
    try:
        if la & PAGE_MASK <= PAGE_SIZE - size:
            return cpu.memory.read(mmu.translate(la, _READ, implicit=True), size)
        return mmu.read(la, size, user=False, implicit=True)
    except NonCanonical:
        raise CpuException(vector, error) from None


def segment_descriptor(cpu: Cpu, selector: int, ext: int = 0) -> Segment:
    """The descriptor of a selector in GDT or LDT. Raises CpuException #GP(selector) outside the table, PageFault."""
    table = cpu.ldtr if selector & 4 else cpu.gdtr
    error = selector & 0xFFFC | ext
    if (selector & 0xFFF8) + 7 > table.limit:
        raise CpuException(Vector.GP, error)
    la = table.base + (selector & 0xFFF8) & _MASK64
    if la & 7:
        return _segment(int.from_bytes(read_system(cpu, la, 8, _GP, error), "little"))
    try:
        return _segment(cpu.memory.read_u64(cpu.mmu.translate(la, _READ, implicit=True)))
    except NonCanonical:
        raise CpuException(_GP, error) from None


def _gate(cpu: Cpu, vector: int, source: Source, ext: int) -> Gate:
    error = selector_error_code(vector, idt=True, ext=bool(ext))
    if 16 * vector + 15 > cpu.idtr.limit:
        raise CpuException(Vector.GP, error)
    gate = _decoded_gate(read_system(cpu, cpu.idtr.base + 16 * vector & _MASK64, 16, _GP, error))
    if gate.type not in _GATES or (source is Source.SOFTWARE and gate.dpl < cpu.mmu.cpl):
        raise CpuException(Vector.GP, error)
    if not gate.p:
        raise CpuException(Vector.NP, error)
    return gate


def _target_cpl(cpu: Cpu, gate: Gate, ext: int) -> int:
    """Privilege level of the handler (SDM vol. 3A 6.14.1, 6.12.1)."""
    if not gate.selector & ~3:
        raise CpuException(Vector.GP, ext)
    segment = segment_descriptor(cpu, gate.selector, ext)
    if not segment.is_code or segment.dpl > cpu.mmu.cpl or not segment.l or segment.db:
        raise CpuException(Vector.GP, gate.selector & 0xFFFC | ext)
    if not segment.p:
        raise CpuException(Vector.NP, gate.selector & 0xFFFC | ext)
    return cpu.mmu.cpl if segment.type & _CONFORMING else segment.dpl


def _tss_stack(cpu: Cpu, offset: int, ext: int) -> int:
    error = cpu.tr & 0xFFFC | ext
    if offset + 7 > cpu.tss.limit:
        raise CpuException(Vector.TS, error)
    rsp = int.from_bytes(read_system(cpu, cpu.tss.base + offset & _MASK64, 8, Vector.TS, error), "little")
    if not is_canonical(rsp, cpu.mmu.regs.levels):
        raise CpuException(Vector.SS, ext)
    return rsp


def _enter(cpu: Cpu, exception: CpuException, source: Source) -> None:
    vector = exception.vector
    cpl = cpu.mmu.cpl
    ext = 0 if source is Source.SOFTWARE else _EXT
    if exception.cr2 is not None:
        cpu.cr2 = exception.cr2
    gate = _gate(cpu, vector, source, ext)
    target = _target_cpl(cpu, gate, ext)
    cs, rflags, old_rsp, ss = cpu.pushed.read()
    if gate.ist:
        rsp = _tss_stack(cpu, _TSS_IST1 + 8 * (gate.ist - 1), ext)
    elif target < cpl:
        rsp = _tss_stack(cpu, _TSS_RSP0 + 8 * target, ext)
    else:
        rsp = old_rsp
    if not is_canonical(gate.offset, cpu.mmu.regs.levels):
        raise CpuException(Vector.GP, ext)
    pushed_flags = rflags
    if source is Source.EXCEPTION:
        pushed_flags = rflags | _RF if vector in _FAULTS else rflags & ~_RF
    words: tuple[int, ...] = (cpu.rip, cs & ~3 | cpl, pushed_flags, old_rsp, ss)
    if exception.error is not None:
        words = (exception.error, *words)
    rsp = (rsp & ~0xF) - 8 * len(words) & _MASK64
    _push(cpu, rsp, words, target == 3, bool(rflags & _AC), ext)
    # A change to an inner level loads a null SS (SDM vol. 3A 6.14.2).
    if target < cpl:
        cpu.engine.set_cpl(target)
        ss = target
    rflags &= ~(_FLAGS_CLEARED | (_IF if gate.clears_if else 0))
    cpu.pushed.write(gate.selector & ~3 | target, rflags, rsp, ss)
    cpu.rip = gate.offset
    if vector == Vector.NMI and source is Source.EXTERNAL:
        cpu.nmi_blocked = True


def _push(cpu: Cpu, rsp: int, words: tuple[int, ...], user: bool, ac: bool, ext: int) -> None:
    """Push downwards: a stack that ends in mid-frame faults at the word a CPU faults at."""
    mmu = cpu.mmu
    top = rsp + 8 * (len(words) - 1) & _MASK64
    try:
        if rsp >> PAGE_SHIFT == top >> PAGE_SHIFT:
            pa = mmu.translate(top, _WRITE, user=user, ac=ac) - (top - rsp)
            cpu.memory.write(pa, struct.pack(f"<{len(words)}Q", *words))
            return
        for n in range(len(words) - 1, -1, -1):
            mmu.write(rsp + 8 * n & _MASK64, words[n].to_bytes(8, "little"), user=user, ac=ac)
    except NonCanonical:
        raise CpuException(Vector.SS, ext) from None
