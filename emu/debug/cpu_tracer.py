"""The records of one CPU's instructions and accesses, made from its engine's log.

The log says which blocks ran and which physical addresses were reached; what is missing is put together here:
- instructions: a block's, up to the one that the engine stopped at;
- linear addresses: from the operands of the instruction and the registers that the log kept, checked against the physical address;
- hits and misses: the engine asks the MMU for what its own cache does not know, and is watched there; until the MMU takes back
  what it granted, every access is a hit.
Nothing here changes the TLB, the tables or the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import capstone

from emu.cpu import Cpu
from emu.debug.records import Accessed, Entry, Executed
from emu.decode import MASK64, Instruction, Undecodable, decode
from emu.engine import StopReason
from emu.engine_context import EngineError
from emu.kernel.walk_report import entry_bits
from emu.memory import BusError
from emu.mmu.entry import ENTRY_BITS, PAGE_MASK, PHYSICAL_MASK, D, Level, P, index, is_canonical, is_leaf
from emu.mmu.entry import Entry as Bit
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.staleness import compare_page, effective
from emu.mmu.tlb import TlbMode
from emu.mmu.walk import inspect
from emu.native_log import ACCESS_WORDS, BLOCK_WORDS, KIND_SHIFT, LOGGED, REGISTER_AT, WRITE_KIND, NativeLog
from emu.operands import accesses, fault
from emu.stop_reason import INSIDE

if TYPE_CHECKING:
    from emu.debug.surroundings import Surroundings

_POSITION = {name: REGISTER_AT + n for n, name in enumerate(LOGGED)}
_BLOCK = 1 << KIND_SHIFT
_FETCH, _STORE = int(Access.FETCH), int(Access.WRITE)
_PAGE = PAGE_MASK + 1
_FLAGS = ENTRY_BITS & ~PHYSICAL_MASK
_LARGE_FLAGS = _FLAGS | int(Bit.PAT_LARGE)
_LEVEL_NAMES = {int(level): level.name for level in Level}
_NO_WALK: tuple[Entry, ...] = ()


class Host(Protocol):
    """What a CPU's tracer needs of the whole trace."""

    step: int
    surroundings: Surroundings

    def observe(self, record: Executed) -> None:
        """Take a record."""

    def hold(self, tracer: CpuTracer, line: Line, step: int, shown: tuple[Accessed, ...]) -> None:
        """An instruction began, and the CPU carries it out or raises its exception now."""

    def release(self) -> None:
        """Tell what was held."""

    def thread(self, cpu: int) -> tuple[int, str]:
        """Number and name of the thread of a CPU."""

    def symbol(self, la: int) -> str:
        """The symbol at an address as %pS prints it, or nothing."""


@dataclass(slots=True, eq=False)
class Line:
    """An instruction of a block: what every execution of it shows. `simple` is the place of its only operand in the log's words:
    those of base, index and segment (-1: none), scale, displacement, mask, and the size.
    """

    rip: int
    size: int
    shown: tuple[int, str, str, str]
    instruction: Instruction | None
    simple: tuple[int, int, int, int, int, int, int] | None


@dataclass(slots=True, eq=False)
class _Note:
    """What is known of a page until something changes: its frame, the frame's owner, and the TLB entry."""

    frame: int
    owner: str
    tlb: str
    entry: int
    page_size: int
    bits: tuple[str, ...]
    walk: tuple[Entry, ...]


class CpuTracer:
    """Traces one CPU; must be made before its machine has run the guest. `memory`: whether accesses are wanted.

    Raises EngineError where the host does not allow machine code to be made.
    """

    def __init__(self, cpu: Cpu, host: Host, *, memory: bool) -> None:
        engine = cpu.engine
        counter = engine.block_counter
        if counter is None:
            raise EngineError("a trace needs an engine that counts blocks, which takes an x86-64 host")
        self.cpu = cpu
        self.mmu = cpu.mmu
        self.engine = engine
        self.counter = counter
        self.host = host
        self.surroundings = host.surroundings
        self.memory = memory
        self.has_tlb = cpu.mmu.tlb.mode is not TlbMode.NONE
        self.log = NativeLog(engine.uc, self._full, accesses=memory)
        engine.uc.ctl_flush_tb()
        engine.on_stop = self._stopped
        self._fill = cpu.mmu.fill
        if memory:
            engine.fill_by(self._traced_fill)
            self._drop = cpu.mmu.on_drop
            cpu.mmu.on_drop = self._dropped
            self._translate = cpu.mmu.translate
            cpu.mmu.translate = self._traced_translate  # type: ignore[method-assign]
        else:
            engine.fill_by(self._draining_fill)
        self.observe: Callable[[Executed], None] = host.observe
        self._known: dict[tuple[int, bytes], list[Line]] = {}
        # The block under way, how many of its instructions are told, and the accesses of the next.
        self._lines: list[Line] = []
        self._at = 0
        self._shown: list[Accessed] = []
        self._notes: dict[int, _Note] = {}
        # Walks of misses by page, until the access that caused them is told.
        self._missed: dict[int, tuple[Entry, ...]] = {}
        self._fetched: dict[int, Accessed] = {}
        self.failed_fetch: Accessed | None = None
        self._failed: tuple[int, tuple[Entry, ...], str] | None = None
        # Collects the accesses that the machine makes for the CPU; None while it makes none.
        self.own: list[Accessed] | None = None
        self.pid, self.comm = 0, ""
        self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)

    def forget(self) -> None:
        """The kernel model has run: what was known of pages may no longer hold."""
        self._notes.clear()

    # ---------------------------------------------------------------- the log

    def _full(self) -> None:
        try:
            self.drain()
        except Exception as error:  # a callback cannot raise: the engine raises it again
            self.engine.fail(error)

    def drain(self) -> None:
        """Tell what the log holds."""
        words = self.log.take()
        if words:
            self.host.release()
            self.pid, self.comm = self.host.thread(self.cpu.id)
            self._read(words)

    def _read(self, words: list[int]) -> None:
        at, end = 0, len(words)
        while at < end:
            tag = words[at]
            if tag < _BLOCK:
                self._tell(len(self._lines))
                self._lines = self._block(words[at + 1], tag)
                self._at = 0
                at += BLOCK_WORDS
                continue
            rip = words[at + REGISTER_AT]
            lines, number = self._lines, self._at
            if lines[number].rip != rip:
                while lines[number].rip != rip:
                    number += 1
                self._tell(number)
            shown = self._access(lines[number], words, at)
            if shown is not None:
                self._shown.append(shown)
            at += ACCESS_WORDS

    def _tell(self, end: int) -> None:
        """The instructions of the block before number `end` have begun, and others after them."""
        first = self._at
        if first >= end:
            return
        self._at = end
        step, observe, cpu, pid, comm = self.host.step, self.observe, self.cpu.id, self.pid, self.comm
        shown: tuple[Accessed, ...] = tuple(self._shown)
        self._shown.clear()
        for line in self._lines[first:end]:
            step += 1
            if self._fetched:
                shown = self._with_fetch(line, shown)
            observe(Executed(step, cpu, pid, comm, *line.shown, shown))
            shown = ()
        self.host.step = step

    def _with_fetch(self, line: Line, shown: tuple[Accessed, ...]) -> tuple[Accessed, ...]:
        for page in dict.fromkeys((line.rip >> 12, line.rip + line.size - 1 >> 12)):
            fetch = self._fetched.pop(page, None)
            if fetch is not None:
                la = max(line.rip, fetch.la)
                size = min(line.rip + line.size, fetch.la + _PAGE) - la
                place = self.surroundings.place(la)
                shown = (
                    Accessed(la, size, False, 0, fetch.pa | la & PAGE_MASK, place, fetch.owner, fetch.tlb, fetch.entry,
                             fetch.page_size, fetch.bits, fetch.walk, True),
                    *shown,
                )
        return shown

    def _stopped(self, reason: StopReason) -> None:
        """The engine has stopped: tell what it ran, and hold the instruction that it stopped at."""
        self.drain()
        engine, lines = self.engine, self._lines
        if reason in INSIDE and not (reason is StopReason.FAULT and engine.fault_access is Access.FETCH):
            rip = engine.reg("rip")
            number = next((n for n, line in enumerate(lines) if line.rip == rip and n >= self._at), len(lines))
            self._tell(number)
            if number < len(lines) and not engine.begins_anew:
                self.host.release()
                self._hold(lines[number], reason)
        else:
            self._tell(len(lines))
        self._lines = []
        self._at = 0
        self._shown.clear()

    def _hold(self, line: Line, reason: StopReason) -> None:
        self.host.step += 1
        self.pid, self.comm = self.host.thread(self.cpu.id)
        shown = self._with_fetch(line, tuple(self._shown)) if self._fetched else tuple(self._shown)
        if reason is StopReason.FAULT and self._failed is not None and self.memory:
            shown = self._with_failed(line, shown)
        self._failed = None
        if reason is StopReason.PAUSE:
            self.observe(Executed(self.host.step, self.cpu.id, self.pid, self.comm, *line.shown, shown))
        else:
            self.host.hold(self, line, self.host.step, shown)

    # ---------------------------------------------------------------- instructions

    def _block(self, start: int, size: int) -> list[Line]:
        block = self.counter.block(start, size)
        if block is None:
            raise EngineError(f"the block of {size} bytes at {start:#x} ran, and nobody counted it")
        lines = self._known.get((start, block.code))
        if lines is None:
            starts = self.counter.starts(block)
            ends = (*starts[1:], size)
            lines = [self._line(start + first, block.code[first:end]) for first, end in zip(starts, ends, strict=True)]
            self._known[start, block.code] = lines
        return lines

    def _line(self, rip: int, code: bytes) -> Line:
        found = next(self._disassembler.disasm_lite(code, rip, 1), None)
        text = "(bad)" if found is None else f"{found[2]} {found[3]}".rstrip()
        try:
            instruction = decode(code, rip)
        except Undecodable:
            instruction = None
        return Line(rip, len(code), (rip, self.host.symbol(rip), code.hex(), text), instruction, _simple(instruction))

    # ---------------------------------------------------------------- accesses

    def _access(self, line: Line, words: list[int], at: int) -> Accessed | None:
        tag, pa = words[at], words[at + 1]
        size = tag & 0xFFFF_FFFF
        write = tag >> KIND_SHIFT == WRITE_KIND
        value = words[at + 2] & (1 << 8 * size) - 1 if size < 8 else words[at + 2]
        simple = line.simple
        if simple is not None:
            base, other, segment, scale, la, mask, whole = simple
            if base >= 0:
                la += words[at + base]
            if other >= 0:
                la += words[at + other] * scale
            la &= mask
            if segment >= 0:
                la = la + words[at + segment] & MASK64
            if size != whole or (la ^ pa) & PAGE_MASK:
                return self._piece(line, words, at, size, write, value)
        else:
            return self._piece(line, words, at, size, write, value)
        return self._noted(la, size, write, value, pa)

    def _piece(self, line: Line, words: list[int], at: int, size: int, write: bool, value: int) -> Accessed | None:
        """An access of an instruction with several operands, or a part of one."""
        pa = words[at + 1]
        if line.instruction is not None:
            def reg(name: str) -> int:
                return words[at + _POSITION[name]]

            made = accesses(line.instruction, line.rip, reg)
            for one in made:
                if one.size == size and not (one.la ^ pa) & PAGE_MASK and (one.write if write else one.read):
                    return self._noted(one.la, size, write, value, pa)
            for one in made:
                if not (one.write if write else one.read):
                    continue
                # A part of a large or page-crossing operand; the engine reads aligned words around a part.
                for page in dict.fromkeys((one.la & -_PAGE, one.la + one.size - 1 & -_PAGE)):
                    la = page | pa & PAGE_MASK
                    first, last = max(la, one.la), min(la + size, one.la + one.size)
                    if first < last:
                        value = value >> 8 * (first - la) & (1 << 8 * (last - first)) - 1
                        return self._noted(first, last - first, write, value, pa + first - la)
        known = next((page for page, note in self._notes.items() if note.frame == pa >> 12), None)
        return None if known is None else self._noted(known << 12 | pa & PAGE_MASK, size, write, value, pa)

    def _noted(self, la: int, size: int, write: bool, value: int, pa: int) -> Accessed:
        over = (la & PAGE_MASK) + size - _PAGE
        if over > 0:
            # The engine tells of both parts as one, with the physical address of the first.
            first = size - over
            self._shown.append(self._noted(la, first, write, value & (1 << 8 * first) - 1, pa))
            la = la + first & MASK64
            cached = self.mmu.query(la)
            pa = cached.pa(la) if cached is not None else effective_pa(self.mmu, la)
            return self._noted(la, over, write, value >> 8 * first, pa)
        page = la >> 12
        note = self._notes.get(page)
        if note is None or note.frame != pa >> 12:
            note = self._notes[page] = self._note(la, pa)
        tlb, walk = note.tlb, note.walk
        if page in self._missed:
            walk = self._missed.pop(page)
            if tlb == "hit":
                tlb = "miss"
        return Accessed(
            la, size, write, value, pa, self.surroundings.place(la), note.owner, tlb, note.entry, note.page_size, note.bits, walk,
        )

    def _note(self, la: int, pa: int) -> _Note:
        mmu = self.mmu
        frame = pa >> 12
        owner = self.surroundings.owner(frame, la)
        cached = mmu.query(la) if self.has_tlb else None
        if cached is None:
            level, entry, _ = effective(mmu.memory, mmu.regs, la)
            size = 1 << 9 * level + 3
            return _Note(frame, owner, "none", entry, size, _bits(Level(level or 1), entry, True), _NO_WALK)
        bits = _bits(cached.level, cached.entry, True)
        if compare_page(mmu.memory, mmu.regs, cached) is not None:
            now = tuple(_entry(*step) for step in inspect(mmu.memory, mmu.regs, la))
            return _Note(frame, owner, "stale", cached.entry, cached.size, bits, now)
        return _Note(frame, owner, "hit", cached.entry, cached.size, bits, _NO_WALK)

    def _with_failed(self, line: Line, shown: tuple[Accessed, ...]) -> tuple[Accessed, ...]:
        """The accesses of an instruction, of which one failed: no part of that has been made."""
        assert self._failed is not None, "a fault was seen"
        _, walk, tlb = self._failed
        engine = self.engine
        made = () if line.instruction is None else accesses(line.instruction, line.rip, engine.reg)
        where = fault(made, line.rip, engine.fault_page, engine.fault_access)
        whole = next((one for one in made if one.la <= where.cr2 < one.la + one.size), None)
        if whole is not None:
            shown = tuple([
                one for one in shown if one.fetch or one.write != where.write or not whole.la <= one.la < whole.la + whole.size
            ])
        failed = Accessed(
            where.cr2, 0 if whole is None else whole.size, where.write, 0, 0, self.surroundings.place(where.cr2), "", tlb, 0, 0, (),
            walk, False, True,
        )
        return *shown, failed

    # ---------------------------------------------------------------- translations

    def _walk_to_come(self, la: int, access: int) -> tuple[str, tuple[Entry, ...]]:
        """What the MMU will do for an access that the engine's cache does not serve: use its entry, or read these."""
        mmu = self.mmu
        cached = mmu.query(la) if self.has_tlb else None
        if cached is not None and (access != _STORE or cached.entry & D):
            return "hit", _NO_WALK
        if not is_canonical(la, mmu.regs.levels):
            return "miss", _NO_WALK
        return "miss" if self.has_tlb else "none", tuple(next_walk(mmu, la))

    def _traced_fill(self, la: int, access: int, user: bool) -> int:
        """Mmu.fill, told of. The log is read first: what it holds happened before."""
        self.drain()
        tlb, walk = self._walk_to_come(la, access)
        page = la >> 12
        misses = self.mmu.misses
        self._notes.pop(page, None)
        try:
            grant = self._fill(la, access, user)
        except (PageFault, NonCanonical, BusError):
            if access == _FETCH:
                self.failed_fetch = Accessed(
                    la, 0, False, 0, 0, self.surroundings.place(la), "", tlb, 0, 0, (), walk, True, True,
                )
            else:
                self._failed = la, walk, tlb
            raise
        missed = self.mmu.misses != misses
        if access != _FETCH:
            if missed:
                self._missed[page] = walk
            return grant
        self.failed_fetch = None
        note = self._note(la, grant & PHYSICAL_MASK)
        if missed or note.tlb == "stale":
            tlb = "miss" if missed and note.tlb == "hit" else note.tlb
            self._fetched[page] = Accessed(
                la, 0, False, 0, grant & PHYSICAL_MASK, "", note.owner, tlb, note.entry, note.page_size, note.bits,
                walk if missed else note.walk, True,
            )
        return grant

    def _draining_fill(self, la: int, access: int, user: bool) -> int:
        """Mmu.fill; after a fetch of new code the blocks that ran before are known no more."""
        self.drain()
        return self._fill(la, access, user)

    def _traced_translate(
        self, la: int, access: int, *, user: bool = False, ac: bool = False, implicit: bool = False
    ) -> int:
        """Mmu.translate, told of where the machine does it for an instruction or a delivery."""
        if self.own is None:
            return self._translate(la, access, user=user, ac=ac, implicit=implicit)
        tlb, walk = self._walk_to_come(la, access)
        misses = self.mmu.misses
        write = access == _STORE
        try:
            pa = self._translate(la, access, user=user, ac=ac, implicit=implicit)
        except (PageFault, NonCanonical, BusError):
            self.own.append(
                Accessed(la, 0, write, 0, 0, self.surroundings.place(la), "", tlb, 0, 0, (), walk, access == _FETCH, True)
            )
            raise
        if self.mmu.misses != misses:
            self._missed[la >> 12] = walk
            self._notes.pop(la >> 12, None)
        self.own.append(self._noted(la, 0, write, 0, pa))
        return pa

    def _dropped(self) -> None:
        """The MMU takes back what it granted."""
        self._notes.clear()
        self._drop()


def effective_pa(mmu: Mmu, la: int) -> int:
    """The physical address that memory says now."""
    level, entry, _ = effective(mmu.memory, mmu.regs, la)
    size = 1 << 9 * level + 3
    return entry & PHYSICAL_MASK & -size | la & size - 1


def next_walk(mmu: Mmu, la: int) -> list[Entry]:
    """The entries that the MMU would read for an address that its TLB does not hold, from below what its other caches hold."""
    level, table, _ = mmu.walk_start(la)
    entries: list[Entry] = []
    while True:
        pa = table + 8 * index(la, level)
        try:
            value = mmu.memory.read_u64(pa)
        except BusError:
            return entries
        entries.append(_entry(level, pa, value))
        if not value & P or is_leaf(level, value) or level == 1:
            return entries
        table = value & PHYSICAL_MASK
        level -= 1


def _entry(level: int, pa: int, value: int) -> Entry:
    return Entry(_LEVEL_NAMES[level], pa >> 3 & 511, pa, value, _bits(level, value, is_leaf(level, value)))


def _bits(level: int, entry: int, is_leaf: bool) -> tuple[str, ...]:
    """Names of an entry's bits, whatever frame it names."""
    return _bit_names(level, entry & (_LARGE_FLAGS if is_leaf and level > 1 else _FLAGS), is_leaf)


@lru_cache(4096)
def _bit_names(level: int, flags: int, is_leaf: bool) -> tuple[str, ...]:
    return entry_bits(Level(level), flags, is_leaf)


def _simple(instruction: Instruction | None) -> tuple[int, int, int, int, int, int, int] | None:
    """How to compute the address of an instruction's only operand; None where that takes more."""
    if instruction is None or len(instruction.operands) != 1:
        return None
    operand = instruction.operands[0]
    if operand.bit_offset is not None or operand.index_mask != MASK64:
        return None
    return (
        _POSITION[operand.base] if operand.base is not None else -1,
        _POSITION[operand.index] if operand.index is not None else -1,
        _POSITION[operand.segment] if operand.segment is not None else -1,
        operand.scale, operand.disp, operand.mask, operand.size,
    )
