"""Kernel threads: who they are, and the code that a new thread starts in.

Source: v6.12 arch/x86/kernel/process.c ret_from_fork, arch/x86/entry/entry_64.S ret_from_fork_asm, kernel/kthread.c kthread;
kernel/fork.c for their stacks, which come from emu/kernel/thread_stack.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from emu.kernel.mempolicy import Mempolicy
from emu.kernel.thread_stack import THREAD_SIZE
from emu.kernel.vm_struct import VmStruct

if TYPE_CHECKING:
    from emu.kernel.mm import Mm
    from emu.kernel.sched import Activation

TASK_COMM_LEN = 16
# A frame that looks like the saved registers of a thread that never was in user mode lies on top of each stack.
TOP_OF_KERNEL_STACK_PADDING = 0
PT_REGS_SIZE = 168


class ThreadState(Enum):
    """Whether a thread runs or waits for a CPU, sleeps, or is dead."""

    RUNNABLE = auto()
    BLOCKED = auto()
    DEAD = auto()


@dataclass(slots=True, eq=False)
class KernelThread:
    """A thread: its number, name, stack [stack, stack + THREAD_SIZE) and the CPU it runs on.

    `stack_vm_area` is the stack's area, None once a dead thread has given it back. `mempolicy` None: the default policy.
    `context` holds the registers of a thread that is off its CPU; `activations` its calls into the model, innermost last;
    `waiting_for` says in words what it sleeps for. `mm` is None for a kernel thread. `on_exit` is told the value it returned.
    """

    pid: int
    comm: str
    stack: int
    cpu: int = 0
    stack_vm_area: VmStruct | None = None
    mempolicy: Mempolicy | None = None
    state: ThreadState = ThreadState.RUNNABLE
    context: list[int] | None = None
    activations: list[Activation] = field(default_factory=list)
    waiting_for: str = ""
    mm: Mm | None = None
    on_exit: Callable[[int], None] | None = None

    @property
    def stack_end(self) -> int:
        """One past the highest byte of the stack."""
        return self.stack + THREAD_SIZE


def comm_of(name: str) -> str:
    """A task's name as the kernel keeps it: 15 bytes and a NUL."""
    return name.encode("ascii", "replace").decode()[: TASK_COMM_LEN - 1]


def initial_rsp(thread: KernelThread) -> int:
    """Where a new thread's stack pointer begins: below the frame that would return to user mode."""
    return thread.stack_end - TOP_OF_KERNEL_STACK_PADDING - PT_REGS_SIZE


def ret_from_fork_code(ret_from_fork_asm: int, ret_from_fork: int, kthread: int) -> dict[int, bytes]:
    """Machine code of the three functions under every kernel thread, by their addresses; RBX is the thread's function.

    The thread's return ends at the HLT behind kthread's call, which is the kernel model's to handle.
    """

    def call(at: int, target: int) -> bytes:
        return b"\xe8" + struct.pack("<i", target - (at + 5))

    return {
        ret_from_fork_asm: call(ret_from_fork_asm, ret_from_fork) + b"\xf4",
        ret_from_fork: call(ret_from_fork, kthread) + b"\xc3",
        kthread: b"\xff\xd3\xf4",  # call rbx; hlt
    }


KTHREAD_EXIT = 2
"""Offset in kthread of the HLT that a finished thread reaches."""
