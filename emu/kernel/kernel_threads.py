"""The threads of a kernel: made, put on CPUs, ended; and the idle threads under them all.

Source: v6.12 kernel/fork.c, kernel/smpboot.c, kernel/exit.c, kernel/sched/core.c context_switch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.kernel.cpus import OnlineCpus
from emu.kernel.kernel_cpu import KernelCpu
from emu.kernel.kernel_text import KernelText
from emu.kernel.layout import Layout
from emu.kernel.mempolicy import Mempolicy
from emu.kernel.mmu_context import MmuContexts
from emu.kernel.oops import Task
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.preempt import PreemptCount, scheduling_while_atomic
from emu.kernel.printk import KernelLog
from emu.kernel.sched import Activation, Scheduler
from emu.kernel.task import KernelThread, ThreadState, initial_rsp
from emu.kernel.thread_stack import THREAD_SIZE, ThreadStacks
from emu.memory import Memory
from emu.mmu.fault import PageFault

if TYPE_CHECKING:
    from emu.kernel.entry import ExceptionEntry
    from emu.kernel.init_64 import InitMm
    from emu.kernel.sync import Sync

FIRST_PID = 100
RFLAGS_IF = 0x202


class KernelThreads:
    """The part of a Kernel that knows its threads. What is declared here, the Kernel makes as it boots."""

    memory: Memory
    layout: Layout
    log: KernelLog
    cpus: OnlineCpus
    text: KernelText
    sched: Scheduler
    thread_stacks: ThreadStacks
    contexts: MmuContexts
    init_mm: InitMm
    exceptions: ExceptionEntry

    def __init__(self, nr_cpus: int) -> None:
        self._preempt = [PreemptCount() for _ in range(nr_cpus)]
        self._cpus: list[KernelCpu] = []
        self._next_pid = FIRST_PID
        self.threads: list[KernelThread] = []
        # Threads, locks, timers and RCU as modules know them; whoever exports them sets it.
        self.sync: Sync | None = None
        # Calls that will never go on: forgotten, their greenlets would be unwound, and run the model's code on the way.
        self.dead_ends: list[Activation] = []
        # The thread whose stack is still in use while another one's mm is loaded.
        self._leaving: KernelThread | None = None

    def symbol(self, name: str) -> int:
        """Address of a kernel symbol. Raises ValueError."""
        raise NotImplementedError

    def _boot_pages(self, size: int) -> int:
        raise NotImplementedError

    def _dump_stack(self) -> None:
        raise NotImplementedError

    def create_thread(
        self, comm: str, cpu: int = 0, node: int = NUMA_NO_NODE, *, function: int = 0, argument: int = 0, runs: bool = True,
        **registers: int,
    ) -> KernelThread:
        """A kernel thread with a stack in the vmalloc region, preferably on `node`, that will call `function(argument)`.

        `registers` are its others at first; `runs`: the CPU has it from now on. Raises MemoryError without memory for it.
        """
        stack = self.thread_stacks.alloc_thread_stack_node(node)
        if stack is None:
            raise MemoryError(f"memory size is {self.memory.size:#x}; no room for a thread's stack")
        thread = KernelThread(self._next_pid, comm, stack.addr, cpu, stack)
        self._next_pid += 1
        self.threads.append(thread)
        if self._cpus:
            thread.context = self._cpus[cpu].make_context(
                rip=self.symbol("ret_from_fork_asm"), rsp=initial_rsp(thread), rbx=function, rdi=argument, rflags=RFLAGS_IF,
                **registers,
            )
        if runs:
            self.sched.running[cpu] = thread
        return thread

    def attach_cpus(self, cpus: list[KernelCpu]) -> None:
        """The CPUs are there: each gets its idle thread, CPU 0 that of boot (v6.12 kernel/smpboot.c idle_threads_init)."""
        self._cpus = cpus
        for cpu in cpus:
            if cpu.id:
                idle = self.create_thread(f"swapper/{cpu.id}", cpu.id, runs=False)
                self._next_pid -= 1
            else:
                idle = KernelThread(0, "swapper/0", self.layout.va(self._boot_pages(THREAD_SIZE)))
            idle.pid = 0
            self.sched.idle.append(idle)
            if self.sync is not None:
                self.sync.set_current(cpu.id, idle)
            self.idle_again(cpu.id)

    def idle_again(self, number: int) -> None:
        """Put a CPU, whatever it did, into its idle loop."""
        idle = self.sched.idle[number]
        cpu = self._cpus[number]
        idle.state = ThreadState.RUNNABLE
        cpu.load_context(cpu.make_context(rip=self.text.idle, rsp=initial_rsp(idle), rflags=RFLAGS_IF))
        self.sched.running[number] = idle
        self.sched.spinning[number] = False
        self.sched.idling[number] = True
        self._preempt[number].count = 0

    def thread_returned(self, cpu: KernelCpu, value: int) -> None:
        """A thread's function has returned: the thread is over, and its CPU takes another one (v6.12 kernel/exit.c do_exit)."""
        thread = self.current_thread(cpu)
        if thread.on_exit is not None:
            thread.on_exit(value)
        self.sched.exit_current()

    def abandon(self, thread: KernelThread) -> None:
        """A thread has died where it stood: its CPU goes back to its idle loop, its stack stays as it is."""
        thread.state = ThreadState.DEAD
        self.dead_ends += thread.activations
        thread.activations = []
        if self.sync is not None:
            self.sync.thread_died(thread)
        self._exit_mm(thread)
        self.idle_again(thread.cpu)

    def _exit_mm(self, thread: KernelThread) -> None:
        """A thread that dies where it stands has no mm any more; its CPU keeps it loaded, lazily (v6.12 kernel/exit.c exit_mm)."""
        thread.mm = None
        if self.sched.running[thread.cpu] is thread:
            here, self.cpus.current = self.cpus.current, thread.cpu
            self.contexts.enter_lazy_tlb()
            self.cpus.current = here

    def exit_thread(self, thread: KernelThread) -> None:
        """A thread is dead and off its CPU: its stack is given back. Raises ValueError when it has been already."""
        if thread.stack_vm_area is None:
            raise ValueError(f"thread {thread.pid} has given its stack back already")
        if self.sched.running[thread.cpu] is thread:
            self.sched.running[thread.cpu] = None
        self.thread_stacks.exit_task_stack_account(thread.stack_vm_area)
        self.thread_stacks.free_thread_stack(thread.stack_vm_area)
        thread.stack_vm_area = None
        self.threads.remove(thread)

    def _mempolicy(self) -> Mempolicy | None:
        thread = self.sched.running[self.cpus.current]
        return None if thread is None else thread.mempolicy

    def current_thread(self, cpu: KernelCpu) -> KernelThread:
        """The thread that a CPU runs. Raises AssertionError before there is one."""
        thread = self.sched.running[cpu.id]
        assert thread is not None, f"CPU {cpu.id} has no thread yet"
        return thread

    def oops_task(self, cpu: KernelCpu) -> Task:
        """The current thread as an oops names it."""
        thread = self.current_thread(cpu)
        return Task(thread.comm, thread.pid, cpu.id)

    def _context_switch(self, previous: KernelThread, following: KernelThread) -> None:
        """A CPU has taken another thread: its mm is loaded, or the last one kept (v6.12 kernel/sched/core.c context_switch)."""
        self._leaving = previous
        self.contexts.context_switch(None if following.mm is None else following.mm.context)
        self._leaving = None
        if self.contexts.design.syncs_stack:
            self._prepare_switch_to(self._cpus[following.cpu])
        self._finish_task_switch(previous)

    def _finish_task_switch(self, previous: KernelThread) -> None:
        """Nothing stands on the last thread's stack any more: a dead one gives it back (v6.12 finish_task_switch)."""
        if previous.state is ThreadState.DEAD and previous.stack_vm_area is not None:
            self.exit_thread(previous)

    def _sync_current_stack(self, pgd: int) -> None:
        """A PGD is about to be loaded: it gets the entry of the stack in use."""
        cpu = self._cpus[self.cpus.current]
        self.init_mm.sync_current_stack_to_mm(pgd, cpu.reg("rsp") if self._leaving is None else self._leaving.stack)

    def _prepare_switch_to(self, cpu: KernelCpu) -> None:
        """Before v5.8: touch the next thread's stack while the fault that this may be still has a stack to go to.

        Source: v5.4 arch/x86/include/asm/switch_to.h prepare_switch_to.
        """
        la = cpu.reg("rsp")
        try:
            cpu.read(la, 1)
        except PageFault:
            if not self.exceptions.vmalloc_fault(cpu, la):
                raise

    def _schedule_debug(self, thread: KernelThread) -> None:
        """A thread that may not sleep does (v6.12 kernel/sched/core.c __schedule_bug)."""
        line = scheduling_while_atomic(self._preempt[thread.cpu], thread.comm, thread.pid)
        if line is not None:
            self.log.print_lines((line,))
            self._dump_stack()
