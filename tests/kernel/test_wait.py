"""Wait queues, whose lists stand in guest memory."""

from __future__ import annotations

import pytest
from fake_sched import BASE, Deadlock
from synced import synced

from emu.kernel.task_struct import TASK_INTERRUPTIBLE, TASK_NORMAL, TASK_UNINTERRUPTIBLE
from emu.kernel.wait import WQ_FLAG_EXCLUSIVE

HEAD = BASE + 0x1000
AUTOREMOVE, DEFAULT, WOKEN = 0x1110, 0x1120, 0x1130


def queues(cpus: int = 1):
    kernel, sync = synced(cpus)
    made = sync.wait_queues
    made.functions = {
        AUTOREMOVE: made.autoremove_wake_function, DEFAULT: made.default_wake_function, WOKEN: made.woken_wake_function,
    }
    made.autoremove_address = AUTOREMOVE
    made.init(HEAD)
    return kernel, sync, made


def wait_event(sync, entry: int, condition, flags: int = 0) -> None:
    """___wait_event() as a module's inline code does it."""
    made = sync.wait_queues
    made.init_entry(entry, flags)
    while True:
        made.prepare(HEAD, entry, TASK_UNINTERRUPTIBLE, exclusive=None)
        if condition():
            break
        sync.execution.schedule()
    made.finish(HEAD, entry)


def test_wait_event_ends_when_the_condition_holds_and_somebody_wakes_it():
    kernel, sync, made = queues()
    state = []
    kernel.start(lambda: (wait_event(sync, BASE + 0x2000, lambda: "ready" in state), state.append("over")))
    kernel.start(lambda: (made.wake_up(HEAD), kernel.yield_cpu(), state.append("ready"), made.wake_up(HEAD)))
    kernel.run()
    assert state == ["ready", "over"]
    assert sync.execution.load64(HEAD + 8) == HEAD + 8


def test_wake_up_wakes_every_waiter_and_one_exclusive_one():
    kernel, sync, made = queues()
    woken = []
    for n, flags in enumerate((0, WQ_FLAG_EXCLUSIVE, WQ_FLAG_EXCLUSIVE, 0)):
        def body(n: int = n, flags: int = flags) -> None:
            wait_event(sync, BASE + 0x2000 + 64 * n, lambda: go, flags)
            woken.append(n)

        kernel.start(body)
    go = []
    kernel.start(lambda: (go.append(1), made.wake_up(HEAD)))
    with pytest.raises(Deadlock):
        kernel.run()
    assert sorted(woken) == [0, 1, 3]


def test_wake_up_skips_tasks_that_sleep_in_another_state():
    kernel, sync, made = queues()
    woken = []
    kernel.start(lambda: (wait_event(sync, BASE + 0x2000, lambda: False), woken.append(1)), comm="waiter")
    kernel.start(lambda: woken.append(made.wake_up(HEAD, TASK_INTERRUPTIBLE)))
    with pytest.raises(Deadlock, match=f"'waiter': 'wait queue 0x{HEAD:x}'"):
        kernel.run()
    assert woken == [0]


def test_a_wake_function_of_the_guest_is_called_with_entry_mode_flags_and_key():
    kernel, sync, made = queues()
    calls = []
    function = kernel.function(lambda *arguments: calls.append(arguments))

    def main() -> None:
        made.init_entry(BASE + 0x2000, 0)
        sync.execution.store64(BASE + 0x2010, function)
        made.add(HEAD, BASE + 0x2000, exclusive=False)
        made.wake_up(HEAD, TASK_NORMAL, 1, 99)
        made.remove(HEAD, BASE + 0x2000)
        made.wake_up(HEAD)

    kernel.start(main)
    kernel.run()
    assert calls == [(BASE + 0x2000, TASK_NORMAL, 0, 99)]


def test_a_list_that_comes_back_to_an_entry_instead_of_its_head_is_walked_for_ever():
    kernel, sync, made = queues()

    def main() -> None:
        made.init_entry(BASE + 0x2000, 0)
        sync.execution.store64(HEAD + 8, BASE + 0x2000 + 24)
        made.wake_up(HEAD)

    kernel.start(main, comm="walker")
    with pytest.raises(Deadlock, match="a list without an end"):
        kernel.run()


def test_wait_woken_does_not_sleep_when_it_was_woken_before():
    kernel, sync, made = queues()
    left = []

    def main() -> None:
        made.init_entry(BASE + 0x2000, 0)
        sync.execution.store64(BASE + 0x2010, WOKEN)
        made.add(HEAD, BASE + 0x2000, exclusive=False)
        made.wake_up(HEAD)
        left.append(made.wait_woken(BASE + 0x2000, TASK_UNINTERRUPTIBLE, 10))
        left.append(made.wait_woken(BASE + 0x2000, TASK_UNINTERRUPTIBLE, 10))

    kernel.start(main)
    kernel.run()
    assert left == [10, 0]
