"""A privileged instruction under way: its operands, read and written with the program's rights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.decode import Instruction, decode
from emu.exceptions import CpuException, Vector
from emu.mmu.entry import is_canonical
from emu.mmu.fault import NonCanonical
from emu.operands import MemoryAccess, accesses
from emu.privileged_opcodes import PrivilegedInstruction

if TYPE_CHECKING:
    from emu.cpu import Cpu

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class Step:
    """An instruction under way: the CPU, what was recognised, its length and operand."""

    def __init__(self, cpu: Cpu, instruction: PrivilegedInstruction, code: bytes, decoded: Instruction) -> None:
        self.cpu = cpu
        self.instruction = instruction
        self.rip = cpu.rip
        self._decoded = decoded
        self.next_rip = self.rip + self._decoded.size & _MASK64
        self.code = code[: self._decoded.size]

    def operand(self, size: int, *, write: bool) -> MemoryAccess:
        """The memory operand with the size that the instruction accesses."""
        found = accesses(self._decoded, self.rip, self.cpu.reg)
        first = found[0]
        return MemoryAccess(first.la, size, not write, write, stack=first.stack)

    def address(self) -> int:
        """The effective address of INVLPG's operand, which is not accessed: that of MOVZX (0F B6) with the same ModRM."""
        at = self.instruction.opcode_at + 1
        movzx = self.code[:at] + b"\xb6" + self.code[at + 1 :]
        return accesses(decode(movzx, self.rip), self.rip, self.cpu.reg)[0].la

    def read(self, access: MemoryAccess) -> bytes:
        """Read the operand with the program's rights."""
        cpu = self.cpu
        try:
            return cpu.mmu.read(access.la, access.size, user=cpu.mmu.cpl == 3, ac=cpu.read_ac())
        except NonCanonical:
            raise CpuException(Vector.SS if access.stack else Vector.GP, 0) from None

    def write(self, access: MemoryAccess, data: bytes) -> None:
        """Write the operand with the program's rights."""
        cpu = self.cpu
        try:
            cpu.mmu.write(access.la, data, user=cpu.mmu.cpl == 3, ac=cpu.read_ac())
        except NonCanonical:
            raise CpuException(Vector.SS if access.stack else Vector.GP, 0) from None

    def need_privilege(self) -> None:
        """#GP(0) outside privilege level 0."""
        if self.cpu.mmu.cpl:
            raise CpuException(Vector.GP, 0)


def check_canonical(cpu: Cpu, la: int) -> None:
    """#GP(0) for an address that is not canonical."""
    if not is_canonical(la, cpu.mmu.regs.levels):
        raise CpuException(Vector.GP, 0)
