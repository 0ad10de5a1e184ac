"""Schedule explorer: the same guest under many interleavings, until one of them shows a failure.

The machine boots and loads the guest once. A run of it then forks wherever another CPU could take the turn and that could matter
(emu/visible.py): the child gives the turn away, the parent waits for it and goes on as before. So schedules share what they have
in common, and each one that differs is run. First come all schedules with one preemption, then those with two, and so on up to a
bound; then random ones. What is found is shrunk: preemptions are taken away as long as the same failure stays.

Every schedule is named by a string (emu/turns.py), which `vmemu run --schedule` plays again.
"""

from __future__ import annotations

import dataclasses
import gc
import marshal
import mmap
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from emu.config import MachineConfig
from emu.guest.directives import MachineOptions
from emu.guest.expect import Outcome, judge
from emu.guest.link import Linked
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import Machine
from emu.run import RunResult, configure, run_program
from emu.turns import Clock, Plain, Policy, Scheduled, Step, format_schedule
from emu.visible import invisible_run, is_visible, next_instruction

DEFAULT_SCHEDULES = 1000
DEFAULT_PREEMPTIONS = 2
MAX_JOBS = 256
# At a point where another CPU could go on, a random schedule preempts once in so many times.
_RARITY = (2, 4, 8, 16, 32, 64)
_NUMBER = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d+")
_FOUND = 1


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


class _Exploring:
    """One process's share of the exploration, in memory that its forks share: how many schedules were run, whether one failed."""

    def __init__(self, quota: int) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._shared).cast("Q")
        self.quota = quota

    @property
    def run(self) -> int:
        """Schedules run so far."""
        return self._words[0]

    def count(self) -> None:
        """One more schedule was run."""
        self._words[0] += 1

    @property
    def over(self) -> bool:
        """A failure was found, or the quota is used up."""
        return bool(self._words[1]) or self._words[0] >= self.quota

    @property
    def found(self) -> bool:
        """A failure was found."""
        return bool(self._words[1])

    def stop(self) -> None:
        """A failure was found."""
        self._words[1] = _FOUND


class _Branching(Plain):
    """The plain schedule, and at each point that matters a fork for every CPU that could go on instead.

    `steps` are the preemptions so far, `left` how many may follow. Of the first preemptions those with number `job` modulo `jobs`
    are this process's.
    """

    def __init__(self, machine: Machine, exploring: _Exploring, preemptions: int, job: int, jobs: int) -> None:
        super().__init__()
        self._machine = machine
        self._exploring = exploring
        self._job = job
        self._jobs = jobs
        self._first = 0
        self.left = preemptions
        self.steps: list[Step] = []
        self._decided: tuple[int, int] | None = None

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """None in the process that goes on; the other CPU in the child that gives the turn to it."""
        if not self.left:
            return None
        at = clock.executed(cpu)
        if self._decided == (cpu, at) or not is_visible(next_instruction(self._machine.cpus[cpu], self._machine.cpus[cpu].rip)):
            return None
        self._decided = cpu, at
        for to in ready:
            if to == cpu:
                continue
            if not self.steps:
                self._first += 1
                if (self._first - 1) % self._jobs != self._job:
                    continue
            if self._exploring.over:
                break
            child = os.fork()
            if not child:
                self.left -= 1
                self.steps.append(Step(cpu, at, to))
                return to
            _join(child)
        return None

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the next instruction that matters, as long as a preemption may follow."""
        return min(budget, invisible_run(self._machine.cpus[cpu])) if self.left else budget


class _Wandering(Plain):
    """A random schedule: at each point that matters, now and then, any CPU that could go on does."""

    def __init__(self, machine: Machine, random: Random) -> None:
        super().__init__()
        self._machine = machine
        self._random = random
        self._rarity = random.choice(_RARITY)
        self.steps: list[Step] = []
        self._decided: tuple[int, int] | None = None

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """A random CPU, or None."""
        at = clock.executed(cpu)
        if len(ready) == 1 or self._decided == (cpu, at):
            return None
        if not is_visible(next_instruction(self._machine.cpus[cpu], self._machine.cpus[cpu].rip)):
            return None
        self._decided = cpu, at
        if self._random.randrange(self._rarity):
            return None
        to = self._random.choice([other for other in ready if other != cpu])
        self.steps.append(Step(cpu, at, to))
        return to

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the next instruction that matters."""
        return min(budget, invisible_run(self._machine.cpus[cpu]))


class Explorer:
    """A guest, and a booted machine with it loaded, ready to be forked. Raises GuestError, ValueError, MemoryError."""

    def __init__(self, program: Program, config: MachineConfig, limit: int) -> None:
        self.program = program
        self.config = config
        self.limit = limit
        # What forks would each have to do for themselves is done once: caches of decoded code fill on a machine of its own.
        first, linked = self._boot()
        self.plain = self._judge(self._run(first, linked, Scheduled(())))
        self.machine, self.linked = self._boot()

    def _boot(self) -> tuple[Machine, Linked]:
        machine = Machine(self.config, limit=self.limit)
        return machine, machine.load(self.program)[1]

    def _run(self, machine: Machine, linked: Linked, policy: Policy) -> Outcome:
        machine.hub.policy = policy
        return machine.run_loaded(self.program, linked)

    def _judge(self, outcome: Outcome) -> Tried:
        return Tried(tuple(judge(self.program.directives.expectations, outcome)))

    def attempt(self, steps: Sequence[Step]) -> Tried:
        """Run one schedule in a fork."""

        def work(send: Callable[[object], None]) -> None:
            send(list(self._judge(self._run(self.machine, self.linked, Scheduled(steps))).failures))

        return Tried(tuple(_forked(work)[0]))  # type: ignore[arg-type]

    def run_here(self, steps: Sequence[Step]) -> tuple[Outcome, Machine]:
        """Run one schedule on a machine of its own, to look at."""
        machine, linked = self._boot()
        return self._run(machine, linked, Scheduled(steps)), machine

    def explore(self, schedules: int, preemptions: int, seed: int, jobs: int = 1) -> Explored:
        """Run up to `schedules` schedules in `jobs` processes, each with its share of them.

        The result depends on all four arguments, never on the host.
        """
        if self.plain.failures:
            return Explored(1, False, (), (), self.plain)
        if self.config.cpus == 1:
            return Explored(1, True, None, (), None)
        gc.collect()
        gc.freeze()
        run, found, exhausted = 1, None, False
        for number in range(1, preemptions + 1):
            # Pairs and more leave half of what is left to random schedules.
            share = (schedules - run + number - 1) // (1 if number == 1 else 2)
            counted, found, exhausted = self._pass(share, jobs, number)
            run += counted
            if found is not None or not exhausted:
                break
        if found is None and run < schedules:
            counted, found, _ = self._pass(schedules - run, jobs, 0, seed)
            run += counted
        if found is None:
            return Explored(run, exhausted, None, (), None)
        shrunk, tried = self.shrink(found)
        return Explored(run, False, found, shrunk, tried)

    def _pass(
        self, schedules: int, jobs: int, preemptions: int, seed: int = 0
    ) -> tuple[int, tuple[Step, ...] | None, bool]:
        """All schedules with so many preemptions, random ones with 0; `schedules` at most.

        Returns how many were run, the first job's failing one, and whether every job came to its end within its share.
        """
        shares = [_Exploring(schedules // jobs + (job < schedules % jobs)) for job in range(jobs)]

        def worker(job: int) -> Callable[[Callable[[object], None]], None]:
            def work(send: Callable[[object], None]) -> None:
                if preemptions:
                    self._branch(_Branching(self.machine, shares[job], preemptions, job, jobs), shares[job], send)
                else:
                    self._wander(shares[job], seed, job, jobs, send)

            return work

        results = [_forked(work) for work in [worker(0)]] if jobs == 1 else _forked_all([worker(job) for job in range(jobs)])
        found = next((tuple(Step(*step) for step in sent[0]) for sent in results if sent), None)  # type: ignore[attr-defined]
        return sum(share.run for share in shares), found, all(share.run < share.quota for share in shares)

    def _branch(self, policy: _Branching, exploring: _Exploring, send: Callable[[object], None]) -> None:
        tried = self._judge(self._run(self.machine, self.linked, policy))
        # The trunk, and whatever preempted less often than it might, was run in a pass before.
        if policy.left:
            return
        exploring.count()
        if tried.failures and not exploring.found:
            exploring.stop()
            send([_words(step) for step in policy.steps])

    def _wander(self, exploring: _Exploring, seed: int, job: int, jobs: int, send: Callable[[object], None]) -> None:
        for number in range(exploring.quota):
            child = os.fork()
            if not child:
                policy = _Wandering(self.machine, Random(seed << 64 | number * jobs + job))
                tried = self._judge(self._run(self.machine, self.linked, policy))
                if tried.failures:
                    exploring.stop()
                    send([_words(step) for step in policy.steps])
                return
            _join(child)
            exploring.count()
            if exploring.found:
                return

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


def _words(step: Step) -> tuple[int, int, int | None]:
    return step.cpu, step.at, step.to


def _join(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a schedule's process ended with status {status}")


def _forked(work: Callable[[Callable[[object], None]], None]) -> list[object]:
    """What `work`, and forks of its own, send from a fork."""
    return _forked_all([work])[0]


def _forked_all(works: Sequence[Callable[[Callable[[object], None]], None]]) -> list[list[object]]:
    children = []
    for work in works:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            _work(work, write_end)
        os.close(write_end)
        children.append((child, read_end))
    results: list[list[object]] = []
    for child, read_end in children:
        sent: list[object] = []
        with open(read_end, "rb") as pipe:
            while True:
                try:
                    sent.append(marshal.load(pipe))
                except EOFError:
                    break
        _join(child)
        results.append(sent)
    return results


def _work(work: Callable[[Callable[[object], None]], None], pipe: int) -> None:
    """Do the work of a fork, and end it; a fork of the fork comes out here too."""
    status = 1
    gc.disable()
    try:
        work(lambda data: _send(pipe, data))
        status = 0
    finally:
        os._exit(status)


def _send(pipe: int, data: object) -> None:
    os.write(pipe, marshal.dumps(data))  # type: ignore[arg-type]
