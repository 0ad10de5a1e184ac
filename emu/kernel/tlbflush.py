"""Flushing TLBs: of kernel addresses on every CPU, of user addresses on the CPUs that use the mm.

A CPU can only flush its own TLB, so the others are sent a function call, and the one that asks waits for all of them. With INVLPGB
(AMD) one instruction reaches every TLB, and there is no IPI.

Source: v6.12 arch/x86/mm/tlb.c; INVLPGB: v6.15. What differs in other versions is in profile.TlbDesign. should_trim_cpumask, which
now and then sends a flush to CPUs that have left an mm, is left out: they leave its mask when they leave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.mmu_context import MmContext, MmuContexts, kern_pcid, user_pcid
from emu.kernel.preempt import PREEMPT_OFFSET
from emu.kernel.smp import SmpCalls
from emu.mmu.registers import Cr4
from emu.trace import FlushIssued, Sink, TlbFlushed, discard

TLB_FLUSH_ALL = 1 << 64
TLB_GENERATION_INVALID = 0
_ONE_ADDRESS, _EVERYTHING = 0, 2  # types of INVPCID (SDM vol. 2A)


class FlushingCpu(Protocol):
    """What a flush does on a CPU."""

    def reg(self, name: str) -> int:
        """Value of a register."""

    def set_reg(self, name: str, value: int) -> None:
        """Set a register; control registers take their architectural effects."""

    def invlpg(self, la: int) -> None:
        """Execute INVLPG."""

    def invpcid(self, kind: int, pcid: int, la: int) -> None:
        """Execute INVPCID."""


@dataclass(frozen=True, slots=True)
class FlushTlbInfo:
    """One request (struct flush_tlb_info). `end` TLB_FLUSH_ALL: everything of the mm, or of the kernel where `mm` is None.

    `new_tlb_gen`: the generation of the mm that this flush leads to. `flush`: the number by which the trace knows it.
    """

    mm: MmContext | None
    start: int
    end: int
    stride_shift: int
    freed_tables: bool
    new_tlb_gen: int
    initiating_cpu: int
    flush: int
    cause: str


@dataclass(slots=True)
class FlushCounters:
    """What was asked for by cause, and what CPUs did, by (CPU, cause).

    `full`: flushes of everything, global entries too; `local`: of everything that is not global under the current PCID;
    `up_to_date`: requests that found nothing left to do. `invlpgb` counts instructions by cause.
    """

    requests: Counter[str] = field(default_factory=Counter)
    invlpg: Counter[tuple[int, str]] = field(default_factory=Counter)
    full: Counter[tuple[int, str]] = field(default_factory=Counter)
    local: Counter[tuple[int, str]] = field(default_factory=Counter)
    up_to_date: Counter[tuple[int, str]] = field(default_factory=Counter)
    invlpgb: Counter[str] = field(default_factory=Counter)


class TlbFlushes:
    """The flushes of one kernel (kernel_cpu.TlbFlush). `cause` names the C function that asks.

    `invpcid`: the CPUs have INVPCID. `invlpgb`: they have INVLPGB, one of which covers at most `invlpgb_count_max` pages.
    `task_size_max`: user addresses end there. Raises ValueError for INVLPGB with page-table isolation: no AMD processor needs that.
    """

    def __init__(
        self, smp: SmpCalls, contexts: MmuContexts, sink: Sink = discard, *, task_size_max: int, invpcid: bool = False,
        invlpgb: bool = False, invlpgb_count_max: int = 8,
    ) -> None:
        if invlpgb and contexts.pti:
            raise ValueError("INVLPGB is asked for with page-table isolation; a machine has one of them")
        self.smp = smp
        self.kernel = smp.kernel
        self.contexts = contexts
        self.design = contexts.design
        self.sink = sink
        self.task_size_max = task_size_max
        self.invpcid = invpcid
        self.invlpgb = invlpgb
        self.invlpgb_count_max = invlpgb_count_max
        self.tlb_single_page_flush_ceiling = self.design.single_page_flush_ceiling
        self.counters = FlushCounters()
        self._flush = 0

    # ---- kernel addresses

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "flush_tlb_kernel_range") -> None:
        """Remove the translations of kernel [start, end) from every CPU, or everything above the ceiling; waits for all CPUs."""
        if end == TLB_FLUSH_ALL or end - start > self.tlb_single_page_flush_ceiling << PAGE_SHIFT:
            self._flush_everything(cause)
            return
        flush = self._issue(start, end, cause, range(self.kernel.cpus.online))
        if self.invlpgb:
            self._invlpgb_kernel_range_flush(start, end, cause, flush)
            return

        def do_kernel_range_flush(cpu: int) -> None:
            for addr in range(start, end, PAGE_SIZE):
                self._flush_tlb_one_kernel(cpu, addr, cause)
            self.sink(TlbFlushed(cpu, start, end, flush))

        self.smp.on_each_cpu(do_kernel_range_flush, True, cause=cause)

    def flush_tlb_all(self, *, cause: str = "flush_tlb_all") -> None:
        """Remove every translation, global ones included, from every CPU; waits until it is done."""
        self._flush_everything(cause)

    def flush_tlb_one_kernel(self, addr: int, *, cause: str = "flush_tlb_one_kernel") -> None:
        """Remove the translations of one kernel page from this CPU alone."""
        cpu = self.kernel.cpus.current
        flush = self._issue(addr, addr + PAGE_SIZE, cause, (cpu,))
        self._flush_tlb_one_kernel(cpu, addr, cause)
        self.sink(TlbFlushed(cpu, addr, addr + PAGE_SIZE, flush))

    def flush_tlb_all_local(self, *, cause: str = "__flush_tlb_all") -> None:
        """Remove every translation, global ones included, from this CPU alone (Linux: __flush_tlb_all)."""
        cpu = self.kernel.cpus.current
        self._flush_tlb_all(cpu, cause, self._issue(0, TLB_FLUSH_ALL, cause, (cpu,)))

    def _flush_everything(self, cause: str) -> None:
        online = range(self.kernel.cpus.online)
        flush = self._issue(0, TLB_FLUSH_ALL, cause, online)
        if self.invlpgb:
            self.counters.invlpgb[cause] += 1
            for cpu in online:
                self._cpu(cpu).invpcid(_EVERYTHING, 0, 0)
                self.counters.full[cpu, cause] += 1
                self.sink(TlbFlushed(cpu, 0, TLB_FLUSH_ALL, flush))
            return
        self.smp.on_each_cpu(lambda cpu: self._flush_tlb_all(cpu, cause, flush), True, cause=cause)

    def _invlpgb_kernel_range_flush(self, start: int, end: int, cause: str, flush: int) -> None:
        """Pages with their address valid and G included: of every PCID, on every CPU (APM vol. 3, INVLPGB)."""
        nr_pages = (end - start + PAGE_SIZE - 1) >> PAGE_SHIFT
        self.counters.invlpgb[cause] += -(-nr_pages // self.invlpgb_count_max)
        for number in range(self.kernel.cpus.online):
            cpu = self._cpu(number)
            state = self.contexts.cpu_tlbstate[number]
            asids = [asid for asid, context in enumerate(state.ctxs) if context.ctx_id and asid != state.loaded_mm_asid]
            for addr in range(start, end, PAGE_SIZE):
                cpu.invlpg(addr)
                for asid in asids:
                    cpu.invpcid(_ONE_ADDRESS, kern_pcid(asid), addr)
            self.sink(TlbFlushed(number, start, end, flush))

    # ---- user addresses

    def flush_tlb_mm_range(
        self, mm: MmContext, start: int, end: int, stride_shift: int = PAGE_SHIFT, freed_tables: bool = True, *,
        cause: str = "flush_tlb_mm_range",
    ) -> None:
        """Remove the translations of user [start, end) from the CPUs that use the mm, in steps of the leaves' size; waits.

        Above the ceiling, everything of the mm. CPUs that have it loaded lazily are left alone unless page tables were freed: they
        flush when they come back to it.
        """
        if end == TLB_FLUSH_ALL or end - start >> stride_shift > self.tlb_single_page_flush_ceiling:
            start, end = 0, TLB_FLUSH_ALL
        mm.tlb_gen += 1
        this_cpu = self.kernel.cpus.current
        preempt = self.kernel.preempt(this_cpu)
        preempt.add(PREEMPT_OFFSET)
        remote = bool(mm.cpumask - {this_cpu})
        here = self.contexts.cpu_tlbstate[this_cpu].loaded_mm is mm
        cpus = {cpu for cpu in mm.cpumask if freed_tables or self._should_flush_tlb(cpu, mm)}
        if here and (self.design.local_flush_first or not remote):
            cpus.add(this_cpu)
        flush = self._issue(start, self._user_end(end), cause, sorted(cpus))
        info = FlushTlbInfo(mm, start, end, stride_shift, freed_tables, mm.tlb_gen, this_cpu, flush, cause)
        if here and (self.design.local_flush_first or not remote):
            self._flush_tlb_func(this_cpu, info)
        if remote:
            self._flush_tlb_multi(mm.cpumask, info)
        preempt.add(-PREEMPT_OFFSET)

    def flush_tlb_mm(self, mm: MmContext, *, cause: str = "flush_tlb_mm") -> None:
        """Remove everything of an mm, page tables included, from the CPUs that use it."""
        self.flush_tlb_mm_range(mm, 0, TLB_FLUSH_ALL, cause=cause)

    def flush_tlb_page(self, mm: MmContext, addr: int, *, cause: str = "flush_tlb_page") -> None:
        """Remove one user page, whose tables stay."""
        self.flush_tlb_mm_range(mm, addr, addr + PAGE_SIZE, PAGE_SHIFT, False, cause=cause)

    def _flush_tlb_multi(self, cpumask: set[int], info: FlushTlbInfo) -> None:
        mm = info.mm
        mask = set(cpumask)
        if info.freed_tables or mm is None:
            self.smp.on_each_cpu_mask(mask, lambda cpu: self._flush_tlb_func(cpu, info), True, cause=info.cause)
        else:
            self.smp.on_each_cpu_cond_mask(
                lambda cpu: self._should_flush_tlb(cpu, mm), lambda cpu: self._flush_tlb_func(cpu, info), True, mask,
                cause=info.cause,
            )

    def _should_flush_tlb(self, cpu: int, mm: MmContext) -> bool:
        """Whether a CPU of the mask is sent a flush; up to v6.0 it is called tlb_is_not_lazy and asks for no more than that."""
        state = self.contexts.cpu_tlbstate[cpu]
        return not state.is_lazy and (state.loaded_mm is mm or not self.design.skips_other_mms)

    def _flush_tlb_func(self, cpu: int, info: FlushTlbInfo) -> None:
        """Bring this CPU up to the mm's generation: page by page if this request is all that it missed, else everything."""
        contexts = self.contexts
        state = contexts.cpu_tlbstate[cpu]
        mm = state.loaded_mm
        if cpu != info.initiating_cpu and info.mm is not None and info.mm is not mm:
            return
        if mm is contexts.init_mm:
            return
        if state.is_lazy:
            contexts.switch_mm_irqs_off(contexts.init_mm)
            return
        loaded = state.loaded
        passed = info.new_tlb_gen != TLB_GENERATION_INVALID and info.new_tlb_gen <= loaded.tlb_gen
        if loaded.tlb_gen == mm.tlb_gen or (passed and self.design.skips_old_generations):
            self.counters.up_to_date[cpu, info.cause] += 1
            return
        if info.end != TLB_FLUSH_ALL and info.new_tlb_gen == loaded.tlb_gen + 1 and info.new_tlb_gen == mm.tlb_gen:
            for addr in range(info.start, info.end, 1 << info.stride_shift):
                self._flush_tlb_one_user(cpu, addr, info.cause)
            self.sink(TlbFlushed(cpu, info.start, info.end, info.flush))
        else:
            self._flush_tlb_local(cpu, info.cause)
            self.sink(TlbFlushed(cpu, 0, self.task_size_max, info.flush))
        loaded.tlb_gen = mm.tlb_gen

    def _user_end(self, end: int) -> int:
        return self.task_size_max if end == TLB_FLUSH_ALL else end

    # ---- on one CPU

    def _flush_tlb_one_kernel(self, cpu: int, addr: int, cause: str) -> None:
        """With isolation kernel translations are not global: other ASIDs than the loaded one are flushed when they are loaded."""
        self._flush_tlb_one_user(cpu, addr, cause)
        if self.contexts.pti:
            self.contexts.cpu_tlbstate[cpu].invalidate_other = True

    def _flush_tlb_one_user(self, number: int, addr: int, cause: str) -> None:
        cpu = self._cpu(number)
        self.counters.invlpg[number, cause] += 1
        cpu.invlpg(addr)
        contexts = self.contexts
        if not contexts.pti:
            return
        asid = contexts.cpu_tlbstate[number].loaded_mm_asid
        if self.invpcid and contexts.pcid:
            cpu.invpcid(_ONE_ADDRESS, user_pcid(asid), addr)
        else:
            contexts.invalidate_user_asid(number, asid)

    def _flush_tlb_local(self, number: int, cause: str) -> None:
        """Everything under the current PCID that is not global, by a write of CR3 to itself."""
        self.counters.local[number, cause] += 1
        self.contexts.invalidate_user_asid(number, self.contexts.cpu_tlbstate[number].loaded_mm_asid)
        cpu = self._cpu(number)
        cpu.set_reg("cr3", cpu.reg("cr3"))

    def _flush_tlb_all(self, number: int, cause: str, flush: int) -> None:
        """native_flush_tlb_global: INVPCID of everything, or a toggle of CR4.PGE."""
        self.counters.full[number, cause] += 1
        cpu = self._cpu(number)
        if self.invpcid:
            cpu.invpcid(_EVERYTHING, 0, 0)
        else:
            cr4 = cpu.reg("cr4")
            cpu.set_reg("cr4", cr4 ^ Cr4.PGE)
            cpu.set_reg("cr4", cr4)
        self.sink(TlbFlushed(number, 0, TLB_FLUSH_ALL, flush))

    def _cpu(self, number: int) -> FlushingCpu:
        return self.kernel.cpu_by_number(number)

    def _issue(self, start: int, end: int, cause: str, cpus: Collection[int]) -> int:
        """Number a request and tell the trace; `cpus` are those that are to carry it out."""
        self.counters.requests[cause] += 1
        self._flush += 1
        self.sink(FlushIssued(self._flush, self.kernel.cpus.current, start, end, cause, tuple(cpus)))
        return self._flush

    def validate(self) -> None:
        """Calls and contexts are sound, and no CPU that uses an mm and is not lazy is behind it while no call is under way."""
        self.smp.validate()
        self.contexts.validate()
        if any(self.smp.call_single_queue):
            return
        for cpu in range(self.kernel.cpus.online):
            state = self.contexts.cpu_tlbstate[cpu]
            behind = state.loaded.tlb_gen < state.loaded_mm.tlb_gen
            assert state.is_lazy or not behind, f"CPU {cpu} missed a flush of mm {state.loaded_mm.ctx_id}"
