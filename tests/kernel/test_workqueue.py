"""Workqueues and delayed work."""

from __future__ import annotations

import pytest
from fake_sched import BASE
from synced import synced

from emu.kernel.timer import TICK_NSEC
from emu.kernel.workqueue import WORK_CPU_UNBOUND, WQ_ORDERED, WQ_UNBOUND
from emu.mmu.fault import PageFault

WORK = BASE + 0x1000
NO_POOL = ((1 << 31) - 1) << 21


def work_at(sync, la: int, function: int) -> int:
    sync.execution.store64(la, NO_POOL)
    sync.execution.list_init(la + 8)
    sync.execution.store64(la + 24, function)
    return la


def test_work_runs_in_a_worker_of_the_cpu_that_queued_it():
    kernel, sync = synced(2)
    seen = []
    function = kernel.function(lambda la: seen.append((la, kernel.current().comm, kernel.preempt(1).in_atomic)))

    def main() -> None:
        queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
        assert sync.workqueues.queue_work_on(WORK_CPU_UNBOUND, queue, work_at(sync, WORK, function))
        assert sync.execution.load64(WORK) & 1
        assert not sync.workqueues.queue_work_on(WORK_CPU_UNBOUND, queue, WORK)
        assert sync.workqueues.flush_work(WORK) and not sync.workqueues.flush_work(WORK)

    kernel.start(main, 1)
    kernel.run()
    assert seen == [(WORK, "kworker/1:0", False)] and not sync.execution.load64(WORK) & 1
    sync.validate()


def test_work_goes_to_the_cpu_it_is_queued_on():
    kernel, sync = synced(2)
    seen = []
    work_at(sync, WORK, kernel.function(lambda la: seen.append(kernel.cpus.current)))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
    kernel.start(lambda: sync.workqueues.queue_work_on(1, queue, WORK), 0)
    kernel.run()
    assert seen == [1]


def test_a_worker_that_sleeps_makes_room_for_the_next():
    kernel, sync = synced(1)
    seen = []
    sync.completions.init(WORK + 0x100)

    def first(la: int) -> None:
        sync.completions.wait(WORK + 0x100)
        seen.append(("first", kernel.current().comm))

    def second(la: int) -> None:
        seen.append(("second", kernel.current().comm))
        sync.completions.complete(WORK + 0x100)

    work_at(sync, WORK, kernel.function(first))
    work_at(sync, WORK + 64, kernel.function(second))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
    kernel.start(lambda: [sync.workqueues.queue_work_on(0, queue, la) for la in (WORK, WORK + 64)])
    kernel.run()
    assert seen == [("second", "kworker/0:1"), ("first", "kworker/0:0")]


def test_items_of_an_ordered_queue_run_one_after_the_other():
    kernel, sync = synced(2)
    events = []

    def body(la: int) -> None:
        events.append(("begin", la))
        kernel.pause()
        sync.timers.msleep(10)
        events.append(("end", la))

    items = [work_at(sync, WORK + 64 * n, kernel.function(body)) for n in range(3)]
    queue = sync.workqueues.find(sync.workqueues.alloc("ordered", WQ_UNBOUND | WQ_ORDERED, 0))

    def main() -> None:
        for la in items:
            sync.workqueues.queue_work_on(0, queue, la)
        sync.workqueues.flush(queue)
        events.append("flushed")

    kernel.start(main)
    kernel.run()
    assert events == [(what, la) for la in items for what in ("begin", "end")] + ["flushed"]


def test_unbound_items_run_at_the_same_time():
    kernel, sync = synced(2)
    running, most = [], []

    def body(la: int) -> None:
        running.append(la)
        most.append(len(running))
        sync.timers.msleep(10)
        running.remove(la)

    items = [work_at(sync, WORK + 64 * n, kernel.function(body)) for n in range(2)]
    queue = sync.workqueues.find(sync.workqueues.alloc("unbound", WQ_UNBOUND, 0))
    kernel.start(lambda: [sync.workqueues.queue_work_on(0, queue, la) for la in items])
    kernel.run()
    assert max(most) == 2
    assert {thread.comm for thread in kernel.threads} >= {"kworker/u4:0", "kworker/u4:1"}


def test_an_item_that_queues_itself_while_it_runs_does_not_run_twice_at_once():
    kernel, sync = synced(2)
    depth, most, runs = [], [], []
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))

    def body(la: int) -> None:
        depth.append(1)
        most.append(len(depth))
        runs.append(kernel.cpus.current)
        if len(runs) == 1:
            assert sync.workqueues.queue_work_on(1, queue, la)
            sync.timers.msleep(10)
        depth.pop()

    work_at(sync, WORK, kernel.function(body))
    kernel.start(lambda: sync.workqueues.queue_work_on(0, queue, WORK))
    kernel.run()
    assert max(most) == 1 and runs == [0, 0]


def test_cancel_work_sync_takes_back_what_is_queued_and_waits_for_what_runs():
    kernel, sync = synced(1)
    events = []

    def body(la: int) -> None:
        events.append("begin")
        sync.timers.msleep(10)
        events.append("end")

    def main() -> None:
        queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
        sync.workqueues.queue_work_on(0, queue, WORK)
        assert sync.workqueues.cancel_sync(WORK)
        assert not sync.execution.load64(WORK) & 1
        sync.workqueues.queue_work_on(0, queue, WORK)
        sync.timers.msleep(4)
        assert not sync.workqueues.cancel_sync(WORK)
        events.append("cancelled")

    work_at(sync, WORK, kernel.function(body))
    kernel.start(main)
    kernel.run()
    assert events == ["begin", "end", "cancelled"]
    sync.validate()


def test_destroy_workqueue_runs_what_is_queued_first():
    kernel, sync = synced(1)
    events = []
    work_at(sync, WORK, kernel.function(lambda la: events.append("work")))

    def main() -> None:
        la = sync.workqueues.alloc("test", 0, 0)
        sync.workqueues.queue_work_on(0, sync.workqueues.find(la), WORK)
        sync.workqueues.destroy(la)
        events.append("destroyed")
        with pytest.raises(PageFault):
            sync.workqueues.find(la)

    kernel.start(main)
    kernel.run()
    assert events == ["work", "destroyed"]


def test_idle_workers_take_the_next_item():
    kernel, sync = synced(1)
    seen = []
    work_at(sync, WORK, kernel.function(lambda la: seen.append(kernel.current().comm)))

    def main() -> None:
        queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
        for _ in range(3):
            sync.workqueues.queue_work_on(0, queue, WORK)
            sync.timers.msleep(4)

    kernel.start(main)
    kernel.run()
    assert seen == ["kworker/0:0"] * 3
    assert len(sync.workqueues.pools[0].workers) == 1


def test_the_models_own_work_runs_in_process_context():
    kernel, sync = synced(1)
    seen = []
    kernel.start(lambda: sync.workqueues.schedule_work(lambda: seen.append(kernel.current().comm)))
    kernel.run()
    assert seen == ["kworker/0:0"]


def delayed(kernel, sync, function) -> int:
    work_at(sync, WORK, kernel.function(function))
    timer_fn = kernel.function(sync.delayed_works.timer_fn)
    sync.timers.init(WORK + 32, timer_fn, 0x200000)
    return WORK


def test_delayed_work_runs_after_its_delay():
    kernel, sync = synced(1)
    seen = []
    delayed(kernel, sync, lambda la: seen.append(kernel.now))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))

    def main() -> None:
        assert sync.delayed_works.queue_on(WORK_CPU_UNBOUND, queue, WORK, 10)
        assert not sync.delayed_works.queue_on(WORK_CPU_UNBOUND, queue, WORK, 10)

    kernel.start(main)
    kernel.run()
    assert len(seen) == 1 and seen[0] >= 10 * TICK_NSEC


def test_a_cancelled_delayed_work_can_be_queued_again():
    kernel, sync = synced(1)
    seen = []
    delayed(kernel, sync, lambda la: seen.append(1))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))

    def main() -> None:
        sync.delayed_works.queue_on(0, queue, WORK, 10)
        assert sync.delayed_works.cancel_sync(WORK) and not sync.delayed_works.cancel_sync(WORK)
        assert not sync.timers.pending(WORK + 32)
        assert not sync.delayed_works.mod_on(0, queue, WORK, 5)
        assert sync.delayed_works.mod_on(0, queue, WORK, 6)

    kernel.start(main)
    kernel.run()
    assert seen == [1]


def test_flush_delayed_work_does_not_wait_for_the_timer():
    kernel, sync = synced(1)
    seen = []
    delayed(kernel, sync, lambda la: seen.append(kernel.now))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))

    def main() -> None:
        sync.delayed_works.queue_on(0, queue, WORK, 1000)
        assert sync.delayed_works.flush(WORK)

    kernel.start(main)
    kernel.run()
    assert len(seen) == 1 and seen[0] < 10 * TICK_NSEC


def test_a_worker_that_an_interrupt_needs_is_made_as_in_process_context():
    kernel, sync = synced(1)
    contexts = []
    create = kernel.create_thread

    def recorded(*arguments, **named):
        contexts.append(kernel.preempt(0).count)
        return create(*arguments, **named)

    kernel.create_thread = recorded
    kernel.on_irq[0x50] = lambda: sync.workqueues.schedule_work(lambda: contexts.append("worked"))
    kernel.send_ipi(0, 0x50)
    kernel.run()
    assert contexts == [0, "worked"]


def test_a_wake_up_while_the_next_worker_is_made_is_not_lost():
    kernel, sync = synced(1)
    create, seen = kernel.create_thread, []
    sync.completions.init(WORK + 0x100)

    def slow(*arguments, **named):
        if seen:
            # Making a thread waits for a lock, and meanwhile the completion comes.
            sync.completions.complete(WORK + 0x100)
        return create(*arguments, **named)

    kernel.create_thread = slow

    def first(la: int) -> None:
        seen.append("waits")
        sync.completions.wait(WORK + 0x100)
        seen.append("goes on")

    work_at(sync, WORK, kernel.function(first))
    work_at(sync, WORK + 64, kernel.function(lambda la: None))
    queue = sync.workqueues.find(sync.workqueues.alloc("test", 0, 0))
    kernel.start(lambda: [sync.workqueues.queue_work_on(0, queue, la) for la in (WORK, WORK + 64)])
    kernel.run()
    assert seen == ["waits", "goes on"]
