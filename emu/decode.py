"""Which memory an instruction touches, as far as its bytes alone say it: decoding, without registers.

Capstone gives length, operands and addressing. It is not asked how an operand is used: its access flags call SETcc,
STMXCSR and CMPXCHG reads, and its operand sizes ignore REX.W under some prefixes. Use and size therefore stand here, by
mnemonic and opcode (SDM vol. 2, the pages of the instructions), checked against a real CPU by
tests/test_cr2_hardware.py.

VEX, EVEX and XOP encodings are not in the CPU model: they are #UD before any operand is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import capstone
from capstone import x86 as cs

MASK64: Final = (1 << 64) - 1
MASK32: Final = (1 << 32) - 1
_CACHE_LIMIT: Final = 1 << 16

_FXSAVE_AREA: Final = 512
_XSAVE_AREA: Final = 576
"""Legacy area and header: the CPU model has no state component beyond SSE in the standard format (SDM vol. 1 13.4)."""


class Undecodable(Exception):
    """The bytes at `la` are no instruction of the CPU model (#UD), or end before the instruction does."""

    def __init__(self, code: bytes, la: int) -> None:
        super().__init__(f"no instruction at {la:#x}: {code.hex(' ') or 'no bytes'}")
        self.code = code
        self.la = la


@dataclass(frozen=True, slots=True)
class Operand:
    """One memory access of an instruction: base + index * scale + disp, under `mask`, above a segment base.

    `bit_offset` names the register of BT/BTS/BTR/BTC that holds a signed bit offset of 8 * size bits: the access moves
    by whole operands of `size` bytes (SDM vol. 2A, BT). `index_mask` cuts the index (XLAT: AL). `stack`: SS-relative,
    so that a non-canonical address is #SS rather than #GP. `implicit`: a supervisor access at any CPL. `probes`:
    (offset, size) of parts that microcode checks before the whole.
    """

    size: int
    read: bool
    write: bool
    base: str | None = None
    index: str | None = None
    scale: int = 1
    disp: int = 0
    segment: str | None = None
    mask: int = MASK64
    index_mask: int = MASK64
    bit_offset: str | None = None
    implicit: bool = False
    stack: bool = False
    probes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """A decoded instruction: `size` in bytes, `operands` in the order in which the CPU checks them.

    `repeat_mask` is nonzero for a string instruction under REP: it does nothing when RCX & repeat_mask is 0.
    `descriptors`: it may also read, and mark accessed, descriptors of the GDT or LDT: supervisor accesses at any CPL
    (SDM vol. 3A 4.6.1), whose address depends on a selector and on GDTR/LDTR, so that they are not among `operands`.
    """

    mnemonic: str
    size: int
    operands: tuple[Operand, ...]
    repeat_mask: int = 0
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class _Prefixes:
    opcode_at: int
    operand_size: int
    """8 with REX.W, else 2 with 66h, else 4."""
    address_mask: int
    segment: str | None
    repeat: bool


_REG64: Final = {
    **{name: name for name in ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip")},
    **{"e" + name: "r" + name for name in ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "ip")},
    **{f"r{n}": f"r{n}" for n in range(8, 16)},
    **{f"r{n}d": f"r{n}" for n in range(8, 16)},
    **{name: "r" + name for name in ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")},
    **{f"r{n}w": f"r{n}" for n in range(8, 16)},
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NO_ACCESS: Final = _names(
    "nop lea invlpg cldemote prefetch prefetchw prefetchwt1 prefetchnta prefetcht0 prefetcht1 prefetcht2 "
    "bndcl bndcn bndcu bndmk bndmov bndldx bndstx"
)
"""A memory operand that is only an address. MPX is not in the CPU model: its encodings are NOPs."""

_READS_FIRST_OPERAND: Final = _names(
    "bt call jmp lcall ljmp cmp test mul imul div idiv push clflush clflushopt clwb "
    "fadd fcom fcomp fdiv fdivr fmul fsub fsubr fiadd ficom ficomp fidiv fidivr fimul fisub fisubr "
    "fbld fild fld fldcw fldenv frstor fxrstor fxrstor64 ldmxcsr lgdt lidt lldt lmsw ltr verr verw "
    "xrstor xrstor64 xrstors xrstors64 ptwrite vmclear vmptrld vmxon"
)

_MODIFIES_FIRST_OPERAND: Final = _names(
    "adc add and or sbb sub xor inc dec neg not rol ror rcl rcr sal shl sar shr shld shrd btc btr bts "
    "cmpxchg cmpxchg8b cmpxchg16b xadd xchg"
)
"""A real CPU asks for these operands with the intent to write: #PF has W=1 even if the page is absent. CMPXCHG writes
back what it read when the comparison fails (SDM vol. 2A), so it is here whatever the values are."""

_OPERAND_SIZED: Final = _names(
    "adc add and or sbb sub xor inc dec neg not rol ror rcl rcr sal shl sar shr shld shrd bt btc btr bts cmpxchg xadd "
    "xchg "
    "cmp test mul imul div idiv mov movabs movbe bsf bsr tzcnt lzcnt popcnt crc32 adcx adox movnti "
    "cmova cmovae cmovb cmovbe cmove cmovg cmovge cmovl cmovle cmovne cmovno cmovnp cmovns cmovo cmovp cmovs"
)
"""General-purpose instructions whose operand, if not a byte, has the size that REX.W and 66h say."""

_FIXED_SIZES: Final = {
    **dict.fromkeys(("fxsave", "fxsave64", "fxrstor", "fxrstor64"), _FXSAVE_AREA),
    **dict.fromkeys(("xsave", "xsaveopt", "xsavec", "xsaves", "xrstor", "xrstors"), _XSAVE_AREA),
    **dict.fromkeys(("xsave64", "xsaveopt64", "xsavec64", "xsaves64", "xrstor64", "xrstors64"), _XSAVE_AREA),
    "comisd": 8,
    **dict.fromkeys(("clflush", "clflushopt", "clwb"), 1),
}

_LAST_BYTE_FIRST: Final = _names(
    "fxsave fxsave64 fxrstor fxrstor64 xsave xsave64 xsaveopt xsaveopt64 xsavec xsavec64 xsaves xsaves64"
)
"""Measured on Intel, FXSAVE on AMD too."""

_BOTH_ENDS_FIRST: Final = _names("fnsave frstor fnstenv fldenv")
"""The control word, then the last byte (measured on Intel)."""

_XCOMP_BV: Final = 520
"""Offset in the XSAVE area of what XRSTOR looks at first (measured)."""

_DESCRIPTOR_READERS: Final = _names("lar lsl verr verw lldt ltr lss lfs lgs lcall ljmp retf retfq iret iretd iretq")

_STRING_OPCODES: Final = {
    0x6C: "ins", 0x6D: "ins", 0x6E: "outs", 0x6F: "outs", 0xA4: "movs", 0xA5: "movs", 0xA6: "cmps", 0xA7: "cmps",
    0xAA: "stos", 0xAB: "stos", 0xAC: "lods", 0xAD: "lods", 0xAE: "scas", 0xAF: "scas",
}  # fmt: skip

_disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_disassembler.detail = True
_cache: dict[bytes, Instruction] = {}


def decode(code: bytes, la: int) -> Instruction:
    """The instruction that starts at code[0]; `code` may go on behind it, 15 bytes are enough. `la` is for the error.

    Instructions are cached by `code`: the same bytes give the same object. Raises Undecodable.
    """
    instruction = _cache.get(code)
    if instruction is None:
        instruction = _decode(code, la)
        if len(_cache) >= _CACHE_LIMIT:
            _cache.clear()
        _cache[code] = instruction
    return instruction


def _decode(code: bytes, la: int) -> Instruction:
    prefixes = _scan_prefixes(code[:15])
    insn: Any = next(_disassembler.disasm(code[:15], la, 1), None)
    if insn is None or prefixes.opcode_at >= insn.size or _beyond_the_model(code, prefixes.opcode_at):
        raise Undecodable(bytes(code[:15]), la)
    opcode = code[prefixes.opcode_at]
    mnemonic = _mnemonic(insn, opcode)
    two_byte = opcode == 0x0F
    if not two_byte and opcode in _STRING_OPCODES:
        operands = _string_operands(opcode, prefixes)
        return Instruction(mnemonic, insn.size, operands, prefixes.address_mask if prefixes.repeat else 0)
    explicit = _explicit_operand(insn, mnemonic, opcode, prefixes)
    pops_segment = two_byte and code[prefixes.opcode_at + 1] in (0xA1, 0xA9)
    descriptors = pops_segment or opcode == 0x8E or mnemonic in _DESCRIPTOR_READERS
    operands = _with_implicit(insn, mnemonic, explicit, prefixes, pops_segment)
    return Instruction(mnemonic, insn.size, operands, 0, descriptors)


def _mnemonic(insn: Any, opcode: int) -> str:
    """Without prefixes, and far where the instruction is far: Capstone calls FF /3 and /5 near without REX.W."""
    if opcode == 0xFF:
        far = {3: "lcall", 5: "ljmp"}.get(insn.modrm >> 3 & 7)
        if far is not None:
            return far
    mnemonic: str = insn.mnemonic
    return mnemonic.rsplit(" ", 1)[-1]


def _scan_prefixes(code: bytes) -> _Prefixes:
    """SDM vol. 2A 2.1.1 and 2.2.1: legacy prefixes in any order; a REX prefix counts only right before the opcode."""
    operand16 = address32 = repeat = False
    segment: str | None = None
    rex = at = 0
    for byte in code:
        if byte & 0xF0 == 0x40:
            rex = byte
            at += 1
            continue
        if byte == 0x66:
            operand16 = True
        elif byte == 0x67:
            address32 = True
        elif byte in (0xF2, 0xF3):
            repeat = True
        elif byte == 0x64:
            segment = "fs_base"
        elif byte == 0x65:
            segment = "gs_base"
        elif byte not in (0x26, 0x2E, 0x36, 0x3E, 0xF0):
            break
        rex = 0
        at += 1
    size = 8 if rex & 8 else 2 if operand16 else 4
    return _Prefixes(at, size, MASK32 if address32 else MASK64, segment, repeat)


def _beyond_the_model(code: bytes, at: int) -> bool:
    opcode = code[at]
    return opcode in (0xC4, 0xC5, 0x62) or (opcode == 0x8F and len(code) > at + 1 and bool(code[at + 1] & 0x38))


def _explicit_operand(insn: Any, mnemonic: str, opcode: int, prefixes: _Prefixes) -> Operand | None:
    """The operand that ModRM (or a moffs) addresses, None if the instruction has none or does not access it."""
    position = next((n for n, operand in enumerate(insn.operands) if operand.type == cs.X86_OP_MEM), None)
    if position is None or mnemonic in _NO_ACCESS:
        return None
    operand = insn.operands[position]
    first = position == 0
    modifies = first and mnemonic in _MODIFIES_FIRST_OPERAND
    read = not first or modifies or mnemonic in _READS_FIRST_OPERAND
    memory = operand.mem
    base, index = _register(insn, memory.base), _register(insn, memory.index)
    size = _operand_size(operand.size, mnemonic, opcode, prefixes)
    disp: int = memory.disp
    if base == "rip":
        disp += insn.size
    elif base == "rsp" and mnemonic == "pop":
        disp += size  # SDM vol. 2B, POP: RSP is incremented before the address is computed
    bit_offset = None
    if mnemonic in ("bt", "btc", "btr", "bts") and insn.operands[1].type == cs.X86_OP_REG:
        bit_offset = _register(insn, insn.operands[1].reg)
    return Operand(
        size, read, first and (modifies or not read), base, index, memory.scale, disp, prefixes.segment,
        prefixes.address_mask, bit_offset=bit_offset, stack=prefixes.segment is None and base in ("rsp", "rbp"),
        probes=_probes(mnemonic, size),
    )  # fmt: skip


def _probes(mnemonic: str, size: int) -> tuple[tuple[int, int], ...]:
    if mnemonic in _LAST_BYTE_FIRST:
        return ((size - 1, 1),)
    if mnemonic in _BOTH_ENDS_FIRST:
        return (0, 2 if size in (14, 94) else 4), (size - 1, 1)
    return ((_XCOMP_BV, 8),) if mnemonic.startswith("xrstor") else ()


def _register(insn: Any, number: int) -> str | None:
    return _REG64.get(insn.reg_name(number)) if number else None


def _operand_size(size: int, mnemonic: str, opcode: int, prefixes: _Prefixes) -> int:
    """Bytes accessed; `size` is Capstone's, right for everything but what is listed here."""
    fixed = _FIXED_SIZES.get(mnemonic)
    if fixed is not None:
        return fixed
    if mnemonic in _OPERAND_SIZED:
        if size == 1:
            return 1
        if opcode in (0x8C, 0x8E):
            return 2
        return max(4, prefixes.operand_size) if mnemonic in ("adcx", "adox", "movnti") else prefixes.operand_size
    operand16 = prefixes.operand_size == 2
    match mnemonic:
        case "push" | "pop":
            return 2 if operand16 else 8
        case "call" | "jmp":
            return 8  # Intel ignores 66h on near branches in 64-bit mode (SDM vol. 2, opcode map superscript f64)
        case "lcall" | "ljmp" | "lss" | "lfs" | "lgs":
            return 2 + prefixes.operand_size
        case "movsxd":
            return 2 if operand16 else 4
        case "fldenv" | "fnstenv":
            return 14 if operand16 else 28
        case "frstor" | "fnsave":
            return 94 if operand16 else 108
        case _:
            return size


def _string_operands(opcode: int, prefixes: _Prefixes) -> tuple[Operand, ...]:
    """One element. DS:RSI can be overridden, ES:RDI cannot (SDM vol. 1 7.3.9). CMPS reads ES:RDI first (measured)."""
    kind = _STRING_OPCODES[opcode]
    size = 1 if not opcode & 1 else prefixes.operand_size
    if kind in ("ins", "outs"):
        size = min(size, 4)
    source = Operand(size, True, False, "rsi", segment=prefixes.segment, mask=prefixes.address_mask)
    read_di = Operand(size, True, False, "rdi", mask=prefixes.address_mask)
    write_di = Operand(size, False, True, "rdi", mask=prefixes.address_mask)
    return {
        "ins": (write_di,),
        "outs": (source,),
        "movs": (source, write_di),
        "cmps": (read_di, source),
        "stos": (write_di,),
        "lods": (source,),
        "scas": (read_di,),
    }[kind]


def _with_implicit(
    insn: Any, mnemonic: str, explicit: Operand | None, prefixes: _Prefixes, pops_segment: bool
) -> tuple[Operand, ...]:
    """`explicit` and the accesses that no operand names, in the order of the CPU."""
    operands = () if explicit is None else (explicit,)
    width = 2 if prefixes.operand_size == 2 else 8
    far = prefixes.operand_size
    match mnemonic:
        case "push" | "pushf" | "pushfq":
            return *operands, _stack_write(-width, width)
        case "pop" if pops_segment:
            return (_stack_read(0, 2),)  # measured: the selector only, though RSP moves by the operand size
        case "pop" | "popf" | "popfq":
            return _stack_read(0, width), *operands
        case "call":
            return *operands, _stack_write(-8, 8)
        case "ret":
            return (_stack_read(0, 8),)
        case "lcall":
            return *operands, _stack_write(-far, far), _stack_write(-2 * far, far)
        case "retf" | "retfq":
            return _stack_read(far, far), _stack_read(0, far)  # measured: CS before RIP
        case "iret" | "iretd" | "iretq":
            return tuple(_stack_read(n * far, far) for n in (2, 1, 0, 3, 4))  # measured: RFLAGS, CS, RIP
        case "leave":
            return (_stack_read(0, width, "rbp"),)
        case "enter":
            return _enter_operands(insn.operands[0].imm & 0xFFFF, insn.operands[1].imm & 31, width)
        case "movdir64b":
            base = _register(insn, insn.operands[0].reg)
            return *operands, Operand(64, False, True, base, mask=prefixes.address_mask)
        case "xlatb":
            return (Operand(1, True, False, "rbx", "rax", 1, 0, prefixes.segment, prefixes.address_mask, index_mask=0xFF),)
        case "maskmovq" | "maskmovdqu":
            size = 16 if mnemonic == "maskmovdqu" else 8
            return (Operand(size, False, True, "rdi", segment=prefixes.segment, mask=prefixes.address_mask),)
        case "monitor":
            return (Operand(1, True, False, "rax", segment=prefixes.segment, mask=prefixes.address_mask),)
        case _:
            return operands


def _stack_read(disp: int, size: int, base: str = "rsp") -> Operand:
    return Operand(size, True, False, base, disp=disp, stack=True)


def _stack_write(disp: int, size: int) -> Operand:
    return Operand(size, False, True, "rsp", disp=disp, stack=True)


def _enter_operands(allocated: int, level: int, width: int) -> tuple[Operand, ...]:
    """SDM vol. 2A, ENTER. The final stack pointer is probed for a write, which happens to be nowhere else."""
    operands = [_stack_write(-width, width)]
    for n in range(1, level):
        operands.append(_stack_read(-width * n, width, "rbp"))
        operands.append(_stack_write(-width * (n + 1), width))
    if level:
        operands.append(_stack_write(-width * (level + 1), width))
    operands.append(_stack_write(-width * (level + 1) - allocated, 1))
    return tuple(operands)
