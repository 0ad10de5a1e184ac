"""Results as text and JSON; the commands that print what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu import report
from emu.cli import main
from emu.guest.directives import MachineOptions
from emu.guest.expect import Fault
from emu.run import run_file
from emu.trace import Delivery, FunctionCall, TlbFlushed

GUEST = Path(__file__).resolve().parent.parent / "guest"
GUARD = str(GUEST / "guard_page.asm")
HUGE = str(GUEST / "huge_leaf.asm")
SMALL = ["--memory", "64M"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a command prints on stdout; its status is `status`."""
    assert main(list(arguments)) == status
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command refuses."""
    try:
        status = main(list(arguments))
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1
    return err


def test_a_fault_is_one_line_with_what_it_has() -> None:
    assert report.fault_text(Fault(14, 2, 0x1000, 0x2000)) == "#PF error 0x0002 at 0x1000, RIP 0x2000"
    assert report.fault_text(Fault(6, None, None, 0x2000)) == "#UD, RIP 0x2000"
    assert report.vector_name(200) == "vector 200"


def test_events_are_one_line_each() -> None:
    assert report.event_text(FunctionCall(0, "vfree", (0x1000,), 0)) == "cpu0: vfree(0x1000) = 0x0"
    assert report.event_text(TlbFlushed(1, 0x1000, 0x2000)) == "cpu1: TLB flush of 0x1000-0x2000"
    assert report.event_text(TlbFlushed(0, 0, 1 << 64)) == "cpu0: TLB flush of everything"
    assert report.event_text(Delivery(0, 14, 0, 0x10, 0x20)) == "cpu0: #PF error 0x0000 CR2 0x20 RIP 0x10"


def test_the_json_of_a_run_has_what_the_document_lists() -> None:
    data = report.run_json(run_file(GUARD, MachineOptions()))
    document = (GUEST.parent / "docs" / "json.md").read_text()
    assert [key for key in data if f"`{key}`" not in document] == []
    assert [key for key in data["faults"][0] if f"`{key}`" not in document] == []
    assert data["ok"] and data["ended"] == "oops" and data["faults"][0]["name"] == "#PF"


def test_vmallocinfo_prints_the_areas_that_the_guest_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "vmallocinfo", HUGE, *SMALL).splitlines()
    assert any("2101248 init_module+0x10/0x54 [huge_leaf] pages=512 vmalloc N0=512" in line for line in lines)
    assert all(line.startswith("0xffff") and line[18] == "-" for line in lines)


@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
def test_meminfo_is_there_in_every_version(capsys: pytest.CaptureFixture[str], kernel: str) -> None:
    out = printed(capsys, "vmallocinfo", str(GUEST / "hello.asm"), "--meminfo", "--kernel", kernel, *SMALL)
    assert [line.partition(":")[0] for line in out.splitlines()] == ["VmallocTotal", "VmallocUsed", "VmallocChunk", "Percpu"]


def test_ptdump_prints_the_guests_leaves_in_the_vmalloc_area(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ptdump", HUGE, *SMALL).splitlines()
    area = lines[lines.index("---[ vmalloc() Area ]---") : lines.index("---[ Vmemmap ]---")]
    assert any(line.endswith("2M     RW         PSE     GLB NX pmd") for line in area)


def test_ptdump_of_user_tables_has_no_vmalloc_area_with_isolation(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ptdump", str(GUEST / "hello.asm"), "--user", "--pti", *SMALL).splitlines()
    area = lines[lines.index("---[ vmalloc() Area ]---") + 1 : lines.index("---[ Vmemmap ]---")]
    assert len(area) == 1 and area[0].endswith(" pgd")


@pytest.mark.parametrize("address", ["[p]+0x1000", "p", "0xffffc90000000000", "init_module", "vfree"])
def test_walk_takes_addresses_as_headers_do(capsys: pytest.CaptureFixture[str], address: str) -> None:
    lines = printed(capsys, "walk", GUARD, address, *SMALL).splitlines()
    assert lines[1].startswith("PML4E pgd [") and len(lines) >= 4


@pytest.mark.parametrize(("address", "part"), [
    ("[p", "'[' is not closed"), ("nosuch", "unknown symbol nosuch"), ("0x", "unexpected 'x'"), ("[0]", "cannot be read"),
    ("", "address"),
])
def test_walk_refuses_a_bad_address_in_one_line(capsys: pytest.CaptureFixture[str], address: str, part: str) -> None:
    assert part in refused(capsys, "walk", GUARD, address, *SMALL)


@pytest.mark.parametrize("command", [["vmallocinfo"], ["ptdump"], ["walk"]])
def test_a_missing_file_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    extra = ["0"] if command == ["walk"] else []
    assert "No such file" in refused(capsys, *command, "/nonexistent/guest.asm", *extra)


def test_a_guest_that_does_not_end_as_expected_is_status_1_and_the_state_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.asm"
    path.write_text("; expect: return 1\nsection .text\ninit_module:\n    xor eax, eax\n    ret\n")
    assert "load_module" in printed(capsys, "vmallocinfo", str(path), *SMALL, status=1)


@pytest.mark.parametrize("command", [["run"], ["vmallocinfo"], ["ptdump"], ["walk"]])
def test_json_of_every_command_is_valid_and_documented(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    extra = ["[p]"] if command == ["walk"] else []
    data = json.loads(printed(capsys, *command, GUARD, *extra, "--json", *SMALL))
    data = data[0] if isinstance(data, list) else data
    document = (GUEST.parent / "docs" / "json.md").read_text()
    inner = [key for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict) for key in value[0]]
    assert [key for key in (*data, *inner) if f"`{key}`" not in document] == []


def test_the_same_run_gives_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("vmallocinfo", GUARD, "--json", "--kaslr", "--seed", "7", *SMALL)
    assert printed(capsys, *arguments) == printed(capsys, *arguments)
