"""How Unicorn reports exceptions, in both TLB modes. A new Unicorn must not change it silently."""

import pytest
import unicorn as uc_
from bare_unicorn import CODE, DATA, USER_CODE, Bare
from unicorn import x86_const as x86

HLT = "f4"


def test_int3_and_int_n_arrive_with_rip_past_them() -> None:
    for code, vector, length in (("cc", 3, 1), ("cd80", 0x80, 2)):
        cpu = Bare()
        cpu.run(code + HLT)
        assert (cpu.vectors, cpu.reg(x86.UC_X86_REG_RIP)) == ([vector], CODE + length)


def test_a_fault_arrives_with_rip_at_the_instruction() -> None:
    cpu = Bare()
    cpu.run("90" + "48f7f1" + HLT, rcx=0, rdx=0)  # div rcx
    assert (cpu.vectors, cpu.reg(x86.UC_X86_REG_RIP)) == ([0], CODE + 1)


def test_ud_arrives_in_the_invalid_instruction_hook_only() -> None:
    cpu = Bare()
    seen: list[int] = []

    def invalid(uc: uc_.Uc, data: object) -> bool:
        seen.append(uc.reg_read(x86.UC_X86_REG_RIP))
        return False

    cpu.uc.hook_add(uc_.UC_HOOK_INSN_INVALID, invalid)
    with pytest.raises(uc_.UcError) as error:
        cpu.run("0f0b" + HLT)
    assert error.value.errno == uc_.UC_ERR_INSN_INVALID
    assert (seen, cpu.vectors) == ([CODE], [])


def test_a_second_contributory_exception_arrives_as_a_double_fault_unless_a_clean_context_is_restored() -> None:
    cpu = Bare()
    clean = cpu.uc.context_save()
    for expected in (0, 8):
        cpu.run("48f7f1" + HLT, rcx=0, rdx=0)
        assert cpu.vectors.pop() == expected
    for _ in range(4):
        cpu.uc.context_restore(clean)
        cpu.run(at=CODE, rcx=0, rdx=0)
        assert cpu.vectors.pop() == 0


def test_a_write_of_cs_does_not_change_the_privilege_level() -> None:
    cpu = Bare()
    cpu.uc.reg_write(x86.UC_X86_REG_CS, 0x33)
    cpu.run("fa" + HLT)  # cli
    assert cpu.vectors == []
    cpu = Bare()
    cpu.enter_user("fa" + HLT)
    assert (cpu.vectors, cpu.reg(x86.UC_X86_REG_RIP)) == ([13], USER_CODE)


def test_an_out_hook_cannot_stop_the_block_it_stands_in() -> None:
    cpu = Bare()
    cpu.uc.hook_add(uc_.UC_HOOK_INSN, lambda uc, *_: uc.emu_stop(), None, 1, 0, x86.UC_X86_INS_OUT)
    cpu.run("e680" + "48ffc0" * 2 + HLT, rax=0)  # out 0x80, al
    assert cpu.reg(x86.UC_X86_REG_RAX) == 2


def native() -> tuple[uc_.Uc, list[int]]:
    """An instance on Unicorn's own walker: code at 2 MiB mapped, everything else absent."""
    uc = uc_.Uc(uc_.UC_ARCH_X86, uc_.UC_MODE_64)
    uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
    uc.mem_map(0, 4 << 20)
    for at, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3008, 0x20_0083)):
        uc.mem_write(at, entry.to_bytes(8, "little"))
    vectors: list[int] = []

    def interrupt(uc: uc_.Uc, vector: int, data: object) -> None:
        vectors.append(vector)
        uc.emu_stop()

    uc.hook_add(uc_.UC_HOOK_INTR, interrupt)
    uc.reg_write(x86.UC_X86_REG_CR4, 1 << 5)
    uc.reg_write(x86.UC_X86_REG_CR3, 0x1000)
    uc.reg_write(x86.UC_X86_REG_CR0, 1 << 31 | 1 << 16 | 1)
    return uc, vectors


def test_the_native_walker_reports_cr2_but_a_second_page_fault_as_a_double_fault_and_a_third_not_at_all() -> None:
    uc, vectors = native()
    uc.mem_write(0x20_0000, bytes.fromhex("488b07f4"))
    clean = uc.context_save()
    uc.reg_write(x86.UC_X86_REG_RDI, DATA + 3)
    for _ in range(3):
        uc.emu_start(0x20_0000, 0)
        assert uc.reg_read(x86.UC_X86_REG_CR2) == DATA + 3
    assert vectors == [14, 8]
    uc.context_restore(clean)
    uc.reg_write(x86.UC_X86_REG_RDI, DATA + 3)
    uc.emu_start(0x20_0000, 0)
    assert vectors == [14, 8, 14]


def test_the_native_cpu_has_no_invpcid() -> None:
    uc, vectors = native()
    uc.mem_write(0x20_0000, bytes.fromhex("660f3882074e f4"))
    with pytest.raises(uc_.UcError) as error:
        uc.emu_start(0x20_0000, 0)
    assert (error.value.errno, vectors) == (uc_.UC_ERR_INSN_INVALID, [])
