"""Counts the instructions of an engine exactly, and stops it before the first one past an allowance.

Unicorn's own `count` does not tell how many instructions ran when something else stopped the engine first, and a Python callback
costs 0.45 us an instruction. On an x86-64 host the callback is therefore eleven bytes of machine code that decrement a counter
and tail-call uc_emu_stop when it runs out (measured: 115 to 130 million instructions a second, as fast as Unicorn's `count`).
Where such code cannot be made (another host, a system that forbids executable mappings) the same callback is Python.

Engines whose stores are seen count by blocks instead, several times as fast: emu/block_counter.py.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from typing import Any

from unicorn import UC_HOOK_CODE, Uc


class Allowance:
    """What one engine may still execute: `limit` instructions in all, and of them so many in the run under way."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # What the run under way may execute; the rest of the limit waits in _reserve.
        self._left = ctypes.c_int64(limit)
        self._reserve = 0

    @property
    def left(self) -> int:
        """What may still be counted; negative once exhausted."""
        return self._reserve + self._left.value

    @property
    def executed(self) -> int:
        """Instructions executed so far; exact between two runs."""
        left = self._reserve + self._left.value
        return self.limit - left if left > 0 else self.limit

    @property
    def exhausted(self) -> bool:
        """True once an instruction past the limit was refused."""
        return self.left < 0

    @property
    def allowed(self) -> int:
        """How many instructions of the run under way are left."""
        return self._left.value

    def allow(self, budget: int | None) -> int:
        """Begin a run of at most `budget` instructions and no more than the limit; returns how many may run."""
        left = self.left
        allowed = left if budget is None or budget > left else budget
        self._reserve = left - allowed
        self._left.value = allowed
        return allowed

    def exhaust(self) -> None:
        """An instruction past the limit was refused."""
        self._reserve, self._left.value = 0, -1

    def give_back(self) -> None:
        """An instruction that was counted will begin anew, and be counted then."""
        self._left.value += 1

    def charge_delivery(self) -> None:
        """Count the delivery of an exception: without a handler that can be fetched, deliveries alone would go on for ever."""
        self._left.value -= 1


class InstructionCounter(Allowance):
    """A counter of one engine; it must be made before the engine translates any code. `limit` is in instructions."""

    def __init__(self, uc: Uc, limit: int) -> None:
        super().__init__(limit)
        self._code: mmap.mmap | None = None
        if platform.machine() in ("x86_64", "AMD64") and self._add_native(uc):
            return
        uc.hook_add(UC_HOOK_CODE, self._step)

    def take_refused(self) -> bool:
        """Whether an instruction was refused since the run began; forgets it."""
        if self._left.value >= 0:
            return False
        self._left.value = 0
        return True

    def _step(self, uc: Uc, _la: int, _size: int, _data: object) -> None:
        self._left.value -= 1
        if self._left.value < 0:
            uc.emu_stop()

    def _add_native(self, uc: Uc) -> bool:
        from unicorn.unicorn_py3.unicorn import uclib

        library: Any = uclib
        stop = ctypes.cast(library.uc_emu_stop, ctypes.c_void_p).value
        if stop is None:
            return False
        # void hook(uc, address, size, int64_t *left):
        #   dec qword [rcx]; js 1f; ret; 1: mov rax, uc_emu_stop; jmp rax
        code = b"\x48\xff\x09\x78\x01\xc3\x48\xb8" + struct.pack("<Q", stop) + b"\xff\xe0"
        try:
            area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            return False
        area.write(code)
        entry = ctypes.addressof(ctypes.c_char.from_buffer(area))
        handle = ctypes.c_size_t()
        status = library.uc_hook_add(
            uc._uch, ctypes.byref(handle), UC_HOOK_CODE, ctypes.c_void_p(entry), ctypes.byref(self._left),
            ctypes.c_uint64(1), ctypes.c_uint64(0),
        )
        self._code = area
        return bool(status == 0)
