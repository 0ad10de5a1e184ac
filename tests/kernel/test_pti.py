"""Page-table isolation from user mode: which tables user code, the handler and the way back run on."""

from __future__ import annotations

import pytest
from booted import machine, run
from smp_machine import SmpMachine

from emu.guest.expect import Outcome
from emu.kernel.pti import PageTableIsolation
from emu.kernel.traps import Trap
from emu.machine import Machine
from emu.mmu.registers import CR3_NO_INVALIDATE

SETUP = """
    mov edi, 4096
    call vzalloc
    mov r12, rax
    call vmemu_new_mm
    mov rbx, rax
    mov rdi, rbx
    mov esi, 0x400000
    mov edx, 8192
    mov ecx, 1
    call vmemu_map_user
    mov cr3, rbx
    stac
    mov edi, 0x400000
    lea rsi, [user_code]
    mov edx, 64
    call memcpy
    clac
    mov rdi, rbx
    mov esi, 0x400000
    mov edx, 0x402000
    call vmemu_enter_user
    ret
user_code:
"""
INT_80 = "    int 0x80\n"


def user(on: Machine, code: str) -> tuple[Outcome, list[tuple[str, int]]]:
    """Run user code, R12 a vmalloc address and RBX the mm; what was in CR3 at each entry and each time a handler looked at it."""
    seen: list[tuple[str, int]] = []
    entry = on.kernel.exceptions
    handle, source = entry.handle, entry.oops_source

    def handled(cpu, vector):
        seen.append(("entry", cpu.reg("cr3")))
        ending = handle(cpu, vector)
        seen.append(("exit", cpu.reg("cr3")))
        return ending

    def looked(cpu):
        seen.append(("handler", cpu.reg("cr3")))
        return source(cpu)

    entry.handle, entry.oops_source = handled, looked
    return run(on, SETUP + code + "    ud2\n    times 64 db 0x90"), seen


@pytest.mark.parametrize("tlb", ["infinite", "none"])
@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
def test_user_mode_runs_on_the_user_pgd_and_the_handler_on_the_kernels(kernel, tlb):
    on = machine(pti=True, kernel=kernel, tlb=tlb)
    outcome, seen = user(on, INT_80)
    (pgd,) = on.mm_api.mms
    user_pgd = on.mm_api.mms[pgd].user_pgd
    assert outcome.ended == "signal"
    turns = [what for what in seen if what[0] != "handler"]
    assert turns == [("entry", user_pgd), ("exit", user_pgd), ("entry", user_pgd), ("exit", pgd)]
    assert {cr3 for what, cr3 in seen if what == "handler"} == {pgd}


@pytest.mark.parametrize(("pti", "error"), [(True, 4), (False, 5)])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_vmalloc_address_is_not_mapped_for_user_mode_but_with_isolation_off_only_forbidden(levels, pti, error):
    outcome, _ = user(machine(pti=pti, levels=levels), "    mov rax, [r12]\n")
    (fault,) = (fault for fault in outcome.faults if fault.vector == 14)
    assert (fault.error, fault.address, fault.rip) == (error, fault.registers["r12"], 0x400000)
    assert any(f"segfault at {fault.address:x} " in line and "error 5" in line for line in outcome.log)


def test_without_isolation_cr3_is_left_alone():
    on = machine()
    _, seen = user(on, INT_80)
    assert {cr3 for _, cr3 in seen} == set(on.mm_api.mms)


def test_the_way_into_the_kernel_leaves_no_vmalloc_translation_to_user_mode():
    # The handler has used vmalloc memory (its thread's stack and the module); the switch of CR3 drops what the TLB had of it.
    outcome, _ = user(machine(pti=True), INT_80 + "    mov rax, [r12]\n")
    assert [(fault.vector, fault.error) for fault in outcome.faults if fault.vector == 14] == [(14, 4)]


def test_user_code_on_the_kernels_pgd_cannot_be_fetched():
    on = machine(pti=True)
    enter = on.mm_api.mms
    outcome = run(on, SETUP.replace("    call vmemu_enter_user\n", """
    push 0x2b
    push 0x402000
    push 0x202
    push 0x33
    push 0x400000
    iretq
""") + "    ud2\n    times 64 db 0x90")
    assert len(enter) == 1
    assert [(fault.vector, fault.error, fault.address) for fault in outcome.faults] == [(14, 0x15, 0x400000)]


def test_a_double_fault_on_the_user_pgd_is_reported_from_the_kernels():
    on = machine(pti=True, tlb="none")
    outcome = run(on, """
    sub rsp, 8
    call vmemu_new_mm
    mov rdi, rax
    call vmemu_user_pgd
    mov cr3, rax
    nop
    ret""")
    (pgd,) = on.mm_api.mms
    assert (outcome.ended, [fault.vector for fault in outcome.faults]) == ("panic", [Trap.DF])
    assert on.cpu.reg("cr3") == pgd
    assert any(f"CR3: {pgd:016x}" in line for line in outcome.log)


@pytest.mark.parametrize("pcid", [False, True])
def test_an_nmi_in_kernel_code_on_a_user_pgd_goes_back_to_that(pcid):
    m = SmpMachine(1, pcid=pcid, pti=True)
    mm = m.mm()
    m.contexts.switch_mm_irqs_off(mm.context)
    cpu, pti = m.cpu[0], PageTableIsolation(m.contexts)
    kernel = cpu.reg("cr3")
    pti.to_user(cpu)
    user = cpu.reg("cr3")
    assert user == (kernel | 0x1000 | (0x800 if pcid else 0))
    pti.enter(cpu, Trap.NMI, 0x10, 0x100)
    assert cpu.reg("cr3") == kernel
    pti.leave(cpu, 0x10, 0x100)
    assert cpu.reg("cr3") == user
    pti.enter(cpu, Trap.GP, 0x10, 0x100)
    assert cpu.reg("cr3") == user, "an exception that has no stack of its own cannot have come there"


def test_with_pcids_an_nmi_on_a_user_pgd_keeps_its_translations_unless_its_handler_flushed():
    m = SmpMachine(1, pcid=True, pti=True)
    mm = m.mm()
    m.contexts.switch_mm_irqs_off(mm.context)
    cpu, pti = m.cpu[0], PageTableIsolation(m.contexts)
    pti.to_user(cpu)
    for flushes, kept in ((False, CR3_NO_INVALIDATE), (True, 0)):
        pti.enter(cpu, Trap.NMI, 0x10, 0x100)
        assert cpu.cr3_writes[-1] & CR3_NO_INVALIDATE
        if flushes:
            m.contexts.invalidate_user_asid(0, m.contexts.cpu_tlbstate[0].loaded_mm_asid)
        pti.leave(cpu, 0x10, 0x100)
        assert cpu.cr3_writes[-1] & CR3_NO_INVALIDATE == kept
    m.tlb.validate()


def test_user_mode_and_the_kernel_have_pcids_of_their_own_and_entries_and_returns_flush_nothing():
    on = machine(pti=True, pcid=True)
    written: list[int] = []
    load = on.cpu.mmu.load_cr3
    on.cpu.mmu.load_cr3 = lambda value: (written.append(value), load(value))[1]
    outcome, seen = user(on, INT_80 + INT_80)
    (mm,) = on.mm_api.mms.values()
    kernel, user_mode = mm.pgd | 2, mm.user_pgd | 2050
    assert outcome.ended == "signal"
    assert {cr3 for what, cr3 in seen if what == "handler"} == {kernel}
    assert {cr3 for what, cr3 in seen if what == "entry"} == {user_mode}
    keep = CR3_NO_INVALIDATE
    # The guest's own load of CR3; the switch to the mm, which owes its user PCID a flush; two system calls; the #UD.
    assert written == [mm.pgd, kernel, user_mode, *(kernel | keep, user_mode | keep) * 2, kernel | keep]
    on.kernel.contexts.validate()


@pytest.mark.parametrize("pcid", [False, True])
@pytest.mark.parametrize("pti", [False, True])
def test_a_syscall_switches_to_the_kernels_pgd_and_back_and_returns_enosys(pti, pcid):
    on = machine(pti=pti, pcid=pcid)
    written: list[int] = []
    load = on.cpu.mmu.load_cr3
    on.cpu.mmu.load_cr3 = lambda value: (written.append(value & ~CR3_NO_INVALIDATE), load(value))[1]
    outcome, _ = user(on, "    syscall\n    cmp rax, -38\n    jne .bad\n    syscall\n.bad:\n")
    (mm,) = on.mm_api.mms.values()
    (fault,) = outcome.faults
    assert (fault.vector, fault.registers["rax"]) == (Trap.UD, (1 << 64) - 38)
    assert fault.rip == fault.registers["rcx"], "the second one has come back as well"
    kernel, user_mode = (mm.pgd | 2, mm.user_pgd | 2050) if pcid else (mm.pgd, mm.user_pgd)
    # The guest's load, the switch to the mm, the way to user mode, two system calls, the exception.
    assert written == [mm.pgd, kernel, *((user_mode, kernel) * 3 if pti else ())]


def test_enter_user_without_an_mm_is_einval():
    assert run(machine(), "    mov edi, 0x1000\n    jmp vmemu_enter_user").returned == (1 << 64) - 22
