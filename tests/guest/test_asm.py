"""The .asm dialect: what it accepts, the bytes it makes, and what it refuses with the file and line."""

from __future__ import annotations

import capstone
import pytest

from emu.guest.asm import assemble
from emu.guest.error import GuestError
from emu.guest.link import link
from emu.guest.program import RelocationType, SectionKind

BASES = {
    SectionKind.TEXT: 0xFFFFFFFFC0000000,
    SectionKind.RODATA: 0xFFFFFFFFC0100000,
    SectionKind.RO_AFTER_INIT: 0xFFFFFFFFC0200000,
    SectionKind.DATA: 0xFFFFFFFFC0300000,
    SectionKind.BSS: 0xFFFFFFFFC0400000,
}
KERNEL = {"vmalloc": 0xFFFFFFFF81000000, "vfree": 0xFFFFFFFF81000010, "jiffies": 0xFFFFFFFF82000000}


def text(source: str) -> bytes:
    """Bytes of .text before linking."""
    program = assemble(source, "t.asm")
    program.validate()
    return program.sections[0].data


def linked(source: str, section: str = ".text") -> bytes:
    return link(assemble(source, "t.asm"), BASES, KERNEL.get).images[section][1]


def decoded(source: str) -> list[str]:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    data = linked(source)
    found = [f"{i.mnemonic} {i.op_str}".strip() for i in engine.disasm(data, BASES[SectionKind.TEXT])]
    assert sum(i.size for i in engine.disasm(data, 0)) == len(data)
    return found


def refused(source: str) -> GuestError:
    with pytest.raises(GuestError) as error:
        assemble(source, "t.asm")
    return error.value


def test_comments_end_at_the_line_and_not_inside_quotes() -> None:
    assert text("ret ; db 1\n; ret\ndb 'a;b' ; c") == b"\xc3a;b"


def test_golden_bytes_of_common_instructions() -> None:
    golden = {
        "mov rax, [rdi]": "488b07",
        "mov qword [rax + 8], 5": "48c7400805000000",
        "mov qword ptr [rax + 8], 5": "48c7400805000000",
        "mov byte [rbx + rcx*4 - 8], 'a'": "c6448bf861",
        "mov rax, gs:[rbx]": "65488b03",
        "mov rax, [gs:rbx]": "65488b03",
        "lock xadd [rbx], rax": "f0480fc103",
        "rep stosq": "f348ab",
        "repne scasb": "f2ae",
        "sal eax, 3": "c1e003",
        "setz al": "0f94c0",
        "cmovnae rax, rbx": "480f42c3",
        "invlpg [rax]": "0f0138",
        "mov cr3, rax": "0f22d8",
        "iretq": "48cf",
        "sysretq": "480f07",
        "endbr64": "f30f1efa",
        "and rax, ~0xfff": "482500f0ffff",
        "mov eax, 1 << 20": "b800001000",
        "mov rax, 0xffffffff80000000": "48c7c000000080",
        "fld st1": "d9c1",
    }
    source = "\n".join(golden)
    assert text(source).hex() == "".join(golden.values())


def test_push_of_an_immediate_is_the_value_that_was_written() -> None:
    assert text("push 0xffff").hex() == "68ffff0000"
    assert text("push -1").hex() == "6aff"
    assert text("push 0x7fffffff").hex() == "68ffffff7f"
    assert "sign-extended 32-bit" in str(refused("push 0x80000000"))


@pytest.mark.parametrize(
    "line",
    [
        "mov al, 0x1ff", "mov ax, 0x12345", "mov eax, 0x123456789", "mov byte [rax], 0x100", "mov rax, [rax + 0x123456789]",
        "mov rax, [rax + 0x80000000]", "iret", "pushf", "sysret", "retf", "cmp rax, 0xffffffff", "call 0x1234567890",
        "jmp 0x1000", "mov [rax], 5", "frobnicate rax", "mov rax, [rbx + rcx + rdx]", "mov rax, [al]", "mov rax, [rax*3]",
        "mov rax rbx", "mov rax, qword rbx", "lea rax, [rsp*2]", "mov rax, [rip + rax]", "push 1 +", "mov rax, (1",
        "int 256", "mov rax, 1 << 200", "mov rax, 1 / 0", "db", "db 256", "dw 'abcd'", "resb 8", "align 3", "align 8192",
        "times 5 ret", "section .bogus", "x equ", "call", "loop 5", "mov rax, 'abc", "lock", "rep", "%define x 1", ".byte 1",
        "jmp short", "mov rax, [eax + rbx]", "dd 0x100000000", "bits 32", "global 5", "x: x: ret", "call short x", "far: ret",
        "rax equ 5", "data16 -1", "lock -1", "rep [rax]", "lock lock", "rep rep movsb", "rex64", "stosq [rax]", "lock data16 -1",
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_encoded_as_written_is_an_error_with_its_line(line: str) -> None:
    error = refused(f"start: nop\nnop\n{line}\nnop\n")
    assert error.line == 3
    assert str(error).startswith("t.asm:3: ")


def test_the_bad_line_is_found_among_many_good_ones() -> None:
    error = refused("\n".join(["mov rax, rbx"] * 1500 + ["mov rax, bl"] + ["nop"] * 700))
    assert error.line == 1501


def test_a_call_to_a_kernel_symbol_is_a_plt32_relocation() -> None:
    program = assemble("call vmalloc", "t.asm")
    (relocation,) = program.relocations
    assert (relocation.offset, relocation.type, relocation.addend) == (1, RelocationType.PLT32, -4)
    assert program.undefined() == ("vmalloc",)
    assert decoded("nop\ncall vmalloc") == ["nop", "call 0xffffffff81000000"]


def test_branches_are_rel32_unless_short_is_written_or_nothing_else_exists() -> None:
    assert text("x: jmp x").hex() == "e9fbffffff"
    assert text("x: jmp short x").hex() == "ebfe"
    assert text("x: jnz near x").hex() == "0f85faffffff"
    assert text("x: loop x\njrcxz x\njecxz x").hex() == "e2fe" + "e3fc" + "67e3f9"
    assert text("jmp $").hex() == "e9fbffffff"


def test_a_short_branch_out_of_reach_is_an_error_at_the_branch() -> None:
    assert refused("jmp short away\ntimes 200 db 0x90\naway: ret").line == 1
    assert refused("nop\nloop elsewhere").line == 2


def test_every_condition_has_its_code() -> None:
    names = ("jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg").split()
    made = decoded("x: nop\n" + "\n".join(f"{name} x" for name in names))
    assert [line.split()[0] for line in made[1:]] == names


def test_a_memory_operand_with_a_symbol_and_no_register_is_rip_relative() -> None:
    source = "mov rax, [v]\nmov dword [v + 4], 0\nmov word [v], 5\nlea rdi, [rel v]\ncmp byte [rip + v], 7\nsection .data\nv: dq 0"
    data = BASES[SectionKind.DATA]
    addresses = [int(line.split("rip + ")[1].split("]")[0], 16) for line in decoded(source)]
    ends, at = [], BASES[SectionKind.TEXT]
    for insn in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(linked(source), at):
        ends.append(insn.address + insn.size)
    assert [end + offset for end, offset in zip(ends, addresses, strict=True)] == [data, data + 4, data, data, data]


def test_a_symbol_is_an_absolute_address_in_moves_pushes_and_scaled_operands() -> None:
    rodata = BASES[SectionKind.RODATA]
    source = "mov rsi, t\nmov rax, offset t + 8\npush t\nmov rax, [t + rcx*8]\ncall [t + rcx*8]\nsection .rodata\nt: dq 1, 2"
    assert decoded(source) == [
        f"movabs rsi, {rodata:#x}",
        f"movabs rax, {rodata + 8:#x}",
        f"push -{(1 << 64) - rodata:#x}",
        f"mov rax, qword ptr [rcx*8 - {(1 << 64) - rodata:#x}]",
        f"call qword ptr [rcx*8 - {(1 << 64) - rodata:#x}]",
    ]


def test_data_holds_numbers_strings_and_addresses() -> None:
    source = 'ret\nsection .rodata\nm: db "a\\n\\x41\\0", 1, -1\ndw 0x1234\nalign 8\ndq m + 1, vmalloc, -2\ndd 7'
    rodata = BASES[SectionKind.RODATA]
    words = [rodata + 1, KERNEL["vmalloc"], (1 << 64) - 2]
    expected = b"a\nA\0\x01\xff\x34\x12" + b"".join(w.to_bytes(8, "little") for w in words) + b"\x07\0\0\0"
    assert linked(source, ".rodata") == expected


def test_equ_may_measure_data_and_be_used_before_it() -> None:
    source = 'mov ecx, length\nmov edx, twice\nsection .rodata\nm: db "hello"\nlength equ $ - m\ntwice equ length * 2'
    assert decoded(source) == ["mov ecx, 5", "mov edx, 0xa"]


def test_a_difference_of_code_labels_is_a_constant() -> None:
    assert decoded("mov ecx, end - start\nstart: nop\nret\nend:")[0] == "mov ecx, 2"
    assert refused("mov ecx, end - start\nstart: nop\nsection .data\nend: db 0").line == 1


def test_a_local_label_belongs_to_the_label_above_it() -> None:
    source = "a: nop\n.x: jmp short .x\nb: nop\n.x: jmp short .x\njmp short a.x"
    assert text(source).hex() == "90" + "ebfe" + "90" + "ebfe" + "ebf9"
    assert assemble(source, "t.asm").symbol("b.x") is not None


def test_constants_that_define_each_other_are_an_error() -> None:
    assert refused("a equ b\nb equ a\nmov rax, a").line == 3


def test_bss_takes_room_and_no_bytes() -> None:
    program = assemble("ret\nsection .bss\na: resb 3\nalign 8\nb: resq 2", "t.asm")
    bss = program.sections[1]
    assert (bss.kind, bss.size, bss.data) == (SectionKind.BSS, 24, b"")
    symbol = program.symbol("b")
    assert symbol is not None and symbol.offset == 8
    assert refused("ret\nsection .bss\ndb 1").line == 3


def test_code_is_aligned_with_no_operations() -> None:
    assert text("ret\nalign 4\nret").hex() == "c3909090c3"


def test_the_entry_is_init_module_then_start_then_the_first_label() -> None:
    assert assemble("a: nop\ninit_module: ret", "t").entry_symbol.name == "init_module"
    assert assemble("a: nop\n_start: ret", "t").entry_symbol.name == "_start"
    assert assemble("nop\na: ret\nb: ret", "t").entry_symbol.name == "a"
    assert assemble("ret", "t").entry_symbol.offset == 0


def test_a_program_without_instructions_is_an_error() -> None:
    assert "no instructions" in str(refused("section .data\nx: db 1"))


def test_each_instruction_knows_its_source_line() -> None:
    program = assemble("nop\n\n  ret\nsection .data\nx: dq 1", "t.asm")
    assert (program.line_at(0, 0), program.line_at(0, 1), program.line_at(1, 3)) == (1, 3, 5)


def test_global_must_be_defined_and_extern_must_not() -> None:
    assert refused("ret\nglobal nowhere").line == 2
    assert refused("ret\nextern here\nhere: ret").line == 2


def test_times_repeats_data_and_its_addresses() -> None:
    data = BASES[SectionKind.DATA]
    assert linked("ret\nsection .data\nx: times 2 dq x", ".data") == data.to_bytes(8, "little") * 2


def test_ten_thousand_lines_are_assembled_in_one_go() -> None:
    body = "\n".join(f"mov rax, [rbx + {n}]" for n in range(10_000))
    assert len(text(body)) > 40_000
