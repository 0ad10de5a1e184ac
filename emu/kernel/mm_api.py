"""What a guest needs of address spaces and tasks and no module could call: functions of ours, all called vmemu_*.

An mm is named by the physical address of its PGD, which is what MOV CR3 takes.
"""

from __future__ import annotations

import errno
import struct

from emu.kernel.descriptors import USER_CS, USER_DS
from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mempolicy import Mempolicy, Mpol
from emu.kernel.mm import PAGE_SHARED, PAGE_SHARED_EXEC, Mm
from emu.kernel.page_alloc import NUMA_NO_NODE
from emu.kernel.ptrace import X86_EFLAGS_IF
from emu.kernel.task import KernelThread, ThreadState
from emu.kernel.tlbflush import TLB_FLUSH_ALL
from emu.kernel.vma import UserMappings
from emu.mmu.entry import PHYSICAL_MASK

_EFLAGS_FIXED = 2
_MAX_USER_PAGES = 1 << 18


def _int(value: int) -> int:
    return (value & 0xFFFF_FFFF) - ((value & 0x8000_0000) << 1)


class MmApi:
    """Registers the functions of one kernel, and keeps the mms and threads that guests made."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.mms: dict[int, Mm] = {}
        self.mappings = UserMappings(kernel, self.mms)
        self.forked: dict[int, KernelThread] = {}
        export = kernel.symbols.register
        export("vmemu_new_mm", self._new_mm, 0)
        export("vmemu_destroy_mm", self._destroy_mm, 1)
        export("vmemu_init_mm", lambda: kernel.init_mm.pgd, 0)
        export("vmemu_user_pgd", self._user_pgd, 1)
        export("vmemu_map_user", self._map_user, 4)
        export("vmemu_unmap_user", self._unmap_user, 3)
        export("vmemu_switch_mm", self._switch_mm, 1)
        export("vmemu_enter_user", self._enter_user, 3)
        export("vmemu_vmalloc_sync_mappings", kernel.init_mm.vmalloc_sync_mappings, 0)
        export("vmemu_request_nmi", self._request_nmi, 2)
        export("vmemu_set_mempolicy", lambda mode, nodes: self._set_mempolicy(_int(mode), nodes), 2)
        export("vmemu_fork", lambda node: self._fork(_int(node)), 1)
        export("vmemu_exit", self._exit, 1)

    def _new_mm(self) -> int:
        """A new mm; 0 without memory for its PGD."""
        try:
            mm = Mm(self.kernel.init_mm)
        except MemoryError:
            return 0
        self.mms[mm.pgd] = mm
        return mm.pgd

    def _destroy_mm(self, pgd: int) -> int:
        """Free an mm: 0, -EINVAL for no mm, -EBUSY while a thread has it or a CPU's CR3 has it other than lazily.

        CPUs that have it loaded lazily go over to init_mm (v6.12 mm/mmap.c exit_mmap: the flush tells of freed page tables).
        """
        if pgd not in self.mms:
            return -errno.EINVAL
        mm = self.mms[pgd]
        if self._is_in_use(mm):
            return -errno.EBUSY
        self.kernel.tlb.flush_tlb_mm_range(mm.context, 0, TLB_FLUSH_ALL, cause="exit_mmap")
        # Others may have run while this CPU waited for the flush.
        if self._is_in_use(mm) or mm.context.cpumask:
            return -errno.EBUSY
        del self.mms[pgd]
        self.mappings.forget(mm)
        mm.destroy()
        return 0

    def _is_in_use(self, mm: Mm) -> bool:
        kernel = self.kernel
        if any(thread.mm is mm and thread.state is not ThreadState.DEAD for thread in kernel.threads):
            return True
        return any(
            kernel.cpu_by_number(cpu).reg("cr3") & PHYSICAL_MASK in (mm.pgd, mm.user_pgd)
            and not (state.is_lazy and state.loaded_mm is mm.context)
            for cpu, state in enumerate(kernel.contexts.cpu_tlbstate)
        )

    def _switch_mm(self, pgd: int) -> int:
        """The current thread has this mm from now on, and this CPU loads it; init_mm's PGD: none again. 0, -EINVAL for no mm.

        Source: v6.12 kernel/kthread.c kthread_use_mm; for init_mm arch/x86/mm/tlb.c leave_mm.
        """
        kernel = self.kernel
        mm = self.mms.get(pgd)
        if mm is None and pgd != kernel.init_mm.pgd:
            return -errno.EINVAL
        kernel.current_thread(kernel.cpu).mm = mm
        kernel.contexts.switch_mm_irqs_off(kernel.contexts.init_mm if mm is None else mm.context)
        return 0

    def _unmap_user(self, pgd: int, la: int, size: int) -> int:
        """Unmap pages of vmemu_map_user, flush them on the CPUs that use the mm, and free them: 0 or -EINVAL."""
        mm = self.mms.get(pgd)
        if mm is None or size > _MAX_USER_PAGES * PAGE_SIZE:
            return -errno.EINVAL
        try:
            mm.zap(la, size, self.kernel.tlb)
        except ValueError:
            return -errno.EINVAL
        return 0

    def _user_pgd(self, pgd: int) -> int:
        """The PGD that user mode of an mm runs on; 0 for no mm."""
        return self.mms[pgd].user_pgd if pgd in self.mms else 0

    def _enter_user(self, pgd: int, ip: int, sp: int) -> int | None:
        """Leave the kernel for user mode of an mm, as a return from an exception does; -EINVAL for no mm, else no return.

        The frame lies on the CPU's entry stack and the last instructions are entry text, as both are there on either PGD.
        """
        if self._switch_mm(pgd):
            return -errno.EINVAL
        kernel = self.kernel
        cpu = kernel.cpu
        iretq = kernel.symbol("common_interrupt_return")
        frame = struct.pack("<6Q", iretq, ip, USER_CS, X86_EFLAGS_IF | _EFLAGS_FIXED, sp, USER_DS)
        rsp = kernel.cpu_entry_area(cpu.id).entry_stack[1] - len(frame)
        cpu.write(rsp, frame)
        cpu.set_reg("rsp", rsp)
        kernel.exceptions.pti.to_user(cpu)
        return None

    def _map_user(self, pgd: int, la: int, size: int, executable: int) -> int:
        """Map new zeroed pages at a user address: 0, -EINVAL for no mm or a bad range, -EEXIST, -ENOMEM."""
        mm = self.mms.get(pgd)
        if mm is None or size > _MAX_USER_PAGES * PAGE_SIZE:
            return -errno.EINVAL
        try:
            return mm.map_user(la, size, PAGE_SHARED_EXEC if executable & 1 else PAGE_SHARED)
        except ValueError:
            return -errno.EINVAL

    def _request_nmi(self, handler: int, data: int) -> int:
        """Have handler(data) called for every NMI of any CPU; whether the NMI was its own is what it returns. 0."""
        sched = self.kernel.sched
        self.kernel.irqs.nmi_handlers.append(lambda: sched.call_guest(handler, data, site="nmi_handle") & 0xFFFF_FFFF != 0)
        return 0

    def _set_mempolicy(self, mode: int, nodes: int) -> int:
        """set_mempolicy() for the current thread, with a mask of nodes: 0 or -EINVAL."""
        thread = self.kernel.current_thread(self.kernel.cpu)
        online = len(self.kernel.memory.nodes)
        if nodes >> online:
            return -errno.EINVAL
        chosen = tuple(nid for nid in range(online) if nodes >> nid & 1)
        try:
            thread.mempolicy = Mempolicy(Mpol(mode), chosen)
        except ValueError:
            return -errno.EINVAL
        return 0

    def _fork(self, node: int) -> int:
        """A thread that is not run, with its stack preferably on a node: its stack's address, 0 without memory."""
        if node != NUMA_NO_NODE and not 0 <= node < len(self.kernel.memory.nodes):
            return 0
        try:
            thread = self.kernel.create_thread("vmemu", self.kernel.cpu.id, node, runs=False)
        except MemoryError:
            return 0
        self.forked[thread.stack] = thread
        return thread.stack

    def _exit(self, stack: int) -> int:
        """End a thread of vmemu_fork, named by its stack: 0 or -EINVAL."""
        thread = self.forked.pop(stack, None)
        if thread is None:
            return -errno.EINVAL
        self.kernel.exit_thread(thread)
        return 0
