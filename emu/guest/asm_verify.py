"""Whether the bytes that Keystone made are the instruction that was written.

Keystone 0.9.2 truncates immediates and displacements without an error (`mov al, 0x1ff`, `[rax + 0x123456789]`) and encodes a
few instructions as others (`push 0x80000000`, `iret`). Capstone decodes what it made and every written operand must be there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from emu.guest.asm_operand import PLACEHOLDER32, PLACEHOLDER64, Imm, Mem, Operand, Reg

if TYPE_CHECKING:
    from capstone import CsInsn

MASK64 = (1 << 64) - 1

_CONDITIONS = {
    "c": "b", "nae": "b", "nc": "ae", "nb": "ae", "z": "e", "nz": "ne", "na": "be", "nbe": "a", "nge": "l", "nl": "ge",
    "ng": "le", "nle": "g", "pe": "p", "po": "np",
}  # fmt: skip
_ALIASES = {
    "sal": "shl", "movabs": "mov", "repe": "rep", "repz": "rep", "repnz": "repne", "wait": "fwait", "xlat": "xlatb",
    "retn": "ret", "icebp": "int1",
}  # fmt: skip
# Written without a size suffix these mean the 16-bit or 64-bit form, depending on whom one asks.
AMBIGUOUS = {"iret": "iretq", "pushf": "pushfq", "popf": "popfq", "sysret": "sysretq", "sysexit": "sysexitq", "retf": "retfq"}


def canonical(mnemonic: str) -> str:
    """One spelling for the mnemonics that mean the same instruction."""
    match = re.fullmatch(r"(cmov|set)(\w+)", mnemonic)
    if match:
        return match[1] + _CONDITIONS.get(match[2], match[2])
    return _ALIASES.get(mnemonic, mnemonic)


def difference(prefix: str, mnemonic: str, operands: tuple[Operand, ...], insn: CsInsn) -> str:
    """What distinguishes the decoded instruction from the written one; empty when they are the same."""
    words = insn.mnemonic.split()
    if canonical(words[-1]) != canonical(mnemonic):
        return f"{insn.mnemonic} instead of {mnemonic}"
    if [canonical(w) for w in words[:-1]] != ([canonical(prefix)] if prefix else []):
        return f"prefix {' '.join(words[:-1]) or 'missing'} instead of {prefix or 'none'}"
    left = list(insn.operands)
    for operand in operands:
        for candidate in left:
            if _matches(operand, candidate, insn):
                left.remove(candidate)
                break
        else:
            return f"'{insn.mnemonic} {insn.op_str}'"
    return ""


def _matches(operand: Operand, decoded: Any, insn: CsInsn) -> bool:
    from capstone.x86_const import X86_OP_IMM, X86_OP_MEM, X86_OP_REG

    kind = decoded.type
    if isinstance(operand, Reg):
        name = operand.name if not operand.name.startswith("st") else f"st({operand.name[2]})"
        return bool(kind == X86_OP_REG and insn.reg_name(decoded.reg) == name)
    if isinstance(operand, Imm):
        return kind == X86_OP_IMM and _same_immediate(operand, decoded.imm, decoded.size)
    return bool(kind == X86_OP_MEM and _same_memory(operand, decoded, insn))


def _same_immediate(operand: Imm, decoded: int, size: int) -> bool:
    if operand.value.terms:
        return decoded in (PLACEHOLDER32, PLACEHOLDER64)
    bits = 8 * min(size, 8)
    value = operand.value.constant
    return -(1 << bits - 1) <= value < 1 << bits and (value - decoded) % (1 << bits) == 0


def _same_memory(operand: Mem, decoded: Any, insn: CsInsn) -> bool:
    memory = decoded.mem

    def name(register: int) -> str | None:
        return insn.reg_name(register) if register else None

    base, index = name(memory.base), name(memory.index)
    swapped = operand.scale == 1 and (base, index) == (operand.index, operand.base)
    if (base, index) != (operand.base, operand.index) and not swapped:
        return False
    if operand.index and memory.scale != operand.scale:
        return False
    if name(memory.segment) != operand.segment:
        return False
    if operand.size is not None and decoded.size != operand.size:
        return False
    wanted = PLACEHOLDER32 if operand.displacement.terms else operand.displacement.constant
    bits = 32 if insn.addr_size == 4 else 64
    if not -(1 << bits - 1) <= wanted < 1 << bits:
        return False
    return bool((memory.disp - wanted) % (1 << bits) == 0)
