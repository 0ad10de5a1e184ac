"""A whole booted machine for tests of what stands on top of the kernel model, with a CPU to call exported functions on."""

from __future__ import annotations

from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.machine import Machine
from emu.run import RunResult, run_to_end

MEMORY = 64 << 20


def ran(body: str, *, data: str = "", **options: object) -> tuple[RunResult, Machine]:
    """Run a guest whose init_module is `body`, one statement a line; the machine as it left it."""
    lines = "\n".join(f"    {line}" for line in body.strip().split("\n"))
    text = f"section .text\ninit_module:\n    push rbx\n{lines}\n    pop rbx\n    ret\nsection .bss\nresult: resq 8\n{data}\n"
    return run_to_end(assemble(text, "guest.asm"), MachineOptions(**{"memory": MEMORY, **options}))  # type: ignore[arg-type]


def result_word(result: RunResult, index: int = 0) -> int:
    """A word that the guest left in `result`."""
    la = result.outcome.symbol("result")
    assert la is not None
    return result.outcome.read_u64(la + 8 * index)
