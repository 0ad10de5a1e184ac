"""One Unicorn instance under our MMU: its soft TLB is only a cache of what `Mmu.fill` grants.

What Unicorn does not let anybody see is made visible here:
- privileged instructions: on the first fetch from a page its bytes are searched for their opcodes at every alignment, and each
  candidate gets a hook that stops the engine before the instruction (a candidate that is no instruction start never fires);
- what lies behind a page: the engine translates a block before it runs any of it, so a block that goes on into the next page asks
  for that page too early. When the page is refused, the block is run up to its last whole instruction first; when it has
  candidates, translation begins again with their hooks in place;
- code changes: no frame is ever executable and writable in the soft TLB at once, so the first store to a scanned page and the
  first fetch after a store come here (and a page filled with both rights would stay on a store path half as fast);
- privilege level and the never cleared exception state: see engine_context.py.
Source of the engine's behaviour: tests/characterisation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum, auto
from threading import Event

from unicorn import (
    UC_ARCH_X86,
    UC_CTL_IO_WRITE,
    UC_CTL_TLB_FLUSH,
    UC_ERR_EXCEPTION,
    UC_ERR_INSN_INVALID,
    UC_ERR_OK,
    UC_HOOK_CODE,
    UC_HOOK_INSN,
    UC_HOOK_INSN_INVALID,
    UC_HOOK_INTR,
    UC_HOOK_TLB_FILL,
    UC_MODE_64,
    UC_TLB_VIRTUAL,
    Uc,
    UcError,
)
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib
from unicorn.x86_const import UC_CPU_X86_ICELAKE_SERVER

from emu.decode import Undecodable, decode
from emu.engine_context import EngineError, discover
from emu.instruction_counter import InstructionCounter
from emu.memory import PAGE_SIZE, BusError, Memory, MmioRegion
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.registers import Cr0, Cr4
from emu.mmu.walk import walk
from emu.operands import fetch_boundary
from emu.privileged_opcodes import MAX_LENGTH, PORTS, PrivilegedInstruction, candidates, recognise
from emu.rflags import Rflags

# How long `stop` waits before it asks again: a request that falls between two runs of the engine is lost.
_ASK_AGAIN = 0.001
_WRITE_GRANT = 2
_EXEC_GRANT = 4
_PAGE_MASK = ~(PAGE_SIZE - 1)
_IOPL = int(Rflags.IOPL)
# Bits of CR4 that Unicorn itself must know: SSE, FS/GS base instructions, and SMAP for its split of soft TLBs by RFLAGS.AC.
_ENGINE_CR4 = Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.FSGSBASE | Cr4.SMAP | Cr4.TSD | Cr4.DE | Cr4.PAE

REGISTERS = {
    **{name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
        "rip", "rflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "cr0", "cr2", "cr4", "gdtr", "idtr", "tr",
        "ldtr", "mxcsr", *(f"xmm{n}" for n in range(16)), *(f"dr{n}" for n in (0, 1, 2, 3, 6, 7)),
    )},
}
_WIDE = frozenset(REGISTERS[f"xmm{n}"] for n in range(16))


class StopReason(Enum):
    """Why the engine came back."""

    HALT = auto()          # HLT was executed; RIP is behind it
    INTERCEPT = auto()     # before a privileged instruction
    INTERRUPT = auto()     # the instruction raised an exception or software interrupt: `vector`
    INVALID = auto()       # undefined opcode
    FAULT = auto()         # an access could not be translated: `fault`
    LIMIT = auto()         # the instruction limit
    ASKED = auto()         # somebody called `stop`
    STEPPED = auto()       # one instruction was executed, as asked


def _stops(code: bytes) -> PrivilegedInstruction | None:
    """The instruction that `code` starts with if it is the machine's to execute.

    Every page-fault handler reads CR2, and 16 us are a quarter of its time: the engine has the value and does that itself.
    """
    found = recognise(code)
    if found is not None and found.name == "mov_from_cr" and found.reg == 2 and 0xF0 not in found.prefixes:
        return None
    return found


class RegisterBatch:
    """64-bit registers of one engine, read or written by a single call: 1 us for five, 2 us for eighteen."""

    def __init__(self, handle: object, names: tuple[str, ...]) -> None:
        self._handle = handle
        self._count = len(names)
        self._numbers = (ctypes.c_int * self._count)(*(REGISTERS[name] for name in names))
        self._values = (ctypes.c_uint64 * self._count)()
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * self._count)(*(base + 8 * n for n in range(self._count)))
        self._read = uclib.uc_reg_read_batch
        self._write = uclib.uc_reg_write_batch

    def read(self) -> list[int]:
        """The values, in the order of the names."""
        # A selector is written as 16 bits.
        ctypes.memset(self._values, 0, 8 * self._count)
        self._read(self._handle, self._numbers, self._pointers, self._count)
        return self._values[:]

    def write(self, *values: int) -> None:
        """Set all of them, in the order of the names."""
        self._values[:] = list(values)
        self._write(self._handle, self._numbers, self._pointers, self._count)


class Engine:
    """A Unicorn CPU over `memory`, whose translations come from `mmu`.

    `limit` counts instructions exactly and bounds them (InstructionCounter); None runs at full speed without a bound.
    """

    tlb_mode = UC_TLB_VIRTUAL

    def __init__(self, memory: Memory, mmu: Mmu, *, limit: int | None = None) -> None:
        self.memory = memory
        self.mmu = mmu
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
        self.uc.ctl_set_tlb_mode(self.tlb_mode)
        self.uc.mem_map_ptr(0, memory.size, 7, memory.host_address)
        for region in memory.mmio:
            self._map_mmio(region)
        # Without this emu_start has an end address, and every run takes five times as long to prepare.
        self.uc.ctl_exits_enabled(True)
        self._layout = discover()
        # The binding's reg_read takes 1.7 us, the library's own function with a buffer kept for it 0.5 us, and a #PF needs twenty.
        self._handle = self.uc._uch
        self._reg_read = uclib.uc_reg_read
        self._reg_write = uclib.uc_reg_write
        self._emu_start = uclib.uc_emu_start
        self._emu_stop = uclib.uc_emu_stop
        self._word = ctypes.c_uint64()
        self._word_address = ctypes.byref(self._word)
        self.counter = None if limit is None else InstructionCounter(self.uc, limit)
        self.fault: PageFault | NonCanonical | BusError | None = None
        self.fault_access = Access.READ
        self.fault_page = 0
        self.vector = 0
        self._reason: StopReason | None = None
        # Where the last INTERCEPT stopped, and the bytes there.
        self.intercepted: tuple[int, bytes] | None = None
        self._running = False
        self._asked = False
        self._soft_tlb_stale = False
        self._code_stale = False
        self._translate_again = False
        # Pages this CPU may fetch from now, by linear address: what the soft TLB holds with the right to execute.
        self._fetched: dict[int, int] = {}
        self._hooked: set[int] = set()
        # The linear pages at which a frame of code was searched for candidates.
        self._scanned: dict[int, set[int]] = {}
        self._written: set[int] = set()
        # Pages that hold GDT, LDT, IDT or TSS: accesses to them may be implicit supervisor accesses (SDM vol. 3A 4.6.1).
        self.descriptor_pages: set[int] = set()
        self.is_implicit: Callable[[int], bool] = lambda page_la: False
        self._callback_error: Exception | None = None
        memory.on_code_write = self._on_code_write
        mmu.on_drop = self.drop_soft_tlb
        self._hook_translation()
        self.uc.hook_add(UC_HOOK_INTR, self._on_interrupt)
        self.uc.hook_add(UC_HOOK_INSN_INVALID, self._on_invalid)
        self.uc.hook_add(UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        self.uc.hook_add(UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)

    def _hook_translation(self) -> None:
        """Take over the translation of addresses, before any code has run."""
        self.uc.hook_add(UC_HOOK_TLB_FILL, self._make_fill())
        if self.mmu.tlb.mode == "none":
            self.uc.hook_add(UC_HOOK_CODE, self._on_every_instruction)

    def load_control_registers(self) -> None:
        """Tell Unicorn what it must know of the MMU's control registers; paging stays off there, since it is ours."""
        self.set_reg("cr0", self.mmu.cr0 & ~Cr0.PG)
        self.set_reg("cr4", self.mmu.cr4 & _ENGINE_CR4)

    def run(self, rip: int) -> StopReason:
        """Execute from `rip` until something needs the outside. The reason's data is in `fault`, `vector`, `counter`."""
        return self._execute(rip, step=False)

    def step(self, rip: int) -> StopReason:
        """Execute the instruction at `rip`: STEPPED, or what `run` would return of it. Ten times as slow as a run."""
        return self._execute(rip, step=True)

    def _execute(self, rip: int, *, step: bool) -> StopReason:
        if self._code_stale:
            self.uc.ctl_flush_tb()
            self._code_stale = False
        self._running = True
        try:
            if self._asked:
                self._asked = False
                return StopReason.ASKED
            is_halt = step and self._is_halt(rip)
            until: int | None = None
            while True:
                reason = self._run_until(rip, until, int(step))
                if self._translate_again:
                    rip = self.reg("rip")
                elif reason is StopReason.HALT and step and not is_halt:
                    return StopReason.STEPPED
                elif reason is StopReason.HALT and until is not None and self.reg("rip") == until:
                    rip, until = until, None
                elif reason is StopReason.FAULT and self.fault_access is Access.FETCH:
                    until = self._last_whole_instruction()
                    if until is None:
                        return reason
                    rip = self.reg("rip")
                else:
                    return reason
        finally:
            self._running = False

    def _run_until(self, rip: int, until: int | None, count: int) -> StopReason:
        if self._soft_tlb_stale:
            self._flush_soft_tlb()
        self._reason = None
        self.fault = None
        self.intercepted = None
        self._translate_again = False
        if until is not None:
            self.uc.ctl_set_exits([until])
        # What the binding's own emu_start does, but for an exception at every fault.
        self.uc._hook_exception = None
        status = self._emu_start(self._handle, rip, 0, 0, count)
        if until is not None:
            self.uc.ctl_set_exits([])
            self.uc.ctl_flush_tb()
        error = self._callback_error or self.uc._hook_exception
        if error is not None:
            self._callback_error = None
            raise error
        return self._classify(status)

    def _classify(self, status: int) -> StopReason:
        if self.counter is not None and self.counter.exhausted:
            return StopReason.LIMIT
        if self._reason is not None:
            return self._reason
        if status == UC_ERR_EXCEPTION and (self.fault is not None or self._translate_again):
            return StopReason.FAULT
        if status == UC_ERR_INSN_INVALID:
            return StopReason.INVALID
        if status != UC_ERR_OK:
            raise EngineError(f"Unicorn stopped at {self.reg('rip'):#x} with an error of its own: {UcError(status)}")
        if self._asked:
            self._asked = False
            return StopReason.ASKED
        return StopReason.HALT

    def _last_whole_instruction(self) -> int | None:
        """The end of the block at RIP that its page still holds, None when RIP itself is what cannot be fetched."""
        rip = self.reg("rip")
        if rip & _PAGE_MASK == self.fault_page:
            return None
        boundary = fetch_boundary(self.peek(rip, PAGE_SIZE - (rip & (PAGE_SIZE - 1))), rip)
        return None if boundary == rip else boundary

    def _is_halt(self, rip: int) -> bool:
        try:
            return decode(self.peek(rip, 15), rip).mnemonic == "hlt"
        except (Undecodable, PageFault, NonCanonical, BusError):
            return False

    def stop(self) -> None:
        """Stop a run from another thread, at an unspecified instruction; the next run when none is under way."""
        self._asked = True
        pause = Event()
        while self._running and self._asked:
            self.uc.emu_stop()
            pause.wait(_ASK_AGAIN)

    def take_request(self) -> bool:
        """Whether `stop` was called since it was last answered; this answers it."""
        asked, self._asked = self._asked, False
        return asked

    def reg(self, name: str) -> int:
        """A register by its lower-case name. Raises KeyError for an unknown one."""
        number = REGISTERS[name]
        if number in _WIDE:
            wide: int = self.uc.reg_read(number)
            return wide
        self._word.value = 0
        self._reg_read(self._handle, number, self._word_address)
        return self._word.value

    def set_reg(self, name: str, value: int) -> None:
        """Set a register by its lower-case name; CS changes the selector only (see set_cpl)."""
        number = REGISTERS[name]
        if number in _WIDE:
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

    def drop_soft_tlb(self) -> None:
        """Make every later access ask the MMU again."""
        self._fetched.clear()
        if self._running:
            self._flush_soft_tlb()
        else:
            self._soft_tlb_stale = True

    def _flush_soft_tlb(self) -> None:
        self._fetched.clear()
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
        self._soft_tlb_stale = False

    def _on_code_write(self, frame: int) -> None:
        """The model, not a CPU, changes the bytes of a frame that was executed."""
        self.memory.code_frames.discard(frame)
        self._scanned.pop(frame, None)
        self._code_stale = True
        self.drop_soft_tlb()

    def _make_fill(self) -> Callable[[Uc, int, int, object, object], bool]:
        """The soft TLB's fill callback: a closure, since attribute look-ups would be a tenth of its time."""
        mmu = self.mmu
        mmu_fill = mmu.fill
        code_frames = self.memory.code_frames
        written = self._written
        scanned = self._scanned
        fetch = int(Access.FETCH)
        descriptor_pages = self.descriptor_pages
        fetched = self._fetched

        def fill(uc: Uc, la: int, access: int, entry: object, _data: object) -> bool:
            try:
                if la in descriptor_pages and self.is_implicit(la):
                    grant = mmu.translate(la, Access(access), user=False, implicit=True) & _PAGE_MASK | 3
                else:
                    grant = mmu_fill(la, access, mmu.cpl == 3)
            except (PageFault, NonCanonical, BusError) as fault:
                self.fault = fault
                self.fault_access = Access(access)
                self.fault_page = la
                return False
            except Exception as error:
                self._callback_error = error
                return False
            frame = grant >> 12
            if access == fetch:
                if la not in scanned.get(frame, ()):
                    self._scan(la, frame)
                    if self.reg("rip") & _PAGE_MASK != la:
                        self._translate_again = True
                        return False
                fetched[la] = frame << 12
                grant &= ~_WRITE_GRANT
            elif grant & _WRITE_GRANT:
                if frame not in code_frames:
                    written.add(frame)
                elif access == 17:
                    code_frames.discard(frame)
                    scanned.pop(frame, None)
                    self._flush_soft_tlb()
                    written.add(frame)
                else:
                    grant &= ~_WRITE_GRANT
            entry.paddr = grant & _PAGE_MASK  # type: ignore[attr-defined]
            entry.perms = grant & 7  # type: ignore[attr-defined]
            return True

        return fill

    def _scan(self, la: int, frame: int) -> None:
        """Hook the candidates of a page that is about to be executed, and take back the rights to write its frame."""
        if frame in self._written:
            self._written.clear()
            self._flush_soft_tlb()
        self.memory.code_frames.add(frame)
        self._scanned.setdefault(frame, set()).add(la)
        if self._region_of(frame << 12) is not None:
            return
        page = self.memory.read(frame << 12, PAGE_SIZE)
        for offset in candidates(page):
            if offset <= PAGE_SIZE - MAX_LENGTH and not _stops(page[offset : offset + MAX_LENGTH]):
                continue
            address = la + offset
            if address not in self._hooked:
                self._hooked.add(address)
                self.uc.hook_add(UC_HOOK_CODE, self._on_candidate, begin=address, end=address)

    def _on_candidate(self, uc: Uc, la: int, size: int, _data: object) -> None:
        try:
            code = self.peek(la, MAX_LENGTH)
            instruction = _stops(code)
            if instruction is None or (instruction.name in PORTS and self._may_use_ports()):
                return
            self.intercepted = la, code
        except (PageFault, NonCanonical, BusError):
            self.intercepted = None  # it can no longer be fetched, which whoever executes the instruction finds out
        self._reason = StopReason.INTERCEPT
        self._emu_stop(self._handle)

    def _may_use_ports(self) -> bool:
        """CPL is not above IOPL (SDM vol. 1 19.5.1); else the I/O permission bitmap decides."""
        return not self.mmu.cpl or self.mmu.cpl <= (self.reg("rflags") & _IOPL) >> 12

    def peek(self, la: int, size: int) -> bytes:
        """Up to `size` bytes of code at `la` as this CPU would fetch them, without a change of state; at least one.

        Raises PageFault, NonCanonical or BusError when the first byte cannot be fetched.
        """
        offset = la & (PAGE_SIZE - 1)
        page = self._fetched.get(la - offset)
        if page is not None and offset + size <= PAGE_SIZE:
            return self.memory.read(page + offset, size)
        first = min(size, PAGE_SIZE - offset)
        code = self.memory.read(self._peek_fetch(la), first)
        if first < size:
            try:
                code += self.memory.read(self._peek_fetch(la + first & 0xFFFF_FFFF_FFFF_FFFF), size - first)
            except (PageFault, NonCanonical, BusError):
                return code
        return code

    def _peek_fetch(self, la: int) -> int:
        page = self._fetched.get(la & _PAGE_MASK)
        if page is not None:
            return page | la & (PAGE_SIZE - 1)
        mmu = self.mmu
        cached = mmu.query(la)
        if cached is not None:
            return cached.pa(la)
        return walk(self.memory, mmu.regs, la, Access.FETCH, mmu.cpl == 3, set_ad=False).pa

    def _on_interrupt(self, uc: Uc, vector: int, _data: object) -> None:
        self.vector = vector
        self._reason = StopReason.INTERRUPT
        uc.emu_stop()

    def _on_invalid(self, _uc: Uc, _data: object) -> bool:
        self._reason = StopReason.INVALID
        return False

    def _on_in(self, _uc: Uc, _port: int, size: int, _data: object) -> int:
        """No port answers: the bus floats high."""
        return (1 << 8 * size) - 1

    def _on_out(self, _uc: Uc, _port: int, _size: int, _value: int, _data: object) -> None:
        """No port listens."""

    def _on_every_instruction(self, _uc: Uc, _la: int, _size: int, _data: object) -> None:
        """Without a TLB every instruction asks anew."""
        self._flush_soft_tlb()

    def _region_of(self, pa: int) -> MmioRegion | None:
        for region in self.memory.mmio:
            if region.start <= pa < region.start + region.size:
                return region
        return None

    def _map_mmio(self, region: MmioRegion) -> None:
        if region.start < self.memory.size:
            self.uc.mem_unmap(region.start, region.size)
        self.uc.mmio_map(
            region.start, region.size,
            lambda _uc, offset, width, _data: region.read(offset, width), None,
            lambda _uc, offset, width, value, _data: region.write(offset, width, value), None,
        )
