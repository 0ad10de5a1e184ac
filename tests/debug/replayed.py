"""A recorded run, and machines that are stopped at steps of it: what the history says against what there is."""

from __future__ import annotations

from random import Random

from emu.debug.at import machine_at
from emu.debug.history import History, cached_by
from emu.debug.history_records import AnyChange, Reader
from emu.debug.replay import Replay
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.machine import Machine
from emu.mmu.entry import A, D
from emu.run import configure

NO_OPTIONS = MachineOptions()


class Recorded:
    """A program's whole run with its history."""

    def __init__(self, program: Program | str, options: MachineOptions = NO_OPTIONS) -> None:
        self.program = assemble(program, "guest.asm") if isinstance(program, str) else program
        self.options = options
        config, limit = configure(self.program.directives.machine, options)
        self.machine = Machine(config, limit=limit)
        self.history = History(self.machine)
        self.outcome = self.machine.run(self.program)
        self.changes: list[AnyChange] = Reader(self.history).read(self.history.raw)
        self.steps = self.history.steps

    def replay(self, step: int) -> Replay:
        """The state that the history tells of."""
        history = self.history
        replay = Replay(history.frames, history.cached, history.roots, history.current, self.machine.cpu.mmu.regs)
        replay.apply_all(self.changes, step)
        return replay

    def differences(self, step: int) -> list[str]:
        """Where a machine that is stopped at `step` is not what the history says of it.

        A is left out: that a walk set it before it faulted is not recorded. So is D where no TLB keeps what a walk has set.
        """
        _, machine = machine_at(self.program, self.options, step)
        replay = self.replay(step)
        ignored = A | D if machine.config.tlb == "none" else A
        found = []
        for frame, table in History(machine).frames.items():
            told = replay.tables.frames.get(frame)
            if told is None:
                # An mm that nobody has used yet.
                continue
            for i, (one, other) in enumerate(zip(_words(table), _words(bytes(told)), strict=True)):
                if (one ^ other) & ~ignored:
                    found.append(f"step {step}: entry {i} of table {frame:#x} is {one:#x}, told {other:#x}")
        for cpu in machine.cpus:
            there, told_of = cached_by(cpu.mmu), replay.tlbs[cpu.id]
            found += [
                f"step {step}: CPU {cpu.id} has {key}: {there.get(key)}, told {told_of.get(key)}"
                for key in {**there, **told_of} if there.get(key) != told_of.get(key)
            ]
            if (cpu.mmu.pcid, cpu.mmu.cr3) != replay.current[cpu.id]:
                found.append(f"step {step}: CPU {cpu.id} has CR3 {cpu.mmu.cr3:#x}, told {replay.current[cpu.id]}")
        return found

    def some_steps(self, count: int, seed: int) -> list[int]:
        """Steps before the last: a machine that is stopped there has not printed what a run's end prints."""
        random = Random(seed)
        return sorted({0, *(random.randrange(max(1, self.steps)) for _ in range(count))})


def _words(table: bytes) -> list[int]:
    return memoryview(table).cast("Q").tolist()
