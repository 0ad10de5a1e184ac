"""preempt_count."""

from __future__ import annotations

from emu.kernel.preempt import PREEMPT_OFFSET, SOFTIRQ_DISABLE_OFFSET, PreemptCount, scheduling_while_atomic
from emu.memory import Memory


def test_the_fields_are_linuxs():
    count = PreemptCount()
    count.preempt, count.softirq, count.hardirq, count.nmi = 3, 2, 1, 1
    assert count.count == 0x0011_0203
    assert count.in_nmi and count.in_interrupt and count.in_hardirq and not count.in_serving_softirq


def test_local_bh_disable_is_in_interrupt_and_preempt_disable_is_not():
    count = PreemptCount()
    count.add(PREEMPT_OFFSET)
    assert count.in_atomic and not count.in_interrupt
    count.add(SOFTIRQ_DISABLE_OFFSET)
    assert count.in_interrupt


def test_the_word_has_bit_31_set_while_nobody_wants_the_cpu():
    count = PreemptCount()
    assert count.word == 0x8000_0000 and not count.in_atomic
    count.need_resched = True
    assert count.word == 0


def test_the_word_stands_in_memory_where_guests_change_it():
    memory, count = Memory(4 << 20), PreemptCount()
    count.add(5)
    count.place(memory, 0x104)
    assert memory.read(0x100, 8) == bytes.fromhex("00000000 05000080")
    memory.write(0x104, (0x8000_0006).to_bytes(4, "little"))
    assert count.preempt == 6


def test_sleeping_with_a_spinlock_held_is_reported_with_the_count_of_schedule_in_it():
    count = PreemptCount()
    assert scheduling_while_atomic(count, "insmod", 100) is None
    count.add(1)
    assert scheduling_while_atomic(count, "insmod", 100) == "BUG: scheduling while atomic: insmod/100/0x00000002"
    assert not count.in_atomic
