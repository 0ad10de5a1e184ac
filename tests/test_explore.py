"""vmemu explore: finding the interleaving in which a guest fails, shrinking it, playing it again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.cli import main
from emu.explore import Done, ExploredFile, Explorer, Recording, Task, Wandering, explore_file
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.machine import Machine
from emu.run import configure, run_file
from emu.turns import PLAIN, Plain, Scheduled, Step, format_schedule, parse_schedule

GUEST = Path(__file__).resolve().parent.parent / "guest"
REPOSITORY = GUEST.parent
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


# ---- one schedule, however it comes about


def explorer_of(path: str, **overrides) -> Explorer:
    program = load(path)
    config, limit = configure(program.directives.machine, MachineOptions(**overrides))
    return Explorer(program, config, limit)


def play(path: str, make_policy, **overrides):
    """Run a guest on a machine of its own by a policy: everything it told, how it ended, and the policy."""
    program = load(path)
    config, limit = configure(program.directives.machine, MachineOptions(**overrides))
    events: list[object] = []
    machine = Machine(config, limit=limit, sink=events.append)
    _, linked = machine.load(program)
    policy = machine.hub.policy = make_policy(machine)
    outcome = machine.run_loaded(program, linked)
    counts = [machine.hub.executed(cpu) for cpu in range(config.cpus)]
    return (events, outcome.ended, outcome.returned, outcome.log, outcome.registers, outcome.counts, counts), policy


AGREE = [
    "racy_publish.asm", "racy_counter.asm", "racy_stale_read.asm", "racy_vfree.asm", "stale_write_other_owner.asm",
    "purge_then_fault.asm",
    *(
        pytest.param(name, marks=NEEDS_GCC)
        for name in ("locked_publish.c", "deferred_work.c", "kthread_locks.c", "mutex_deadlock.c")
    ),
]


@pytest.mark.parametrize("name", AGREE)
def test_recording_the_points_of_a_run_does_not_change_it(name):
    path = str(GUEST / name)
    plain, _ = play(path, lambda machine: Scheduled(()), cpus=2)
    recorded, policy = play(path, lambda machine: Recording(machine, ()), cpus=2)
    assert policy.points
    assert recorded == plain


@pytest.mark.parametrize("name", AGREE)
def test_a_random_schedule_is_the_same_run_when_its_steps_are_played(name):
    path = str(GUEST / name)
    for seed in range(3):
        wandered, policy = play(path, lambda machine, seed=seed: Wandering(machine, Random(seed), 16), cpus=2)
        played, _ = play(path, lambda machine, steps=policy.steps: Scheduled(steps), cpus=2)
        assert played == wandered


@settings(max_examples=15, deadline=None)
@given(st.lists(st.builds(Step, st.integers(0, 1), st.integers(0, 40), st.integers(0, 1)), max_size=8))
def test_any_steps_give_the_same_run_with_and_without_a_look_at_every_instruction(steps):
    class Looking(Scheduled):
        def bound(self, cpu, budget, clock):
            return 1

    played, _ = play(RACY, lambda machine: Scheduled(steps))
    looked, _ = play(RACY, lambda machine: Looking(steps))
    assert looked == played


@settings(max_examples=15, deadline=None)
@given(st.lists(st.builds(Step, st.integers(0, 1), st.integers(0, 40), st.integers(0, 1)), max_size=8))
def test_a_fork_comes_to_what_a_machine_of_its_own_comes_to(explorer, steps):
    outcome, _ = explorer.run_here(steps)
    assert explorer.attempt(steps) == explorer.judge(outcome)


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return explorer_of(RACY)


def test_every_machine_of_a_fork_is_as_the_first_one_was(explorer, found):
    steps = parse_schedule(found.schedule, 2)
    tasks = [Task(steps)] * 16
    results = explorer.run_together(tasks)
    assert len(results) == 16 and results[0].tried.failures
    assert all(result == results[0] for result in results)


def test_two_processes_explore_alike_and_print_the_same(tmp_path):
    command = [sys.executable, "-m", "emu", "explore", RACY, "--schedules", "400", "--preemptions", "0", "--seed", "5"]
    outputs = {
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False, env={"PYTHONHASHSEED": str(n)}).stdout
        for n in range(2)
    }
    assert len(outputs) == 1 and b"--schedule" in outputs.pop()


# ---- what is found


@pytest.mark.parametrize(
    ("name", "preemptions", "shows"),
    [
        ("racy_counter.asm", 1, "expected return 2, but it returned 1"),
        ("racy_vfree.asm", 1, "Trying to vfree() nonexistent vm area"),
        ("racy_publish.asm", 2, "ended by oops"),
        ("racy_stale_read.asm", 2, "BUG: TLBSan: use-after-unmap in read_twice"),
    ],
)
@pytest.mark.parametrize(("systematic", "seed"), [(2, 0), (0, 1), (0, 2)])
def test_a_planted_race_is_found_and_shrunk_to_as_few_preemptions_as_it_needs(name, preemptions, shows, systematic, seed):
    path = str(GUEST / name)
    assert run_file(path, MachineOptions()).ok
    explored = explore_file(path, MachineOptions(seed=seed), 400, systematic, 2)
    assert explored.result is not None
    assert any(shows in failure for failure in explored.result.failures)
    assert len(parse_schedule(explored.schedule, 2)) == preemptions


@pytest.mark.parametrize("name", ["locked_counter.asm", pytest.param("locked_publish.c", marks=NEEDS_GCC)])
@pytest.mark.parametrize("preemptions", [0, 2, 3])
def test_what_is_locked_fails_in_no_schedule(name, preemptions):
    explored = explore_file(str(GUEST / name), MachineOptions(), 200, preemptions, 2)
    assert explored.found is None and explored.schedules == 200


def test_the_number_of_processes_changes_nothing(found):
    for jobs in (2, 3):
        again = explore_file(RACY, MachineOptions(), 300, 2, jobs)
        assert (again.found, again.schedule, again.schedules) == (found.found, found.schedule, found.schedules)


def tried_by(explorer: Explorer, schedules: int, preemptions: int, *, systematic: bool = False) -> list[tuple[Step, ...]]:
    """The schedules of an exploration in their order; the `systematic` ones only."""
    tried: list[tuple[Step, ...]] = []
    run_all = explorer.run_all

    def listening(tasks, seed, jobs) -> Iterator[Done]:
        for task, done in zip(tasks, run_all(tasks, seed, jobs), strict=True):
            if task.number is None or not systematic:
                tried.append(done.steps)
            yield done

    explorer.run_all = listening  # type: ignore[method-assign, assignment]
    explorer.explore(schedules, preemptions, 0)
    return tried


def test_one_preemption_is_tried_at_each_point_before_two_are():
    tried = tried_by(explorer_of(RACY), 40, 2)
    lengths = [len(steps) for steps in tried]
    assert lengths[:7] == [1] * 7 and set(lengths[7:15]) == {2}


def test_no_schedule_is_tried_twice():
    tried = tried_by(explorer_of(str(GUEST / "locked_counter.asm")), 200, 3, systematic=True)
    assert len(set(tried)) == len(tried) > 10


def test_a_guest_without_a_choice_has_one_schedule():
    explored = explorer_of(str(GUEST / "hello.asm"), cpus=2).explore(100, 2, 0)
    assert (explored.schedules, explored.exhausted, explored.found) == (1, True, None)


def test_a_guest_that_fails_in_the_plain_schedule_needs_no_preemption(tmp_path):
    path = tmp_path / "wrong.asm"
    path.write_text((GUEST / "racy_counter.asm").read_text().replace("expect: return 2", "expect: return 3"))
    explored = explore_file(str(path), MachineOptions(), 100, 2, 1)
    assert (explored.schedules, explored.found, explored.schedule) == (1, PLAIN, PLAIN)
    assert explored.result is not None and not explored.result.ok


def test_a_process_that_dies_is_an_error_not_a_result():
    class Dies(Plain):
        def turn(self, ready, last, paused, clock):
            raise RuntimeError("on purpose")

    explorer_that_dies = explorer_of(RACY)
    explorer_that_dies.make_policy = lambda task, seed, machine: Dies()
    with pytest.raises(RuntimeError, match="ended with status 256"):
        explorer_that_dies.attempt(())


def test_a_step_before_the_first_choice_is_spent_on_a_cpu_with_nothing_to_do():
    explorer = explorer_of(str(GUEST / "racy_counter.asm"))
    steps = (Step(0, 1, 1), Step(0, 14, 1))
    assert explorer.attempt(steps[1:]).failures
    assert explorer.attempt(steps) == explorer.attempt(steps[1:])
