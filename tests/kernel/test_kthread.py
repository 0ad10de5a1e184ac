"""Kernel threads that modules start."""

from __future__ import annotations

import errno

import pytest
from fake_sched import BASE, Deadlock, FakeKernel

from emu.kernel.execution import MASK64, Execution
from emu.kernel.kthread import Kthreads
from emu.kernel.task_struct import STATE, TASK_INTERRUPTIBLE
from emu.mmu.fault import PageFault


def kthreads(cpus: int = 2) -> tuple[FakeKernel, Execution, Kthreads]:
    kernel = FakeKernel(cpus)
    run = Execution(kernel, kernel)
    kernel.on_irq[0xF6] = run.run_irq_work
    return kernel, run, Kthreads(run, lambda function: function())


def test_a_new_thread_sleeps_until_it_is_woken():
    kernel, _, made = kthreads()
    ran = []
    made.create(kernel.function(ran.append), 7, "worker")
    task = made.create(kernel.function(ran.append), 8, "worker")
    made.wake_up_process(task)
    with pytest.raises(Deadlock):
        kernel.run()
    assert ran == [8]


def test_kthread_stop_returns_what_the_function_returned():
    kernel, _, made = kthreads()
    results = []

    def loop(argument: int) -> int:
        while not made.should_stop():
            kernel.pause()
        return 42

    def main() -> None:
        task = made.create(kernel.function(loop), 0, "loop")
        made.wake_up_process(task)
        kernel.pause()
        results.append(made.stop(task))
        assert made.find(task) is None

    kernel.start(main)
    kernel.run()
    assert results == [42]


def test_kthread_stop_of_a_thread_that_never_ran_is_eintr():
    kernel, _, made = kthreads()
    results = []
    kernel.start(lambda: results.append(made.stop(made.create(kernel.function(results.append), 0, "never"))))
    kernel.run()
    assert results == [-errno.EINTR & MASK64]


def test_kthread_stop_wakes_a_thread_that_sleeps():
    kernel, run, made = kthreads()
    results = []

    def sleeper(argument: int) -> int:
        while True:
            run.tasks.set_state(run.current(), TASK_INTERRUPTIBLE)
            if made.should_stop():
                return 1
            run.schedule()

    def main() -> None:
        task = made.create(kernel.function(sleeper), 0, "sleeper")
        made.wake_up_process(task)
        for _ in range(3):
            kernel.pause()
        results.append(made.stop(task))

    kernel.start(main)
    kernel.run()
    assert results == [1]


def test_kthread_stop_of_what_is_no_thread_faults_where_linux_follows_its_pointers():
    _, _, made = kthreads()
    with pytest.raises(PageFault) as fault:
        made.stop(0x5000)
    assert fault.value.la == 0x5000 + 44
    with pytest.raises(PageFault) as fault:
        made.stop(BASE + 0x1000)
    assert fault.value.la == 0


def test_a_thread_that_ended_by_itself_is_gone_for_kthread_stop():
    kernel, _, made = kthreads()
    faults = []

    def main() -> None:
        task = made.create(kernel.function(lambda argument: 0), 0, "short")
        made.wake_up_process(task)
        for _ in range(4):
            kernel.pause()
        try:
            made.stop(task)
        except PageFault as fault:
            faults.append(fault.la)

    kernel.start(main)
    kernel.run()
    assert faults == [0]


def test_threads_go_to_the_cpu_with_the_fewest_of_them():
    _, run, made = kthreads(3)
    where = [run.tasks.find(made.create(0, 0, "t")).thread.cpu for _ in range(4)]
    assert where == [1, 2, 0, 1]


def test_of_cpus_with_equally_many_threads_the_next_one_is_taken():
    kernel, run, made = kthreads(3)
    kernel.cpus.current = 1
    assert run.tasks.find(made.create(0, 0, "t")).thread.cpu == 2


def test_kthread_stop_ends_a_thread_that_is_parked():
    kernel, _, made = kthreads()
    results = []

    def body(argument: int) -> int:
        while not made.should_stop():
            made.parkme()
            kernel.pause()
        return 9

    def main() -> None:
        task = made.create(kernel.function(body), 0, "parker")
        made.wake_up_process(task)
        made.park(task)
        results.append(made.stop(task))

    kernel.start(main)
    kernel.run()
    assert results == [9]


def test_state_stands_behind_the_24_bytes_of_thread_info():
    _, run, _ = kthreads(1)
    task = run.tasks.current()
    run.tasks.set_state(task.thread, TASK_INTERRUPTIBLE)
    assert run.load32(task.address + 24) == TASK_INTERRUPTIBLE


def test_kthread_bind_says_where_a_thread_begins():
    kernel, _, made = kthreads(3)
    where = []
    task = made.create(kernel.function(lambda argument: where.append(kernel.cpus.current)), 0, "bound")
    made.bind(task, 2)
    made.wake_up_process(task)
    kernel.run()
    assert where == [2]


def test_set_cpus_allowed_moves_the_thread_that_calls_it():
    kernel, run, made = kthreads(2)
    where = []

    def body(argument: int) -> None:
        where.append(kernel.cpus.current)
        assert made.set_cpus_allowed(run.tasks.current().address, [1]) == 0
        where.append(kernel.cpus.current)

    made.wake_up_process(made.create(kernel.function(body), 0, "mover", cpu=0))
    kernel.run()
    assert where == [0, 1]


def test_set_cpus_allowed_without_an_online_cpu_is_einval():
    _, run, made = kthreads(2)
    assert made.set_cpus_allowed(run.tasks.current().address, [2, 63]) == -errno.EINVAL


def test_a_parked_thread_goes_on_when_it_is_unparked():
    kernel, _, made = kthreads()
    events = []

    def body(argument: int) -> int:
        while not made.should_stop():
            if made.should_park():
                events.append("parks")
                made.parkme()
                events.append("goes on")
            kernel.pause()
        return 0

    def main() -> None:
        task = made.create(kernel.function(body), 0, "parker")
        made.wake_up_process(task)
        assert made.park(task) == 0
        events.append("parked")
        assert made.park(task) == -errno.EBUSY & MASK64
        made.unpark(task)
        kernel.pause()
        kernel.pause()
        made.stop(task)

    kernel.start(main)
    kernel.run()
    assert events == ["parks", "parked", "goes on"]


def test_a_wake_up_between_set_current_state_and_schedule_is_not_lost():
    kernel, run, made = kthreads(1)
    tasks = run.tasks
    done = []

    def sleeper() -> None:
        thread = run.current()
        tasks.set_state(thread, TASK_INTERRUPTIBLE)
        assert made.wake_up_process(tasks.of(thread).address)
        run.schedule()
        done.append(tasks.state(thread))

    kernel.start(sleeper)
    kernel.run()
    assert done == [0]


def test_task_state_stands_where_set_current_state_writes_it():
    kernel, run, _ = kthreads(1)
    seen = []

    def sleeper() -> None:
        run.store32(run.tasks.current().address + STATE, TASK_INTERRUPTIBLE)
        run.schedule()
        seen.append("woken")

    thread = kernel.start(sleeper)
    kernel.start(lambda: seen.append(run.tasks.try_to_wake_up(thread, TASK_INTERRUPTIBLE)))
    kernel.run()
    assert seen == [True, "woken"]
