"""Which CPU runs next, and for how long: the policies of a deterministic machine.

A schedule string names preemptions and injections, separated by commas, each tied to an instruction count of one CPU:

    0@153>1     when CPU 0 has executed 153 instructions since the guest began, CPU 1 runs on in its place
    1@20!nmi    an NMI arrives on CPU 1 before its 21st instruction
    1@20!0xfd   an interrupt with this vector does

The string "plain" has no steps. Between steps a CPU runs until it has nothing to do, or has run for FAIR instructions while
another one could.
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
# The CPU of the last turn before the first one.
NOBODY = -1
PLAIN = "plain"
_STEP = re.compile(r"(\d+)@(\d+)(?:>(\d+)|!(nmi|0x[0-9a-f]+|\d+))")


class Clock(Protocol):
    """How many instructions each CPU has executed since the guest began."""

    def executed(self, cpu: int) -> int:
        """Instructions of a CPU."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A CPU's turn: at most `budget` instructions; None until it stops by itself.

    Not `fresh`: the CPU's last turn, which was cut only to look at it, goes on as if it had not been. `until_company`: the turn is
    cut as soon as another CPU could go on.
    """

    cpu: int
    budget: int | None
    fresh: bool = True
    until_company: bool = False


class Policy(Protocol):
    """Decides turns. `ready` ascends and is not empty; `last` is the CPU of the last turn or NOBODY, `paused` if by PAUSE."""

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
    """The steps of a schedule string; "plain" has none. Raises ValueError that names the part that is wrong."""
    if text == PLAIN:
        return ()
    steps = []
    for part in text.split(","):
        found = _STEP.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"schedule has {part.strip()!r}; it must be plain, CPU@COUNT>CPU, CPU@COUNT!nmi or CPU@COUNT!VECTOR")
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
    return ",".join(str(step) for step in steps) or PLAIN


class Plain:
    """The same CPU goes on until it has nothing to do, pauses, or has run FAIR instructions while another one could."""

    # The policy wants to be asked as soon as another CPU could go on; while none can, it need bound no turn.
    looks = False

    def __init__(self) -> None:
        self._since = 0
        self.alone = False
        # The count at which the turn under way ends, unless it is cut.
        self._end = 0

    def turn(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> Turn:
        """The CPU that goes on, until it has run long enough."""
        cpu = self.choose(ready, last, paused, clock)
        budget = max(1, FAIR - (clock.executed(cpu) - self._since))
        executed = clock.executed(cpu)
        fresh = cpu != last or paused or executed >= self._end
        self._end = executed + budget
        self.alone = len(ready) == 1
        return Turn(cpu, self.bound(cpu, budget, clock), fresh, self.looks and self.alone)

    def choose(self, ready: Sequence[int], last: int, paused: bool, clock: Clock) -> int:
        """The next CPU: the last one if it may go on, unless `preempted` says otherwise."""
        cpu = last
        if last not in ready or paused or clock.executed(last) - self._since >= FAIR:
            cpu = after(ready, last)
        while (to := self.preempted(cpu, ready, clock)) is not None:
            cpu = to
        if cpu != last or clock.executed(cpu) - self._since >= FAIR:
            self._since = clock.executed(cpu)
        return cpu

    def take_over(self, other: Plain) -> None:
        """Go on in the middle of a run that was `other`'s so far."""
        self._since, self._end = other._since, other._end

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """Which ready CPU takes the turn of `cpu` now; None for none."""
        return None

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """The instructions of the turn, of `budget` at most."""
        return budget

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """Nothing arrives from outside."""
        return ()


class Scheduled(Plain):
    """The turns of a schedule: each step once, when its CPU's turn comes at its count; steps of one CPU in the order given.

    A preemption in favour of a CPU that has nothing to do is none.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self._waiting: dict[int, list[Step]] = {}
        for step in steps:
            self._waiting.setdefault(step.cpu, []).append(step)

    @property
    def waits(self) -> bool:
        """Some step's time has not come."""
        return any(self._waiting.values())

    def preempted(self, cpu: int, ready: Sequence[int], clock: Clock) -> int | None:
        """What the steps say whose time has come."""
        waiting = self._waiting.get(cpu)
        while waiting and waiting[0].at <= clock.executed(cpu) and waiting[0].to is not None:
            to = waiting.pop(0).to
            if to in ready and to != cpu:
                return to
        return None

    def bound(self, cpu: int, budget: int, clock: Clock) -> int:
        """Up to the CPU's next step."""
        waiting = self._waiting.get(cpu)
        return min(budget, max(1, waiting[0].at - clock.executed(cpu))) if waiting else budget

    def due(self, cpu: int, executed: int) -> Sequence[int]:
        """The injections whose time has come."""
        waiting = self._waiting.get(cpu)
        vectors = []
        while waiting and waiting[0].at <= executed and waiting[0].vector is not None:
            vectors.append(waiting.pop(0).vector or 0)
        return vectors
