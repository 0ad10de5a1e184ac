"""The instructions that the machine executes itself (emu/privileged_opcodes.py lists them), each by its page in SDM vol. 2.

Every function checks everything before it changes anything, as the CPU does: an exception leaves the machine as it was, with RIP
at the instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.cpuid import cpuid
from emu.decode import Undecodable, decode
from emu.descriptors import (
    SystemSegment,
    SystemType,
    TableRegister,
    decode_system_segment,
    decode_table_register,
    encode_table_register,
)
from emu.exceptions import CpuException, Vector, deliver, read_system
from emu.mmu.fault import Access, GeneralProtection
from emu.mmu.registers import Cr0, Cr4
from emu.msr import read_msr, write_msr
from emu.privileged_opcodes import MAX_LENGTH, recognise
from emu.privileged_step import Step, check_canonical
from emu.rflags import Rflags
from emu.transfers import call_far, int_n, iret, jmp_far, retf, syscall, sysret

if TYPE_CHECKING:
    from emu.cpu import Cpu

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
# One RDTSC is this many cycles after the last: time is virtual and the same in every run.
TSC_STEP = 1000
_BRANCHES = frozenset(("syscall", "sysret", "iret", "retf", "int", "jmp_far", "call_far"))
# No single-step trap follows these: INT n clears TF, and SYSCALL does so by IA32_FMASK in every kernel that uses it.
_CLEARS_TF = frozenset(("int", "syscall"))
_TF = int(Rflags.TF)
_TSS_IOMAP_BASE = 102
# IN and OUT with the port in an immediate are E4 to E7, with the port in DX EC to EF.
_PORT_IN_DX = 0xEC
_DR6_BS = 1 << 14
_LOCK = 0xF0
_CONTROL_REGISTERS = (0, 2, 3, 4, 8)
_SEGMENT_S = 1 << 4
_MSR_TSC_AUX = 0xC000_0103


def execute(cpu: Cpu) -> None:
    """Execute the intercepted instruction at RIP. Raises CpuException and PageFault with RIP unchanged."""
    at = cpu.engine.intercepted
    code = at[1] if at is not None and at[0] == cpu.rip else cpu.engine.peek(cpu.rip, MAX_LENGTH)
    instruction = recognise(code)
    handler = None if instruction is None else _HANDLERS.get(instruction.name)
    try:
        decoded = decode(code, cpu.rip)
    except Undecodable:
        if len(code) < MAX_LENGTH:  # the rest of it lies in a page that cannot be fetched: that page's fault
            cpu.mmu.translate(cpu.rip + len(code) & _MASK64, Access.FETCH, user=cpu.mmu.cpl == 3)
        raise CpuException(Vector.UD) from None
    if instruction is None or handler is None or _LOCK in instruction.prefixes:
        raise CpuException(Vector.UD)
    step = Step(cpu, instruction, code, decoded)
    traps = cpu.engine.reg("rflags") & _TF
    try:
        handler(step)
    except GeneralProtection:
        raise CpuException(Vector.GP, 0) from None
    if instruction.name not in _BRANCHES:
        cpu.rip = step.next_rip
    if traps and instruction.name not in _CLEARS_TF:
        cpu.set_reg("dr6", cpu.reg("dr6") | _DR6_BS)
        deliver(cpu, CpuException(Vector.DB))


# ---- control and debug registers (MOV CRn, MOV DRn, CLTS, LMSW, SMSW)


def _mov_to_cr(step: Step) -> None:
    if step.instruction.reg not in _CONTROL_REGISTERS:
        raise CpuException(Vector.UD)
    step.need_privilege()
    cpu, instruction = step.cpu, step.instruction
    value = cpu.reg(_GPR[instruction.rm])
    number = instruction.reg
    if number == 2:
        cpu.cr2 = value
    elif number == 8:
        if value >> 4:
            raise CpuException(Vector.GP, 0)
        cpu.cr8 = value
    else:
        cpu.set_reg(f"cr{number}", value)


def _mov_from_cr(step: Step) -> None:
    cpu, instruction = step.cpu, step.instruction
    number = instruction.reg
    if number not in _CONTROL_REGISTERS:
        raise CpuException(Vector.UD)
    step.need_privilege()
    cpu.set_reg(_GPR[instruction.rm], cpu.cr8 if number == 8 else cpu.reg(f"cr{number}"))


def _debug_register(step: Step) -> str:
    cpu = step.cpu
    number = step.instruction.reg
    if number > 7:
        raise CpuException(Vector.UD)
    if number in (4, 5):
        if cpu.mmu.cr4 & Cr4.DE:
            raise CpuException(Vector.UD)
        number += 2
    step.need_privilege()
    return f"dr{number}"


def _mov_to_dr(step: Step) -> None:
    name = _debug_register(step)
    value = step.cpu.reg(_GPR[step.instruction.rm])
    if name in ("dr6", "dr7") and value >> 32:
        raise CpuException(Vector.GP, 0)
    step.cpu.set_reg(name, value)


def _mov_from_dr(step: Step) -> None:
    name = _debug_register(step)
    step.cpu.set_reg(_GPR[step.instruction.rm], step.cpu.reg(name))


def _clts(step: Step) -> None:
    step.need_privilege()
    step.cpu.set_reg("cr0", step.cpu.mmu.cr0 & ~Cr0.TS)


def _lmsw(step: Step) -> None:
    step.need_privilege()
    cpu = step.cpu
    if step.instruction.register_form:
        word = cpu.reg(_GPR[step.instruction.rm])
    else:
        word = int.from_bytes(step.read(step.operand(2, write=False)), "little")
    loaded = Cr0.MP | Cr0.EM | Cr0.TS
    cpu.set_reg("cr0", cpu.mmu.cr0 & ~loaded | word & (loaded | Cr0.PE))


def _check_umip(step: Step) -> None:
    if step.cpu.mmu.cr4 & Cr4.UMIP:
        step.need_privilege()


def _store_word(step: Step, value: int) -> None:
    """SMSW, STR, SLDT: a word to memory, the operand size to a register."""
    instruction = step.instruction
    if not instruction.register_form:
        step.write(step.operand(2, write=True), struct.pack("<H", value & 0xFFFF))
        return
    name = _GPR[instruction.rm]
    if 0x66 in instruction.prefixes and not instruction.wide:
        value = step.cpu.reg(name) & ~0xFFFF | value & 0xFFFF
    elif not instruction.wide:
        value &= 0xFFFF_FFFF
    step.cpu.set_reg(name, value)


def _smsw(step: Step) -> None:
    _check_umip(step)
    _store_word(step, step.cpu.mmu.cr0)


def _str(step: Step) -> None:
    _check_umip(step)
    _store_word(step, step.cpu.tr)


def _sldt(step: Step) -> None:
    _check_umip(step)
    _store_word(step, step.cpu.ldt_selector)


# ---- descriptor tables (SGDT, SIDT, LGDT, LIDT, LLDT, LTR)


def _store_table(step: Step, name: str) -> None:
    if step.instruction.register_form:
        raise CpuException(Vector.UD)
    _check_umip(step)
    table = getattr(step.cpu, name)
    step.write(step.operand(10, write=True), encode_table_register(table))


def _load_table(step: Step, name: str) -> None:
    if step.instruction.register_form:
        raise CpuException(Vector.UD)
    step.need_privilege()
    register = decode_table_register(step.read(step.operand(10, write=False)))
    check_canonical(step.cpu, register.base)
    setattr(step.cpu, name, register)
    step.cpu.load_tables()


def _selector(step: Step) -> int:
    """The 16-bit operand of LLDT and LTR."""
    step.need_privilege()
    if step.instruction.register_form:
        return step.cpu.reg(_GPR[step.instruction.rm]) & 0xFFFF
    return int.from_bytes(step.read(step.operand(2, write=False)), "little")


def _system_segment(cpu: Cpu, selector: int, wanted: SystemType) -> SystemSegment:
    error = selector & 0xFFFC
    if selector & 4 or not selector & ~3 or (selector & 0xFFF8) + 15 > cpu.gdtr.limit:
        raise CpuException(Vector.GP, error)
    descriptor = read_system(cpu, cpu.gdtr.base + (selector & 0xFFF8), 16, Vector.GP, error)
    segment = decode_system_segment(descriptor)
    if descriptor[5] & _SEGMENT_S or segment.type != wanted:
        raise CpuException(Vector.GP, error)
    if not segment.p:
        raise CpuException(Vector.NP, error)
    check_canonical(cpu, segment.base)
    return segment


def load_task_register(cpu: Cpu, selector: int) -> None:
    """What LTR does with its operand: take the TSS that the GDT names, and mark it busy."""
    segment = _system_segment(cpu, selector, SystemType.TSS_AVAILABLE)
    access_byte = cpu.gdtr.base + (selector & 0xFFF8) + 5
    busy = cpu.mmu.read(access_byte, 1, user=False, implicit=True)[0] | SystemType.TSS_BUSY
    cpu.mmu.write(access_byte, bytes((busy,)), user=False, implicit=True)
    cpu.tr, cpu.tss = selector, TableRegister(segment.base, segment.byte_limit)
    cpu.load_tables()


def _ltr(step: Step) -> None:
    load_task_register(step.cpu, _selector(step))


def _lldt(step: Step) -> None:
    cpu = step.cpu
    selector = _selector(step)
    if selector & ~3:
        segment = _system_segment(cpu, selector, SystemType.LDT)
        cpu.ldtr = TableRegister(segment.base, segment.byte_limit)
    else:
        cpu.ldtr = TableRegister(0, 0)
    cpu.ldt_selector = selector
    cpu.load_tables()


# ---- TLB (INVLPG, INVPCID)


def _invlpg(step: Step) -> None:
    if step.instruction.register_form:
        raise CpuException(Vector.UD)
    step.need_privilege()
    step.cpu.mmu.invlpg(step.address())


def _invpcid(step: Step) -> None:
    cpu = step.cpu
    if not cpu.features.invpcid:
        raise CpuException(Vector.UD)
    step.need_privilege()
    descriptor = step.read(step.operand(16, write=False))
    pcid, la = struct.unpack("<QQ", descriptor)
    cpu.mmu.invpcid(cpu.reg(_GPR[step.instruction.reg]), pcid, la)


# ---- model-specific registers, time, identification, protection keys


def _rdmsr(step: Step) -> None:
    step.need_privilege()
    cpu = step.cpu
    value = read_msr(cpu, cpu.reg("rcx") & 0xFFFF_FFFF)
    cpu.set_reg("rax", value & 0xFFFF_FFFF)
    cpu.set_reg("rdx", value >> 32)


def _wrmsr(step: Step) -> None:
    step.need_privilege()
    cpu = step.cpu
    write_msr(cpu, cpu.reg("rcx") & 0xFFFF_FFFF, cpu.reg("rdx") << 32 & _MASK64 | cpu.reg("rax") & 0xFFFF_FFFF)


def _rdtsc(step: Step) -> None:
    cpu = step.cpu
    if cpu.mmu.cr4 & Cr4.TSD:
        step.need_privilege()
    cpu.tsc = cpu.tsc + TSC_STEP & _MASK64
    cpu.set_reg("rax", cpu.tsc & 0xFFFF_FFFF)
    cpu.set_reg("rdx", cpu.tsc >> 32)


def _rdtscp(step: Step) -> None:
    _rdtsc(step)
    step.cpu.set_reg("rcx", step.cpu.msrs.get(_MSR_TSC_AUX, 0))


def _rdpmc(step: Step) -> None:
    """There are no performance counters, so whatever RCX names does not exist (vol. 2B, RDPMC)."""
    raise CpuException(Vector.GP, 0)


def _check_ports(step: Step) -> None:
    """The I/O permission bitmap, read only where CPL is above IOPL (SDM vol. 1 19.5.2): a bit for each port of the access.

    Two bytes are read, so the byte behind the bitmap must lie within the TSS too. INS and OUTS are refused whatever it says.
    """
    cpu, opcode = step.cpu, step.code[step.instruction.opcode_at]
    size = 1 if not opcode & 1 else 2 if 0x66 in step.instruction.prefixes else 4
    port = step.code[-1] if opcode < _PORT_IN_DX else cpu.reg("rdx") & 0xFFFF
    refused = CpuException(Vector.GP, 0)
    if step.instruction.name in ("ins", "outs") or cpu.tss.limit < _TSS_IOMAP_BASE + 1:
        raise refused
    base = cpu.tss.base
    iomap = int.from_bytes(read_system(cpu, base + _TSS_IOMAP_BASE, 2, Vector.GP, 0), "little")
    at = iomap + (port >> 3)
    if at + 1 > cpu.tss.limit:
        raise refused
    bits = int.from_bytes(read_system(cpu, base + at, 2, Vector.GP, 0), "little") >> (port & 7)
    if bits & (1 << size) - 1:
        raise refused
    if step.instruction.name == "in":
        ones = (1 << 8 * size) - 1
        cpu.set_reg("rax", ones if size == 4 else cpu.reg("rax") | ones)


def _cpuid(step: Step) -> None:
    cpu = step.cpu
    leaf, subleaf = cpu.reg("rax") & 0xFFFF_FFFF, cpu.reg("rcx") & 0xFFFF_FFFF
    for name, value in zip(("rax", "rbx", "rcx", "rdx"), cpuid(cpu.features, leaf, subleaf, cpu.mmu.cr4), strict=True):
        cpu.set_reg(name, value)


def _check_pkru(step: Step) -> None:
    cpu = step.cpu
    if not cpu.mmu.cr4 & Cr4.PKE:
        raise CpuException(Vector.UD)
    if cpu.reg("rcx") & 0xFFFF_FFFF:
        raise CpuException(Vector.GP, 0)


def _rdpkru(step: Step) -> None:
    _check_pkru(step)
    step.cpu.set_reg("rax", step.cpu.mmu.pkru)
    step.cpu.set_reg("rdx", 0)


def _wrpkru(step: Step) -> None:
    _check_pkru(step)
    if step.cpu.reg("rdx") & 0xFFFF_FFFF:
        raise CpuException(Vector.GP, 0)
    step.cpu.mmu.load_pkru(step.cpu.reg("rax") & 0xFFFF_FFFF)


def _check_fsgsbase(step: Step) -> None:
    if not step.cpu.mmu.cr4 & Cr4.FSGSBASE:
        raise CpuException(Vector.UD)


def _rdbase(step: Step, name: str) -> None:
    _check_fsgsbase(step)
    value = step.cpu.reg(name)
    step.cpu.set_reg(_GPR[step.instruction.rm], value if step.instruction.wide else value & 0xFFFF_FFFF)


def _wrbase(step: Step, name: str) -> None:
    _check_fsgsbase(step)
    value = step.cpu.reg(_GPR[step.instruction.rm])
    if not step.instruction.wide:
        value &= 0xFFFF_FFFF
    check_canonical(step.cpu, value)
    step.cpu.set_reg(name, value)


def _swapgs(step: Step) -> None:
    step.need_privilege()
    cpu = step.cpu
    user, kernel = cpu.reg("gs_base"), cpu.reg("kernel_gs_base")
    cpu.set_reg("gs_base", kernel)
    cpu.set_reg("kernel_gs_base", user)


_HANDLERS: dict[str, Callable[[Step], None]] = {
    "mov_to_cr": _mov_to_cr, "mov_from_cr": _mov_from_cr, "mov_to_dr": _mov_to_dr, "mov_from_dr": _mov_from_dr, "clts": _clts,
    "lmsw": _lmsw, "smsw": _smsw, "str": _str, "sldt": _sldt, "ltr": _ltr, "lldt": _lldt,
    "sgdt": lambda step: _store_table(step, "gdtr"), "sidt": lambda step: _store_table(step, "idtr"),
    "lgdt": lambda step: _load_table(step, "gdtr"), "lidt": lambda step: _load_table(step, "idtr"),
    "invlpg": _invlpg, "invpcid": _invpcid, "rdmsr": _rdmsr, "wrmsr": _wrmsr, "rdtsc": _rdtsc, "rdtscp": _rdtscp, "cpuid": _cpuid,
    "in": _check_ports, "out": _check_ports, "ins": _check_ports, "outs": _check_ports,
    "rdpkru": _rdpkru, "wrpkru": _wrpkru,
    "rdfsbase": lambda step: _rdbase(step, "fs_base"), "rdgsbase": lambda step: _rdbase(step, "gs_base"),
    "wrfsbase": lambda step: _wrbase(step, "fs_base"), "wrgsbase": lambda step: _wrbase(step, "gs_base"),
    "swapgs": _swapgs, "syscall": syscall, "sysret": sysret, "iret": iret, "retf": retf, "int": int_n,
    "jmp_far": jmp_far, "call_far": call_far, "rdpmc": _rdpmc,
}
"""What is recognised and has no entry here is not implemented and not announced by CPUID: #UD."""
