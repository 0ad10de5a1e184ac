"""Policies: who runs next and for how long, and the strings that name schedules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.turns import (
    FAIR,
    NMI,
    NOBODY,
    PLAIN,
    Alone,
    Plain,
    RandomTurns,
    RoundRobin,
    Scheduled,
    Step,
    Turn,
    after,
    format_schedule,
    parse_schedule,
)


class Clock:
    """Counts that a test sets."""

    def __init__(self, *executed: int) -> None:
        self.counts = list(executed)

    def executed(self, cpu: int) -> int:
        return self.counts[cpu]


_STEPS = st.builds(
    lambda cpu, at, what: Step(cpu, at, *what),
    st.integers(0, 3), st.integers(0, 1 << 40),
    st.tuples(st.integers(0, 3), st.none()) | st.tuples(st.none(), st.just(NMI) | st.integers(32, 255)),
)


# ---- strings


@given(st.lists(_STEPS, max_size=6))
def test_a_schedule_is_the_same_after_it_was_written_down(steps):
    assert parse_schedule(format_schedule(steps), 4) == tuple(steps)


def test_a_schedule_without_steps_is_written_plain():
    assert format_schedule(()) == PLAIN == "plain"
    assert parse_schedule("plain", 1) == ()


def test_steps_are_written_as_the_user_writes_them():
    steps = (Step(0, 153, 1), Step(1, 20, vector=NMI), Step(1, 20, vector=0xFD))
    assert format_schedule(steps) == "0@153>1,1@20!nmi,1@20!0xfd"


def test_vectors_may_be_decimal_and_steps_spaced():
    assert parse_schedule(" 0@1!32 , 0@2>1", 2) == (Step(0, 1, vector=32), Step(0, 2, 1))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"), ("0@1", "'0@1'"), ("0@1>", "'0@1>'"), ("0@-1>1", "'0@-1>1'"), ("0@1!nmi,", "''"), ("plain,0@1>1", "'plain'"),
        ("0@1>1;1@2>0", "'0@1>1;1@2>0'"), ("0@1>2", "CPU 2"), ("2@1>0", "CPU 2"), ("0@1!31", "vector 31"),
        ("0@1!256", "vector 256"), ("0@1!0xFD", "'0@1!0xFD'"), ("0@1>1,0@x>1", "'0@x>1'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_the_part_that_is_wrong(text, named):
    with pytest.raises(ValueError, match=r"^schedule ") as refused:
        parse_schedule(text, 2)
    assert named in str(refused.value)


# ---- who is next


@pytest.mark.parametrize(("ready", "last", "following"), [((0, 2), 0, 2), ((0, 2), 2, 0), ((0, 2), 1, 2), ((3,), NOBODY, 3)])
def test_the_next_cpu_is_the_next_ready_one_in_a_ring(ready, last, following):
    assert after(ready, last) == following


def test_round_robin_gives_every_cpu_its_quantum_in_turn():
    policy, last, turns = RoundRobin(7), NOBODY, []
    for _ in range(5):
        turn = policy.turn((0, 1, 3), last, False, Clock(0, 0, 0, 0))
        turns.append(turn)
        last = turn.cpu
    assert turns == [Turn(0, 7), Turn(1, 7), Turn(3, 7), Turn(0, 7), Turn(1, 7)]


@pytest.mark.parametrize("quantum", [0, -1])
def test_a_quantum_below_one_is_refused(quantum):
    with pytest.raises(ValueError, match=f"quantum is {quantum}"):
        RoundRobin(quantum)


def test_a_cpu_alone_runs_until_it_stops():
    assert Alone().turn((0,), 0, False, Clock(5)) == Turn(0, None)


def test_random_turns_are_those_of_their_seed():
    def turns(seed: int) -> list[Turn]:
        policy = RandomTurns(seed)
        return [policy.turn((0, 1, 2), NOBODY, False, Clock(0, 0, 0)) for _ in range(50)]

    assert turns(1) == turns(1) != turns(2)
    assert {turn.cpu for turn in turns(1)} == {0, 1, 2}
    assert all(turn.budget is not None and 1 <= turn.budget <= 1 << 10 for turn in turns(1))


def test_nothing_arrives_from_outside_unless_a_schedule_says_so():
    for policy in (RoundRobin(), Alone(), RandomTurns(0), Plain(), Scheduled([Step(0, 1, 1)])):
        assert list(policy.due(0, 100)) == []


# ---- the plain schedule


def test_a_cpu_keeps_its_turn_while_it_can_go_on():
    policy, clock = Plain(), Clock(0, 0)
    assert policy.turn((0, 1), NOBODY, False, clock).cpu == 0
    clock.counts[0] = 50
    assert policy.turn((0, 1), 0, False, clock).cpu == 0


@pytest.mark.parametrize(("ready", "paused"), [((1,), False), ((0, 1), True)])
def test_it_loses_its_turn_by_having_nothing_to_do_or_by_pause(ready, paused):
    policy, clock = Plain(), Clock(0, 0)
    policy.turn((0, 1), NOBODY, False, clock)
    clock.counts[0] = 50
    assert policy.turn(ready, 0, paused, clock).cpu == 1


def test_it_loses_its_turn_after_so_many_instructions_while_others_wait():
    policy, clock = Plain(), Clock(0, 0)
    assert policy.turn((0, 1), NOBODY, False, clock) == Turn(0, FAIR)
    clock.counts[0] = FAIR - 1
    assert policy.turn((0, 1), 0, False, clock).budget == 1
    clock.counts[0] = FAIR
    assert policy.turn((0, 1), 0, False, clock) == Turn(1, FAIR)


def test_alone_it_goes_on_for_as_many_again():
    policy, clock = Plain(), Clock(0)
    policy.turn((0,), NOBODY, False, clock)
    clock.counts[0] = FAIR
    assert policy.turn((0,), 0, False, clock) == Turn(0, FAIR)


class _Looks(Plain):
    """The plain schedule with a look at the CPU every ten instructions."""

    def bound(self, cpu, budget, clock):
        return min(budget, 10)


def test_a_turn_cut_to_look_is_the_same_turn_when_it_goes_on():
    policy, clock = _Looks(), Clock(0, 0)
    assert policy.turn((0, 1), NOBODY, False, clock) == Turn(0, 10, fresh=True)
    clock.counts[0] = 10
    assert policy.turn((0, 1), 0, False, clock) == Turn(0, 10, fresh=False)
    assert policy.turn((0,), 0, True, clock).fresh
    assert policy.turn((1,), 0, False, clock) == Turn(1, 10, fresh=True)


def test_the_last_cut_of_a_full_turn_ends_it():
    policy, clock = _Looks(), Clock(0, 0)
    policy.turn((0,), NOBODY, False, clock)
    clock.counts[0] = FAIR - 5
    assert policy.turn((0,), 0, False, clock) == Turn(0, 5, fresh=False)
    clock.counts[0] = FAIR
    assert policy.turn((0,), 0, False, clock).fresh


def test_a_policy_that_takes_over_goes_on_in_the_turn_under_way():
    first, second, clock = _Looks(), Plain(), Clock(100, 0)
    first.turn((0, 1), NOBODY, False, clock)
    clock.counts[0] = 110
    second.take_over(first)
    assert second.turn((0, 1), 0, False, clock) == Turn(0, FAIR - 10, fresh=False)


# ---- a schedule


def test_a_preemption_gives_the_turn_to_the_cpu_it_names_and_only_once():
    policy, clock = Scheduled([Step(0, 5, 2)]), Clock(0, 0, 0)
    assert policy.turn((0, 1, 2), NOBODY, False, clock) == Turn(0, 5)
    clock.counts[0] = 5
    assert policy.turn((0, 1, 2), 0, False, clock).cpu == 2
    assert policy.turn((0, 1), 2, False, clock).cpu == 0
    assert not policy.waits


@pytest.mark.parametrize("ready", [(0,), (0, 1)])
def test_a_preemption_in_favour_of_a_cpu_with_nothing_to_do_is_none(ready):
    policy = Scheduled([Step(0, 5, 2)])
    assert policy.turn(ready, 0, False, Clock(5, 0, 0)).cpu == 0
    assert not policy.waits


def test_a_turn_ends_where_the_cpus_next_step_is():
    policy, clock = Scheduled([Step(0, 5, 1), Step(0, 9, 1)]), Clock(2, 0)
    assert policy.turn((0, 1), 0, False, clock).budget == 3
    clock.counts[0] = 5
    assert policy.turn((0, 1), 0, False, clock).cpu == 1
    assert policy.turn((0,), 1, False, clock) == Turn(0, 4)


def test_steps_at_one_count_follow_each_other_from_cpu_to_cpu():
    policy = Scheduled([Step(0, 5, 1), Step(1, 0, 2)])
    assert policy.turn((0, 1, 2), 0, False, Clock(5, 0, 0)).cpu == 2


def test_steps_of_one_cpu_happen_in_the_order_given():
    policy = Scheduled([Step(0, 9, 1), Step(0, 5, 2)])
    assert policy.turn((0, 1, 2), 0, False, Clock(5, 0, 0)) == Turn(0, 4)
    assert policy.turn((0, 1, 2), 0, False, Clock(9, 0, 0)).cpu == 1


def test_injections_arrive_when_their_count_is_reached_all_that_are_due_and_once():
    policy = Scheduled([Step(1, 3, vector=NMI), Step(1, 3, vector=0xFD), Step(1, 4, vector=0x40)])
    assert list(policy.due(1, 2)) == []
    assert list(policy.due(0, 9)) == []
    assert list(policy.due(1, 3)) == [NMI, 0xFD]
    assert list(policy.due(1, 3)) == []
    assert list(policy.due(1, 9)) == [0x40]


def test_an_injection_does_not_wait_behind_a_preemption_that_is_due():
    policy = Scheduled([Step(0, 5, 1), Step(0, 5, vector=NMI)])
    assert policy.turn((0, 1), 0, False, Clock(5, 0)).cpu == 1
    assert list(policy.due(0, 5)) == [NMI]
