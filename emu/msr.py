"""Model-specific registers (SDM vol. 4 chapter 2): those that a 64-bit kernel needs; any other is #GP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.exceptions import CpuException, Vector
from emu.mmu.entry import is_canonical

if TYPE_CHECKING:
    from emu.cpu import Cpu

IA32_TSC = 0x10
IA32_APIC_BASE = 0x1B
IA32_MTRRCAP = 0xFE
IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP = 0x174, 0x175, 0x176
IA32_MISC_ENABLE = 0x1A0
IA32_PAT = 0x277
IA32_EFER = 0xC000_0080
IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102
IA32_TSC_AUX = 0xC000_0103

PAT_RESET = 0x0007_0406_0007_0406
_BASES = {IA32_FS_BASE: "fs_base", IA32_GS_BASE: "gs_base", IA32_KERNEL_GS_BASE: "kernel_gs_base"}
_CANONICAL = frozenset((IA32_LSTAR, IA32_CSTAR, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, *_BASES))
_READ_ONLY = {IA32_MTRRCAP: 0, IA32_APIC_BASE: 0xFEE0_0900, IA32_MISC_ENABLE: 1}
_PLAIN = {
    IA32_SYSENTER_CS: 0, IA32_SYSENTER_ESP: 0, IA32_SYSENTER_EIP: 0, IA32_PAT: PAT_RESET, IA32_STAR: 0, IA32_LSTAR: 0,
    IA32_CSTAR: 0, IA32_FMASK: 0, IA32_TSC_AUX: 0,
}
_32_BIT = frozenset((IA32_FMASK, IA32_TSC_AUX))
_PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))


def read_msr(cpu: Cpu, index: int) -> int:
    """The value of an MSR. Raises CpuException #GP(0) for an unknown one."""
    if index in _BASES:
        return cpu.reg(_BASES[index])
    if index == IA32_EFER:
        return cpu.mmu.efer
    if index == IA32_TSC:
        return cpu.tsc
    if index in _READ_ONLY:
        return _READ_ONLY[index]
    if index in _PLAIN:
        return cpu.msrs.get(index, _PLAIN[index])
    raise CpuException(Vector.GP, 0)


def write_msr(cpu: Cpu, index: int, value: int) -> None:
    """Set an MSR. Raises CpuException #GP(0), and GeneralProtection for EFER, for what the SDM refuses."""
    if index in _CANONICAL and not is_canonical(value, cpu.mmu.regs.levels):
        raise CpuException(Vector.GP, 0)
    if index in _32_BIT and value >> 32:
        raise CpuException(Vector.GP, 0)
    if index == IA32_PAT and any(byte not in _PAT_TYPES for byte in value.to_bytes(8, "little")):
        raise CpuException(Vector.GP, 0)
    if index in _BASES:
        cpu.set_reg(_BASES[index], value)
    elif index == IA32_EFER:
        cpu.set_reg("efer", value)
    elif index == IA32_TSC:
        cpu.tsc = value
    elif index in _PLAIN:
        cpu.msrs[index] = value
    elif index in _READ_ONLY and value == _READ_ONLY[index]:
        return
    else:
        raise CpuException(Vector.GP, 0)
