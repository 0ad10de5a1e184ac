"""What the engine makes visible that Unicorn hides: code changes, page boundaries, stale soft TLBs, requests to stop."""

from __future__ import annotations

import threading
import time

import pytest
from bare_cpu import CODE, DATA, HIGH, NON_CANONICAL, USER_CODE, USER_DATA, BareCpu, Entered

from emu.cpu import Halted, Interrupted
from emu.exceptions import Vector
from emu.mmu.entry import RW, A, D, P
from emu.mmu.fault import PfError
from emu.mmu.registers import Cr4
from emu.mmu.tlb import Geometry, Tlb

UD2 = b"\x0f\x0b"
INC_RBX = b"\x48\xff\xc3"
PRESENT = P | RW | A | D


@pytest.fixture
def cpu() -> BareCpu:
    return BareCpu()


def halts(cpu: BareCpu, source: str | bytes, **registers: int) -> None:
    stop = cpu.run_code(source, **registers)
    assert isinstance(stop, Halted), stop


# ---- fetching


def test_code_at_address_0_runs_and_may_be_jumped_to(cpu: BareCpu) -> None:
    cpu.memory.write(0, INC_RBX + UD2)
    entered = cpu.run_code("xor eax, eax; jmp rax", rbx=0)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip, cpu.reg("rbx")) == (Vector.UD, 3, 1)
    entered = cpu.run_code(INC_RBX + UD2, at=0, rbx=0)
    assert isinstance(entered, Entered)
    assert (entered.rip, cpu.reg("rbx")) == (3, 1)


def test_a_loop_through_address_0_does_not_stop(cpu: BareCpu) -> None:
    cpu.memory.write(0, b"\x48\xff\xc9\x74\x02\xff\xe0\xf4")  # dec rcx; jz 1f; jmp rax; 1: hlt
    halts(cpu, "jmp rax", rax=0, rcx=1000)
    assert cpu.reg("rcx") == 0


def test_a_fetch_from_an_absent_page_faults_at_the_target(cpu: BareCpu) -> None:
    cpu.unmap(DATA)
    entered = cpu.run_code("jmp rbx", rbx=DATA + 0x123)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, cpu.cr2) == (Vector.PF, PfError.I, DATA + 0x123, DATA + 0x123)


def test_a_block_that_runs_off_its_page_executes_what_the_page_holds(cpu: BareCpu) -> None:
    cpu.unmap(CODE + 0x1000)
    for back in range(3, 40):
        count, rest = divmod(back, 3)
        entered = cpu.run_code((INC_RBX * 14)[:back], at=CODE + 0x1000 - back, rbx=0)
        assert isinstance(entered, Entered)
        assert (entered.vector, entered.error, cpu.cr2) == (Vector.PF, PfError.I, CODE + 0x1000)
        assert (entered.rip, cpu.reg("rbx")) == (CODE + 0x1000 - rest, count)


def test_a_block_goes_on_into_a_page_that_its_fault_handler_maps(cpu: BareCpu) -> None:
    cpu.memory.write(CODE + 0x1000, INC_RBX + b"\xf4")
    cpu.unmap(CODE + 0x1000)
    for _ in range(2):
        entered = cpu.run_code(INC_RBX * 5, at=CODE + 0x1000 - 15, rbx=0)
        assert isinstance(entered, Entered)
        cpu.set_pte(CODE + 0x1000, CODE + 0x1000 | PRESENT)
        cpu.rip = entered.rip
        assert isinstance(cpu.run(), Halted)
        assert cpu.reg("rbx") == 6
        halts(cpu, INC_RBX * 5, at=CODE + 0x1000 - 15, rbx=0)
        assert cpu.reg("rbx") == 6
        cpu.unmap(CODE + 0x1000)


def test_a_branch_at_the_end_of_a_page_does_not_need_the_next_one(cpu: BareCpu) -> None:
    cpu.unmap(CODE + 0x1000)
    cpu.memory.write(CODE + 0x100, b"\xf4")
    halts(cpu, b"\xff\xe0", at=CODE + 0xFFE, rax=CODE + 0x100)


def test_a_jump_to_a_non_canonical_address_is_gp_with_rip_at_the_target(cpu: BareCpu) -> None:
    for target in (NON_CANONICAL, 0x1234_5678_9ABC_DEF0):
        entered = cpu.run_code("jmp rbx", rbx=target)
        assert isinstance(entered, Entered)
        assert (entered.vector, entered.error, entered.rip) == (Vector.GP, 0, target)


def test_an_execute_disabled_page_refuses_a_fetch_only(cpu: BareCpu) -> None:
    cpu.set_pte(DATA, DATA | PRESENT | 1 << 63)
    assert cpu.vector_of("mov eax, [rbx]; mov [rbx], eax; jmp rbx", rbx=DATA) == (Vector.PF, PfError.P | PfError.I)


# ---- code that changes


def test_a_program_may_change_the_code_it_runs_next(cpu: BareCpu) -> None:
    # mov byte [rip + 0], 0xc0 changes the ModRM of the instruction behind the next: inc ebx becomes inc eax.
    halts(cpu, b"\xc6\x05\x01\x00\x00\x00\xc0\xff\xc3\xf4", rax=0, rbx=0)
    assert (cpu.reg("rax"), cpu.reg("rbx")) == (1, 0)


def test_a_program_may_change_code_through_an_alias(cpu: BareCpu) -> None:
    code = b"\xc6\x02\xc0\xeb\x00\xff\xc3\xff\xc9\x75\xf5\xf4"  # mov byte [rdx], 0xc0; jmp; inc ebx; dec ecx; jnz
    halts(cpu, code, rax=0, rbx=0, rcx=3, rdx=CODE + HIGH + 6)
    assert (cpu.reg("rax"), cpu.reg("rbx")) == (3, 0)


def test_a_privileged_instruction_that_a_program_writes_is_found(cpu: BareCpu) -> None:
    entered = cpu.run_code("mov word ptr [rdx], 0x320f; jmp rdx", rdx=CODE + 0x80, rcx=0x999)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.rip) == (Vector.GP, CODE + 0x80)


def test_a_page_that_was_data_and_is_then_executed_is_searched(cpu: BareCpu) -> None:
    for _ in range(3):
        entered = cpu.run_code("mov dword ptr [rdx], 0x0090320f; jmp rdx", rdx=DATA, rcx=0x999)
        assert isinstance(entered, Entered)
        assert (entered.vector, entered.rip) == (Vector.GP, DATA)


def test_code_that_the_model_writes_is_executed_fresh(cpu: BareCpu) -> None:
    for n in range(5):
        halts(cpu, f"mov eax, {n}; hlt")
        assert cpu.reg("rax") == n
    cpu.memory.write(CODE, b"\xb8\x63\0\0\0")
    cpu.rip = CODE
    assert isinstance(cpu.run(), Halted)
    assert cpu.reg("rax") == 0x63


def test_a_page_whose_translation_changes_runs_the_new_frame(cpu: BareCpu) -> None:
    cpu.memory.write(DATA, b"\xb8\x01\0\0\0\xf4")
    cpu.memory.write(DATA + 0x1000, b"\xb8\x02\0\0\0\xf4")
    for frame, value in ((DATA, 1), (DATA + 0x1000, 2), (DATA, 1)):
        cpu.set_pte(DATA, frame | PRESENT)
        halts(cpu, "jmp rdx", rdx=DATA)
        assert cpu.reg("rax") == value


def test_many_stores_into_a_page_of_code_all_arrive(cpu: BareCpu) -> None:
    halts(cpu, "again: mov [rdx + 4*rcx], ecx; dec ecx; jnz again; hlt", rdx=CODE + 0x100, rcx=200)
    assert cpu.memory.read(CODE + 0x104, 800) == b"".join(n.to_bytes(4, "little") for n in range(1, 201))


# ---- translations


@pytest.mark.parametrize("tlb", ["infinite", "finite", "none"])
def test_every_tlb_mode_runs_the_same_program(tlb: str) -> None:
    cpu = BareCpu(tlb=tlb)
    source = "again: mov [rdx + 8*rcx], rcx; add rax, [rdx + 8*rcx]; add rdx, 0x1000; dec rcx; jnz again; cpuid; hlt"
    halts(cpu, source, rax=0, rdx=DATA, rcx=200)
    assert [cpu.memory.read_u64(DATA + 0x1000 * n + 8 * (200 - n)) for n in range(200)] == list(range(200, 0, -1))


def test_without_a_tlb_a_changed_entry_counts_at_the_next_instruction() -> None:
    source = "mov rax, [rdx]; mov [rsi], rdi; mov rax, [rdx]; hlt"
    for tlb, value in (("none", 0x22), ("infinite", 0x11)):
        cpu = BareCpu(tlb=tlb)
        cpu.memory.write_u64(DATA, 0x11)
        cpu.memory.write_u64(DATA + 0x1000, 0x22)
        halts(cpu, source, rdx=DATA, rsi=cpu.pte_pa(DATA), rdi=DATA + 0x1000 | PRESENT)
        assert cpu.reg("rax") == value


@pytest.mark.parametrize(("touched", "value"), [(0, 0x11), (8, 0x22)])
def test_a_finite_tlb_forgets_what_it_evicts(touched: int, value: int) -> None:
    cpu = BareCpu(tlb=Tlb("finite", Geometry(sets_4k=1, ways_4k=4)))
    cpu.memory.write_u64(DATA, 0x11)
    cpu.memory.write_u64(DATA + 0x1000, 0x22)
    touch = "".join(f"mov rbx, [rdx + {0x1000 * n}]; " for n in range(2, 2 + touched))
    halts(
        cpu, f"mov rax, [rdx]; mov [rsi], rdi; {touch}mov rax, [rdx]; hlt",
        rdx=DATA, rsi=cpu.pte_pa(DATA), rdi=DATA + 0x1000 | PRESENT,
    )
    assert cpu.reg("rax") == value


def test_bytes_of_code_are_peeked_as_the_tlb_translates_them(cpu: BareCpu) -> None:
    cpu.memory.write(DATA, b"\x0f\xa2\xf4")
    cpu.memory.write(DATA + 0x1000, b"\x90\x90\xf4")
    halts(cpu, "jmp rdx", rdx=DATA)
    cpu.memory.write_u64(cpu.pte_pa(DATA), DATA + 0x1000 | PRESENT)
    cpu.engine.drop_soft_tlb()
    halts(cpu, "jmp rdx", rdx=DATA, rax=0)
    assert cpu.reg("rax") != 0
    cpu.engine.drop_soft_tlb()
    assert cpu.engine.peek(DATA, 2) == b"\x0f\xa2"
    cpu.mmu.invlpg(DATA)
    assert cpu.engine.peek(DATA, 2) == b"\x90\x90"


def test_user_and_supervisor_have_their_own_rights_to_a_page(cpu: BareCpu) -> None:
    halts(cpu, "mov eax, [rbx]; hlt", rbx=DATA)
    assert cpu.vector_of("mov eax, [rbx]", 3, rbx=DATA) == (Vector.PF, PfError.P | PfError.U)
    assert cpu.vector_of("mov eax, [rbx]; ud2", 3, rbx=USER_DATA) == (Vector.UD, None)
    cpu.mmu.load_cr4(cpu.reg("cr4") | Cr4.SMAP)
    cpu.sync_engine_registers()
    assert cpu.vector_of("mov eax, [rbx]", rbx=USER_DATA) == (Vector.PF, PfError.P)
    assert cpu.vector_of("mov eax, [rbx]; ud2", 3, rbx=USER_DATA) == (Vector.UD, None)


# ---- stopping


def test_another_thread_stops_an_endless_loop_and_it_can_go_on(cpu: BareCpu) -> None:
    for _ in range(20):
        timer = threading.Timer(0.002, cpu.engine.stop)
        timer.start()
        assert cpu.run_code("again: inc rbx; jmp again") == Interrupted()
        timer.join()
    before = cpu.reg("rbx")
    timer = threading.Timer(0.002, cpu.engine.stop)
    timer.start()
    assert cpu.run() == Interrupted()
    timer.join()
    assert cpu.reg("rbx") > before


def test_a_request_between_two_runs_stops_the_next_one_once(cpu: BareCpu) -> None:
    cpu.engine.stop()
    assert cpu.run_code("again: jmp again") == Interrupted()
    halts(cpu, "hlt")


def test_a_request_is_not_lost_among_short_runs(cpu: BareCpu) -> None:
    # Every CPUID ends a run of the engine, so that most requests fall between two runs.
    for _ in range(20):
        timer = threading.Timer(0.001, cpu.engine.stop)
        timer.start()
        started = time.monotonic()
        assert cpu.run_code("again: cpuid; jmp again") == Interrupted()
        assert time.monotonic() - started < 5
        timer.join()


def test_the_error_of_a_callback_surfaces_as_itself(cpu: BareCpu) -> None:
    class Broken(Exception):
        pass

    def implicit(page_la: int) -> bool:
        raise Broken

    cpu.engine.is_implicit = implicit
    with pytest.raises(Broken):
        cpu.run_code("mov eax, [rbx]", rbx=cpu.gdtr.base)


def test_registers_wider_than_64_bits_move_whole(cpu: BareCpu) -> None:
    cpu.set_reg("xmm3", 0x1122_3344_5566_7788_99AA_BBCC_DDEE_FF00)
    halts(cpu, "movdqa xmm4, xmm3; hlt")
    assert cpu.reg("xmm4") == 0x1122_3344_5566_7788_99AA_BBCC_DDEE_FF00
    with pytest.raises(KeyError):
        cpu.reg("eax")


def test_an_instruction_may_end_with_its_page(cpu: BareCpu) -> None:
    cpu.unmap(USER_CODE + 0x1000)
    assert cpu.vector_of("nop; ud2", 3, at=USER_CODE + 0xFFD) == (Vector.UD, None)
