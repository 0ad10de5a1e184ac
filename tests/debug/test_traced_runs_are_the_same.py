"""A traced run is the run that nobody watches: registers, memory, tables, TLBs, log and counters end the same, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from emu.config import MachineConfig
from emu.debug.records import AnyRecord
from emu.debug.tracer import traced_run
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.machine import Machine
from emu.mmu.staleness import table_listing
from emu.run import configure

GUEST = Path(__file__).resolve().parents[2] / "guest"
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: .c and .S guests cannot be compiled")
PROGRAMS = [
    pytest.param(path, marks=NEEDS_GCC if path.suffix != ".asm" else (), id=path.name)
    for path in sorted(GUEST.iterdir()) if path.suffix in (".asm", ".c", ".S")
]
# Enough for almost every guest that ends by itself. Of one that delivers exceptions without end, a part is enough.
LIMIT = 120_000
SHORT = {"livelock.asm": 3_000}
REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
    "cs", "ss", "fs_base", "gs_base", "kernel_gs_base", "cr0", "cr2", "cr3", "cr4", "efer", "pkru", "cpl",
    *(f"xmm{n}" for n in range(16)),
)


def state(machine: Machine) -> dict[str, object]:
    """All that a machine is, memory aside."""
    shown: dict[str, object] = {"log": tuple(machine.log_lines()), "counts": machine.counts(), "time": machine.hub.total()}
    for cpu in machine.cpus:
        shown[f"registers {cpu.id}"] = {name: cpu.reg(name) for name in REGISTERS}
        shown[f"TLB {cpu.id}"] = cpu.mmu.listing()
        shown[f"tables {cpu.id}"] = table_listing(cpu.mmu.tlb)
        counters = cpu.mmu.counters()
        # Which hits the engine's own cache answers is nobody's business.
        del counters["hits"]
        shown[f"MMU {cpu.id}"] = counters
        shown[f"pending {cpu.id}"] = cpu.pending_interrupts
    return shown


def untraced(path: Path, config: MachineConfig, limit: int = LIMIT) -> Machine:
    machine = Machine(config, limit=limit)
    machine.run(load(str(path)))
    return machine


@pytest.mark.parametrize("tlb", [None, "finite"])
@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("path", PROGRAMS)
def test_a_traced_run_ends_in_the_same_state(path: Path, cpus: int, tlb: str | None) -> None:
    program = load(str(path))
    asked = program.directives.machine
    if asked.native or (tlb and asked.tlb) or (tlb and (cpus == 4 or path.suffix != ".asm")):
        pytest.skip("the guest says what machine it runs on")
    limit = SHORT.get(path.name, LIMIT)
    memory = asked.memory or 64 << 20
    config, _ = configure(asked, MachineOptions(cpus=cpus, memory=memory, schedule="", tlb=tlb))
    machine = untraced(path, config, limit)
    records: list[AnyRecord] = []
    traced, _ = traced_run(program, config, limit, records.append)
    before, after = state(machine), state(traced)
    for what, value in before.items():
        assert after[what] == value, f"{what} differs"
    assert np.array_equal(machine.memory.u64, traced.memory.u64), "memory differs"
    assert records[-1].step == (machine.hub.total() or 0) - machine.hub.started
    steps = [record.step for record in records]
    assert steps == sorted(steps), "records are not in order"


def test_tracing_without_memory_ends_in_the_same_state_and_shows_the_same_instructions() -> None:
    path = GUEST / "stale_read_other_cpu.asm"
    config, _ = configure(load(str(path)).directives.machine, MachineOptions(memory=64 << 20))
    machine = untraced(path, config)
    runs = []
    for memory in (False, True):
        shown: list[tuple[int, ...]] = []
        traced, _ = traced_run(
            load(str(path)), config, LIMIT, lambda r, into=shown: into.append((r.step, r.cpu, getattr(r, "rip", 0))), memory=memory,
        )
        assert state(traced) == state(machine)
        runs.append(shown)
    assert runs[0] == runs[1]
