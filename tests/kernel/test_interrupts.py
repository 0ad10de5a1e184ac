"""Vectors without an exception handler."""

from __future__ import annotations

import pytest
from after_run import ran

from emu.kernel.interrupts import EarlyException, Interrupts, Syscall
from emu.kernel.ptrace import read_pt_regs
from emu.kernel.traps import Panic, Resume, Warn


def regs(cs: int = 0x10):
    """Registers of an interrupted context."""
    return read_pt_regs(lambda name: 0, ip=0x1000, cs=cs, flags=0x202, sp=0x2000, ss=0x18)


@pytest.mark.parametrize(("version", "text"), [
    ("6.12", "No irq handler for 0.64"), ("6.1", "__common_interrupt: 0.64 No irq handler for vector"),
    ("5.4", "do_IRQ: 0.64 No irq handler for vector"),
])
def test_a_device_vector_without_a_device_is_reported_in_the_versions_words(version: str, text: str) -> None:
    assert Interrupts(version).handle(64, regs(), 0, 0, 0) == Resume(0x1000, (text,))


def test_ten_messages_are_printed_and_no_more() -> None:
    interrupts = Interrupts("6.12")
    lines = [interrupts.handle(64, regs(), 0, 0, 0).lines for _ in range(12)]
    assert [len(printed) for printed in lines] == [1] * 10 + [0] * 2


def test_a_system_vector_is_taken_silently_and_a_spurious_one_is_not() -> None:
    assert Interrupts("6.12").handle(0xFD, regs(), 0, 0, 0).lines == ()
    assert "Spurious APIC interrupt (vector 0xFF) on CPU#2" in Interrupts("6.12").handle(0xFF, regs(), 0, 0, 2).lines[0]


def test_int_80_is_a_system_call_of_user_mode_only() -> None:
    assert Interrupts("6.12").handle(0x80, regs(0x33), 0, 0, 0) == Syscall()
    assert isinstance(Interrupts("6.12").handle(0x80, regs(), 0, 0, 0), Panic)


def test_a_control_protection_fault_warns_in_6_12_and_ends_older_kernels() -> None:
    assert isinstance(Interrupts("6.12").handle(21, regs(), 1, 0, 0), Warn)
    assert isinstance(Interrupts("6.1").handle(21, regs(), 1, 0, 0), EarlyException)


def test_a_guest_that_sends_itself_an_interrupt_goes_on() -> None:
    result, machine = ran("int 64\nmov eax, 5")
    assert result.outcome.returned == 5
    assert any("No irq handler for 0.64" in line for line in machine.log_lines())
