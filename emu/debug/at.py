"""A machine at a step of its guest's run: runs are deterministic, so it is reached by running up to there again."""

from __future__ import annotations

from dataclasses import replace

from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.hub import Final, Finish
from emu.machine import Machine
from emu.run import RunResult, configure, judged


class PastTheEnd(ValueError):
    """The run has fewer steps than that."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"step {step} is past the end: the run has {steps} step{'' if steps == 1 else 's'}")
        self.step = step
        self.steps = steps


class _Stopped(Machine):
    """A machine that its limit stops without a word: a report reads stacks, by which TLBs change."""

    def _ending(self, finish: Finish) -> str:
        return "limit" if finish.final is Final.LIMIT else super()._ending(finish)


def machine_at(program: Program, overrides: MachineOptions, step: int) -> tuple[RunResult, Machine]:
    """The machine when `step` instructions of all CPUs are complete since the guest's call, and the run up to there.

    That run is not judged: it has no failures, and ends by "limit" unless `step` is its last. An instruction that faults and the
    delivery of its exception count as two and are not parted: the machine stands behind the delivery.
    Raises PastTheEnd, GuestError for bad input, ValueError or MemoryError for an impossible machine.
    """
    config, limit = configure(program.directives.machine, overrides)
    if step < 0:
        raise ValueError(f"step is {step}; it must be at least 0")
    machine = _Stopped(config, limit=min(step, limit))
    outcome = machine.run(program)
    steps = (machine.hub.total() or 0) - machine.hub.started
    if steps < step:
        raise PastTheEnd(step, steps)
    return replace(judged(program, config, step, machine, outcome), failures=()), machine
