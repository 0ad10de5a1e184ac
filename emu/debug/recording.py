"""A recorded run: the state its changes begin with, and the changes; in memory, or whole in a file.

In memory a ring keeps the last records; what falls out of it is applied to the state that the rest begins with. A file begins with
MAGIC and has blocks of a length (8 bytes, little-endian) and that much MessagePack: a Head, lists of changes, and a Tail, behind
which stand the SHA-256 of all bytes before. It is written under another name and gets its own when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import BinaryIO

import msgspec

from emu.debug.address_history import AddressEvent, AddressHistory
from emu.debug.history import RING, History, Key, Value
from emu.debug.history_records import AnyChange, Reader
from emu.debug.replay import Replay
from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.kernel.vmallocinfo import vmallocinfo
from emu.machine import Machine
from emu.mmu.walk import PagingRegisters
from emu.run import RunResult, configure, judged

MAGIC = b"vmemu history 1\n"
_LENGTH = 8
_DIGEST = 32


class RecordingError(Exception):
    """A recording that cannot be written or read; the text names the file and says why."""


class Cached(msgspec.Struct, frozen=True, array_like=True):
    """What a CPU had cached before the first change: as TlbFilled."""

    pcid: int
    level: int
    table: bool
    number: int
    value: int
    rights: int


class Head(msgspec.Struct, frozen=True):
    """The state before the first change: `frames` are the page tables, and a list item stands for a CPU."""

    file: str
    machine: dict[str, int | str | bool]
    levels: int
    init_pgd: int
    frames: dict[int, bytes]
    cached: tuple[tuple[Cached, ...], ...]
    roots: tuple[dict[int, int], ...]
    current: tuple[tuple[int, int], ...]


class Tail(msgspec.Struct, frozen=True):
    """How the run ended: with how many steps and records; the guest's symbols; areas as (start, end, caller)."""

    steps: int
    records: int
    ended: str
    ok: bool
    symbols: dict[str, int]
    areas: tuple[tuple[int, int, str], ...]


class Recording(msgspec.Struct):
    """A run's history: `changes` begin at the state `base`, after `forgotten` changes of which the last was at step `since`."""

    head: Head
    tail: Tail
    base: Replay
    changes: Iterable[AnyChange]
    forgotten: int = 0
    since: int = 0

    def replay(self) -> Replay:
        """The state before the first change, to go on from."""
        base = self.base
        frames = {frame: bytes(table) for frame, table in base.tables.frames.items()}
        return Replay(frames, base.tlbs, base.roots, base.current, base.regs)

    def address(self, la: int) -> list[AddressEvent]:
        """What happened to an address. Raises ValueError for one that is not canonical."""
        return AddressHistory(self.replay(), la, self.head.init_pgd).follow(self.changes)


class _Writer:
    """A file that is being written, under its own name and ".partial"."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.partial = f"{path}.partial"
        self.records = 0
        self._digest = hashlib.sha256()
        try:
            self._file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 - it is closed by close or abandon
        except OSError as error:
            raise RecordingError(f"{path}: cannot be written: {error.strerror}") from None
        self._write(MAGIC)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise RecordingError(f"{self.path}: cannot be written: {error.strerror}; nothing is kept") from None

    def block(self, what: Head | Tail | list[AnyChange]) -> None:
        data = msgspec.msgpack.encode(what)
        self._write(len(data).to_bytes(_LENGTH, "little") + data)
        if isinstance(what, list):
            self.records += len(what)

    def close(self) -> None:
        """The file is whole: give it its name."""
        self._write(self._digest.digest())
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError as error:
            raise RecordingError(f"{self.path}: cannot be written: {error.strerror}; nothing is kept") from None

    def abandon(self) -> None:
        """Leave nothing."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.partial)


def record(
    program: Program, overrides: MachineOptions, *, ring: int = RING, path: str | None = None
) -> tuple[Recording, RunResult, Machine]:
    """Run a program, counted, and return its history: at most `ring` changes, or all of them in a file at `path`.

    Raises RecordingError, GuestError for bad input, ValueError or MemoryError for a machine that cannot be, or cannot be recorded.
    """
    config, limit = configure(program.directives.machine, overrides)
    machine = Machine(config, limit=limit)
    history = History(machine, ring=ring)
    writer = None if path is None else _Writer(path)
    try:
        recording, result = _record(history, program, limit, writer)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    if writer is not None:
        recording.changes = _FileChanges(writer.path)
    return recording, result, machine


def _record(history: History, program: Program, limit: int, writer: _Writer | None) -> tuple[Recording, RunResult]:
    machine = history.machine
    reader = Reader(history)
    head = _head(history, program.path)
    base = _base(head)
    forgotten = since = 0

    def spill(stop: int) -> None:
        nonlocal forgotten, since
        old = reader.read(history.raw, stop)
        if writer is not None:
            writer.block(old)
            return
        for change in old:
            base.apply(change)
        forgotten += len(old)
        since = old[-1].step

    history.spill = spill
    if writer is not None:
        writer.block(head)
    _, linked = machine.load(program)
    outcome = machine.run_loaded(program, linked)
    result = judged(program, machine.config, limit, machine, outcome)
    changes = reader.read(history.raw)
    history.raw.clear()
    if writer is not None:
        writer.block(changes)
    areas = vmallocinfo(machine.kernel.vmalloc, machine.kernel.symbol_text)
    tail = Tail(
        history.steps, forgotten + len(changes) if writer is None else writer.records, outcome.ended, result.ok,
        dict(linked.symbols), tuple((row.start, row.end, row.caller or row.kind) for row in areas),
    )
    if writer is not None:
        writer.block(tail)
        writer.close()
    return Recording(head, tail, base, changes, forgotten, since), result


def _head(history: History, file: str) -> Head:
    config = history.machine.config
    return Head(
        file, asdict(config), config.levels, history.kernel.init_mm.pgd, history.frames,
        tuple(tuple(_cached(key, value) for key, value in cached.items()) for cached in history.cached),
        tuple(history.roots), tuple(history.current),
    )


def _cached(key: Key, value: Value) -> Cached:
    packed, rights = value if isinstance(value, tuple) else (value, 0)
    return Cached(int(key[0]), int(key[1]), key[2], key[3], packed, rights)


def _base(head: Head) -> Replay:
    regs = PagingRegisters(levels=head.levels, gbpages=bool(head.machine["gbpages"]))
    tlbs: list[dict[Key, Value]] = [
        {(one.pcid, one.level, one.table, one.number): (one.value, one.rights) if one.table else one.value for one in cached}
        for cached in head.cached
    ]
    return Replay(head.frames, tlbs, list(head.roots), list(head.current), regs)


def is_recording(path: str) -> bool:
    """Whether a file begins as a recording does; false also where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_recording(path: str) -> Recording:
    """A recording from its file, which is looked at whole. Raises RecordingError where it is not whole or cannot be read."""
    try:
        _check_digest(path)
        blocks = _blocks(path)
        head = msgspec.msgpack.decode(next(blocks), type=Head)
        *_, last = blocks
        tail = msgspec.msgpack.decode(last, type=Tail)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, StopIteration, ValueError) as error:
        raise RecordingError(f"{path}: is no recording of this version: {error}") from None
    return Recording(head, tail, _base(head), _FileChanges(path))


def _check_digest(path: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGEST
        while left > 0:
            data = file.read(min(left, 1 << 20))
            if not data:
                break
            digest.update(data)
            left -= len(data)
        if left or file.read() != digest.digest():
            raise RecordingError(f"{path}: the recording is cut off or was changed")


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGEST - len(file.read(len(MAGIC)))
        while left > 0:
            size = int.from_bytes(file.read(_LENGTH), "little")
            yield file.read(size)
            left -= size + _LENGTH


class _FileChanges:
    """The changes of a file that is whole, read anew each time."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Iterator[AnyChange]:
        decoder = msgspec.msgpack.Decoder(list[AnyChange])
        blocks = _blocks(self.path)
        before = next(blocks)
        for number, block in enumerate(blocks):
            if number:
                yield from decoder.decode(before)
            before = block


def history_of(program: Program, overrides: MachineOptions, la: int, *, ring: int = RING) -> list[AddressEvent]:
    """Run a program and tell what happened to an address, in order: who mapped it, who unmapped it. Raises as record."""
    return record(program, overrides, ring=ring)[0].address(la)
