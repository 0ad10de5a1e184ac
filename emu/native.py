"""Native mode: the same machine on Unicorn's own page-table walker and TLB (UC_TLB_CPU), for speed and as an oracle.

What it is. Memory, kernel model, delivery of exceptions, privileged instructions and hypercalls are those of every machine; only
the translation of the program's own accesses differs. CR0, CR3, CR4, EFER and PKRU are given to Unicorn with paging on; its walker
reads the guest's tables in RAM, sets A and D there, raises #PF and #GP itself, and its TLB keeps what it walked. A miss costs a
tenth of a fill callback. Every #PF is walked again by emu/mmu, and where the two differ in an error code `disagreements` says so.

What keeps it the same machine:
- Privileged instructions are executed by emu/privileged.py here too. Unicorn reports each block that it translates
  (UC_HOOK_EDGE_GENERATED, before the block runs); one that holds such an instruction is thrown away, hooked and translated again.
  So CPL never changes unseen, CR3 is never written unseen, and INVPCID, PCIDs, CPUID, RDTSC are ours.
- A read-modify-write asks Unicorn for a read first: W in the error code and CR2 come from emu/operands.py, as in the other mode.
- A fault's exception state is taken from the saved context and cleared, so that the next one is not taken for a #DF.
- A translated block makes its frames slow to write (Unicorn looks there for code to throw away), and the TLB is flushed with every
  new block, since entries that allow a fast store through another address of the frame may be left.

What it is not:
- Staleness is that of Unicorn's TLB: 256 direct-mapped entries that grow and shrink by the host's clock, flushed whole by INVLPG,
  INVPCID, every MOV CR3 and every new block. An entry that a kernel forgot to flush may or may not be used. TLB modes, PCIDs that
  keep their entries, global pages that outlive CR3, the paging-structure caches, TLB counters and queries exist in the other mode.
- Accesses of the kernel model and of exception delivery go through the `infinite` TLB of emu/mmu, which the program's accesses do
  not fill: the two TLBs hear of the same invalidations, but what one still holds the other may not.
- Accesses are not visible: no trace of translations can be made, and what descriptor loads read at CPL 0 with RFLAGS.AC set is
  not refused by SMAP (Unicorn takes them for explicit ones: tools/permissions.py lists this difference from the SDM 4.6.1).
- A in a 1G leaf that refuses the access is set (tools/permissions.py, too).
- A page table outside RAM is a bus error only where the walk ends in a #PF; a fetch from a block whose page was taken away without
  a flush is decoded by a fresh walk, so a privileged instruction there may run unseen.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from unicorn import (
    UC_ARCH_X86,
    UC_CTL_IO_WRITE,
    UC_CTL_TLB_FLUSH,
    UC_ERR_FETCH_UNMAPPED,
    UC_ERR_READ_UNMAPPED,
    UC_ERR_WRITE_UNMAPPED,
    UC_HOOK_CODE,
    UC_HOOK_EDGE_GENERATED,
    UC_MODE_64,
    UC_TLB_CPU,
    Uc,
)
from unicorn import x86_const as x86
from unicorn.unicorn import UcContext
from unicorn.unicorn_py3.unicorn import uc_tb

from emu.decode import Undecodable
from emu.engine import Engine, StopReason
from emu.engine_context import EngineError
from emu.exceptions import Vector
from emu.instruction_counter import InstructionCounter
from emu.memory import PAGE_SIZE, BusError, Memory
from emu.mmu.entry import is_canonical
from emu.mmu.fault import Access, NonCanonical, PageFault, PfError
from emu.mmu.mmu import Mmu
from emu.mmu.registers import Cr4
from emu.mmu.walk import walk
from emu.operands import MemoryAccess, accesses, checks, decode
from emu.privileged_opcodes import MAX_LENGTH, candidates, is_intercepted
from emu.rflags import Rflags

KEPT_DISAGREEMENTS = 1024
_PAGE_MASK = ~(PAGE_SIZE - 1)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_IA32_EFER = 0xC000_0080
_UNMAPPED = frozenset((UC_ERR_READ_UNMAPPED, UC_ERR_WRITE_UNMAPPED, UC_ERR_FETCH_UNMAPPED))
# wrpkru; hlt
_WRPKRU_HLT = b"\x0f\x01\xef\xf4"
# jmp to the next instruction, which is another block; hlt
_TWO_BLOCKS = b"\xeb\x00\xf4"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A #PF at `rip` on `cr2` for which the two walkers differ: Unicorn's error code and ours, None for no fault."""

    rip: int
    cr2: int
    unicorn: int
    ours: int | None


class NativeEngine(Engine):
    """A Unicorn CPU over `memory` that translates by itself; `mmu` holds its registers and serves accesses from Python.

    Raises EngineError when the installed Unicorn does not report what it translates. `fault` and `disagreements` are the only data
    of a stop that come from Unicorn's walker.
    """

    tlb_mode = UC_TLB_CPU

    def __init__(self, memory: Memory, mmu: Mmu, *, limit: int | None = None) -> None:
        self.disagreements: list[Disagreement] = []
        self._pkru_at = _discover_pkru()
        self._loaded: tuple[int, ...] = ()
        # The block that was translated without a hook in front of one of its instructions: address and size.
        self._discard: tuple[int, int] | None = None
        super().__init__(memory, mmu, limit=None)
        self._code.close()
        memory.code_listeners.append(self)
        self._prime()
        if limit is not None:
            self.counter = InstructionCounter(self.uc, limit)
        self.load_control_registers()

    def _hook_translation(self) -> None:
        self.uc.hook_add(UC_HOOK_EDGE_GENERATED, self._on_block)

    def _prime(self) -> None:
        """Unicorn reports no block before the first that ran to its end: let one do so, unpaged, and see the next reported."""
        kept = self.memory.read(0, len(_TWO_BLOCKS))
        self.memory.write(0, _TWO_BLOCKS)
        reported: list[int] = []
        hook = self.uc.hook_add(UC_HOOK_EDGE_GENERATED, lambda _uc, block, _previous, _data: reported.append(block.pc))
        for _ in range(2):
            reported.clear()
            self.uc.emu_start(0, 0)
            self.uc.ctl_flush_tb()
        self.uc.hook_del(hook)
        self.memory.write(0, kept)
        self._forget_blocks()
        if reported != [0, 2]:
            raise EngineError("this Unicorn does not report every block that it translates")

    def code_changed(self, frame: int) -> None:
        """The bytes of a frame that was executed change, and not by this CPU."""
        self._drop_code()

    def code_fetched(self, frame: int) -> None:
        """Stores of this CPU are not seen by others: native mode is for one CPU."""

    def close(self) -> None:
        """Base class's."""
        if self in self.memory.code_listeners:
            self.memory.code_listeners.remove(self)

    def _forget_blocks(self) -> None:
        self.memory.code_frames.clear()
        self._fetched.clear()
        self._discard = self._reason = None

    def load_control_registers(self) -> None:
        """Give Unicorn the MMU's registers, paging on. What changes flushes its TLB as far as it does so itself."""
        mmu = self.mmu
        registers = (mmu.cr4 & ~Cr4.PCIDE, mmu.efer, mmu.cr3 & _PAGE_MASK, mmu.cr0, mmu.pkru)
        if registers == self._loaded:
            return
        cr4, efer, cr3, cr0, pkru = registers
        self.set_reg("cr4", cr4)
        self.uc.msr_write(_IA32_EFER, efer)
        self.uc.reg_write(x86.UC_X86_REG_CR3, cr3)
        self.set_reg("cr0", cr0)
        context = self.uc.context_save()
        ctypes.c_uint32.from_address(_address(context) + self._pkru_at).value = pkru
        self.uc.context_restore(context)
        self._loaded = registers
        self.drop_soft_tlb()

    def _run_until(self, rip: int, until: int | None, count: int) -> StopReason:
        if self._soft_tlb_stale:
            self.load_control_registers()
        reason = super()._run_until(rip, until, count)
        if self._discard is not None:
            start, size = self._discard
            self._discard = None
            self.uc.ctl_remove_cache(start, start + size)
        elif reason is StopReason.INTERRUPT and self.vector == Vector.PF:
            return self._page_fault()
        elif reason is StopReason.INTERRUPT and self.vector == Vector.GP:
            return self._general_protection()
        return reason

    def _classify(self, status: int) -> StopReason:
        if status in _UNMAPPED and self._bus_error(status == UC_ERR_FETCH_UNMAPPED):
            return StopReason.FAULT
        return super()._classify(status)

    def _bus_error(self, fetch: bool) -> bool:
        """Find the frame outside RAM that Unicorn met. A hook would be told its address, but every store would be slow for it."""
        mmu, rip = self.mmu, self.reg("rip")
        user, ac = mmu.cpl == 3, bool(self.reg("rflags") & Rflags.AC)
        if fetch:
            parts = [(rip, Access.FETCH), ((rip & _PAGE_MASK) + PAGE_SIZE & _MASK64, Access.FETCH)]
        else:
            parts = [(part.la, Access.WRITE if part.write else Access.READ) for part in checks(self._accesses(rip))]
        for la, access in parts:
            try:
                mmu.translate(la, access, user=user, ac=ac)
            except BusError as error:
                self.fault, self.fault_access, self.fault_page = error, access, la & _PAGE_MASK
                return True
        return False

    def _accesses(self, rip: int) -> tuple[MemoryAccess, ...]:
        """The accesses of the instruction at `rip`; none when it cannot be fetched whole."""
        try:
            return accesses(decode(self.peek(rip, MAX_LENGTH), rip), rip, self.reg)
        except (Undecodable, PageFault, NonCanonical, BusError):
            return ()

    def _page_fault(self) -> StopReason:
        """Take over the #PF that Unicorn raised."""
        context = self.uc.context_save()
        error = self._layout.read_error_code(context)
        self._layout.set_cpl(context, self.mmu.cpl)
        self.uc.context_restore(context)
        cr2: int = self.uc.reg_read(x86.UC_X86_REG_CR2)
        access = self._kind(error, cr2)
        self.fault_access = access
        self.fault_page = cr2 & _PAGE_MASK
        self.fault = self._confirmed(cr2, error, access)
        return StopReason.FAULT

    def _kind(self, error: int, cr2: int) -> Access:
        """The kind of access of a #PF. Without NXE and SMEP the error code does not tell a fetch from a read."""
        if error & PfError.W:
            return Access.WRITE
        if error & PfError.I:
            return Access.FETCH
        regs = self.mmu.regs
        rip = self.reg("rip")
        if not (regs.nxe or regs.smep) and (
            cr2 == rip or (cr2 == (rip & _PAGE_MASK) + PAGE_SIZE and not self._reads(rip, cr2))
        ):
            return Access.FETCH
        return Access.READ

    def _reads(self, rip: int, la: int) -> bool:
        """Whether the instruction at `rip`, if all of it is there, reads the byte at `la`."""
        return any(part.read and part.la <= la < part.la + part.size for part in checks(self._accesses(rip)))

    def _confirmed(self, cr2: int, error: int, access: Access) -> PageFault | BusError:
        """Unicorn's #PF with the entry that refused, by a walk of ours; BusError where a table lies outside RAM."""
        ac = bool(self.reg("rflags") & Rflags.AC)
        page = cr2 & _PAGE_MASK
        ours: int | None = None
        level = entry = 0
        try:
            walk(self.memory, self.mmu.regs, cr2, access, bool(error & PfError.U), ac=ac, set_ad=False)
        except PageFault as fault:
            ours, level, entry = fault.error, fault.level, fault.entry
        except NonCanonical:
            pass
        except BusError as outside:
            return outside
        if ours != error and len(self.disagreements) < KEPT_DISAGREEMENTS:
            self.disagreements.append(Disagreement(self.reg("rip"), cr2, error, ours))
        return PageFault(page, error, level, entry)

    def _general_protection(self) -> StopReason:
        """A #GP(0) for an address that is not canonical is a fault of that access, lest a stack's be taken for a #GP."""
        if self.error_code:
            return StopReason.INTERRUPT
        for part in checks(self._accesses(self.reg("rip"))):
            if not is_canonical(part.la, self.mmu.regs.levels):
                self.forget_exception()
                self.fault = NonCanonical(part.la)
                self.fault_access = Access.WRITE if part.write else Access.READ
                self.fault_page = part.la & _PAGE_MASK
                return StopReason.FAULT
        return StopReason.INTERRUPT

    def _peek_fetch(self, la: int) -> int:
        """Base class's, without the MMU's TLB: what Unicorn fetches by is its own."""
        page = la & _PAGE_MASK
        frame = self._fetched.get(page)
        if frame is None:
            mmu = self.mmu
            frame = walk(self.memory, mmu.regs, page, Access.FETCH, mmu.cpl == 3, set_ad=False).pa
            self._fetched[page] = frame
        return frame | la & (PAGE_SIZE - 1)

    def _on_block(self, uc: Uc, block: uc_tb, _previous: uc_tb, _data: object) -> None:
        """A block was translated and is about to run."""
        start, size = block.pc, block.size
        uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
        self._fetched.clear()
        try:
            for page in range(start & _PAGE_MASK, start + size, PAGE_SIZE):
                self.memory.code_frames.add(self._peek_fetch(page) >> 12)
            code = self.peek(start, size)
        except (PageFault, NonCanonical, BusError):
            return
        unhooked = [
            la for la in (start + offset for offset in candidates(code))
            if la not in self._hooked and is_intercepted(self.peek(la, MAX_LENGTH))
        ]
        for la in unhooked:
            self._hooked.add(la)
            uc.hook_add(UC_HOOK_CODE, self._on_candidate, begin=la, end=la)
        if unhooked:
            self._discard = start, size
            self._translate_again = True
            self.intercepted = None
            self._reason = StopReason.INTERCEPT
            uc.emu_stop()


def _address(context: UcContext) -> int:
    address = ctypes.cast(context.context, ctypes.c_void_p).value
    if address is None:
        raise EngineError("Unicorn returned a context without storage")
    return address


@functools.cache
def _discover_pkru() -> int:
    """Byte offset of PKRU in a saved context: the word that follows two WRPKRU. Raises EngineError."""
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
    uc.mem_map(0, PAGE_SIZE)
    uc.mem_write(0, _WRPKRU_HLT)
    uc.reg_write(x86.UC_X86_REG_CR4, int(Cr4.PAE | Cr4.PKE))
    found: set[int] | None = None
    for value in (0x5A3C_1287, 0x69F0_0F1E):
        uc.reg_write(x86.UC_X86_REG_RAX, value)
        uc.emu_start(0, PAGE_SIZE)
        uc.reg_write(x86.UC_X86_REG_RAX, 0)
        context = uc.context_save()
        words = (ctypes.c_uint32 * (context.size // 4)).from_address(_address(context))
        places = {at for at, word in enumerate(words) if word == value}
        found = places if found is None else found & places
    if found is None or len(found) != 1:
        raise EngineError("this Unicorn's saved context has no recognisable PKRU")
    return 4 * found.pop()
