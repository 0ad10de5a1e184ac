"""Registers of a Unicorn engine by name, several of them by one call, and its privilege level."""

from __future__ import annotations

import ctypes

from unicorn import Uc
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from emu.engine_context import discover
from emu.mmu.mmu import Mmu

REGISTERS = {
    **{name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
        "rip", "rflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "cr0", "cr2", "cr4", "gdtr", "idtr", "tr",
        "ldtr", "mxcsr", *(f"xmm{n}" for n in range(16)), *(f"dr{n}" for n in (0, 1, 2, 3, 6, 7)),
    )},
}
_SELECTORS = frozenset(("cs", "ss", "ds", "es", "fs", "gs"))
WIDE = frozenset(REGISTERS[f"xmm{n}"] for n in range(16))


class RegisterBatch:
    """64-bit registers of one engine, read or written by a single call: 1 us for five, 2 us for eighteen."""

    def __init__(self, handle: object, names: tuple[str, ...]) -> None:
        self._handle = handle
        self._count = len(names)
        self._numbers = (ctypes.c_int * self._count)(*(REGISTERS[name] for name in names))
        self._values = (ctypes.c_uint64 * self._count)()
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * self._count)(*(base + 8 * n for n in range(self._count)))
        # A selector is written as 16 bits: what stood above them must go first.
        self._clears = any(name in _SELECTORS for name in names)
        self._read = uclib.uc_reg_read_batch
        self._write = uclib.uc_reg_write_batch

    def read(self) -> list[int]:
        """The values, in the order of the names."""
        if self._clears:
            ctypes.memset(self._values, 0, 8 * self._count)
        self._read(self._handle, self._numbers, self._pointers, self._count)
        return self._values[:]

    def write(self, *values: int) -> None:
        """Set all of them, in the order of the names."""
        self._values[:] = list(values)
        self._write(self._handle, self._numbers, self._pointers, self._count)


class RegisterFile:
    """The registers of `uc`, whose privilege level `mmu` is told."""

    def __init__(self, uc: Uc, mmu: Mmu) -> None:
        self.uc = uc
        self.mmu = mmu
        self._layout = discover()
        # The binding's reg_read takes 1.7 us, the library's own function with a buffer kept for it 0.5 us, and a #PF needs twenty.
        self._handle = uc._uch
        self._reg_read = uclib.uc_reg_read
        self._reg_write = uclib.uc_reg_write
        self._word = ctypes.c_uint64()
        self._word_address = ctypes.byref(self._word)

    def reg(self, name: str) -> int:
        """A register by its lower-case name. Raises KeyError for an unknown one."""
        number = REGISTERS[name]
        if number in WIDE:
            wide: int = self.uc.reg_read(number)
            return wide
        self._word.value = 0
        self._reg_read(self._handle, number, self._word_address)
        return self._word.value

    def set_reg(self, name: str, value: int) -> None:
        """Set a register by its lower-case name; CS changes the selector only (see set_cpl)."""
        number = REGISTERS[name]
        if number in WIDE:
            self.uc.reg_write(number, value)
            return
        self._word.value = value
        self._reg_write(self._handle, number, self._word_address)

    def batch(self, *names: str) -> RegisterBatch:
        """Registers that are read or written together. Raises KeyError for an unknown name."""
        return RegisterBatch(self._handle, names)

    def set_table_register(self, name: str, base: int, limit: int, selector: int = 0) -> None:
        """Load GDTR, IDTR, LDTR or TR: base address, limit in bytes less one."""
        self.uc.reg_write(REGISTERS[name], (selector, base, limit, 0x8900 if name == "tr" else 0x8200 if name == "ldtr" else 0))

    def set_cpl(self, cpl: int) -> None:
        """Set the privilege level and forget the exception that the engine last raised."""
        context = self.uc.context_save()
        self._layout.set_cpl(context, cpl)
        self.uc.context_restore(context)
        self.mmu.cpl = cpl

    def forget_exception(self) -> None:
        """Clear the engine's exception state, so that the next exception is not taken for a double fault."""
        self.set_cpl(self.mmu.cpl)

    @property
    def error_code(self) -> int:
        """Error code of the exception that the engine raised last."""
        return self._layout.read_error_code(self.uc.context_save())

    def msr(self, index: int) -> int:
        """A model-specific register that Unicorn implements."""
        value: int = self.uc.msr_read(index)
        return value

    def set_msr(self, index: int, value: int) -> None:
        """Set a model-specific register that Unicorn implements."""
        self.uc.msr_write(index, value)
