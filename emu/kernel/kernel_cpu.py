"""How the kernel model sees the CPUs it runs on: a small protocol, no engine behind it.

Register names are lower case: rax..r15, rip, rflags, rsp, cs, ss, cr0, cr2, cr3, cr4, fs_base, gs_base, kernel_gs_base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from emu.kernel.mmu_context import MmContext


class KernelCpu(Protocol):
    """One CPU in kernel mode. Linear-address accesses go through that CPU's TLB."""

    @property
    def id(self) -> int:
        """Number of the CPU, from 0."""

    def reg(self, name: str) -> int:
        """Value of a register."""

    def set_reg(self, name: str, value: int) -> None:
        """Set a register; control registers take their architectural effects."""

    def read(self, la: int, size: int) -> bytes:
        """Supervisor data read of `size` bytes at linear address `la`. Raises PageFault or NonCanonical."""

    def write(self, la: int, data: bytes) -> None:
        """Supervisor data write at linear address `la`. Raises PageFault or NonCanonical."""


    def save_context(self) -> list[int]:
        """The registers that a thread keeps while another one has the CPU."""

    def load_context(self, context: list[int]) -> None:
        """Go on with the registers of `save_context` or `make_context`."""

    def make_context(self, **registers: int) -> list[int]:
        """A context of these registers, all others zero. Raises KeyError for a register that is not part of one."""

    def context_registers(self, context: list[int]) -> dict[str, int]:
        """The registers of a context by name."""

    def invlpg(self, la: int) -> None:
        """Execute INVLPG."""

    def invpcid(self, kind: int, pcid: int, la: int) -> None:
        """Execute INVPCID (SDM vol. 2A). Raises GeneralProtection."""


class TlbFlush(Protocol):
    """The TLB maintenance the kernel asks of the machine (v6.12 arch/x86/mm/tlb.c)."""

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = ...) -> None:
        """Remove the translations of [start, end) from every CPU, because C function `cause` asks."""

    def flush_tlb_all(self, *, cause: str = ...) -> None:
        """Remove every translation, global ones included, from every CPU."""

    def flush_tlb_mm_range(
        self, mm: MmContext, start: int, end: int, stride_shift: int = ..., freed_tables: bool = ..., *, cause: str = ...
    ) -> None:
        """Remove the translations of user [start, end) of an mm from the CPUs that use it (tlbflush.TlbFlushes has the details)."""
