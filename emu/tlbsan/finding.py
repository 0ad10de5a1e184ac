"""What TLBSan finds, as plain data: a use, the store that made the entry stale, the flushes around it, the owners."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from emu.mmu.staleness import Cached, CachedTable


class Kind(Enum):
    """What kind of use it was; the values are those of the report's first line."""

    USE_AFTER_UNMAP = "use-after-unmap"
    FRAME_REUSED = "use-after-unmap of a frame that has another owner"
    ADDRESS_REUSED = "use of a translation of an address that has another owner"
    REVOKED_RIGHTS = "use of revoked rights"
    MOVED = "use of a translation that was moved"
    STALE_STRUCTURE = "walk through a stale paging-structure cache entry"
    OTHER_ADDRESS_SPACE = "use of another address space's translation"


@dataclass(frozen=True, slots=True)
class Fill:
    """When an entry came into the TLB: the CPU's executed instructions and RIP then, and who owned address and frame."""

    instructions: int
    rip: str
    address_owner: str
    frame_owner: str


@dataclass(slots=True)
class Store:
    """A change of page tables that left entries stale in some CPU.

    `moment` orders stores, flushes and invalidations; `time` is the machine's. `call` is the exported function under way and
    `caller` who called it; `trace` the call trace, only if it was tracked. `area` is what held the address then. `is_under_way`
    tells whether the kernel code that made it has not returned yet.
    """

    number: int
    moment: int
    time: int
    cpu: int
    start: int
    end: int
    function: str
    call: str | None
    caller: str | None
    trace: tuple[str, ...]
    area: object | None
    is_under_way: Callable[[], bool] = field(default=lambda: False, compare=False, repr=False)


@dataclass(slots=True)
class Flush:
    """A flush that kernel code asked for: range, cause, the CPUs it was sent to, and when each had done it."""

    number: int
    moment: int
    time: int
    cpu: int
    start: int
    end: int
    cause: str
    cpus: tuple[int, ...]
    done: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """One use of a stale translation.

    `rip` and `symbol` say where; `size` in bytes, 0 if unknown. `pa` is where the access went, None if its walk faulted;
    `now` what memory says. `store` is None when no change of memory did it. `verdict` says in words why no flush had removed the
    entry; `reached` are the CPUs on which the page was invalidated after the store.
    """

    kind: Kind
    cpu: int
    la: int
    access: int
    user: bool
    size: int
    rip: int
    symbol: str
    comm: str
    pid: int
    time: int
    trace: tuple[str, ...]
    entry: Cached | CachedTable
    pa: int | None
    now: str
    differs: tuple[str, ...]
    fill: Fill | None
    store: Store | None
    verdict: str
    reached: tuple[int, ...]
    address_owner: str
    frame_owner: str

    @property
    def page(self) -> int:
        """Number of the first page that the entry serves: with `cpu`, what to track."""
        return self.entry.la >> 12


@dataclass(frozen=True, slots=True)
class Tracking:
    """What a repeated run shall remember besides: fills of (cpu, page number), and the call traces of stores by number."""

    fills: frozenset[tuple[int, int]] = frozenset()
    stores: frozenset[int] = frozenset()

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Tracking:
        """Everything that these findings lack."""
        found = tuple(findings)
        return cls(
            frozenset((finding.cpu, finding.page) for finding in found),
            frozenset(finding.store.number for finding in found if finding.store is not None),
        )


@dataclass(slots=True)
class Counters:
    """Stores that left entries stale, entries marked, uses of marked entries looked at, legal ones, findings, repetitions."""

    stores: int = 0
    marked: int = 0
    uses: int = 0
    legal: int = 0
    findings: int = 0
    repeated: int = 0
