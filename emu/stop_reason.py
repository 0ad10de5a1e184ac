"""Why an engine came back from a run."""

from __future__ import annotations

from enum import Enum, auto


class StopReason(Enum):
    """Why the engine came back."""

    HALT = auto()          # HLT was executed; RIP is behind it
    INTERCEPT = auto()     # before a privileged instruction
    INTERRUPT = auto()     # the instruction raised an exception or software interrupt: `vector`
    INVALID = auto()       # undefined opcode
    FAULT = auto()         # an access could not be translated: `fault`
    LIMIT = auto()         # the instruction limit
    ASKED = auto()         # somebody called `stop`
    STEPPED = auto()       # one instruction was executed, as asked
    BUDGET = auto()        # the run executed as many instructions as it was allowed; RIP is at the next
    PAUSE = auto()         # PAUSE was executed, and `pause_yields` is set; RIP is behind it


# Stops at an instruction of a block that has begun.
INSIDE = frozenset((StopReason.FAULT, StopReason.INTERCEPT, StopReason.INTERRUPT, StopReason.INVALID, StopReason.PAUSE))
