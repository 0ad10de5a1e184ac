"""Instructions of the .asm dialect to bytes: branches by ourselves, everything else by Keystone, checked by Capstone.

Keystone never sees a symbol. A branch is encoded here (rel32, or rel8 where the instruction has no other form or `short` is
written); an operand that names a symbol becomes a placeholder whose place in the bytes Capstone tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from emu.guest.asm_expression import Linear, Malformed
from emu.guest.asm_operand import PLACEHOLDER32, PLACEHOLDER64, REGISTER_SIZE, Imm, Mem, Operand, Reg, spell
from emu.guest.asm_verify import AMBIGUOUS, canonical, difference
from emu.guest.program import RelocationType

if TYPE_CHECKING:
    from capstone import CsInsn

PREFIXES = frozenset(["lock", "rep", "repe", "repz", "repne", "repnz"])
# What Keystone 0.9.2 does not know.
_FIXED = {
    "endbr64": b"\xf3\x0f\x1e\xfa",
    "sysretq": b"\x48\x0f\x07",
    "sysexitq": b"\x48\x0f\x35",
    "int1": b"\xf1",
}
_CONDITION_CODES = {
    name: code
    for code, names in enumerate(
        "o|no|b c nae|ae nb nc|e z|ne nz|be na|a nbe|s|ns|p pe|np po|l nge|ge nl|le ng|g nle".split("|")
    )
    for name in names.split()
}
_SHORT_ONLY = {
    "loop": b"\xe2", "loope": b"\xe1", "loopz": b"\xe1", "loopne": b"\xe0", "loopnz": b"\xe0", "jrcxz": b"\xe3",
    "jecxz": b"\x67\xe3",
}  # fmt: skip
# Keystone never returns from a prefix that no name follows, so only instructions reach it.
_NOT_INSTRUCTIONS = PREFIXES | frozenset("data16 addr32 rex64 xacquire xrelease notrack cs ds es fs gs ss".split())
# They always mean (R)SI and (R)DI; given other operands, Keystone warns on standard error and ignores them.
_STRING = frozenset(f"{name}{size}" for name in "movs stos lods scas cmps ins outs".split() for size in "bwdq") | {"xlatb"}
# mov al/ax/eax/rax to or from a 64-bit address.
_MOFFS = range(0xA0, 0xA4)
# One bad line makes Keystone reject its whole text, and then each line of the text is tried alone.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Instruction:
    """A written instruction."""

    line: int
    prefix: str
    mnemonic: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Fixup:
    """Bytes at `offset` of an encoding that wait for the value of an expression. `bias` is added to a PC-relative one."""

    offset: int
    type: RelocationType
    size: int
    value: Linear
    bias: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Bytes of one source line and what is left to fill in."""

    data: bytes
    fixups: tuple[Fixup, ...] = ()


class BadInstruction(Exception):
    """An instruction that cannot be assembled: .line and a text."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def encode_branch(mnemonic: str, short: bool, target: Linear) -> Encoded | None:
    """A jump, call or loop to an address expression; None for other mnemonics. Raises Malformed."""
    if mnemonic in _SHORT_ONLY:
        opcode, short = _SHORT_ONLY[mnemonic], True
    elif mnemonic == "jmp":
        opcode = b"\xeb" if short else b"\xe9"
    elif mnemonic == "call":
        if short:
            raise Malformed("call has no short form")
        opcode = b"\xe8"
    elif mnemonic[:1] == "j" and mnemonic[1:] in _CONDITION_CODES:
        code = _CONDITION_CODES[mnemonic[1:]]
        opcode = bytes([0x70 | code]) if short else bytes([0x0F, 0x80 | code])
    else:
        return None
    if target.single() is None:
        raise Malformed(f"{mnemonic} needs a label (for a number: mov rax, NUMBER and {mnemonic} rax)")
    size = 1 if short else 4
    fixup = Fixup(len(opcode), RelocationType.PLT32, size, target, -size)
    return Encoded(opcode + bytes(size), (fixup,))


def is_branch(mnemonic: str) -> bool:
    """Whether encode_branch knows the mnemonic."""
    return mnemonic in _SHORT_ONLY or mnemonic in ("jmp", "call") or (mnemonic[:1] == "j" and mnemonic[1:] in _CONDITION_CODES)


def encode(instructions: list[Instruction]) -> list[Encoded]:
    """Bytes of each instruction. Raises BadInstruction."""
    results: list[Encoded | None] = [_by_hand(i) for i in instructions]
    waiting = [n for n, done in enumerate(results) if done is None]
    for start in range(0, len(waiting), _CHUNK):
        numbers = waiting[start : start + _CHUNK]
        chunk = [instructions[n] for n in numbers]
        encoded = _bulk(chunk) or [_alone(i) for i in chunk]
        for number, one in zip(numbers, encoded, strict=True):
            results[number] = one
    return [r for r in results if r is not None]


def _by_hand(insn: Instruction) -> Encoded | None:
    if insn.mnemonic in AMBIGUOUS:
        raise BadInstruction(insn.line, f"{insn.mnemonic} is ambiguous in 64-bit mode: write {AMBIGUOUS[insn.mnemonic]}")
    for operand in insn.operands:
        _check_range(insn, operand)
    _check_mnemonic(insn)
    if insn.mnemonic in _FIXED and not insn.operands and not insn.prefix:
        return Encoded(_FIXED[insn.mnemonic])
    if insn.mnemonic == "push" and len(insn.operands) == 1 and not insn.prefix:
        operand = insn.operands[0]
        if isinstance(operand, Imm):
            return _push(insn, operand.value)
    return None


@cache
def _instructions() -> frozenset[str]:
    from capstone.x86_const import X86_INS_ENDING

    return frozenset(canonical(_capstone().insn_name(number)) for number in range(1, X86_INS_ENDING)) - _NOT_INSTRUCTIONS


def _check_mnemonic(insn: Instruction) -> None:
    if canonical(insn.mnemonic) not in _instructions() or insn.mnemonic in _NOT_INSTRUCTIONS:
        raise BadInstruction(insn.line, f"unknown instruction or directive {insn.mnemonic!r}")
    with_vectors = any(isinstance(o, Reg) and o.name.startswith("xmm") for o in insn.operands)
    if insn.mnemonic in _STRING and insn.operands and not with_vectors:
        raise BadInstruction(insn.line, f"{insn.mnemonic} takes no operands: it means RSI and RDI")


def _check_range(insn: Instruction, operand: Operand) -> None:
    linear = operand.value if isinstance(operand, Imm) else operand.displacement if isinstance(operand, Mem) else Linear()
    if not -(1 << 63) <= linear.constant < 1 << 64:
        raise BadInstruction(insn.line, f"{linear.constant:#x} does not fit 64 bits")
    if linear.terms and linear.single() is None and linear.difference() is None:
        raise BadInstruction(insn.line, "an operand may hold one symbol + constant or a difference of two labels")


def _push(insn: Instruction, value: Linear) -> Encoded:
    # push 0xffff and push 0x80000000 are wrong in Keystone without an error.
    if value.terms:
        return Encoded(b"\x68" + bytes(4), (Fixup(1, RelocationType.R32S, 4, value),))
    if -128 <= value.constant < 128:
        return Encoded(b"\x6a" + (value.constant & 0xFF).to_bytes(1, "little"))
    if not -(1 << 31) <= value.constant < 1 << 31:
        raise BadInstruction(insn.line, f"push {value.constant:#x}: push takes a sign-extended 32-bit immediate")
    return Encoded(b"\x68" + (value.constant & 0xFFFFFFFF).to_bytes(4, "little"))


@cache
def _keystone() -> Any:
    # Imported when an .asm guest is there: 21 ms that other runs need not pay.
    import keystone

    return keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)


@cache
def _capstone() -> Any:
    import capstone

    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    return engine


def _spelled(insn: Instruction) -> str:
    mnemonic, immediate = insn.mnemonic, PLACEHOLDER32
    if _is_mov_address(insn):
        mnemonic, immediate = "movabs", PLACEHOLDER64
    operands = ", ".join(spell(o, immediate) for o in insn.operands)
    return f"{insn.prefix} {mnemonic} {operands}".strip()


def _is_mov_address(insn: Instruction) -> bool:
    """mov r64, symbol: the address in full."""
    if insn.mnemonic not in ("mov", "movabs") or len(insn.operands) != 2:
        return False
    target, source = insn.operands
    if not isinstance(target, Reg) or REGISTER_SIZE.get(target.name) != 8 or not isinstance(source, Imm):
        return False
    return bool(source.value.terms) and (source.value.single() is not None or insn.mnemonic == "movabs")


def _assemble(text: str) -> bytes | None:
    import keystone

    try:
        data, _ = _keystone().asm(text, as_bytes=True)
    except keystone.KsError:
        return None
    return data if isinstance(data, bytes) else None


def _bulk(chunk: list[Instruction]) -> list[Encoded] | None:
    """All at once; None when anything about it is wrong, so that the culprit is looked for line by line."""
    data = _assemble("\n".join(_spelled(i) for i in chunk))
    if not data:
        return None
    decoded = list(_capstone().disasm(data, 0))
    if len(decoded) != len(chunk) or sum(d.size for d in decoded) != len(data):
        return None
    for insn, one in zip(chunk, decoded, strict=True):
        if difference(insn.prefix, insn.mnemonic, insn.operands, one):
            return None
    return [_with_fixups(insn, one) for insn, one in zip(chunk, decoded, strict=True)]


def _alone(insn: Instruction) -> Encoded:
    text = _spelled(insn)
    data = _assemble(text)
    if not data:
        raise BadInstruction(insn.line, f"cannot assemble '{_shown(insn)}'")
    decoded = list(_capstone().disasm(data, 0))
    if len(decoded) != 1 or decoded[0].size != len(data):
        raise BadInstruction(insn.line, f"'{_shown(insn)}' was assembled to {data.hex()}, which is not one instruction")
    wrong = difference(insn.prefix, insn.mnemonic, insn.operands, decoded[0])
    if wrong:
        raise BadInstruction(insn.line, f"'{_shown(insn)}' cannot be encoded as written: {data.hex()} is {wrong}")
    return _with_fixups(insn, decoded[0])


def _shown(insn: Instruction) -> str:
    def show(operand: Operand) -> str:
        linear = operand.value if isinstance(operand, Imm) else operand.displacement if isinstance(operand, Mem) else Linear()
        symbols = "".join(f"{'+' if f > 0 else '-'}{n}" for n, f in linear.terms.items())
        spelled = spell(operand)
        return spelled.replace(str(PLACEHOLDER32), symbols.lstrip("+")) if symbols else spelled

    return f"{insn.prefix} {insn.mnemonic} {', '.join(show(o) for o in insn.operands)}".strip()


def _with_fixups(insn: Instruction, decoded: CsInsn) -> Encoded:
    fixups: list[Fixup] = []
    for operand in insn.operands:
        if isinstance(operand, Imm) and operand.value.terms:
            fixups.append(_immediate_fixup(insn, operand, decoded))
        elif isinstance(operand, Mem) and operand.displacement.terms:
            fixups.append(_memory_fixup(insn, operand, decoded))
    return Encoded(bytes(decoded.bytes), tuple(fixups))


def _room(decoded: CsInsn, offset: int) -> int:
    """Bytes of the placeholder at `offset`; 0 when there is none. (Capstone's disp_size is 2 under a 0x66 prefix.)"""
    far = 8 if decoded.opcode[0] in _MOFFS else 4
    for placeholder, size in ((PLACEHOLDER64, 8), (PLACEHOLDER32, far)):
        if offset and bytes(decoded.bytes[offset : offset + size]) == placeholder.to_bytes(size, "little"):
            return size
    return 0


def _immediate_fixup(insn: Instruction, operand: Imm, decoded: CsInsn) -> Fixup:
    offset = decoded.imm_offset
    size = _room(decoded, offset)
    if size == 8:
        return Fixup(offset, RelocationType.R64, 8, operand.value)
    if size == 4 and decoded.imm_size == 4:
        target = insn.operands[0]
        width = REGISTER_SIZE.get(target.name) if isinstance(target, Reg) else getattr(target, "size", None)
        kind = RelocationType.R32 if width == 4 else RelocationType.R32S
        return Fixup(offset, kind, 4, operand.value)
    raise BadInstruction(insn.line, f"'{_shown(insn)}' has no room for an address")


def _memory_fixup(insn: Instruction, operand: Mem, decoded: CsInsn) -> Fixup:
    offset = decoded.disp_offset
    size = _room(decoded, offset)
    if operand.base == "rip" and size == 4:
        return Fixup(offset, RelocationType.PC32, 4, operand.displacement, offset - decoded.size)
    if size == 8:
        return Fixup(offset, RelocationType.R64, 8, operand.displacement)
    if size == 4:
        return Fixup(offset, RelocationType.R32S, 4, operand.displacement)
    raise BadInstruction(insn.line, f"'{_shown(insn)}' has no room for an address")
