"""The hardware interrupt stacks: per-CPU memory, mapped once more in the vmalloc region so that a guard page stands beside it.

Source: v6.12 arch/x86/kernel/irq_64.c map_irq_stack; arch/x86/kernel/dumpstack_64.c in_irq_stack.
"""

from __future__ import annotations

import numpy as np

from emu.kernel.layout import PAGE_SHIFT, PAGE_SIZE
from emu.kernel.percpu import PerCpu
from emu.kernel.percpu_first_chunk import IRQ_STACK_BACKING_STORE, IRQ_STACK_SIZE
from emu.kernel.vm_struct import Vm
from emu.kernel.vmap import Vmap


def map_irq_stack(vmap: Vmap, percpu: PerCpu, cpu: int, caller: int) -> int:
    """Map a CPU's stack and note its top in the CPU's hardirq_stack_ptr; its address. Raises MemoryError for -ENOMEM."""
    vmalloc = vmap.vmalloc
    pa = vmalloc.layout.pa(percpu.per_cpu_offset(cpu) + IRQ_STACK_BACKING_STORE)
    count = IRQ_STACK_SIZE // PAGE_SIZE
    pfns = np.arange(pa >> PAGE_SHIFT, (pa >> PAGE_SHIFT) + count, dtype=np.int64)
    la = vmap.vmap(pfns, count, int(Vm.MAP), vmalloc.prots.kernel, caller)
    if not la:
        raise MemoryError(f"no memory to map the interrupt stack of CPU {cpu}")
    percpu.write_static("hardirq_stack_ptr", cpu, la + IRQ_STACK_SIZE - 8)
    return la
