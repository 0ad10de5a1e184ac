"""vmemu explore: finding the interleaving in which a guest fails, shrinking it, playing it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emu.cli import main
from emu.explore import ExploredFile, Explorer, explore_file
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.run import configure, run_file
from emu.turns import PLAIN, Scheduled, Step, format_schedule, parse_schedule

GUEST = Path(__file__).resolve().parent.parent / "guest"
RACY = str(GUEST / "racy_publish.asm")
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: .c guests cannot be compiled")


@pytest.fixture(scope="module")
def found() -> ExploredFile:
    return explore_file(RACY, MachineOptions(), 300, 2, 1)


def test_a_race_is_found_that_the_plain_schedule_does_not_show(found):
    assert run_file(RACY, MachineOptions()).ok
    assert found.found is not None and found.result is not None
    assert found.result.outcome.ended == "oops"
    assert found.schedules < 300


def test_what_is_found_needs_every_preemption_that_is_left(found):
    steps = parse_schedule(found.schedule, 2)
    assert len(steps) == 2
    for left in range(len(steps)):
        fewer = format_schedule(steps[:left] + steps[left + 1 :])
        assert run_file(RACY, MachineOptions(schedule=fewer)).ok


def test_a_schedule_string_shows_its_failure_every_time(found):
    runs = [run_file(RACY, MachineOptions(schedule=found.schedule), keep_events=True) for _ in range(10)]
    assert not runs[0].ok
    assert all(run.outcome.log == runs[0].outcome.log and run.events == runs[0].events for run in runs)


def test_a_hundred_forks_agree_with_each_other(found):
    program = load(RACY)
    config, limit = configure(program.directives.machine, MachineOptions())
    explorer = Explorer(program, config, limit)
    steps = parse_schedule(found.schedule, 2)
    first = explorer.attempt(steps)
    assert first.failures
    assert all(explorer.attempt(steps) == first for _ in range(99))


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_any_number_of_processes_finds_a_failure_and_the_same_one_each_time(jobs):
    first, second = (explore_file(RACY, MachineOptions(), 200, 2, jobs) for _ in range(2))
    assert first.found is not None
    assert (first.found, first.schedule, first.schedules) == (second.found, second.schedule, second.schedules)


@NEEDS_GCC
def test_use_under_a_lock_fails_in_no_schedule():
    explored = explore_file(str(GUEST / "locked_publish.c"), MachineOptions(), 150, 2, 2)
    assert explored.found is None
    assert explored.schedules == 150 or explored.exhausted


def test_random_schedules_find_it_too():
    explored = explore_file(RACY, MachineOptions(seed=3), 400, 0, 2)
    assert explored.found is not None


def test_the_command_prints_how_to_play_it_again_and_ends_with_1(capsys):
    assert main(["explore", RACY, "--schedules", "100"]) == 1
    lines = capsys.readouterr().out.splitlines()
    command = lines[-1]
    assert command.startswith(f"vmemu run {RACY} --schedule '")
    schedule = command.partition("--schedule ")[2].strip("'")
    assert main(["run", RACY, "--schedule", schedule]) == 1
    again = capsys.readouterr().out.splitlines()
    assert again == lines[:-3]


def test_json_has_the_schedule_and_the_run(capsys):
    assert main(["explore", RACY, "--schedules", "100", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False and parse_schedule(data["schedule"], 2)
    assert data["run"]["ended"] == "oops"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(GUEST / "hello.asm")], "number of CPUs is 1"),
        ([RACY, "--schedule", "0@1>1"], "schedule is '0@1>1'"),
        (["nowhere.asm"], "nowhere.asm"),
        ([RACY, "--schedules", "0"], "--schedules"),
        ([RACY, "--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_use_is_one_line_that_names_it(arguments, message, capsys):
    try:
        status = main(["explore", *arguments])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "0@1", "0@1>", "0@1>2", "2@1>0", "0@-1>1", "0@1!31", "0@1!256", "0@1!nmi,", "0@1>1;1@2>0", "plain,0@1>1"]
)
def test_a_schedule_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="schedule"):
        parse_schedule(text, 2)


def test_a_schedule_is_the_same_after_it_was_written_down():
    steps = (Step(0, 5, 1), Step(1, 0, vector=2), Step(1, 7, vector=0xFD), Step(1, 9, 0))
    assert parse_schedule(format_schedule(steps), 2) == steps
    assert format_schedule(()) == PLAIN and parse_schedule(PLAIN, 2) == ()


class _Clock:
    def __init__(self, executed: dict[int, int]) -> None:
        self._executed = executed

    def executed(self, cpu: int) -> int:
        return self._executed[cpu]


def test_a_preemption_in_favour_of_a_cpu_with_nothing_to_do_is_none():
    policy = Scheduled([Step(0, 5, 1)])
    assert policy.turn([0], 0, False, _Clock({0: 5, 1: 0})).cpu == 0
    policy = Scheduled([Step(0, 5, 1)])
    assert policy.turn([0, 1], 0, False, _Clock({0: 5, 1: 0})).cpu == 1


def test_a_turn_ends_where_the_next_step_is():
    policy = Scheduled([Step(0, 5, 1), Step(0, 9, 1)])
    assert policy.turn([0, 1], 0, False, _Clock({0: 2, 1: 0})).budget == 3
