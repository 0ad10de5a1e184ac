"""RCU: what a grace period waits for."""

from __future__ import annotations

from synced import synced


def test_a_callback_waits_for_a_reader_on_another_cpu():
    kernel, sync = synced(2)
    rcu, events = sync.rcu, []

    def read() -> None:
        rcu.read_lock()
        for _ in range(6):
            kernel.pause()
        events.append("reader leaves")
        rcu.read_unlock()

    def update() -> None:
        kernel.pause()
        rcu.synchronize_rcu()
        events.append("synchronized")

    kernel.start(read, 1)
    kernel.start(update, 0)
    kernel.run()
    assert events == ["reader leaves", "synchronized"]
    sync.validate()


def test_a_reader_that_was_switched_away_is_waited_for():
    kernel, sync = synced(2)
    rcu, events = sync.rcu, []

    def read() -> None:
        rcu.read_lock()
        kernel.yield_cpu()
        for _ in range(8):
            kernel.yield_cpu()
        events.append("reader leaves")
        rcu.read_unlock()

    def other() -> None:
        for _ in range(8):
            kernel.yield_cpu()

    kernel.start(read, 1)
    kernel.start(other, 1)
    kernel.start(lambda: (kernel.pause(), rcu.synchronize_rcu(), events.append("synchronized")), 0)
    kernel.run()
    assert events == ["reader leaves", "synchronized"]


def test_a_reader_that_begins_after_the_grace_period_does_not_hold_it_up():
    kernel, sync = synced(2)
    rcu, events = sync.rcu, []

    def read() -> None:
        kernel.pause()
        kernel.yield_cpu()
        rcu.read_lock()
        while "synchronized" not in events:
            kernel.yield_cpu()
            kernel.pause()
        rcu.read_unlock()

    kernel.start(read, 1)
    kernel.start(lambda: [kernel.pause() or kernel.yield_cpu() for _ in range(60)], 1)
    kernel.start(lambda: (rcu.synchronize_rcu(), events.append("synchronized")), 0)
    kernel.run()
    assert events == ["synchronized"]


def test_idle_cpus_are_quiescent():
    kernel, sync = synced(4)
    done = []
    kernel.start(lambda: (sync.rcu.synchronize_rcu(), done.append(kernel.now)), 2)
    kernel.run()
    assert len(done) == 1 and sync.rcu.completed == 1


def test_a_cpu_that_computes_without_an_end_is_quiescent_at_a_tick():
    kernel, sync = synced(2)
    done = []

    def compute() -> None:
        while not done:
            kernel.now += 100_000
            kernel.pause()

    kernel.start(compute, 1)
    kernel.start(lambda: (kernel.pause(), sync.rcu.synchronize_rcu(), done.append(True)), 0)
    kernel.run()
    assert done


def test_preemption_off_is_a_reader_too():
    kernel, sync = synced(2)
    events = []

    def compute() -> None:
        sync.execution.preempt_disable()
        for _ in range(100):
            kernel.now += 100_000
            kernel.pause()
        events.append("enabled")
        sync.execution.preempt_enable()

    kernel.start(compute, 1)
    kernel.start(lambda: (kernel.pause(), sync.rcu.synchronize_rcu(), events.append("synchronized")), 0)
    kernel.run()
    assert events == ["enabled", "synchronized"]


def test_a_tick_in_a_read_side_section_is_not_quiescent():
    kernel, sync = synced(2)
    events = []

    def read() -> None:
        sync.rcu.read_lock()
        for _ in range(100):
            kernel.now += 100_000
            kernel.pause()
        events.append("left")
        sync.rcu.read_unlock()

    kernel.start(read, 1)
    kernel.start(lambda: (kernel.pause(), sync.rcu.synchronize_rcu(), events.append("synchronized")), 0)
    kernel.run()
    assert events == ["left", "synchronized"]


def test_callbacks_run_in_softirq_context_in_the_order_of_their_queueing():
    kernel, sync = synced(1)
    seen = []

    def main() -> None:
        for n in (1, 2):
            sync.rcu.call_rcu(lambda n=n: seen.append((n, kernel.preempt(0).softirq)))
        seen.append("queued")

    kernel.start(main)
    kernel.run()
    assert seen == ["queued", (1, 1), (2, 1)]


def test_a_callback_queued_during_a_grace_period_waits_for_the_next():
    kernel, sync = synced(2)
    rcu, seen = sync.rcu, []

    def main() -> None:
        rcu.call_rcu(lambda: seen.append(rcu.completed))
        rcu.call_rcu(lambda: seen.append(rcu.completed))
        assert rcu.active

    kernel.start(main, 0)
    kernel.run()
    assert seen == [2, 2] or seen == [1, 2]
    assert rcu.completed == 2


def test_rcu_barrier_waits_for_every_callback_that_was_queued():
    kernel, sync = synced(2)
    seen = []

    def main() -> None:
        for n in range(3):
            sync.rcu.call_rcu(lambda n=n: seen.append(n))
        sync.rcu.rcu_barrier()
        seen.append("barrier")

    kernel.start(main, 1)
    kernel.run()
    assert seen == [0, 1, 2, "barrier"]


def test_poll_state_is_true_once_a_full_grace_period_has_passed():
    kernel, sync = synced(1)
    polled = []

    def main() -> None:
        cookie = sync.rcu.start_poll()
        polled.append(sync.rcu.poll_state(cookie))
        sync.rcu.synchronize_rcu()
        polled.append(sync.rcu.poll_state(cookie))

    kernel.start(main)
    kernel.run()
    assert polled == [False, True]
