"""The header: options and expectations, each with its meaning, and every mistake with its line."""

from __future__ import annotations

import pytest

from emu.guest.address import evaluate, parse_address
from emu.guest.directives import (
    Directives,
    End,
    FaultCount,
    FaultExpected,
    Log,
    MachineOptions,
    MemoryEquals,
    Return,
    parse_directives,
)
from emu.guest.error import GuestError


def asm(*lines: str) -> Directives:
    return parse_directives("\n".join(lines) + "\nret\n", "t.asm", "asm")


def test_every_machine_option_is_read() -> None:
    header = "; vmemu: levels=5 memory=256M kernel=6.1 nodes=2 cpus=3 tlb=finite native=off"
    assert asm(header, "; vmemu: kaslr=on seed=0x10 max-instructions=1000").machine == MachineOptions(
        levels=5, memory=256 << 20, kernel="6.1", nodes=2, cpus=3, tlb="finite", native=False, kaslr=True, seed=16,
        max_instructions=1000,
    )  # fmt: skip


def test_a_header_of_prose_declares_nothing() -> None:
    assert asm("; Reads past the end: the guard page.", "; Note: nothing else") == Directives()


def test_every_expectation_is_read_with_its_line() -> None:
    expectations = asm(
        "; expect: fault #PF error=0x0002 address=[p] + 0x1000 rip=here",
        "; expect: faults #PF 3",
        "; expect: oops \"BUG: \\\"x\\\"\"",
        "; expect: log \"a b\"",
        "; expect: no-log \"c\"",
        "; expect: memory [p]+8 == 0x1234",
    ).expectations
    assert expectations == (
        FaultExpected(1, 14, 2, parse_address("[p]+0x1000"), parse_address("here")),
        FaultCount(2, 3, 14),
        End(3, "oops", 'BUG: "x"'),
        Log(4, "a b", True),
        Log(5, "c", False),
        MemoryEquals(6, parse_address("[p]+8"), parse_address("0x1234")),
    )
    assert asm("; expect: return -12", "; expect: no-fault").expectations == (
        Return(1, parse_address("-12")),
        FaultCount(2, 0),
    )
    for word, how in (("panic", "panic"), ("triple-fault", "triple fault"), ("limit", "limit"), ("oops", "oops")):
        assert asm(f"; expect: {word}").expectations == (End(1, how),)


@pytest.mark.parametrize(
    "text",
    [
        "// vmemu: levels=5\n// expect: return 1\nint x;",
        "/* vmemu: levels=5 */\n/* expect: return 1 */\nint x;",
        "/*\n * vmemu: levels=5\n * expect: return 1\n */\nint x;",
        "\n/*\n   prose\n   vmemu: levels=5 */\n\n// expect: return 1\n#include <x.h>\n",
    ],
)
def test_c_headers_are_line_or_block_comments(text: str) -> None:
    found = parse_directives(text, "t.c", "c")
    assert found.machine.levels == 5
    assert isinstance(found.expectations[0], Return)


@pytest.mark.parametrize(
    "line",
    [
        "vmemu:", "vmemu: levels", "vmemu: levels=", "vmemu: levels=6", "vmemu: level=4", "vmemu: levels=4 levels=4",
        "vmemu: memory=12Q", "vmemu: memory=1", "vmemu: memory=2T", "vmemu: nodes=9", "vmemu: kernel=six", "vmemu: tlb=big",
        "vmemu: kaslr=yes", "vmemu: seed=-1", "vmemu: seed=0x", "vmemu: max-instructions=0", "vmemu: seed=99999999999999999999",
        "expect:", "expect: nothing", "expect: return", "expect: return 5 6", "expect: return 0x", "expect: return 089x",
        "expect: fault", "expect: fault PF", "expect: fault #XX", "expect: fault #PF 5", "expect: fault #PF error=q",
        "expect: fault #PF error=1 error=1", "expect: fault #PF size=4", "expect: fault #GP address=5",
        "expect: fault #PF address=[p", "expect: fault #PF address=p]", "expect: fault #PF address=",
        "expect: fault #PF address=*p",
        "expect: fault #PF error=0x100000000", "expect: faults", "expect: faults x", "expect: faults #PF", "expect: log",
        "expect: log text", 'expect: log "', 'expect: log ""', 'expect: log "a" "b"', "expect: memory p", "expect: memory p = 4",
        "expect: memory p == ", "expect: no-fault now", "expect: limit 5", "expect: oops x", "expect: triple-fault x",
        "expect: return " + "[" * 50 + "p" + "]" * 50, "expect: return " + "1+" * 300 + "1", "vmemu: " + "x" * 2000,
    ],
)  # fmt: skip
def test_a_wrong_directive_is_an_error_with_its_line(line: str) -> None:
    with pytest.raises(GuestError) as error:
        asm("; first", f"; {line}")
    assert error.value.line == 2
    assert str(error.value).startswith("t.asm:2: ")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("return 1", "return 2"), ("return 1", "oops"), ("panic", "oops"), ("no-fault", "fault #PF"), ("faults 3", "no-fault"),
        ('log "a"', 'log "a"'), ("faults #PF 3", "faults #PF 3"),
    ],
)  # fmt: skip
def test_expectations_that_repeat_or_contradict_are_an_error_at_the_second(first: str, second: str) -> None:
    with pytest.raises(GuestError) as error:
        asm(f"; expect: {first}", f"; expect: {second}")
    assert error.value.line == 2


def test_a_directive_below_the_header_is_an_error_and_not_ignored() -> None:
    with pytest.raises(GuestError, match=r"t.asm:3: expect: stands outside the header"):
        parse_directives("; header\nret\n; expect: return 0\n", "t.asm", "asm")
    with pytest.raises(GuestError, match="outside the header"):
        parse_directives("int x; // y\n/* vmemu: levels=4 */\n", "t.c", "c")


def test_an_address_is_a_sum_of_numbers_symbols_registers_and_loads() -> None:
    memory = {0x1010: 0x5000, 0x5008: 0x7000}

    def value(text: str) -> int:
        return evaluate(parse_address(text), {"p": 0x1000, "q": 8}.get, {"rax": 3}.get, memory.__getitem__)

    assert value("[p+0x10] + 0x1000 - 1") == 0x5FFF
    assert value("[[p + 0x10] + q]") == 0x7000
    assert value("rax + 0b101") == 8
    assert value("-1") == (1 << 64) - 1


def test_an_unknown_symbol_or_register_is_a_lookup_error_that_names_it() -> None:
    for text, message in (("nowhere", "unknown symbol nowhere"), ("rbx", "no value of register rbx")):
        with pytest.raises(LookupError, match=message):
            evaluate(parse_address(text), lambda name: None, lambda name: None, lambda la: 0)
