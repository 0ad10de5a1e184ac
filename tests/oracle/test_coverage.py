"""Every kind of recorded fact is covered by a test that exists, or a reason says why it is not."""

from __future__ import annotations

import ast
import gzip
import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from coverage import COVERED
from kernel_floor import ORACLE

from emu.kernel.profile import find_profile

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("facts", "messages", "vmallocinfo", "seq", "kconfig")
Key = tuple[str, str, str, str]


def kinds() -> set[Key]:
    """All kinds of records that the recordings have."""
    if not ORACLE.exists():
        pytest.skip(f"recordings of real kernels are not at {ORACLE} (set VMEMU_ORACLE)")
    found: set[Key] = set()
    for folder in FOLDERS:
        for path in sorted((ORACLE / folder).iterdir()):
            name = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".txt")
            if folder != "facts":
                found.add((folder, name, "", ""))
                continue
            with gzip.open(path, "rt") as lines:
                for record in map(json.loads, lines):
                    kind = record["t"].rstrip("0123456789") if "s" in record else record["t"]
                    found.add((folder, name, str(record.get("cmd")), kind))
    return found


def covering(kind: Key) -> str | None:
    return next((by for row, by in COVERED.items() if all(map(fnmatchcase, kind, row))), None)


def test_every_kind_of_record_is_in_the_table() -> None:
    assert [kind for kind in sorted(kinds()) if covering(kind) is None] == []


def test_every_row_of_the_table_is_about_records_that_exist() -> None:
    found = kinds()
    assert [row for row in COVERED if not any(all(map(fnmatchcase, kind, row)) for kind in found)] == []


@pytest.mark.parametrize("by", sorted(set(COVERED.values())))
def test_a_row_names_a_test_that_exists_or_a_reason(by: str) -> None:
    if by.startswith("none: "):
        assert len(by) > len("none: ") + 20
        return
    path, _, function = by.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_most_kinds_are_reproduced_and_not_excused() -> None:
    found = [covering(kind) or "none: " for kind in kinds()]
    assert sum(not by.startswith("none: ") for by in found) >= 0.8 * len(found)


@pytest.mark.parametrize("version", ["6.12", "6.1"])
def test_the_profiles_are_built_as_the_recorded_configurations_say(version: str) -> None:
    path = ORACLE / "kconfig" / f"config-{version}.txt"
    if not path.exists():
        pytest.skip(f"recordings of real kernels are not at {ORACLE} (set VMEMU_ORACLE)")
    options = dict(line.split("=", 1) for line in path.read_text().splitlines() if line.startswith("CONFIG_") and "=" in line)
    profile = find_profile(version)
    assert (options.get("CONFIG_HAVE_ARCH_HUGE_VMALLOC") == "y") == profile.huge_vmalloc
    assert options.get("CONFIG_VMAP_STACK") == "y"
    assert "CONFIG_KASAN" not in options
    assert "CONFIG_DEBUG_ATOMIC_SLEEP" not in options
