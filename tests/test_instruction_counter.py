"""The instruction limit: exact, whatever the instructions are."""

from __future__ import annotations

import platform

import pytest
from bare_cpu import CODE, DATA, BareCpu, Entered

from emu.cpu import Halted, LimitReached
from emu.exceptions import Vector

LOOP = "again: inc rax; dec rcx; jnz again; hlt"


@pytest.fixture(params=["native", "python"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(platform, "machine", lambda: "unknown")
    return str(request.param)


def executed(cpu: BareCpu) -> int:
    assert cpu.engine.counter is not None
    return cpu.engine.counter.executed


def test_a_limited_run_counts_every_instruction(counted: str) -> None:
    for limit in (3001, 10_000):
        cpu = BareCpu(limit=limit)
        assert isinstance(cpu.run_code(LOOP, rcx=1000), Halted)
        assert executed(cpu) == 3001


def test_the_limit_stops_before_the_first_instruction_past_it(counted: str) -> None:
    for limit in (1, 2, 3, 4, 2998, 2999):
        cpu = BareCpu(limit=limit)
        stop = cpu.run_code(LOOP, rax=0, rcx=1000)
        assert stop == LimitReached(CODE + (0, 3, 6)[limit % 3])
        assert cpu.reg("rax") == (limit + 2) // 3
        assert executed(cpu) == limit


def test_a_cpu_at_its_limit_stays_there(counted: str) -> None:
    cpu = BareCpu(limit=5)
    stop = cpu.run_code(LOOP, rcx=1000)
    for _ in range(3):
        assert cpu.run() == stop
    assert executed(cpu) == 5


def test_an_instruction_that_the_machine_executes_counts_once(counted: str) -> None:
    cpu = BareCpu(limit=100)
    assert isinstance(cpu.run_code("nop; cpuid; rdtsc; nop; hlt"), Halted)
    assert executed(cpu) == 5


def test_the_limit_holds_before_an_instruction_that_the_machine_executes(counted: str) -> None:
    cpu = BareCpu(limit=1)
    assert cpu.run_code("nop; rdtsc; hlt") == LimitReached(CODE + 1)
    assert cpu.tsc == 0


def test_an_instruction_counts_each_time_it_begins(counted: str) -> None:
    cpu = BareCpu(limit=100)
    cpu.unmap(DATA)
    entered = cpu.run_code("mov eax, [rbx]", rbx=DATA)
    assert isinstance(entered, Entered)
    assert entered.vector == Vector.PF
    assert executed(cpu) == 3  # and the delivery, and the HLT of the stub


def test_a_step_counts_as_in_a_run(counted: str) -> None:
    cpu = BareCpu(limit=10_000)
    cpu.raise_interrupt(0x40)
    assert isinstance(cpu.run_code(LOOP, rcx=100), Halted)
    assert executed(cpu) == 301
    assert cpu.reg("rcx") == 0


def test_a_run_without_a_limit_has_no_counter() -> None:
    assert BareCpu().engine.counter is None
