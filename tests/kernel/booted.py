"""Booted kernels, and machines that run a few lines of assembly."""

from __future__ import annotations

from kernel_floor import RecordedFlushes
from vmap_machine import Kernel as Parts
from vmap_machine import Task

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.expect import Outcome
from emu.kernel.kernel import Kernel
from emu.kernel.profile import V6_12, Profile
from emu.kernel.vmallocinfo import vmallocinfo_rows
from emu.machine import Machine
from emu.memory import Memory

MIB = 1 << 20


def boot(
    profile: Profile = V6_12, *, cpus: int = 1, nodes: int = 1, size: int = 64 * MIB, levels: int = 4, pti: bool = False
) -> Kernel:
    """A kernel that no CPU has entered yet; its `tlb` remembers the flushes."""
    return Kernel(Memory(size, nodes), profile, RecordedFlushes(), levels=levels, nr_cpus=cpus, pti=pti)


def rows(kernel: Kernel) -> list[str]:
    """/proc/vmallocinfo."""
    return list(vmallocinfo_rows(kernel.vmalloc, lambda la: kernel.symbolize(la) or hex(la)))


def row_of(kernel: Kernel, la: int) -> str:
    return next(row for row in rows(kernel) if row.startswith(f"{la:#018x}"))


def machine(**config: object) -> Machine:
    return Machine(MachineConfig(**{"memory": 64 * MIB, **config}), limit=1_000_000)


def parts(of: Kernel) -> Parts:
    """A booted machine's kernel as the recordings are compared with it; its warnings are kept and not printed."""
    task = Task()
    of.warn = task.warn
    return Parts(
        task, of.init_mm, of.pages, of.slab, of.vmalloc.space, of.vmalloc, of.vmap, of.vmap_blocks, of.ioremap.memblock
    )


def run(on: Machine, body: str) -> Outcome:
    """Run init_module with this body, indented as assembly is."""
    return on.run(assemble(f"section .text\ninit_module:\n{body}\n", "guest.asm"))
