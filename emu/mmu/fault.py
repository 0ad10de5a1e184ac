"""Faults of an access: #PF with its error code, #GP for a non-canonical address or an illegal register value."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class PfError(IntFlag):
    """Page-fault error code (SDM vol. 3A 4.7)."""

    P = 1
    W = 2
    U = 4
    RSVD = 8
    I = 16  # noqa: E741 - the SDM's name
    PK = 32


class Access(IntEnum):
    """Kind of access; the numbers are those of Unicorn's fill callback."""

    READ = 16
    WRITE = 17
    FETCH = 18


class PageFault(Exception):
    """#PF: `la` faulting linear address (CR2), `error` code, and the `level` and `entry` that refused.

    A fault on a cached translation carries the level and effective entry of the TLB. The fields do not change.
    """

    __slots__ = ("entry", "error", "la", "level")

    def __init__(self, la: int, error: int, level: int, entry: int) -> None:
        super().__init__(la, error, level, entry)
        self.la = la
        self.error = error
        self.level = level
        self.entry = entry

    def __str__(self) -> str:
        flags = PfError(self.error)
        return f"#PF at {self.la:#x}, error {flags.value:#x} ({flags.name or 0}), level {self.level}"


class NonCanonical(Exception):
    """The linear address `la` is not canonical: #GP, or #SS for a stack access (SDM vol. 1, 3.3.7.1)."""

    __slots__ = ("la",)

    def __init__(self, la: int) -> None:
        super().__init__(la)
        self.la = la

    def __str__(self) -> str:
        return f"non-canonical address {self.la:#x}"


class GeneralProtection(Exception):
    """#GP(0) of a privileged instruction: `reason` names the rule that the operand breaks. Nothing was changed."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
