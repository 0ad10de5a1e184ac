"""Run guest files: the machine their headers ask for, their bound, and the verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from emu.config import DEFAULT_MAX_INSTRUCTIONS, MachineConfig
from emu.guest.directives import MachineOptions
from emu.guest.expect import Outcome, judge
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import PEAK_INSTRUCTIONS_PER_SECOND, Machine, Statistics
from emu.tlbsan import NOTHING_TRACKED, Finding, Tracking
from emu.trace import Event, Sink, discard
from emu.watchdog import WatchdogExpired

# A bound so low that counting costs less than a second attempt might.
_COUNTED_AT_ONCE = 10_000_000


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of one guest.

    `failures` are the expectations that were not met; `places` says where the address of each fault that has one lies,
    `findings` are TLBSan's.
    """

    path: str
    config: MachineConfig
    max_instructions: int
    outcome: Outcome
    failures: tuple[str, ...]
    statistics: Statistics
    places: tuple[str, ...]
    events: tuple[Event, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """The run ended as the guest's header says."""
        return not self.failures


def configure(options: MachineOptions, overrides: MachineOptions) -> tuple[MachineConfig, int]:
    """The machine and the instruction limit: `overrides` win over a guest's own `options`, those over the defaults.

    Raises ValueError for a machine that cannot be.
    """
    chosen = {}
    for field in dataclasses.fields(MachineOptions):
        value = getattr(overrides, field.name)
        chosen[field.name] = getattr(options, field.name) if value is None else value
    limit = chosen.pop("max_instructions")
    if limit is not None and limit <= 0:
        raise ValueError(f"instruction limit is {limit}; it must be at least 1")
    config = MachineConfig(**{name: value for name, value in chosen.items() if value is not None})
    return config, DEFAULT_MAX_INSTRUCTIONS if limit is None else limit


def run_file(path: str, overrides: MachineOptions, *, keep_events: bool = False) -> RunResult:
    """Load and run one guest. Raises GuestError for bad input, ValueError or MemoryError for an impossible machine."""
    return run_program(load(path), overrides, keep_events=keep_events)


def run_program(program: Program, overrides: MachineOptions, *, keep_events: bool = False) -> RunResult:
    """Run a loaded guest. The verdict depends on its bound alone, never on the host's speed. Raises as run_file."""
    return run_to_end(program, overrides, keep_events=keep_events)[0]


def run_to_end(program: Program, overrides: MachineOptions, *, keep_events: bool = False) -> tuple[RunResult, Machine]:
    """run_program, and the machine as the run left it.

    Several CPUs are counted in any case. A run without a counter is faster: if it ends before any host could have executed the
    limit, it kept the limit; otherwise it is thrown away and repeated, from boot, with an exact counter.
    """
    config, limit = configure(program.directives.machine, overrides)
    if limit <= _COUNTED_AT_ONCE or config.cpus > 1 or config.schedule:
        return _attempt(program, config, limit, limit, None, keep_events)
    try:
        return _attempt(program, config, limit, None, limit / PEAK_INSTRUCTIONS_PER_SECOND, keep_events)
    except WatchdogExpired:
        return _attempt(program, config, limit, limit, None, keep_events)


def _attempt(
    program: Program, config: MachineConfig, limit: int, counted: int | None, timeout: float | None, keep_events: bool
) -> tuple[RunResult, Machine]:
    track = NOTHING_TRACKED
    while True:
        events: list[Event] = []
        sink: Sink = events.append if keep_events else discard
        machine = Machine(config, limit=counted, sink=sink, track=track)
        outcome = machine.run(program, timeout=timeout)
        if machine.tlbsan is None or not machine.tlbsan.findings or track is not NOTHING_TRACKED:
            break
        # The same run once more, to remember what its reports lack, counted: doing so always would slow down every run.
        track = Tracking.of(machine.tlbsan.findings)
        counted, timeout = limit, None
    return judged(program, config, limit, machine, outcome, tuple(events)), machine


def judged(
    program: Program, config: MachineConfig, limit: int, machine: Machine, outcome: Outcome, events: tuple[Event, ...] = ()
) -> RunResult:
    """What became of a guest that `machine` has run to `outcome`."""
    failures = tuple(judge(program.directives.expectations, outcome))
    places = tuple(machine.place_of(fault.address) for fault in outcome.faults if fault.address is not None)
    findings = () if machine.tlbsan is None else tuple(machine.tlbsan.findings)
    return RunResult(program.path, config, limit, outcome, failures, machine.statistics, places, events, findings)
