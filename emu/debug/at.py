"""A machine at a step of its guest's run: runs are deterministic, so it is reached by running up to there again."""

from __future__ import annotations

from dataclasses import replace

from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.machine import Machine
from emu.run import RunResult, configure
from emu.tlbsan import Finding


class PastTheEnd(ValueError):
    """The run has fewer steps than that."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"step {step} is past the end: the run has {steps} step{'' if steps == 1 else 's'}")
        self.step = step
        self.steps = steps


def machine_at(program: Program, overrides: MachineOptions, step: int) -> tuple[RunResult, Machine]:
    """The machine when `step` instructions of all CPUs are complete since the guest's call, and the run up to there.

    That run is not judged: it has no failures, and ends by "limit" unless `step` is its last. An instruction that faults and the
    delivery of its exception count as two and are not parted: the machine stands behind the delivery.
    Raises PastTheEnd, GuestError for bad input, ValueError or MemoryError for an impossible machine.
    """
    config, limit = configure(program.directives.machine, overrides)
    if step < 0:
        raise ValueError(f"step is {step}; it must be at least 0")
    machine = Machine(config, limit=min(step, limit))
    outcome = machine.run(program)
    steps = (machine.hub.total() or 0) - machine.hub.started
    if steps < step:
        raise PastTheEnd(step, steps)
    findings: tuple[Finding, ...] = () if machine.tlbsan is None else tuple(machine.tlbsan.findings)
    places = tuple(machine.place_of(fault.address) for fault in outcome.faults if fault.address is not None)
    # What the machine prints when its limit stops it is no part of the run.
    if outcome.ended == "limit":
        log = tuple(outcome.log)
        cut = next((n for n, line in enumerate(log) if line.startswith("vmemu: CPU ") and "reached the instruction limit" in line), None)
        outcome = replace(outcome, log=log[:cut])
    return RunResult(program.path, config, step, outcome, (), machine.statistics, places, (), findings), machine
