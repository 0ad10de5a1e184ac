"""Completions."""

from __future__ import annotations

import pytest
from fake_sched import BASE, Deadlock, FakeKernel

from emu.kernel.completion import UINT_MAX, Completions
from emu.kernel.execution import Execution
from emu.mmu.fault import PageFault

DONE = BASE + 0x1000


def completions(cpus: int = 2) -> tuple[FakeKernel, Execution, Completions]:
    kernel = FakeKernel(cpus)
    run = Execution(kernel, kernel)
    made = Completions(run, lambda ticks, reason, state: run.block(reason, state) or ticks)
    made.init(DONE)
    return kernel, run, made


def test_complete_before_the_wait_is_kept_in_done():
    _, run, made = completions()
    made.complete(DONE)
    assert run.load32(DONE) == 1
    assert made.wait(DONE) > 0
    assert run.load32(DONE) == 0


def test_complete_wakes_the_waiter_that_came_first():
    kernel, _, made = completions(3)
    order = []
    kernel.start(lambda: (made.wait(DONE), order.append("first")), 1)
    kernel.start(lambda: (made.wait(DONE), order.append("second")), 2)

    def complete() -> None:
        for _ in range(2):
            kernel.pause()
            made.complete(DONE)
            kernel.pause()
            kernel.pause()
            order.append("completed")

    kernel.start(complete, 0)
    kernel.run()
    assert order == ["first", "completed", "second", "completed"]


def test_complete_all_is_for_waiters_to_come_too():
    _, run, made = completions()
    made.complete_all(DONE)
    made.wait(DONE)
    made.wait(DONE)
    assert run.load32(DONE) == UINT_MAX


def test_a_completion_that_nobody_completes_is_named_in_the_deadlock():
    kernel, _, made = completions()
    kernel.start(lambda: made.wait(DONE), comm="waiter")
    with pytest.raises(Deadlock, match=f"'waiter': 'completion 0x{DONE:x}'"):
        kernel.run()


def test_a_waiter_whose_count_another_took_waits_on():
    kernel, _, made = completions(1)
    order = []
    kernel.start(lambda: (made.wait(DONE), order.append("waiter")))

    def complete_and_take() -> None:
        made.complete(DONE)
        assert made.try_wait(DONE)
        kernel.yield_cpu()
        order.append("again")
        made.complete(DONE)

    kernel.start(complete_and_take)
    kernel.run()
    assert order == ["again", "waiter"]


def test_complete_on_a_wild_pointer_is_a_page_fault():
    _, _, made = completions()
    with pytest.raises(PageFault):
        made.complete(0x10)
