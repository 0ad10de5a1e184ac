"""Address expressions of directives: numbers, symbols, registers, [the u64 at an address], + and -."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

REGISTERS = frozenset(
    ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cs", "ss"]
    + [f"r{n}" for n in range(8, 16)]
    + ["fs_base", "gs_base", "kernel_gs_base"]
)

MASK64 = (1 << 64) - 1
_MAX_LENGTH = 400
_MAX_DEPTH = 8
_TOKEN = re.compile(r"\s*(?:(0[xX][0-9a-fA-F]{1,32}|0[bB][01]{1,128}|[0-9]{1,40})|([A-Za-z_.$][\w.$]*)|(.))", re.ASCII)


@dataclass(frozen=True, slots=True)
class Number:
    """A constant."""

    value: int


@dataclass(frozen=True, slots=True)
class Name:
    """A symbol's address or, for the name of a register, that register's value."""

    name: str


@dataclass(frozen=True, slots=True)
class Load:
    """The u64 stored at an address."""

    address: Sum


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms with their signs (1 or -1), added modulo 2**64."""

    terms: tuple[tuple[int, Number | Name | Load], ...]
    text: str

    def __str__(self) -> str:
        return self.text


def parse_address(text: str) -> Sum:
    """Parse an address expression. Raises ValueError that says what is wrong with it."""
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"expression of {len(text)} characters is too long")
    tokens = [m.group(0).strip() for m in _TOKEN.finditer(text.strip())]
    tokens.reverse()
    result = _sum(tokens, 0)
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]!r} in {text.strip()!r}")
    return result


def _sum(tokens: list[str], depth: int) -> Sum:
    if depth > _MAX_DEPTH:
        raise ValueError("expression is nested too deeply")
    terms: list[tuple[int, Number | Name | Load]] = []
    spelled: list[str] = []
    sign = 1
    if tokens and tokens[-1] in "+-":
        spelled.append(tokens[-1])
        sign = 1 if tokens.pop() == "+" else -1
    while True:
        term, text = _term(tokens, depth)
        terms.append((sign, term))
        spelled.append(text)
        if not tokens or tokens[-1] not in ("+", "-"):
            return Sum(tuple(terms), "".join(spelled))
        spelled.append(tokens[-1])
        sign = 1 if tokens.pop() == "+" else -1


def _term(tokens: list[str], depth: int) -> tuple[Number | Name | Load, str]:
    if not tokens:
        raise ValueError("expression ends where a number, symbol, register or [address] must stand")
    token = tokens.pop()
    if token[0].isdigit():
        try:
            return Number(int(token, 0)), token
        except ValueError:
            raise ValueError(f"{token!r} is not a number") from None
    if token == "[":
        inner = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != "]":
            raise ValueError("'[' is not closed")
        return Load(inner), f"[{inner}]"
    if re.fullmatch(r"[A-Za-z_.$][\w.$]*", token, re.ASCII):
        return Name(token), token
    raise ValueError(f"unexpected {token!r} in an expression")


def evaluate(
    expression: Sum,
    symbol: Callable[[str], int | None],
    register: Callable[[str], int | None],
    read_u64: Callable[[int], int],
) -> int:
    """Value modulo 2**64. A register's name means the register, never a symbol.

    Raises LookupError for an unknown symbol or a register without a value; what `read_u64` raises passes through.
    """
    total = 0
    for sign, term in expression.terms:
        if isinstance(term, Number):
            value = term.value
        elif isinstance(term, Load):
            value = read_u64(evaluate(term.address, symbol, register, read_u64))
        else:
            is_register = term.name in REGISTERS
            found = register(term.name) if is_register else symbol(term.name)
            if found is None:
                raise LookupError(f"{'no value of register' if is_register else 'unknown symbol'} {term.name}")
            value = found
        total += sign * value
    return total & MASK64
