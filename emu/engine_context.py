"""The three fields of Unicorn's saved x86 context that no public register names: privilege level and exception state.

Writing CS through the register API changes the selector only, and the engine never clears `old_exception`, so that the second
#GP of a run arrives as vector 8. Both live in the context that `context_save` returns. Their offsets are found at start-up by
comparing contexts around events that change exactly them, and the result is proven by a round trip before it is used; when an
engine's layout cannot be recognised, `discover` raises EngineError instead of guessing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from dataclasses import dataclass

from unicorn import (
    UC_ARCH_X86,
    UC_HOOK_INTR,
    UC_HOOK_TLB_FILL,
    UC_MODE_64,
    UC_TLB_VIRTUAL,
    Uc,
    UcError,
)
from unicorn.unicorn import UcContext
from unicorn.x86_const import (
    UC_CPU_X86_ICELAKE_SERVER,
    UC_X86_REG_CS,
    UC_X86_REG_GDTR,
    UC_X86_REG_RCX,
    UC_X86_REG_RSP,
    UC_X86_REG_SS,
)

NO_EXCEPTION = 0xFFFFFFFF
_CPL_MASK = 3
_GENERAL_PROTECTION = 13
_LOAD_DS = 0x6000


class EngineError(RuntimeError):
    """The installed Unicorn does not behave as this program needs; the message says in what."""


@dataclass(frozen=True, slots=True)
class ContextLayout:
    """Byte offsets of the 32-bit fields in a saved context."""

    hflags: int
    old_exception: int
    error_code: int

    def set_cpl(self, context: UcContext, cpl: int) -> None:
        """Give the context privilege level `cpl` and a clean exception state."""
        base = _address(context)
        flags = ctypes.c_uint32.from_address(base + self.hflags)
        flags.value = flags.value & ~_CPL_MASK | cpl
        ctypes.c_uint32.from_address(base + self.old_exception).value = NO_EXCEPTION


    def read_error_code(self, context: UcContext) -> int:
        """The error code of the exception that the engine raised last."""
        return ctypes.c_uint32.from_address(_address(context) + self.error_code).value


def _address(context: UcContext) -> int:
    address = ctypes.cast(context.context, ctypes.c_void_p).value
    if address is None:
        raise EngineError("Unicorn returned a context without storage")
    return address


def _words(context: UcContext) -> tuple[int, ...]:
    size = context.size // 4 * 4
    return struct.unpack(f"<{size // 4}I", ctypes.string_at(_address(context), size))


def _find_error_code(uc: Uc, kernel: UcContext) -> int:
    """Where the selectors of two refused segment loads show up as error codes."""
    places: set[int] | None = None
    for selector in (0x7F8, 0x6F0):
        uc.context_restore(kernel)
        uc.reg_write(UC_X86_REG_RCX, 0x1234_0000 | selector)
        uc.emu_start(_LOAD_DS, 0, 0, 1)
        found = {i for i, word in enumerate(_words(uc.context_save())) if word == selector}
        places = found if places is None else places & found
    if not places or len(places) != 1:
        raise EngineError("this Unicorn's saved context has no recognisable error code")
    return 4 * places.pop()


@functools.cache
def discover() -> ContextLayout:
    """The layout of this process's Unicorn, proven by a change of privilege and two #GPs in a row. Raises EngineError."""
    size = 1 << 16
    ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
    uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
    uc.mem_map_ptr(0, size, 7, ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    vectors: list[int] = []

    def fill(_uc: Uc, la: int, _access: int, entry: object, _data: object) -> bool:
        entry.paddr = la & (size - 1)  # type: ignore[attr-defined]
        entry.perms = 7  # type: ignore[attr-defined]
        return True

    def interrupt(engine: Uc, vector: int, _data: object) -> None:
        vectors.append(vector)
        engine.emu_stop()

    uc.hook_add(UC_HOOK_TLB_FILL, fill)
    uc.hook_add(UC_HOOK_INTR, interrupt)
    # Flat GDT: null, -, kernel CS 0x10, kernel SS 0x18, -, user SS 0x2b, user CS 0x33.
    gdt = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
    ram[0x1000 : 0x1000 + 8 * len(gdt)] = struct.pack(f"<{len(gdt)}Q", *gdt)
    ram[0x2000:0x2002] = b"\x48\xcf"  # iretq
    ram[0x3000:0x3001] = b"\xfa"  # cli: #GP at privilege level 3
    ram[_LOAD_DS : _LOAD_DS + 2] = b"\x8e\xd9"  # mov ds, ecx
    ram[0x4000:0x4028] = struct.pack("<5Q", 0x3000, 0x33, 0x2, 0x5000, 0x2B)
    uc.reg_write(UC_X86_REG_GDTR, (0, 0x1000, 8 * len(gdt) - 1, 0))
    uc.reg_write(UC_X86_REG_CS, 0x10)
    uc.reg_write(UC_X86_REG_SS, 0x18)
    uc.reg_write(UC_X86_REG_RSP, 0x4000)
    kernel = uc.context_save()
    try:
        uc.emu_start(0x2000, 0x3000, 0, 1)
        user = uc.context_save()
        uc.emu_start(0x3000, 0, 0, 1)
        faulted = uc.context_save()
    except UcError as error:
        raise EngineError(f"Unicorn's start-up test stopped: {error}") from error
    before, after, fault = _words(kernel), _words(user), _words(faulted)
    hflags = [
        i for i, (a, b) in enumerate(zip(before, after, strict=True))
        if a != b and a | _CPL_MASK == b and not a & _CPL_MASK and a > 0xFFF
    ]
    old_exception = [
        i for i, (a, b) in enumerate(zip(after, fault, strict=True)) if (a, b) == (NO_EXCEPTION, _GENERAL_PROTECTION)
    ]
    if len(hflags) != 1 or len(old_exception) != 1 or vectors != [_GENERAL_PROTECTION]:
        raise EngineError("this Unicorn's saved context has no recognisable privilege level and exception state")
    layout = ContextLayout(4 * hflags[0], 4 * old_exception[0], _find_error_code(uc, kernel))
    vectors.clear()
    layout.set_cpl(faulted, 3)
    uc.context_restore(faulted)
    uc.emu_start(0x3000, 0, 0, 1)
    layout.set_cpl(faulted, 0)
    uc.context_restore(faulted)
    uc.emu_start(0x3000, 0, 0, 1)
    if vectors != [_GENERAL_PROTECTION]:
        raise EngineError("this Unicorn does not take the privilege level from its saved context")
    return layout
