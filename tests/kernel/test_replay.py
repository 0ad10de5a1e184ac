"""Recorded allocation traces of real kernels replay address by address."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORACLE = Path(os.environ.get("VMEMU_ORACLE", ROOT.parent / "shared" / "oracle"))
TRACES = sorted((ORACLE / "seq").glob("*.ops.jsonl.gz"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay_oracle", ROOT / "tools" / "replay_oracle.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if not TRACES:

    def test_recorded_traces_replay():
        pytest.skip(f"no recorded traces under {ORACLE / 'seq'} (set VMEMU_ORACLE)")


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.split(".ops.")[0])
def test_a_recorded_trace_replays_with_every_address_and_the_final_tree(tool, path):
    result = tool.replay(path)
    assert result.differing == []
    assert result.tree_matches
    assert result.lists_match
    assert result.warnings == []


@pytest.mark.parametrize("path", TRACES[:1], ids=lambda path: path.name.split(".ops.")[0])
def test_the_tool_exits_1_when_an_address_differs(tool, path, monkeypatch, capsys):
    real = tool.records

    def altered(file):
        rows = real(file)
        allocated = [row for row in rows if row.get("ev") == "kalloc_va"]
        if allocated:
            allocated[100]["s"] = "0xffffc90012345000"
        return rows

    monkeypatch.setattr(tool, "records", altered)
    monkeypatch.setattr(sys, "argv", ["replay_oracle", str(path)])
    assert tool.main() == 1
    assert "differing addresses: 0" not in capsys.readouterr().out
