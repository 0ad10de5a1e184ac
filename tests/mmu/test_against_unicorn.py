"""The walker against Unicorn's own, over the product of everything that decides whether an access is permitted.

tools/permissions.py holds the comparison, the known differences with the SDM sections that decide them, and a run of the whole
structured product.
"""

import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import permissions

from emu.mmu.entry import US, XD, A, P

SEEDS = range(8)
CASES = 26_000  # a seed; 208,000 in all


@pytest.mark.parametrize("seed", SEEDS)
def test_every_difference_from_unicorns_walker_is_one_that_the_sdm_decides(seed: int) -> None:
    report = permissions.compare(permissions.sample(CASES, seed))
    assert report.cases == CASES
    assert report.unexplained_count == 0, "\n".join(report.unexplained)
    # The sample reaches every outcome: absent and refused, each access kind, reserved bits, protection keys, success.
    assert len(report.outcomes) >= 22, report.outcomes
    assert all(report.explained[rule.name] for rule in permissions.RULES), "a rule that explains nothing is dead"


def test_the_structured_product_agrees_for_settings_chosen_across_it() -> None:
    settings = list(permissions.every_setting())
    chosen = random.Random(3).sample(settings, 2)
    report = permissions.compare(itertools.islice(permissions.every_case(chosen), 0, None, 7))
    assert report.cases > 2000
    assert report.unexplained_count == 0, "\n".join(report.unexplained)


@pytest.mark.parametrize("bit", [P, US, XD, A])
def test_the_comparison_sees_a_walker_that_ignores_a_bit(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = permissions.OurWalker.run

    def blind(self: permissions.OurWalker, case: permissions.Case) -> permissions.Outcome:
        return run(self, case._replace(entries=tuple(entry | bit for entry in case.entries)))

    monkeypatch.setattr(permissions.OurWalker, "run", blind)
    report = permissions.compare(permissions.sample(600, 1))
    assert report.unexplained_count > 10
    assert "ours" in report.unexplained[0]


def test_the_tool_reports_and_exits_by_what_it_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert permissions.main(["--cases", "300", "--seed", "4"]) == 0
    assert "300 cases" in capsys.readouterr().out
    monkeypatch.setattr(permissions, "RULES", ())
    assert permissions.main(["--cases", "300", "--seed", "4"]) == 1
    assert "1048576 KiB leaf" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        permissions.main(["--cases", "0"])
    assert exit_.value.code == 2
