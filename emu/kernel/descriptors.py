"""Linux's GDT, TSS and selectors (v6.12 arch/x86/include/asm/segment.h, desc.h, desc_defs.h, kernel/cpu/common.c).

The three versions modelled share every value here; the byte formats are in emu/descriptors.py.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from types import MappingProxyType

from emu.descriptors import (
    Segment,
    SystemSegment,
    SystemType,
    Tss,
    encode_segment,
    encode_system_segment,
    encode_tss,
)


class GdtEntry(IntEnum):
    """Indices into the per-CPU GDT; TSS and LDT take two entries each."""

    KERNEL32_CS = 1
    KERNEL_CS = 2
    KERNEL_DS = 3
    DEFAULT_USER32_CS = 4
    DEFAULT_USER_DS = 5
    DEFAULT_USER_CS = 6
    TSS = 8
    LDT = 10
    TLS_MIN = 12
    TLS_MAX = 14
    CPUNODE = 15


GDT_ENTRIES = 16
GDT_SIZE = GDT_ENTRIES * 8
IDT_ENTRIES = 256
IDT_SIZE = IDT_ENTRIES * 16

KERNEL32_CS = GdtEntry.KERNEL32_CS * 8
KERNEL_CS = GdtEntry.KERNEL_CS * 8
KERNEL_DS = GdtEntry.KERNEL_DS * 8
USER32_CS = GdtEntry.DEFAULT_USER32_CS * 8 + 3
USER_DS = GdtEntry.DEFAULT_USER_DS * 8 + 3
USER_CS = GdtEntry.DEFAULT_USER_CS * 8 + 3
TSS_SELECTOR = GdtEntry.TSS * 8
LDT_SELECTOR = GdtEntry.LDT * 8
CPUNODE_SEG = GdtEntry.CPUNODE * 8 + 3

MSR_STAR_VALUE = USER32_CS << 48 | KERNEL_CS << 32
"""IA32_STAR: SYSRET's and SYSCALL's selectors (common.c: syscall_init)."""


def _flat(segment_type: int, *, dpl: int, l: bool, db: bool) -> Segment:  # noqa: E741 - the SDM's name
    return Segment(0, 0xFFFFF, segment_type, s=True, dpl=dpl, p=True, l=l, db=db, g=True)


# Types 0xb (code, readable, accessed) and 0x3 (data, writable, accessed): Linux presets A, so the CPU never writes here.
GDT_SEGMENTS = MappingProxyType(
    {
        GdtEntry.KERNEL32_CS: _flat(0xB, dpl=0, l=False, db=True),
        GdtEntry.KERNEL_CS: _flat(0xB, dpl=0, l=True, db=False),
        GdtEntry.KERNEL_DS: _flat(0x3, dpl=0, l=False, db=True),
        GdtEntry.DEFAULT_USER32_CS: _flat(0xB, dpl=3, l=False, db=True),
        GdtEntry.DEFAULT_USER_DS: _flat(0x3, dpl=3, l=False, db=True),
        GdtEntry.DEFAULT_USER_CS: _flat(0xB, dpl=3, l=True, db=False),
    }
)


def cpunode_segment(cpu: int, node: int) -> Segment:
    """The descriptor whose limit tells user space, by LSL, its CPU and node (common.c: setup_getcpu)."""
    return Segment(0, node << 12 | cpu, 5, s=True, dpl=3, p=True, db=True)


def gdt(cpu: int, node: int, tss_la: int, tss_limit: int) -> bytes:
    """The 128 bytes of a CPU's GDT, with its TSS at linear address `tss_la` and last valid offset `tss_limit`.

    The TSS is marked available: LTR makes it busy.
    """
    table = [0] * GDT_ENTRIES
    for entry, segment in GDT_SEGMENTS.items():
        table[entry] = encode_segment(segment)
    table[GdtEntry.CPUNODE] = encode_segment(cpunode_segment(cpu, node))
    tss = encode_system_segment(SystemSegment(tss_la, tss_limit, SystemType.TSS_AVAILABLE))
    table[GdtEntry.TSS], table[GdtEntry.TSS + 1] = struct.unpack("<QQ", tss)
    return struct.pack(f"<{GDT_ENTRIES}Q", *table)


def tss(sp0: int, ist: tuple[int, ...], iomap_base: int) -> bytes:
    """The hardware part of a CPU's TSS: the entry stack's top, up to 7 IST stack tops, no I/O bitmap.

    RSP2 is left 0: the kernel uses its slot as scratch space. Raises ValueError for more than 7 IST stacks.
    """
    if len(ist) > 7:
        raise ValueError(f"a TSS has 7 IST entries, not {len(ist)}")
    ist1, ist2, ist3, ist4, ist5, ist6, ist7 = (*ist, *(0,) * (7 - len(ist)))
    return encode_tss(Tss((sp0, 0, 0), (ist1, ist2, ist3, ist4, ist5, ist6, ist7), iomap_base))
