"""Look for false reports of TLBSan: right guests under random schedules.

    python tools/tlbsan_campaign.py [--schedules N] [--jobs N] [--seed N]

The guests are those in guest/ for several CPUs whose headers expect no report, and generated ones (tools/tlbsan_guests.py), 50
schedules each. Each process boots a guest's machine once; a schedule is a fork of it, in which any CPU runs on after any number of
instructions. Prints what ran, every report and every ending that a header does not expect; the status is 1 when there is any.
"""

from __future__ import annotations

import argparse
import gc
import marshal
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tlbsan_guests import random_guest  # noqa: E402

from emu.guest.asm import assemble  # noqa: E402
from emu.guest.directives import MachineOptions, Sanitized  # noqa: E402
from emu.guest.expect import judge  # noqa: E402
from emu.guest.link import Linked  # noqa: E402
from emu.guest.load import load  # noqa: E402
from emu.guest.program import Program  # noqa: E402
from emu.machine import Machine  # noqa: E402
from emu.run import configure  # noqa: E402
from emu.tlbsan import lines  # noqa: E402
from emu.turns import RandomTurns  # noqa: E402

DEFAULT_SCHEDULES = 10_000
LIMIT = 20_000_000  # instructions of all CPUs
SCHEDULES_OF_A_GENERATED_GUEST = 50
# Guests whose race is what they are there for: only the plain schedule hides it.
RACY = "racy_"


@dataclass(slots=True)
class Campaign:
    """What ran: schedules by guest, every report as (guest, schedule seed, text), endings that no header expects."""

    ran: dict[str, int] = field(default_factory=dict)
    reports: list[tuple[str, int, str]] = field(default_factory=list)
    otherwise: list[tuple[str, int, str]] = field(default_factory=list)
    marked: int = 0
    uses: int = 0

    @property
    def schedules(self) -> int:
        """All schedules that ran."""
        return sum(self.ran.values())


def right_guests() -> list[Program]:
    """The guests in guest/ for several CPUs that no report of TLBSan is expected of; those in C and .S only where there is gcc."""
    found = []
    for path in sorted((ROOT / "guest").iterdir()):
        if path.suffix not in (".asm", ".c", ".S") or path.name.startswith(RACY) or "cpus=" not in path.read_text():
            continue
        if path.suffix != ".asm" and shutil.which("gcc") is None:
            continue
        program = load(str(path))
        wanted = any(isinstance(one, Sanitized) for one in program.directives.expectations)
        if (program.directives.machine.cpus or 1) > 1 and not wanted:
            found.append(program)
    return found


def generated_guest(seed: int) -> Program:
    """A random guest."""
    return assemble(random_guest(seed), f"generated_{seed}.asm")


def run_guest(program: Program, seeds: Sequence[int], jobs: int, campaign: Campaign) -> None:
    """Run a guest under the schedules of these seeds, in `jobs` processes with a machine each."""
    waiting = []
    for job in range(jobs):
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            _worker(program, seeds[job::jobs], write_end)
        os.close(write_end)
        waiting.append((child, read_end))
    for child, read_end in waiting:
        with open(read_end, "rb") as pipe:
            while True:
                try:
                    seed, reports, failures, marked, uses = marshal.load(pipe)
                except EOFError:
                    break
                campaign.ran[program.path] = campaign.ran.get(program.path, 0) + 1
                campaign.reports += [(program.path, seed, report) for report in reports]
                campaign.otherwise += [(program.path, seed, failure) for failure in failures]
                campaign.marked += marked
                campaign.uses += uses
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"a worker for {program.path} failed")


def _worker(program: Program, seeds: Sequence[int], pipe: int) -> None:
    """Boot a machine, and fork it for each schedule; ends the process."""
    status = 1
    try:
        config, limit = configure(program.directives.machine, MachineOptions())
        machine = Machine(config, limit=min(limit, LIMIT))
        _, linked = machine.load(program)
        gc.freeze()
        for seed in seeds:
            child = os.fork()
            if not child:
                gc.disable()
                os.write(pipe, marshal.dumps(_schedule(machine, program, linked, seed)))
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(f"schedule {seed} of {program.path} failed")
        status = 0
    finally:
        os._exit(status)


def _schedule(machine: Machine, program: Program, linked: Linked, seed: int) -> tuple[int, list[str], list[str], int, int]:
    machine.hub.policy = RandomTurns(seed, longest=1 << 4 + seed % 9)
    outcome = machine.run_loaded(program, linked)
    assert machine.tlbsan is not None
    found = ["\n".join(lines(finding)) for finding in machine.tlbsan.findings]
    failures = [] if found else judge(program.directives.expectations, outcome)
    counts = machine.tlbsan.counts()
    return seed, found, failures, counts.marked, counts.uses


def run(schedules: int, jobs: int = 1, seed: int = 0) -> Campaign:
    """The whole campaign: half of the schedules on the guests of guest/, half on generated ones."""
    campaign = Campaign()
    guests = right_guests()
    half = schedules // 2
    for number, program in enumerate(guests):
        share = half // len(guests) + (number < half % len(guests))
        run_guest(program, range(seed, seed + share), jobs, campaign)
    number = 0
    while campaign.schedules < schedules:
        share = min(SCHEDULES_OF_A_GENERATED_GUEST, schedules - campaign.schedules)
        run_guest(generated_guest(seed + number), range(seed, seed + share), jobs, campaign)
        number += 1
    return campaign


def main() -> int:
    """Run and print; returns the exit status."""
    parser = argparse.ArgumentParser(description="Right guests under random schedules: TLBSan must stay silent.")
    parser.add_argument("--schedules", type=int, default=DEFAULT_SCHEDULES)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.schedules < 1 or options.jobs < 1:
        parser.error("--schedules and --jobs must be at least 1")
    began = time.perf_counter()
    campaign = run(options.schedules, options.jobs, options.seed)
    took = time.perf_counter() - began
    generated = [path for path in campaign.ran if path.startswith("generated_")]
    for path, count in campaign.ran.items():
        if path not in generated:
            print(f"{count:6} {Path(path).name}")
    print(f"{sum(campaign.ran[path] for path in generated):6} {len(generated)} generated guests")
    for path, seed, failure in campaign.otherwise:
        print(f"{path} under schedule {seed}: {failure}")
    for path, seed, report in campaign.reports:
        print(f"{path} under schedule {seed}:\n{report}")
    print(
        f"{campaign.schedules} schedules in {took:.0f} s, {campaign.marked} stale entries, {campaign.uses} legal uses of such,"
        f" {len(campaign.otherwise)} other endings, {len(campaign.reports)} reports"
    )
    return int(bool(campaign.reports or campaign.otherwise))


if __name__ == "__main__":
    sys.exit(main())
