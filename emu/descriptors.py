"""Segment descriptors, gates and the task-state segment of 64-bit mode, as bytes in memory.

SDM vol. 3A 3.4.5 (segment descriptors), 3.5 (descriptor types), 6.14.1 (64-bit IDT), 8.2.3 (TSS descriptor), 8.7
(64-bit TSS), 2.4 (GDTR, IDTR). Decoding never refuses a value: what the processor makes of a type it does not like is
the processor's affair. Bytes that are missing read as zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

_MASK = (1 << 64) - 1


class SystemType(IntEnum):
    """Type field of a system descriptor (S = 0) in IA-32e mode (SDM vol. 3A table 3-2)."""

    LDT = 2
    TSS_AVAILABLE = 9
    TSS_BUSY = 11
    CALL_GATE = 12
    INTERRUPT_GATE = 14
    TRAP_GATE = 15


class CodeType(IntEnum):
    """Bits of the type field of a code segment (S = 1, bit 3 set)."""

    ACCESSED = 1
    READABLE = 2
    CONFORMING = 4
    CODE = 8


class DataType(IntEnum):
    """Bits of the type field of a data segment (S = 1, bit 3 clear)."""

    ACCESSED = 1
    WRITABLE = 2
    EXPAND_DOWN = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """An 8-byte descriptor: `base` 32 bits, `limit` the 20-bit field, `type` 4 bits; the rest are single flags, dpl 2 bits."""

    base: int = 0
    limit: int = 0
    type: int = 0
    s: bool = False
    dpl: int = 0
    p: bool = False
    avl: bool = False
    l: bool = False  # noqa: E741 - the SDM's name
    db: bool = False
    g: bool = False

    @property
    def is_code(self) -> bool:
        """Whether this is a code segment."""
        return self.s and bool(self.type & CodeType.CODE)

    @property
    def byte_limit(self) -> int:
        """The highest valid offset in bytes: the limit scaled by the granularity flag."""
        return (self.limit << 12 | 0xFFF) if self.g else self.limit


def encode_segment(segment: Segment) -> int:
    """The descriptor as the u64 that stands in the table."""
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.p << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        segment.limit & 0xFFFF
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (segment.limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def decode_segment(value: int) -> Segment:
    """The fields of a u64 of a descriptor table."""
    return Segment(
        base=value >> 16 & 0xFFFFFF | (value >> 56 & 0xFF) << 24,
        limit=value & 0xFFFF | (value >> 48 & 0xF) << 16,
        type=value >> 40 & 0xF,
        s=bool(value >> 44 & 1),
        dpl=value >> 45 & 3,
        p=bool(value >> 47 & 1),
        avl=bool(value >> 52 & 1),
        l=bool(value >> 53 & 1),
        db=bool(value >> 54 & 1),
        g=bool(value >> 55 & 1),
    )


@dataclass(frozen=True, slots=True)
class SystemSegment:
    """A 16-byte TSS or LDT descriptor of 64-bit mode; `base` has 64 bits, `limit` 20."""

    base: int
    limit: int
    type: int
    dpl: int = 0
    p: bool = True
    g: bool = False

    @property
    def byte_limit(self) -> int:
        """The highest valid offset in bytes."""
        return (self.limit << 12 | 0xFFF) if self.g else self.limit


def encode_system_segment(segment: SystemSegment) -> bytes:
    """The 16 bytes of the descriptor."""
    low = encode_segment(
        Segment(segment.base & 0xFFFFFFFF, segment.limit, segment.type, dpl=segment.dpl, p=segment.p, g=segment.g)
    )
    return struct.pack("<QQ", low, segment.base >> 32 & 0xFFFFFFFF)


def decode_system_segment(data: bytes) -> SystemSegment:
    """The fields of a 16-byte descriptor."""
    low = decode_segment(int.from_bytes(data[:8], "little"))
    base = low.base | int.from_bytes(data[8:12], "little") << 32
    return SystemSegment(base, low.limit, low.type, low.dpl, low.p, low.g)


@dataclass(frozen=True, slots=True)
class Gate:
    """A 16-byte IDT gate: entry point, code selector, IST index (0: none), type, DPL, present."""

    offset: int
    selector: int
    ist: int = 0
    type: int = SystemType.INTERRUPT_GATE
    dpl: int = 0
    p: bool = True

    @property
    def clears_if(self) -> bool:
        """Whether delivery clears RFLAGS.IF: an interrupt gate does, a trap gate does not (SDM vol. 3A 6.12.1.3)."""
        return self.type == SystemType.INTERRUPT_GATE


def encode_gate(gate: Gate) -> bytes:
    """The 16 bytes of the gate."""
    access = gate.type | gate.dpl << 5 | gate.p << 7
    return struct.pack(
        "<HHBBHII",
        gate.offset & 0xFFFF,
        gate.selector,
        gate.ist,
        access,
        gate.offset >> 16 & 0xFFFF,
        gate.offset >> 32 & 0xFFFFFFFF,
        0,
    )


def decode_gate(data: bytes) -> Gate:
    """The fields of a 16-byte gate; for a type that is no gate the fields mean what their bits say."""
    low, high = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:12], "little")
    return Gate(
        offset=low & 0xFFFF | (low >> 48) << 16 | high << 32,
        selector=low >> 16 & 0xFFFF,
        ist=low >> 32 & 7,
        type=low >> 40 & 0xF,
        dpl=low >> 45 & 3,
        p=bool(low >> 47 & 1),
    )


TSS_SIZE = 104
"""Bytes of the hardware part of the 64-bit TSS; the I/O bitmap may follow."""


@dataclass(frozen=True, slots=True)
class Tss:
    """The 64-bit TSS: RSP for a change to privilege level 0 to 2, IST1 to IST7, and the offset of the I/O map."""

    rsp: tuple[int, int, int] = (0, 0, 0)
    ist: tuple[int, int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0, 0)
    iomap_base: int = 0

    def stack(self, gate_ist: int) -> int:
        """The stack pointer that IST index 1 to 7 of a gate selects. Raises IndexError for any other."""
        if not 1 <= gate_ist <= 7:
            raise IndexError(f"IST index {gate_ist} is not 1 to 7")
        return self.ist[gate_ist - 1]


_TSS = struct.Struct("<I3QQ7QQHH")


def encode_tss(tss: Tss) -> bytes:
    """The 104 bytes of the TSS."""
    return _TSS.pack(0, *tss.rsp, 0, *tss.ist, 0, 0, tss.iomap_base)


def decode_tss(data: bytes) -> Tss:
    """The fields of the first 104 bytes of a TSS."""
    words = _TSS.unpack(data[:TSS_SIZE].ljust(TSS_SIZE, b"\0"))
    ist1, ist2, ist3, ist4, ist5, ist6, ist7 = words[5:12]
    return Tss((words[1], words[2], words[3]), (ist1, ist2, ist3, ist4, ist5, ist6, ist7), words[14])


@dataclass(frozen=True, slots=True)
class TableRegister:
    """GDTR or IDTR: linear base and the offset of the last valid byte."""

    base: int
    limit: int


def encode_table_register(register: TableRegister) -> bytes:
    """The 10-byte operand of LGDT, LIDT, SGDT and SIDT."""
    return struct.pack("<HQ", register.limit & 0xFFFF, register.base & _MASK)


def decode_table_register(data: bytes) -> TableRegister:
    """The fields of a 10-byte operand."""
    return TableRegister(int.from_bytes(data[2:10], "little"), int.from_bytes(data[:2], "little"))


@dataclass(frozen=True, slots=True)
class Selector:
    """A segment selector taken apart (SDM vol. 3A 3.4.2)."""

    index: int
    ldt: bool
    rpl: int


def decode_selector(value: int) -> Selector:
    """The fields of a 16-bit selector."""
    return Selector(value >> 3 & 0x1FFF, bool(value >> 2 & 1), value & 3)


def selector_error_code(value: int, *, idt: bool = False, ext: bool = False) -> int:
    """The error code that names a selector, or with `idt` a vector (SDM vol. 3A 6.13)."""
    if idt:
        return value << 3 | 2 | ext
    return value & 0xFFFC | ext
