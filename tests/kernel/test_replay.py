"""Recorded allocation traces of real kernels replay address by address."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from emu.kernel.vmap_area import FreeVmapAreas, is_within_this_va

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
def test_a_search_that_ignores_the_shape_of_the_tree_does_not_replay(tool, path, monkeypatch, capsys):
    def lowest(self, size, align, vstart, adjust_search_size):
        return next((va for va in self if is_within_this_va(va, size, align, vstart)), None)

    monkeypatch.setattr(FreeVmapAreas, "find_lowest_match", lowest)
    monkeypatch.setattr(sys, "argv", ["replay_oracle", str(path)])
    assert tool.main() == 1
    assert "differing addresses: 0" not in capsys.readouterr().out
