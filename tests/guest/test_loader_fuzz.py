"""No input makes a loader raise anything but GuestError, and none takes long."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_elf import make_object

from emu.guest.address import parse_address
from emu.guest.asm import assemble
from emu.guest.directives import parse_directives
from emu.guest.elf import read_object
from emu.guest.error import GuestError
from emu.guest.link import link
from emu.guest.program import Program

GUESTS = Path(__file__).resolve().parents[2] / "guest"
SOURCES = [path.read_text() for path in sorted(GUESTS.glob("*.asm"))]
WORDS = (
    "mov add lea call jmp jnz push pop lock rep ret iretq db dw dd dq resb resq align times equ section .text .data .bss .rodata "
    "global extern rax eax al xmm0 cr3 gs: [ ] [rax] [rip + x] [x] ( ) + - * / % << >> ~ & | ^ , : ; \" ' 'a' \"s\" 0 1 -1 0x10 "
    "0xffffffffffffffff 99999999999999999999 x y .x $ byte qword ptr short near rel offset x: y: \n \t"
).split(" ") + ["\n"] * 6
settings.register_profile("guest", deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("guest")


def finished(program: Program) -> None:
    """A program that loads is whole, and links or says why not."""
    program.validate()
    bases, at = {}, 0xFFFFFFFFC0000000
    for kind, area in program.areas().items():
        bases[kind] = at
        at += (area.size + 0xFFFF) & ~0xFFFF
    with suppress(GuestError):
        link(program, bases, lambda name: 0xFFFFFFFF81000000)


@given(st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join))
def test_any_sequence_of_assembly_words_assembles_or_is_a_guest_error(text: str) -> None:
    with suppress(GuestError):
        finished(assemble(text, "f.asm"))


@given(st.text(max_size=300))
def test_any_text_assembles_or_is_a_guest_error(text: str) -> None:
    with suppress(GuestError):
        finished(assemble(text, "f.asm"))


@given(st.randoms(use_true_random=False))
def test_a_mutated_program_assembles_or_is_a_guest_error(rng: random.Random) -> None:
    text = rng.choice(SOURCES)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice([*WORDS, "", "\n", chr(rng.randrange(1, 256))]) + text[at + rng.randrange(3) :]
    with suppress(GuestError):
        finished(assemble(text, "f.asm"))


@given(st.sampled_from(["vmemu: ", "expect: "]), st.text(max_size=80), st.sampled_from(["asm", "c"]))
def test_any_header_line_is_read_or_is_a_guest_error(word: str, text: str, language: str) -> None:
    with suppress(GuestError):
        parse_directives(f"; {word}{text}" if language == "asm" else f"/* {word}{text} */", "f", language)


HEADER_WORDS = [
    "levels=4", "memory=1G", "seed=", "=", "fault", "faults", "#PF", "error=0x2", "address=[p]", "rip=", "return", "-1", "0x", "[",
    "]", "+", "memory", "==", "log", '"x"', '"', "no-log", "no-fault", "oops", "panic", "limit", "triple-fault", "rax", "\\",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["vmemu:", "expect:"]), st.lists(st.sampled_from(HEADER_WORDS), max_size=8)), max_size=5))
def test_any_sequence_of_directive_words_is_read_or_is_a_guest_error(lines: list[tuple[str, list[str]]]) -> None:
    with suppress(GuestError):
        parse_directives("\n".join(f"; {head} {' '.join(words)}" for head, words in lines), "f", "asm")


@given(st.text(alphabet="0x1aZ[]+- .$@\\\"", max_size=60))
def test_any_address_is_read_or_is_a_value_error(text: str) -> None:
    with suppress(ValueError):
        parse_address(text)


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_an_object_or_a_guest_error(data: bytes, magic: bool) -> None:
    with suppress(GuestError):
        finished(read_object(b"\x7fELF\x02\x01\x01" * magic + data, "f.o"))


@given(st.randoms(use_true_random=False))
@settings(max_examples=600)
def test_a_mutated_object_is_read_or_is_a_guest_error(rng: random.Random) -> None:
    data = bytearray(make_object())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        data[at] = rng.choice([0, 1, 2, 4, 8, 0x7F, 0x80, 0xFF, rng.randrange(256), data[at] ^ 1 << rng.randrange(8)])
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    with suppress(GuestError):
        finished(read_object(bytes(data), "f.o"))


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"a{n} equ a{n - 1} + a{n - 1}" for n in range(1, 5000)) + "\nmov rax, a4999",
        "mov rax, " + "(" * 4000,
        "mov rax, " + "-" * 4000 + "1",
        "mov rax, " + "+".join(["x"] * 1000),
        "mov rax, 1 << 127 << 127 << 127",
        "mov rax, [" + "rax+" * 900 + "1]",
        "section .data\n" + "times 4194304 db 0\n" * 3,
        "section .data\ntimes 60000 dq x\n" * 3,
        "db '" + "\\" * 4001 + "'",
        "\n" * 200_000,
        "frobnicate\n" * 2000,
        "nop\n" * 20_000 + "mov al, rax",
        "x" * 100_000,
        "; expect: return " + "[" * 900,
    ],
    ids=range(14),
)
def test_hostile_sources_are_answered(text: str) -> None:
    """A loader that hangs on one is stopped by whoever runs the suite; what it raises is a GuestError or nothing."""
    with suppress(GuestError):
        program = assemble(text, "f.asm")
        program.validate()
        assert program.path == "f.asm"
