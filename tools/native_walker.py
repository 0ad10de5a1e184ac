"""Unicorn's own page walker as an oracle: one instance runs one access per case over page tables that the case sets up.

Imported by tools/permissions.py and the tests. The instance is put back to a clean exception state before each case by
restoring a saved context, since Unicorn never clears its record of an earlier exception; its soft TLB is flushed each time.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import unicorn as uc_
from unicorn import x86_const as x86

from emu.memory import Memory
from emu.mmu.entry import Entry
from emu.mmu.registers import Cr0, Cr4, Efer
from emu.mmu.walk import PagingRegisters

P, RW, US, A, D, PS, G, XD = (int(flag) for flag in (
    Entry.P, Entry.RW, Entry.US, Entry.A, Entry.D, Entry.PS, Entry.G, Entry.XD))
READ, WRITE, FETCH, IMPLICIT = "read", "write", "fetch", "implicit"
KINDS = (READ, WRITE, FETCH, IMPLICIT)
KEY = 3
# PKRU for key 3: CR4.PKE clear, then PKE with nothing, AD, WD, both, and a restriction of another key only.
PKRU_SETTINGS: tuple[int | None, ...] = (None, 0, 1 << 2 * KEY, 2 << 2 * KEY, 3 << 2 * KEY, 3 << 2 * (KEY + 1))


class Setting(NamedTuple):
    """Registers, privilege and kind of access. `pkru` None means CR4.PKE is clear."""

    levels: int
    cpl: int
    kind: str
    wp: bool
    smep: bool
    smap: bool
    ac: bool
    nxe: bool
    pkru: int | None

    def registers(self, cr3: int) -> PagingRegisters:
        """The same as the walker under test takes it."""
        return PagingRegisters(
            cr3=cr3, levels=self.levels, wp=self.wp, smep=self.smep, smap=self.smap, nxe=self.nxe,
            pke=self.pkru is not None, pkru=self.pkru or 0,
        )

    def describe(self) -> str:
        """Flag names, for a failure message."""
        flags = [name.upper() for name in ("wp", "smep", "smap", "ac", "nxe") if getattr(self, name)]
        pkru = "PKE=0" if self.pkru is None else f"PKRU={self.pkru:#x}"
        return f"{self.levels}-level CPL{self.cpl} {self.kind} {'|'.join(flags) or '-'} {pkru}"


class Case(NamedTuple):
    """A setting and the entries of the path, top first; the last is a leaf of level `leaf`."""

    setting: Setting
    leaf: int
    entries: tuple[int, ...]


class Outcome(NamedTuple):
    """The error code (None: no fault), the entries afterwards, and what was wrong with CR2 or the data, if anything."""

    error: int | None
    entries: tuple[int, ...]
    wrong: str = ""


# ------------------------------------------------------------------------------------------------ the machine compared

SIZE = 2 << 30
FRAME = 1 << 30  # every leaf of the path maps this frame: aligned for all three sizes
MARKER = 0x5AFE_0123_4567_89AB
DATA = 0x100  # offset of the data accessed; offset 0 holds instructions to fetch
ROOT = {4: 0x1000, 5: 0x2000}
PATH = {5: 0x10000, 4: 0x11000, 3: 0x12000, 2: 0x13000, 1: 0x14000}  # tables of the path by level of their entries
CODE_PA = 0x20000
KERNEL_CODE = 0xFFFF_FFFF_8000_0000
USER_CODE = 0x40_0000
LA = {4: 0x7012_3456_7000 & ~0x3FFFFFFF, 5: 0x0005_7000_0000_0000}
CODE = {
    READ: (0x00, b"\x48\x8b\x07\xf4"),  # mov rax, [rdi]; hlt
    WRITE: (0x10, b"\x48\x89\x07\xf4"),  # mov [rdi], rax; hlt
    FETCH: (0x20, b"\xff\xe7"),  # jmp rdi
    IMPLICIT: (0x30, b"\x0f\x02\xc1\xf4"),  # lar eax, cx: reads the GDT, which lies in the page
}
SELECTOR = 0x28


def slots(levels: int) -> list[int]:
    """Physical addresses of the entries of the path, top first."""
    la = LA[levels]
    tables = [ROOT[levels]] + [PATH[level] for level in range(levels - 1, 0, -1)]
    return [table + 8 * (la >> (9 * level + 3) & 511) for level, table in zip(range(levels, 0, -1), tables, strict=True)]


def build_memory() -> Memory:
    """RAM with the code and its mappings; the path under test starts empty."""
    memory = Memory(SIZE)
    write = memory.write_u64
    for root in ROOT.values():
        upper = root
        if root == ROOT[5]:
            upper = 0x3000
            write(root + 8 * 511, upper | P | RW | US | A)
            write(root, upper | P | RW | US | A)
        write(upper + 8 * 511, 0x4000 | P | RW | A)
        write(upper, 0x7000 | P | RW | US | A)
    for table, next_table, slot, flags in (
        (0x4000, 0x5000, 510, P | RW | A), (0x5000, 0x6000, 0, P | RW | A), (0x6000, CODE_PA, 0, P | A | D),
        (0x7000, 0x8000, 0, P | RW | US | A), (0x8000, 0x9000, 2, P | RW | US | A), (0x9000, CODE_PA, 0, P | US | A | D),
    ):
        write(table + 8 * slot, next_table | flags)
    for offset, code in CODE.values():
        memory.write(CODE_PA + offset, code)
    memory.fill(FRAME, 64, 0xF4)
    memory.write_u64(FRAME + DATA, MARKER)
    return memory


class NativeWalker:
    """Unicorn's walker over `memory`: one instance, put back to a clean exception state before each case.

    The error code, CR2 and RAX are read from the bytes of a saved context; where they stand in it is found by comparing
    contexts at start-up, since the register API has no error code and cannot set the privilege level.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        uc = uc_.Uc(uc_.UC_ARCH_X86, uc_.UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
        uc.mem_map_ptr(0, SIZE, uc_.UC_PROT_ALL, memory.host_address)
        self.uc = uc
        self.vector: int | None = None
        uc.hook_add(uc_.UC_HOOK_INTR, self._interrupt)
        self._clean: dict[Setting, object] = {}
        self._slots = {levels: [pa >> 3 for pa in slots(levels)] for levels in (4, 5)}
        self._bare = uc.context_save()
        self._scratch = uc.context_save()
        self._find_fields()

    def _interrupt(self, uc: uc_.Uc, vector: int, data: object) -> None:
        self.vector = vector
        uc.emu_stop()

    def _set_registers(self, setting: Setting) -> None:
        uc = self.uc
        write = uc.reg_write
        cr4 = Cr4.PAE | (Cr4.LA57 if setting.levels == 5 else 0) | (Cr4.SMEP if setting.smep else 0)
        cr4 |= (Cr4.SMAP if setting.smap else 0) | (Cr4.PKE if setting.pkru is not None else 0)
        write(x86.UC_X86_REG_CR4, int(cr4))
        write(x86.UC_X86_REG_CR3, ROOT[setting.levels])
        uc.msr_write(0xC000_0080, int(Efer.LME | Efer.LMA | (Efer.NXE if setting.nxe else 0)))
        write(x86.UC_X86_REG_CR0, int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.PG | (Cr0.WP if setting.wp else 0)))
        write(x86.UC_X86_REG_EFLAGS, 1 << 18 | 2 if setting.ac else 2)
        la = LA[setting.levels]
        write(x86.UC_X86_REG_RDI, la if setting.kind == FETCH else la + DATA)
        write(x86.UC_X86_REG_RAX, MARKER if setting.kind == WRITE else 0)
        write(x86.UC_X86_REG_RCX, SELECTOR)
        write(x86.UC_X86_REG_GDTR, (0, la + DATA - SELECTOR, 0xFFF, 0))

    def _bytes(self) -> bytes:
        self.uc.context_update(self._scratch)
        return ctypes.string_at(self._scratch.context, self._scratch.size)

    def _find_fields(self) -> None:
        """Find hflags, PKRU, CR2, RAX and the error code in a saved context."""
        uc = self.uc
        base = Setting(4, 0, READ, True, False, False, False, True, None)
        self._set_registers(base)
        before = self._bytes()
        self._set_registers(base._replace(smap=True))
        after = self._bytes()
        # env->hflags mirrors CR4.SMAP in its bit 23; its two low bits are the CPL that Unicorn runs at.
        changed = [at for at in range(0, len(before) - 3, 4) if before[at : at + 4] != after[at : at + 4]]
        words = {at: int.from_bytes(before[at : at + 4], "little") ^ int.from_bytes(after[at : at + 4], "little") for at in changed}
        self._hflags = self._only("hflags", [at for at, bits in words.items() if bits == 1 << 23])
        address = ctypes.cast(self._scratch.context, ctypes.c_void_p).value
        assert address is not None
        samples: list[tuple[bytes, int, int]] = []
        for kind, error in ((READ, 0), (WRITE, 2), (FETCH, 16)):
            setting = base._replace(kind=kind)
            self._set_registers(setting)
            offset = CODE[kind][0]
            uc.ctl(uc_.UC_CTL_TLB_FLUSH, uc_.UC_CTL_IO_WRITE)
            uc.emu_start(KERNEL_CODE + offset, 0)
            assert self.vector == 14, f"a {kind} of an absent page raised {self.vector}, not #PF"
            samples.append((self._bytes(), error, LA[4] if kind == FETCH else LA[4] + DATA))
            uc.context_restore(self._bare)
        size = len(before)
        self._error = self._only("error code", [
            at for at in range(0, size - 3, 4)
            if all(int.from_bytes(data[at : at + 4], "little") == error for data, error, _ in samples)
        ])
        self._cr2 = self._only("CR2", [
            at for at in range(0, size - 7, 8)
            if all(int.from_bytes(data[at : at + 8], "little") == la for data, _, la in samples)
        ], last=True)  # RDI holds the same value, and stands before it
        tagged = 0x1357_9BDF
        self._set_registers(base._replace(pkru=0))
        for register, value in ((x86.UC_X86_REG_RAX, tagged), (x86.UC_X86_REG_RCX, 0), (x86.UC_X86_REG_RDX, 0)):
            uc.reg_write(register, value)
        without = self._bytes()
        self._rax = self._only("RAX", [
            at for at in range(0, size - 7, 8) if int.from_bytes(without[at : at + 8], "little") == tagged
        ])
        self.memory.write(CODE_PA + 0x80, b"\x0f\x01\xef\xf4")  # wrpkru; hlt
        uc.emu_start(KERNEL_CODE + 0x80, 0)
        data = self._bytes()
        self._pkru = self._only("PKRU", [
            at for at in range(0, size - 3, 4)
            if at != self._rax and int.from_bytes(data[at : at + 4], "little") == tagged
            and int.from_bytes(without[at : at + 4], "little") != tagged
        ])
        self._fields = [
            ctypes.c_uint32.from_address(address + self._error), ctypes.c_uint64.from_address(address + self._cr2),
            ctypes.c_uint64.from_address(address + self._rax),
        ]
        uc.context_restore(self._bare)

    @staticmethod
    def _only(name: str, found: list[int], last: bool = False) -> int:
        if not found or (len(found) > 1 and not last):
            raise RuntimeError(f"{name} not found in Unicorn's saved context: {len(found)} candidates")
        return found[-1]

    def _clean_context(self, setting: Setting) -> object:
        context = self._clean.get(setting)
        if context is None:
            self.uc.context_restore(self._bare)
            self._set_registers(setting)
            context = self.uc.context_save()
            address = ctypes.cast(context.context, ctypes.c_void_p).value
            assert address is not None
            ctypes.c_uint32.from_address(address + self._hflags).value |= setting.cpl
            ctypes.c_uint32.from_address(address + self._pkru).value = setting.pkru or 0
            self._clean[setting] = context
        return context

    def run(self, case: Case) -> Outcome:
        """What Unicorn makes of a case."""
        setting = case.setting
        u64 = self.memory.u64
        where = self._slots[setting.levels]
        for slot, entry in zip(where, case.entries, strict=False):
            u64[slot] = entry
        uc = self.uc
        uc.context_restore(self._clean_context(setting))
        uc.ctl(uc_.UC_CTL_TLB_FLUSH, uc_.UC_CTL_IO_WRITE)
        self.vector = None
        kind = setting.kind
        uc.emu_start((USER_CODE if setting.cpl else KERNEL_CODE) + CODE[kind][0], 0)
        entries = tuple(u64[slot] for slot, _ in zip(where, case.entries, strict=False))
        uc.context_update(self._scratch)
        error, cr2, rax = (field.value for field in self._fields)
        if self.vector == 14:
            expected = LA[setting.levels] + (0 if kind == FETCH else DATA)
            return Outcome(error, entries, "" if cr2 == expected else f"CR2 {cr2:#x}, not {expected:#x}")
        # HLT ends a case that did not fault: quietly at CPL0, by #GP at CPL3.
        wrong = "" if self.vector == (13 if setting.cpl else None) else f"vector {self.vector}"
        if kind == READ and rax != MARKER:
            wrong = f"read {rax:#x}, not the data at the frame"
        return Outcome(None, entries, wrong)
