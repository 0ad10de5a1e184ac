"""Which instructions the machine executes itself, recognised from their bytes.

These change or read state that is ours (control and model-specific registers, descriptor tables, TLB, time, privilege level), and
Unicorn either executes them unseen or wrongly. `candidates` finds where such an instruction could start, at every alignment;
`is_intercepted` decides for an instruction start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_LEGACY_PREFIXES = frozenset((0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0xF0))
MAX_LENGTH = 15

_ONE_BYTE = {0xCF: "iret", 0xCB: "retf", 0xCA: "retf", 0xCD: "int"}
_TWO_BYTE = {
    0x05: "syscall", 0x06: "clts", 0x07: "sysret", 0x20: "mov_from_cr", 0x22: "mov_to_cr", 0x21: "mov_from_dr", 0x23: "mov_to_dr",
    0x30: "wrmsr", 0x31: "rdtsc", 0x32: "rdmsr", 0x33: "rdpmc", 0x34: "sysenter", 0x35: "sysexit", 0xA2: "cpuid",
}
# Executed by Unicorn, which does not check the privilege: ours only where it has to be checked.
PORTS = frozenset(("in", "out", "ins", "outs"))
_ONE_BYTE |= {
    0xE4: "in", 0xE5: "in", 0xEC: "in", 0xED: "in", 0xE6: "out", 0xE7: "out", 0xEE: "out", 0xEF: "out",
    0x6C: "ins", 0x6D: "ins", 0x6E: "outs", 0x6F: "outs",
}
_GROUP_5 = {3: "call_far", 5: "jmp_far"}
_GROUP_6 = {0: "sldt", 1: "str", 2: "lldt", 3: "ltr"}
_GROUP_7 = {0: "sgdt", 1: "sidt", 2: "lgdt", 3: "lidt", 4: "smsw", 6: "lmsw", 7: "invlpg"}
_GROUP_7_REGISTER = {
    0xD0: "xgetbv", 0xD1: "xsetbv", 0xEE: "rdpkru", 0xEF: "wrpkru", 0xF8: "swapgs", 0xF9: "rdtscp",
    0xC8: "monitor", 0xC9: "mwait",
}
_GROUP_9_REGISTER = {6: "rdrand", 7: "rdseed"}
_GROUP_15_F3_REGISTER = {0: "rdfsbase", 1: "rdgsbase", 2: "wrfsbase", 3: "wrgsbase"}

_OPCODE = re.compile(
    rb"(?=[\xca\xcb\xcd\xcf\x6c-\x6f\xe4-\xe7\xec-\xef]"
    rb"|\xff(?:[\x18-\x1f\x28-\x2f\x58-\x5f\x68-\x6f\x98-\x9f\xa8-\xaf]|\Z)"
    rb"|\x0f(?:[\x00\x01\x05-\x07\x20-\x23\x30-\x35\xa2\xc7\xae]|\x38\x82|\x38\Z|\Z))",
    re.DOTALL,
)
_PREFIX_BYTES = _LEGACY_PREFIXES | frozenset(range(0x40, 0x50))


@dataclass(frozen=True, slots=True)
class PrivilegedInstruction:
    """An instruction that the machine executes itself. `modrm` is None where there is none; `length` excludes its operands."""

    name: str
    prefixes: frozenset[int]
    rex: int
    modrm: int | None
    opcode_at: int

    @property
    def register_form(self) -> bool:
        """True when ModRM names a register."""
        return self.modrm is not None and self.modrm >> 6 == 3

    @property
    def rm(self) -> int:
        """Number of the register in ModRM.rm, with REX.B."""
        assert self.modrm is not None
        return self.modrm & 7 | (self.rex & 1) << 3

    @property
    def reg(self) -> int:
        """Number of the register in ModRM.reg, with REX.R."""
        assert self.modrm is not None
        return self.modrm >> 3 & 7 | (self.rex & 4) << 1

    @property
    def wide(self) -> bool:
        """REX.W."""
        return bool(self.rex & 8)


def candidates(page: bytes) -> list[int]:
    """Offsets in a page at which an intercepted instruction may start, prefixes included, ascending."""
    found: set[int] = set()
    for match in _OPCODE.finditer(page):
        at = match.start()
        found.add(at)
        while at and page[at - 1] in _PREFIX_BYTES and match.start() - at < MAX_LENGTH - 1:
            at -= 1
            found.add(at)
    # An instruction whose opcode lies in the next page may start in the prefixes that end this one.
    at = len(page)
    while at and page[at - 1] in _PREFIX_BYTES and len(page) - at < MAX_LENGTH - 1:
        at -= 1
        found.add(at)
    return sorted(found)


@lru_cache(1024)
def recognise(code: bytes) -> PrivilegedInstruction | None:
    """The intercepted instruction that `code` starts with, None for any other (or when its bytes are cut short)."""
    return _recognise(code)


def _recognise(code: bytes) -> PrivilegedInstruction | None:
    prefixes: set[int] = set()
    rex = 0
    at = 0
    for byte in code[:MAX_LENGTH]:
        if byte in _LEGACY_PREFIXES:
            prefixes.add(byte)
            rex = 0
        elif byte & 0xF0 == 0x40:
            rex = byte
        else:
            break
        at += 1
    else:
        return None
    name, modrm = _name(code[at:], frozenset(prefixes))
    return None if name is None else PrivilegedInstruction(name, frozenset(prefixes), rex, modrm, at)


def _name(opcode: bytes, prefixes: frozenset[int]) -> tuple[str | None, int | None]:
    if opcode[0] in _ONE_BYTE:
        return _ONE_BYTE[opcode[0]], None
    if opcode[0] == 0xFF:
        if len(opcode) < 2 or opcode[1] >> 6 == 3:
            return None, None
        name = _GROUP_5.get(opcode[1] >> 3 & 7)
        return name, opcode[1] if name is not None else None
    if opcode[0] != 0x0F or len(opcode) < 2:
        return None, None
    second = opcode[1]
    modrm = opcode[2] if len(opcode) > 2 else None
    if second in _TWO_BYTE:
        return _TWO_BYTE[second], modrm if second in (0x20, 0x21, 0x22, 0x23) else None
    if modrm is None:
        return None, None
    digit = modrm >> 3 & 7
    register = modrm >> 6 == 3
    name = None
    if second == 0x00:
        name = _GROUP_6.get(digit)
    elif second == 0x01:
        name = _GROUP_7_REGISTER.get(modrm) if register and digit != 4 and digit != 6 else _GROUP_7.get(digit)
    elif second == 0xC7 and register:
        name = _GROUP_9_REGISTER.get(digit)
        if name == "rdseed" and 0xF3 in prefixes:
            name = "rdpid"
    elif second == 0xAE and register and 0xF3 in prefixes:
        name = _GROUP_15_F3_REGISTER.get(digit)
    elif second == 0x38 and modrm == 0x82 and 0x66 in prefixes and len(opcode) > 3 and opcode[3] >> 6 != 3:
        return "invpcid", opcode[3]
    return name, modrm if name is not None else None


def is_intercepted(code: bytes) -> bool:
    """True when the instruction that `code` starts with is executed by the machine itself."""
    return _recognise(code) is not None
