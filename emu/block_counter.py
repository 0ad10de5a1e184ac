"""Counts the instructions of an engine exactly, a block at a time, and stops it before the block that would pass an allowance.

Unicorn calls back before each block that it translated (UC_HOOK_BLOCK). The callback is machine code here: it looks the block up by
address and size, subtracts its number of instructions from what is left, or stops the engine before the block when less is left.
A block that is not in the table goes to Python once, where Unicorn's own translator tells how many instructions it has. An engine
that stops inside a block tells at which instruction: `settle` gives back those that did not begin.

No block may be left halfway without a stop: the engine sees to that for stores into the block's own page (Unicorn would restart
them unseen), and nothing else does it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unicorn import UC_ARCH_X86, UC_HOOK_BLOCK, UC_MODE_64, Uc, UcError
from unicorn.unicorn_py3.unicorn import uclib
from unicorn.x86_const import UC_CPU_X86_ICELAKE_SERVER, UC_X86_REG_RFLAGS

from emu.decode import MASK64, Undecodable, decode
from emu.engine_context import EngineError
from emu.instruction_counter import Allowance

_LONGEST = 15
_FIRST_SIZE = 1 << 10
_SLACK = 64
_ENTRY = 16
_HASH = 0x61C8_8647
_TRAP_FLAG = 0x100
# Words of the state that the machine code works on.
_LEFT, _TABLE, _MASK, _LAST, _ASKED, _REFUSED = range(6)
LEFT, LAST = _LEFT, _LAST
_WORDS = 6

# void hook(uc, u64 address, u32 size, i64 *state), System V; an entry is u64 address, u32 size, u32 count.
_LOOK_UP = bytes.fromhex(
    "4869c64786c861"  # imul rax, rsi, 0x61c88647
    "48c1e810"        # shr rax, 16
    "48234110"        # and rax, [rcx + 8 * MASK]
    "48034108"        # add rax, [rcx + 8 * TABLE]
    "483930"          # probe: cmp [rax], rsi
    "7530"            # jne other
    "395008"          # cmp [rax + 8], edx
    "752b"            # jne other
    "448b400c"        # mov r8d, [rax + 12]
    "4c8b09"          # mov r9, [rcx + 8 * LEFT]
    "4d29c1"          # sub r9, r8
    "780f"            # js refuse
    "4883792000"      # cmp qword [rcx + 8 * ASKED], 0
    "7508"            # jne refuse
    "4c8909"          # mov [rcx + 8 * LEFT], r9
    "48894118"        # mov [rcx + 8 * LAST], rax
    "c3"              # ret
    "48894128"        # refuse: mov [rcx + 8 * REFUSED], rax
    "48b8"            # mov rax, uc_emu_stop
)
_JUMP_AND_NEXT = bytes.fromhex(
    "ffe0"            # jmp rax
    "83780800"        # other: cmp dword [rax + 8], 0
    "7406"            # je unknown
    "4883c010"        # add rax, 16
    "ebbf"            # jmp probe
    "48b8"            # unknown: mov rax, the function that finds out
)
_JUMP = b"\xff\xe0"

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


@dataclass(slots=True)
class Block:
    """A translated block: `count` instructions in `size` bytes at `start`; `starts`, once asked for, are their offsets."""

    start: int
    size: int
    count: int
    code: bytes
    starts: tuple[int, ...] | None = None


class BlockCounter(Allowance):
    """A counter of one engine; it must be made before the engine translates any code. `limit` is in instructions.

    `code_at(la, size)` reads code as the engine fetches it; `failed(error)` is told what went wrong inside the callback.
    Raises EngineError where machine code cannot be made (see `available`).
    """

    def __init__(
        self, uc: Uc, limit: int, code_at: Callable[[int, int], bytes], failed: Callable[[Exception], None],
    ) -> None:
        super().__init__(limit)
        self._uc = uc
        self._handle = uc._uch
        self._code_at = code_at
        self._failed = failed
        self._state = (ctypes.c_int64 * _WORDS)(limit)
        self._left = ctypes.c_int64.from_buffer(self._state)
        # Where a block that ends before its natural end is cut: translations end with an instruction of Unicorn's there.
        self.exit: int | None = None
        self._blocks: dict[tuple[int, int], Block] = {}
        self._kept = (ctypes.c_uint64 * 2)()
        self._kept_block: Block | None = None
        # Told when the addresses of entries, as `words` has them, no longer hold.
        self.on_forget: Callable[[], None] = lambda: None
        self._make_table(_FIRST_SIZE)
        self._area = self._make_code()
        self._emu_stop = uclib.uc_emu_stop

    @staticmethod
    def available() -> bool:
        """Whether this host lets the callback be made."""
        if platform.machine() not in ("x86_64", "AMD64") or platform.system() == "Windows":
            return False
        try:
            mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
        except OSError:
            return False
        return True

    # ---- a run

    def allow(self, budget: int | None) -> int:
        """Begin a run of at most `budget` instructions and no more than the limit; returns how many may run."""
        self._state[_REFUSED] = self._state[_LAST] = 0
        return super().allow(budget)

    def take_refused(self) -> Block | None:
        """The block before which the engine was stopped, if it was; forgets it."""
        at = self._state[_REFUSED]
        if not at:
            return None
        self._state[_REFUSED] = 0
        return self._block_at(at)

    @property
    def running(self) -> Block | None:
        """The block that runs or ran last."""
        at = self._state[_LAST]
        return self._block_at(at) if at else None

    def block(self, start: int, size: int) -> Block | None:
        """A block that runs or was run, None if it is not known (any more)."""
        known = self._blocks.get((start, size))
        if known is None and self._kept_block is not None and (self._kept_block.start, self._kept_block.size) == (start, size):
            return self._kept_block
        return known

    @property
    def words(self) -> ctypes.Array[ctypes.c_int64]:
        """The state, for whoever reads it at every miss of a TLB: word LEFT of the run under way, LAST block's entry (block_at)."""
        return self._state

    def block_at(self, at: int) -> Block:
        """The block whose entry is at an address that word LAST had since `on_forget` was told last."""
        return self._block_at(at)

    def index(self, block: Block, rip: int) -> int:
        """Which instruction of a block begins at `rip`, 0 for the first. Raises EngineError for none."""
        return self._index(block, rip)

    def settle(self, rip: int) -> None:
        """The engine stopped at an instruction that began: give back those of its block that lie behind it."""
        block = self.running
        if block is not None and block.start <= rip < block.start + block.size:
            self._state[_LEFT] += block.count - 1 - self._index(block, rip)

    def address(self, block: Block, index: int) -> int:
        """Address of an instruction of a block, 0 for the first."""
        return block.start + self.starts(block)[index]

    @property
    def known(self) -> tuple[Block, ...]:
        """The blocks that were run, in the order of their first runs."""
        return tuple(self._blocks.values())

    def learn(self, block: Block) -> None:
        """Know a block before it is run."""
        if (block.start, block.size) not in self._blocks:
            self._blocks[block.start, block.size] = block
            self._insert(block)

    def ask(self) -> None:
        """Refuse the next block, whatever is left; may be called from another thread."""
        self._state[_ASKED] = 1

    def answer(self) -> None:
        """Take back `ask`."""
        self._state[_ASKED] = 0

    def forget(self) -> None:
        """Code has changed: what is known of blocks no longer holds, except of the one that runs."""
        if not self._blocks:
            return
        block = self.running
        self._blocks.clear()
        ctypes.memset(self._table, 0, ctypes.sizeof(self._table))
        self._kept_block = block
        if block is not None:
            self._state[_LAST] = ctypes.addressof(self._kept)
        self.on_forget()

    # ---- the table

    def _make_table(self, size: int) -> None:
        self._size = size
        self.on_forget()
        # Probing never wraps: the slack behind the last slot is always long enough, or the table grows.
        self._table = (ctypes.c_uint64 * (2 * (size + _SLACK)))()
        self._state[_TABLE] = ctypes.addressof(self._table)
        self._state[_MASK] = (size - 1) * _ENTRY
        # What lay in the old table is reached no more. A table grows between two blocks, when none runs.
        self._state[_LAST] = 0

    def _block_at(self, at: int) -> Block:
        if at == ctypes.addressof(self._kept):
            assert self._kept_block is not None
            return self._kept_block
        start, size, _count = struct.unpack("<QII", ctypes.string_at(at, _ENTRY))
        return self._blocks[start, size]

    def _insert(self, block: Block) -> int:
        """Put a block into the table; returns the address of its entry."""
        while True:
            slot = (block.start * _HASH & MASK64) >> 16 & (self._size - 1) * _ENTRY
            table = self._table
            at = slot // 8
            while at < len(table) - 2 and table[at + 1] & 0xFFFF_FFFF:
                at += 2
            if at < len(table) - 2 and len(self._blocks) * 2 < self._size:
                table[at] = block.start
                table[at + 1] = block.count << 32 | block.size
                return ctypes.addressof(table) + 8 * at
            self._make_table(2 * self._size)
            for known in self._blocks.values():
                if known is not block:
                    self._insert(known)

    def _on_unknown(self, handle: int, start: int, size: int, _state: int) -> None:
        try:
            self._blocks[start, size] = block = Block(start, size, 0, self._code_at(start, size))
            block.count = self._count(block)
            at = self._insert(block)
            left = self._state[_LEFT] - block.count
            if left >= 0 and not self._state[_ASKED]:
                self._state[_LEFT] = left
                self._state[_LAST] = at
                return
            self._state[_REFUSED] = at
        except Exception as error:  # a callback cannot raise: the engine raises it again
            self._failed(error)
        self._emu_stop(handle)

    def _count(self, block: Block) -> int:
        """How many instructions the translator put into the block that is about to run."""
        count: int
        start, count, size = self._uc.ctl_request_cache(block.start)
        if (start, size) != (block.start, block.size):
            return len(self._lengths(block))
        if block.start + block.size != self.exit:
            return count
        # A block that is cut ends with an instruction of no bytes that stops the engine; one that would have ended there does not.
        starts = _decoded(block)
        block.starts = starts if starts is not None and len(starts) in (count - 1, count) else self._lengths(block)
        return len(block.starts)

    def starts(self, block: Block) -> tuple[int, ...]:
        """Offsets of a block's instructions. Raises EngineError."""
        if block.starts is None:
            starts = _decoded(block)
            block.starts = starts if starts is not None and len(starts) == block.count else self._lengths(block)
            if len(block.starts) != block.count:
                known = len(block.starts)
                raise EngineError(f"the block at {block.start:#x} has {block.count} instructions, and {known} can be told")
        return block.starts

    def _index(self, block: Block, rip: int) -> int:
        try:
            return self.starts(block).index(rip - block.start)
        except ValueError:
            raise EngineError(f"{rip:#x} is no instruction of {block}") from None

    @staticmethod
    def _lengths(block: Block) -> tuple[int, ...]:
        """Offsets of a block's instructions as Unicorn decodes them, where the disassembler knows fewer or other ones."""
        return tuple(_translated(block.code))

    def _make_code(self) -> mmap.mmap:
        stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0
        self._unknown = _Callback(self._on_unknown)
        unknown = ctypes.cast(self._unknown, ctypes.c_void_p).value or 0
        try:
            area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError as error:
            raise EngineError(f"no executable memory for the counter: {error}") from error
        area.write(_LOOK_UP + struct.pack("<Q", stop) + _JUMP_AND_NEXT + struct.pack("<Q", unknown) + _JUMP)
        library: Any = uclib
        status = library.uc_hook_add(
            self._handle, ctypes.byref(ctypes.c_size_t()), UC_HOOK_BLOCK,
            ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), ctypes.byref(self._state),
            ctypes.c_uint64(1), ctypes.c_uint64(0),
        )
        if status:
            raise EngineError(f"Unicorn takes no block callback: {UcError(status)}")
        return area


def _decoded(block: Block) -> tuple[int, ...] | None:
    """Offsets of a block's instructions as the disassembler knows them; None when it does not know one."""
    starts = []
    at = 0
    while at < block.size:
        starts.append(at)
        try:
            at += decode(block.code[at : at + _LONGEST], block.start + at).size
        except Undecodable:
            return None
    return tuple(starts)


@functools.cache
def _single_stepper() -> Uc:
    """An engine whose blocks are single instructions, since RFLAGS.TF is set; it never runs."""
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
    uc.ctl_set_tcg_buffer_size(1 << 20)
    # Else address 0 would be the end of a run, which has no length.
    uc.ctl_exits_enabled(True)
    uc.mem_map(0, 2 * mmap.PAGESIZE)
    uc.reg_write(UC_X86_REG_RFLAGS, _TRAP_FLAG | 2)
    return uc


def _translated(code: bytes) -> list[int]:
    starts = []
    at = 0
    while at < len(code):
        starts.append(at)
        at += length(code[at : at + _LONGEST])
    return starts


@functools.lru_cache(4096)
def length(code: bytes) -> int:
    """Length in bytes, as Unicorn decodes it, of the instruction that `code` starts with."""
    uc = _single_stepper()
    uc.ctl_flush_tb()
    uc.mem_write(0, code + bytes(_LONGEST))
    size: int = uc.ctl_request_cache(0)[2]
    return max(size, 1)
