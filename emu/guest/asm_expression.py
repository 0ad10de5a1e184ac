"""Constant and symbol expressions of the .asm dialect: integers plus at most linear combinations of symbols."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"\s*(?:(0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9][0-9_]*(?![0-9A-Za-z_]))"
    r"|([A-Za-z_.$@?][\w.$@?]*)"
    r"|('(?:[^'\\\n]|\\.){1,8}'|\"(?:[^\"\\\n]|\\.){1,8}\")"
    r"|(<<|>>|[-+*/%&|^~()]))",
    re.ASCII,
)
_LIMIT = 1 << 128
_MAX_DEPTH = 32
_MAX_TERMS = 16
_ESCAPES = {"n": 10, "t": 9, "r": 13, "0": 0, "\\": 92, "'": 39, '"': 34, "e": 27}


class Malformed(Exception):
    """A line that breaks the syntax; the text says how."""


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + sum of coefficient * symbol."""

    constant: int = 0
    terms: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        """Whether no symbol is left."""
        return not self.terms

    def plus(self, other: Linear, sign: int) -> Linear:
        """Self + sign * other."""
        terms = dict(self.terms)
        for name, factor in other.terms.items():
            terms[name] = terms.get(name, 0) + sign * factor
            _bound(terms[name])
            if not terms[name]:
                del terms[name]
        if len(terms) > _MAX_TERMS:
            raise Malformed(f"expression holds more than {_MAX_TERMS} symbols")
        return Linear(_bound(self.constant + sign * other.constant), terms)

    def single(self) -> str | None:
        """The symbol when the expression is one symbol + constant, else None."""
        if len(self.terms) == 1:
            ((name, factor),) = self.terms.items()
            if factor == 1:
                return name
        return None

    def difference(self) -> tuple[str, str] | None:
        """(a, b) when the expression is a - b + constant, else None."""
        if sorted(self.terms.values()) == [-1, 1]:
            by_factor = {factor: name for name, factor in self.terms.items()}
            return by_factor[1], by_factor[-1]
        return None


def _bound(value: int) -> int:
    if not -_LIMIT < value < _LIMIT:
        raise Malformed("expression exceeds 128 bits")
    return value


def unescape(text: str) -> bytes:
    """Bytes of a quoted string's inside: UTF-8, with \\n \\t \\r \\0 \\e \\\\ \\' \\" and \\xHH."""
    out = bytearray()
    at = 0
    while at < len(text):
        char = text[at]
        if char != "\\":
            out += char.encode("utf-8", "surrogateescape")
            at += 1
            continue
        code = text[at + 1 : at + 2]
        if code == "x" and re.fullmatch(r"[0-9a-fA-F]{2}", text[at + 2 : at + 4]):
            out.append(int(text[at + 2 : at + 4], 16))
            at += 4
        elif code in _ESCAPES and code:
            out.append(_ESCAPES[code])
            at += 2
        else:
            raise Malformed(f"unknown escape \\{code} in a string")
    return bytes(out)


def parse_expression(text: str, name: Callable[[str], Linear]) -> Linear:
    """Evaluate `text`; `name` gives each identifier (`$` included) its value. Raises Malformed."""
    tokens: list[tuple[str, str]] = []
    at = 0
    stripped = text.strip()
    if not stripped:
        raise Malformed("an expression is missing")
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if not match or match.end() == at:
            raise Malformed(f"cannot read {stripped[at : at + 20]!r} in {stripped[:60]!r}")
        kind = ("number", "name", "char", "op")[(match.lastindex or 1) - 1]
        tokens.append((kind, match[match.lastindex or 0]))
        at = match.end()
        while at < len(stripped) and stripped[at].isspace():
            at += 1
    parser = _Parser(tokens, name, stripped)
    value = parser.binary(0, 0)
    if parser.at != len(tokens):
        raise Malformed(f"unexpected {tokens[parser.at][1]!r} in {stripped[:60]!r}")
    return value


_LEVELS = (("|",), ("^",), ("&",), ("<<", ">>"), ("+", "-"), ("*", "/", "%"))


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]], name: Callable[[str], Linear], text: str) -> None:
        self.tokens = tokens
        self.name = name
        self.text = text
        self.at = 0

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def binary(self, level: int, depth: int) -> Linear:
        if depth > _MAX_DEPTH:
            raise Malformed("expression is nested too deeply")
        if level == len(_LEVELS):
            return self.unary(depth)
        value = self.binary(level + 1, depth)
        while self._peek()[0] == "op" and self._peek()[1] in _LEVELS[level]:
            op = self._peek()[1]
            self.at += 1
            value = _combine(op, value, self.binary(level + 1, depth))
        return value

    def unary(self, depth: int) -> Linear:
        if depth > _MAX_DEPTH:
            raise Malformed("expression is nested too deeply")
        kind, token = self._peek()
        self.at += 1
        if kind == "number":
            try:
                return Linear(_bound(int(token, 0)))
            except ValueError:
                raise Malformed(f"{token!r} is not a number") from None
        if kind == "char":
            return Linear(int.from_bytes(unescape(token[1:-1])[:16], "little"))
        if kind == "name":
            return self.name(token)
        if token == "(":
            value = self.binary(0, depth + 1)
            if self._peek()[1] != ")":
                raise Malformed(f"'(' is not closed in {self.text[:60]!r}")
            self.at += 1
            return value
        if token in ("-", "+"):
            return Linear().plus(self.unary(depth + 1), -1 if token == "-" else 1)
        if token == "~":
            return Linear(~_constant(self.unary(depth + 1), "~"))
        raise Malformed(f"unexpected {token or 'end'!r} in {self.text[:60]!r}")


def _constant(value: Linear, op: str) -> int:
    if not value.is_constant:
        raise Malformed(f"'{op}' needs constants; a symbol's address is not known yet")
    return value.constant


def _combine(op: str, left: Linear, right: Linear) -> Linear:
    if op in ("+", "-"):
        return left.plus(right, 1 if op == "+" else -1)
    a, b = _constant(left, op), _constant(right, op)
    if op in ("/", "%") and b == 0:
        raise Malformed("division by zero")
    if op in ("<<", ">>") and not 0 <= b <= 127:
        raise Malformed(f"shift by {b} is not within 0 to 127")
    result = {
        "*": lambda: a * b,
        "/": lambda: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
        "%": lambda: a - abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) * b,
        "<<": lambda: a << b,
        ">>": lambda: a >> b,
        "&": lambda: a & b,
        "|": lambda: a | b,
        "^": lambda: a ^ b,
    }[op]()
    return Linear(_bound(result))
