"""Per-CPU memory as modules see it: pcpu_alloc, free_percpu and the offsets of the CPUs.

alloc_percpu and per_cpu_ptr are macros in C; assembly may call them by these names all the same. A pointer to per-CPU memory is
used with a GS override: mov rax, gs:[rdi].
"""

from __future__ import annotations

from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.kernel import Kernel

_GFP_KERNEL = int(GFP_KERNEL)


def register_percpu(kernel: Kernel) -> None:
    """Export the functions, and __per_cpu_offset, of one kernel."""
    percpu, export = kernel.percpu, kernel.symbols.register

    def pcpu_alloc(size: int, align: int, reserved: int, gfp: int) -> int:
        return percpu.alloc_percpu(size, align, gfp & 0xFFFF_FFFF, reserved=bool(reserved & 1))

    def per_cpu_ptr(ptr: int, cpu: int) -> int:
        cpu &= 0xFFFF_FFFF
        # No such CPU: __per_cpu_offset holds what early boot left there.
        return percpu.per_cpu_ptr(ptr, cpu) if cpu in percpu.unit_offsets else ptr

    if kernel.profile.noprof_symbols:
        export("pcpu_alloc_noprof", pcpu_alloc, 4, gpl=True)
    export("__alloc_percpu", lambda size, align: pcpu_alloc(size, align, 0, _GFP_KERNEL), 2, gpl=True)
    export("__alloc_percpu_gfp", lambda size, align, gfp: pcpu_alloc(size, align, 0, gfp), 3, gpl=True)
    export("free_percpu", percpu.free_percpu, 1, gpl=True)
    export("per_cpu_ptr", per_cpu_ptr, 2)
    export("this_cpu_ptr", percpu.this_cpu_ptr, 1)
    table = kernel.symbols.add_data("__per_cpu_offset", 8 * len(percpu.unit_offsets), exported=True)
    for cpu in percpu.unit_offsets:
        kernel.memory.write_u64(kernel.layout.pa(table) + 8 * cpu, percpu.per_cpu_offset(cpu))
