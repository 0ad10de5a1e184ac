"""Which CPU runs next, and for how long: the policies of a deterministic machine.

A schedule string names preemptions and injections, separated by commas, each tied to an instruction count of one CPU:

    0@153>1     when CPU 0 has executed 153 instructions since the guest began, CPU 1 runs on in its place
    1@20!nmi    an NMI arrives on CPU 1 before its 21st instruction
    1@20!0xfd   an interrupt with this vector does

Between them a CPU runs until it has nothing to do, or has run for FAIR instructions while another one could.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

DEFAULT_QUANTUM = 100_000
# A spinning CPU must not keep the one it waits for from running, whatever a schedule says.
FAIR = 100_000
NMI = 2
_STEP = re.compile(r"(\d+)@(\d+)(?:>(\d+)|!(nmi|0x[0-9a-f]+|\d+))")


class Clock(Protocol):
    """How many instructions each CPU has executed since the guest began."""

    def executed(self, cpu: int) -> int:
        """Instructions of a CPU."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A CPU's turn: at most `budget` instructions; None until it stops by itself."""

    cpu: int
    budget: int | None


class Policy(Protocol):
    """Decides turns. `ready` ascends and is not empty; `last` is the CPU of the last turn, `paused` if it ended by PAUSE."""

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The next turn."""

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """Vectors of the interrupts that arrive on a CPU now, NMI among them as vector 2. Each is returned once."""


def after(ready: Sequence[int], last: int) -> int:
    """The CPU whose turn comes after that of `last`."""
    return next((cpu for cpu in ready if cpu > last), ready[0])


class RoundRobin:
    """Every CPU in turn, for `quantum` instructions. Raises ValueError for a quantum below 1."""

    def __init__(self, quantum: int = DEFAULT_QUANTUM) -> None:
        if quantum < 1:
            raise ValueError(f"quantum is {quantum} instructions; it must be at least 1")
        self.quantum = quantum

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The next CPU, for a quantum."""
        return Turn(after(ready, last), self.quantum)

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """Nothing arrives from outside."""
        return ()


class Alone:
    """One CPU that runs until it stops by itself."""

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The only CPU."""
        return Turn(ready[0], None)

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """Nothing arrives from outside."""
        return ()


class RandomTurns:
    """Any ready CPU, for a random number of instructions: mostly few, sometimes many. The seed decides all of it."""

    def __init__(self, seed: int, longest: int = 1 << 10) -> None:
        self._random = Random(seed)
        self._bits = max(1, longest.bit_length() - 1)

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """A random CPU, for 1 to `longest` instructions, each power of two alike."""
        random = self._random
        return Turn(ready[random.randrange(len(ready))], 1 + random.getrandbits(random.randint(1, self._bits)))

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """Nothing arrives from outside."""
        return ()


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """What happens when CPU `cpu` has executed `at` instructions: CPU `to` goes on, or an interrupt `vector` arrives."""

    cpu: int
    at: int
    to: int | None = None
    vector: int | None = None

    def __str__(self) -> str:
        if self.to is not None:
            return f"{self.cpu}@{self.at}>{self.to}"
        return f"{self.cpu}@{self.at}!{'nmi' if self.vector == NMI else hex(self.vector or 0)}"


def parse_schedule(text: str, cpus: int) -> tuple[Step, ...]:
    """The steps of a schedule string. Raises ValueError that names the part that is wrong."""
    steps = []
    for part in text.split(","):
        found = _STEP.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"schedule has {part.strip()!r}; it must be CPU@COUNT>CPU, CPU@COUNT!nmi or CPU@COUNT!VECTOR")
        cpu, at, to, vector = found.groups()
        for number in (cpu, to):
            if number is not None and int(number) >= cpus:
                raise ValueError(f"schedule names CPU {int(number)} in {part.strip()!r}; the machine has {cpus}")
        number = None if vector is None else NMI if vector == "nmi" else int(vector, 0)
        if number is not None and number != NMI and not 32 <= number <= 255:
            raise ValueError(f"schedule names vector {number} in {part.strip()!r}; it must be nmi or 32 to 255")
        steps.append(Step(int(cpu), int(at), None if to is None else int(to), number))
    return tuple(steps)


def format_schedule(steps: Sequence[Step]) -> str:
    """The string that parse_schedule reads."""
    return ",".join(str(step) for step in steps)


class Scheduled:
    """The turns of a schedule: each step once, when its CPU reaches its count; steps of one CPU in the order given."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._waiting: dict[int, list[Step]] = {}
        for step in steps:
            self._waiting.setdefault(step.cpu, []).append(step)
        self._ran = 0

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The last CPU goes on, unless a step says otherwise, it cannot, or it has run long enough."""
        cpu = last if last in ready and not paused else after(ready, last)
        to = self._preempted(last, clock.executed(last))
        if to is not None and to in ready:
            cpu = to
        elif cpu == last and self._ran >= FAIR:
            cpu = after(ready, last)
        if cpu != last:
            self._ran = 0
        budget = FAIR
        waiting = self._waiting.get(cpu)
        if waiting:
            budget = min(budget, max(1, waiting[0].at - clock.executed(cpu)))
        self._ran += budget
        return Turn(cpu, budget)

    def _preempted(self, cpu: int, executed: int) -> int | None:
        waiting = self._waiting.get(cpu)
        to = None
        while waiting and waiting[0].at <= executed and waiting[0].to is not None:
            to = waiting.pop(0).to
        return to

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """The injections whose time has come."""
        waiting = self._waiting.get(cpu)
        vectors = []
        while waiting and waiting[0].at <= executed and waiting[0].vector is not None:
            vectors.append(waiting.pop(0).vector or 0)
        return vectors
