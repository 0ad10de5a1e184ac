"""The recorder's fortified memset, which refused before any access: what the kernel printed about it."""

from __future__ import annotations

import re

import pytest
from booted import machine, run
from recorded_oops import messages

# memset is number 7; 12288 bytes were to be written to 5000.
CALLS = {
    "6.12": "    mov edi, 15\n    mov esi, 5000\n    mov edx, 12288\n    call __fortify_panic\n    ret",
    "6.1": '    lea rdi, [name]\n    call fortify_panic\n    ret\nsection .rodata\nname: db "memset", 0',
}
TELLING = re.compile(r"detected buffer overflow.*|kernel BUG at .*|at (lib/\S+:\d+ \w+)")


def told(lines: list[str]) -> list[str]:
    return [match[1] or match[0] for line in lines if (match := TELLING.search(line))]


@pytest.mark.parametrize("version", CALLS)
def test_a_fortified_memset_beyond_its_buffer_is_refused_as_recorded(version: str) -> None:
    lines = messages(version, "faults")
    first, last = (lines.index(f"VMOMARK {mark} fault memset_over") for mark in ("BEGIN", "END"))
    outcome = run(machine(kernel=version), "    sub rsp, 8\n" + CALLS[version])
    assert told(list(outcome.log)) == told(lines[first:last])
    assert outcome.ended == "oops"


def test_an_unknown_function_is_named_so_and_a_report_alone_goes_on() -> None:
    code = "    sub rsp, 8\n    mov edi, 0xfe\n    mov esi, 1\n    mov edx, 2\n    call __fortify_report\n    add rsp, 8\n    ret"
    outcome = run(machine(), code)
    assert "UNKNOWN: detected buffer overflow: 2 byte read of buffer size 1" in outcome.log
    assert outcome.ended == "returned"
