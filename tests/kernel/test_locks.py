"""Spinlocks, rwlocks, mutexes, rw_semaphores and semaphores: words in guest memory, waiters in their order."""

from __future__ import annotations

import pytest
from fake_sched import BASE, Deadlock, FakeKernel

from emu.kernel.execution import Execution
from emu.kernel.mutex import Mutexes
from emu.kernel.rwlock import QR_BIAS, QW_LOCKED, QW_WAITING, Rwlocks
from emu.kernel.rwsem import READER_BIAS, WRITER_LOCKED, Rwsems
from emu.kernel.semaphore import Semaphores
from emu.kernel.spinlock import Spinlocks
from emu.mmu.fault import PageFault

LOCK = BASE + 0x1000


def execution(cpus: int = 2) -> tuple[FakeKernel, Execution]:
    kernel = FakeKernel(cpus)
    return kernel, Execution(kernel, kernel)


def test_a_held_spinlock_is_1_in_memory_and_counts_as_one_preempt_disable():
    kernel, run = execution()
    locks = Spinlocks(run)
    locks.lock(LOCK)
    assert (run.load32(LOCK), kernel.preempt(0).preempt) == (1, 1)
    locks.unlock(LOCK)
    assert (run.load32(LOCK), kernel.preempt(0).preempt) == (0, 0)


def test_spinlock_waiters_are_served_in_the_order_in_which_they_came():
    kernel, run = execution(4)
    locks = Spinlocks(run)
    order = []

    def take() -> None:
        locks.lock(LOCK)
        order.append(kernel.cpus.current)
        kernel.pause()
        kernel.pause()
        locks.unlock(LOCK)

    for cpu in (0, 1, 2, 3):
        kernel.start(take, cpu)
    kernel.run()
    assert order == [0, 1, 2, 3]
    assert run.load32(LOCK) == 0


def test_a_later_waiter_on_a_lower_cpu_does_not_overtake():
    kernel, run = execution(3)
    locks = Spinlocks(run)
    order = []

    def take(delay: int) -> None:
        for _ in range(delay):
            kernel.pause()
        locks.lock(LOCK)
        order.append(kernel.cpus.current)
        for _ in range(5):
            kernel.pause()
        locks.unlock(LOCK)

    for cpu, delay in ((2, 0), (1, 1), (0, 2)):
        kernel.start(lambda delay=delay: take(delay), cpu)
    kernel.run()
    assert order == [2, 1, 0]


def test_the_second_waiter_of_a_spinlock_stands_in_its_tail():
    kernel, run = execution(3)
    locks = Spinlocks(run)
    words = []

    def hold() -> None:
        locks.lock(LOCK)
        kernel.pause()
        words.append(run.load32(LOCK))
        locks.unlock(LOCK)

    kernel.start(hold, 0)
    kernel.start(lambda: (locks.lock(LOCK), locks.unlock(LOCK)), 1)
    kernel.start(lambda: (locks.lock(LOCK), locks.unlock(LOCK)), 2)
    kernel.run()
    assert words == [1 | 1 << 8 | 3 << 18]


def test_a_spinlock_that_its_own_cpu_holds_never_comes():
    kernel, run = execution(1)
    locks = Spinlocks(run)
    kernel.start(lambda: (locks.lock(LOCK), locks.lock(LOCK)), comm="twice")
    with pytest.raises(Deadlock, match=r"spinlock 0x.* held by twice/100"):
        kernel.run()


def test_a_trylock_that_fails_leaves_preemption_as_it_was():
    kernel, run = execution()
    locks = Spinlocks(run)
    run.store32(LOCK, 1)
    assert not locks.trylock(LOCK)
    assert not kernel.preempt(0).in_atomic


def test_a_spinlock_waiter_with_interrupts_off_takes_none_until_it_has_the_lock():
    kernel, run = execution()
    locks = Spinlocks(run)
    seen = []
    kernel.on_irq[0x50] = lambda: seen.append(run.load32(LOCK))

    def hold() -> None:
        locks.lock(LOCK)
        kernel.pause()
        kernel.send_ipi(1, 0x50)
        kernel.pause()
        kernel.pause()
        assert not seen
        locks.unlock(LOCK)

    def wait() -> None:
        flags = locks.lock_irqsave(LOCK)
        kernel.pause()
        assert not seen
        locks.unlock_irqrestore(LOCK, flags)
        kernel.pause()
        assert seen == [0]

    kernel.start(hold, 0)
    kernel.start(wait, 1)
    kernel.run()
    assert seen == [0]


def test_a_spinlock_in_memory_that_is_not_mapped_is_a_page_fault_at_its_address():
    _, run = execution()
    with pytest.raises(PageFault) as fault:
        Spinlocks(run).lock(0x1234)
    assert fault.value.la == 0x1234


def test_memory_that_goes_away_under_a_spinning_waiter_is_the_waiters_page_fault():
    kernel, run = execution()
    locks = Spinlocks(run)
    ends = []

    def wait() -> None:
        try:
            locks.lock(LOCK)
        except PageFault as fault:
            ends.append(fault.la)

    locks.lock(LOCK)
    kernel.preempt(0).count = 0
    thread = kernel.start(wait, 1)

    def unmap() -> None:
        kernel.pause()
        kernel.all_cpus[1].read = lambda la, size: (_ for _ in ()).throw(PageFault(la, 0, 0, 0))

    kernel.start(unmap, 0)
    kernel.run()
    assert ends == [LOCK] and not kernel.acts[thread]


def test_readers_share_an_rwlock_and_a_writer_waits_for_the_last():
    kernel, run = execution(3)
    locks = Rwlocks(run)
    events = []

    def read() -> None:
        locks.read_acquire(LOCK)
        kernel.pause()
        kernel.pause()
        events.append(run.load32(LOCK))
        locks.read_release(LOCK)

    def write() -> None:
        locks.write_acquire(LOCK)
        events.append(run.load32(LOCK))
        locks.write_release(LOCK)

    kernel.start(read, 0)
    kernel.start(read, 1)
    kernel.start(write, 2)
    kernel.run()
    assert events == [2 * QR_BIAS | QW_WAITING, QR_BIAS | QW_WAITING, QW_LOCKED]
    assert run.load32(LOCK) == 0


def test_a_reader_in_an_interrupt_passes_a_writer_that_waits():
    kernel, run = execution(2)
    locks = Rwlocks(run)
    order = []

    def interrupt() -> None:
        locks.read_acquire(LOCK)
        order.append("interrupt")
        locks.read_release(LOCK)

    def read() -> None:
        locks.read_acquire(LOCK)
        kernel.pause()
        kernel.pause()
        kernel.send_ipi(0, 0x50)
        kernel.pause()
        kernel.pause()
        locks.read_release(LOCK)

    kernel.on_irq[0x50] = interrupt
    kernel.start(read, 0)
    kernel.start(lambda: (locks.write_acquire(LOCK), order.append("writer")), 1)
    kernel.run()
    assert order == ["interrupt", "writer"]


def test_a_mutex_word_is_its_owners_task_struct_and_the_flag_of_its_waiters():
    kernel, run = execution()
    mutexes = Mutexes(run)
    words = []

    def hold() -> None:
        mutexes.lock(LOCK)
        words.append(run.load64(LOCK) == run.tasks.current().address)
        kernel.pause()
        words.append(run.load64(LOCK) - run.tasks.current().address)
        mutexes.unlock(LOCK)

    kernel.start(hold, 0)
    kernel.start(lambda: (mutexes.lock(LOCK), mutexes.unlock(LOCK)), 1)
    kernel.run()
    assert words == [True, 1]
    assert run.load64(LOCK) == 0


def test_the_first_waiter_of_a_mutex_that_lost_once_is_handed_the_mutex():
    kernel, run = execution(2)
    mutexes = Mutexes(run)
    order = []

    def greedy() -> None:
        for _ in range(3):
            mutexes.lock(LOCK)
            order.append("greedy")
            kernel.pause()
            mutexes.unlock(LOCK)

    def patient() -> None:
        mutexes.lock(LOCK)
        order.append("patient")
        mutexes.unlock(LOCK)

    kernel.start(greedy, 0)
    kernel.start(patient, 1)
    kernel.run()
    assert order == ["greedy", "greedy", "patient", "greedy"]


def test_two_mutexes_taken_in_opposite_orders_deadlock_and_say_who_holds_what():
    kernel, run = execution()
    mutexes = Mutexes(run)

    def both(first: int, second: int) -> None:
        mutexes.lock(first)
        kernel.pause()
        mutexes.lock(second)

    kernel.start(lambda: both(LOCK, LOCK + 32), 0, "ab")
    kernel.start(lambda: both(LOCK + 32, LOCK), 1, "ba")
    with pytest.raises(Deadlock) as deadlock:
        kernel.run()
    assert deadlock.value.args[0] == {
        "ab": f"mutex 0x{LOCK + 32:x} held by ba/101", "ba": f"mutex 0x{LOCK:x} held by ab/100",
    }


def test_a_mutex_is_unlocked_by_whoever_says_so():
    _, run = execution()
    mutexes = Mutexes(run)
    run.store64(LOCK, BASE + 0x8000)
    mutexes.unlock(LOCK)
    assert run.load64(LOCK) == 0


def test_a_mutex_waiter_that_somebody_else_wakes_goes_on_waiting():
    kernel, run = execution()
    mutexes = Mutexes(run)
    order = []

    def hold() -> None:
        mutexes.lock(LOCK)
        kernel.pause()
        run.tasks.try_to_wake_up(waiter)
        kernel.pause()
        kernel.pause()
        order.append("unlock")
        mutexes.unlock(LOCK)

    kernel.start(hold, 0)
    waiter = kernel.start(lambda: (mutexes.lock(LOCK), order.append("lock")), 1)
    kernel.run()
    assert order == ["unlock", "lock"]


def test_readers_of_an_rwsem_share_it_and_a_waiting_writer_holds_back_later_ones():
    kernel, run = execution(3)
    rwsems = Rwsems(run)
    rwsems.init(LOCK)
    order = []

    def read(name: str, delay: int) -> None:
        for _ in range(delay):
            kernel.pause()
        rwsems.down_read(LOCK)
        order.append(name)
        for _ in range(6):
            kernel.pause()
        rwsems.up_read(LOCK)

    def write() -> None:
        kernel.pause()
        rwsems.down_write(LOCK)
        order.append("writer")
        assert run.load64(LOCK) & WRITER_LOCKED and run.load64(LOCK) < READER_BIAS
        rwsems.up_write(LOCK)

    kernel.start(lambda: read("first", 0), 0)
    kernel.start(write, 1)
    kernel.start(lambda: read("late", 3), 2)
    kernel.run()
    assert order == ["first", "writer", "late"]
    assert run.load64(LOCK) == 0


def test_up_write_wakes_all_readers_that_wait():
    kernel, run = execution(3)
    rwsems = Rwsems(run)
    rwsems.init(LOCK)
    counts = []

    def write() -> None:
        rwsems.down_write(LOCK)
        for _ in range(4):
            kernel.pause()
        rwsems.up_write(LOCK)
        counts.append(run.load64(LOCK))

    kernel.start(write, 0)
    for cpu in (1, 2):
        kernel.start(lambda: (rwsems.down_read(LOCK), rwsems.up_read(LOCK)), cpu)
    kernel.run()
    assert counts == [2 * READER_BIAS]


def test_a_downgraded_writer_lets_readers_in():
    _, run = execution()
    rwsems = Rwsems(run)
    rwsems.init(LOCK)
    rwsems.down_write(LOCK)
    rwsems.downgrade_write(LOCK)
    assert rwsems.down_read_trylock(LOCK) and not rwsems.down_write_trylock(LOCK)
    assert run.load64(LOCK) == 2 * READER_BIAS


def test_up_gives_a_semaphore_to_the_waiter_and_not_to_its_count():
    kernel, run = execution()
    semaphores = Semaphores(run, lambda ticks, reason, state: run.block(reason, state) or ticks)
    done = []
    kernel.start(lambda: done.append(semaphores.down(LOCK)), 1)
    kernel.start(lambda: (kernel.pause(), kernel.pause(), semaphores.up(LOCK), done.append(run.load32(LOCK + 4))), 0)
    kernel.run()
    assert done == [0, True]
