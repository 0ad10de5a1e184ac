"""Judge a run by what its guest's header expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from emu.guest.address import Sum, evaluate
from emu.guest.directives import (
    ENDS,
    VECTOR_NAMES,
    Counted,
    End,
    Expectation,
    FaultCount,
    FaultExpected,
    Log,
    MemoryEquals,
    Return,
    Sanitized,
)

MASK64 = (1 << 64) - 1


class Unreadable(Exception):
    """What `Outcome.read_u64` raises for an address that holds no memory; the text says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A delivered exception. `address` is CR2 of a #PF; `registers` those of the faulting context, where kept."""

    vector: int
    error: int | None
    address: int | None
    rip: int
    registers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = VECTOR_NAMES.get(self.vector, f"vector {self.vector}")
        if self.error is not None:
            text += f" error={self.error:#06x}"
        if self.address is not None:
            text += f" address={self.address:#x}"
        return f"{text} rip={self.rip:#x}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    `ended` is one of directives.ENDS; `returned` is RAX when it returned; `registers` are the last ones; `symbol` gives the
    address of a symbol of the guest or the kernel; `read_u64` reads memory as it is now and raises Unreadable. `counts` has a
    number for each of directives.COUNTS, `reports` the first line of each report of TLBSan.
    """

    ended: str
    returned: int | None
    faults: Sequence[Fault]
    log: Sequence[str]
    registers: Mapping[str, int]
    symbol: Callable[[str], int | None]
    read_u64: Callable[[int], int]
    counts: Mapping[str, int] = field(default_factory=dict)
    reports: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.ended not in ENDS:
            raise ValueError(f"outcome {self.ended!r} is not one of {', '.join(ENDS)}")


def judge(expectations: Sequence[Expectation], outcome: Outcome) -> list[str]:
    """The expectations that were not met, one text each ("line 3: expected ..., but ..."); empty when the guest passed.

    Unless the header says how the run ends, it must return.
    """
    failures: list[str] = []
    next_fault = 0
    for expectation in expectations:
        try:
            if isinstance(expectation, FaultExpected):
                next_fault = _fault(expectation, outcome, next_fault)
            else:
                _check(expectation, outcome)
        except (_Unmet, LookupError, Unreadable) as unmet:
            text = str(unmet.args[0]) if unmet.args else str(unmet)
            failures.append(f"line {expectation.line}: {text}")
    wanted = [e.text for e in expectations if isinstance(e, Sanitized)]
    failures += [
        f'expected no report of TLBSan, but there is "{report}"'
        for report in outcome.reports if not any(text in report for text in wanted)
    ]
    if not any(isinstance(e, Return | End) for e in expectations) and outcome.ended != "returned":
        failures.append(f"expected the guest to return, but {_ending(outcome)}")
    return failures


class _Unmet(Exception):
    """An expectation that does not hold."""


def _value(expression: Sum, outcome: Outcome, registers: Mapping[str, int]) -> int:
    return evaluate(expression, outcome.symbol, registers.get, outcome.read_u64)


def _ending(outcome: Outcome) -> str:
    if outcome.ended == "returned":
        return f"it returned {_signed32(outcome.returned or 0)}"
    return f"the run ended by {'the instruction limit' if outcome.ended == 'limit' else outcome.ended}"


def _signed32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _check(expectation: Return | FaultCount | Log | End | MemoryEquals | Counted | Sanitized, outcome: Outcome) -> None:
    match expectation:
        case Counted(name=name, count=count):
            if outcome.counts.get(name, 0) != count:
                raise _Unmet(f"expected {name} to be counted {count} times, but it was {outcome.counts.get(name, 0)}")
        case Sanitized(text=text):
            if not any(text in report for report in outcome.reports):
                others = f"; the first is \"{outcome.reports[0]}\"" if outcome.reports else ""
                raise _Unmet(f'expected a report of TLBSan with "{text}", but none of {len(outcome.reports)} has it{others}')
        case Return(value=value):
            _check_return(value, outcome)
        case FaultCount(count=count, vector=vector):
            seen = [f for f in outcome.faults if vector is None or f.vector == vector]
            if len(seen) != count:
                name = "faults" if vector is None else VECTOR_NAMES[vector]
                first = f", the first {seen[0]}" if seen else ""
                raise _Unmet(f"expected {count} {name}, but there were {len(seen)}{first}")
        case Log(text=text, present=present):
            found = next((line for line in outcome.log if text in line), None)
            if present and found is None:
                raise _Unmet(f'expected a log line with "{text}", but none of {len(outcome.log)} has it')
            if not present and found is not None:
                raise _Unmet(f'expected no log line with "{text}", but there is "{found}"')
        case End(how=how, text=wanted):
            if outcome.ended != how and not (how == "oops" and outcome.ended == "panic"):
                raise _Unmet(f"expected {how}, but {_ending(outcome)}")
            if wanted is not None and not any(wanted in line for line in outcome.log):
                raise _Unmet(f'expected {how} with "{wanted}" in the log, but no line has it')
        case MemoryEquals(address=address, value=value):
            la = _value(address, outcome, outcome.registers)
            expected = _value(value, outcome, outcome.registers)
            actual = outcome.read_u64(la)
            if actual != expected:
                raise _Unmet(f"expected {expected:#x} at {address} ({la:#x}), but there is {actual:#x}")


def _check_return(value: Sum, outcome: Outcome) -> None:
    expected = _value(value, outcome, outcome.registers)
    is_int = expected < 1 << 31 or expected >= MASK64 + 1 - (1 << 31)
    shown = str(_signed32(expected)) if is_int else f"{expected:#x}"
    if outcome.ended != "returned" or outcome.returned is None:
        raise _Unmet(f"expected return {shown}, but {_ending(outcome)}")
    mask = 0xFFFFFFFF if is_int else MASK64
    if (outcome.returned ^ expected) & mask:
        got = str(_signed32(outcome.returned)) if is_int else f"{outcome.returned:#x}"
        raise _Unmet(f"expected return {shown}, but it returned {got}")


def _fault(expected: FaultExpected, outcome: Outcome, start: int) -> int:
    """Index after the first fault from `start` on that matches. Raises _Unmet naming the nearest candidate."""
    wanted = VECTOR_NAMES.get(expected.vector, f"vector {expected.vector}")
    if expected.error is not None:
        wanted += f" error={expected.error:#06x}"
    if expected.address is not None:
        wanted += f" address={expected.address}"
    if expected.rip is not None:
        wanted += f" rip={expected.rip}"
    nearest = ""
    for number in range(start, len(outcome.faults)):
        fault = outcome.faults[number]
        if fault.vector != expected.vector:
            continue
        wrong = _mismatch(expected, fault, outcome)
        if not wrong:
            return number + 1
        nearest = nearest or f"{fault} has {wrong}"
    if not nearest:
        rest = outcome.faults[start:]
        nearest = f"the next fault was {rest[0]}" if rest else "there was no further fault" if start else "there was no fault"
    raise _Unmet(f"expected fault {wanted}, but {nearest}")


def _mismatch(expected: FaultExpected, fault: Fault, outcome: Outcome) -> str:
    if expected.error is not None and fault.error != expected.error:
        return f"another error code than {expected.error:#06x}"
    registers = {"rip": fault.rip, **fault.registers}
    for name, expression, actual in (("address", expected.address, fault.address), ("rip", expected.rip, fault.rip)):
        if expression is not None:
            value = _value(expression, outcome, registers)
            if actual != value:
                return f"another {name} than {expression} = {value:#x}"
    return ""
