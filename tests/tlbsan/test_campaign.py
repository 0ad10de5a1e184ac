"""No false report: right guests stay silent under random schedules, and the same campaign is not silent when a flush is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from planted import skip_the_call

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import tlbsan_campaign  # noqa: E402
from tlbsan_guests import random_guest  # noqa: E402


def test_right_guests_give_no_report_under_random_schedules() -> None:
    campaign = tlbsan_campaign.run(300, 2, seed=1_000_000)
    assert campaign.schedules == 300 and campaign.marked > 10_000
    assert not campaign.reports, campaign.reports[0]
    assert not campaign.otherwise, campaign.otherwise[0]


def test_the_campaign_runs_guests_of_every_kind() -> None:
    names = {Path(program.path).name for program in tlbsan_campaign.right_guests()}
    assert {"purge_then_fault.asm", "invlpgb.asm", "percpu_every_cpu.asm", "debug_pagealloc_flush.asm"} <= names
    assert not {"stale_read_other_cpu.asm", "racy_publish.asm", "hello.asm"} & names


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_generated_guests_show_a_cpu_that_is_not_flushed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_the_call(monkeypatch, 1)
    campaign = tlbsan_campaign.Campaign()
    tlbsan_campaign.run_guest(tlbsan_campaign.generated_guest(seed), range(3), 1, campaign)
    assert campaign.reports
    assert all(" on CPU 1\n" in report for _, _, report in campaign.reports)


def test_a_seed_always_generates_the_same_guest() -> None:
    assert [random_guest(seed) for seed in range(5)] == [random_guest(seed) for seed in range(5)]
    assert len({random_guest(seed) for seed in range(5)}) == 5
