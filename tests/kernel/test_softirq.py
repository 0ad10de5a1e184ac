"""Softirqs, tasklets and irq_work."""

from __future__ import annotations

import pytest
from fake_sched import BASE
from synced import synced

from emu.kernel.softirq import MAX_SOFTIRQ_RESTART, Softirq

TASKLET = BASE + 0x1000


def test_a_softirq_raised_in_an_interrupt_runs_when_it_ends():
    kernel, sync = synced(1)
    seen = []
    sync.softirqs.actions[Softirq.NET_RX] = lambda: seen.append((kernel.preempt(0).count, sync.execution.irqs_disabled))

    def interrupt() -> None:
        sync.softirqs.raise_softirq(Softirq.NET_RX)
        seen.append("interrupt")

    kernel.on_irq[0x50] = interrupt
    kernel.send_ipi(0, 0x50)
    kernel.run()
    assert seen == ["interrupt", (0x100, False)]
    assert not kernel.preempt(0).in_atomic


def test_softirqs_wait_for_local_bh_enable():
    kernel, sync = synced(1)
    seen = []
    sync.softirqs.actions[Softirq.NET_RX] = lambda: seen.append("softirq")
    kernel.on_irq[0x50] = lambda: sync.softirqs.raise_softirq(Softirq.NET_RX)

    def main() -> None:
        sync.softirqs.local_bh_disable()
        kernel.send_ipi(0, 0x50)
        kernel.pause()
        kernel.pause()
        seen.append("enable")
        sync.softirqs.local_bh_enable()
        seen.append("enabled")

    kernel.start(main)
    kernel.run()
    assert seen == ["enable", "softirq", "enabled"]


def test_a_softirq_raised_by_a_thread_is_served_by_ksoftirqd():
    kernel, sync = synced(1)
    seen = []
    sync.softirqs.actions[Softirq.NET_RX] = lambda: seen.append(kernel.current().comm)

    def main() -> None:
        sync.softirqs.raise_softirq(Softirq.NET_RX)
        seen.append("raised")

    kernel.start(main)
    kernel.run()
    assert seen == ["raised", "ksoftirqd/0"]


def test_a_softirq_that_raises_itself_goes_on_ten_times_and_then_in_ksoftirqd():
    kernel, sync = synced(1)
    counts = []

    def again() -> None:
        counts.append(kernel.now)
        if len(counts) < MAX_SOFTIRQ_RESTART + 1:
            sync.softirqs.raise_softirq(Softirq.NET_RX)

    sync.softirqs.actions[Softirq.NET_RX] = again
    kernel.on_irq[0x50] = lambda: sync.softirqs.raise_softirq(Softirq.NET_RX)
    kernel.send_ipi(0, 0x50)
    kernel.run()
    assert len(set(counts[:MAX_SOFTIRQ_RESTART])) == 1 and counts[-1] > counts[0]


def test_a_tasklet_scheduled_twice_runs_once():
    kernel, sync = synced(1)
    seen = []
    sync.tasklets.init(TASKLET, kernel.function(seen.append), 77, callback=False)

    def main() -> None:
        sync.tasklets.schedule(TASKLET)
        sync.tasklets.schedule(TASKLET)

    kernel.start(main)
    kernel.run()
    assert seen == [77] and sync.execution.load64(TASKLET + 8) == 0


def test_tasklet_setup_gives_the_function_its_tasklet():
    kernel, sync = synced(1)
    seen = []
    sync.tasklets.init(TASKLET, kernel.function(seen.append), 77, callback=True)
    kernel.start(lambda: sync.tasklets.schedule(TASKLET))
    kernel.run()
    assert seen == [TASKLET]


def test_a_disabled_tasklet_runs_once_it_is_enabled_and_tasklet_kill_waits_for_it():
    kernel, sync = synced(1)
    seen = []
    sync.tasklets.init(TASKLET, kernel.function(lambda data: seen.append("tasklet")), 0, callback=False)

    def main() -> None:
        sync.execution.store32(TASKLET + 16, 1)
        sync.tasklets.schedule(TASKLET)
        for _ in range(4):
            kernel.yield_cpu()
        assert not seen
        sync.execution.store32(TASKLET + 16, 0)
        sync.tasklets.kill(TASKLET)
        seen.append("killed")

    kernel.start(main)
    kernel.run()
    assert seen == ["tasklet", "killed"]


def test_a_tasklet_that_stays_disabled_leaves_the_other_cpus_and_threads_their_time():
    kernel, sync = synced(2)
    seen = []
    sync.execution.store32(TASKLET + 16, 1)
    kernel.start(lambda: (sync.tasklets.schedule(TASKLET), kernel.yield_cpu(), seen.append("thread")))
    kernel.start(lambda: [kernel.pause() or seen.append("other") for _ in range(3)], 1)
    with pytest.raises(AssertionError, match="no end"):
        kernel.run(200)
    assert sorted(seen) == ["other"] * 3 + ["thread"]


def test_irq_work_runs_in_hard_interrupt_context_and_is_queued_once():
    kernel, sync = synced(2)
    seen = []
    function = kernel.function(lambda la: seen.append((kernel.cpus.current, kernel.preempt(kernel.cpus.current).hardirq)))
    sync.execution.store64(TASKLET + 16, function)

    def main() -> None:
        assert sync.irq_works.queue(TASKLET, 1)
        assert not sync.irq_works.queue(TASKLET, 1)
        sync.irq_works.sync(TASKLET)
        seen.append("synced")

    kernel.start(main)
    kernel.run()
    assert seen == [(1, 1), "synced"]
