"""One CPU: registers, the run loop, and what becomes of each reason for which the engine stops.

The engine (Unicorn) executes; everything that is privileged, faults, or needs the kernel model happens here, between two runs of
it, so that Python code may take its time and look at a machine that stands still.

What differs from a CPU:
- a branch to a non-canonical address raises its #GP with RIP at the target, not at the branch;
- #AC is never raised, whatever CR0.AM and RFLAGS.AC are, and breakpoints in DR0 to DR3 never match;
- there is no compatibility mode and there are no call gates: a far transfer to either is a #GP of its selector;
- loading a code segment does not set the accessed bit of its descriptor;
- BMI instructions are executed though CPUID does not announce them, and STAC and CLAC though SMAP may not be announced;
- an instruction that begins is counted each time it begins, one that faults and restarts and each element of a REP included,
  and so is the delivery of an exception.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from emu.decode import Undecodable, decode
from emu.descriptors import TableRegister
from emu.engine import Engine, StopReason
from emu.exceptions import CpuException, Source, Vector, deliver
from emu.memory import BusError, Memory
from emu.mmu.fault import Access, NonCanonical, PageFault, PfError
from emu.mmu.mmu import Mmu
from emu.mmu.registers import Features
from emu.mmu.tlb import Tlb
from emu.operands import MemoryAccess, accesses, fault
from emu.privileged import execute, load_task_register
from emu.rflags import Rflags

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_AC, _IF = int(Rflags.AC), int(Rflags.IF)
_INT1, _STI = b"\xf1", b"\xfb"
_PF_WRITE = int(PfError.W)
# Registers that stand in the engine only, the ones asked for most.
_IN_ENGINE = frozenset((
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rflags", "cs", "ss",
))

# Stops that end in the delivery of an exception.
# Deliveries without an instruction between them after which none is expected any more: five megabytes of frames on one stack.
BARREN_DELIVERIES = 100_000
_FAULT, _INTERRUPT, _INVALID = StopReason.FAULT, StopReason.INTERRUPT, StopReason.INVALID


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """The CPU executed the HLT of a stub at `la`: the kernel model's turn."""

    la: int


@dataclass(frozen=True, slots=True)
class Halted:
    """HLT with nothing that could wake the CPU; `interrupts` tells whether RFLAGS.IF was set."""

    rip: int
    interrupts: bool


@dataclass(frozen=True, slots=True)
class LimitReached:
    """The instruction limit came before the end."""

    rip: int


@dataclass(frozen=True, slots=True)
class Livelock:
    """Exceptions are delivered one after the other, and no handler can be fetched: a CPU would do so for ever."""

    rip: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody stopped the engine from outside."""


@dataclass(frozen=True, slots=True)
class TurnOver:
    """The CPU has executed what it was given, or `paused`: it executed PAUSE where that ends a turn."""

    paused: bool


CpuStop = KernelEntry | Halted | LimitReached | Livelock | Interrupted | TurnOver
_CONTEXT = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rflags",
    "fs_base",
)


class Cpu:
    """A CPU of a machine.

    `is_stub(la)`: whether an HLT at `la` calls the kernel model. `limit` bounds the instructions exactly (see Engine). `engine` is
    the kind of engine to run on.
    """

    def __init__(
        self, number: int, memory: Memory, *, features: Features, levels: int = 4, tlb: Tlb | None = None,
        is_stub: Callable[[int], bool] = lambda la: False, limit: int | None = None, engine: type[Engine] = Engine,
    ) -> None:
        self.id = number
        self.memory = memory
        self.features = features
        self.mmu = Mmu(memory, tlb if tlb is not None else Tlb(), features, levels)
        self.engine = engine(memory, self.mmu, limit=limit)
        self.engine.is_implicit = self._is_implicit
        self.mmu.read_ac = self.read_ac
        self.is_stub = is_stub
        self.gdtr = self.idtr = self.ldtr = self.tss = TableRegister(0, 0)
        self.tr = 0
        self.ldt_selector = 0
        self._cr2 = 0
        self.cr8 = 0
        self.tsc = 0
        self.msrs: dict[int, int] = {}
        self.nmi_blocked = False
        self._nmi_pending = False
        self._interrupts: deque[int] = deque()
        self._interrupt_shadow = False
        self._barren = 0
        self._left_at_delivery = -1
        self._rip: int | None = None
        # What a delivery pushes and sets, and what IRET sets.
        self.pushed = self.engine.batch("cs", "rflags", "rsp", "ss")
        self._context = self.engine.batch(*_CONTEXT)
        # Told of each exception and interrupt before it is delivered, and again once its handler has been entered.
        self.on_delivery: Callable[[CpuException], None] = lambda exception: None
        self.on_entry: Callable[[CpuException], None] = lambda exception: None
        self.sync_engine_registers()

    # ---- registers

    @property
    def rip(self) -> int:
        """Instruction pointer."""
        if self._rip is None:
            self._rip = self.engine.reg("rip")
        return self._rip

    @rip.setter
    def rip(self, value: int) -> None:
        self._rip = value

    @property
    def cr2(self) -> int:
        """Address of the last page fault that was delivered; the engine reads it there by itself."""
        return self._cr2

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._cr2 = value
        self.engine.set_reg("cr2", value)

    def reg(self, name: str) -> int:
        """A register by lower-case name (see emu/kernel/kernel_cpu.py). Raises KeyError."""
        if name in _IN_ENGINE:
            return self.engine.reg(name)
        if name == "rip":
            return self.rip
        if name == "cr2":
            return self.cr2
        if name in ("cr0", "cr3", "cr4", "efer", "pkru", "cpl"):
            value: int = getattr(self.mmu, name)
            return value
        if name == "kernel_gs_base":
            return self.engine.msr(0xC000_0102)
        return self.engine.reg(name)

    def set_reg(self, name: str, value: int) -> None:
        """Set a register. Control registers take effect as a MOV would; raises GeneralProtection for what a CPU refuses."""
        if name in _IN_ENGINE:
            self.engine.set_reg(name, value)
        elif name == "rip":
            self._rip = value
        elif name == "cr2":
            self.cr2 = value
        elif name in ("cr0", "cr3", "cr4", "efer", "pkru"):
            getattr(self.mmu, f"load_{name}")(value)
            self.sync_engine_registers()
        elif name == "kernel_gs_base":
            self.engine.set_msr(0xC000_0102, value)
        else:
            self.engine.set_reg(name, value)

    def save_context(self) -> list[int]:
        """What a thread keeps while another one has the CPU: RIP first, then general registers, RFLAGS and FS base."""
        return [self.rip, *self._context.read()]

    def load_context(self, context: list[int]) -> None:
        """Go on where `save_context` was called."""
        self._rip = context[0]
        self._context.write(*context[1:])

    def make_context(self, **registers: int) -> list[int]:
        """A context of these registers, all others zero. Raises KeyError for a register that is not part of one."""
        values = dict.fromkeys(("rip", *_CONTEXT), 0)
        for name in registers:
            values[name]  # an unknown name must not be added
        values.update(registers)
        return list(values.values())

    def context_registers(self, context: list[int]) -> dict[str, int]:
        """The registers of a context by name."""
        return dict(zip(("rip", *_CONTEXT), context, strict=True))

    def invlpg(self, la: int) -> None:
        """Execute INVLPG."""
        self.mmu.invlpg(la)

    def invpcid(self, kind: int, pcid: int, la: int) -> None:
        """Execute INVPCID. Raises GeneralProtection."""
        self.mmu.invpcid(kind, pcid, la)

    def read_ac(self) -> bool:
        """RFLAGS.AC."""
        return bool(self.engine.reg("rflags") & _AC)

    def sync_engine_registers(self) -> None:
        """Tell the engine what it must know of the control registers."""
        self.engine.load_control_registers()

    def enter_privilege(self, cpl: int, cs: int, *, new_stack: bool) -> None:
        """Take a code segment and privilege level; a change to an inner level loads a null SS (SDM vol. 3A 6.14.2)."""
        self.engine.set_reg("cs", cs)
        if new_stack:
            self.engine.set_reg("ss", cpl)
        if cpl != self.mmu.cpl:
            self.engine.set_cpl(cpl)

    def load_tables(self) -> None:
        """Give GDTR, IDTR, LDTR and TR to the engine, and remember which pages they lie in."""
        engine = self.engine
        engine.set_table_register("gdtr", self.gdtr.base, self.gdtr.limit)
        engine.set_table_register("idtr", self.idtr.base, self.idtr.limit)
        engine.set_table_register("ldtr", self.ldtr.base, self.ldtr.limit, self.ldt_selector)
        engine.set_table_register("tr", self.tss.base, self.tss.limit, self.tr)
        engine.descriptor_pages.clear()
        for table in (self.gdtr, self.idtr, self.ldtr, self.tss):
            if table.limit:
                engine.descriptor_pages.update(range(table.base & ~0xFFF, table.base + table.limit + 1, 0x1000))
        engine.drop_soft_tlb()

    # ---- memory, as kernel code at privilege level 0 sees it

    def read(self, la: int, size: int) -> bytes:
        """Supervisor data read through this CPU's TLB. Raises PageFault, NonCanonical, BusError."""
        return self.mmu.read(la, size, user=False, ac=self.read_ac())

    def write(self, la: int, data: bytes) -> None:
        """Supervisor data write through this CPU's TLB. Raises PageFault, NonCanonical, BusError."""
        self.mmu.write(la, data, user=False, ac=self.read_ac())

    # ---- events from outside

    def raise_interrupt(self, vector: int) -> None:
        """Make an external interrupt pending; it is taken when RFLAGS.IF allows. Raises ValueError below vector 32."""
        if not 32 <= vector <= 255:
            raise ValueError(f"external interrupt vector is {vector}; it must be 32 to 255")
        self._interrupts.append(vector)

    def raise_nmi(self) -> None:
        """Make an NMI pending; it is taken once no other NMI is being handled. One more is remembered, as in hardware."""
        self._nmi_pending = True

    def _take_pending(self) -> bool:
        shadow, self._interrupt_shadow = self._interrupt_shadow, False
        if shadow:
            return False
        if self._nmi_pending and not self.nmi_blocked:
            self._nmi_pending = False
            deliver(self, CpuException(Vector.NMI), Source.EXTERNAL)
            return True
        if self._interrupts and self.engine.reg("rflags") & _IF:
            deliver(self, CpuException(self._interrupts.popleft()), Source.EXTERNAL)
            return True
        return False

    @property
    def interruptible(self) -> bool:
        """An interrupt or NMI is pending that the CPU would take now."""
        if self._nmi_pending and not self.nmi_blocked:
            return True
        return bool(self._interrupts) and bool(self.engine.reg("rflags") & _IF)

    @property
    def pending_interrupts(self) -> tuple[int, ...]:
        """Vectors of the external interrupts that wait, in the order in which they will be taken."""
        return tuple(self._interrupts)

    def raise_exception(self, exception: CpuException) -> None:
        """Deliver an exception at the current RIP. Raises TripleFault."""
        deliver(self, exception)

    def load_task_register(self, selector: int) -> None:
        """What LTR does: take the TSS that the GDT names, and mark it busy. Raises CpuException."""
        load_task_register(self, selector)

    # ---- execution

    def run(self, budget: int | None = None) -> CpuStop:
        """Execute until the kernel model is called or nothing can go on; at most `budget` instructions on a CPU that counts them.

        Raises TripleFault, BusError.
        """
        counter = self.engine.counter
        end = None if budget is None or counter is None else counter.left - budget
        while True:
            left = None
            if end is not None and counter is not None:
                left = counter.left - end
                if left <= 0 and not counter.exhausted:
                    return TurnOver(False)
            step = False
            if self._interrupts or self._nmi_pending:
                # What waits for IF is taken as soon as the program sets it: until then, one instruction at a time.
                step = not self._take_pending() and bool(self._interrupts)
                if step:
                    self._interrupt_shadow = self._casts_shadow()
            if step:
                reason = self.engine.step(self.rip)
            else:
                reason = self.engine.run(self.rip) if left is None else self.engine.run(self.rip, left)
            self._rip = None
            stop = self._handle(reason)
            if stop is None and (reason is _FAULT or reason is _INTERRUPT or reason is _INVALID):
                stop = self._charge_delivery()
            if stop is not None:
                return stop

    def _charge_delivery(self) -> CpuStop | None:
        """Count a delivery, and see whether any instruction was executed since the last one."""
        counter = self.engine.counter
        if counter is None:
            return Interrupted() if self.engine.take_request() else None
        self._barren = self._barren + 1 if counter.left == self._left_at_delivery else 0
        counter.charge_delivery()
        self._left_at_delivery = counter.left
        if self._barren >= BARREN_DELIVERIES:
            return Livelock(self.rip)
        return LimitReached(self.rip) if counter.exhausted else None

    def _casts_shadow(self) -> bool:
        """Whether the next instruction is an STI that will set IF: it holds interrupts back for one more (SDM vol. 2B, STI)."""
        return self._peek_byte() == _STI and not self.engine.reg("rflags") & _IF

    def _peek_byte(self) -> bytes:
        try:
            return self.engine.peek(self.rip, 1)
        except (PageFault, NonCanonical, BusError):
            return b""

    def _handle(self, reason: StopReason) -> CpuStop | None:
        match reason:
            case StopReason.HALT:
                return self._halt()
            case StopReason.FAULT:
                deliver(self, self._translation_fault())
            case StopReason.INTERCEPT:
                self._intercepted()
            case StopReason.INTERRUPT:
                self._engine_exception()
            case StopReason.INVALID:
                self._invalid()
            case StopReason.LIMIT:
                return LimitReached(self.rip)
            case StopReason.ASKED:
                return self._asked()
            case StopReason.STEPPED:
                pass
            case StopReason.BUDGET:
                return TurnOver(False)
            case StopReason.PAUSE:
                return TurnOver(True)
        return None

    def _asked(self) -> CpuStop:
        """The engine was stopped from outside; if it stopped in the HLT of a stub, the stub's call is not lost."""
        la = self.rip - 1 & _MASK64
        return KernelEntry(la) if self.is_stub(la) else Interrupted()

    def _invalid(self) -> None:
        self.engine.forget_exception()
        if self._peek_byte() == _INT1:
            self.rip += 1
            deliver(self, CpuException(Vector.DB))
        else:
            deliver(self, CpuException(Vector.UD))

    def _halt(self) -> CpuStop | None:
        la = self.rip - 1 & _MASK64
        if self.is_stub(la):
            return KernelEntry(la)
        if (self._interrupts or self._nmi_pending) and self._take_pending():
            return None
        return Halted(la, bool(self.reg("rflags") & Rflags.IF))

    def _intercepted(self) -> None:
        try:
            execute(self)
        except CpuException as exception:
            deliver(self, exception)
        except PageFault as error:
            deliver(self, CpuException(Vector.PF, error.error, error.la))

    def _engine_exception(self) -> None:
        vector = self.engine.vector
        error = self.engine.error_code if vector in (Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.AC) else None
        self.engine.forget_exception()
        if vector == Vector.BP:  # INT3, one byte long: RIP is behind it
            deliver(self, CpuException(vector), Source.SOFTWARE, self.rip - 1 & _MASK64)
        else:
            deliver(self, CpuException(vector, error))

    def memory_accesses(self, rip: int, registers: Mapping[str, int] | None = None) -> tuple[MemoryAccess, ...]:
        """The memory accesses of the instruction at `rip`, with the registers of now unless others are given.

        None if it cannot be fetched or decoded.
        """
        reg = self.reg if registers is None else registers.__getitem__
        try:
            return accesses(decode(self.engine.peek(rip, 15), rip), rip, reg)
        except (Undecodable, PageFault, NonCanonical, BusError):
            return ()

    def _translation_fault(self) -> CpuException:
        """The exception of the access that the engine could not make: CR2 and error code to the bit."""
        engine = self.engine
        failed = engine.fault
        assert failed is not None
        if isinstance(failed, BusError):
            raise failed
        rip = self.rip
        is_fetch = engine.fault_access is Access.FETCH
        where = fault(() if is_fetch else self.memory_accesses(rip), rip, engine.fault_page, engine.fault_access)
        if isinstance(failed, NonCanonical):
            return CpuException(Vector.SS if where.stack else Vector.GP, 0)
        error = failed.error
        if where.write and not is_fetch:
            error |= _PF_WRITE
        return CpuException(Vector.PF, error, where.cr2)

    def _is_implicit(self, page_la: int) -> bool:
        """True when the access under way to a page of descriptor tables is the CPU's own, not the program's."""
        rip = self.engine.reg("rip")
        explicit = [a for a in self.memory_accesses(rip) if not a.implicit]
        return not any((a.la & ~0xFFF) <= page_la <= (a.la + a.size - 1 & ~0xFFF) for a in explicit)
