"""Kernel stacks of threads: vmalloc areas, two of which each CPU keeps for its next thread (kernel/fork.c).

A dead thread's stack goes to a free slot of the CPU that buries it; without one it waits for an RCU grace period, and is offered
to the slots once more before it is vfreed. Before v5.18 it was vfreed at once. Sources: v6.12, v6.1 kernel/fork.c.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.percpu import PerCpu
from emu.kernel.percpu_first_chunk import NR_CACHED_STACKS, STATIC_VARIABLES
from emu.kernel.vm_struct import VmStruct
from emu.kernel.vmalloc import Vmalloc

THREAD_SIZE = 4 * PAGE_SIZE
THREAD_ALIGN = THREAD_SIZE
THREADINFO_GFP = int(GFP_KERNEL | Gfp.ZERO)
# struct vm_stack in the dead stack's lowest bytes: an rcu_head, then the vm_struct.
VM_STACK_AREA_OFFSET = 16
_RCU_SINCE = (5, 18)


class ThreadStacks:
    """Gives out and takes back the stacks of one kernel.

    `call_rcu(callback)` runs the callback after a grace period. `charge_page(pfn)` charges a page to the task's memory cgroup and
    tells whether it could; `uncharge_page` takes that back. `caller` is the return address in kernel_clone.
    """

    def __init__(
        self, vmalloc: Vmalloc, percpu: PerCpu, call_rcu: Callable[[Callable[[], None]], None], caller: int = 0,
        charge_page: Callable[[int], bool] = lambda pfn: True, uncharge_page: Callable[[int], None] = lambda pfn: None,
    ) -> None:
        self.vmalloc = vmalloc
        self.percpu = percpu
        self.call_rcu = call_rcu
        self.caller = caller
        self.charge_page = charge_page
        self.uncharge_page = uncharge_page
        self.cached_stacks: dict[int, list[VmStruct | None]] = {cpu: [None] * NR_CACHED_STACKS for cpu in percpu.unit_offsets}

    def _set_slot(self, cpu: int, slot: int, vm: VmStruct | None) -> None:
        self.cached_stacks[cpu][slot] = vm
        la = self.percpu.per_cpu_offset(cpu) + STATIC_VARIABLES["cached_stacks"][0] + 8 * slot
        self.vmalloc.memory.write_u64(self.vmalloc.layout.pa(la), 0 if vm is None else vm.la)

    def alloc_thread_stack_node(self, node: int = NUMA_NO_NODE) -> VmStruct | None:
        """The area of a zeroed stack of THREAD_SIZE, aligned to its size, with a guard page behind it; None for -ENOMEM.

        A cached one wherever its pages are, else a new one, preferably of `node`.
        """
        vmalloc = self.vmalloc
        cpu = vmalloc.space.cpus.current
        for slot, cached in enumerate(self.cached_stacks[cpu]):
            if cached is not None:
                self._set_slot(cpu, slot, None)
                self._fill_zero(cached)
                return self._charged(cached)
        la = vmalloc.vmalloc_node_range(
            THREAD_SIZE, THREAD_ALIGN, vmalloc.layout.vmalloc_start, vmalloc.layout.vmalloc_end, THREADINFO_GFP,
            vmalloc.prots.kernel, 0, node, self.caller,
        )
        vm = vmalloc.find_vm_area(la) if la else None
        return None if vm is None else self._charged(vm)

    def _fill_zero(self, vm: VmStruct) -> None:
        assert vm.pages is not None, "a stack owns its pages"
        for pfn in vm.pages.tolist():
            self.vmalloc.memory.fill(pfn * PAGE_SIZE, PAGE_SIZE)

    def _charged(self, vm: VmStruct) -> VmStruct | None:
        """memcg_charge_kernel_stack: all pages or none; without it the stack is freed."""
        assert vm.pages is not None and vm.nr_pages == THREAD_SIZE // PAGE_SIZE, "a stack owns its pages"
        charged: list[int] = []
        for pfn in vm.pages.tolist():
            if not self.charge_page(pfn):
                for done in charged:
                    self.uncharge_page(done)
                self.vmalloc.vfree(vm.addr)
                return None
            charged.append(pfn)
        return vm

    def exit_task_stack_account(self, vm: VmStruct) -> None:
        """Take the charge for a dead thread's stack back."""
        assert vm.pages is not None, "a stack owns its pages"
        for pfn in vm.pages.tolist():
            self.uncharge_page(pfn)

    def try_release_thread_stack_to_cache(self, vm: VmStruct) -> bool:
        """Put a stack into a free slot of this CPU; false when there is none."""
        cpu = self.vmalloc.space.cpus.current
        for slot, cached in enumerate(self.cached_stacks[cpu]):
            if cached is None:
                self._set_slot(cpu, slot, vm)
                return True
        return False

    def free_thread_stack(self, vm: VmStruct) -> None:
        """Take a dead thread's stack back, in any context."""
        if self.try_release_thread_stack_to_cache(vm):
            return
        if self.vmalloc.profile.version < _RCU_SINCE:
            self.vmalloc.vfree_atomic(vm.addr)
            return
        pa = self.vmalloc.mm.to_pa(vm.addr + VM_STACK_AREA_OFFSET)
        assert pa is not None, "a stack is mapped"
        self.vmalloc.memory.write_u64(pa, vm.la)
        self.call_rcu(lambda: self._thread_stack_free_rcu(vm))

    def _thread_stack_free_rcu(self, vm: VmStruct) -> None:
        if not self.try_release_thread_stack_to_cache(vm):
            self.vmalloc.vfree(vm.addr)

    def free_vm_stack_cache(self, cpu: int) -> int:
        """A CPU has gone offline: vfree what it kept. 0, as a hotplug callback returns."""
        for slot, cached in enumerate(self.cached_stacks[cpu]):
            if cached is not None:
                self.vmalloc.vfree(cached.addr)
                self._set_slot(cpu, slot, None)
        return 0
