"""What this machine says it is: its CPUID leaves.

A feature that is not implemented is not announced (SDM vol. 2A, CPUID); its control bits are reserved (emu/mmu/registers.py).
"""

from __future__ import annotations

from emu.memory import MAXPHYADDR
from emu.mmu.registers import Cr4, Features

_VENDOR = (0x756E6547, 0x6C65746E, 0x49656E69)  # "GenuineIntel" in EBX, ECX, EDX
_BRAND = b"vmemu emulated x86-64 processor".ljust(48, b"\0")
_SIGNATURE = 0x000606A6
_MAX_BASIC_LEAF = 7
_MAX_EXTENDED_LEAF = 0x8000_0008
_LINEAR_4_LEVEL, _LINEAR_5_LEVEL = 48, 57


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, hypervisor.
_LEAF_1_ECX = _bits(0, 1, 9, 13, 19, 20, 22, 23, 25, 31)
# Leaf 1 EDX: FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, PGE, CMOV, PAT, CLFSH, MMX, FXSR, SSE, SSE2.
_LEAF_1_EDX = _bits(0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 19, 23, 24, 25, 26)
_LEAF_1_ECX_PCID = 17
# Leaf 7 EBX: FSGSBASE, ERMS. ECX: UMIP.
_LEAF_7_EBX = _bits(0, 9)
_LEAF_7_ECX = _bits(2)
# Leaf 80000001H EDX: SYSCALL, RDTSCP, LM; ECX: LAHF, LZCNT.
_EXTENDED_1_EDX = _bits(11, 27, 29)
_EXTENDED_1_ECX = _bits(0, 5)
_GBPAGES = 26


def cpuid(features: Features, leaf: int, subleaf: int, cr4: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a CPUID leaf (SDM vol. 2A, CPUID). Unknown leaves give the highest basic leaf, as on hardware."""
    if leaf > _MAX_BASIC_LEAF and not 0x8000_0000 <= leaf <= _MAX_EXTENDED_LEAF:
        leaf = _MAX_BASIC_LEAF
    if leaf == 0:
        return _MAX_BASIC_LEAF, _VENDOR[0], _VENDOR[1], _VENDOR[2]
    if leaf == 1:
        return _SIGNATURE, 0x0001_0800, _LEAF_1_ECX | features.pcid << _LEAF_1_ECX_PCID, _LEAF_1_EDX
    if leaf == 7 and subleaf == 0:
        ebx = _LEAF_7_EBX | features.smep << 7 | features.invpcid << 10 | features.smap << 20
        ospke = features.pku and bool(cr4 & Cr4.PKE)
        return 0, ebx, _LEAF_7_ECX | features.pku << 3 | ospke << 4 | features.la57 << 16, 0
    if leaf == 0x8000_0000:
        return _MAX_EXTENDED_LEAF, 0, 0, 0
    if leaf == 0x8000_0001:
        return 0, 0, _EXTENDED_1_ECX, _EXTENDED_1_EDX | features.nx << 20 | features.gbpages << _GBPAGES
    if 0x8000_0002 <= leaf <= 0x8000_0004:
        part = _BRAND[16 * (leaf - 0x8000_0002) :]
        words = [int.from_bytes(part[4 * n : 4 * n + 4], "little") for n in range(4)]
        return words[0], words[1], words[2], words[3]
    if leaf == 0x8000_0008:
        return (_LINEAR_5_LEVEL if features.la57 else _LINEAR_4_LEVEL) << 8 | MAXPHYADDR, 0, 0, 0
    return 0, 0, 0, 0
