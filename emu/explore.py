"""Schedule explorer: the same guest under many interleavings, until one of them shows a failure.

A run in the plain schedule records where another CPU could take the turn and that could matter (emu/visible.py). Each of these
points is a schedule with one preemption, whose run records where a second could follow, and so on up to a bound; then come random
ones. What is found is shrunk: preemptions are taken away as long as the same failure stays.

Some machines are booted with the guest loaded, once. A fork of the process runs one schedule on each of them, and ends: the next
one finds them as they were. One machine would do, but a fork costs as much as several runs: most of it is pages that it copies as
soon as it writes to them, and several machines share most of those.

Every schedule is named by a string (emu/turns.py), which `vmemu run --schedule` plays again.
"""

from __future__ import annotations

import dataclasses
import gc
import marshal
import os
import re
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NoReturn

from emu.config import MachineConfig
from emu.guest.directives import MachineOptions
from emu.guest.expect import Outcome, judge
from emu.guest.link import Linked
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import Machine
from emu.run import RunResult, configure, run_program
from emu.translate_ahead import translate_ahead
from emu.turns import Clock, Plain, Policy, Scheduled, Step, format_schedule
from emu.visible import invisible_run, is_visible, next_instruction

DEFAULT_SCHEDULES = 1000
DEFAULT_PREEMPTIONS = 2
MAX_JOBS = 256
# A random schedule lets a CPU go on for up to so many instructions, one of these numbers for all of it.
_LONGEST = (2, 8, 32, 64, 256, 1024)
# How many machines a fork finds booted: more cost more to boot, fewer more per schedule.
_MACHINES = 16
_NUMBER = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d+")


@dataclass(frozen=True, slots=True)
class Tried:
    """What one schedule came to: the expectations it failed."""

    failures: tuple[str, ...]

    @property
    def kind(self) -> tuple[str, ...]:
        """The failures without their numbers: two runs with the same kind failed in the same way."""
        return tuple(_NUMBER.sub("N", failure) for failure in self.failures)


@dataclass(frozen=True, slots=True)
class Explored:
    """The end of an exploration: `schedules` were run, `exhausted` says that there are no others with so few preemptions.

    `found` is the first that failed, `shrunk` the fewest of its steps that still do, `tried` what those came to.
    """

    schedules: int
    exhausted: bool
    found: tuple[Step, ...] | None
    shrunk: tuple[Step, ...]
    tried: Tried | None


class _Recording(Scheduled):
    """A schedule, and after its last step a record of where one more could follow: `points`."""

    def __init__(self, machine: Machine, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self._machine = machine
        self.points: list[Step] = []
        self._decided: tuple[int, int] | None = None

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """What the steps say; behind them nothing, but a point where it matters."""
        to = super().preempted(cpu, ready, clock)
        if to is not None or self.waits:
            return to
        at = clock.executed(cpu)
        if self._decided != (cpu, at) and len(ready) > 1 and _matters(self._machine, cpu):
            self.points += [Step(cpu, at, other) for other in ready if other != cpu]
        self._decided = cpu, at
        return None

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the next step; behind the last one, to the next instruction that matters."""
        budget = super().bound(cpu, budget, clock)
        return budget if self.waits else min(budget, invisible_run(self._machine.cpus[cpu]))


class _Wandering(Plain):
    """A random schedule: CPUs go on for random numbers of instructions, and to the next one that matters."""

    def __init__(self, machine: Machine, random: Random) -> None:
        super().__init__()
        self._machine = machine
        self._random = random
        self._longest = random.choice(_LONGEST)
        self._until: dict[int, int] = {}
        self.steps: list[Step] = []

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """A random CPU, or None."""
        at = clock.executed(cpu)
        until = self._until.get(cpu)
        if until is not None and (at < until or not _matters(self._machine, cpu)):
            return None
        # The one more is so that no two decisions fall on one instruction, of which a schedule names the first.
        self._until[cpu] = at + 1 + self._random.randrange(self._longest)
        if until is None or len(ready) == 1:
            return None
        to = self._random.choice([other for other in ready if other != cpu])
        self.steps.append(Step(cpu, at, to))
        return to

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """What is left of the random number, then up to the next instruction that matters."""
        left = self._until[cpu] - clock.executed(cpu)
        return min(budget, left if left > 0 else invisible_run(self._machine.cpus[cpu]))


def _matters(machine: Machine, cpu: int) -> bool:
    return is_visible(next_instruction(machine.cpus[cpu], machine.cpus[cpu].rip))


@dataclass(frozen=True, slots=True)
class _Task:
    """One schedule to run: its steps, or a random one by number; `record`: where one more preemption could follow."""

    steps: tuple[Step, ...] = ()
    number: int | None = None
    record: bool = False


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of a task: its failures, the steps of a schedule that it chose itself, and the points it recorded."""

    tried: Tried
    steps: tuple[Step, ...]
    points: tuple[Step, ...]


class Explorer:
    """A guest, and booted machines with it loaded, ready to be forked. Raises GuestError, ValueError, MemoryError."""

    def __init__(self, program: Program, config: MachineConfig, limit: int) -> None:
        self.program = program
        self.config = config
        self.limit = limit
        machine, linked = self._boot()
        policy = _Recording(machine, ())
        self.plain = self._judge(self._run(machine, linked, policy))
        self._points = tuple(policy.points)
        # What forks would each have to translate for themselves is translated once.
        counters = [cpu.engine.block_counter for cpu in machine.cpus]
        self._code = [() if counter is None else counter.known for counter in counters]
        self._ready: list[tuple[Machine, Linked]] = []

    def _boot(self) -> tuple[Machine, Linked]:
        machine = Machine(self.config, limit=self.limit)
        return machine, machine.load(self.program)[1]

    def _boot_ready(self, count: int) -> None:
        """Have so many machines ready, each as the first was before it ran."""
        while len(self._ready) < count:
            machine, linked = self._boot()
            for cpu, blocks in zip(machine.cpus, self._code, strict=True):
                translate_ahead(cpu.engine, blocks)
            self._ready.append((machine, linked))

    def _run(self, machine: Machine, linked: Linked, policy: Policy) -> Outcome:
        machine.hub.policy = policy
        return machine.run_loaded(self.program, linked)

    def _judge(self, outcome: Outcome) -> Tried:
        return Tried(tuple(judge(self.program.directives.expectations, outcome)))

    def attempt(self, steps: Sequence[Step]) -> Tried:
        """Run one schedule in a fork."""
        return self._fork([_Task(tuple(steps))], 0).results()[0].tried

    def run_here(self, steps: Sequence[Step]) -> tuple[Outcome, Machine]:
        """Run one schedule on a machine of its own, to look at."""
        machine, linked = self._boot()
        return self._run(machine, linked, Scheduled(steps)), machine

    def explore(self, schedules: int, preemptions: int, seed: int, jobs: int = 1) -> Explored:
        """Run up to `schedules` schedules in `jobs` processes at a time.

        The result depends on the first three arguments, never on `jobs` or the host.
        """
        if self.plain.failures:
            return Explored(1, False, (), (), self.plain)
        if self.config.cpus == 1:
            return Explored(1, True, None, (), None)
        run, exhausted = 1, False
        following: list[tuple[Step, ...]] = [(step,) for step in self._points]
        for number in range(1, preemptions + 1):
            # Pairs and more leave half of what is left to random schedules.
            share = (schedules - run + number - 1) // (1 if number == 1 else 2)
            exhausted = len(following) <= share
            tasks = [_Task(steps, record=number < preemptions) for steps in following[:share]]
            following = []
            for done in self._run_all(tasks, seed, jobs):
                run += 1
                if done.tried.failures:
                    return self._found(run, done.steps)
                if len(following) <= schedules:
                    following += [(*done.steps, point) for point in done.points]
            if not exhausted:
                break
        for done in self._run_all([_Task(number=number) for number in range(schedules - run)], seed, jobs):
            run += 1
            if done.tried.failures:
                return self._found(run, done.steps)
        return Explored(run, exhausted, None, (), None)

    def _found(self, run: int, steps: tuple[Step, ...]) -> Explored:
        shrunk, tried = self.shrink(steps)
        return Explored(run, False, steps, shrunk, tried)

    def _run_all(self, tasks: Sequence[_Task], seed: int, jobs: int) -> Iterator[_Done]:
        """Run tasks, in forks that each do as many as there are machines; the results come in the order of the tasks."""
        size = min(_MACHINES, -(-len(tasks) // jobs))
        self._boot_ready(size)
        under_way: deque[_Fork] = deque()
        gc.collect()
        gc.freeze()
        try:
            for start in range(0, len(tasks), max(size, 1)):
                under_way.append(self._fork(tasks[start : start + size], seed))
                if len(under_way) == jobs:
                    yield from under_way.popleft().results()
            while under_way:
                yield from under_way.popleft().results()
        finally:
            for fork in under_way:
                fork.results()
            gc.unfreeze()

    def _fork(self, tasks: Sequence[_Task], seed: int) -> _Fork:
        self._boot_ready(len(tasks))

        def work() -> list[_Sent]:
            return [self._do(task, seed, *ready) for task, ready in zip(tasks, self._ready, strict=False)]

        return _Fork(work)

    def _do(self, task: _Task, seed: int, machine: Machine, linked: Linked) -> _Sent:
        steps, points = list(task.steps), []
        if task.number is not None:
            policy = _Wandering(machine, Random(seed << 64 | task.number))
            outcome = self._run(machine, linked, policy)
            steps = policy.steps
        elif task.record:
            recording = _Recording(machine, steps)
            outcome = self._run(machine, linked, recording)
            points = recording.points
        else:
            outcome = self._run(machine, linked, Scheduled(steps))
        return list(self._judge(outcome).failures), [_words(step) for step in steps], [_words(step) for step in points]

    def shrink(self, steps: Sequence[Step]) -> tuple[tuple[Step, ...], Tried]:
        """The fewest of the steps, in their order, that still fail in the same way: none can be left out."""
        current = tuple(steps)
        tried = self.attempt(current)
        kind = tried.kind
        shorter = True
        while shorter:
            shorter = False
            for index in range(len(current)):
                without = current[:index] + current[index + 1 :]
                attempt = self.attempt(without)
                if attempt.kind == kind:
                    current, tried, shorter = without, attempt, True
                    break
        return current, tried


@dataclass(frozen=True, slots=True)
class ExploredFile:
    """What the exploration of a guest came to; `result` is the run of the shrunk schedule, if one failed."""

    path: str
    schedules: int
    exhausted: bool
    found: str | None
    schedule: str
    result: RunResult | None


def explore_file(path: str, overrides: MachineOptions, schedules: int, preemptions: int, jobs: int) -> ExploredFile:
    """Explore one guest. Raises GuestError for bad input, ValueError or MemoryError for a machine that cannot be."""
    program = load(path)
    config, limit = configure(program.directives.machine, overrides)
    if config.schedule:
        raise ValueError(f"schedule is {config.schedule!r}; an exploration makes its own")
    if config.cpus == 1:
        raise ValueError("number of CPUs is 1; there is nothing to interleave (--cpus N)")
    explorer = Explorer(program, config, limit)
    explored = explorer.explore(schedules, preemptions, config.seed, jobs)
    if explored.found is None:
        return ExploredFile(path, explored.schedules, explored.exhausted, None, "", None)
    schedule = format_schedule(explored.shrunk)
    result = run_program(program, dataclasses.replace(overrides, schedule=schedule))
    return ExploredFile(path, explored.schedules, False, format_schedule(explored.found), schedule, result)


_Words = tuple[int, int, int | None]
_Sent = tuple[list[str], list[_Words], list[_Words]]


def _words(step: Step) -> _Words:
    return step.cpu, step.at, step.to


class _Fork:
    """A process that does `work`, and its results."""

    def __init__(self, work: Callable[[], list[_Sent]]) -> None:
        self._read_end, write_end = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.close(self._read_end)
            _work(work, write_end)
        os.close(write_end)

    def results(self) -> list[_Done]:
        """Wait for the process; to be called once. Raises RuntimeError if it did not come to its end."""
        with open(self._read_end, "rb") as pipe:
            sent = pipe.read()
        _, status = os.waitpid(self._child, 0)
        if status:
            raise RuntimeError(f"the process of some schedules ended with status {status}")
        results: list[_Sent] = marshal.loads(sent)
        return [
            _Done(Tried(tuple(failures)), tuple(Step(*step) for step in steps), tuple(Step(*point) for point in points))
            for failures, steps, points in results
        ]


def _work(work: Callable[[], list[_Sent]], pipe: int) -> NoReturn:
    """Do the work of a fork, and end it."""
    status = 1
    gc.disable()
    try:
        with open(pipe, "wb") as sent:
            sent.write(marshal.dumps(work()))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)
