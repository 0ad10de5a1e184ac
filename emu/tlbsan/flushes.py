"""What was flushed when, and why that did not remove a stale entry."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from emu.mmu.watch import Key
from emu.tlbsan.finding import Flush, Store

KEPT = 256
EVERYTHING = 1 << 64


@dataclass(frozen=True, slots=True)
class Invalidation:
    """What one CPU removed from its TLB: None stands for every PCID, every address; `shared`: the global entries too."""

    moment: int
    cpu: int
    pcid: int | None
    la: int | None
    shared: bool

    def covers(self, key: Key) -> bool:
        """Whether it removes such an entry from the CPU that does it."""
        if self.la is not None and not key.table and not key.la <= self.la < key.la + key.size:
            return False
        if key.pcid < 0:
            return self.shared
        return self.pcid is None or self.pcid == key.pcid


class Flushes:
    """The last flushes and invalidations, oldest first."""

    def __init__(self) -> None:
        self.flushes: deque[Flush] = deque(maxlen=KEPT)
        self.invalidations: deque[Invalidation] = deque(maxlen=KEPT)
        self._by_number: dict[int, Flush] = {}

    def issued(self, flush: Flush) -> None:
        """A flush was asked for."""
        if len(self.flushes) == KEPT:
            self._by_number.pop(self.flushes[0].number, None)
        self.flushes.append(flush)
        self._by_number[flush.number] = flush

    def done(self, number: int, cpu: int, moment: int) -> None:
        """A CPU has done its part of a flush."""
        flush = self._by_number.get(number)
        if flush is not None:
            flush.done[cpu] = moment

    def reached(self, key: Key, store: Store | None) -> tuple[int, ...]:
        """The CPUs that invalidated such an entry after the store."""
        since = -1 if store is None else store.moment
        return tuple(sorted({one.cpu for one in self.invalidations if one.moment > since and one.covers(key)}))

    def verdict(self, key: Key, la: int, cpu: int, store: Store, *, lazy: bool) -> str:
        """Why the entry of `la` is still in the CPU's TLB, as the end of the sentence "flush: ..."."""
        after = [flush for flush in self.flushes if flush.moment > store.moment]
        covering = [flush for flush in after if _covers(flush, la, key)]
        if covering:
            return _why_kept(covering[-1], key, cpu)
        if after:
            touching = [flush for flush in after if flush.start < store.end and store.start < flush.end]
            if touching:
                flush = touching[-1]
                return f"{_name(flush)} does not cover the page at {key.la:#x}"
        if lazy:
            waits = "the area waits for the next purge"
            same = [flush for flush in self.flushes if flush.moment < store.moment and _is_for(flush, store)]
            return f"none since the store; {_name(same[-1])} came before it; {waits}" if same else f"none yet: {waits}"
        since = f"none of the {len(after)} since the store covers the page" if after else "none since the store"
        # A flush of everything comes before any store: it says nothing about this one, once others have come after it.
        earlier = [
            flush for flush in self.flushes
            if flush.moment < store.moment and _covers(flush, la, key) and not (after and flush.end - flush.start >= EVERYTHING)
        ]
        return f"{since}; {_name(earlier[-1])} came before it" if earlier else since


def _covers(flush: Flush, la: int, key: Key) -> bool:
    # One INVLPG inside a large page, or anywhere for the structure caches, removes it whole.
    if key.table:
        return flush.start < key.la + key.size and key.la < flush.end
    return flush.start < key.la + key.size and key.la < flush.end if key.level > 1 else flush.start <= la < flush.end


def _is_for(flush: Flush, store: Store) -> bool:
    return (flush.start, flush.end) == (store.start, store.end)


def _name(flush: Flush) -> str:
    what = "everything" if flush.end - flush.start >= EVERYTHING else f"{flush.start:#x}-{flush.end:#x}"
    cause = f" ({flush.cause})" if flush.cause else ""
    return f"flush {flush.number} of {what} by CPU {flush.cpu}{cause}"


def _why_kept(flush: Flush, key: Key, cpu: int) -> str:
    cpus = ", ".join(str(number) for number in flush.cpus) or "no CPU"
    if cpu not in flush.cpus:
        # Linux spares a CPU that has another mm loaded, and has the PCID flushed when that mm is loaded there again.
        owed = f"; PCID {key.pcid:#x} was to be flushed when it was next loaded there" if key.pcid > 0 else ""
        return f"{_name(flush)} covers the page but was not sent to CPU {cpu} (sent to {cpus}){owed}"
    if cpu not in flush.done:
        done = ", ".join(str(number) for number in sorted(flush.done)) or "no CPU"
        return f"{_name(flush)} was asked of CPU {cpu}, which has not done it (done by {done})"
    if key.pcid >= 0:
        return f"{_name(flush)} was done by CPU {cpu}, but did not reach PCID {key.pcid:#x}"
    return f"{_name(flush)} was done by CPU {cpu}, but did not remove the entry"
