"""A booted machine on which a test runs a few guest instructions at a time, each as the init function of a module of its own."""

from __future__ import annotations

from dataclasses import dataclass

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.expect import Fault
from emu.kernel.kernel import Kernel
from emu.machine import Machine

PAGE = 4096
PMD = 2 << 20


@dataclass(frozen=True)
class Ran:
    """What became of the instructions: RAX if they returned, else the first fault."""

    returned: int | None
    fault: Fault | None

    @property
    def page_fault(self) -> tuple[int, int] | None:
        """Error code and CR2 of the #PF that ended the run."""
        return (self.fault.error, self.fault.address) if self.fault is not None and self.fault.vector == 14 else None


PROBES = """
section .text
init_module:
    ret
read:
    mov rax, [r12]
    ret
write:
    mov [r12], r13
    ret
write_byte:
    mov [r12], r13b
    ret
jump:
    jmp r12
enter:
    mov rdi, r13
    call r12
    ret
touch:
    mov rax, [r12]
    add r12, 4096
    dec r13
    jne touch
    ret
"""


class GuestMachine:
    """A machine and its kernel, with a loaded module of probes: loading another one would flush what a test wants to see stale."""

    def __init__(self, **config: object) -> None:
        self.machine = Machine(MachineConfig(**{"memory": 256 << 20, **config}), limit=1_000_000)
        self.kernel: Kernel = self.machine.kernel
        _, linked = self.machine.load(assemble(PROBES, "probes.asm"))
        self._probes = linked.symbols
        self._runs = 0

    @property
    def flushes(self) -> int:
        """Flushes so far, of ranges and of everything."""
        return self.machine.statistics.flushes + self.machine.statistics.full_flushes

    def execute(self, *instructions: str) -> Ran:
        """Load instructions and a RET as a module, and run them in a new thread; an oops ends only that thread."""
        self._runs += 1
        source = "section .text\ninit_module:\n" + "".join(f"    {line}\n" for line in (*instructions, "ret"))
        self.machine.forget_faults()
        outcome = self.machine.run(assemble(source, f"guest{self._runs}.asm"))
        return self._ran(outcome.ended, outcome.returned)

    def _ran(self, ended: str, returned: int | None) -> Ran:
        assert ended in ("returned", "oops", "panic"), ended
        return Ran(returned, self.machine.faults[0] if self.machine.faults else None)

    def _probe(self, name: str, la: int, value: int = 0, *, interrupt: bool = False) -> Ran:
        machine = self.machine
        machine.forget_faults()
        return self._ran(*machine.call(self._probes[name], comm="probe", interrupt=interrupt, r12=la, r13=value))

    def read(self, la: int) -> Ran:
        """One u64 as a guest reads it."""
        return self._probe("read", la)

    def write(self, la: int, value: int) -> Ran:
        """One u64 as a guest writes it."""
        return self._probe("write", la, value)

    def write_byte(self, la: int, value: int) -> Ran:
        """One byte as a guest writes it."""
        return self._probe("write_byte", la, value)

    def jump(self, la: int) -> Ran:
        """An instruction fetch."""
        return self._probe("jump", la)

    def touch(self, la: int, pages: int) -> Ran:
        """A read of each page."""
        return self._probe("touch", la, pages)

    def call_in_interrupt(self, function: str, argument: int) -> Ran:
        """A call of an exported function as an interrupt handler makes it."""
        return self._probe("enter", self.kernel.symbol(function), argument, interrupt=True)

    def call(self, function: str, *arguments: int) -> Ran:
        """A call of an exported function with up to six arguments."""
        registers = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
        loads = [f"mov {name}, {value:#x}" for name, value in zip(registers, arguments, strict=False)]
        return self.execute("sub rsp, 8", *loads, f"call {function}", "add rsp, 8")
