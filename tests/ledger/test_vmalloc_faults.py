"""Ledger rows about lazily copied top-level entries, on several CPUs, in interrupts, and under the stack itself."""

from __future__ import annotations

import dataclasses

import pytest
from booted import boot

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.kernel.gfp import GFP_KERNEL
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mm import Mm
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.machine import Machine

SLOT = 1 << 39
GET_VM = 4  # VM_MAP
CODE = """
section .text
init_module:
    ret
read:                                   ; what: { pgd, address }
    push rbx
    mov rbx, rdi
    mov rdi, [rbx]
    call vmemu_switch_mm
    mov rax, [rbx + 8]
touch:
    mov rax, [rax]
    pop rbx
    ret
interrupted:                            ; the same with an interrupt between
    push rbx
    mov rbx, rdi
    mov rdi, [rbx]
    call vmemu_switch_mm
    call [rbx + 16]
    nop
    pop rbx
    ret
irq:
    xor edi, edi
    mov esi, 0x40
    jmp vmemu_send_irq
nmi:
    xor edi, edi
    jmp vmemu_send_nmi
load:
    mov rax, [rdi]
handler:
    mov rax, [rdi]
    mov eax, 1
    ret
switch:
    push rbx
    call vmemu_switch_mm
    mov eax, 7
    pop rbx
    ret
section .data
what: times 24 dq 0
"""
every_number_of_cpus = pytest.mark.parametrize("cpus", [1, 2, 4, 8])


class Cpus:
    """A machine whose CPUs call the functions above, and whose vmalloc region goes on in a top-level entry without mms."""

    def __init__(self, cpus: int, **config: object) -> None:
        self.machine = Machine(MachineConfig(cpus=cpus, memory=256 << 20, **config), limit=10_000_000)
        self.kernel = self.machine.kernel
        self.linked = self.machine.load(assemble(CODE, "faults.asm"))[1]
        self.errors: list[int] = []

    def la(self, name: str) -> int:
        return self.linked.symbols[name]

    def mm(self) -> Mm:
        mm = Mm(self.kernel.init_mm)
        self.machine.mm_api.mms[mm.pgd] = mm
        return mm

    def beyond(self) -> int:
        """A page in a top-level entry that has just been made."""
        return beyond(self.kernel)

    def do(self, cpu: int, name: str, mm: Mm, la: int, *more: int) -> int | None:
        """Call a function on a CPU with { mm, la }: RAX, None when it died. `errors`: the page faults it took."""
        self.machine.forget_faults()
        what = self.la("what")
        for number, word in enumerate((mm.pgd, la, *more)):
            self.machine.write(what + 8 * number, word.to_bytes(8, "little"))
        returned = self.call(cpu, name, what)
        self.errors = [fault.error for fault in self.machine.faults if fault.vector == 14]
        return returned

    def call(self, cpu: int, name: str, argument: int) -> int | None:
        if cpu == 0:
            ended, returned = self.machine.call(self.la(name), argument=argument)
            return returned if ended == "returned" else None
        got: list[int] = []
        thread = self.kernel.create_thread(name, cpu, function=self.la(name), argument=argument, runs=False)
        thread.on_exit = got.append
        self.kernel.cpus.current = 0
        self.kernel.sched.start(thread)
        self.machine.hub.run(lambda: thread.state.name == "DEAD")
        if not got:
            self.kernel.abandon(thread)
        return got[0] if got else None


def beyond(kernel) -> int:
    start = kernel.layout.vmalloc_start + 2 * SLOT
    la = kernel.vmalloc.vmalloc_node_range(2 << 20, 1, start, start + SLOT, int(GFP_KERNEL), kernel.init_mm.prots.kernel, 0, -1)
    assert la == start
    return la


def crowd(kernel) -> None:
    """Leave no room for a stack in the first top-level entry of the vmalloc region."""
    assert kernel.vmalloc.get_vm_area(SLOT, GET_VM) is not None
    while kernel.create_thread("filler", runs=False).stack >> 39 == kernel.layout.vmalloc_start >> 39:
        pass


def entry(kernel, mm: Mm, la: int) -> int:
    return kernel.memory.read_u64(mm.pgd + 8 * (la >> kernel.layout.pgdir_shift & 511))


@every_number_of_cpus
def test_C61_before_5_8_each_mm_faults_once_for_a_top_level_entry_whichever_cpu_has_it_loaded(cpus):
    on = Cpus(cpus, kernel="5.4")
    mms = [on.mm() for _ in range(cpus)]
    la = on.beyond()
    assert [entry(on.kernel, mm, la) for mm in mms] == [0] * cpus
    for cpu, mm in enumerate(mms):
        assert (on.do(cpu, "read", mm, la), on.errors) == (0, [0])
        assert entry(on.kernel, mm, la) == entry(on.kernel, on.kernel.init_mm, la) != 0
        assert (on.do(cpu, "read", mm, la + PAGE_SIZE), on.errors) == (0, [])
    for cpu in range(cpus):
        assert (on.do(cpu, "read", mms[cpu - 1], la), on.errors) == (0, []), "another CPU's fault served the mm"
    assert on.machine.statistics.exceptions[14] == cpus


@every_number_of_cpus
@pytest.mark.parametrize("kernel", ["6.12", "6.1"])
def test_C61_since_5_8_no_cpu_and_no_mm_ever_faults(kernel, cpus):
    on = Cpus(cpus, kernel=kernel)
    mms = [on.mm() for _ in range(cpus)]
    la = on.beyond()
    for cpu, mm in enumerate(mms):
        assert (on.do(cpu, "read", mm, la), on.errors) == (0, [])


@every_number_of_cpus
def test_C62_one_entry_opens_512_gib_to_every_cpu_and_a_guard_page_there_is_an_oops(cpus):
    on = Cpus(cpus, kernel="5.4")
    mm = on.mm()
    la = on.beyond()
    assert (on.do(cpus - 1, "read", mm, la), on.errors) == (0, [0])
    for cpu in range(cpus):
        assert (on.do(cpu, "read", mm, la + (2 << 20) - PAGE_SIZE), on.errors) == (0, [])
    assert (on.do(cpus - 1, "read", mm, la + (2 << 20)), on.errors) == (None, [0])
    assert any("BUG: unable to handle page fault" in line for line in on.machine.log_lines())


@every_number_of_cpus
def test_C62_a_guard_page_is_no_reason_to_fault_twice_even_if_its_entry_was_copied_by_that_fault(cpus):
    on = Cpus(cpus, kernel="5.4")
    mm = on.mm()
    la = on.beyond()
    assert (on.do(cpus - 1, "read", mm, la + (2 << 20)), on.errors) == (None, [0])
    assert entry(on.kernel, mm, la)


@pytest.mark.parametrize("how", ["irq", "nmi"])
def test_C61_before_5_8_a_fault_inside_an_interrupt_is_repaired_in_the_mm_that_is_loaded_and_an_nmi_does_not_warn(how):
    on = Cpus(1, kernel="5.4")
    mm = on.mm()
    la = on.beyond()
    contexts: list[tuple[int, int]] = []
    kernel = on.kernel

    def handler(*vector: int) -> bool:
        count = kernel.preempt(0)
        kernel.sched.call_guest(on.la("handler"), la)
        contexts.append((count.hardirq, count.nmi))
        return True

    kernel.irqs.nmi_handlers.append(handler)
    kernel.irqs.handlers[0x40] = handler
    on.do(0, "interrupted", mm, la, on.la(how))
    assert (contexts, on.errors) == ([(1, int(how == "nmi"))], [0])
    assert entry(kernel, mm, la)
    assert list(on.machine.log_lines()) == []


def test_C61_an_nmi_handlers_fault_does_not_show_in_the_cr2_of_what_it_interrupted():
    on = Cpus(1, kernel="5.4")
    mm = on.mm()
    la = on.beyond()

    def handler() -> bool:
        on.kernel.sched.call_guest(on.la("handler"), la)
        return True

    on.kernel.irqs.nmi_handlers.append(handler)
    on.machine.cpu.set_reg("cr2", 0x1234)
    on.do(0, "interrupted", mm, la, on.la("nmi"))
    assert on.errors == [0]
    assert on.machine.cpu.reg("cr2") == 0x1234


@every_number_of_cpus
def test_C61_vmalloc_sync_mappings_and_unmappings_spare_every_mm_the_fault(cpus):
    for sync in ("vmalloc_sync_mappings", "vmalloc_sync_unmappings"):
        on = Cpus(cpus, kernel="5.4")
        mms = [on.mm() for _ in range(cpus)]
        la = on.beyond()
        getattr(on.kernel.init_mm, sync)()
        for cpu, mm in enumerate(mms):
            assert (on.do(cpu, "read", mm, la), on.errors) == (0, [])


def on_a_new_stack(synced: bool) -> tuple[Cpus, tuple[str, int | None]]:
    """Switch to an mm that lacks the top-level entry of the stack in use."""
    on = Cpus(1, kernel="5.4", tlb="none")
    mm = on.mm()
    crowd(on.kernel)
    if not synced:
        on.kernel.contexts.sync_current_stack = lambda pgd: None
    ended = on.machine.call(on.la("switch"), argument=mm.pgd)
    assert on.machine.thread.stack >> 39 != on.kernel.layout.vmalloc_start >> 39
    return on, ended


def test_C61_before_5_8_a_switch_of_mms_gives_the_next_one_the_stack_that_is_in_use():
    on, ended = on_a_new_stack(synced=True)
    assert ended == ("returned", 7)
    assert on.machine.faults == ()


def test_C61_before_5_8_a_stack_that_the_loaded_mm_lacks_is_a_double_fault_and_no_vmalloc_fault():
    on, ended = on_a_new_stack(synced=False)
    assert ended[0] == "panic"
    assert [fault.vector for fault in on.machine.faults] == [8]


def test_C61_before_5_8_the_next_threads_stack_is_touched_before_it_is_used():
    on = Cpus(1, kernel="5.4", tlb="none")
    mm = on.mm()
    kernel = on.kernel
    crowd(kernel)
    thread = kernel.create_thread("reader", function=on.la("init_module"), runs=False)
    thread.mm = mm
    kernel.sched.start(thread)
    for probed in (False, True):
        assert bool(entry(kernel, mm, thread.stack)) == probed
        on.machine.hub.run(lambda: thread.state.name == "DEAD")
    assert on.machine.faults == ()


@pytest.mark.parametrize("profile", [V6_12, V6_1])
@pytest.mark.parametrize("preallocated", [True, False])
def test_C61_since_5_8_a_new_top_level_entry_is_copied_to_all_mms_at_once_and_with_preallocation_there_is_none(
    profile, preallocated
):
    k = boot(dataclasses.replace(profile, preallocated_vmalloc=preallocated))
    mms = [Mm(k.init_mm) for _ in range(3)]
    synced: list[tuple[int, int]] = []
    sync = k.init_mm.sync
    k.init_mm.sync = lambda start, end: (synced.append((start, end)), sync(start, end))[1]
    la = beyond(k)
    reference = entry(k, k.init_mm, la)
    assert reference and [entry(k, mm, la) for mm in mms] == [reference] * 3
    assert bool(synced) is not preallocated
    assert bool(k.init_mm.modified & 2) is not preallocated, "PGTBL_P4D_MODIFIED, the mask of 4 levels"
    k.vmalloc.vmalloc(PAGE_SIZE)
    assert len(synced) == (0 if preallocated else 1), "an entry that is there is not copied again"


def test_C61_before_5_8_a_new_top_level_entry_is_copied_to_nobody():
    k = boot(V5_4)
    mms = [Mm(k.init_mm) for _ in range(3)]
    la = beyond(k)
    assert entry(k, k.init_mm, la)
    assert [entry(k, mm, la) for mm in mms] == [0] * 3
