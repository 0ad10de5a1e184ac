"""`vmemu history`, `vmemu diff` and `--at`: what they print, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
STALE = str(ROOT / "guest" / "stale_tlb.asm")
RACY = str(ROOT / "guest" / "racy_stale_read.asm")
OTHER = str(ROOT / "guest" / "stale_write_other_owner.asm")


def vmemu(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command refuses its input."""
    status, out, err = vmemu(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    return err


def test_history_says_in_a_line_each_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = vmemu(capsys, "history", STALE, "[p]")
    assert (status, err) == (0, "")
    lines = [line.split(maxsplit=3) for line in out.splitlines()[1:-1]]
    assert [(step, cpu, text.split(",")[0].split()[0]) for step, cpu, _, text in lines] == [
        ("6", "cpu0", "mapped"), ("8", "cpu0", "cached"), ("12", "cpu0", "unmapped"), ("12", "cpu0", "stale"),
        ("18", "cpu0", "dropped"),
    ]
    assert "vmap_pages_range_noflush in vmalloc, from init_module+0xa/0x43 [stale_tlb]" in lines[0][3]
    assert out.splitlines()[-1] == "51 records, 23 steps"


def test_history_as_json_has_the_events_with_those_of_the_structure_caches(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = vmemu(capsys, "history", STALE, "[p]", "--json")
    found = json.loads(out)
    assert status == 0 and found["address"] == 0xFFFF_C900_0000_5000 and found["steps"] == 23 and found["forgotten"] == 0
    assert {event["what"] for event in found["events"]} >= {"mapped", "cached", "unmapped", "stale", "dropped", "table cached"}
    assert found["events"][2]["place"].startswith("init_module+0x11")
    assert vmemu(capsys, "history", STALE, "[p]", "--json")[1] == out


@pytest.mark.parametrize("address", [
    "0xffffc90000005000", "18446683600570044416", "[p]", "[p]+0x0", "0xffffc90000005000-0xffffc90000007000",
])
def test_every_form_of_an_address_means_the_same(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert vmemu(capsys, "history", STALE, address)[1].startswith("0xffffc90000005000")


def test_an_area_goes_by_the_name_that_vmallocinfo_gives_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("init_module+0xa/0x43 [stale_tlb]", "init_module+0xa/0x43"):
        assert vmemu(capsys, "history", STALE, name, "--at", "9")[1].startswith("0xffffc90000005000, CR3")
    error = refused(capsys, "history", STALE, "load_module+0x1/0x1000")
    assert "2 areas have it, at 0xffffffffc0000000, 0xffffffffc0002000" in error


@pytest.mark.parametrize("address", ["nowhere", "rax+", "1..2", "@5", "[q]", ""])
def test_an_unknown_form_of_an_address_is_refused_with_the_forms_there_are(
    capsys: pytest.CaptureFixture[str], address: str
) -> None:
    error = refused(capsys, "history", STALE, address)
    assert repr(address) in error
    assert "must be a number, SYMBOL, SYMBOL+OFFSET, [ADDRESS]" in error


def test_an_address_that_is_not_canonical_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "0x8000000000000000 is not a canonical address" in refused(capsys, "history", STALE, "0x8000000000000000")


def test_a_step_past_the_end_is_refused_by_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("history", STALE, "[p]", "--at", "24"), ("walk", STALE, "[p]", "--at", "24"), ("vmallocinfo", STALE, "--at", "24"),
        ("ptdump", STALE, "--at", "24"), ("diff", STALE, "1", "24"), ("diff", STALE, "24", "1"),
    ):
        assert refused(capsys, *arguments).endswith("step 24 is past the end: the run has 23 steps\n")


@pytest.mark.parametrize("step", ["-1", "x", "0x", "99999999999999999999"])
def test_what_is_no_step_is_refused(capsys: pytest.CaptureFixture[str], step: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["walk", STALE, "[p]", f"--at={step}"])
    assert refusal.value.code == 2
    assert step in capsys.readouterr().err


def test_history_at_a_step_shows_walk_tlbs_and_area(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = vmemu(capsys, "history", STALE, "0xffffc90000005000", "--at", "14")
    lines = out.splitlines()
    assert lines[5] == "not present"
    assert lines[6] == "CPU 0 has cached, global: 4 KiB page, physical 0x3eec8000 RW supervisor XD; stale: P"
    assert lines[7] == "CPU 0 has cached, PCID 0x0: PDE names table 0x3ee9b000 RW US X"
    assert out.splitlines()[-1] == "area: 0xffffc90000005000-0xffffc90000007000    8192 unpurged vm_area"
    _, out, _ = vmemu(capsys, "history", STALE, "0xffffc90000005000", "--at", "14", "--json")
    found = json.loads(out)
    assert (found["step"], found["walk"]["ends"]) == (14, "not present")
    assert [(one["cpu"], one["stale"]) for one in found["tlb"] if not one["table"]] == [(0, ["P"])]


def test_the_states_of_other_commands_are_those_of_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    for step, mapped in (("5", False), ("6", True), ("11", True), ("12", False)):
        walk = vmemu(capsys, "walk", STALE, "0xffffc90000005000", "--at", step)[1]
        assert ("4 KiB page" in walk) == mapped
        dump = vmemu(capsys, "ptdump", STALE, "--at", step)[1]
        assert ("0xffffc90000005000-0xffffc90000006000" in dump) == mapped
        info = vmemu(capsys, "vmallocinfo", STALE, "--at", step)[1]
        assert ("init_module+0xa/0x43 [stale_tlb]" in info) == mapped
    found = json.loads(vmemu(capsys, "vmallocinfo", STALE, "--at", "6", "--json")[1])
    assert (found["ended"], found["machine"]["max_instructions"]) == ("limit", 6)


def test_several_cpus_and_schedules_are_told_of_as_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = vmemu(capsys, "history", OTHER, "[p]", "--cpus", "3", "--json")
    other = {event["cpu"] for event in json.loads(out)["events"] if event["what"] == "cached"}
    assert other == {0, 1}
    # The schedule that `vmemu explore` finds: CPU 1 still has cached what CPU 0 unmaps.
    for schedule, stale in (("plain", []), ("0@19>1,1@11>0", [[1]])):
        _, out, _ = vmemu(capsys, "history", RACY, "0xffffc9000000a000", "--schedule", schedule, "--json")
        assert [event["cpus"] for event in json.loads(out)["events"] if event["what"] == "stale"] == stale


def test_diff_prints_what_went_and_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = vmemu(capsys, "diff", STALE, "9", "14")
    assert status == 0
    assert out.splitlines() == [
        "areas",
        "  - 0xffffc90000005000-0xffffc90000007000    8192 init_module+0xa/0x43 [stale_tlb] pages=1 vmalloc N0=1",
        "  + 0xffffc90000005000-0xffffc90000007000    8192 unpurged vm_area",
        "page tables",
        "  - 0xffffc90000005000-0xffffc90000006000 4K pa 0x3eec8000 RW A D G XD",
    ]
    found = json.loads(vmemu(capsys, "diff", STALE, "9", "14", "--json")[1])
    assert found["steps"] == [9, 14] and [one["name"] for one in found["changes"]] == ["areas", "page tables"]


def test_a_recording_is_asked_like_the_guest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "run.history")
    la = "0xffffc90000005000"
    _, whole, _ = vmemu(capsys, "history", STALE, la, "--record", path)
    status, again, _ = vmemu(capsys, "history", path, la)
    assert status == 0
    assert again.splitlines()[1:] == whole.splitlines()[1:]
    assert "init_module" in vmemu(capsys, "history", path, "init_module")[1]
    assert "no memory to read" in refused(capsys, "history", path, "[p]")
    assert "takes neither machine options" in refused(capsys, "history", path, la, "--cpus", "2")
    assert "needs the guest program" in refused(capsys, "history", path, la, "--at", "3")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    assert "cut off or was changed" in refused(capsys, "history", path, la)


def test_a_ring_that_forgot_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    out = vmemu(capsys, "history", STALE, "[p]", "--ring", "10")[1]
    assert out.splitlines()[1].startswith("the first ") and "are forgotten: --ring N or --record keeps more" in out


def test_a_run_that_does_not_end_as_its_header_says_is_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    guest = tmp_path / "wrong.asm"
    guest.write_text("; expect: return 1\nsection .text\ninit_module:\n    xor eax, eax\n    ret\n")
    status, out, err = vmemu(capsys, "history", str(guest), "init_module")
    assert status == 1 and "mapped" in out
    assert err == f"vmemu: {guest}: the run did not end as its header says: returned\n"
    assert vmemu(capsys, "walk", str(guest), "init_module", "--at", "2")[0] == 0


def test_bad_machines_and_files_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "a native machine has no history" in refused(capsys, "history", STALE, "[p]", "--native", "on")
    assert "nowhere.asm" in refused(capsys, "history", str(tmp_path / "nowhere.asm"), "1")
    assert "cannot be written: No such file or directory" in refused(
        capsys, "history", STALE, "[p]", "--record", str(tmp_path / "missing" / "x")
    )
