"""What an engine executes, logged by machine code: each block as it begins, each memory access as it completes.

A Python callback for each access would cost 3 us before it does anything; the log's own callbacks take a tenth of that, and Python
reads what they wrote when the log is full or the engine stops. Blocks that the engine's counter refuses are not logged: Unicorn
calls no further callback once one has asked it to stop.

What the engine tells (tests/characterisation/test_access_hooks.py): the physical address of an access, that of its first byte
when it crosses into another page; the value of a read only to UC_HOOK_MEM_READ_AFTER; and registers and RIP stand as before the
instruction. A store that crosses is told of before its second page is asked for, which may fail.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any

from keystone import KS_ARCH_X86, KS_MODE_64, Ks
from unicorn import UC_HOOK_BLOCK, UC_HOOK_MEM_READ_AFTER, UC_HOOK_MEM_WRITE, UC_MEM_WRITE, Uc, UcError
from unicorn.unicorn_py3.unicorn import uclib

from emu.engine_context import EngineError
from emu.engine_registers import REGISTERS

# The registers of an access, in the order in which they follow its three first words.
LOGGED = (
    "rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "fs_base",
    "gs_base",
)
BLOCK_WORDS = 2
REGISTER_AT = 3
ACCESS_WORDS = REGISTER_AT + len(LOGGED)
WRITE_KIND = UC_MEM_WRITE
# Where a word is the kind of an access << 32 | its size in bytes; a block's has no kind.
KIND_SHIFT = 32
_CAPACITY = 1 << 16
_CURSOR, _END, _DRAIN, _READ_BATCH, _IDS, _POINTERS, _VALUES = range(7)

# void block(uc, u64 address, u32 size, state *) and void access(uc, int kind, u64 address, int size, i64 value, state *), System V.
_BLOCK = f"""
    mov rax, [rcx + 8 * {_CURSOR}]
    cmp rax, [rcx + 8 * {_END}]
    jae full
append:
    mov edx, edx
    mov [rax], rdx
    mov [rax + 8], rsi
    add rax, {8 * BLOCK_WORDS}
    mov [rcx + 8 * {_CURSOR}], rax
    ret
full:
    push rsi
    push rdx
    push rcx
    call [rcx + 8 * {_DRAIN}]
    pop rcx
    pop rdx
    pop rsi
    mov rax, [rcx + 8 * {_CURSOR}]
    jmp append
"""
_ACCESS = f"""
    push rbx
    push r12
    push rdi
    mov rbx, r9
    mov rax, [rbx + 8 * {_CURSOR}]
    cmp rax, [rbx + 8 * {_END}]
    jae full
append:
    shl rsi, {KIND_SHIFT}
    mov ecx, ecx
    or rcx, rsi
    mov [rax], rcx
    mov [rax + 8], rdx
    mov [rax + 16], r8
    lea r12, [rax + {8 * REGISTER_AT}]
    mov rsi, [rbx + 8 * {_IDS}]
    mov rdx, [rbx + 8 * {_POINTERS}]
    mov ecx, {len(LOGGED)}
    call [rbx + 8 * {_READ_BATCH}]
    mov rsi, [rbx + 8 * {_VALUES}]
    mov rdi, r12
    mov ecx, {len(LOGGED)}
    rep movsq
    mov [rbx + 8 * {_CURSOR}], rdi
    pop rdi
    pop r12
    pop rbx
    ret
full:
    push rsi
    push rdx
    push rcx
    push r8
    call [rbx + 8 * {_DRAIN}]
    pop r8
    pop rcx
    pop rdx
    pop rsi
    mov rdi, [rsp]
    mov rax, [rbx + 8 * {_CURSOR}]
    jmp append
"""

_Drain = ctypes.CFUNCTYPE(None)


@cache
def _assembled(source: str) -> bytes:
    code: bytes = Ks(KS_ARCH_X86, KS_MODE_64).asm(source, as_bytes=True)[0]
    return code


class NativeLog:
    """The log of one engine's Uc, whose translations must be dropped once before it sees everything.

    `full()` is called from inside a callback when the log has no room, and cannot raise; what it does not take is lost. `accesses`:
    whether memory accesses are logged too. Raises EngineError where Unicorn or the host does not allow it; the host must be one
    whose blocks can be counted (BlockCounter.available).
    """

    def __init__(self, uc: Uc, full: Callable[[], None], *, accesses: bool) -> None:
        self._handle = uc._uch
        self._words = (ctypes.c_uint64 * (_CAPACITY + ACCESS_WORDS))()
        self._view = memoryview(self._words).cast("B").cast("Q")
        self._first = ctypes.addressof(self._words)
        self._values = (ctypes.c_uint64 * len(LOGGED))()
        self._ids = (ctypes.c_int * len(LOGGED))(*(REGISTERS[name] for name in LOGGED))
        self._pointers = (ctypes.c_uint64 * len(LOGGED))(
            *(ctypes.addressof(self._values) + 8 * n for n in range(len(LOGGED)))
        )
        self._on_full = full
        self._full = _Drain(self._make_room)
        self._state = (ctypes.c_uint64 * 7)(
            self._first, self._first + 8 * _CAPACITY, _address(self._full), _address(uclib.uc_reg_read_batch),
            ctypes.addressof(self._ids), ctypes.addressof(self._pointers), ctypes.addressof(self._values),
        )
        self._areas: list[mmap.mmap] = []
        self._add(UC_HOOK_BLOCK, _BLOCK)
        if accesses:
            self._add(UC_HOOK_MEM_READ_AFTER, _ACCESS)
            self._add(UC_HOOK_MEM_WRITE, _ACCESS)

    def _add(self, kind: int, source: str) -> None:
        try:
            area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError as error:
            raise EngineError(f"no executable memory for the log: {error}") from error
        area.write(_assembled(source))
        self._areas.append(area)
        library: Any = uclib
        status = library.uc_hook_add(
            self._handle, ctypes.byref(ctypes.c_size_t()), kind,
            ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), ctypes.byref(self._state),
            ctypes.c_uint64(1), ctypes.c_uint64(0),
        )
        if status:
            raise EngineError(f"Unicorn takes no callback of kind {kind}: {UcError(status)}")

    def _make_room(self) -> None:
        self._on_full()
        self._state[_CURSOR] = self._first

    def take(self) -> list[int]:
        """The words logged since the last call, oldest first.

        A block is (size in bytes, linear address); an access (kind << 32 | size, physical address, value, registers as LOGGED).
        """
        count = (self._state[_CURSOR] - self._first) >> 3
        if not count:
            return []
        self._state[_CURSOR] = self._first
        return self._view[:count].tolist()


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
