"""A machine of several CPUs that runs a few instructions on any of them, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.expect import Fault
from emu.hub import Finish
from emu.kernel.kernel import Kernel
from emu.kernel.softirq import Softirq
from emu.kernel.task import KernelThread
from emu.machine import Machine

PAGE = 4096
GFP_KERNEL = 0xCC0
VECTOR = 0x40
PROBES = """
section .text
init_module:
    ret
read:
    mov rax, [rdi]
    ret
write:
    mov qword [rdi], 0x41
    ret
touch512:
    mov ecx, 512
    mov rdx, rdi
next:
    mov rax, [rdx]
    add rdx, 4096
    dec ecx
    jnz next
    ret
load_cr3:
    mov cr3, rdi
    mov rax, cr3
    ret
switch_mm:
    push rbx
    call vmemu_switch_mm
    mov rax, cr3
    pop rbx
    ret
switch_and_die:
    push rbx
    call vmemu_switch_mm
    mov rax, [rax]
    pop rbx
    ret
destroy_mm:
    push rbx
    call vmemu_destroy_mm
    pop rbx
    ret
make:
    push rbx
    call vmalloc
    pop rbx
    ret
free:
    push rbx
    call vfree
    pop rbx
    ret
purge:
    push rbx
    call vm_unmap_aliases
    pop rbx
    ret
free_and_purge:
    push rbx
    call vfree
    call vm_unmap_aliases
    pop rbx
    ret
closed:                                 ; RDI turns of a loop with interrupts off
    cli
turn:
    dec rdi
    jnz turn
    sti
    ret
churn:                                  ; vmalloc, write, read, vfree, vm_unmap_aliases, RDI times
    push rbx
    push r12
    sub rsp, 8
    mov rbx, rdi
again:
    mov edi, 4096
    call vmalloc
    mov r12, rax
    mov [r12], rbx
    mov rax, [r12]
    mov rdi, r12
    call vfree
    call vm_unmap_aliases
    dec rbx
    jnz again
    add rsp, 8
    pop r12
    pop rbx
    ret
vfree_read:
    push rbx
    mov rbx, rdi
    call vfree
    mov rax, [rbx + 8]
    pop rbx
    ret
vfree_read_bh:
    push rbx
    push r12
    sub rsp, 8
    mov rbx, rdi
    xor edi, edi
    mov esi, 0x200
    call __local_bh_disable_ip
    mov rdi, rbx
    call vfree
    mov r12, [rbx + 8]
    xor edi, edi
    mov esi, 0x200
    call __local_bh_enable_ip
    mov rax, r12
    add rsp, 8
    pop r12
    pop rbx
    ret
vfree_preempt:
    push rbx
    mov rbx, rdi
    mov edi, 1
    call preempt_count_add
    mov rdi, rbx
    call vfree
    mov edi, 1
    call preempt_count_sub
    pop rbx
    ret
vfree_atomic_preempt:
    push rbx
    push r12
    sub rsp, 8
    mov rbx, rdi
    mov edi, 1
    call preempt_count_add
    mov rdi, rbx
    call vfree_atomic
    xor edi, edi
    call vfree
    mov r12, [rbx + 8]
    mov edi, 1
    call preempt_count_sub
    mov rax, r12
    add rsp, 8
    pop r12
    pop rbx
    ret
vfree_atomic_irq:
    push rbx
    cli
    mov rbx, rdi
    call vfree_atomic
    xor edi, edi
    call vfree
    mov rax, [rbx + 8]
    sti
    pop rbx
    ret
overflow:
    mov rax, rsp
    and rax, -16384
    mov rcx, rsp
    mov rsp, rax
    mov rdx, 0x4141414141414141
push_below:
    push rdx
    mov rsp, rcx
    ret
store_below:
    mov rax, rsp
    and rax, -16384
    mov [rax - 8], rdi
    ret
push_at:
    mov rsp, rdi
    push rax
    ret
"""


class Cpus:
    """A machine whose CPUs read and write addresses when they are told to."""

    def __init__(self, cpus: int, **config: object) -> None:
        self.machine = Machine(MachineConfig(**{"cpus": cpus, "memory": 256 << 20, **config}), limit=10_000_000)
        self.linked = self.machine.load(assemble(PROBES, "probes.asm"))[1]
        self.kernel: Kernel = self.machine.kernel
        self.count = cpus
        self.fault: Fault | None = None
        self.rsp = 0
        self.thread: KernelThread | None = None

    def do(self, cpu: int, what: str, la: int = 0) -> int | None:
        """RAX of one of PROBES on a CPU, None when it raised an exception: then `fault` is the first, and RSP was `rsp`."""
        self.machine.forget_faults()
        got: list[int] = []
        # Made by the CPU that it dies on: then each has the stack of the one before.
        thread = self.thread = self.on(cpu).create_thread(
            what, cpu, function=self.linked.symbols[what], argument=la, runs=False
        )
        thread.on_exit = got.append
        self.on(0).sched.start(thread)
        self.machine.hub.run(lambda: bool(got) or thread.state.name == "DEAD")
        self.fault = next(iter(self.machine.faults), None)
        if not got:
            self.rsp = self.machine.cpus[cpu].reg("rsp")
            self.kernel.abandon(thread)
        self.settle()
        return got[0] if got else None

    def settle(self) -> None:
        """Let the CPUs finish what they still have to do, such as the exit of a thread, until nobody can go on."""
        self.machine.hub.run(lambda: False)

    def interrupt(self, cpu: int, function: Callable[[], object], context: str = "hardirq") -> Finish:
        """Run `function` on a CPU in a hard interrupt, a softirq or an NMI, and let the CPUs settle."""
        kernel = self.kernel
        kernel.cpus.current = 0
        if context == "nmi":
            kernel.irqs.nmi_handlers[:] = [lambda: bool(function()) or True]
            kernel.send_nmi(cpu)
        else:
            softirqs = kernel.sync.softirqs
            softirqs.actions[Softirq.NET_RX] = function
            hard = function if context == "hardirq" else lambda: softirqs.raise_softirq(Softirq.NET_RX)
            kernel.irqs.handlers[VECTOR] = lambda vector: hard()
            kernel.send_ipi(cpu, VECTOR)
        return self.machine.hub.run(lambda: False)

    def guest(self, name: str, *arguments: int) -> int:
        """Call one of PROBES from a handler of `interrupt`, on the CPU that runs it."""
        return self.kernel.sched.call_guest(self.linked.symbols[name], *arguments)

    def faults(self, cpu: int, la: int, error: int = 0) -> bool:
        """Whether a read there, or a write for an `error` with W, is a page fault with just that error code on that CPU."""
        if self.do(cpu, "write" if error & 2 else "read", la) is not None or self.fault is None:
            return False
        return (self.fault.vector, self.fault.error, self.fault.address) == (14, error, la)

    def cached(self, la: int) -> list[int]:
        """The CPUs whose TLB has a translation of an address."""
        return [cpu.id for cpu in self.machine.cpus if cpu.mmu.query(la) is not None]

    def on(self, cpu: int) -> Kernel:
        """The kernel, run by a CPU from now on."""
        self.kernel.cpus.current = cpu
        return self.kernel

    def vmalloc(self, pages: int, cpu: int = 0) -> int:
        la = self.on(cpu).vmalloc.vmalloc(pages * PAGE)
        assert la
        return la

    def frames(self, count: int) -> np.ndarray:
        return np.array([self.kernel.pages.alloc_pages(GFP_KERNEL) for _ in range(count)], dtype=np.int64)

    def counted(self) -> tuple[int, int, int, int]:
        """IPIs, INVLPGs, flushes of ranges and full flushes so far."""
        counts = self.machine.counts()
        return counts["ipi"], counts["invlpg"], counts["flush"], counts["full-flush"]

    def since(self, before: tuple[int, int, int, int]) -> tuple[int, ...]:
        """What was counted in the meantime."""
        return tuple(now - then for now, then in zip(self.counted(), before, strict=True))
