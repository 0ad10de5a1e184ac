"""preempt_count: why the code that a CPU runs may not sleep.

One 32-bit word for each CPU, in fields (v6.12 include/linux/preempt.h):

    bits 0-7    preempt_disable() nesting, spinlocks held
    bits 8-15   softirq: 1 while one is served, 2 for each local_bh_disable()
    bits 16-19  hardirq nesting
    bits 20-23  NMI nesting
    bit 31      on x86, inverted: clear when the CPU should reschedule (arch/x86/include/asm/preempt.h)

The word need not be saved at a switch: whoever switches holds the same count as whoever was switched away from.
"""

from __future__ import annotations

from emu.memory import Memory

PREEMPT_OFFSET = 1
SOFTIRQ_OFFSET = 1 << 8
SOFTIRQ_DISABLE_OFFSET = 2 * SOFTIRQ_OFFSET
HARDIRQ_OFFSET = 1 << 16
NMI_OFFSET = 1 << 20
PREEMPT_MASK = 0xFF
SOFTIRQ_MASK = 0xFF << 8
HARDIRQ_MASK = 0xF << 16
NMI_MASK = 0xF << 20
PREEMPT_NEED_RESCHED = 1 << 31
_COUNT = PREEMPT_NEED_RESCHED - 1
_WORD = 0xFFFF_FFFF
# schedule() has disabled preemption itself when __schedule() looks.
SCHEDULE_OFFSET = PREEMPT_OFFSET


class PreemptCount:
    """The word of one CPU. It stands in guest memory once `place` has said where; counts wrap as the instructions do."""

    __slots__ = ("_memory", "_pa", "_word")

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._pa = 0
        self._word = PREEMPT_NEED_RESCHED

    def place(self, memory: Memory, pa: int) -> None:
        """Keep the word at physical address `pa`, where guests can see and change it."""
        word = self.word
        self._memory, self._pa = memory, pa
        self.word = word

    @property
    def word(self) -> int:
        """All 32 bits."""
        # u64 reads are the fast way into guest memory.
        if self._memory is None:
            return self._word
        return self._memory.read_u64(self._pa & -8) >> 8 * (self._pa & 4) & _WORD

    @word.setter
    def word(self, value: int) -> None:
        if self._memory is None:
            self._word = value & _WORD
        else:
            self._memory.write(self._pa, (value & _WORD).to_bytes(4, "little"))

    @property
    def count(self) -> int:
        """preempt_count(): the word without its need-resched bit."""
        return self.word & _COUNT

    @count.setter
    def count(self, value: int) -> None:
        self.word = self.word & PREEMPT_NEED_RESCHED | value & _COUNT

    def add(self, value: int) -> None:
        """Add an offset; a negative one is subtracted."""
        self.word = self.word + value & _WORD

    @property
    def preempt(self) -> int:
        """How often preemption is disabled."""
        return self.word & PREEMPT_MASK

    @preempt.setter
    def preempt(self, value: int) -> None:
        self._set(PREEMPT_MASK, value)

    @property
    def softirq(self) -> int:
        """The softirq field."""
        return (self.word & SOFTIRQ_MASK) // SOFTIRQ_OFFSET

    @softirq.setter
    def softirq(self, value: int) -> None:
        self._set(SOFTIRQ_MASK, value * SOFTIRQ_OFFSET)

    @property
    def hardirq(self) -> int:
        """Nesting of hard interrupts."""
        return (self.word & HARDIRQ_MASK) // HARDIRQ_OFFSET

    @hardirq.setter
    def hardirq(self, value: int) -> None:
        self._set(HARDIRQ_MASK, value * HARDIRQ_OFFSET)

    @property
    def nmi(self) -> int:
        """Nesting of NMIs."""
        return (self.word & NMI_MASK) // NMI_OFFSET

    @nmi.setter
    def nmi(self, value: int) -> None:
        self._set(NMI_MASK, value * NMI_OFFSET)

    def _set(self, mask: int, value: int) -> None:
        self.word = self.word & ~mask | value & mask

    @property
    def need_resched(self) -> bool:
        """The scheduler wants this CPU."""
        return not self.word & PREEMPT_NEED_RESCHED

    @need_resched.setter
    def need_resched(self, value: bool) -> None:
        self.word = self.word & _COUNT | (0 if value else PREEMPT_NEED_RESCHED)

    @property
    def in_interrupt(self) -> bool:
        """In an NMI, a hard interrupt or a softirq, or with softirqs disabled."""
        return bool(self.word & (NMI_MASK | HARDIRQ_MASK | SOFTIRQ_MASK))

    @property
    def in_hardirq(self) -> bool:
        """In a hard interrupt."""
        return bool(self.word & HARDIRQ_MASK)

    @property
    def in_serving_softirq(self) -> bool:
        """A softirq is being served."""
        return bool(self.word & SOFTIRQ_OFFSET)

    @property
    def in_nmi(self) -> bool:
        """In an NMI."""
        return bool(self.word & NMI_MASK)

    @property
    def in_atomic(self) -> bool:
        """The code may not sleep, as far as the count tells."""
        return bool(self.word & _COUNT)


def scheduling_while_atomic(count: PreemptCount, comm: str, pid: int) -> str | None:
    """The line that the kernel prints when a thread sleeps where it may not; None where it may. The count is reset.

    "Modules linked in" and the stack follow it. Source: v6.12 kernel/sched/core.c schedule_debug, __schedule_bug.
    """
    if not count.in_atomic:
        return None
    line = f"BUG: scheduling while atomic: {comm}/{pid}/0x{count.count + SCHEDULE_OFFSET:08x}"
    count.count = 0
    return line
