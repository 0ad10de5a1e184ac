"""printf as the kernel has it (v6.12 lib/vsprintf.c; formats: Documentation/core-api/printk-formats.rst).

Arguments come one u64 at a time from a callable, memory through another. Text is one character a byte (Latin-1).

Pointers: %p (hashed), %px, %pK, %pS %ps %pB, %pe, %ph with separators, %pa, %pGg. Any other letter after %p is taken for a
plain %p, as the kernel does with letters that it does not know.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntFlag
from hashlib import blake2b

from emu.kernel.gfp import gfp_text

PAGE_SIZE = 4096
MAX_ERRNO = 4095
_U64 = (1 << 64) - 1
_POINTER_WIDTH = 16

NextArgument = Callable[[], int]
ReadBytes = Callable[[int, int], bytes | None]
Symbolize = Callable[[int], str | None]

# Names that differ from Python's errno.errorcode on Linux, and those that only the kernel has (include/linux/errno.h).
_ERRNAMES = {**errno.errorcode, 11: "EAGAIN", 35: "EDEADLK", 95: "EOPNOTSUPP"} | {
    512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 515: "ENOIOCTLCMD",
    516: "ERESTART_RESTARTBLOCK", 517: "EPROBE_DEFER", 518: "EOPENSTALE", 519: "ENOPARAM", 524: "ENOTSUPP",
}  # fmt: skip


class Flag(IntFlag):
    """Flags of a conversion (enum of struct printf_spec)."""

    SIGN = 1
    LEFT = 2
    PLUS = 4
    SPACE = 8
    ZEROPAD = 16
    SMALL = 32
    SPECIAL = 64


_FLAG_CHARACTERS = {"-": Flag.LEFT, "+": Flag.PLUS, " ": Flag.SPACE, "#": Flag.SPECIAL, "0": Flag.ZEROPAD}


_NO_FLAGS = Flag(0)


@dataclass(frozen=True, slots=True)
class Spec:
    """One conversion: width and precision are -1 when absent."""

    flags: Flag = _NO_FLAGS
    width: int = -1
    precision: int = -1
    base: int = 10


def is_err_value(value: int) -> bool:
    """Whether a pointer is an error number in disguise (IS_ERR_VALUE)."""
    return value > _U64 - MAX_ERRNO


def number(value: int, spec: Spec) -> str:
    """An integer by flags, width, precision and base; with SIGN `value` is taken as signed 64 bits."""
    width, precision, flags = spec.width, spec.precision, spec.flags
    sign = ""
    if flags & Flag.SIGN:
        if value >> 63 & 1:
            sign = "-"
            value = -value & _U64
        elif flags & Flag.PLUS:
            sign = "+"
        elif flags & Flag.SPACE:
            sign = " "
    prefix = ""
    if flags & Flag.SPECIAL and spec.base != 10:
        prefix = ("0x" if flags & Flag.SMALL else "0X") if spec.base == 16 else ("0" if value else "")
    digits = {8: f"{value:o}", 10: f"{value:d}", 16: f"{value:x}" if flags & Flag.SMALL else f"{value:X}"}[spec.base]
    digits = digits.rjust(precision, "0")
    room = max(0, width - len(sign) - len(prefix) - len(digits))
    if flags & Flag.LEFT:
        return sign + prefix + digits + " " * room
    if flags & Flag.ZEROPAD:
        return sign + prefix + "0" * room + digits
    return " " * room + sign + prefix + digits


def widen(text: str, spec: Spec) -> str:
    """A string by precision and width (string_nocheck)."""
    if spec.precision >= 0:
        text = text[: spec.precision]
    return text.ljust(spec.width) if spec.flags & Flag.LEFT else text.rjust(spec.width)


def error_string(text: str, spec: Spec) -> str:
    """What stands for an argument that cannot be printed, at most 16 characters unless a precision says otherwise."""
    return widen(text, spec if spec.precision >= 0 else replace(spec, precision=_POINTER_WIDTH))


def errname(error: int) -> str | None:
    """"-ENOMEM" for 12 or -12; None for a number without a name (v6.12 lib/errname.c)."""
    name = _ERRNAMES.get(abs(error))
    return f"-{name}" if name else None


class Formatter:
    """vsnprintf on one machine.

    `read_bytes(la, n)` reads guest memory and gives None where it cannot: then "(efault)" is printed; an exception that
    it raises ends the formatting, as a fault inside vsnprintf would. `symbolize(la)` gives "name+0x1f/0x40 [module]" or
    None. `hash_key` seeds the hash that %p prints. `warn` is told of format strings that the kernel WARNs about.
    """

    def __init__(
        self,
        read_bytes: ReadBytes,
        symbolize: Symbolize = lambda la: None,
        *,
        hash_key: bytes = b"",
        no_hash_pointers: bool = False,
        kptr_restrict: int = 0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.read_bytes = read_bytes
        self.symbolize = symbolize
        self.hash_key = hash_key
        self.no_hash_pointers = no_hash_pointers
        self.kptr_restrict = kptr_restrict
        self.warn = warn

    def format(self, fmt: str, next_argument: NextArgument) -> str:
        """The whole text. It ends early at a conversion that the kernel does not support, such as %n or %f."""
        out: list[str] = []
        i = 0
        while True:
            percent = fmt.find("%", i)
            if percent < 0:
                out.append(fmt[i:])
                return "".join(out)
            out.append(fmt[i:percent])
            text, i = self._conversion(fmt, percent + 1, next_argument)
            if text is None:
                return "".join(out)
            out.append(text)

    def vsnprintf(self, size: int, fmt: str, next_argument: NextArgument) -> tuple[str, int]:
        """What fits a buffer of `size` bytes with its NUL, and the length that the whole text has."""
        text = self.format(fmt, next_argument)
        return text[: max(0, size - 1)], len(text)

    def _conversion(self, fmt: str, i: int, next_argument: NextArgument) -> tuple[str | None, int]:
        """The text of the conversion whose '%' is at i - 1 (None: unsupported), and where the format goes on."""
        flags = _NO_FLAGS
        while i < len(fmt) and fmt[i] in _FLAG_CHARACTERS:
            flags |= _FLAG_CHARACTERS[fmt[i]]
            i += 1
        width, i = _count(fmt, i, next_argument)
        if width < -1 or (width == -1 and fmt[i - 1 : i] == "*"):
            width = -width
            flags |= Flag.LEFT
        precision = -1
        if fmt[i : i + 1] == ".":
            i += 1
            precision, after = _count(fmt, i, next_argument)
            # "%.s" has no precision at all; a negative one from an argument is 0.
            precision = max(0, precision) if after > i else -1
            i = after
        qualifier = ""
        if fmt[i : i + 1] and fmt[i] in "hlLzt":
            qualifier = fmt[i]
            i += 1
            if fmt[i : i + 1] == qualifier and qualifier in "hl":
                qualifier += qualifier
                i += 1
        spec = Spec(flags, width, precision)
        kind = fmt[i : i + 1]
        i += 1
        if kind == "c":
            character = chr(next_argument() & 0xFF)
            return (character.ljust(width) if flags & Flag.LEFT else character.rjust(width)), i
        if kind == "s":
            return self._string(next_argument(), spec), i
        if kind == "p":
            text = self._pointer(fmt[i : i + 4], next_argument() & _U64, spec)
            while i < len(fmt) and fmt[i].isalnum():
                i += 1
            return text, i
        if kind == "%":
            return "%", i
        if not kind or kind not in "oxXdiu":
            if self.warn is not None:
                self.warn(f"Please remove unsupported %{kind or chr(0)} in format string")
            return None, i
        return _integer(kind, qualifier, spec, next_argument()), i

    def _string(self, la: int, spec: Spec) -> str:
        la &= _U64
        bad = _check_pointer(la, spec)
        if bad is not None:
            return bad
        limit = spec.precision if spec.precision >= 0 else 1 << 31
        parts: list[bytes] = []
        while limit > 0:
            # Up to the end of the page: what stands behind the NUL need not be mapped.
            step = min(limit, PAGE_SIZE - la % PAGE_SIZE)
            data = self.read_bytes(la, step)
            if data is None:
                return error_string("(efault)", spec)
            end = data.find(0)
            if end >= 0:
                parts.append(data[:end])
                break
            parts.append(data)
            la += step
            limit -= step
        return widen(b"".join(parts).decode("latin-1"), spec)

    def _pointer(self, letters: str, value: int, spec: Spec) -> str:
        kind = letters[:1]
        if kind and kind in "SsB":
            return widen(self._symbol(kind, value), spec)
        if kind == "h":
            return self._hex(letters[1:2], value, spec)
        if kind == "K":
            return _pointer_string(0, spec) if self.kptr_restrict else self._default_pointer(value, spec)
        if kind == "x":
            return _pointer_string(value, spec)
        if kind == "e" and is_err_value(value):
            name = errname(value - (1 << 64))
            return widen(name, spec) if name else number(value, replace(spec, flags=spec.flags | Flag.SIGN))
        if kind == "a":
            return self._address(value, spec)
        if kind == "G":
            return self._flags(letters[1:2], value, spec)
        return self._default_pointer(value, spec)

    def _default_pointer(self, value: int, spec: Spec) -> str:
        if value and not is_err_value(value) and not self.no_hash_pointers:
            value = self.hashed(value)
        return _pointer_string(value, spec)

    def hashed(self, value: int) -> int:
        """The 32 bits that stand for a pointer in this run."""
        digest = blake2b(value.to_bytes(8, "little"), digest_size=4, key=self.hash_key[:64])
        return int.from_bytes(digest.digest(), "little")

    def _symbol(self, kind: str, value: int) -> str:
        if kind == "B":
            # A return address: the call is the instruction before it, which may be its function's last.
            text = self.symbolize(value - 1 & _U64)
            return f"{value:#x}" if text is None else _shift_offset(text, 1)
        text = self.symbolize(value)
        if text is None:
            return f"{value:#x}"
        if kind == "S":
            return text
        name, _, rest = text.partition("+")
        _, bracket, module = rest.partition(" [")
        return name + bracket + module

    def _hex(self, separator: str, la: int, spec: Spec) -> str:
        if spec.width == 0:
            return ""
        bad = _check_pointer(la, spec)
        if bad is not None:
            return bad
        data = self.read_bytes(la, min(max(spec.width, 1), 64))
        if data is None:
            return error_string("(efault)", spec)
        return {"C": ":", "D": "-", "N": ""}.get(separator, " ").join(f"{byte:02x}" for byte in data)

    def _word(self, la: int, size: int, spec: Spec) -> int | str:
        bad = _check_pointer(la, spec)
        if bad is not None:
            return bad
        data = self.read_bytes(la, size)
        return error_string("(efault)", spec) if data is None else int.from_bytes(data, "little")

    def _address(self, la: int, spec: Spec) -> str:
        value = self._word(la, 8, spec)
        return value if isinstance(value, str) else f"0x{value:016x}"

    def _flags(self, kind: str, la: int, spec: Spec) -> str:
        if kind != "g":
            return error_string("(%pG?)", spec)
        value = self._word(la, 4, spec)
        return value if isinstance(value, str) else gfp_text(value)


def _count(fmt: str, i: int, next_argument: NextArgument) -> tuple[int, int]:
    """A width or precision at fmt[i]: digits, or '*' for an int argument; -1 when there is none."""
    if fmt[i : i + 1] == "*":
        value = next_argument() & 0xFFFFFFFF
        return value - (value >> 31 << 32), i + 1
    start = i
    while i < len(fmt) and fmt[i] in "0123456789":
        i += 1
    return (int(fmt[start:i]) if i > start else -1), i


_QUALIFIER_BITS = {"": 32, "h": 16, "hh": 8, "l": 64, "ll": 64, "L": 64, "z": 64, "t": 64}
_BASES = {"o": 8, "x": 16, "X": 16, "d": 10, "i": 10, "u": 10}


def _integer(kind: str, qualifier: str, spec: Spec, value: int) -> str:
    flags = spec.flags
    if kind == "x":
        flags |= Flag.SMALL
    bits = _QUALIFIER_BITS[qualifier]
    value &= (1 << bits) - 1
    if kind in "di":
        flags |= Flag.SIGN
        if value >> (bits - 1):
            value = (value - (1 << bits)) & _U64
    return number(value, replace(spec, flags=flags, base=_BASES[kind]))


def _pointer_string(value: int, spec: Spec) -> str:
    flags = spec.flags | Flag.SMALL
    if spec.width == -1:
        return number(value, replace(spec, base=16, width=_POINTER_WIDTH, flags=flags | Flag.ZEROPAD))
    return number(value, replace(spec, base=16, flags=flags))


def _check_pointer(la: int, spec: Spec) -> str | None:
    """What to print instead of reading at `la`, for pointers that are bad at first sight."""
    if not la:
        return error_string("(null)", spec)
    if la < PAGE_SIZE or is_err_value(la):
        return error_string("(efault)", spec)
    return None


def _shift_offset(text: str, by: int) -> str:
    name, plus, rest = text.partition("+")
    offset, slash, tail = rest.partition("/")
    return f"{name}{plus}{int(offset, 16) + by:#x}{slash}{tail}"
