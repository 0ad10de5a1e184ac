"""Kernel code on several CPUs: each wrong flush is found at the first use it leads to, with its culprit; right ones are silent."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel"))
from kernel_floor import MIB

from emu.config import MachineConfig
from emu.guest.load import load
from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.kernel import Kernel
from emu.kernel.mm import PAGE_SHARED_DIRTY, Mm
from emu.kernel.pgtable_types import FlushRange
from emu.kernel.profile import find_profile
from emu.kernel.set_memory import change_page_attr, set_memory_ro, set_memory_rw
from emu.machine import Machine
from emu.memory import Memory
from emu.mmu.fault import Access, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.registers import CR3_NO_INVALIDATE, Cr4
from emu.start_cpu import LINUX_CR0, LINUX_CR4, LINUX_EFER, LINUX_PKRU
from emu.tlbsan import Finding, Kind, Scene, TlbSan, Tracking, kernel_scene, lines
from emu.trace import FlushIssued, TlbFlushed

PAGE = 4096
PMD = 2 * MIB
CEILING = 33
NO_TRACKING = Tracking()


class Cpus:
    """CPUs that execute nothing, and a kernel whose flushes reach them, or fail to as a test asks."""

    def __init__(self, cpus: int = 3, track: Tracking = NO_TRACKING, kernel: str = "6.12") -> None:
        self.skipped: set[int] = set()
        self.cut = 0
        self.flushes = 0
        self.rip = 0
        self.mmus: list[Mmu] = []
        memory = Memory(128 * MIB)
        self.kernel = Kernel(memory, find_profile(kernel), self, levels=4, nr_cpus=cpus)
        self.kernel.init_mm.tlb = self
        self.san = TlbSan(self.kernel, track=track, time=lambda: 7)
        for number in range(cpus):
            mmu = Mmu(memory)
            mmu.reset(LINUX_CR0, self.kernel.init_mm.pgd, LINUX_CR4 | int(Cr4.PCIDE), LINUX_EFER, LINUX_PKRU)
            self.mmus.append(mmu)
            self.san.attach(mmu, number, lambda: Scene(self.rip, 8, self.rip, "task", 100, trace=lambda: ("Call Trace:",)))

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "") -> None:
        self._flush(start, end - self.cut)

    def flush_tlb_all(self, *, cause: str = "") -> None:
        self._flush(0, 1 << 64)

    def pay(self, debt: FlushRange) -> None:
        """Flush what a change owes."""
        start, end = debt.defer()
        if start < end:
            self._flush(start, end)

    def _flush(self, start: int, end: int) -> None:
        if not self.mmus:
            return
        self.flushes += 1
        sent = tuple(number for number in range(len(self.mmus)) if number not in self.skipped)
        self.san.note(FlushIssued(self.flushes, 0, start, end, "test", sent))
        for number in sent:
            mmu = self.mmus[number]
            if end - start > CEILING * PAGE:
                mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))
                mmu.load_cr4(mmu.cr4 ^ int(Cr4.PGE))
            else:
                for la in range(start, end, PAGE):
                    mmu.invlpg(la)
            self.san.note(TlbFlushed(number, start, end, self.flushes))

    def read(self, cpu: int, la: int) -> int:
        return self.mmus[cpu].translate(la, Access.READ)

    def write(self, cpu: int, la: int) -> int:
        return self.mmus[cpu].translate(la, Access.WRITE)

    def vmalloc(self, size: int = PAGE) -> int:
        la = self.kernel.vmalloc.vmalloc(size, 0)
        assert la
        return la

    @property
    def found(self) -> Finding:
        """The only finding."""
        finding, = self.san.findings
        return finding


def test_a_read_after_vfree_is_a_use_after_unmap_while_the_area_is_lazy() -> None:
    on = Cpus()
    la = on.vmalloc()
    for cpu in (0, 1):
        on.read(cpu, la)
    on.kernel.vmalloc.vfree(la)
    assert not on.san.findings
    pa = on.read(1, la)
    found = on.found
    assert (found.kind, found.cpu, found.la, found.pa) == (Kind.USE_AFTER_UNMAP, 1, la, pa & -PAGE)
    assert found.store is not None and found.store.function == "vunmap_range_noflush" and found.now == "not mapped"
    assert found.verdict == "none yet: the area waits for the next purge"
    assert found.frame_owner == "free" and found.reached == ()
    with pytest.raises(PageFault):
        on.read(2, la)


def test_a_use_is_told_once_for_each_cpu_page_and_store() -> None:
    on = Cpus()
    la = on.vmalloc()
    for cpu in (0, 1):
        on.write(cpu, la)
    on.kernel.vmalloc.vfree(la)
    for _ in range(3):
        for cpu in (0, 1):
            on.read(cpu, la)
            on.write(cpu, la + 8)
    assert [finding.cpu for finding in on.san.findings] == [0, 1]
    counts = on.san.counts()
    assert (counts.findings, counts.repeated, counts.uses, counts.legal) == (2, 10, 12, 0)


def test_a_frame_that_was_handed_out_again_has_another_owner() -> None:
    on = Cpus()
    la = on.vmalloc()
    pfn = on.write(0, la) >> 12
    on.kernel.vmalloc.vfree(la)
    while on.kernel.pages.alloc_pages(int(GFP_KERNEL)) != pfn:
        pass
    on.write(0, la)
    assert on.found.kind is Kind.FRAME_REUSED and on.found.frame_owner == "allocated, references 1"


def test_a_frame_that_becomes_another_area_is_named() -> None:
    on = Cpus()
    la = on.vmalloc()
    on.write(0, la)
    on.kernel.vmalloc.vfree(la)
    other = on.vmalloc()
    assert on.kernel.vmalloc.vmalloc_to_pfn(other) == on.read(0, la) >> 12
    assert on.found.kind is Kind.FRAME_REUSED
    assert on.found.frame_owner.startswith(f"0x0 bytes into the vmalloc area {other:#x}")


def test_a_flush_that_skips_a_cpu_is_named_with_the_cpus_it_was_sent_to() -> None:
    on = Cpus()
    la = on.vmalloc()
    for cpu in range(3):
        on.read(cpu, la)
    on.kernel.vmalloc.vfree(la)
    on.skipped = {1}
    on.kernel.vmalloc.space.purge_vmap_area_lazy(la, la + 2 * PAGE)
    for cpu in (0, 2):
        with pytest.raises(PageFault):
            on.read(cpu, la)
    on.read(1, la)
    assert on.found.kind is Kind.USE_AFTER_UNMAP and on.found.reached == (0, 2)
    assert "covers the page but was not sent to CPU 1 (sent to 0, 2)" in on.found.verdict


def test_an_address_that_was_given_to_another_area_is_said_so() -> None:
    on = Cpus(cpus=1)
    la = on.vmalloc()
    on.read(0, la)
    on.kernel.pages.get_page(on.kernel.vmalloc.vmalloc_to_pfn(la) or 0)
    on.kernel.vmalloc.vfree(la)
    on.skipped = {0}
    on.kernel.vmalloc.space.purge_vmap_area_lazy(la, la + 2 * PAGE)
    assert on.vmalloc() == la
    on.read(0, la)
    assert on.found.kind is Kind.ADDRESS_REUSED
    assert on.found.address_owner.startswith("0x0 bytes into the vmalloc area")


def test_a_flush_whose_range_is_a_page_short_is_said_not_to_cover_the_page() -> None:
    on = Cpus(cpus=1)
    la = on.vmalloc(4 * PAGE)
    for page in range(4):
        on.read(0, la + page * PAGE)
    on.kernel.vmalloc.vfree(la)
    on.cut = 2 * PAGE  # the guard page and the last one
    on.kernel.vmalloc.space.purge_vmap_area_lazy(la, la + 5 * PAGE)
    with pytest.raises(PageFault):
        on.read(0, la + 2 * PAGE)
    on.read(0, la + 3 * PAGE)
    assert on.found.la == la + 3 * PAGE
    assert on.found.verdict.endswith(f"does not cover the page at {la + 3 * PAGE:#x}")


def test_a_flush_before_the_store_is_said_to_have_come_before_it() -> None:
    on = Cpus(cpus=2)
    la = on.vmalloc()
    on.flush_tlb_kernel_range(la, la + PAGE)
    on.read(1, la)
    on.kernel.init_mm.vunmap_range_noflush(la, la + PAGE)
    on.read(1, la)
    assert on.found.verdict.startswith("none since the store; flush") and on.found.verdict.endswith("came before it")


def test_a_flush_under_another_pcid_did_not_reach_the_entry() -> None:
    on = Cpus(cpus=2)
    mm = Mm(on.kernel.init_mm)
    assert not mm.map_user(0x40_0000, PAGE, PAGE_SHARED_DIRTY)
    mmu = on.mmus[1]
    mmu.load_cr3(mm.pgd | 5)
    mmu.fill(0x40_0000, Access.READ, True)
    mmu.load_cr3(on.kernel.init_mm.pgd | 6)
    mm.unmap_user(0x40_0000, PAGE)
    on.flush_tlb_kernel_range(0x40_0000, 0x40_1000)
    assert not on.san.findings, "nobody uses it"
    mmu.load_cr3(mm.pgd | 5 | CR3_NO_INVALIDATE)
    mmu.fill(0x40_0000, Access.READ, True)
    assert on.found.store is not None and on.found.store.function == "zap_pte_range" and on.found.user
    assert "did not reach PCID 0x5" in on.found.verdict and on.found.reached == ()


def test_a_pcid_given_to_another_process_without_a_flush_uses_the_first_ones_pages() -> None:
    on = Cpus(cpus=1)
    first, second = Mm(on.kernel.init_mm), Mm(on.kernel.init_mm)
    for mm in (first, second):
        assert not mm.map_user(0x40_0000, PAGE, PAGE_SHARED_DIRTY)
    mmu = on.mmus[0]
    mmu.load_cr3(first.pgd | 5)
    mmu.fill(0x40_0000, Access.WRITE, True)
    mmu.load_cr3(second.pgd | 5 | CR3_NO_INVALIDATE)
    mmu.fill(0x40_0000, Access.READ, True)
    assert on.found.kind is Kind.OTHER_ADDRESS_SPACE and on.found.now.startswith("frame")


def test_of_several_huge_leaves_only_the_first_flushed_leaves_the_second() -> None:
    on = Cpus(cpus=1)
    mm, la = on.kernel.init_mm, on.kernel.layout.vmalloc_start + (1 << 40)
    assert not mm.vmap_range_noflush(la, la + 2 * PMD, 16 * MIB, mm.prots.kernel, 21)
    for page in (la, la + PMD):
        on.read(0, page + 5 * PAGE)
    mm.vunmap_range_noflush(la, la + 2 * PMD)
    on.flush_tlb_kernel_range(la, la + PAGE)
    with pytest.raises(PageFault):
        on.read(0, la + 5 * PAGE)
    on.read(0, la + PMD + 5 * PAGE)
    assert on.found.entry.la == la + PMD and on.found.entry.level == 2
    assert on.found.verdict.endswith(f"does not cover the page at {la + PMD:#x}")


@pytest.mark.parametrize("skips", [False, True])
def test_a_huge_leaf_in_place_of_a_table_needs_the_flush_of_the_structure_caches(skips: bool) -> None:
    on = Cpus(cpus=2)
    mm, la = on.kernel.init_mm, on.kernel.layout.vmalloc_start + (1 << 40)
    assert not mm.vmap_range_noflush(la, la + PAGE, 16 * MIB, mm.prots.kernel, 12)
    on.read(1, la)
    on.pay(mm.vunmap_range_noflush(la, la + PAGE))
    # The PDE is cached again: INVLPG had removed it.
    with pytest.raises(PageFault):
        on.read(1, la + PAGE)
    assert not mm.vmap_range_noflush(la, la + PAGE, 16 * MIB, mm.prots.kernel, 12)
    on.read(1, la)
    mm.vunmap_range_noflush(la, la + PAGE)
    on.mmus[1].invpcid(0, 0, 0)
    on.mmus[1].tlb.shared.drop_page(la)
    on.skipped = {1} if skips else set()
    assert not mm.vmap_range_noflush(la, la + PMD, 16 * MIB, mm.prots.kernel, 21)
    if not skips:
        assert on.read(1, la + PAGE) == 16 * MIB + PAGE
        assert not on.san.findings
        return
    with pytest.raises(PageFault):
        on.read(1, la + PAGE)
    assert on.found.kind is Kind.STALE_STRUCTURE and on.found.pa is None
    assert on.found.store is not None and on.found.store.function == "pmd_free_pte_page"
    assert "was not sent to CPU 1" in on.found.verdict


def test_a_write_to_memory_made_read_only_uses_a_revoked_right() -> None:
    on = Cpus(cpus=2)
    la = on.vmalloc()
    for cpu in (0, 1):
        on.write(cpu, la)
    on.skipped = {1}
    on.kernel.init_mm.unmap_aliases = lambda: None
    err, debt = set_memory_ro(on.kernel.init_mm, la, 1)
    assert not err
    on.pay(debt)
    on.read(1, la)
    assert not on.san.findings
    on.write(1, la)
    assert on.found.kind is Kind.REVOKED_RIGHTS and on.found.store is not None
    assert on.found.store.function == "__change_page_attr" and "RW" in on.found.differs


def test_the_culprit_is_the_store_that_took_what_the_use_needs() -> None:
    on = Cpus(cpus=2)
    la = on.vmalloc()
    on.write(1, la)
    on.skipped = {1}
    set_memory_ro(on.kernel.init_mm, la, 1)
    on.kernel.vmalloc.vfree(la)
    on.read(1, la)
    assert on.found.store is not None and on.found.store.function == "vunmap_range_noflush"
    assert on.san.counts().stores > 1


def test_an_entry_that_was_filled_anew_is_not_charged_to_what_made_the_old_one_stale() -> None:
    on = Cpus(cpus=1)
    mm, la = on.kernel.init_mm, on.kernel.layout.vmalloc_start + (1 << 40)
    for _ in range(2):
        assert not mm.vmap_range_noflush(la, la + PAGE, 16 * MIB, mm.prots.kernel, 12)
        on.read(0, la)
        debt = mm.vunmap_range_noflush(la, la + PAGE)
        last = on.san.counts().stores
        on.read(0, la)
        on.pay(debt)
    assert [finding.store.number for finding in on.san.findings if finding.store is not None] == [last - 1, last]


def test_each_store_to_a_split_page_is_charged_with_its_own_part() -> None:
    on = Cpus(cpus=1)
    mm, la = on.kernel.init_mm, on.kernel.layout.vmalloc_start + (1 << 40)
    assert not mm.vmap_range_noflush(la, la + PMD, 16 * MIB, mm.prots.kernel, 21)
    on.read(0, la)
    on.skipped = {0}
    assert not change_page_attr(mm, la + 3 * PAGE, 1, set_mask=0, clear_mask=2)[0]
    for page in (7, 8):
        mm.vunmap_range_noflush(la + page * PAGE, la + (page + 1) * PAGE)
    on.read(0, la + 6 * PAGE)
    on.read(0, la + 3 * PAGE)
    assert not on.san.findings
    for page in (7, 8):
        on.read(0, la + page * PAGE)
        store = on.san.findings[-1].store
        assert store is not None and store.start == la + page * PAGE
    on.write(0, la + 3 * PAGE)
    store = on.san.findings[-1].store
    assert store is not None and store.function == "__change_page_attr"


def test_a_page_moved_within_its_area_is_moved() -> None:
    on = Cpus(cpus=1)
    la = on.vmalloc()
    on.read(0, la)
    on.kernel.init_mm.set_pte(la, 16 * MIB | on.kernel.init_mm.prots.kernel)
    on.read(0, la)
    assert on.found.kind is Kind.MOVED and on.found.now == f"frame {16 * MIB >> 12:#x}"


def test_a_store_of_the_program_to_a_page_table_is_a_culprit() -> None:
    on = Cpus(cpus=2)
    la = on.vmalloc()
    on.read(1, la)
    entry_pa = on.kernel.init_mm.lookup(la).entry_pa
    assert on.san.tables.is_table_frame(entry_pa >> 12)
    on.mmus[0].write(on.kernel.layout.va(entry_pa), bytes(8))
    on.read(1, la)
    assert on.found.store is not None and on.found.store.function == "a store of the kernel" and on.found.store.cpu == 0
    memory = on.kernel.memory
    before = memory.read(entry_pa & -PAGE, PAGE)
    on.mmus[1].invlpg(la)
    memory.write_u64(entry_pa, 0x10_0000 << 12 | 0x163)
    on.mmus[1].read(on.kernel.layout.va(0), 8)
    assert list(on.san.tables.changed(entry_pa >> 12, before, memory.read(entry_pa & -PAGE, PAGE))) == []


def test_a_repeated_run_remembers_the_fill_and_the_stores_call_trace() -> None:
    def run(track: Tracking) -> Cpus:
        on = Cpus(track=track)
        la = on.vmalloc()
        on.rip = 0x1000
        on.read(1, la)
        on.rip = 0x2000
        on.kernel.vmalloc.vfree(la)
        on.rip = 0x3000
        on.read(1, la)
        return on

    first, second = run(Tracking()), None
    assert first.found.fill is None and first.found.store is not None and not first.found.store.trace
    track = Tracking.of(first.san.findings)
    assert track.fills == {(1, first.found.la >> 12)} and track.stores == {first.found.store.number}
    second = run(track)
    fill = second.found.fill
    assert fill is not None and fill.rip == "0x1000" and fill.instructions == 0x1000
    assert "vmalloc area" in fill.address_owner and "vmalloc area" in fill.frame_owner
    assert second.found.store is not None and second.found.store.trace == ("Call Trace:",)
    assert replace(second.found, fill=None, store=None) == replace(first.found, store=None)


@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
@pytest.mark.parametrize("seed", range(8))
def test_right_sequences_of_map_touch_change_unmap_and_purge_are_silent(seed: int, kernel: str) -> None:
    rng = random.Random(seed)
    on = Cpus(kernel=kernel)
    live: dict[int, int] = {}
    read_only: set[int] = set()
    mms = [on.kernel.init_mm, *(Mm(on.kernel.init_mm) for _ in range(2))]
    for step in range(600):
        on.kernel.cpus.current = rng.randrange(3)
        match rng.randrange(8):
            case 0 | 1:
                pages = rng.choice((1, 2, 5, 40))
                live[on.vmalloc(pages * PAGE)] = pages
            case 2 if live:
                la = rng.choice(sorted(live))
                if la in read_only:
                    err, debt = set_memory_rw(on.kernel.init_mm, la, live[la])
                    read_only.discard(la)
                    on.pay(debt)
                del live[la]
                on.kernel.vmalloc.vfree(la)
            case 3 if live and step % 4 == 0:
                la = rng.choice(sorted(live))
                change = set_memory_rw if la in read_only else set_memory_ro
                read_only ^= {la}
                err, debt = change(on.kernel.init_mm, la, live[la])
                assert not err
                on.pay(debt)
            case 4 if step % 3 == 0:
                on.kernel.vmalloc.space.purge_vmap_area_lazy((1 << 64) - 1, 0)
            case 5:
                mmu, mm = rng.choice(on.mmus), rng.choice(mms)
                mmu.load_cr3(mm.pgd | mms.index(mm) | rng.choice((0, CR3_NO_INVALIDATE)))
        for _ in range(5 if live else 0):
            la = rng.choice(sorted(live))
            at = la + rng.randrange(live[la]) * PAGE
            access = on.read if la in read_only or rng.random() < 0.5 else on.write
            try:
                access(rng.randrange(3), at)
            except PageFault:
                assert kernel == "5.4", "a top-level entry that this PGD has not got yet"
    assert not on.san.findings, [lines(finding) for finding in on.san.findings]
    assert on.san.counts().marked > 40


def test_nothing_is_watched_once_everything_was_flushed() -> None:
    on = Cpus()
    areas = [on.vmalloc(50 * PAGE) for _ in range(20)]
    for la in areas:
        for page in range(50):
            on.read(page % 3, la + page * PAGE)
    for la in areas:
        on.kernel.vmalloc.vfree(la)
    assert sum(len(mmu.watch.watched) for mmu in on.mmus) == 1000
    on.kernel.vmalloc.space.purge_vmap_area_lazy((1 << 64) - 1, 0)
    assert not any(mmu.watch.watched for mmu in on.mmus)
    for mmu in on.mmus:
        mmu.validate()


def guest_run(path: Path, track: Tracking = NO_TRACKING) -> TlbSan:
    """A guest on a machine with the sanitizer on it."""
    machine = Machine(MachineConfig(memory=64 * MIB), limit=1_000_000)
    kernel, cpu = machine.kernel, machine.cpu
    san = TlbSan(kernel, track=track)

    def describe() -> Scene:
        reg = cpu.engine.reg if cpu.engine._running else cpu.reg
        return kernel_scene(kernel, 0, cpu.mmu, reg, 8)

    san.attach(cpu.mmu, 0, describe)
    machine.sink = san.note
    machine.run(load(str(path)))
    return san


GUESTS = Path(__file__).resolve().parents[2] / "guest"


def test_the_report_of_a_guest_names_instruction_task_entry_store_and_owners() -> None:
    first = guest_run(GUESTS / "stale_tlb.asm")
    finding, = guest_run(GUESTS / "stale_tlb.asm", Tracking.of(first.findings)).findings
    text = lines(finding)
    assert text[1].startswith("BUG: TLBSan: use-after-unmap in init_module+") and text[1].endswith("[stale_tlb]")
    assert text[2] == f"Read of size 8 at addr {finding.la:016x} by task stale_tlb/100 on CPU 0"
    whole = "\n".join(text)
    for line in (
        "Call Trace:\n <TASK>\n init_module+", "4K page, frame ", "rw- supervisor, global", "Filled by init_module+",
        "Made stale by vunmap_range_noflush in vfree called from init_module+",
        "Flush: none yet: the area waits for the next purge",
        "The address was, when the entry was filled: 0x0 bytes into the vmalloc area", "The frame is now: free",
    ):
        assert line in whole, whole


def test_watching_changes_nothing_that_a_guest_or_its_tlb_does() -> None:
    for name in ("stale_tlb.asm", "vm_map_ram_reuse.c", "huge_split.c"):
        program = load(str(GUESTS / name))
        plain = Machine(MachineConfig(memory=64 * MIB), limit=1_000_000)
        outcome = plain.run(program)
        machine = Machine(MachineConfig(memory=64 * MIB), limit=1_000_000)
        san = TlbSan(machine.kernel)
        san.attach(machine.cpu.mmu, 0, lambda machine=machine: Scene(machine.cpu.engine.reg("rip")))
        watched = machine.run(program)
        assert (outcome.ended, outcome.returned, outcome.faults) == (watched.ended, watched.returned, watched.faults)
        assert plain.cpu.mmu.listing() == machine.cpu.mmu.listing()
