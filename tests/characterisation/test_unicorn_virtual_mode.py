"""What the machine relies on in Unicorn's UC_TLB_VIRTUAL mode. A new Unicorn must not change it silently."""

import mmap
import struct

import pytest
import unicorn as uc_
from bare_unicorn import CODE, DATA, FETCH, GDT, RAM, READ, USER_CODE, WRITE, Bare, R, W, X
from unicorn import x86_const as x86

LOAD = "488b07"  # mov rax, [rdi]
STORE = "488907"  # mov [rdi], rax
HLT = "f4"


def test_a_fill_is_told_the_page_and_the_kind_of_access() -> None:
    cpu = Bare()
    cpu.run(LOAD + HLT, rdi=DATA + 0x123)
    cpu.run(STORE + HLT, rdi=DATA + 0x5008)
    assert [fill for fill in cpu.fills if fill[0] >= DATA and fill[0] < DATA + RAM] == [(DATA, READ), (DATA + 0x5000, WRITE)]
    assert (CODE, FETCH) in cpu.fills


def test_a_hit_in_the_soft_tlb_asks_nothing_until_it_is_flushed() -> None:
    cpu = Bare()
    cpu.run(LOAD + LOAD + HLT, rdi=DATA)
    cpu.run(at=CODE)
    assert cpu.asked(DATA) == [READ], "nor does a restart of emu_start flush it"
    cpu.flush()
    cpu.run(at=CODE)
    assert cpu.asked(DATA) == [READ, READ]


def test_every_fill_is_one_4k_page() -> None:
    cpu = Bare()
    cpu.run("488b07 488b8700100000 f4", rdi=DATA)
    assert cpu.asked(DATA) == cpu.asked(DATA + 0x1000) == [READ]


def test_a_store_through_a_page_filled_without_write_asks_again() -> None:
    cpu = Bare()
    cpu.rights = {READ: R, WRITE: R | W, FETCH: R | X}
    cpu.run(LOAD + STORE + STORE + HLT, rdi=DATA)
    assert cpu.asked(DATA) == [READ, WRITE]


def test_a_page_filled_with_write_for_a_read_does_not_ask_at_the_store() -> None:
    cpu = Bare()
    cpu.rights = {READ: R | W, WRITE: R | W, FETCH: R | X}
    cpu.run(LOAD + STORE + HLT, rdi=DATA)
    assert cpu.asked(DATA) == [READ]


def test_a_fetch_through_a_page_filled_without_execute_asks_again() -> None:
    cpu = Bare()
    cpu.put(DATA, b"\xf4")
    cpu.run(LOAD + "ffe7", rdi=DATA)  # jmp rdi
    assert cpu.asked(DATA) == [READ, FETCH]


def test_a_data_read_of_a_page_filled_for_execution_alone_asks_again() -> None:
    cpu = Bare()
    cpu.rights = {READ: R, WRITE: R | W, FETCH: X}
    cpu.run("488b05f9ffffff" + HLT)  # mov rax, [rip - 7]
    assert cpu.asked(CODE)[:2] == [FETCH, READ]


@pytest.mark.parametrize("code", ["480107", "488707", "f0480fc107", "48ff07"])  # add, xchg, lock xadd, inc
def test_a_read_modify_write_instruction_asks_for_a_read_first(code: str) -> None:
    cpu = Bare()
    cpu.run(code + HLT, rdi=DATA)
    assert cpu.asked(DATA) == [READ, WRITE]


def test_a_refused_fill_raises_with_rip_at_the_instruction_and_the_run_can_resume() -> None:
    cpu = Bare()
    cpu.refuse.add(DATA)
    with pytest.raises(uc_.UcError) as error:
        cpu.run("90" + LOAD + HLT, rdi=DATA + 8)
    assert error.value.errno == uc_.UC_ERR_EXCEPTION
    assert cpu.reg(x86.UC_X86_REG_RIP) == CODE + 1
    assert cpu.vectors == []
    cpu.refuse.clear()
    cpu.put(DATA + 8, struct.pack("<Q", 77))
    for _ in range(5):  # any number of refusals may follow each other
        cpu.refuse.add(DATA)
        cpu.flush()
        with pytest.raises(uc_.UcError):
            cpu.run(at=CODE + 1)
    cpu.refuse.clear()
    cpu.run(at=CODE + 1)
    assert cpu.reg(x86.UC_X86_REG_RAX) == 77


def test_an_exception_in_the_fill_callback_surfaces_as_a_unicorn_error_with_rip_at_the_instruction() -> None:
    cpu = Bare()

    def fail(page: int, access: int) -> None:
        if page == DATA:
            raise KeyError("lost")

    cpu.on_fill = fail
    with pytest.raises(uc_.UcError):
        cpu.run("90" + LOAD + HLT, rdi=DATA)
    assert cpu.reg(x86.UC_X86_REG_RIP) == CODE + 1


def test_a_store_across_pages_asks_for_both_before_it_writes() -> None:
    cpu = Bare()
    cpu.refuse.add(DATA + 0x1000)
    with pytest.raises(uc_.UcError):
        cpu.run(STORE + HLT, rdi=DATA + 0xFFC, rax=0x1122_3344_5566_7788)
    assert (cpu.asked(DATA), cpu.asked(DATA + 0x1000)) == ([WRITE], [WRITE])
    assert cpu.get(DATA + 0xFFC, 4) == bytes(4)


def test_rep_movs_stops_in_step_with_the_element_that_faults() -> None:
    cpu = Bare()
    cpu.put(DATA, bytes(range(64)))
    cpu.refuse.add(DATA + 0x5000)
    with pytest.raises(uc_.UcError):
        cpu.run("f3a4" + HLT, rsi=DATA, rdi=DATA + 0x4FF0, rcx=32)
    assert cpu.reg(x86.UC_X86_REG_RIP) == CODE
    assert cpu.reg(x86.UC_X86_REG_RCX) == 16
    assert (cpu.reg(x86.UC_X86_REG_RSI), cpu.reg(x86.UC_X86_REG_RDI)) == (DATA + 16, DATA + 0x5000)
    cpu.refuse.clear()
    cpu.run(at=CODE)
    assert cpu.get(DATA + 0x4FF0, 32) == bytes(range(32))


def test_there_is_no_canonical_check() -> None:
    cpu = Bare()
    cpu.run(LOAD + HLT, rdi=0x8000_0000_0000_0000)
    assert cpu.asked(0x8000_0000_0000_0000) == [READ]


def test_supervisor_accesses_with_and_without_ac_have_their_own_soft_tables_under_smap() -> None:
    cpu = Bare()
    cpu.reg(x86.UC_X86_REG_CR4, cpu.reg(x86.UC_X86_REG_CR4) | 1 << 21)
    cpu.run(LOAD + "0f01cb" + LOAD + LOAD + "0f01ca" + LOAD + HLT, rdi=DATA)  # stac, clac
    assert cpu.asked(DATA) == [READ, READ]


def test_user_and_supervisor_accesses_have_their_own_soft_tables() -> None:
    cpu = Bare()
    cpu.run(LOAD + HLT, rdi=DATA)
    cpu.enter_user(LOAD + HLT)
    assert cpu.asked(DATA) == [READ, READ]
    assert cpu.vectors == [13], "HLT at CPL3 is #GP"


@pytest.mark.parametrize("code", ["8ed8", "0f02c1", "0f00e1"])  # mov ds, eax; lar eax, cx; verr cx
def test_a_descriptor_read_at_cpl3_asks_as_a_supervisor_access(code: str) -> None:
    cpu = Bare()
    cpu.run("8ed8" + HLT, rax=0x18)  # the supervisor table knows the GDT's page
    asked = cpu.asked(GDT).count(READ)
    assert asked
    cpu.run(HLT, rax=0x2B, rcx=0x2B)
    cpu.enter_user(code + HLT)
    assert cpu.asked(GDT).count(READ) == asked, "served from the supervisor table, though CPL is 3"


# ------------------------------------------------------------------------------------------------ flushing


def test_a_write_of_cr3_flushes_the_soft_tlb_while_paging_is_on() -> None:
    cpu = Bare()
    cpu.reg(x86.UC_X86_REG_CR0, cpu.reg(x86.UC_X86_REG_CR0) | 1 << 31)
    cpu.run(LOAD + HLT, rdi=DATA)
    cpu.reg(x86.UC_X86_REG_CR3, 0x5000)
    cpu.run(at=CODE)
    assert cpu.asked(DATA) == [READ, READ]


def test_a_flush_inside_a_code_hook_counts_for_the_next_access_of_the_block() -> None:
    cpu = Bare()
    cpu.uc.hook_add(uc_.UC_HOOK_CODE, lambda *_: cpu.flush(), begin=CODE + 3, end=CODE + 3)
    cpu.run(LOAD + LOAD + HLT, rdi=DATA)
    assert cpu.asked(DATA) == [READ, READ]


def test_a_context_restore_does_not_flush_the_soft_tlb() -> None:
    cpu = Bare()
    saved = cpu.uc.context_save()
    cpu.run(LOAD + HLT, rdi=DATA)
    cpu.uc.context_restore(saved)
    cpu.run(LOAD + HLT, rdi=DATA)
    assert cpu.asked(DATA) == [READ]


def test_guest_invlpg_drops_one_4k_page_of_the_soft_tlb() -> None:
    cpu = Bare()
    cpu.run(LOAD + "488b8700100000" + "0f013f" + LOAD + "488b8700100000" + HLT, rdi=DATA)  # invlpg [rdi]
    assert (cpu.asked(DATA), cpu.asked(DATA + 0x1000)) == ([READ, READ], [READ])


# ------------------------------------------------------------------------------------------------ stopping and hooks


def test_hlt_ends_a_run_with_rip_past_it() -> None:
    cpu = Bare()
    cpu.run("9090" + HLT)
    assert cpu.reg(x86.UC_X86_REG_RIP) == CODE + 3
    assert cpu.vectors == []


def test_emu_stop_in_a_code_hook_stops_before_the_instruction() -> None:
    cpu = Bare()
    cpu.uc.hook_add(uc_.UC_HOOK_CODE, lambda uc, *_: uc.emu_stop(), begin=CODE + 3, end=CODE + 3)
    cpu.run("48ffc0" * 3 + HLT, rax=0)
    assert (cpu.reg(x86.UC_X86_REG_RIP), cpu.reg(x86.UC_X86_REG_RAX)) == (CODE + 3, 1)


def test_a_code_hook_added_by_the_fill_of_a_page_fires_at_its_first_run() -> None:
    cpu = Bare()
    seen: list[int] = []

    def hook(page: int, access: int) -> None:
        if page == CODE and access == FETCH and cpu.asked(CODE) == [FETCH]:
            cpu.uc.hook_add(uc_.UC_HOOK_CODE, lambda _uc, at, *_: seen.append(at), begin=CODE + 1, end=CODE + 1)

    cpu.on_fill = hook
    cpu.run("909090" + HLT)
    assert seen == [CODE + 1]


def test_a_code_hook_added_after_translation_fires_only_once_the_block_is_translated_anew() -> None:
    cpu = Bare()
    seen: list[int] = []
    cpu.run("909090" + HLT)
    cpu.uc.hook_add(uc_.UC_HOOK_CODE, lambda _uc, at, *_: seen.append(at), begin=CODE + 1, end=CODE + 1)
    cpu.run(at=CODE)
    before = list(seen)
    cpu.uc.ctl_flush_tb()
    cpu.run(at=CODE)
    assert (before, seen) == ([], [CODE + 1])


# ------------------------------------------------------------------------------------------------ several CPUs


def test_data_is_coherent_between_instances_over_one_buffer_and_code_is_not() -> None:
    memory = mmap.mmap(-1, RAM)
    one, two = Bare(memory), Bare(memory)
    one.run(STORE + HLT, rdi=DATA, rax=5)
    two.run(LOAD + HLT, rdi=DATA)
    assert two.reg(x86.UC_X86_REG_RAX) == 5
    code = USER_CODE  # any page: both run it at CPL0
    two.run("b801000000" + HLT, at=code)  # mov eax, 1
    one.put(code, bytes.fromhex("b802000000"))
    two.run(at=code)
    assert two.reg(x86.UC_X86_REG_RAX) == 1, "the old translation runs"
    two.uc.ctl_flush_tb()
    two.run(at=code)
    assert two.reg(x86.UC_X86_REG_RAX) == 2
