"""Where an interleaving of CPUs can matter: before an instruction that reaches memory others may see, or that enters the kernel."""

from __future__ import annotations

from emu.cpu import Cpu
from emu.decode import Instruction, Undecodable, decode
from emu.memory import BusError
from emu.mmu.fault import NonCanonical, PageFault

_LONGEST = 15
_STACK = frozenset(("rsp", "rbp"))
# What ends a run of instructions whose successor is known.
_TRANSFERS = ("j", "call", "ret", "iret", "int", "loop", "sys", "hlt", "ud")
_LOOK_AHEAD = 64


def next_instruction(cpu: Cpu, rip: int) -> Instruction | None:
    """The instruction at an address, None where none can be fetched or decoded."""
    try:
        return decode(cpu.engine.peek(rip, _LONGEST), rip)
    except (Undecodable, PageFault, NonCanonical, BusError):
        return None


def is_visible(instruction: Instruction | None) -> bool:
    """Whether an instruction may reach memory that others see; its own stack is not, nor are registers."""
    if instruction is None or instruction.mnemonic == "hlt":
        return True
    return any(operand.base not in _STACK or operand.index is not None for operand in instruction.operands)


def invisible_run(cpu: Cpu) -> int:
    """How many instructions from RIP on, the first whatever it is, the CPU can execute before another visible one may come."""
    rip = cpu.rip
    instruction = next_instruction(cpu, rip)
    count = 1
    while count < _LOOK_AHEAD and instruction is not None and not instruction.mnemonic.startswith(_TRANSFERS):
        rip += instruction.size
        instruction = next_instruction(cpu, rip)
        if is_visible(instruction):
            break
        count += 1
    return count
