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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from random import Random
from typing import NoReturn

from greenlet import getcurrent, greenlet

from emu.config import MachineConfig
from emu.guest.directives import MachineOptions
from emu.guest.expect import Outcome, judge
from emu.guest.link import Linked
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import Machine
from emu.run import RunResult, configure, run_program
from emu.translate_ahead import translate_ahead
from emu.turns import Clock, Plain, Policy, Scheduled, Step, Turn, format_schedule
from emu.visible import invisible_run, is_visible, next_instruction

DEFAULT_SCHEDULES = 1000
DEFAULT_PREEMPTIONS = 2
MAX_JOBS = 256
# How many machines a fork finds booted: more cost more to boot, fewer more per schedule.
_MACHINES = 16
# Of so many schedules twice as many machines are worth their time.
_MANY = 1000
# Of so many steps each two are left out together, which may be a preemption and the way back from it.
_PAIRED = 24
# How many schedules are searched for one with fewer preemptions than what a random one was shrunk to.
_SEARCHED = 1000
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


class Recording(Scheduled):
    """A schedule, and after its last step a record of where one more could follow: `points`."""

    looks = True

    def __init__(self, machine: Machine, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self._machine = machine
        self.points: list[Step] = []
        # A schedule names the first time that a CPU is at a count: where each was asked last.
        self._asked: dict[int, int] = {}

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """What the steps say; behind them nothing, but a point where it matters."""
        at = clock.executed(cpu)
        before, self._asked[cpu] = self._asked.get(cpu), at
        to = super().preempted(cpu, ready, clock)
        if to is not None or self.waits:
            return to
        if before != at and len(ready) > 1 and _matters(self._machine, cpu):
            self.points += [Step(cpu, at, other) for other in ready if other != cpu]
        return None

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the next step; behind the last one, to the next instruction that matters."""
        budget = super().bound(cpu, budget, clock)
        return budget if self.waits or self.alone else min(budget, invisible_run(self._machine.cpus[cpu]))


class Wandering(Plain):
    """A random schedule: of the points where it matters a random number passes, then any CPU that could go on does.

    That number is up to `most` or a little more, each power of two alike.
    """

    looks = True

    def __init__(self, machine: Machine, random: Random, most: int) -> None:
        super().__init__()
        self._machine = machine
        self._random = random
        self._bits = most.bit_length()
        self._pass = self._draw()
        self._asked: dict[int, int] = {}
        self.steps: list[Step] = []

    def _draw(self) -> int:
        return self._random.getrandbits(self._random.randint(0, self._bits))

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """A random CPU, or None."""
        at = clock.executed(cpu)
        before, self._asked[cpu] = self._asked.get(cpu), at
        if before == at or len(ready) == 1 or not _matters(self._machine, cpu):
            return None
        if self._pass:
            self._pass -= 1
            return None
        self._pass = self._draw()
        to = self._random.choice([other for other in ready if other != cpu])
        self.steps.append(Step(cpu, at, to))
        return to

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the next instruction that matters."""
        return budget if self.alone else min(budget, invisible_run(self._machine.cpus[cpu]))


class _Holding(Plain):
    """The plain schedule up to `point`, where the run is held until it is told by which policy it goes on."""

    def __init__(self, machine: Machine, point: Step) -> None:
        super().__init__()
        self._machine = machine
        self._point = point

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The turn of the plain schedule, or of the policy that takes over."""
        if last != self._point.cpu or clock.executed(last) != self._point.at or len(ready) == 1:
            return super().turn(ready, last, paused, clock)
        policy: Plain = getcurrent().parent.switch()
        policy.take_over(self)
        self._machine.hub.policy = policy
        return policy.turn(ready, last, paused, clock)

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the point."""
        left = self._point.at - clock.executed(cpu)
        return min(budget, left) if cpu == self._point.cpu and left > 0 else budget


class _Held:
    """A machine with a guest that has run up to the first of `points`, if there is one, and then goes on once."""

    def __init__(self, machine: Machine, points: Sequence[Step], run: Callable[[Policy], Outcome]) -> None:
        self.machine = machine
        self._run = greenlet(run)
        for point in points:
            self._run.switch(_Holding(machine, point))
            assert not self._run.dead, "two runs of the plain schedule are the same"

    def go_on(self, policy: Plain) -> Outcome:
        """The rest of the run."""
        self._run.parent = getcurrent()
        outcome: Outcome = self._run.switch(policy)
        return outcome


def _matters(machine: Machine, cpu: int) -> bool:
    return is_visible(next_instruction(machine.cpus[cpu], machine.cpus[cpu].rip))


@dataclass(frozen=True, slots=True)
class Task:
    """One schedule to run: its steps, or a random one by number; `record`: where one more preemption could follow."""

    steps: tuple[Step, ...] = ()
    number: int | None = None
    record: bool = False


@dataclass(frozen=True, slots=True)
class Done:
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
        policy = Recording(machine, ())
        self.plain = self.judge(self._run(machine, linked, policy))
        self._points = tuple(policy.points)
        # What forks would each have to translate for themselves is translated once.
        counters = [cpu.engine.block_counter for cpu in machine.cpus]
        self._code = [() if counter is None else counter.known for counter in counters]
        self._ready: list[_Held] = []
        self._collected = False

    def _boot(self) -> tuple[Machine, Linked]:
        machine = Machine(self.config, limit=self.limit)
        return machine, machine.load(self.program)[1]

    def _boot_ready(self, count: int) -> None:
        """Have so many machines ready, each at the first point where there is a choice, if there is one."""
        while len(self._ready) < count:
            machine, linked = self._boot()
            for cpu, blocks in zip(machine.cpus, self._code, strict=True):
                translate_ahead(cpu.engine, blocks)
            self._ready.append(_Held(machine, self._points[:1], partial(self._run, machine, linked)))
            self._collected = False

    def _run(self, machine: Machine, linked: Linked, policy: Policy) -> Outcome:
        machine.hub.policy = policy
        return machine.run_loaded(self.program, linked)

    def judge(self, outcome: Outcome) -> Tried:
        """The expectations that a run failed."""
        return Tried(tuple(judge(self.program.directives.expectations, outcome)))

    def attempt(self, steps: Sequence[Step]) -> Tried:
        """Run one schedule in a fork."""
        return self.run_together([Task(tuple(steps))])[0].tried

    def run_together(self, tasks: Sequence[Task]) -> list[Done]:
        """Run tasks in one fork, each on a machine of its own there."""
        return self._fork(tasks, 0).results()

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
        if not self._points:
            return Explored(1, True, None, (), None)
        run, exhausted = 1, False
        following: list[tuple[Step, ...]] = [(step,) for step in self._points]
        for number in range(1, preemptions + 1):
            # Pairs and more leave half of what is left to random schedules.
            share = (schedules - run + number - 1) // (1 if number == 1 else 2)
            exhausted = len(following) <= share
            tasks = [Task(steps, record=number < preemptions) for steps in following[:share]]
            following = []
            with closing(self.run_all(tasks, seed, jobs)) as results:
                for done in results:
                    run += 1
                    if done.tried.failures:
                        return self._found(run, done, 0)
                    if len(following) <= schedules:
                        following += [(*done.steps, point) for point in done.points]
            if not exhausted:
                break
        with closing(self.run_all([Task(number=number) for number in range(schedules - run)], seed, jobs)) as results:
            for done in results:
                run += 1
                if done.tried.failures:
                    return self._found(run, done, jobs)
        return Explored(run, exhausted, None, (), None)

    def _found(self, run: int, done: Done, jobs: int) -> Explored:
        """What is told of a failure; that of a random schedule is looked for in schedules with fewer preemptions, by `jobs`."""
        shrunk, tried = self.shrink(done.steps)
        fewer = self._find(tried.kind, len(shrunk) - 1, jobs) if jobs else None
        if fewer is not None:
            shrunk, tried = fewer.steps, fewer.tried
        return Explored(run, False, done.steps, shrunk, tried)

    def _find(self, kind: tuple[str, ...], preemptions: int, jobs: int) -> Done | None:
        """The first of the schedules with so many preemptions, or fewer, that fails in this way, if it is soon found."""
        following: list[tuple[Step, ...]] = [(step,) for step in self._points]
        left = _SEARCHED
        for number in range(1, preemptions + 1):
            tasks = [Task(steps, record=number < preemptions) for steps in following[:left]]
            left -= len(tasks)
            following = []
            with closing(self.run_all(tasks, 0, jobs)) as results:
                for done in results:
                    if done.tried.kind == kind:
                        return done
                    if len(following) < left:
                        following += [(*done.steps, point) for point in done.points]
        return None

    def run_all(self, tasks: Sequence[Task], seed: int, jobs: int) -> Generator[Done, None, None]:
        """Run tasks, in forks that each do as many as there are machines; the results come in the order of the tasks."""
        size = min(_MACHINES if len(tasks) < _MANY else 2 * _MACHINES, -(-len(tasks) // jobs))
        self._boot_ready(size)
        under_way: deque[_Fork] = deque()
        if not self._collected:
            # What is garbage now would be copied by every fork that frees it.
            gc.collect()
            self._collected = True
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

    def _fork(self, tasks: Sequence[Task], seed: int) -> _Fork:
        self._boot_ready(len(tasks))

        def work() -> list[_Sent]:
            return [self._do(task, seed, held) for task, held in zip(tasks, self._ready, strict=False)]

        return _Fork(work)

    def make_policy(self, task: Task, seed: int, machine: Machine) -> Recording | Wandering | Scheduled:
        """What decides the turns of a task."""
        if task.number is not None:
            return Wandering(machine, Random(seed << 64 | task.number), len(self._points))
        return Recording(machine, task.steps) if task.record else Scheduled(task.steps)

    def _do(self, task: Task, seed: int, held: _Held) -> _Sent:
        machine = held.machine
        policy = self.make_policy(task, seed, machine)
        if self._points and any(step.at < machine.hub.executed(step.cpu) for step in task.steps):
            outcome, _ = self.run_here(task.steps)
        else:
            outcome = held.go_on(policy)
        steps = policy.steps if isinstance(policy, Wandering) else task.steps
        points = policy.points if isinstance(policy, Recording) else ()
        return list(self.judge(outcome).failures), [_words(step) for step in steps], [_words(step) for step in points]

    def shrink(self, steps: Sequence[Step]) -> tuple[tuple[Step, ...], Tried]:
        """The fewest of the steps, in their order, that still fail in the same way: none can be left out.

        Of up to 24 no two can be left out either.
        """
        current = tuple(steps)
        tried = self.attempt(current)
        while True:
            tasks = [Task(fewer) for fewer in _fewer(current)]
            with closing(self.run_all(tasks, 0, 1)) as results:
                found = next((done for done in results if done.tried.kind == tried.kind), None)
            if found is None:
                return current, tried
            current, tried = found.steps, found.tried


def _fewer(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """The steps without half of them, a quarter, and so on to each one; then, of not too many, without each two."""
    size = len(steps) // 2 or len(steps)
    while size:
        for start in range(0, len(steps), size):
            yield steps[:start] + steps[start + size :]
        size //= 2
    if 2 < len(steps) <= _PAIRED:
        yield from combinations(steps, len(steps) - 2)


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

    def results(self) -> list[Done]:
        """Wait for the process; to be called once. Raises RuntimeError if it did not come to its end."""
        with open(self._read_end, "rb") as pipe:
            sent = pipe.read()
        _, status = os.waitpid(self._child, 0)
        if status:
            raise RuntimeError(f"the process of some schedules ended with status {status}")
        results: list[_Sent] = marshal.loads(sent)
        return [
            Done(Tried(tuple(failures)), tuple(Step(*step) for step in steps), tuple(Step(*point) for point in points))
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
