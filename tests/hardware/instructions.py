"""Random instructions with memory operands, built from opcodes and ModRM bytes, among pages with different rights.

The address space is the same on the real CPU and on Unicorn: data pages of every right next to every right, and code
pages that end before an absent and before a no-execute page. The encodings come from a sweep over the opcode maps, so
that no instruction is missing because nobody thought of it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from emu.operands import Instruction, MemoryAccess, Undecodable, accesses, checks, decode

PAGE = 4096
DATA = 0x2000_0000
RIGHTS = "WWNNRRWRNWWNR"
"""Rights of the data pages: W read and write, R read only, N not present."""
CODE_BEFORE_ABSENT = 0x1000_0000
CODE_BEFORE_NX = 0x1001_0000
"""One executable page each; the page behind it is absent, or present and not executable."""

GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
DF = 1 << 10

# Privileged, emulated by the kernel, or on their way out of the sandbox.
NOT_RUN_IN_USER_MODE = frozenset(
    "sgdt sidt sldt str smsw lgdt lidt lldt ltr lmsw invlpg invpcid invept invvpid vmread vmwrite vmclear vmptrld "
    "vmptrst vmxon xsaves xsaves64 xrstors xrstors64 insb insd insw outsb outsd outsw in out hlt rdmsr wrmsr "
    "syscall sysenter sysret sysexit int int1 int3 into monitor mwait rdpmc wbinvd invd clts swapgs cli sti ud0 ud1 ud2 "
    "wrssd wrssq wrussd wrussq rstorssp clrssbsy".split()
)

# Encodings without a ModRM memory operand that access memory.
IMPLICIT = [
    *(bytes([op]) for op in (*range(0x50, 0x60), 0x9C, 0x9D, 0xC3, 0xCB, 0xC9, 0xD7, 0xCF)),
    b"\x68IIII", b"\x6aI", b"\xe8IIII", b"\xc2II", b"\xcaII", b"\xc8III",
    b"\x0f\xa0", b"\x0f\xa8", b"\x0f\xa1", b"\x0f\xa9", b"\x0f\xf7\xc1", b"\x66\x0f\xf7\xca",
    *(bytes([op]) for op in (*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0))),
]  # fmt: skip
STRING_OPCODES = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))


@dataclass(frozen=True, slots=True)
class Encoding:
    """Prefix and opcode bytes, ModRM.reg (None: no ModRM), bytes of immediate."""

    mnemonic: str
    prefix: bytes
    wide: bool
    opcode: bytes
    reg: int
    immediate: int


@dataclass(frozen=True, slots=True)
class Case:
    code: bytes
    code_la: int
    registers: dict[str, int]
    rflags: int
    vectors: int
    instruction: Instruction
    accesses: tuple[MemoryAccess, ...]

    def __str__(self) -> str:
        touched = ", ".join(
            f"{a.la:#x}+{a.size}{'r' * a.read}{'w' * a.write}({rights(a.la)}{rights(a.la + a.size - 1)})" for a in self.accesses
        )
        return f"{self.instruction.mnemonic} {self.code.hex()} at {self.code_la:#x}: {touched}"


@dataclass(frozen=True, slots=True)
class Expected:
    """A page fault: address and the error bits that the access itself decides."""

    cr2: int
    present: bool
    write: bool
    fetch: bool = False

    @property
    def error(self) -> int:
        return self.present | self.write << 1 | self.fetch << 4


def rights(la: int) -> str:
    page = (la - DATA) // PAGE
    return RIGHTS[page] if 0 <= page < len(RIGHTS) else "?"


def expected(case: Case) -> Expected | None:
    """What the CPU should report, by emu.operands and the rights of the pages."""
    end = case.code_la + len(case.code) - 1
    if case.code_la % PAGE + len(case.code) > PAGE:
        return Expected(end & ~(PAGE - 1), end >= CODE_BEFORE_NX, False, True)
    for part in checks(case.accesses):
        right = rights(part.la)
        if right == "N" or (part.write and right == "R"):
            return Expected(part.la, right == "R", part.write)
    return None


@functools.cache
def encodings() -> dict[str, list[Encoding]]:
    """Every encoding with a ModRM memory operand that decodes, by mnemonic."""
    found: dict[str, list[Encoding]] = {}
    for opcode_map in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
        for opcode in range(256):
            if opcode_map == b"" and (opcode in (0x0F, 0x26, 0x2E, 0x36, 0x3E, 0x9B, 0xF0) or 0x40 <= opcode < 0x50):
                continue
            if opcode_map == b"" and 0x62 <= opcode <= 0x67 and opcode != 0x63:
                continue
            if (opcode_map == b"" and opcode in (0xF2, 0xF3)) or (opcode_map == b"\x0f" and opcode == 0x0F):
                continue
            for prefix in (b"", b"\x66", b"\xf3", b"\xf2"):
                for wide in (False, True):
                    for reg in range(8):
                        _sweep(found, prefix, wide, opcode_map + bytes([opcode]), reg)
    return found


def _sweep(found: dict[str, list[Encoding]], prefix: bytes, wide: bool, opcode: bytes, reg: int) -> None:
    head = prefix + b"\x48" * wide + opcode
    try:
        one = decode(head + bytes([reg << 3 | 3]) + bytes(10), 0)
        other = decode(head + bytes([reg << 3 | 0x83]) + bytes(12), 0)
    except Undecodable:
        return
    if other.size != one.size + 4 or one.mnemonic != other.mnemonic:
        return  # no ModRM
    encoding = Encoding(one.mnemonic, prefix, wide, opcode, reg, one.size - len(head) - 1)
    found.setdefault(one.mnemonic, []).append(encoding)


def cases(seed: int, count: int, *, user: bool) -> Iterator[Case]:
    """`count` cases; for `user`, only instructions that run in user mode and outside the kernel's emulation."""
    rng = random.Random(seed)
    mnemonics = [m for m in sorted(encodings()) if not (user and m in NOT_RUN_IN_USER_MODE)]
    while count:
        case = _modrm_case(rng, rng.choice(mnemonics)) if rng.random() < 0.75 else _implicit_case(rng)
        if case is None or (user and case.instruction.mnemonic in NOT_RUN_IN_USER_MODE):
            continue
        if all(rights(a.la) != "?" and rights(a.la + a.size - 1) != "?" for a in case.accesses):
            count -= 1
            yield case


def _interesting(rng: random.Random, size: int) -> int:
    """An address on, before, across or far from a page boundary."""
    boundary = DATA + PAGE * rng.randrange(1, len(RIGHTS))
    match rng.randrange(4):
        case 0:
            la = boundary - size + rng.randint(-1, 1)
        case 1:
            la = boundary - rng.randrange(size + 2)
        case 2:
            la = boundary + rng.choice((0, 1, 2, 4, 8, 16))
        case _:
            la = boundary + rng.randrange(PAGE)
    return la & ~63 if rng.random() < 0.15 else la & ~15 if rng.random() < 0.4 else la


def _registers(rng: random.Random) -> dict[str, int]:
    registers = {name: _interesting(rng, 8) for name in GPR}
    for name in rng.sample(GPR, 4):
        if name not in ("rsp", "rbp", "rsi", "rdi"):
            registers[name] = rng.choice((rng.getrandbits(64), rng.getrandbits(8), rng.getrandbits(32)))
    registers["fs_base"] = rng.randrange(0, 0x1000_0000, 8)
    registers["gs_base"] = rng.randrange(0, 0x1000_0000)
    return registers


def _case(rng: random.Random, code: bytes, code_la: int, registers: dict[str, int]) -> Case | None:
    try:
        instruction = decode(code, code_la)
    except Undecodable:
        return None
    if instruction.size != len(code):
        return None
    rflags = 2 | DF * rng.randrange(2) | rng.choice((0, 0x40, 0x8D5))
    vectors = rng.choice((0, 0x8080_8080_8080_8080, (1 << 64) - 1)) if "maskmov" not in instruction.mnemonic else (1 << 64) - 1
    touched = accesses(instruction, code_la, registers.__getitem__)
    return Case(code, code_la, registers, rflags, vectors, instruction, touched)


def _place(rng: random.Random, size: int) -> int:
    """Where an instruction goes: seldom across the end of its executable page."""
    page = rng.choice((CODE_BEFORE_ABSENT, CODE_BEFORE_NX))
    if size > 1 and rng.random() < 0.03:
        return page + PAGE - rng.randrange(1, size)
    return page + rng.randrange(PAGE - size + 1)


def _implicit_case(rng: random.Random) -> Case | None:
    template = rng.choice(IMPLICIT)
    registers = _registers(rng)
    prefix = rng.choice((b"", b"", b"", b"\x66")) + rng.choice((b"", b"", b"\x64", b"\x65")) + rng.choice((b"", b"", b"\x67"))
    if template[0] in STRING_OPCODES:
        prefix += rng.choice((b"", b"\xf3", b"\xf2"))
        registers["rcx"] = rng.choice((0, 1, 2, 5, rng.getrandbits(40), 1 << 32))
    if prefix[-1:] in (b"\x64", b"\x65") and template[0] in (*STRING_OPCODES, 0xD7):
        base = registers["fs_base" if b"\x64" in prefix else "gs_base"]
        for name in ("rsi", "rbx"):
            registers[name] = (registers[name] - base) % (1 << 64)
    if template[0] == 0xD7:
        registers["rbx"] = (registers["rbx"] - rng.choice((0, registers["rax"] & 0xFF))) % (1 << 64)
    if template[:1] == b"\x66":
        prefix, template = prefix + b"\x66", template[1:]
    code = prefix + rng.choice((b"", b"", b"\x48")) + bytes(rng.getrandbits(8) if b == ord("I") else b for b in template)
    if template[0] == 0xC8 and rng.random() < 0.7:
        allocated = rng.choice((0, 8, 16, 0x800, 0x1000, 0x2000))
        code = code[:-3] + allocated.to_bytes(2, "little") + bytes([rng.choice((0, 1, 2, 3))])
    return _case(rng, code, _place(rng, len(code)), registers)


def _modrm_case(rng: random.Random, mnemonic: str) -> Case | None:
    encoding = rng.choice(encodings()[mnemonic])
    registers = _registers(rng)
    address32 = rng.random() < 0.1
    segment = rng.choice((None,) * 6 + ("fs_base", "gs_base"))
    prefix = encoding.prefix + b"\x67" * address32 + {None: b"", "fs_base": b"\x64", "gs_base": b"\x65"}[segment]
    # Not before F2 or F3 that selects an SSE instruction: which of two such prefixes counts is undefined.
    if rng.random() < 0.05 and (encoding.prefix == b"" or mnemonic in ("popcnt", "lzcnt", "tzcnt", "crc32")):
        prefix = b"\x66" + prefix
    if mnemonic.startswith("xsave") or mnemonic.startswith("xrstor"):
        registers["rax"], registers["rdx"] = 3, 0
    form = rng.choice(("base", "base", "disp8", "disp32", "sib", "sib8", "sib32", "absolute", "rip"))
    base, index = rng.randrange(16), rng.randrange(16)
    if form in ("absolute", "rip"):
        base = 5
    elif not form.startswith("sib") and base & 7 == 4:
        form = "sib" + form[4:]
        index = 4
    if (form in ("base", "sib") and base & 7 == 5) or (mnemonic.startswith("x") and base in (0, 2)):
        base = 3
    rex = 0x40 | encoding.wide << 3 | rng.randrange(2) << 2 | (form.startswith("sib") and index >> 3) << 1 | base >> 3
    if encoding.prefix == b"" and encoding.opcode[0] in (0x8C, 0x8E):
        rex &= ~4
    disp_size = {"base": 0, "sib": 0, "disp8": 1, "sib8": 1}.get(form, 4)
    scale = rng.randrange(4)
    immediate = rng.randbytes(encoding.immediate)
    head = prefix + (bytes([rex]) if rex != 0x40 or rng.random() < 0.2 else b"") + encoding.opcode
    modrm = {0: 0, 1: 0x40, 4: 0x80}[disp_size] | encoding.reg << 3
    sib = b""
    if form == "rip":
        modrm = encoding.reg << 3 | 5
    elif form == "absolute":
        modrm, sib = encoding.reg << 3 | 4, b"\x25"
    elif form.startswith("sib"):
        modrm, sib = modrm | 4, bytes([scale << 6 | (index & 7) << 3 | base & 7])
    else:
        modrm |= base & 7
    size = len(head) + 1 + len(sib) + disp_size + len(immediate)
    code_la = _place(rng, size)
    disp = rng.randrange(-(1 << 8 * disp_size - 1), 1 << 8 * disp_size - 1) if disp_size else 0

    def encoded() -> bytes:
        return head + bytes([modrm]) + sib + disp.to_bytes(disp_size, "little", signed=True) + immediate

    case = _case(rng, encoded(), code_la, registers)
    if case is None or not case.accesses:
        return case
    explicit = case.accesses[1 if case.instruction.mnemonic == "pop" else 0]
    error = _interesting(rng, explicit.size) - explicit.la  # move the operand there by its base, or its displacement
    if form in ("rip", "absolute"):
        disp += error
        if not -(1 << 31) <= disp < 1 << 31:
            return None
    else:
        name = GPR[base]
        registers[name] = (registers[name] + error) % (1 << 64)
    return _case(rng, encoded(), code_la, registers)
