"""Which mm a CPU has loaded, under which ASID, and how far its TLB has followed that mm's changes.

Each CPU keeps the last six mms' translations apart by PCID. An mm's tlb_gen counts the flushes asked for; a CPU's copy of it says
which of them its TLB has seen, so an mm that comes back is flushed only if it changed meanwhile. A kernel thread goes on with the
mm of the thread before it, lazily: it never touches user addresses, and is not disturbed by flushes of them.

    ASID  0..5                 Linux's name for one of a CPU's six contexts
    kPCID ASID + 1             in CR3 while the kernel runs
    uPCID ASID + 1 + 2048      in CR3 while user mode runs, with page-table isolation

Source: v6.12 arch/x86/mm/tlb.c, arch/x86/include/asm/tlbflush.h, arch/x86/entry/calling.h; other versions: profile.TlbDesign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from emu.kernel.init_64 import PTI_USER_PGD
from emu.kernel.profile import TlbDesign
from emu.kernel.smp import SmpKernel
from emu.mmu.registers import CR3_NO_INVALIDATE, CR3_PCID

TLB_NR_DYN_ASIDS = 6
X86_CR3_PTI_PCID_USER_BIT = 11
PTI_USER_PCID_MASK = 1 << X86_CR3_PTI_PCID_USER_BIT
INIT_CTX_ID = 1


def kern_pcid(asid: int) -> int:
    """The PCID under which the kernel runs on an ASID: PCID 0 is left to code that knows nothing of PCIDs."""
    return asid + 1


def user_pcid(asid: int) -> int:
    """The PCID under which user mode runs on an ASID, with page-table isolation."""
    return kern_pcid(asid) | PTI_USER_PCID_MASK


@dataclass(slots=True, eq=False)
class MmContext:
    """What flushing has to know of an mm (mm_context_t and mm_cpumask).

    `ctx_id` never comes again, and is 0 until a CPU first loads the mm. `cpumask`: the CPUs that have it loaded, lazily or not.
    """

    pgd: int
    ctx_id: int = 0
    tlb_gen: int = 0
    cpumask: set[int] = field(default_factory=set)


@dataclass(slots=True)
class TlbContext:
    """One ASID of a CPU: whose translations it holds (ctx_id 0: nobody's), and up to which generation they are right."""

    ctx_id: int = 0
    tlb_gen: int = 0


@dataclass(slots=True)
class TlbState:
    """One CPU's struct tlb_state and tlb_state_shared. `cr3` is what was written when the mm was loaded, without bit 63."""

    loaded_mm: MmContext
    cr3: int = 0
    loaded_mm_asid: int = 0
    next_asid: int = 1
    is_lazy: bool = False
    invalidate_other: bool = False
    user_pcid_flush_mask: int = 0
    ctxs: list[TlbContext] = field(default_factory=lambda: [TlbContext() for _ in range(TLB_NR_DYN_ASIDS)])

    @property
    def loaded(self) -> TlbContext:
        """The context of the loaded mm."""
        return self.ctxs[self.loaded_mm_asid]


@dataclass(slots=True)
class SwitchCounters:
    """Writes of CR3 by CPU: those that flushed the new ASID, and those that kept it. `lazy`: switches back that needed no write."""

    flushed: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    lazy: Counter[int] = field(default_factory=Counter)


class MmuContexts:
    """The loaded mm of every CPU. All methods are for the CPU that runs the model now, unless they take one.

    `pcid`: CR4.PCIDE is set on every CPU. `sync_current_stack(pgd)`: before v5.8, makes the stack of the current thread
    present in a PGD that is about to be loaded.
    """

    def __init__(self, kernel: SmpKernel, init_pgd: int, design: TlbDesign, *, pcid: bool, pti: bool) -> None:
        self.kernel = kernel
        self.design = design
        self.pcid = pcid
        self.pti = pti
        self.init_mm = MmContext(init_pgd, INIT_CTX_ID)
        self.last_mm_ctx_id = INIT_CTX_ID
        self.cpu_tlbstate = [TlbState(self.init_mm) for _ in range(kernel.cpus.possible)]
        for state in self.cpu_tlbstate:
            state.loaded.ctx_id, state.cr3 = INIT_CTX_ID, self.build_cr3(self.init_mm, 0)
        self.counters = SwitchCounters()
        self.sync_current_stack: Callable[[int], None] = lambda pgd: None
        # Guest code may write CR3 behind all this; like a kernel without CONFIG_DEBUG_VM, nothing here looks whether it did.
        self.guests_write_cr3 = True

    # ---- CR3

    def build_cr3(self, mm: MmContext, asid: int) -> int:
        """The CR3 that the kernel runs on with an mm under an ASID."""
        return mm.pgd | (kern_pcid(asid) if self.pcid else 0)

    def user_cr3(self, cpu: int) -> int:
        """What a return to user mode with page-table isolation writes to CR3; the flush that the user PCID was owed is in it.

        Without isolation: the CR3 that is loaded, bit 63 set with PCIDs, as no write takes place. Source: SWITCH_TO_USER_CR3.
        """
        cr3 = self.kernel.cpu_by_number(cpu).reg("cr3")
        if not self.pti:
            return cr3 | (CR3_NO_INVALIDATE if self.pcid else 0)
        return self.return_cr3(cpu, cr3 | PTI_USER_PGD | (PTI_USER_PCID_MASK if self.pcid else 0))

    def return_cr3(self, cpu: int, cr3: int) -> int:
        """What is written to go back to user mode's CR3, here a value of it: the flush that its PCID was owed is in it.

        Source: SWITCH_TO_USER_CR3, PARANOID_RESTORE_CR3.
        """
        if not self.pcid:
            return cr3
        state = self.cpu_tlbstate[cpu]
        bit = 1 << (cr3 & CR3_PCID & ~PTI_USER_PCID_MASK)
        if state.user_pcid_flush_mask & bit:
            state.user_pcid_flush_mask ^= bit
            return cr3
        return cr3 | CR3_NO_INVALIDATE

    def kernel_cr3(self, cpu: int) -> int:
        """What an entry from user mode with page-table isolation writes to CR3. Source: SWITCH_TO_KERNEL_CR3."""
        cr3 = self.kernel.cpu_by_number(cpu).reg("cr3")
        if self.pcid:
            return cr3 & ~(PTI_USER_PCID_MASK | PTI_USER_PGD) | CR3_NO_INVALIDATE
        return cr3 & ~PTI_USER_PGD

    def invalidate_user_asid(self, cpu: int, asid: int) -> None:
        """The user PCID of an ASID is flushed when user mode next runs on it; without PCIDs every write of CR3 does that."""
        if self.pcid and self.pti:
            self.cpu_tlbstate[cpu].user_pcid_flush_mask |= 1 << kern_pcid(asid)

    def initialize_tlbstate_and_flush(self, cpu: int) -> None:
        """A CPU comes up, with the PGD of its loaded mm in CR3 and CR4.PCIDE as it will stay: ASID 0, all others forgotten."""
        state = self.cpu_tlbstate[cpu]
        mm = state.loaded_mm
        state.cr3 = self.build_cr3(mm, 0)
        self.kernel.cpu_by_number(cpu).set_reg("cr3", state.cr3)
        state.loaded_mm_asid, state.next_asid = 0, 1
        state.ctxs = [TlbContext() for _ in range(TLB_NR_DYN_ASIDS)]
        state.ctxs[0].ctx_id, state.ctxs[0].tlb_gen = mm.ctx_id, self.init_mm.tlb_gen

    # ---- switching

    def init_new_context(self, mm: MmContext) -> None:
        """Give an mm a ctx_id of its own, unless it has one."""
        if not mm.ctx_id:
            self.last_mm_ctx_id += 1
            mm.ctx_id = self.last_mm_ctx_id

    def switch_mm_irqs_off(self, following: MmContext) -> None:
        """Load an mm on this CPU, interrupts off; nothing but the end of laziness when it is loaded already and up to date."""
        cpu = self.kernel.cpus.current
        state = self.cpu_tlbstate[cpu]
        prev = state.loaded_mm
        was_lazy, state.is_lazy = state.is_lazy, False
        self.init_new_context(following)
        if prev is following:
            if prev is not self.init_mm and cpu not in following.cpumask:
                self.kernel.warn("switch_mm_irqs_off")
                following.cpumask.add(cpu)
            if not was_lazy:
                return
            if state.loaded.tlb_gen == following.tlb_gen:
                self.counters.lazy[cpu] += 1
                return
            new_asid, need_flush = state.loaded_mm_asid, True
        else:
            if self.design.syncs_stack:
                self.sync_current_stack(following.pgd)
            if prev is not self.init_mm:
                prev.cpumask.discard(cpu)
            if following is not self.init_mm:
                following.cpumask.add(cpu)
            new_asid, need_flush = self._choose_new_asid(state, following)
        if need_flush:
            state.ctxs[new_asid].ctx_id, state.ctxs[new_asid].tlb_gen = following.ctx_id, following.tlb_gen
        self._load_new_mm_cr3(cpu, following, new_asid, need_flush)
        state.loaded_mm, state.loaded_mm_asid = following, new_asid

    def _choose_new_asid(self, state: TlbState, following: MmContext) -> tuple[int, bool]:
        """The ASID to load an mm under, and whether it must be flushed: its own if it still has one, else the next in turn."""
        if not self.pcid:
            return 0, True
        if state.invalidate_other:
            self._clear_asid_other(state)
        for asid, context in enumerate(state.ctxs):
            if context.ctx_id == following.ctx_id:
                return asid, context.tlb_gen < following.tlb_gen
        asid = state.next_asid
        state.next_asid += 1
        if asid >= TLB_NR_DYN_ASIDS:
            asid, state.next_asid = 0, 1
        return asid, True

    def _clear_asid_other(self, state: TlbState) -> None:
        """Kernel translations were flushed under the loaded ASID alone, and are not global: have the others flushed when loaded."""
        if not self.pti:
            self.kernel.warn("clear_asid_other")
            return
        for asid, context in enumerate(state.ctxs):
            if asid != state.loaded_mm_asid:
                context.ctx_id = 0
        state.invalidate_other = False

    def _load_new_mm_cr3(self, cpu: int, mm: MmContext, asid: int, need_flush: bool) -> None:
        cr3 = self.cpu_tlbstate[cpu].cr3 = self.build_cr3(mm, asid)
        if need_flush:
            self.invalidate_user_asid(cpu, asid)
            self.counters.flushed[cpu] += 1
        else:
            cr3 |= CR3_NO_INVALIDATE
            self.counters.kept[cpu] += 1
        self.kernel.cpu_by_number(cpu).set_reg("cr3", cr3)

    def context_switch(self, following: MmContext | None) -> None:
        """What a switch of threads does about mms: a kernel thread (None) borrows the loaded one, another loads its own.

        Source: v6.12 kernel/sched/core.c context_switch.
        """
        if following is None:
            self.enter_lazy_tlb()
        else:
            self.switch_mm_irqs_off(following)

    def enter_lazy_tlb(self) -> None:
        """A kernel thread begins on this CPU: the loaded mm stays, and is not used."""
        state = self.cpu_tlbstate[self.kernel.cpus.current]
        if state.loaded_mm is not self.init_mm:
            state.is_lazy = True

    def leave_mm(self) -> None:
        """Give up a lazily loaded mm for init_mm."""
        state = self.cpu_tlbstate[self.kernel.cpus.current]
        if state.loaded_mm is self.init_mm:
            return
        if not state.is_lazy:
            self.kernel.warn("leave_mm")
        self.switch_mm_irqs_off(self.init_mm)

    def foreign_cr3(self, cpu: int) -> int | None:
        """A CPU's CR3 if it is not what was loaded here, nor user mode's form of that: guest code has written it. None else."""
        cr3 = self.kernel.cpu_by_number(cpu).reg("cr3")
        kernel_form = cr3 & ~(PTI_USER_PCID_MASK | PTI_USER_PGD) if self.pti and cr3 & PTI_USER_PGD else cr3
        return None if kernel_form == self.cpu_tlbstate[cpu].cr3 else cr3

    def validate(self) -> None:
        """Each CPU's loaded context is its loaded mm's, not newer than the mm, and no two contexts are of one mm.

        A CPU is in the mask of a user mm exactly while it has it loaded. Nobody is lazy with init_mm. What was written to CR3 is
        the loaded mm's, and CR3 still holds it, or user mode's form of it, unless guests may write CR3 by themselves.
        Contexts of other than the loaded ASID exist with PCIDs only, and so do flushes owed.
        """
        for cpu in range(self.kernel.cpus.online):
            state = self.cpu_tlbstate[cpu]
            mm = state.loaded_mm
            assert state.loaded.ctx_id == mm.ctx_id, f"CPU {cpu} has ctx_id {state.loaded.ctx_id} for mm {mm.ctx_id}"
            assert state.loaded.tlb_gen <= mm.tlb_gen, f"CPU {cpu} is at generation {state.loaded.tlb_gen} of {mm.tlb_gen}"
            ids = [context.ctx_id for context in state.ctxs if context.ctx_id]
            assert len(ids) == len(set(ids)), f"CPU {cpu} has an mm under two ASIDs: {ids}"
            assert mm is self.init_mm or cpu in mm.cpumask, f"CPU {cpu} is not in the mask of its mm {mm.ctx_id}"
            assert not (state.is_lazy and mm is self.init_mm), f"CPU {cpu} is lazy with init_mm"
            assert 1 <= state.next_asid <= TLB_NR_DYN_ASIDS, f"CPU {cpu} gives ASID {state.next_asid} next"
            assert self.pcid or len(ids) <= 1, f"CPU {cpu} has contexts {ids} without PCIDs"
            assert (self.pcid and self.pti) or not state.user_pcid_flush_mask, f"CPU {cpu} owes a flush to a user PCID"
            assert self.pti or not state.invalidate_other, f"CPU {cpu} would invalidate other ASIDs without isolation"
            built = self.build_cr3(mm, state.loaded_mm_asid)
            assert state.cr3 == built, f"CPU {cpu} was given CR3 {state.cr3:#x} for {built:#x}"
            foreign = self.foreign_cr3(cpu)
            assert foreign is None or self.guests_write_cr3, f"CPU {cpu} has CR3 {foreign or 0:#x}; loaded was {built:#x}"
        assert not self.init_mm.cpumask, f"init_mm has the CPUs {sorted(self.init_mm.cpumask)} in its mask"
