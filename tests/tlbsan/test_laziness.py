"""What Linux leaves in TLBs on purpose, and uses that its rules allow: no report. The rule ends where a call returns."""

from __future__ import annotations

import pytest
from planted import skip_the_call

from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.machine import Machine
from emu.run import run_to_end
from emu.tlbsan import Kind, TlbSan

_FRAME = """
section .text
init_module:
    push rbx
    push r12
    push r13
{boss}
    xor eax, eax
    pop r13
    pop r12
    pop rbx
    ret
worker:
{worker}
    ret
helper:
{helper}
    ret
section .data
p: dq 0
handle: dq 0
handle_2: dq 0
stage: dq 0
section .bss
pages: resq 8
"""
_START = """
    mov edi, 1
    lea rsi, [worker]
    xor edx, edx
    call vmemu_run_on
    mov [handle], rax
"""
_JOIN = """
    mov rdi, [handle]
    call vmemu_join
"""
_PAGE = """
    mov edi, 4096
    call vmalloc
    mov [p], rax
"""


def at(number: int, label: str) -> str:
    """Wait until the stage is reached."""
    return f"{label}:\n    pause\n    cmp qword [stage], {number}\n    jb {label}\n"


def reach(number: int) -> str:
    return f"    mov qword [stage], {number}\n"


def change(function: str, pages: int = 1) -> str:
    return f"    mov rdi, [p]\n    mov esi, {pages}\n    call {function}\n"


def run(boss: str, worker: str, helper: str = "", *, cpus: int = 2, **options: bool) -> tuple[str, TlbSan, Machine]:
    """CPU 0 runs `boss`, CPU 1 `worker`: how it ended, what TLBSan saw."""
    program = assemble(_FRAME.format(boss=boss, worker=worker, helper=helper), "lazy.asm")
    result, machine = run_to_end(program, MachineOptions(cpus=cpus, memory=64 << 20, max_instructions=1_000_000, **options))
    assert machine.tlbsan is not None
    return result.outcome.ended, machine.tlbsan, machine


def silent(ended: str, san: TlbSan, _: Machine) -> bool:
    """The guest did all that it should, and nothing was said."""
    return ended == "returned" and not san.findings


def test_rights_that_were_widened_may_be_used_through_the_old_entry_and_are_looked_up_anew() -> None:
    boss = _PAGE + change("set_memory_ro") + _START + at(1, "read") + change("set_memory_rw") + reach(2) + _JOIN
    worker = "    mov rax, [p]\n    mov rcx, [rax]\n" + reach(1) + at(2, "changed") + "    mov rcx, [rax]\n    mov [rax], rcx\n"
    assert silent(*run(boss, worker))


def test_an_entry_that_becomes_present_is_used_without_a_flush() -> None:
    boss = _START + _PAGE + "    mov qword [rax], 5\n" + reach(1) + _JOIN
    assert silent(*run(boss, at(1, "made") + "    mov rax, [p]\n    mov rcx, [rax]\n    mov [rax + 8], rcx\n"))


def test_accessed_and_dirty_bits_that_software_clears_make_nothing_stale() -> None:
    boss = _PAGE + _START + at(1, "used") + """
    mov rdi, [p]
    lea rsi, [pages]
    call lookup_address
    mov rcx, [rax]
    and rcx, -0x61
    mov [rax], rcx
""" + reach(2) + _JOIN
    worker = "    mov rax, [p]\n    mov [rax], rax\n" + reach(1) + at(2, "cleared") + "    mov rcx, [rax]\n    mov [rax], rcx\n"
    ended, san, _ = run(boss, worker)
    assert ended == "returned" and not san.findings


# CPU 1 has interrupts off, so set_memory_ro waits for it; meanwhile it writes.
_WINDOW_BOSS = _PAGE + _START + at(1, "ready") + reach(2) + change("set_memory_ro") + reach(3) + _JOIN
_WRITES_IN_WINDOW = """
    mov rax, [p]
    mov [rax], rax
    cli
""" + reach(1) + at(2, "begun") + """
    mov ecx, 50
some_time:
    pause
    dec ecx
    jnz some_time
in_the_window:
    mov [rax + 8], rax
"""


def test_a_write_while_set_memory_ro_is_under_way_is_no_use_of_revoked_rights() -> None:
    ended, san, _ = run(_WINDOW_BOSS, _WRITES_IN_WINDOW + "    sti\n" + at(3, "done") + "    mov rcx, [rax]\n")
    assert ended == "returned" and not san.findings
    assert san.counts().legal == 1, "the write did go through a stale entry"


def test_the_write_faults_once_the_flush_is_done() -> None:
    ended, san, machine = run(_WINDOW_BOSS, _WRITES_IN_WINDOW + "    sti\n" + at(3, "done") + "    mov [rax], rcx\n")
    assert ended == "oops" and not san.findings and machine.faults[-1].error == 3


def test_a_write_after_set_memory_ro_returned_is_reported_even_if_one_before_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # CPU 2 keeps CPU 0 waiting; CPU 1 is never asked to flush, writes meanwhile, and writes again later.
    boss = _PAGE + _START + """
    mov edi, 2
    lea rsi, [helper]
    xor edx, edx
    call vmemu_run_on
    mov [handle_2], rax
""" + at(2, "ready") + reach(3) + change("set_memory_ro") + reach(5) + _JOIN + "    mov rdi, [handle_2]\n    call vmemu_join\n"
    worker = at(1, "held") + "    mov rax, [p]\n    mov [rax], rax\n" + reach(2) + at(3, "begun") + """
    mov ecx, 50
some_time:
    pause
    dec ecx
    jnz some_time
    mov [rax + 8], rax
""" + reach(4) + at(5, "returned") + "later:\n    mov [rax + 16], rax\n"
    helper = "    cli\n" + reach(1) + at(4, "written") + "    sti\n"
    skip_the_call(monkeypatch, 1)
    ended, san, _ = run(boss, worker, helper, cpus=3)
    assert ended == "returned"
    finding, = san.findings
    assert finding.kind is Kind.REVOKED_RIGHTS and finding.symbol.startswith("later+0x0/")
    assert san.counts().legal == 1


def test_what_vfree_unmaps_may_not_be_used_even_while_it_is_under_way() -> None:
    boss = _PAGE + _START + at(1, "ready") + reach(2) + "    mov rdi, [p]\n    call vfree\n" + _JOIN
    _, san, _ = run(boss, _WRITES_IN_WINDOW + "    sti\n", debug_pagealloc=True)
    finding, = san.findings
    assert finding.kind is Kind.USE_AFTER_UNMAP and finding.symbol.startswith("in_the_window+0x0/")


def test_freed_memory_that_nobody_touches_stays_in_tlbs_in_silence() -> None:
    boss = _PAGE + _START + _JOIN + "    mov rdi, [p]\n    call vfree\n"
    ended, san, _ = run(boss, "    mov rax, [p]\n    mov [rax], rax\n")
    assert ended == "returned" and not san.findings and san.counts().marked > 0


def test_an_address_that_was_purged_may_be_used_by_its_next_owner() -> None:
    boss = _PAGE + "    mov [pages], rax\n" + _START + at(1, "used") + """
    mov rdi, [p]
    call vfree
    call vm_unmap_aliases
""" + _PAGE + reach(2) + _JOIN + "    mov rax, [pages]\n    cmp rax, [p]\n    je same\n    ud2\nsame:\n"
    worker = "    mov rax, [p]\n    mov [rax], rax\n" + reach(1) + at(2, "again") + "    mov [rax + 8], rax\n"
    assert silent(*run(boss, worker))


def test_vm_map_ram_blocks_are_silent_over_their_whole_life() -> None:
    boss = _PAGE + """
    mov rdi, rax
    call vmalloc_to_page
    mov [pages], rax
    mov r12d, 600
another:
    lea rdi, [pages]
    mov esi, 1
    mov edx, -1
    call vm_map_ram
    mov [p], rax
    mov [rax], rax
    cmp qword [handle], 0
    jne started
""" + _START + """
started:
    mov rdi, [p]
    mov esi, 1
    call vm_unmap_ram
    dec r12
    jnz another
    call vm_unmap_aliases
""" + _JOIN
    ended, san, _ = run(boss, "    nop\n")
    assert ended == "returned" and not san.findings and san.counts().marked > 500


def test_the_stacks_of_threads_that_exited_are_freed_and_reused_in_silence() -> None:
    boss = "    mov r12d, 12\nthread:\n" + _START + _JOIN + """
    test r12d, 3
    jnz unpurged
    call vm_unmap_aliases
unpurged:
    dec r12d
    jnz thread
"""
    worker = _PAGE.replace("mov [p]", "mov rdi") + "    mov [rdi], rdi\n    call vfree\n"
    assert silent(*run(boss, worker))
