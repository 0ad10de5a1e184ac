"""tools/bench.py: what it prints and how it ends. Its figures depend on the host and are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "alu", "stream", "tlb_miss", "tlb_miss_set_a", "map_4k", "map_2m", "page_fault", "page_fault_demand", "run_smallest", "boot",
    "memory_64g", "native",
)
INFORMATIONAL = ("page_fault_demand", "native")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def everything() -> list[dict[str, object]]:
    done = bench("--quick", "--json")
    assert done.returncode in (0, 1), done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (1 if any(result["ok"] is False for result in results) else 0)
    return results


def test_json_is_one_object_a_benchmark_in_the_order_of_the_list(everything: list[dict[str, object]]) -> None:
    assert tuple(result["name"] for result in everything) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_result_has_name_value_unit_bound_and_verdict(everything: list[dict[str, object]], name: str) -> None:
    result = next(result for result in everything if result["name"] == name)
    assert set(result) - {"detail", "skipped"} == {"name", "value", "unit", "bound", "sense", "ok"}
    value, bound = result["value"], result["bound"]
    if value is None:
        assert result["skipped"]
        return
    assert isinstance(value, float) and value > 0
    if name in INFORMATIONAL:
        assert (bound, result["sense"], result["ok"]) == (None, None, None)
    else:
        assert isinstance(bound, (int, float))
        assert result["ok"] is (value >= bound if result["sense"] == ">=" else value <= bound)


def test_the_table_has_a_row_for_each_benchmark_named() -> None:
    done = bench("--quick", "map_2m", "map_4k")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["map_2m", "map_4k"]


def test_list_names_every_benchmark_without_running_any() -> None:
    done = bench("--list")
    assert done.returncode == 0
    assert tuple(line.split()[0] for line in done.stdout.splitlines()) == NAMES


@pytest.mark.parametrize("arguments", [("map_4k", "no_such"), ("--no-such",)])
def test_a_wrong_name_or_option_is_one_line_and_exit_2(arguments: tuple[str, ...]) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no" in done.stderr and "such" in done.stderr


def test_the_document_describes_every_benchmark() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}`" not in text] == []
