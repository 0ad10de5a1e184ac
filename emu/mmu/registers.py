"""Control registers and EFER as far as paging reads them, and the values that a CPU refuses (SDM vol. 3A 2.5).

The machine is always in 64-bit mode with paging on, so leaving it (CR0.PG, CR4.PAE, CR4.LA57, EFER.LME) is a #GP.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from emu.memory import MAXPHYADDR
from emu.mmu.fault import GeneralProtection


class Cr0(IntFlag):
    """CR0 (SDM vol. 3A 2.5)."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(IntFlag):
    """CR4 (SDM vol. 3A 2.5)."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22


class Efer(IntFlag):
    """IA32_EFER (SDM vol. 3A 2.2.1)."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11


CR3_NO_INVALIDATE = 1 << 63
CR3_PCID = (1 << 12) - 1
# Plain 4-level or 5-level long mode as a boot loader leaves it.
RESET_CR0 = int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG)
RESET_CR4 = int(Cr4.PAE)
RESET_EFER = int(Efer.LME | Efer.LMA | Efer.NXE)

_CR0_KNOWN = int(sum(Cr0))
# What emu/cpuid.py announces whatever the features: neither XSAVE nor performance counters are among it.
_CR4_ALWAYS = int(
    Cr4.VME | Cr4.PVI | Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
    | Cr4.UMIP | Cr4.FSGSBASE
)


@dataclass(frozen=True, slots=True)
class Features:
    """What CPUID reports of paging. A feature that is absent makes its control bit reserved."""

    la57: bool = True
    pcid: bool = True
    invpcid: bool = True
    smep: bool = True
    smap: bool = True
    pku: bool = True
    nx: bool = True
    gbpages: bool = True

    @property
    def cr4_bits(self) -> int:
        """The CR4 bits that this CPU implements."""
        bits = _CR4_ALWAYS
        for present, bit in (
            (self.la57, Cr4.LA57),
            (self.pcid, Cr4.PCIDE),
            (self.smep, Cr4.SMEP),
            (self.smap, Cr4.SMAP),
            (self.pku, Cr4.PKE),
        ):
            if present:
                bits |= int(bit)
        return bits


def check_cr0(value: int) -> int:
    """The CR0 that a MOV of `value` leaves. Raises GeneralProtection (SDM vol. 2B, MOV to control registers)."""
    if value >> 32:
        raise GeneralProtection(f"CR0 {value:#x} sets bits 63:32")
    if value & Cr0.PG and not value & Cr0.PE:
        raise GeneralProtection(f"CR0 {value:#x} sets PG without PE")
    if value & Cr0.NW and not value & Cr0.CD:
        raise GeneralProtection(f"CR0 {value:#x} sets NW without CD")
    if not value & Cr0.PG:
        raise GeneralProtection(f"CR0 {value:#x} clears PG in 64-bit mode")
    return value & _CR0_KNOWN | int(Cr0.ET)


def check_cr3(value: int, cr4: int) -> None:
    """Raise GeneralProtection for a MOV of `value` to CR3 with a reserved bit (SDM 4.5.2, 4.10.1)."""
    if value & CR3_NO_INVALIDATE:
        if not cr4 & Cr4.PCIDE:
            raise GeneralProtection(f"CR3 {value:#x} sets bit 63 while CR4.PCIDE is 0")
        value ^= CR3_NO_INVALIDATE
    if value >> MAXPHYADDR:
        raise GeneralProtection(f"CR3 {value:#x} exceeds the physical address width of {MAXPHYADDR} bits")


def check_cr4(value: int, old: int, cr3: int, features: Features) -> None:
    """Raise GeneralProtection for a CR4 that 64-bit mode or this CPU refuses (SDM vol. 2B, MOV CR)."""
    reserved = value & ~features.cr4_bits
    if reserved:
        raise GeneralProtection(f"CR4 {value:#x} sets reserved bits {reserved:#x}")
    if not value & Cr4.PAE:
        raise GeneralProtection(f"CR4 {value:#x} clears PAE in long mode")
    if (value ^ old) & Cr4.LA57:
        raise GeneralProtection(f"CR4 {value:#x} changes LA57 in long mode")
    if value & ~old & Cr4.PCIDE and cr3 & CR3_PCID:
        raise GeneralProtection(f"CR4 {value:#x} sets PCIDE while CR3[11:0] is {cr3 & CR3_PCID:#x}")


def check_efer(value: int, old: int, features: Features) -> int:
    """The EFER that a WRMSR of `value` leaves; LMA is read-only. Raises GeneralProtection."""
    known = int(Efer.SCE | Efer.LME | Efer.LMA) | (int(Efer.NXE) if features.nx else 0)
    if value & ~known:
        raise GeneralProtection(f"EFER {value:#x} sets reserved bits {value & ~known:#x}")
    if (value ^ old) & Efer.LME:
        raise GeneralProtection(f"EFER {value:#x} changes LME while paging is on")
    return value & ~int(Efer.LMA) | old & int(Efer.LMA)
