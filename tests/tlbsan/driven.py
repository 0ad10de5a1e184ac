"""A machine of several CPUs that execute one access at a time, as a test asks."""

from __future__ import annotations

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.kernel.mm import PAGE_SHARED_DIRTY, Mm
from emu.kernel.task import KernelThread, ThreadState
from emu.machine import Machine
from emu.tlbsan import Finding

MIB = 1 << 20
PAGE = 4096
USER = 0x40_0000


class Driven:
    """A machine whose CPUs execute what a test asks for, one access at a time."""

    CODE = """
    section .text
    init_module:
        xor eax, eax
        ret
    reads:
        stac
        mov rax, [rdi]
        clac
        ret
    """

    def __init__(self, cpus: int, **config: bool | str) -> None:
        self.machine = Machine(MachineConfig(cpus=cpus, memory=64 * MIB, **config), limit=1_000_000)
        self.kernel = self.machine.kernel
        self.reads = self.machine.load(assemble(self.CODE, "driven.asm"))[1].symbols["reads"]

    def read(self, cpu: int, la: int, mm: Mm | None = None) -> str:
        """A thread on `cpu`, in an address space, reads `la`: how it ended."""
        thread: KernelThread = self.kernel.create_thread("reads", cpu, function=self.reads, argument=la, runs=False)
        thread.mm = mm
        self.kernel.sched.start(thread)
        finish = self.machine.hub.run(lambda: thread.state is ThreadState.DEAD)
        self.machine.hub.quiesce()
        self.kernel.cpus.current = 0
        return finish.final.name

    @property
    def found(self) -> Finding:
        assert self.machine.tlbsan is not None
        finding, = self.machine.tlbsan.findings
        return finding

    def silent(self) -> bool:
        return self.machine.tlbsan is not None and not self.machine.tlbsan.findings

    def mms(self, count: int) -> list[Mm]:
        """Address spaces with a page at USER."""
        made = [Mm(self.kernel.init_mm) for _ in range(count)]
        for mm in made:
            assert not mm.map_user(USER, PAGE, PAGE_SHARED_DIRTY)
        return made
