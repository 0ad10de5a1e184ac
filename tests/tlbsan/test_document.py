"""docs/tlbsan.md and docs/json.md name what there is."""

from __future__ import annotations

import json
from pathlib import Path

from emu.guest.directives import MachineOptions
from emu.report import run_json
from emu.run import run_file
from emu.tlbsan import Kind

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tlbsan.md").read_text()
JSON = (ROOT / "docs" / "json.md").read_text()


def test_every_kind_is_described() -> None:
    for kind in Kind:
        assert f"| `{kind.value}` | `{kind.name.lower().replace('_', '-')}` |" in TEXT
        assert f"`{kind.name.lower().replace('_', '-')}`" in JSON


def test_the_json_of_a_finding_says_what_the_report_says_and_is_documented() -> None:
    data = run_json(run_file(str(ROOT / "guest" / "stale_read_other_cpu.asm"), MachineOptions()))
    finding, = json.loads(json.dumps(data))["tlbsan"]
    section = JSON[JSON.index("A finding of TLBSan") : JSON.index("## vmemu explore")]
    for key in (*finding, *finding["entry"], *finding["filled"], *finding["store"]):
        assert f"`{key}`" in section, key
    assert (finding["kind"], finding["cpu"], finding["access"], finding["size"]) == ("use-after-unmap", 1, "read", 8)
    assert finding["symbol"].startswith("freed_wait+0x10/") and finding["address"] == finding["store"]["start"]
    assert finding["store"]["function"] == "vunmap_range_noflush" and finding["store"]["call"] == "vfree"
    assert finding["flush"] == "none yet: the area waits for the next purge" and finding["reached"] == []
    assert finding["frame_owner"] == "free" and finding["frame"] == finding["entry"]["frame"]
    assert finding["trace"] and finding["store"]["trace"] and finding["filled"]["symbol"].startswith("reader+0x7/")
    assert finding["title"] in "\n".join(data["log"])
    assert data["counts"]["flush"] == 0


def test_a_guest_without_findings_has_an_empty_list() -> None:
    data = run_json(run_file(str(ROOT / "guest" / "purge_then_fault.asm"), MachineOptions()))
    assert data["tlbsan"] == [] and data["counts"]["ipi"] == 3
