"""Any step of a run is reached again: the machine stands there as the whole run passed through."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu.debug.at import PastTheEnd, machine_at
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.run import run_program

GUEST = Path(__file__).resolve().parent.parent.parent / "guest"
PLAIN = MachineOptions()
COUNTS = """
; vmemu: memory=64M
section .text
init_module:
    xor eax, eax
.loop:
    inc rax
    mov [n], rax
    cmp rax, 1000
    jne .loop
    ret
section .bss
n: resq 1
"""


def test_a_machine_at_a_step_has_executed_exactly_so_many_instructions() -> None:
    program = assemble(COUNTS, "guest.asm")
    for step in (0, 1, 3, 4, 5, 6, 100, 1003, 3999):
        result, machine = machine_at(program, PLAIN, step)
        assert (machine.hub.total() or 0) - machine.hub.started == step
        # Three instructions come before the guest's first, and each round of the loop has four.
        assert result.outcome.read_u64(result.outcome.symbol("n") or 0) == max(0, step - 4 + 2) // 4
        assert (result.ok, result.outcome.ended) == (True, "limit")


def test_each_step_of_several_cpus_is_reached_too_and_twice_the_same() -> None:
    program = load(str(GUEST / "stale_write_other_owner.asm"))
    for step in (1, 17, 40, 64):
        first, second = (machine_at(program, PLAIN, step)[1] for _ in range(2))
        assert sum(first.hub.executed(cpu.id) for cpu in first.cpus) == step
        assert [cpu.rip for cpu in first.cpus] == [cpu.rip for cpu in second.cpus]
        assert [cpu.mmu.listing() for cpu in first.cpus] == [cpu.mmu.listing() for cpu in second.cpus]
        assert bytes(first.memory.read(0, 64 << 20)) == bytes(second.memory.read(0, 64 << 20))


def test_the_last_step_is_there_and_the_one_behind_it_is_past_the_end() -> None:
    program = assemble(COUNTS, "guest.asm")
    with pytest.raises(PastTheEnd) as past:
        machine_at(program, PLAIN, 1 << 40)
    steps = past.value.steps
    assert str(past.value) == f"step {1 << 40} is past the end: the run has {steps} steps"
    result, machine = machine_at(program, PLAIN, steps)
    assert (machine.hub.total() or 0) - machine.hub.started == steps
    with pytest.raises(PastTheEnd, match=f"step {steps + 1} is past the end: the run has {steps} steps"):
        machine_at(program, PLAIN, steps + 1)
    assert result.outcome.log == run_program(program, PLAIN).outcome.log


def test_the_runs_own_limit_is_its_end() -> None:
    with pytest.raises(PastTheEnd, match="step 501 is past the end: the run has 500 steps"):
        machine_at(assemble(COUNTS, "guest.asm"), MachineOptions(max_instructions=500), 501)


def test_to_stop_a_machine_there_prints_nothing_and_fills_no_tlb() -> None:
    program = load(str(GUEST / "stale_write_other_owner.asm"))
    result, _ = machine_at(program, PLAIN, 30)
    assert not any("limit" in line or "NMI backtrace" in line for line in result.outcome.log)


def test_a_native_machine_stops_there_as_well() -> None:
    program = assemble(COUNTS, "guest.asm")
    result, _ = machine_at(program, MachineOptions(native=True), 1003)
    assert result.outcome.read_u64(result.outcome.symbol("n") or 0) == 250


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1; it must be at least 0"):
        machine_at(assemble(COUNTS, "guest.asm"), PLAIN, -1)
