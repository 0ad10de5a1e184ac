"""A bare Unicorn CPU in UC_TLB_VIRTUAL mode that maps every page to low memory and records what it is asked."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable

import unicorn as uc_
from unicorn import x86_const as x86

RAM = 4 << 20
CODE = 0xFFFF_FFFF_8010_0000  # maps to pa 0x100000, as every address does to its low bits
USER_CODE = 0x20_0000
DATA = 0xFFFF_C900_0030_0000
STACK = 0xFFFF_C900_0038_0800
GDT = 0xFFFF_FE00_0000_2000
READ, WRITE, FETCH = 16, 17, 18
R, W, X = uc_.UC_PROT_READ, uc_.UC_PROT_WRITE, uc_.UC_PROT_EXEC
RIGHT = {READ: R, WRITE: R | W, FETCH: R | X}
SEGMENTS = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)


class Bare:
    """One instance. `fills` records (page, access); `refuse` are pages whose fill fails; `rights` are what is granted by kind
    of access; `on_fill` is called first in each fill.
    """

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory = memory or mmap.mmap(-1, RAM)
        uc = uc_.Uc(uc_.UC_ARCH_X86, uc_.UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
        uc.ctl_set_tlb_mode(uc_.UC_TLB_VIRTUAL)
        uc.mem_map_ptr(0, RAM, uc_.UC_PROT_ALL, ctypes.addressof(ctypes.c_char.from_buffer(self.memory)))
        self.uc = uc
        self.fills: list[tuple[int, int]] = []
        self.vectors: list[int] = []
        self.refuse: set[int] = set()
        self.rights = RIGHT
        self.on_fill: Callable[[int, int], None] | None = None
        uc.hook_add(uc_.UC_HOOK_TLB_FILL, self._fill)
        uc.hook_add(uc_.UC_HOOK_INTR, self._interrupt)
        for number, segment in enumerate(SEGMENTS):
            self.put(GDT + 8 * number, struct.pack("<Q", segment))
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 8 * len(SEGMENTS) - 1, 0))
        uc.reg_write(x86.UC_X86_REG_RSP, STACK)

    def _fill(self, uc: uc_.Uc, page: int, access: int, entry: object, data: object) -> bool:
        self.fills.append((page, access))
        if self.on_fill is not None:
            self.on_fill(page, access)
        if page in self.refuse:
            return False
        entry.paddr = page & (RAM - 1)
        entry.perms = self.rights[access]
        return True

    def _interrupt(self, uc: uc_.Uc, vector: int, data: object) -> None:
        self.vectors.append(vector)
        uc.emu_stop()

    def put(self, la: int, data: bytes) -> None:
        """Store bytes where `la` maps to."""
        pa = la & (RAM - 1)
        self.memory[pa : pa + len(data)] = data

    def get(self, la: int, size: int) -> bytes:
        """The bytes where `la` maps to."""
        pa = la & (RAM - 1)
        return self.memory[pa : pa + size]

    def reg(self, register: int, value: int | None = None) -> int:
        """Read a register, or write it first."""
        if value is not None:
            self.uc.reg_write(register, value)
        return self.uc.reg_read(register)

    def run(self, code: str = "", at: int = CODE, **registers: int) -> None:
        """Put `code` (hex) and run to HLT, an exception, or a refused fill."""
        if code:
            self.put(at, bytes.fromhex(code))
            self.uc.ctl_flush_tb()
        for name, value in registers.items():
            self.uc.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), value)
        self.uc.emu_start(at, 0)

    def asked(self, page: int) -> list[int]:
        """The accesses for which fills of a page were asked, in order."""
        return [access for where, access in self.fills if where == page & ~0xFFF]

    def flush(self) -> None:
        """Drop the whole soft TLB."""
        self.uc.ctl(uc_.UC_CTL_TLB_FLUSH, uc_.UC_CTL_IO_WRITE)

    def enter_user(self, code: str) -> None:
        """IRETQ to `code` (hex) at CPL3, and run it to an exception (HLT is one there)."""
        self.put(USER_CODE, bytes.fromhex(code))
        self.put(STACK, struct.pack("<5Q", USER_CODE, 0x33, 0x2, 0x30_0000, 0x2B))
        self.uc.reg_write(x86.UC_X86_REG_CS, 0x10)
        self.uc.reg_write(x86.UC_X86_REG_SS, 0x18)
        self.run("48cf", rsp=STACK)
