"""/proc/vmallocinfo: each row of a recorded kernel is what a row with the same fields prints."""

from __future__ import annotations

import re

import pytest
from after_run import ran
from kernel_floor import ORACLE

from emu.kernel.vmallocinfo import VmallocInfoRow, vmallocinfo

ROW = re.compile(
    r"0x(?P<start>[0-9a-f]{16})-0x(?P<end>[0-9a-f]{16}) +\d+(?: (?P<caller>\S+\+0x\S+(?: \[\w+\])?))?(?: pages=(?P<pages>\d+))?"
    r"(?: phys=0x(?P<phys>[0-9a-f]{16}))?(?P<tags>(?: ioremap| sparse| vmalloc| vmap| user| dma-coherent)*)(?P<vpages> vpages)?"
    r"(?P<nodes>(?: N\d+=\d+)*)"
)


def parsed(text: str) -> VmallocInfoRow:
    """The fields of a row."""
    start, end = (int(text[at : at + 16], 16) for at in (2, 21))
    for kind, words in (("vm_map_ram", " vm_map_ram"), ("unpurged", " unpurged vm_area")):
        if text.endswith(words):
            return VmallocInfoRow(start, end, kind)
    match = ROW.fullmatch(text)
    assert match is not None, text
    nodes = tuple((int(n), int(count)) for n, count in re.findall(r"N(\d+)=(\d+)", match["nodes"]))
    return VmallocInfoRow(
        start, end, caller=match["caller"], nr_pages=int(match["pages"] or 0), phys_addr=int(match["phys"] or "0", 16),
        tags=tuple(match["tags"].split()), vpages=bool(match["vpages"]), nodes=nodes,
    )


@pytest.mark.parametrize("version", ["6.12", "6.1"])
@pytest.mark.parametrize("moment", ["boot", "after-hold"])
def test_the_recorded_rows_are_printed_to_the_letter(version: str, moment: str) -> None:
    path = ORACLE / "vmallocinfo" / f"main-{version}-4l.{moment}.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = [line for line in path.read_text().splitlines() if line.startswith("0x")]
    assert len(rows) > 20
    assert [parsed(line).text() for line in rows] == rows


def test_a_guests_areas_are_rows_with_their_tags() -> None:
    _, machine = ran(
        "mov edi, 600 * 4096\ncall vmalloc\nmov edi, 4096\ncall vmalloc_user\nmov edi, 0xfed00000\nmov esi, 4096\ncall ioremap\n"
        "mov edi, 4096\ncall vmalloc\nmov rdi, rax\ncall vfree"
    )
    rows = [row for row in vmallocinfo(machine.kernel.vmalloc, machine.kernel.symbol_text) if "guest" in (row.caller or row.kind)]
    assert {(row.tags, row.nr_pages, row.vpages, row.phys_addr) for row in rows} == {
        (("vmalloc",), 600, True, 0), (("vmalloc",), 2, False, 0), (("vmalloc", "user"), 1, False, 0),
        (("ioremap",), 0, False, 0xFED0_0000),
    }
    assert any(row.kind == "unpurged" for row in vmallocinfo(machine.kernel.vmalloc, machine.kernel.symbol_text))
