"""Run a guest on a bare Unicorn: no paging, no kernel, a handful of exported functions in Python."""

from __future__ import annotations

from collections.abc import Callable

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import (
    UC_X86_REG_RAX,
    UC_X86_REG_RDI,
    UC_X86_REG_RDX,
    UC_X86_REG_RIP,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
)

from emu.guest.link import Linked, link
from emu.guest.program import Program, SectionKind

STUBS, IMAGE, STACK, HEAP, HEAP_SIZE = 0x100000, 0x1000000, 0x2000000, 0x8000000, 80 << 20
HLT_RET = b"\xf4\xc3"


class FlatRun:
    """One call of the entry; `returned` is RAX, `log` the format strings given to _printk."""

    def __init__(self, program: Program) -> None:
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        for base, size in ((STUBS, 0x1000), (IMAGE, 1 << 20), (STACK, 0x10000), (HEAP, HEAP_SIZE)):
            self.uc.mem_map(base, size)
        self.names: list[str] = []
        self.next = HEAP
        self.log: list[bytes] = []
        at, bases = IMAGE, {}
        for kind, area in program.areas().items():
            bases[kind] = at
            at += (area.size + 0xFFF) & ~0xFFF
        self.linked: Linked = link(program, bases, self._stub)
        assert SectionKind.TEXT in bases
        for la, data in self.linked.images.values():
            self.uc.mem_write(la, data)
        self.returned = self._run()

    def _stub(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        address = STUBS + 16 * (1 + self.names.index(name))
        self.uc.mem_write(address, HLT_RET)
        return address

    def _run(self) -> int:
        rsp = STACK + 0xFF00
        self.uc.mem_write(STUBS, b"\xf4")
        self.uc.mem_write(rsp, STUBS.to_bytes(8, "little"))
        self.uc.reg_write(UC_X86_REG_RSP, rsp)
        rip = self.linked.entry
        while True:
            self.uc.emu_start(rip, 0)
            rip = self.uc.reg_read(UC_X86_REG_RIP)
            if rip == STUBS + 1:
                return int(self.uc.reg_read(UC_X86_REG_RAX))
            name = self.names[(rip - STUBS) // 16 - 1]
            first, second, third = (self.uc.reg_read(r) for r in (UC_X86_REG_RDI, UC_X86_REG_RSI, UC_X86_REG_RDX))
            self.uc.reg_write(UC_X86_REG_RAX, FUNCTIONS[name](self, first, second, third))

    def allocate(self, size: int) -> int:
        """Zeroed memory, a page at least."""
        address, self.next = self.next, self.next + ((size + 0xFFF) & ~0xFFF)
        return address

    def copy(self, to: int, source: int, size: int) -> int:
        """memcpy and memmove."""
        self.uc.mem_write(to, bytes(self.uc.mem_read(source, size)))
        return to

    def fill(self, to: int, byte: int, size: int) -> int:
        """memset."""
        self.uc.mem_write(to, bytes([byte & 0xFF]) * size)
        return to

    def printk(self, fmt: int) -> int:
        """Keep the format string."""
        text = bytes(self.uc.mem_read(fmt, 256))
        self.log.append(text[: text.index(0)])
        return 0


FUNCTIONS: dict[str, Callable[[FlatRun, int, int, int], int]] = {
    "vmalloc": lambda run, size, b, c: run.allocate(size),
    "vzalloc": lambda run, size, b, c: run.allocate(size),
    "kmalloc": lambda run, size, b, c: run.allocate(size),
    "is_vmalloc_addr": lambda run, address, b, c: int(address != HEAP),
    "vfree": lambda run, a, b, c: 0,
    "kfree": lambda run, a, b, c: 0,
    "set_memory_x": lambda run, a, b, c: 0,
    "memcpy": FlatRun.copy,
    "memmove": FlatRun.copy,
    "memset": FlatRun.fill,
    "_printk": lambda run, fmt, b, c: run.printk(fmt),
}
