"""The dicts in which a recorded machine's TLBs and paging-structure caches keep their entries: they tell what goes in and out.

They do not tell what `clear` takes out: that is an invalidation, which the MMU tells (Watch.on_invalidate).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu.block_counter import LAST, LEFT, Block, BlockCounter
from emu.decode import Undecodable, decode
from emu.engine_registers import REGISTERS
from emu.mmu.entry import XD

if TYPE_CHECKING:
    from emu.cpu import Cpu
    from emu.debug.history import History

FILL, SET, DROP = range(3)
_put = dict.__setitem__
_pop = dict.pop


class Recorded(dict[int, Any]):
    """What one CPU caches of one level, PCID and kind."""

    __slots__ = ("cpu", "level", "pcid", "table")

    def __init__(self, cpu: int, pcid: int | None, level: int, table: bool) -> None:
        super().__init__()
        self.cpu = cpu
        self.pcid = -1 if pcid is None else pcid
        self.level = level
        self.table = table


class _Instruction:
    """Tells where a CPU is: which instruction of which block. Reading RIP takes a third of a record's time."""

    def __init__(self, cpu: Cpu) -> None:
        engine = cpu.engine
        self.blocks = engine.block_counter
        # By the address of a block's entry: the block, and its one instruction that accesses memory, or 0.
        self.known: dict[int, tuple[Block | None, int]] = {}
        self.word = ctypes.c_uint64()
        # 0.2 us less than by the engine's own: the lock of the interpreter is not given away, nothing is converted.
        address = ctypes.cast(engine._reg_read, ctypes.c_void_p).value or 0
        read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(address)
        handle, rip = ctypes.c_void_p(engine._handle.value), ctypes.c_int(REGISTERS["rip"])
        there = ctypes.c_void_p(ctypes.addressof(self.word))
        self.read: Callable[[], int] = lambda: read(handle, rip, there)
        counter: Any = engine.counter
        self.words: Any = _OneWord(counter) if self.blocks is None else self.blocks.words
        if self.blocks is not None:
            self.blocks.on_forget = self.known.clear

    def find(self, at: int) -> tuple[Block | None, int]:
        """What `known` lacks. It is asked for when the block is seen: entries do not stay where they are."""
        if not at or not isinstance(self.blocks, BlockCounter):
            return None, 0
        block = self.blocks.block_at(at)
        found = self.known[at] = block, _only_access(block)
        return found


class _OneWord:
    """What BlockCounter.words has, for a counter of single instructions."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    def __getitem__(self, index: int) -> int:
        return int(self._counter._left.value) if index == LEFT else 0


def _only_access(block: Block) -> int:
    """The address of the one instruction of a block that accesses memory; 0 for none, several, or one that cannot be decoded."""
    found = at = 0
    while at < block.size:
        try:
            instruction = decode(block.code[at : at + 15], block.start + at)
        except Undecodable:
            return 0
        if instruction.operands or instruction.descriptors:
            if found:
                return 0
            found = block.start + at
        at += instruction.size
    return found


def recorded_kinds(history: History, cpu: Cpu) -> tuple[type[Recorded], type[Recorded]]:
    """The kinds of dict for a CPU's pages and tables: closures, as an attribute's look-up is a twentieth of a record's time."""
    engine, raw, full = cpu.engine, history.raw, history.full
    here = _Instruction(cpu)
    read, words, find, find_known, word = here.read, here.words, here.find, here.known.get, here.word
    extend, add, overflow, left, last, executable = raw.extend, history.add, history.overflow, LEFT, LAST, XD

    class Tables(Recorded):
        __slots__ = ()

        def __setitem__(self, key: int, value: Any) -> None:
            if key in self and self[key] == value:
                # Each walk that begins further up puts it there once more.
                return
            _put(self, key, value)
            if not engine._running:
                add(SET, self, key, value)
                return
            # The page that was walked for is put behind it, and says where that was.
            extend((FILL, self, key, value, 0, 0, None, None, history.turn))

        def pop(self, key: int, *default: Any) -> Any:
            if key in self:
                self._gone(key)
            return _pop(self, key, *default)

        def __delitem__(self, key: int) -> None:
            self._gone(key)
            _pop(self, key)

        def _gone(self, key: int) -> None:
            if not engine._running:
                add(DROP, self, key, False)
                return
            read()
            block, _ = find_known(words[last]) or find(words[last])
            extend((DROP, self, key, True, word.value, words[left], block, None, history.turn))

    class Pages(Tables):
        __slots__ = ()

        def __setitem__(self, key: int, value: int) -> None:
            _put(self, key, value)
            if not engine._running:
                add(SET, self, key, value)
                return
            at = words[last]
            block, rip = find_known(at) or find(at)
            # A page that cannot be executed (bit 63 is inverted) was not fetched: the block's one access was to it.
            if not rip or value >= executable:
                read()
                rip = word.value
            extend((0, self, key, value, rip, words[left], block, None, history.turn))
            if len(raw) > full:
                overflow()

    return Pages, Tables
