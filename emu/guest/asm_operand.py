"""Operands of the .asm dialect: parsed into registers, immediates and memory, and spelled again for Keystone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from emu.guest.asm_expression import Linear, Malformed, parse_expression

SIZES = {"byte": 1, "word": 2, "dword": 4, "qword": 8, "tbyte": 10, "oword": 16, "xmmword": 16, "ymmword": 32}
_SPELLED = {1: "byte", 2: "word", 4: "dword", 8: "qword", 10: "tbyte", 16: "xmmword", 32: "ymmword"}

_GP = (
    "rax rbx rcx rdx rsi rdi rbp rsp eax ebx ecx edx esi edi ebp esp ax bx cx dx si di bp sp "
    "al bl cl dl ah bh ch dh sil dil bpl spl"
).split()
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
REGISTER_SIZE: dict[str, int] = {}
for _name in _GP:
    REGISTER_SIZE[_name] = (
        8 if _name[0] == "r" else 4 if _name[0] == "e" else 1 if _name[-1] in "lh" else 2
    )
for _number in range(8, 16):
    REGISTER_SIZE |= {f"r{_number}": 8, f"r{_number}d": 4, f"r{_number}w": 2, f"r{_number}b": 1}
ADDRESS_REGISTERS = frozenset(r for r, size in REGISTER_SIZE.items() if size in (4, 8)) | {"rip", "eip"}
REGISTERS = (
    frozenset(REGISTER_SIZE)
    | frozenset(SEGMENTS)
    | frozenset(f"{bank}{n}" for bank in ("xmm", "ymm", "cr", "dr") for n in range(16))
    | frozenset(f"{bank}{n}" for bank in ("mm", "st") for n in range(8))
)

# What Keystone sees instead of an address that only the linker knows. Wide enough that no shorter form is chosen.
PLACEHOLDER32 = 0x12345678
PLACEHOLDER64 = 0x123456789ABCDEF0


@dataclass(frozen=True, slots=True)
class Reg:
    """A register operand."""

    name: str


@dataclass(frozen=True, slots=True)
class Imm:
    """An immediate; symbolic when its value has terms."""

    value: Linear


@dataclass(frozen=True, slots=True)
class Mem:
    """[segment: base + index * scale + displacement] of `size` bytes (None: not said)."""

    size: int | None
    segment: str | None
    base: str | None
    index: str | None
    scale: int
    displacement: Linear


Operand = Reg | Imm | Mem
Names = Callable[[str], Linear]


def parse_operand(text: str, names: Names) -> Operand:
    """One operand. Raises Malformed."""
    rest = text.strip()
    size: int | None = None
    match = re.match(r"(\w+)\s+(?:ptr\s*)?(?=[\[\w])|(\w+)\s*(?=\[)", rest, re.ASCII | re.IGNORECASE)
    if match:
        size = SIZES.get((match[1] or match[2]).lower())
        if size is not None:
            rest = rest[match.end() :].strip()
    segment: str | None = None
    match = re.match(r"([c-gs]s)\s*:\s*(?=\[)", rest, re.ASCII | re.IGNORECASE)
    if match:
        segment = match[1].lower()
        rest = rest[match.end() :]
    if rest.startswith("["):
        if not rest.endswith("]") or "[" in rest[1:]:
            raise Malformed(f"malformed memory operand {text.strip()[:60]!r}")
        return _memory(rest[1:-1], size, segment, names)
    if size is not None or segment is not None:
        raise Malformed(f"a size or segment stands only before [...], not in {text.strip()[:60]!r}")
    if rest.lower() in REGISTERS:
        return Reg(rest.lower())
    return Imm(parse_expression(re.sub(r"^offset\s+", "", rest, flags=re.IGNORECASE), names))


def _memory(inside: str, size: int | None, segment: str | None, names: Names) -> Mem:
    match = re.match(r"\s*([c-gs]s)\s*:", inside, re.ASCII | re.IGNORECASE)
    if match:
        if segment is not None:
            raise Malformed(f"two segments in [{inside[:60]}]")
        segment = match[1].lower()
        inside = inside[match.end() :]
    if segment is not None and segment not in SEGMENTS:
        raise Malformed(f"unknown segment {segment!r}")
    match = re.match(r"\s*rel\s+", inside, re.IGNORECASE)
    relative = bool(match)
    if match:
        inside = inside[match.end() :]
    registers: list[tuple[str, int]] = []
    constant: list[str] = []
    for sign, term in _terms(inside):
        found = _register_term(term)
        if found is None:
            constant.append(f"{sign}({term})")
        elif sign == "-":
            raise Malformed(f"a register cannot be subtracted in [{inside[:60]}]")
        else:
            registers.append(found)
    displacement = parse_expression(" ".join(constant), names) if constant else Linear()
    base, index, scale = _base_index(registers, inside)
    if base is None and index is None and (relative or displacement.terms) and segment is None:
        base = "rip"
    if relative and (base != "rip" or not displacement.terms):
        raise Malformed(f"rel needs a symbol and no register in [{inside[:60]}]")
    return Mem(size, segment, base, index, scale, displacement)


def _terms(inside: str) -> list[tuple[str, str]]:
    """Split at top-level + and -: (sign, term)."""
    terms: list[tuple[str, str]] = []
    sign, depth, start = "+", 0, 0
    for at, char in enumerate(inside):
        depth += (char == "(") - (char == ")")
        if char in "+-" and depth == 0 and inside[start:at].strip():
            if inside[start:at].rstrip()[-1:] in tuple("*/%&|^~<>(") and inside[start:at].rstrip():
                continue
            terms.append((sign, inside[start:at].strip()))
            sign, start = char, at + 1
        elif char == "-" and depth == 0:
            sign = "-" if sign == "+" else "+"
            start = at + 1
        elif char == "+" and depth == 0:
            start = at + 1
    if not inside[start:].strip():
        raise Malformed(f"a term is missing in [{inside[:60]}]")
    terms.append((sign, inside[start:].strip()))
    return terms


def _register_term(term: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(\w+)(?:\s*\*\s*([1248]))?|([1248])\s*\*\s*(\w+)", term, re.ASCII)
    if not match:
        return None
    name = (match[1] or match[4]).lower()
    if name not in ADDRESS_REGISTERS:
        if name in REGISTERS:
            raise Malformed(f"register {name} cannot address memory")
        return None
    scale = match[2] or match[3]
    return name, int(scale) if scale else 0


def _base_index(registers: list[tuple[str, int]], inside: str) -> tuple[str | None, str | None, int]:
    if len(registers) > 2:
        raise Malformed(f"more than two registers in [{inside[:60]}]")
    plain = [name for name, scale in registers if not scale]
    scaled = [(name, scale) for name, scale in registers if scale]
    if len(scaled) > 1:
        raise Malformed(f"two scaled registers in [{inside[:60]}]")
    base: str | None
    index: str | None
    if scaled:
        base, (index, scale) = (plain[0] if plain else None), scaled[0]
    else:
        base, index, scale = (plain[0] if plain else None), (plain[1] if len(plain) > 1 else None), 1
        if index in ("rsp", "esp"):
            base, index = index, base
    if index in ("rsp", "esp", "rip", "eip") or (base in ("rip", "eip") and index):
        raise Malformed(f"register cannot be an index in [{inside[:60]}]")
    if index and base and REGISTER_SIZE[index] != REGISTER_SIZE[base]:
        raise Malformed(f"registers of different sizes in [{inside[:60]}]")
    return base, index, scale


def spell(operand: Operand, immediate: int = PLACEHOLDER32) -> str:
    """The operand in Keystone's Intel syntax, symbols replaced by placeholders (`immediate` for a symbolic immediate)."""
    if isinstance(operand, Reg):
        return f"st({operand.name[2]})" if operand.name.startswith("st") else operand.name
    if isinstance(operand, Imm):
        return str(immediate if operand.value.terms else operand.value.constant)
    parts = [operand.base] if operand.base else []
    if operand.index:
        parts.append(f"{operand.index}*{operand.scale}")
    displacement = PLACEHOLDER32 if operand.displacement.terms else operand.displacement.constant
    address = "+".join(parts)
    if displacement or not parts:
        address += f"{'-' if displacement < 0 else '+'}{abs(displacement)}" if parts else str(displacement)
    prefix = f"{_SPELLED[operand.size]} ptr " if operand.size else ""
    return f"{prefix}{operand.segment + ':' if operand.segment else ''}[{address}]"
