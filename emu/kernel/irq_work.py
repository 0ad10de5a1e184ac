"""struct irq_work: a function that runs in hard interrupt context (v6.12 kernel/irq_work.c)."""

from __future__ import annotations

from emu.kernel.execution import Execution

# llist_node, then the flags of __call_single_node; the function; who waits for it.
FLAGS, FUNC, SIZE = 8, 16, 32
IRQ_WORK_PENDING, IRQ_WORK_BUSY = 1, 2
IRQ_WORK_CLAIMED = IRQ_WORK_PENDING | IRQ_WORK_BUSY
CSD_TYPE_IRQ_WORK = 0x20


class IrqWorks:
    """irq_work items of guests. They run with an interrupt that a CPU sends to itself, or to another."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution

    def queue(self, la: int, cpu: int | None = None) -> bool:
        """irq_work_queue(), irq_work_queue_on(): false when it is pending already."""
        execution = self.execution
        flags = execution.load32(la + FLAGS)
        execution.store32(la + FLAGS, flags | IRQ_WORK_CLAIMED | CSD_TYPE_IRQ_WORK)
        if flags & IRQ_WORK_PENDING:
            return False
        execution.run_on(execution.cpu_id if cpu is None else cpu, lambda: self._run(la))
        return True

    def _run(self, la: int) -> None:
        execution = self.execution
        flags = execution.load32(la + FLAGS) & ~IRQ_WORK_PENDING
        execution.store32(la + FLAGS, flags)
        execution.waiting.call_guest(execution.load64(la + FUNC), la, site="irq_work_single")
        # Queued again meanwhile, it stays busy.
        if execution.load32(la + FLAGS) == flags:
            execution.store32(la + FLAGS, flags & ~IRQ_WORK_BUSY)

    def sync(self, la: int) -> None:
        """irq_work_sync(): wait until it is not busy."""
        execution = self.execution
        execution.spin_until(lambda: not execution.load32(la + FLAGS) & IRQ_WORK_BUSY, f"irq_work 0x{la:x}")
