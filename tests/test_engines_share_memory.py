"""Several engines over one memory: code that one of them writes is what the others execute next."""

from __future__ import annotations

import pytest
from bare_cpu import CODE, DATA, STACK, BareCpu, assemble

from emu.engine import Engine
from emu.mmu.mmu import Mmu
from emu.mmu.tlb import Tlb
from emu.stop_reason import StopReason

FUNCTION = CODE + 0x2000
CALL = assemble("call rbx; hlt")
# Stores AL into the function's immediate, which lies at its second byte.
PATCH = assemble("mov byte ptr [rbx + 1], al; hlt")


def second(cpu: BareCpu, limit: int | None = None) -> Engine:
    """Another engine over the CPU's memory and page tables."""
    mmu = Mmu(cpu.memory, Tlb(), cpu.features, 4)
    mmu.reset(cr3=cpu.mmu.cr3, cr4=cpu.mmu.cr4, efer=cpu.mmu.efer)
    engine = Engine(cpu.memory, mmu, limit=limit)
    engine.load_control_registers()
    engine.set_cpl(0)
    return engine


@pytest.fixture(params=[None, 1 << 40], ids=["uncounted", "counted"])
def pair(request: pytest.FixtureRequest) -> tuple[BareCpu, Engine, Engine]:
    cpu = BareCpu(limit=request.param)
    cpu.memory.write(CODE, CALL)
    cpu.memory.write(CODE + 0x1000, PATCH)
    cpu.memory.write(FUNCTION, assemble("mov al, 1; ret"))
    other = second(cpu, request.param)
    for engine in (cpu.engine, other):
        engine.set_reg("rbx", FUNCTION)
        engine.set_reg("rsp", STACK)
    return cpu, cpu.engine, other


def call(engine: Engine) -> int:
    assert engine.run(CODE) is StopReason.HALT
    return engine.reg("rax") & 0xFF


def patch(engine: Engine, value: int) -> None:
    engine.set_reg("rax", value)
    assert engine.run(CODE + 0x1000) is StopReason.HALT


def test_a_store_by_one_engine_changes_what_the_other_executes(pair: tuple[BareCpu, Engine, Engine]) -> None:
    _, one, other = pair
    assert call(one) == 1
    for value in (2, 3, 4):
        patch(other, value)
        assert call(one) == value
        assert call(other) == value


def test_a_frame_that_an_engine_writes_is_seen_to_change_once_another_executes_it(pair: tuple[BareCpu, Engine, Engine]) -> None:
    _, one, other = pair
    patch(other, 5)  # the right to write is in its soft TLB
    assert call(one) == 5
    patch(other, 6)
    assert call(one) == 6


def test_a_write_from_outside_is_seen_by_every_engine(pair: tuple[BareCpu, Engine, Engine]) -> None:
    cpu, one, other = pair
    assert (call(one), call(other)) == (1, 1)
    cpu.memory.write(FUNCTION + 1, b"\x09")
    assert (call(one), call(other)) == (9, 9)


def test_two_stores_of_one_block_to_a_page_of_code_are_both_seen(pair: tuple[BareCpu, Engine, Engine]) -> None:
    cpu, one, _ = pair
    cpu.memory.write(CODE, assemble("call rbx; mov byte ptr [rbx + 0x40], 2; mov byte ptr [rbx + 1], 7; call rbx; hlt"))
    assert call(one) == 7


def test_a_closed_engine_hears_no_more_of_the_memory(pair: tuple[BareCpu, Engine, Engine]) -> None:
    cpu, one, other = pair
    before = len(cpu.memory.code_listeners)
    other.close()
    assert len(cpu.memory.code_listeners) == before - 1
    assert call(one) == 1


def test_pause_ends_a_run_behind_it_only_where_it_is_asked_to() -> None:
    for yields in (False, True):
        cpu = BareCpu(limit=100)
        engine = cpu.engine
        engine.pause_yields = yields
        cpu.memory.write(CODE, assemble("inc rax; pause; inc rax; hlt"))
        engine.set_reg("rax", 0)
        reason = engine.run(CODE)
        assert engine.counter is not None
        if yields:
            assert (reason, engine.reg("rip"), engine.reg("rax"), engine.counter.executed) == (StopReason.PAUSE, CODE + 5, 1, 2)
            reason = engine.run(engine.reg("rip"))
        assert (reason, engine.reg("rax"), engine.counter.executed) == (StopReason.HALT, 2, 4)


def test_a_budget_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="limit"):
        BareCpu().engine.run(DATA, 1)
