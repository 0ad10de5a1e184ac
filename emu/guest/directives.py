"""The header comment of a guest: which machine it wants and what it expects to happen.

    ; vmemu: levels=5 memory=256M tlb=infinite
    ; expect: fault #PF error=0x0000 address=[p]+0x1000
    ; expect: oops "BUG: unable to handle page fault"

The comments that a file begins with are its header. In .asm they start with `;`, in .c and .S they are // or /* */. Any other
line of the header is prose. docs/guests.md has the syntax in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from emu.guest.address import Sum, parse_address
from emu.guest.error import GuestError

VECTORS = {
    "#DE": 0, "#DB": 1, "NMI": 2, "#BP": 3, "#OF": 4, "#BR": 5, "#UD": 6, "#NM": 7, "#DF": 8, "#TS": 10, "#NP": 11,
    "#SS": 12, "#GP": 13, "#PF": 14, "#MF": 16, "#AC": 17, "#MC": 18, "#XM": 19,
}  # fmt: skip
VECTOR_NAMES = {number: name for name, number in VECTORS.items()}
ENDS = ("returned", "oops", "panic", "signal", "halted", "triple fault", "livelock", "bus error", "limit", "deadlock")

_PLAIN_ENDS = ("limit", "triple-fault", "livelock", "bus-error", "halted", "signal", "deadlock")
# What a run counts, by the names that `expect: count` knows.
COUNTS = ("ipi", "flush", "full-flush", "invlpg", "invlpgb", "switch")
_MAX_LINE = 1000


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """The machine a guest asks for; None leaves the choice to whoever runs it. Sizes in bytes."""

    levels: int | None = None
    memory: int | None = None
    kernel: str | None = None
    nodes: int | None = None
    cpus: int | None = None
    tlb: str | None = None
    native: bool | None = None
    kaslr: bool | None = None
    pti: bool | None = None
    pcid: bool | None = None
    invlpgb: bool | None = None
    debug_pagealloc: bool | None = None
    tlbsan: bool | None = None
    quantum: int | None = None
    schedule: str | None = None
    gbpages: bool | None = None
    nogbpages: bool | None = None
    nohugevmalloc: bool | None = None
    nohugeiomap: bool | None = None
    seed: int | None = None
    max_instructions: int | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """The entry returns this value: EAX as an int when the value fits one, else RAX."""

    line: int
    value: Sum


@dataclass(frozen=True, slots=True)
class FaultExpected:
    """An exception is delivered. Several of these happen in the order of their lines; others may come between."""

    line: int
    vector: int
    error: int | None = None
    address: Sum | None = None
    rip: Sum | None = None


@dataclass(frozen=True, slots=True)
class FaultCount:
    """Exactly so many exceptions are delivered (of one vector, or of all); `no-fault` is a count of 0."""

    line: int
    count: int
    vector: int | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """A line of the kernel log contains (or, when not `present`, no line contains) the text."""

    line: int
    text: str
    present: bool = True


@dataclass(frozen=True, slots=True)
class End:
    """The run ends so: one of ENDS, with the text in a line of the log. An oops is also met by the panic it leads to."""

    line: int
    how: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryEquals:
    """The u64 at `address` is `value` when the run has ended."""

    line: int
    address: Sum
    value: Sum


@dataclass(frozen=True, slots=True)
class Counted:
    """The run counted exactly so many of what COUNTS names."""

    line: int
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Sanitized:
    """TLBSan reports a use whose first line has the text; any report that nobody expects is a failure."""

    line: int
    text: str


Expectation = Return | FaultExpected | FaultCount | Log | End | MemoryEquals | Counted | Sanitized


@dataclass(frozen=True, slots=True)
class Directives:
    """Everything a header declares. `expectations` stand in the order of their lines."""

    machine: MachineOptions = MachineOptions()
    expectations: tuple[Expectation, ...] = ()


def size_in_bytes(text: str) -> int:
    """A size such as 4096, 256M, 1GiB, 0x1000. Raises ValueError."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})([KMGT]?)(?:i?B)?", text, re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is not a size (write 4096, 64M, 1G)")
    return _integer(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def _integer(text: str) -> int:
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,32}|[0-9]{1,20}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a number")
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def _bounded(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _integer(text)
        if not low <= value <= high:
            raise ValueError(f"{value} is not within {low} to {high}")
        return value

    return parse


def _switch(text: str) -> bool:
    return _choice("on", "off")(text) == "on"


def _memory(text: str) -> int:
    size = size_in_bytes(text)
    if not 1 << 20 <= size <= 1 << 40:
        raise ValueError(f"{text!r} is not within 1M to 1T")
    return size


def _kernel(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,3}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a kernel version (write 6.12)")
    return text


_MACHINE_KEYS: dict[str, Callable[[str], Any]] = {
    "levels": _bounded(4, 5),
    "memory": _memory,
    "kernel": _kernel,
    "nodes": _bounded(1, 8),
    "cpus": _bounded(1, 64),
    "tlb": _choice("infinite", "finite", "none"),
    "native": _switch,
    "kaslr": _switch,
    "pti": _switch,
    "pcid": _switch,
    "invlpgb": _switch,
    "debug-pagealloc": _switch,
    "tlbsan": _switch,
    "quantum": _bounded(1, 1 << 62),
    "schedule": str,
    "gbpages": _switch,
    "nogbpages": _switch,
    "nohugevmalloc": _switch,
    "nohugeiomap": _switch,
    "seed": _bounded(0, (1 << 64) - 1),
    "max-instructions": _bounded(1, (1 << 62)),
}
assert {key.replace("-", "_") for key in _MACHINE_KEYS} == {field.name for field in fields(MachineOptions)}


def parse_directives(text: str, path: str, language: str) -> Directives:
    """The directives in the header of `text`; `language` is "asm" or "c" (.S included).

    Raises GuestError with its line for an unknown key or expectation, a bad value, a duplicate, a contradiction, or a
    directive that stands outside the header.
    """
    options: dict[str, Any] = {}
    expectations: list[Expectation] = []
    in_header = 0
    for line, body in _header(text, language):
        in_header = line
        if len(body) > _MAX_LINE:
            raise GuestError(path, line, f"header line of {len(body)} characters is too long")
        try:
            if body.startswith("vmemu:"):
                _parse_machine(body[6:], options)
            elif body.startswith("expect:"):
                _add(expectations, _parse_expectation(body[7:].strip(), line))
        except ValueError as problem:
            raise GuestError(path, line, str(problem)) from None
    stray = re.compile(r"\s*(?:;|//|/\*|\*)\s*(vmemu|expect):")
    for number, content in enumerate(text.split("\n"), 1):
        found = stray.match(content) if number > in_header else None
        if found:
            raise GuestError(path, number, f"{found[1]}: stands outside the header (the comments the file begins with)")
    return Directives(MachineOptions(**options), tuple(expectations))


def _header(text: str, language: str) -> Iterator[tuple[int, str]]:
    """(line, content) of the comment lines before the first line of code."""
    in_block = False
    for number, raw in enumerate(text.split("\n"), 1):
        content = raw.strip()
        if language == "asm":
            if content and not content.startswith(";"):
                return
            yield number, content.lstrip(";").strip()
            continue
        if not in_block:
            if content.startswith("//"):
                yield number, content[2:].strip()
                continue
            if content and not content.startswith("/*"):
                return
            in_block = bool(content)
            content = content[2:]
        ends = content.find("*/")
        inside = content if ends < 0 else content[:ends]
        yield number, inside.strip().removeprefix("*").strip()
        if ends >= 0:
            in_block = False
            if content[ends + 2 :].strip():
                return


def _parse_machine(text: str, options: dict[str, Any]) -> None:
    words = text.split()
    if not words:
        raise ValueError("vmemu: names no option")
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _MACHINE_KEYS:
            raise ValueError(f"unknown option {key!r} (known: {', '.join(sorted(_MACHINE_KEYS))})")
        if not equals or not value:
            raise ValueError(f"option {key} has no value")
        name = key.replace("-", "_")
        if name in options:
            raise ValueError(f"option {key} is given twice")
        try:
            options[name] = _MACHINE_KEYS[key](value)
        except ValueError as problem:
            raise ValueError(f"option {key}: {problem}") from None


def _add(expectations: list[Expectation], new: Expectation) -> None:
    for old in expectations:
        if isinstance(old, Return | End) and isinstance(new, Return | End):
            raise ValueError(f"line {old.line} already says how the run ends")
        if type(old) is type(new) and not isinstance(new, FaultExpected) and _same(old, new):
            raise ValueError(f"line {old.line} already says so")
        faults = FaultExpected | FaultCount
        if isinstance(new, faults) and isinstance(old, faults) and (_is_no_fault(old) or _is_no_fault(new)):
            raise ValueError(f"no-fault contradicts line {old.line}")
    expectations.append(new)


def _same(old: Expectation, new: Expectation) -> bool:
    return all(getattr(old, f.name) == getattr(new, f.name) for f in fields(old) if f.name != "line")


def _is_no_fault(expectation: Expectation) -> bool:
    return isinstance(expectation, FaultCount) and expectation.count == 0 and expectation.vector is None


def _parse_expectation(text: str, line: int) -> Expectation:
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word == "return":
        return Return(line, parse_address(rest))
    if word == "fault":
        return _parse_fault(rest, line)
    if word == "faults":
        return _parse_count(rest, line)
    if word in ("log", "no-log"):
        return Log(line, _quoted(rest, word), word == "log")
    if word == "memory":
        address, equals, value = rest.partition("==")
        if not equals:
            raise ValueError("memory expects ADDRESS == VALUE")
        return MemoryEquals(line, parse_address(address), parse_address(value))
    if word == "count":
        name, _, number = rest.partition(" ")
        if name not in COUNTS:
            raise ValueError(f"unknown count {name[:60]!r} (known: {', '.join(COUNTS)})")
        return Counted(line, name, _integer(number.strip()))
    if word == "tlbsan":
        return Sanitized(line, _quoted(rest, word))
    if word == "no-fault" and not rest:
        return FaultCount(line, 0)
    if word in ("oops", "panic"):
        return End(line, word, _quoted(rest, word) if rest else None)
    if word in _PLAIN_ENDS and not rest:
        return End(line, word.replace("-", " "))
    known = "return, fault, faults, no-fault, oops, panic, signal, halted, triple-fault, livelock, bus-error, limit, "
    known += "deadlock, log, no-log, memory, count, tlbsan"
    raise ValueError(f"unknown expectation {text[:60]!r} (known: {known})")


def _quoted(text: str, word: str) -> str:
    if len(text) < 3 or text[0] != '"' or text[-1] != '"':
        raise ValueError(f"{word} expects a text in double quotes")
    if '"' in text[1:-1].replace('\\"', ""):
        raise ValueError(f'{word}: a double quote inside the text is written \\"')
    return text[1:-1].replace('\\"', '"')


def _vector(text: str) -> int:
    if text not in VECTORS:
        raise ValueError(f"unknown exception {text!r} (known: {', '.join(VECTORS)})")
    return VECTORS[text]


def _parse_fault(text: str, line: int) -> FaultExpected:
    name, _, rest = text.partition(" ")
    vector = _vector(name)
    given: dict[str, str] = {}
    # Blanks may stand around + and - of an expression, so a value ends where the next KEY= begins.
    pieces = re.split(r"(?:^|\s+)([a-z]+)=", rest.strip())
    if pieces[0].strip():
        raise ValueError(f"unexpected {pieces[0].strip()!r} after fault {name}")
    for key, value in zip(pieces[1::2], pieces[2::2], strict=True):
        if key not in ("error", "address", "rip"):
            raise ValueError(f"unknown key {key!r} of fault (known: error, address, rip)")
        if key in given:
            raise ValueError(f"fault gives {key} twice")
        given[key] = value.strip()
    error = _integer(given["error"]) if "error" in given else None
    if error is not None and error >= 1 << 32:
        raise ValueError(f"error code {error:#x} does not fit 32 bits")
    address = parse_address(given["address"]) if "address" in given else None
    if address is not None and vector != VECTORS["#PF"]:
        raise ValueError(f"{name} has no address")
    return FaultExpected(line, vector, error, address, parse_address(given["rip"]) if "rip" in given else None)


def _parse_count(text: str, line: int) -> FaultCount:
    words = text.split()
    if len(words) == 1:
        return FaultCount(line, _integer(words[0]))
    if len(words) == 2:
        return FaultCount(line, _integer(words[1]), _vector(words[0]))
    raise ValueError("faults expects [VECTOR] COUNT")
