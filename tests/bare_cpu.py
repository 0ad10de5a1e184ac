"""A bare machine for tests of the CPU: one Cpu over page tables, GDT, TSS and IDT of its own, and nothing of a kernel.

Physical memory is mapped at 0 and again at HIGH, in pages that only the supervisor may use, except the user pages at
[USER, USER + 2 MiB). Every vector enters a stub that halts: `run` ends there and returns what was delivered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import keystone

from emu.cpu import Cpu, CpuStop, KernelEntry
from emu.descriptors import Gate, SystemSegment, SystemType, TableRegister, Tss, encode_gate, encode_system_segment, encode_tss
from emu.memory import Memory
from emu.mmu.entry import PS, RW, US, A, D, P
from emu.mmu.registers import RESET_CR4, RESET_EFER, Cr4, Efer, Features
from emu.mmu.tlb import Tlb

RAM = 32 << 20
HIGH = 0xFFFF_FFFF_8000_0000
PML4, PDPT, PD, USER_PT, KERNEL_PT, PML5 = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
GDT, TSS, IDT = 0x10000, 0x11000, 0x12000
STUBS = 0x20000
STUB_SIZE = 16
USER, KERNEL = 0x40_0000, 0x60_0000  # 2 MiB each of 4 KiB pages
CODE, USER_CODE = KERNEL + 0x1000, USER + 0x1000
DATA, USER_DATA = KERNEL + 0x10000, USER + 0x10000
STACK, USER_STACK = KERNEL + 0x20800, USER + 0x20800
RSP0, IST1, IST2 = KERNEL + 0x30800, KERNEL + 0x40800, KERNEL + 0x50800
KERNEL_CS, KERNEL_SS, USER_SS, USER_CS, TR = 0x10, 0x18, 0x2B, 0x33, 0x40
SPARE = 0x50  # a 16-byte slot of the GDT for a test's own descriptor
SEGMENTS = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF, 0)
GDT_LIMIT = 8 * 20 - 1
TSS_LIMIT = 0x67
NON_CANONICAL = 0x8000_0000_0000
WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
BASE_CR4 = RESET_CR4 | int(Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT)

_assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)


def assemble(source: str | bytes, at: int = CODE) -> bytes:
    """Machine code of Intel-syntax lines separated by semicolons; bytes pass."""
    return source if isinstance(source, bytes) else bytes(_assembler.asm(source, at)[0])


@dataclass(frozen=True, slots=True)
class Entered:
    """A handler was entered: its vector, the frame it found, and the state it runs in."""

    vector: int
    error: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    at: int
    """RSP in the handler."""
    cpl: int


class BareCpu(Cpu):
    """A CPU at privilege level 0 in 64-bit code, interrupts off."""

    def __init__(
        self, *, levels: int = 4, features: Features | None = None, cr4: int = 0, efer: int = RESET_EFER | Efer.SCE,
        tlb: str | Tlb = "infinite", limit: int | None = None,
    ) -> None:
        memory = Memory(RAM)
        super().__init__(
            0, memory, features=features or Features(la57=levels == 5), levels=levels,
            tlb=tlb if isinstance(tlb, Tlb) else Tlb(tlb), is_stub=self._is_stub,
            limit=limit,
        )
        self._build_tables(levels)
        self.mmu.reset(cr3=PML5 if levels == 5 else PML4, cr4=BASE_CR4 | cr4 | (Cr4.LA57 if levels == 5 else 0), efer=int(efer))
        self.sync_engine_registers()
        memory.write(GDT, struct.pack(f"<{len(SEGMENTS)}Q", *SEGMENTS))
        self.put_system_segment(TR, SystemSegment(TSS, TSS_LIMIT, SystemType.TSS_BUSY))
        self.put_tss(Tss((RSP0, 0, 0), (IST1, IST2, 0, 0, 0, 0, 0), TSS_LIMIT + 1))
        for vector in range(256):
            memory.write(STUBS + STUB_SIZE * vector, b"\xf4")
            self.put_gate(vector)
        self.gdtr = TableRegister(GDT, GDT_LIMIT)
        self.idtr = TableRegister(IDT, 0xFFF)
        self.tss, self.tr = TableRegister(TSS, TSS_LIMIT), TR
        self.load_tables()
        self.at_level(0)

    def _build_tables(self, levels: int) -> None:
        put, table, used = self.memory.write_u64, P | RW | US | A, P | RW | A | D
        if levels == 5:
            put(PML5, PML4 | table)
            put(PML5 + 8 * 511, PML4 | table)
        for entry in (PML4, PML4 + 8 * 511):
            put(entry, PDPT | table)
        put(PDPT, PD | table)
        put(PDPT + 8 * 510, PD | table)
        for n in range(RAM >> 21):
            put(PD + 8 * n, n << 21 | used | PS)
        put(PD + 8 * (USER >> 21), USER_PT | table)
        put(PD + 8 * (KERNEL >> 21), KERNEL_PT | table)
        for n in range(512):
            put(USER_PT + 8 * n, USER + (n << 12) | used | US)
            put(KERNEL_PT + 8 * n, KERNEL + (n << 12) | used)

    def _is_stub(self, la: int) -> bool:
        return STUBS <= la < STUBS + STUB_SIZE * 256

    # ---- set-up

    def pte_pa(self, la: int) -> int:
        """Where the PTE of a page of the user or kernel area is."""
        assert la >> 21 in (USER >> 21, KERNEL >> 21)
        return (USER_PT if la >> 21 == USER >> 21 else KERNEL_PT) + 8 * (la >> 12 & 511)

    def set_pte(self, la: int, value: int) -> None:
        """Set the PTE of a page, and forget what was cached of it."""
        self.memory.write_u64(self.pte_pa(la), value)
        self.mmu.invlpg(la)
        self.mmu.invlpg(la + HIGH)

    def unmap(self, la: int) -> None:
        """Make a page of the user or kernel area absent."""
        self.set_pte(la, 0)

    def put_gate(self, vector: int, **fields: int) -> None:
        """The gate of a vector: by default to its stub, open to INT n from level 3 for 0x80 only."""
        values = {"offset": STUBS + STUB_SIZE * vector, "selector": KERNEL_CS, "dpl": 3 if vector == 0x80 else 0, **fields}
        values["p"] = bool(values.get("p", True))
        self.memory.write(IDT + 16 * vector, encode_gate(Gate(**values)))

    def put_segment(self, selector: int, descriptor: int) -> None:
        """A descriptor of the GDT."""
        self.memory.write_u64(GDT + (selector & 0xFFF8), descriptor)

    def put_system_segment(self, selector: int, segment: SystemSegment) -> None:
        """A 16-byte descriptor of the GDT."""
        self.memory.write(GDT + (selector & 0xFFF8), encode_system_segment(segment))

    def put_tss(self, tss: Tss) -> None:
        """The contents of the TSS."""
        self.memory.write(TSS, encode_tss(tss))

    def put_words(self, la: int, words: Iterable[int]) -> None:
        """Store u64s at an address of low memory."""
        self.memory.write(la, b"".join(word.to_bytes(8, "little") for word in words))

    def words(self, la: int, count: int) -> tuple[int, ...]:
        """u64s of low memory."""
        return struct.unpack(f"<{count}Q", self.memory.read(la, 8 * count))

    def at_level(self, cpl: int) -> None:
        """Be at privilege level 0 or 3, in its flat segments."""
        self.enter_privilege(cpl, USER_CS if cpl else KERNEL_CS, new_stack=False)
        self.set_reg("ss", USER_SS if cpl else KERNEL_SS)

    # ---- execution

    def run_code(
        self, source: str | bytes, cpl: int = 0, *, at: int | None = None, rsp: int | None = None, rflags: int = 2, **registers: int
    ) -> Entered | CpuStop:
        """Put code at `at` and run it at a privilege level until a handler is entered or the CPU stops."""
        at = at if at is not None else USER_CODE if cpl else CODE
        self.memory.write(at & ~HIGH, assemble(source, at))
        self.at_level(cpl)
        self.set_reg("rsp", rsp if rsp is not None else USER_STACK if cpl else STACK)
        self.set_reg("rflags", rflags)
        for name, value in registers.items():
            self.set_reg(name, value)
        self.rip = at
        return self.go_on()

    def go_on(self) -> Entered | CpuStop:
        """Run from the present state until a handler is entered or the CPU stops."""
        stop = self.run()
        if not isinstance(stop, KernelEntry):
            return stop
        vector = (stop.la - STUBS) // STUB_SIZE
        at = self.reg("rsp")
        words = struct.unpack("<6Q", self.mmu.read(at, 48, user=False, ac=True))
        has_error = vector in WITH_ERROR
        frame = words[1:] if has_error else words[:5]
        return Entered(vector, words[0] if has_error else None, *frame, at, self.mmu.cpl)

    def vector_of(self, source: str | bytes, cpl: int = 0, **registers: int) -> tuple[int, int | None]:
        """Vector and error code of the exception that code raises; code must raise one."""
        entered = self.run_code(source, cpl, **registers)
        assert isinstance(entered, Entered), entered
        return entered.vector, entered.error
