"""jiffies, timers and sleeping for a time."""

from __future__ import annotations

import pytest
from fake_sched import BASE, Deadlock
from synced import synced

from emu.kernel.task_struct import TASK_UNINTERRUPTIBLE
from emu.kernel.timer import INITIAL_JIFFIES, MAX_JIFFY_OFFSET, TICK_NSEC, bucket_expiry, msecs_to_jiffies

TIMER = BASE + 0x1000


def test_jiffies_begin_five_minutes_before_32_bits_overflow():
    _, sync = synced()
    assert sync.timers.jiffies == INITIAL_JIFFIES == 0x1_0000_0000 - 300 * 250


def test_milliseconds_round_up_to_ticks_and_negative_ones_are_for_ever():
    assert [msecs_to_jiffies(n) for n in (0, 1, 4, 5, -1)] == [0, 1, 1, 2, MAX_JIFFY_OFFSET]


def test_the_wheel_is_exact_for_63_ticks_and_then_coarser_by_8_each():
    assert bucket_expiry(1010, 1000) == 1011
    assert bucket_expiry(1100, 1000) == 1104
    assert bucket_expiry(2000, 1000) == 2048
    assert bucket_expiry(990, 1000) == 1000


def test_a_timer_runs_in_softirq_context_not_before_its_tick():
    kernel, sync = synced(1)
    seen = []
    function = kernel.function(lambda la: seen.append((la, sync.timers.jiffies, kernel.preempt(0).softirq)))

    def main() -> None:
        sync.timers.init(TIMER, function, 0)
        assert not sync.timers.mod(TIMER, sync.timers.jiffies + 5)
        assert sync.timers.pending(TIMER)

    kernel.start(main)
    kernel.run()
    assert seen == [(TIMER, INITIAL_JIFFIES + 6, 1)]
    assert not sync.timers.pending(TIMER)
    sync.validate()


def test_mod_timer_moves_a_timer_that_is_pending():
    kernel, sync = synced(1)
    seen = []
    function = kernel.function(lambda la: seen.append(sync.timers.jiffies - INITIAL_JIFFIES))

    def main() -> None:
        sync.timers.init(TIMER, function, 0)
        sync.timers.mod(TIMER, INITIAL_JIFFIES + 5)
        assert sync.timers.mod(TIMER, INITIAL_JIFFIES + 20)

    kernel.start(main)
    kernel.run()
    assert seen == [21]


def test_a_timer_that_arms_itself_for_the_past_runs_once_a_tick():
    kernel, sync = synced(1)
    ticks = []

    def again(la: int) -> None:
        ticks.append(sync.timers.jiffies - INITIAL_JIFFIES)
        if len(ticks) < 3:
            sync.timers.mod(la, INITIAL_JIFFIES)

    sync.timers.init(TIMER, kernel.function(again), 0)
    kernel.start(lambda: sync.timers.mod(TIMER, INITIAL_JIFFIES))
    kernel.run()
    assert ticks == [1, 2, 3]


def test_a_deleted_timer_does_not_run():
    kernel, sync = synced(1)
    seen = []

    def main() -> None:
        sync.timers.init(TIMER, kernel.function(seen.append), 0)
        sync.timers.mod(TIMER, INITIAL_JIFFIES + 5)
        assert sync.timers.delete_sync(TIMER) and not sync.timers.delete_sync(TIMER)

    kernel.start(main)
    kernel.run()
    assert seen == [] and sync.execution.load64(TIMER) == 0xDEAD_0000_0000_0122


def test_delete_sync_waits_for_the_function_that_runs_on_another_cpu():
    kernel, sync = synced(2)
    events = []

    def function(la: int) -> None:
        events.append("begins")
        for _ in range(5):
            kernel.pause()
        events.append("ends")

    def delete() -> None:
        while "begins" not in events:
            kernel.pause()
        assert not sync.timers.delete_sync(TIMER)
        events.append("deleted")

    sync.timers.init(TIMER, kernel.function(function), 0)
    sync.timers.mod(TIMER, INITIAL_JIFFIES)
    kernel.start(delete, 1)
    kernel.now = TICK_NSEC * 2
    kernel.run()
    assert events == ["begins", "ends", "deleted"]


def test_a_timer_that_was_shut_down_cannot_be_armed():
    _, sync = synced(1)
    sync.timers.init(TIMER, 1, 0)
    sync.timers.delete_sync(TIMER, shutdown=True)
    assert not sync.timers.mod(TIMER, INITIAL_JIFFIES + 5) and not sync.timers.pending(TIMER)


def test_msleep_sleeps_at_least_that_long():
    kernel, sync = synced(1)
    slept = []

    def main() -> None:
        sync.timers.msleep(20)
        slept.append(kernel.now)

    kernel.start(main)
    kernel.run()
    assert 20_000_000 <= slept[0] <= 28_000_000


def test_schedule_timeout_ends_early_when_the_thread_is_woken_and_tells_what_is_left():
    kernel, sync = synced(1)
    left = []
    tasks = sync.execution.tasks
    sleeper = kernel.start(lambda: left.append(sync.timers.sleep(100, "test", TASK_UNINTERRUPTIBLE)))
    kernel.start(lambda: tasks.try_to_wake_up(sleeper))
    kernel.run()
    assert left == [100]


def test_a_negative_schedule_timeout_is_an_error_that_is_printed():
    kernel, sync = synced(1)
    kernel.start(lambda: sync.timers.schedule_timeout(-5))
    kernel.run()
    assert kernel.lines == ["schedule_timeout: wrong timeout value fffffffffffffffb"]


def test_wait_for_completion_timeout_is_0_when_time_is_up_and_at_least_1_otherwise():
    kernel, sync = synced(2)
    results = []
    sync.completions.init(TIMER)
    kernel.start(lambda: results.append(sync.completions.wait(TIMER, 5)))
    kernel.run()
    sync.completions.complete(TIMER)
    results.append(sync.completions.wait(TIMER, 0))
    assert results == [0, 1]


def test_down_timeout_gives_up():
    kernel, sync = synced(1)
    results = []
    kernel.start(lambda: results.append(sync.semaphores.down(TIMER, 3)))
    kernel.run()
    assert results == [False]


def test_udelay_keeps_the_cpu_and_time_goes_on():
    kernel, sync = synced(1)
    order = []

    def main() -> None:
        sync.timers.delay(50_000)
        order.append("delayed")

    kernel.start(main)
    kernel.start(lambda: order.append("other"))
    kernel.run()
    assert order == ["delayed", "other"] and kernel.now >= 50_000


def test_usleep_range_lets_others_run():
    kernel, sync = synced(1)
    order = []
    kernel.start(lambda: (sync.timers.sleep_ns(50_000, "usleep_range"), order.append("slept")))
    kernel.start(lambda: order.append("other"))
    kernel.run()
    assert order == ["other", "slept"]


def test_a_thread_that_sleeps_without_an_end_is_a_deadlock_and_one_with_a_timeout_is_none():
    kernel, sync = synced(1)
    kernel.start(lambda: sync.timers.sleep((1 << 63) - 1, "for ever"), comm="sleeper")
    with pytest.raises(Deadlock, match="'sleeper': 'for ever'"):
        kernel.run()
