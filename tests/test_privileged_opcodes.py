"""Finding the instructions that the machine executes itself."""

from __future__ import annotations

import random

import pytest

from emu.privileged_opcodes import MAX_LENGTH, candidates, is_intercepted, recognise

NAMES = {
    "0f22d8": "mov_to_cr", "0f20c0": "mov_from_cr", "0f23f8": "mov_to_dr", "0f21f8": "mov_from_dr", "0f06": "clts",
    "0f01f0": "lmsw", "0f01e0": "smsw", "0f0000": "sldt", "0f0008": "str", "0f00d0": "lldt", "0f00d8": "ltr", "0f0101": "sgdt",
    "0f0109": "sidt", "0f0111": "lgdt", "0f0119": "lidt", "0f0139": "invlpg", "660f388201": "invpcid", "0f30": "wrmsr",
    "0f32": "rdmsr", "0f31": "rdtsc", "0f01f9": "rdtscp", "0f01f8": "swapgs", "0f01ee": "rdpkru", "0f01ef": "wrpkru",
    "0f05": "syscall", "480f07": "sysret", "48cf": "iret", "cf": "iret", "cb": "retf", "ca0800": "retf", "cd80": "int",
    "0fa2": "cpuid", "0fc7f0": "rdrand", "0fc7f8": "rdseed", "f30fc7f8": "rdpid", "f3480faed0": "wrfsbase", "f30faec8": "rdgsbase",
    "48ff2b": "jmp_far", "ff18": "call_far", "41ff2e": "jmp_far", "ec": "in", "66ed": "in", "e660": "out", "f36c": "ins",
    "f366480f22d8": "mov_to_cr",
}
OTHERS = (
    "90", "0f0b", "cc", "f4", "0f01ca", "0f01cb", "ff13", "ff23", "ffe0", "ffd8", "ff30", "0fc70f", "0faee8", "0faef8", "0fae00",
    "0f388201", "48c7c0cf000000", "c3", "e800000000",
)


@pytest.mark.parametrize("code", NAMES)
def test_an_intercepted_instruction_is_recognised(code: str) -> None:
    instruction = recognise(bytes.fromhex(code) + b"\x90" * 8)
    assert instruction is not None
    assert instruction.name == NAMES[code]


@pytest.mark.parametrize("code", OTHERS)
def test_any_other_instruction_is_not(code: str) -> None:
    assert not is_intercepted(bytes.fromhex(code) + b"\x90" * 8)


@pytest.mark.parametrize("code", NAMES)
@pytest.mark.parametrize("offset", [0, 1, 7, 4080, 4090])
def test_an_intercepted_instruction_is_a_candidate_wherever_it_starts(code: str, offset: int) -> None:
    page = bytearray(b"\x90" * 4096)
    page[offset : offset + len(code) // 2] = bytes.fromhex(code)
    assert offset in candidates(bytes(page[:4096]))


@pytest.mark.parametrize("code", NAMES)
def test_an_instruction_that_the_page_cuts_is_a_candidate(code: str) -> None:
    whole = bytes.fromhex(code)
    for inside in range(1, len(whole)):
        page = b"\x90" * (4096 - inside) + whole[:inside]
        assert 4096 - inside in candidates(page), f"{inside} bytes of {code}"


def test_prefixes_before_a_candidate_are_candidates_too() -> None:
    page = b"\x90" * 100 + b"\x66\xf3\x48" + bytes.fromhex("0f22d8")
    assert {100, 101, 102, 103} <= set(candidates(page.ljust(4096, b"\x90")))


def test_no_candidate_is_missed_in_random_pages() -> None:
    source = random.Random(1)
    for _ in range(5):
        page = source.randbytes(4096)
        found = set(candidates(page))
        for offset in range(4096 - MAX_LENGTH):
            if is_intercepted(page[offset : offset + MAX_LENGTH]):
                assert offset in found


def test_an_operand_register_has_its_rex_bit() -> None:
    instruction = recognise(bytes.fromhex("450f22c1"))  # mov cr8, r9
    assert instruction is not None
    assert (instruction.reg, instruction.rm, instruction.wide, instruction.register_form) == (8, 9, False, True)


def test_a_rex_prefix_before_another_prefix_does_not_count() -> None:
    instruction = recognise(bytes.fromhex("48660fc7f0"))
    assert instruction is not None
    assert not instruction.wide
