"""Address spaces that come and go on several CPUs, with PCIDs and without: what Linux flushes, and what it leaves, is right."""

from __future__ import annotations

from random import Random

import pytest
from driven import PAGE, USER, Driven
from planted import keep_what_is_there

from emu.kernel.mm import PAGE_SHARED_DIRTY
from emu.tlbsan import Kind, TlbSan, lines

WAYS: dict[str, dict[str, bool | str]] = {
    "plain": {}, "pcid": {"pcid": True}, "pti": {"pti": True}, "pti-pcid": {"pti": True, "pcid": True},
    "6.1": {"kernel": "6.1", "pcid": True}, "5.4": {"kernel": "5.4", "pcid": True},
}
PAGES = 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_right_sequences_of_switch_touch_unmap_and_map_are_silent(cpus: int, way: str) -> None:
    san, succeeded = sequence(cpus, way)
    assert succeeded
    assert not san.findings, "\n".join(lines(san.findings[0]))
    # Without PCIDs every switch empties the TLB of all that is not global.
    assert san.counts().marked > (10 if WAYS[way].get("pcid") else 0)


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_the_same_sequences_are_not_when_no_pcid_is_flushed(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_what_is_there(monkeypatch)
    kinds = {finding.kind for finding in sequence(cpus, "pcid")[0].findings}
    assert kinds & {Kind.OTHER_ADDRESS_SPACE, Kind.STALE_STRUCTURE}


def sequence(cpus: int, way: str) -> tuple[TlbSan, bool]:
    """What TLBSan saw of a random sequence, the same each time, and whether all reads of mapped pages succeeded."""
    random = Random(f"{cpus} {way}")
    on = Driven(cpus, **WAYS[way])
    san = on.machine.tlbsan
    assert san is not None
    mms = on.mms(8)
    mapped = {mm.pgd: {USER} for mm in mms}
    areas: list[int] = []
    for _ in range(120):
        mm = random.choice(mms)
        pages = mapped[mm.pgd]
        match random.randrange(6):
            case 0 if pages:
                la = random.choice(sorted(pages))
                pages.discard(la)
                mm.unmap_user(la, PAGE).defer()
                on.machine.flushes.flush_tlb_page(mm.context, la)
            case 1:
                la = USER + random.randrange(PAGES) * PAGE
                if la not in pages:
                    assert not mm.map_user(la, PAGE, PAGE_SHARED_DIRTY)
                    pages.add(la)
            case 2:
                areas.append(on.kernel.vmalloc.vmalloc(PAGE, 0) or 0)
            case 3 if areas:
                on.kernel.vmalloc.vfree(areas.pop(random.randrange(len(areas))))
                if random.random() < 0.3:
                    on.kernel.vmap_blocks.vm_unmap_aliases()
        for _ in range(3):
            target = random.choice([*sorted(pages), *areas, USER])
            is_there = target != USER or USER in pages
            if is_there and on.read(random.randrange(cpus), target, mm) != "DONE":
                return san, False
    return san, True
