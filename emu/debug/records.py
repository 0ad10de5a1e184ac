"""What a traced run consists of: one record for each instruction and for each event between two instructions, in their order.

Records are msgspec structs: made in a third of a dataclass's time, which a trace of every instruction feels, and encoded as JSON by
the type's own definition; docs/trace.md describes the schema. Addresses and values are integers.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Entry(msgspec.Struct, frozen=True, gc=False):
    """An entry of a page-table walk: the SDM's name of its level, its index, physical address, value, and the names of its bits."""

    level: str
    index: int
    pa: int
    value: int
    bits: tuple[str, ...]


class Accessed(msgspec.Struct, frozen=True, gc=False):
    """A memory access of an instruction, completed unless `failed`: then value, pa, page_size are 0, owner and bits empty.

    `la` linear address, `size` in bytes, `write`, `value` (of up to 8 bytes), `pa` physical address. `place` says what the linear
    address lies in, `owner` who owns the frame. `tlb` is "hit", "miss", "stale" (a fresh walk gives something else now) or "none"
    (no TLB in this machine). `entry` is the TLB entry's effective leaf value, with `page_size` in bytes and the names of its
    `bits`; `walk` are the entries that a miss read, from where it began (below a cached table, or at the top), and for a stale
    entry those that memory holds now, from the top. `fetch`: the instruction itself was read, through a translation that was not
    in use before; other fetches are not shown. A fetch has no value.
    """

    la: int
    size: int
    write: bool
    value: int
    pa: int
    place: str
    owner: str
    tlb: str
    entry: int
    page_size: int
    bits: tuple[str, ...]
    walk: tuple[Entry, ...] = ()
    fetch: bool = False
    failed: bool = False


class Record(msgspec.Struct, frozen=True, gc=False, tag_field="type"):
    """Where a record stands: `step` instructions of all CPUs are complete since the guest's call; on which CPU, in which
    thread.
    """

    step: int
    cpu: int
    pid: int
    comm: str


class Executed(Record, frozen=True, gc=False, tag="instruction"):
    """An instruction that began: the step counts it. `fault`: it did not complete, and an exception follows.

    `code` are its bytes in hexadecimal, `text` Capstone's disassembly in Intel syntax, `symbol` as %pS prints it, or "".
    """

    rip: int
    symbol: str
    code: str
    text: str
    accesses: tuple[Accessed, ...] = ()
    fault: bool = False


class Delivered(Record, frozen=True, gc=False, tag="delivery"):
    """An exception or interrupt enters through the IDT. `error` and `cr2` are None where it has none; `rip` is what was pushed.

    `accesses` are the CPU's own: to IDT, GDT, TSS and the stack.
    """

    vector: int
    error: int | None
    rip: int
    cr2: int | None
    place: str
    accesses: tuple[Accessed, ...] = ()


class Returned(Record, frozen=True, gc=False, tag="iret"):
    """IRET has left a handler for `rip`."""

    rip: int


class CallBegun(Record, frozen=True, gc=False, tag="call"):
    """Guest code calls an exported kernel function; `depth` calls of the same thread are under way around it."""

    name: str
    arguments: tuple[int, ...]
    depth: int


class CallEnded(Record, frozen=True, gc=False, tag="return"):
    """An exported function returns `result` (RAX)."""

    name: str
    result: int
    depth: int


class Stored(Record, frozen=True, gc=False, tag="table"):
    """Entries that translate [start, end) were changed by kernel function `function`, or by a guest's store."""

    start: int
    end: int
    function: str


class FlushAsked(Record, frozen=True, gc=False, tag="flush"):
    """The kernel asks the CPUs `cpus` to flush [start, end), everything if that is all addresses; `number` counts such requests."""

    number: int
    start: int
    end: int
    cause: str
    cpus: tuple[int, ...]


class Flushed(Record, frozen=True, gc=False, tag="flushed"):
    """This CPU has done its part of flush `number`."""

    number: int
    start: int
    end: int


class IpiSent(Record, frozen=True, gc=False, tag="ipi"):
    """This CPU sends `vector` (2: an NMI) to CPU `to`; `number` counts IPIs."""

    to: int
    vector: int
    number: int


class IpiTaken(Record, frozen=True, gc=False, tag="ipi-taken"):
    """This CPU takes the IPIs `numbers`, which merged into one interrupt of `vector`."""

    vector: int
    numbers: tuple[int, ...]


class CallDone(Record, frozen=True, gc=False, tag="acknowledged"):
    """This CPU has run the call that CPU `sender` asked it for with an IPI, for C function `cause`."""

    sender: int
    cause: str


class Switched(Record, frozen=True, gc=False, tag="switch"):
    """The CPU goes from thread `pid` to another."""

    next_pid: int
    next_comm: str


class Logged(Record, frozen=True, gc=False, tag="printk"):
    """A line of the kernel log."""

    text: str


class Vmalloc(Record, frozen=True, gc=False, tag="vmalloc"):
    """A tracepoint of mm/vmalloc.c (include/trace/events/vmalloc.h): its name, and its fields as ftrace prints them, in order.

    `flags` is ftrace's column irqs-off, need-resched, hardirq/softirq, preempt-depth, migrate-disable (never).
    """

    name: str
    fields: str
    flags: str


class Sampled(Record, frozen=True, gc=False, tag="sample"):
    """Counters after a change: TLB entries by CPU, lazily freed pages, free frames."""

    tlb_entries: tuple[int, ...]
    lazy_pages: int
    free_frames: int


class Ended(Record, frozen=True, gc=False, tag="end"):
    """The run is over; `ending` as `vmemu run` names it, `returned` RAX or None."""

    ending: str
    returned: int | None


AnyRecord: TypeAlias = (
    Executed | Delivered | Returned | CallBegun | CallEnded | Stored | FlushAsked | Flushed | IpiSent | IpiTaken | CallDone
    | Switched | Logged | Vmalloc | Sampled | Ended
)
