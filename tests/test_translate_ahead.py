"""Code translated before it runs: nobody sees it but the clock."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from emu.config import MachineConfig
from emu.guest.load import load
from emu.machine import Machine
from emu.translate_ahead import translate_ahead

PROGRAM = load(str(Path(__file__).resolve().parent.parent / "guest" / "racy_publish.asm"))
CONFIG = MachineConfig(cpus=2, memory=64 << 20)


def boot():
    events: list[object] = []
    machine = Machine(CONFIG, limit=100_000, sink=events.append)
    return machine, machine.load(PROGRAM)[1], events


@pytest.fixture(scope="module")
def ran():
    machine, linked, events = boot()
    outcome = machine.run_loaded(PROGRAM, linked)
    return [cpu.engine.block_counter.known for cpu in machine.cpus], events, outcome


def test_it_changes_no_byte_of_memory_and_no_tlb_entry(ran):
    machine, _, _ = boot()
    before = machine.memory.read(0, CONFIG.memory), [cpu.mmu.listing() for cpu in machine.cpus]
    for cpu, blocks in zip(machine.cpus, ran[0], strict=True):
        assert translate_ahead(cpu.engine, blocks) == len(blocks) > 5
    assert (machine.memory.read(0, CONFIG.memory), [cpu.mmu.listing() for cpu in machine.cpus]) == before


def test_a_run_with_it_is_the_run_without_it(ran):
    blocks, events, outcome = ran
    machine, linked, again = boot()
    for cpu, known in zip(machine.cpus, blocks, strict=True):
        translate_ahead(cpu.engine, known)
    after = machine.run_loaded(PROGRAM, linked)
    assert (again, after.log, after.registers, after.counts) == (events, outcome.log, outcome.registers, outcome.counts)


def test_what_it_translated_is_not_asked_for_again(ran):
    machine, linked, _ = boot()
    for cpu, known in zip(machine.cpus, ran[0], strict=True):
        translate_ahead(cpu.engine, known)
    machine.run_loaded(PROGRAM, linked)
    assert [set_of(cpu.engine.block_counter.known) for cpu in machine.cpus] == [set_of(known) for known in ran[0]]


def set_of(blocks):
    return {(block.start, block.size, block.count) for block in blocks}


@pytest.mark.parametrize(
    "change",
    [
        lambda block: dataclasses.replace(block, code=bytes(block.size)),
        lambda block: dataclasses.replace(block, count=block.count + 1),
        lambda block: dataclasses.replace(block, start=0xFFFF_C900_0FFF_0000),
        lambda block: dataclasses.replace(block, start=block.start | 0xFFF),
    ],
    ids=["other bytes", "another number of instructions", "nothing mapped", "into the next page"],
)
def test_what_is_not_the_same_code_is_left_alone(ran, change):
    machine, _, _ = boot()
    blocks = [change(block) for block in ran[0][0] if block.size > 1]
    assert translate_ahead(machine.cpu.engine, blocks) == 0
    assert machine.cpu.engine.block_counter.known == ()
