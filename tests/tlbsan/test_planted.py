"""Bugs planted in a whole machine's kernel: each is reported at the first use it leads to, with what shows where it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from driven import PAGE, USER, Driven
from planted import SCENARIOS, keep_what_is_there, skip_the_call

from emu.kernel.tlbflush import TlbFlushes
from emu.mmu.fault import Access
from emu.tlbsan import Finding, Kind, lines

REPORTS = Path(__file__).resolve().parent / "reports"
MIB = 1 << 20
PMD = 2 * MIB
KEPT_NUMBERS = 4  # hex digits: sizes and offsets stay, addresses and frames get names
CPUS = pytest.mark.parametrize("cpus", [2, 4, 8])

# Where in the report each planted bug shows itself.
VERDICTS = {
    "call-skipped": r"flush 4 of A-B by CPU 0 \(__purge_vmap_area_lazy\) was asked of CPU {last}, which has not done it"
    r" \(done by {others}\)",
    "mask-skipped": r"flush 4 of A-B by CPU 0 \(__purge_vmap_area_lazy\) covers the page but was not sent to CPU {last}"
    r" \(sent to {others}\)",
    "short-at-start": r"flush 4 of A-B by CPU 0 \(__purge_vmap_area_lazy\) does not cover the page at C",
    "short-at-end": r"flush 4 of A-B by CPU 0 \(_vm_unmap_aliases\) does not cover the page at B",
    "flush-before-store": r"none since the store; flush 4 of A-B by CPU 0 \(free_unmap_vmap_area\) came before it;"
    r" the area waits for the next purge",
    "huge-as-one-page": r"flush 4 of A-B by CPU 0 \(free_unmap_vmap_area\) does not cover the page at C",
}


def normalised(text: str) -> str:
    """Each address and frame number replaced by a letter, the same one wherever it stands."""
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        digits = match[1].lstrip("0")
        if len(digits) < KEPT_NUMBERS:
            return match[0]
        return names.setdefault(digits, chr(ord("A") + len(names)))

    text = re.sub(r"\b0x([0-9a-f]+)\b(?!/0x)", name, text)
    return re.sub(r"\b([0-9a-f]{16})\b", name, text)


def report(finding: Finding) -> str:
    return "\n".join(lines(finding)) + "\n"


@CPUS
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_first_use_is_reported_with_what_the_kernel_did_wrong(
    name: str, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    SCENARIOS[name].plant(monkeypatch, cpus - 1)
    _, machine = SCENARIOS[name].run(cpus)
    assert machine.tlbsan is not None
    finding, = machine.tlbsan.findings
    assert finding.symbol.startswith("use_meanwhile+0x0/" if name == "flush-before-store" else "use+0x0/")
    assert (finding.cpu, finding.kind) == (cpus - 1, Kind.USE_AFTER_UNMAP)
    others = ", ".join(str(cpu) for cpu in range(cpus - 1))
    assert re.fullmatch(VERDICTS[name].format(last=cpus - 1, others=others), normalised(finding.verdict)), finding.verdict
    assert finding.reached == (tuple(range(cpus - 1)) if name.endswith("skipped") else ())
    assert finding.store is not None and finding.store.cpu == 0 and finding.store.function == "vunmap_range_noflush"
    assert finding.fill is not None, "the run was repeated"
    assert any("touched_wait+" in line for line in finding.store.trace)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_kernel_as_it_is_makes_the_same_use_fault(name: str) -> None:
    result, machine = SCENARIOS[name].run(2)
    assert machine.tlbsan is not None and not machine.tlbsan.findings
    assert result.outcome.ended == "oops" and len(result.outcome.faults) == 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_whole_report_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SCENARIOS[name].plant(monkeypatch, 1)
    _, machine = SCENARIOS[name].run(2)
    assert machine.tlbsan is not None
    assert normalised(report(machine.tlbsan.findings[0])) == (REPORTS / f"{name}.txt").read_text()


@CPUS
@pytest.mark.parametrize("planted", [False, True])
def test_an_asid_given_to_another_mm_without_a_flush_shows_the_first_ones_page(
    cpus: int, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = Driven(cpus, pcid=True)
    mms = on.mms(7)
    if planted:
        keep_what_is_there(monkeypatch)
    # The kernel itself has one of the six ASIDs.
    for mm in mms[:5]:
        assert on.read(cpus - 1, USER, mm) == "DONE"
        assert on.silent()
    on.read(cpus - 1, USER, mms[5])
    if not planted:
        assert on.silent()
        return
    on.read(cpus - 1, USER, mms[6])
    finding = on.machine.tlbsan.findings[0]  # type: ignore[union-attr]
    assert finding.kind is Kind.OTHER_ADDRESS_SPACE and finding.cpu == cpus - 1 and finding.symbol.startswith("reads+0x3/")
    assert finding.store is not None and finding.store.function == "MOV to CR3 without invalidation"
    assert (finding.la, finding.user, finding.access) == (USER, False, Access.READ)


@CPUS
@pytest.mark.parametrize("planted", [False, True])
def test_an_mm_that_changed_while_its_pcid_was_not_loaded_needs_a_flush_when_it_is(
    cpus: int, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = Driven(cpus, pcid=True)
    first, second = on.mms(2)
    on.read(cpus - 1, USER, first)
    on.read(cpus - 1, USER, second)
    if planted:
        keep_what_is_there(monkeypatch)
    first.unmap_user(USER, PAGE).defer()
    on.machine.flushes.flush_tlb_page(first.context, USER)
    ended = on.read(cpus - 1, USER, first)
    if not planted:
        assert ended == "ENDED" and on.silent()
        return
    assert ended == "DONE" and on.found.kind is Kind.USE_AFTER_UNMAP
    assert re.search(
        rf"covers the page but was not sent to CPU {cpus - 1} \(sent to no CPU\); PCID 0x\d was to be flushed when it was next",
        on.found.verdict,
    )


@CPUS
@pytest.mark.parametrize("planted", [False, True])
def test_a_huge_leaf_in_place_of_a_table_needs_the_structure_caches_flushed(
    cpus: int, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = Driven(cpus)
    mm, la, last = on.kernel.init_mm, on.kernel.layout.vmalloc_start + (1 << 40), cpus - 1
    flush = TlbFlushes.flush_tlb_kernel_range
    # What maps small pages again after their flush: the PDE is cached anew, and the page is not.
    for pages in (1, 2):
        assert not mm.vmap_range_noflush(la, la + pages * PAGE, 16 * MIB, mm.prots.kernel, 12)
        on.read(last, la)
        mm.vunmap_range_noflush(la, la + pages * PAGE).flush(on.machine, "test")
    assert not mm.vmap_range_noflush(la + PAGE, la + 2 * PAGE, 16 * MIB, mm.prots.kernel, 12)
    on.read(last, la + PAGE)
    mm.vunmap_range_noflush(la + PAGE, la + 2 * PAGE).defer()
    if planted:
        monkeypatch.setattr(
            TlbFlushes, "flush_tlb_kernel_range",
            lambda self, start, end, *, cause="": None if cause == "pmd_free_pte_page" else flush(self, start, end, cause=cause),
        )
    assert not mm.vmap_range_noflush(la, la + PMD, 16 * MIB, mm.prots.kernel, 21)
    assert on.silent()
    ended = on.read(last, la + 5 * PAGE)
    if not planted:
        assert ended == "DONE" and on.silent()
        return
    finding = on.machine.tlbsan.findings[0]  # type: ignore[union-attr]
    assert finding.kind is Kind.STALE_STRUCTURE and finding.cpu == last and finding.la == la + 5 * PAGE
    assert finding.store is not None and finding.store.function == "pmd_free_pte_page"
    assert finding.verdict.startswith("none since the store") and finding.reached == ()


def test_a_skipped_cpu_is_named_among_those_that_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Driven(4)
    la = on.kernel.vmalloc.vmalloc(PAGE, 0)
    assert la
    for cpu in range(4):
        on.read(cpu, la)
    skip_the_call(monkeypatch, 2)
    on.kernel.vmalloc.vfree(la)
    on.kernel.vmap_blocks.vm_unmap_aliases()
    assert on.read(2, la) == "DONE"
    assert on.found.reached == (0, 1, 3) and on.found.cpu == 2
