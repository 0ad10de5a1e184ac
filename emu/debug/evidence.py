"""What stands below every finding of a run: how it came there, instruction by instruction.

The run is made again, since runs are deterministic: once to learn where the finding is, once more with its last part traced, and
once with the history of the address recorded.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import deque
from collections.abc import Callable, Sequence

from emu.config import MachineConfig
from emu.debug.area_map import area_map
from emu.debug.filters import FINDINGS
from emu.debug.records import Accessed, AnyRecord, Delivered, Executed, Logged
from emu.debug.text import TextWriter
from emu.debug.tracer import Tracer, Untraceable
from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.hub import Hub
from emu.kernel.printk import LogLine
from emu.kernel.walk_report import walk_lines, walk_report
from emu.machine import Machine
from emu.mmu.entry import is_canonical
from emu.run import RunResult, configure
from emu.tlbsan import NOTHING_TRACKED, Tracking
from emu.turns import Clock, Policy, Turn

INSTRUCTIONS = 20
_EVENTS = 8
# Instructions before the finding from which on the run is traced.
_LEAD = 5_000


def evidence(program: Program, overrides: MachineOptions, result: RunResult) -> list[str]:
    """Lines below the report of a run that did not end as expected.

    The last instructions before the finding; the access that failed with its walk, the areas around it and its history; the command
    that repeats the run. Of a native machine, whose translations are not seen, the command only.
    """
    lines: list[str] = []
    config, limit = configure(program.directives.machine, overrides)
    try:
        seen = _look(program, config, limit, result)
    except Untraceable:
        seen = None
    if seen is not None:
        lines += seen.lines()
        if seen.la is not None and is_canonical(seen.la, config.levels):
            lines += _history(program, overrides, seen)
    return [*lines, f"Repeat: {command('run', program.path, overrides)}"]


def command(name: str, path: str, overrides: MachineOptions, *more: str) -> str:
    """The command line that runs a guest with these options."""
    words = ["vmemu", name, path]
    for field in dataclasses.fields(MachineOptions):
        value = getattr(overrides, field.name)
        if value is not None:
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            words += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join([*words, *more])


def _history(program: Program, overrides: MachineOptions, seen: _Seen) -> list[str]:
    from emu.debug.history_command import event_text
    from emu.debug.recording import history_of

    assert seen.la is not None, "an address is asked for"
    events = [
        event for event in history_of(program, overrides, seen.la)
        if event.step <= seen.step and event.what not in ("table cached", "table dropped")
    ]
    if not events:
        return [f"{seen.la:#x} was never mapped.", ""]
    hidden = len(events) - _EVENTS
    more = command("history", program.path, overrides, hex(seen.la))
    return [
        f"What happened to {seen.la:#x}{f' ({hidden} earlier events: {more})' if hidden > 0 else ''}:",
        *(f"  step {event.step:6d}, CPU {event.cpu}, {event.comm}/{event.pid}: {event_text(event)}" for event in events[-_EVENTS:]),
        "",
    ]


def _look(program: Program, config: MachineConfig, limit: int, result: RunResult) -> _Seen:
    track = Tracking.of(result.findings) if result.findings else NOTHING_TRACKED
    end = limit if result.outcome.ended == "limit" else _step_of_finding(program, config, limit, track)
    machine = Machine(config, limit=limit, track=track)
    _, linked = machine.load(program)
    seen = _Seen(machine)
    begin = end - _LEAD
    if begin <= 0:
        Tracer(machine, seen.observe)
    else:
        start = machine.hub.start

        def started() -> None:
            start()
            hub = machine.hub
            hub.policy = _CutAt(hub, hub.policy, begin, lambda: Tracer(machine, seen.observe))

        machine.hub.start = started  # type: ignore[method-assign]
    machine.run_loaded(program, linked)
    if result.findings and seen.la is None:
        seen.show(result.findings[0].cpu, result.findings[0].la)
    return seen


def _step_of_finding(program: Program, config: MachineConfig, limit: int, track: Tracking) -> int:
    """About how many instructions are complete when the first report is printed; all of the run's when none is."""
    machine = Machine(config, limit=limit, track=track)
    hub = machine.hub
    found: list[int] = []

    def on_line(line: LogLine) -> None:
        if not found and line.text.startswith(FINDINGS):
            found.append((hub.total() or 0) - hub.started)

    machine.kernel.log.on_line = on_line
    machine.run(program)
    return found[0] if found else (hub.total() or 0) - hub.started


class _CutAt:
    """A policy that calls `reached` once, when `begin` instructions of all CPUs are complete; the turns are another's."""

    def __init__(self, hub: Hub, policy: Policy, begin: int, reached: Callable[[], object]) -> None:
        self._hub, self._policy, self._begin, self._reached = hub, policy, begin, reached
        # The turn that was cut: its CPU, what that had executed, what it was given, and what was left of its budget.
        self._cut: tuple[int, int, int, int | None] | None = None

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The other policy's next turn, or the rest of its last."""
        cut, self._cut = self._cut, None
        left = self._begin - ((self._hub.total() or 0) - self._hub.started)
        if left <= 0:
            self._hub.policy = self._policy
            self._reached()
        if cut is not None and cut[0] in ready and clock.executed(cut[0]) == cut[1] + cut[2]:
            turn = Turn(cut[0], cut[3], fresh=False)
        else:
            turn = self._policy.turn(ready, last, paused, clock)
        if left <= 0 or (turn.budget is not None and turn.budget <= left):
            return turn
        rest = None if turn.budget is None else turn.budget - left
        self._cut = turn.cpu, clock.executed(turn.cpu), left, rest
        return dataclasses.replace(turn, budget=left)

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """What the other policy says."""
        return self._policy.due(cpu, executed)


class _Seen:
    """What is kept of a trace up to the finding."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.step = 0
        self.la: int | None = None
        self._kept: deque[AnyRecord] = deque()
        self._instructions = 0
        self._found = self._awaited = False
        self._since = 0
        self._drawn: list[str] = []

    def observe(self, record: AnyRecord) -> None:
        """Take a record."""
        if self._found or isinstance(record, Logged):
            # TLBSan reports in the middle of an instruction, which is told when it is done.
            if self._found and self._awaited and isinstance(record, Executed):
                self._awaited = False
                self._keep(record)
            elif isinstance(record, Logged) and not self._found and record.text.startswith(FINDINGS):
                self._found, self._awaited = True, record.text.startswith("BUG: TLBSan")
            return
        self.step = record.step
        if isinstance(record, Executed):
            self._keep(record)
        elif isinstance(record, Delivered):
            self._kept.append(record)
            self._look_at(record.cpu, record.accesses)

    def _keep(self, record: Executed) -> None:
        self._kept.append(record)
        self._instructions += 1
        while self._instructions > INSTRUCTIONS:
            self._instructions -= isinstance(self._kept.popleft(), Executed)
        self._look_at(record.cpu, record.accesses)

    def _look_at(self, cpu: int, accesses: tuple[Accessed, ...]) -> None:
        for access in accesses:
            if access.failed or access.tlb == "stale":
                self.show(cpu, access.la)

    def show(self, cpu: int, la: int) -> None:
        """Draw the walk of an address as it is now, and what lies around it."""
        kernel = self.machine.kernel
        self.la = la
        self._since = self.step
        report = walk_report(kernel, self.machine.cpus[cpu].reg("cr3"), la)
        walk = walk_lines(report, self.machine.place_of(la))
        cached = self.machine.cpus[cpu].mmu.query(la)
        tlb = "" if cached is None else f"CPU {cpu} has it cached: entry {cached.entry:#x}, physical {cached.pa(la):#x}"
        around = area_map(kernel, la)
        self._drawn = [
            "The access, as the page tables stood:", *(f"  {line}" for line in walk), *([f"  {tlb}"] if tlb else []), "",
            *(["Around it:", *(f"  {line}" for line in around), ""] if around else []),
        ]

    def lines(self) -> list[str]:
        """The last instructions, and the access that failed among them."""
        text: list[str] = []
        writer = TextWriter(text.append, walks=False)
        for record in self._kept:
            writer(record)
        first = self._kept[0].step if self._kept else 0
        if self._since < first:
            # An exception long before, which the guest got over.
            self.la, self._drawn = None, []
        count = self._instructions
        heading = f"The last {count} instructions before the finding:" if count else "No instruction ran before the finding."
        return [heading, *"".join(text).splitlines(), "", *self._drawn]
