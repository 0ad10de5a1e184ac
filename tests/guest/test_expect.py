"""Judging: which outcomes meet an expectation, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from emu.guest.directives import parse_directives
from emu.guest.expect import Fault, Outcome, Unreadable, judge

SYMBOLS = {"p": 0x1000}
WORDS = {0x1000: 0x5000, 0x5008: 7}


def read_u64(la: int) -> int:
    if la not in WORDS:
        raise Unreadable(f"nothing at {la:#x}")
    return WORDS[la]


def outcome(
    ended: str = "returned",
    returned: int | None = 0,
    faults: Sequence[Fault] = (),
    log: Sequence[str] = (),
    registers: Mapping[str, int] | None = None,
) -> Outcome:
    return Outcome(ended, returned, faults, log, registers or {}, SYMBOLS.get, read_u64)


def verdict(expect: str, result: Outcome) -> list[str]:
    header = "\n".join(f"; expect: {line}" for line in expect.split("\n") if line)
    return judge(parse_directives(header, "t.asm", "asm").expectations, result)


PF = Fault(14, 0, 0x6000, 0x42, {"rax": 0x6000})


@pytest.mark.parametrize(
    ("expect", "result"),
    [
        ("", outcome()),
        ("return 0", outcome()),
        ("return -12", outcome(returned=0xFFFFFFF4)),
        ("return 42", outcome(returned=0xDEAD_0000_002A)),
        ("return 0x500000000000", outcome(returned=0x5000_0000_0000)),
        ("fault #PF error=0 address=[p]+0x1000 rip=0x42", outcome(faults=[PF])),
        ("fault #PF address=rax", outcome(faults=[PF])),
        ("fault #PF error=2\nfault #PF error=0", outcome(faults=[Fault(14, 2, 0, 0), Fault(6, None, None, 0), PF])),
        ("faults 2", outcome(faults=[PF, PF])),
        ("faults #UD 0", outcome(faults=[PF])),
        ("no-fault", outcome()),
        ('log "b"', outcome(log=["a", "abc"])),
        ('no-log "x"', outcome(log=["a"])),
        ("oops", outcome("oops", None)),
        ('oops "BUG"', outcome("panic", None, log=["BUG: x"])),
        ("panic", outcome("panic", None)),
        ("limit", outcome("limit", None)),
        ("triple-fault", outcome("triple fault", None)),
        ("memory [p]+8 == 7", outcome()),
    ],
)
def test_met(expect: str, result: Outcome) -> None:
    assert verdict(expect, result) == []


@pytest.mark.parametrize(
    ("expect", "result", "text"),
    [
        ("", outcome("oops", None), "expected the guest to return, but the run ended by oops"),
        ("return 0", outcome(returned=5), "line 1: expected return 0, but it returned 5"),
        ("return 0", outcome("limit", None), "but the run ended by the instruction limit"),
        ("return 0x100000000", outcome(returned=0), "expected return 0x100000000, but it returned 0x0"),
        ("fault #PF", outcome(), "expected fault #PF, but there was no fault"),
        ("fault #PF", outcome(faults=[Fault(13, 0, None, 9)]), "the next fault was #GP error=0x0000 rip=0x9"),
        ("fault #PF error=2", outcome(faults=[PF]), "#PF error=0x0000 address=0x6000 rip=0x42 has another error code"),
        ("fault #PF address=[p]", outcome(faults=[PF]), "has another address than [p] = 0x5000"),
        ("fault #PF rip=7", outcome(faults=[PF]), "has another rip than 7"),
        ("fault #PF\nfault #PF", outcome(faults=[PF]), "line 2: expected fault #PF, but there was no further fault"),
        ("fault #PF address=q", outcome(faults=[PF]), "unknown symbol q"),
        ("faults 1", outcome(faults=[PF, PF]), "expected 1 faults, but there were 2"),
        ("no-fault", outcome(faults=[PF]), "expected 0 faults, but there were 1, the first #PF"),
        ('log "z"', outcome(log=["a"]), 'expected a log line with "z"'),
        ('no-log "a"', outcome(log=["cab"]), 'but there is "cab"'),
        ("oops", outcome(), "expected oops, but it returned 0"),
        ("panic", outcome("oops", None), "expected panic, but the run ended by oops"),
        ('oops "BUG"', outcome("oops", None), "but no line has it"),
        ("memory [p]+8 == 8", outcome(), "expected 0x8 at [p]+8 (0x5008), but there is 0x7"),
        ("memory [p] == 8", outcome(), "nothing at 0x5000"),
    ],
)
def test_not_met(expect: str, result: Outcome, text: str) -> None:
    failures = verdict(expect, result)
    assert len(failures) == 1 or expect.startswith(("fault", "no-fault"))
    assert any(text in failure for failure in failures)


def test_an_outcome_ends_in_one_of_the_known_ways() -> None:
    with pytest.raises(ValueError, match="'exploded'"):
        outcome("exploded")
