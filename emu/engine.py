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

from collections.abc import Callable
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

from emu.block_counter import Block, BlockCounter, length
from emu.code_pages import CodePages
from emu.code_reader import CodeReader
from emu.decode import Undecodable, decode
from emu.engine_context import EngineError
from emu.instruction_counter import Allowance, InstructionCounter
from emu.interception import behind_pause, stop_offsets, stops
from emu.memory import PAGE_SIZE, BusError, Memory, MmioRegion
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.registers import Cr0, Cr4
from emu.mmu.table_frames import TableFrames
from emu.operands import fetch_boundary
from emu.privileged_opcodes import MAX_LENGTH, PORTS
from emu.rflags import Rflags
from emu.stop_reason import INSIDE, StopReason

__all__ = ["Engine", "StopReason"]

# How long `stop` waits before it asks again: a request that falls between two runs of the engine is lost.
_ASK_AGAIN = 0.001
_WRITE_GRANT = 2
_EXEC_GRANT = 4
_PAGE_MASK = ~(PAGE_SIZE - 1)
_IOPL = int(Rflags.IOPL)
# Bits of CR4 that Unicorn itself must know: SSE, FS/GS base instructions, and SMAP for its split of soft TLBs by RFLAGS.AC.
_ENGINE_CR4 = Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.FSGSBASE | Cr4.SMAP | Cr4.TSD | Cr4.DE | Cr4.PAE


class Engine(CodeReader):
    """A Unicorn CPU over `memory`, whose translations come from `mmu`.

    `limit` counts instructions exactly and bounds them (InstructionCounter); None runs at full speed without a bound.
    """

    tlb_mode = UC_TLB_VIRTUAL

    def __init__(self, memory: Memory, mmu: Mmu, *, limit: int | None = None) -> None:
        super().__init__(Uc(UC_ARCH_X86, UC_MODE_64), memory, mmu)
        self.uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
        self.uc.ctl_set_tlb_mode(self.tlb_mode)
        self.uc.mem_map_ptr(0, memory.size, 7, memory.host_address)
        for region in memory.mmio:
            self._map_mmio(region)
        # Without this emu_start has an end address, and every run takes five times as long to prepare.
        self.uc.ctl_exits_enabled(True)
        self._emu_start = uclib.uc_emu_start
        self._emu_stop = uclib.uc_emu_stop
        self._blocks: BlockCounter | None = None
        self.counter: Allowance | None = None if limit is None else self._make_counter(limit)
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
        # The frame of code that an instruction was stopped at storing to, and those that it may store to now.
        self._store_alone: int | None = None
        self._storable: set[int] = set()
        # Stores to frames of page tables are told: frame, its bytes before and after; here, what they were before those under way.
        self.tables: TableFrames | None = None
        self.on_table_store: Callable[[int, bytes, bytes], None] = lambda frame, before, after: None
        self._table_stores: dict[int, bytes] = {}
        self._refused: Block | None = None
        self._behind_pause = 0
        # Whether PAUSE ends a run. It must be set before any code is translated.
        self.pause_yields = False
        self._hooked: set[int] = set()
        self._code = CodePages(memory, self.drop_soft_tlb, self._drop_code)
        # Pages that hold GDT, LDT, IDT or TSS: accesses to them may be implicit supervisor accesses (SDM vol. 3A 4.6.1).
        self.descriptor_pages: set[int] = set()
        self.is_implicit: Callable[[int], bool] = lambda page_la: False
        self._callback_error: Exception | None = None
        # Told of each stop of Unicorn, the ones that nobody outside sees included, while RIP and the registers are the engine's.
        self.on_stop: Callable[[StopReason], None] | None = None
        # Makes a function translate in place of the MMU.
        self.fill_by: Callable[[Callable[[int, int, bool], int]], None] = lambda look_up: None
        mmu.on_drop = self.drop_soft_tlb
        self._hook_translation()
        self.uc.hook_add(UC_HOOK_INTR, self._on_interrupt)
        self.uc.hook_add(UC_HOOK_INSN_INVALID, self._on_invalid)
        self.uc.hook_add(UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        self.uc.hook_add(UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)

    def _make_counter(self, limit: int) -> Allowance:
        if not BlockCounter.available():
            return InstructionCounter(self.uc, limit)
        self._blocks = BlockCounter(self.uc, limit, self.peek, self.fail)
        return self._blocks

    def fail(self, error: Exception) -> None:
        """An error in a callback: the run raises it."""
        self._callback_error = error

    @property
    def block_counter(self) -> BlockCounter | None:
        """What counts by blocks, if blocks can be counted."""
        return self._blocks

    @property
    def running(self) -> bool:
        """Inside a run: registers are the engine's, not those of the last stop."""
        return self._running

    @property
    def begins_anew(self) -> bool:
        """The last stop was before a store that the instruction at RIP will make when it is run again, as a block of its own."""
        return self._store_alone is not None

    def close(self) -> None:
        """Let go of the memory: other engines' stores no longer concern this one, which must not run again."""
        self._code.close()

    def _hook_translation(self) -> None:
        """Take over the translation of addresses, before any code has run."""
        self.uc.hook_add(UC_HOOK_TLB_FILL, self._make_fill())
        if self.mmu.tlb.mode == "none":
            self.uc.hook_add(UC_HOOK_CODE, self._on_every_instruction)

    def load_control_registers(self) -> None:
        """Tell Unicorn what it must know of the MMU's control registers; paging stays off there, since it is ours."""
        self.set_reg("cr0", self.mmu.cr0 & ~Cr0.PG)
        self.set_reg("cr4", self.mmu.cr4 & _ENGINE_CR4)

    def run(self, rip: int, budget: int | None = None, *, exact: bool = True) -> StopReason:
        """Execute from `rip` until something needs the outside. The reason's data is in `fault`, `vector`, `counter`.

        An engine with a limit executes at most `budget` instructions and then returns BUDGET. That costs nothing at the end of a
        block of instructions and 25 us inside one. Without `exact` it may stop at the start of the block that would pass the
        budget, which is as reproducible, but not the same where blocks cannot be counted. Raises ValueError for a budget without
        a limit.
        """
        if budget is not None and self.counter is None:
            raise ValueError("an engine without an instruction limit does not count: it cannot keep a budget")
        return self._execute(rip, budget, step=False, exact=exact)

    def step(self, rip: int) -> StopReason:
        """Execute the instruction at `rip`: STEPPED, or what `run` would return of it. Ten times as slow as a run."""
        return self._execute(rip, 1, step=True, exact=True)

    def _execute(self, rip: int, budget: int | None, *, step: bool, exact: bool) -> StopReason:
        if self._code_stale:
            self.uc.ctl_flush_tb()
            self._code_stale = False
        self._running = True
        try:
            if self._asked:
                self.take_request()
                self.set_reg("rip", rip)
                return StopReason.ASKED
            if self.counter is None:
                return self._execute_until_stopped(rip, step=step, exact=exact)
            if self.counter.allow(budget) <= 0:
                self.set_reg("rip", rip)
            else:
                reason = self._execute_until_stopped(rip, step=step, exact=exact)
                if reason is not StopReason.BUDGET:
                    return reason
                if step:
                    return StopReason.STEPPED
            if self.counter.left > 0:
                return StopReason.BUDGET
            self.counter.exhaust()
            return StopReason.LIMIT
        finally:
            self._running = False

    def _execute_until_stopped(self, rip: int, *, step: bool, exact: bool) -> StopReason:
        """BUDGET means that no instruction past what the counter allows was executed; the caller tells whose bound it was."""
        counter = self.counter
        granted = 0 if counter is None else counter.allowed
        # An engine without a counter is made to stop behind one instruction, as it stops behind HLT.
        single = step and counter is None
        is_halt = single and self._is_halt(rip)
        until: int | None = None
        while True:
            reason = self._run_until(rip, until, int(single))
            if self._translate_again:
                rip = self.reg("rip")
            elif self._store_alone is not None:
                rip, until = self._begin_store(self._store_alone)
            elif reason is StopReason.BUDGET and counter is not None:
                block, left = self._refused, counter.allowed
                if self._blocks is None or block is None or not left or (not exact and left != granted):
                    return reason
                rip, until = block.start, self._blocks.address(block, left)
            elif reason is StopReason.HALT and single and not is_halt:
                return StopReason.STEPPED
            elif reason is StopReason.HALT and until is not None and self.reg("rip") == until:
                if counter is not None and not counter.allowed:
                    return StopReason.BUDGET
                rip, until = until, None
            elif reason is StopReason.FAULT and self.fault_access is Access.FETCH:
                until = self._last_whole_instruction()
                if until is None:
                    return reason
                rip = self.reg("rip")
            else:
                return reason

    def _begin_store(self, frame: int) -> tuple[int, int]:
        """Where an instruction that stores to a frame of code or of page tables begins and ends: it will be a block of its own.

        Only the first store to a page is seen by Unicorn, which drops the translations that this one store changes, and begins the
        block that runs again if it is among them. So all of the frame's are dropped, and none is running.
        """
        if self.tables is not None and self.tables.is_table_frame(frame):
            self._table_stores[frame] = self.memory.read(frame << 12, PAGE_SIZE)
        if frame in self.memory.code_frames:
            for page in self._code.scanned.get(frame, ()):
                if self._code.executed.get(page) == frame and self._may_look_up(page):
                    self.uc.ctl_remove_cache(page, page + PAGE_SIZE)
                    break
            else:
                self.uc.ctl_flush_tb()
        if self.counter is not None:
            self.counter.give_back()
        rip = self.reg("rip")
        return rip, rip + length(self.peek(rip, MAX_LENGTH))

    def _run_until(self, rip: int, until: int | None, count: int) -> StopReason:
        if self._soft_tlb_stale:
            self._flush_soft_tlb()
        self._reason = None
        self.fault = None
        self.intercepted = None
        self._translate_again = False
        self._store_alone = None
        if until is not None:
            self._cut(rip, until, end=True)
        # What the binding's own emu_start does, but for an exception at every fault.
        self.uc._hook_exception = None
        status = self._emu_start(self._handle, rip, 0, 0, count)
        if self._store_alone is None:
            self._storable.clear()
            if self._table_stores:
                self._tell_table_stores()
        if until is not None:
            self._cut(rip, until, end=False)
        error = self._callback_error or self.uc._hook_exception
        if error is not None:
            self._callback_error = None
            raise error
        reason = self._refusal() or self._classify(status)
        if self._blocks is not None and reason in INSIDE and not (
            reason is StopReason.FAULT and self.fault_access is Access.FETCH
        ):
            self._blocks.settle(self.reg("rip"))
        if self.on_stop is not None:
            self.on_stop(reason)
        if reason is StopReason.PAUSE:
            self.set_reg("rip", self._behind_pause)
        return reason

    def _tell_table_stores(self) -> None:
        """The instruction that stores to page tables is done: take back its right to, and tell what it changed."""
        self._flush_soft_tlb()
        stores, self._table_stores = self._table_stores, {}
        for frame, before in stores.items():
            self.on_table_store(frame, before, self.memory.read(frame << 12, PAGE_SIZE))

    def _cut(self, rip: int, until: int, *, end: bool) -> None:
        """Let the block at `rip` end before `until`, or at its natural end again."""
        self.uc.ctl_set_exits([until] if end else [])
        if self._blocks is not None:
            self._blocks.exit = until if end else None
        # If the block ends there by itself, the next one is the end.
        self._forget_block(rip)
        self._forget_block(until)

    def _forget_block(self, la: int) -> None:
        if self._may_look_up(la):
            self.uc.ctl_remove_cache(la, la + 1)
        else:
            self.uc.ctl_flush_tb()

    def _may_look_up(self, la: int) -> bool:
        """Whether the library may be asked for its translations at `la`: it looks the page up as a fetch, and bears no refusal."""
        return la & _PAGE_MASK in self._fetched and not self._soft_tlb_stale and self.mmu.query(la) is not None

    def _refusal(self) -> StopReason | None:
        """Whether the counter stopped the engine, and if so on whose behalf."""
        if self._blocks is None:
            counter = self.counter
            return StopReason.BUDGET if isinstance(counter, InstructionCounter) and counter.take_refused() else None
        self._refused = self._blocks.take_refused()
        if self._refused is None:
            return None
        return StopReason.ASKED if self.take_request() else StopReason.BUDGET

    def _classify(self, status: int) -> StopReason:
        if self._reason is not None:
            return self._reason
        if status == UC_ERR_EXCEPTION and (self.fault is not None or self._translate_again or self._store_alone is not None):
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
        if self._blocks is not None:
            self._blocks.ask()
            return
        pause = Event()
        while self._running and self._asked:
            self.uc.emu_stop()
            pause.wait(_ASK_AGAIN)

    def take_request(self) -> bool:
        """Whether `stop` was called since it was last answered; this answers it."""
        asked, self._asked = self._asked, False
        if self._blocks is not None:
            self._blocks.answer()
        return asked

    def translate(self, la: int, frame: int) -> tuple[int, int]:
        """Have the block at `la` translated, which `fill_by`'s function lets be fetched; its instructions and bytes."""
        if la & _PAGE_MASK not in self._code.scanned.get(frame, ()):
            self._scan(la & _PAGE_MASK, frame)
        _, count, size = self.uc.ctl_request_cache(la)
        return count, size

    def drop_soft_tlb(self) -> None:
        """Make every later access ask the MMU again."""
        self._fetched.clear()
        if self._running:
            self._flush_soft_tlb()
        else:
            self._soft_tlb_stale = True

    def _flush_soft_tlb(self) -> None:
        self._fetched.clear()
        self._code.written.clear()
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
        self._soft_tlb_stale = False

    def _drop_code(self) -> None:
        """Somebody else changes the bytes of a frame that was executed here."""
        self._code_stale = True
        if self._blocks is not None:
            self._blocks.forget()
        self.drop_soft_tlb()

    def _make_fill(self) -> Callable[[Uc, int, int, object, object], bool]:
        """The soft TLB's fill callback: a closure, since attribute look-ups would be a tenth of its time."""
        mmu = self.mmu
        mmu_fill: Callable[[int, int, bool], int] = mmu.fill
        code_frames = self.memory.code_frames
        code = self._code
        written = code.written
        scanned = code.scanned
        executed = code.executed
        fetch = int(Access.FETCH)
        descriptor_pages = self.descriptor_pages
        fetched = self._fetched

        def fill_by(look_up: Callable[[int, int, bool], int]) -> None:
            nonlocal mmu_fill
            mmu_fill = look_up

        self.fill_by = fill_by
        storable = self._storable
        blocks = self._blocks

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
                        self.fault_access = Access.FETCH
                        return False
                if executed.get(la) != frame:
                    if blocks is not None and la in executed:
                        blocks.forget()
                    executed[la] = frame
                fetched[la] = frame << 12
                grant &= ~_WRITE_GRANT
            elif grant & _WRITE_GRANT:
                tables = self.tables
                is_table = tables is not None and frame in tables.frames and tables.is_table_frame(frame)
                if frame not in code_frames and not is_table:
                    written.add(frame)
                elif access == 17:
                    if frame not in storable:
                        storable.add(frame)
                        self._store_alone = frame
                        self.fault_access = Access.WRITE
                        return False
                    if frame in code_frames:
                        if blocks is not None:
                            blocks.forget()
                        code.begin_write(frame)
                else:
                    grant &= ~_WRITE_GRANT
            entry.paddr = grant & _PAGE_MASK  # type: ignore[attr-defined]
            entry.perms = grant & 7  # type: ignore[attr-defined]
            return True

        return fill

    def _scan(self, la: int, frame: int) -> None:
        """Hook the candidates of a page that is about to be executed, and take back the rights to write its frame."""
        self._code.begin_fetch(la, frame)
        if self._region_of(frame << 12) is not None:
            return
        page = self.memory.read(frame << 12, PAGE_SIZE)
        for offset in stop_offsets(page, pause=self.pause_yields):
            self._hook(la + offset)

    def _hook(self, address: int) -> None:
        if address not in self._hooked:
            self._hooked.add(address)
            self.uc.hook_add(UC_HOOK_CODE, self._on_candidate, begin=address, end=address)

    def _on_candidate(self, uc: Uc, la: int, size: int, _data: object) -> None:
        try:
            code = self.peek(la, MAX_LENGTH)
            pause = behind_pause(code) if self.pause_yields else None
            if pause is not None:
                self._behind_pause = la + pause
                self._reason = StopReason.PAUSE
                self._emu_stop(self._handle)
                return
            instruction = stops(code)
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

    def _map_mmio(self, region: MmioRegion) -> None:
        if region.start < self.memory.size:
            self.uc.mem_unmap(region.start, region.size)
        self.uc.mmio_map(
            region.start, region.size,
            lambda _uc, offset, width, _data: region.read(offset, width), None,
            lambda _uc, offset, width, value, _data: region.write(offset, width, value), None,
        )
