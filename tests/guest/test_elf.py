"""Relocatable objects: what a good one gives (against pyelftools), and one message for each way to be bad."""

from __future__ import annotations

import io
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from emu.guest.elf import read_object
from emu.guest.error import GuestError
from emu.guest.link import link
from emu.guest.program import RelocationType, SectionKind

SHF_WRITE, SHF_ALLOC, SHF_EXEC = 1, 2, 4
CODE = b"\xe8\0\0\0\0\x48\xc7\xc0\0\0\0\0\xc3"


def make_object(
    *,
    header: dict[int, int] | None = None,
    text_header: dict[int, int] | None = None,
    bss_header: dict[int, int] | None = None,
    symbols: list[tuple[int, int, int, int, int]] | None = None,
    relocations: list[tuple[int, int, int, int]] | None = None,
    names: bytes = b"\0init_module\0vmalloc\0counter\0",
) -> bytes:
    """An object of .text, .bss, .rela.text, .symtab and .strtab.

    `header`, `text_header` and `bss_header` override fields by number; symbols are (name, info, section, value, size), relocations
    (offset, type, symbol, addend).
    """
    symbols = symbols or [(1, 0x12, 1, 0, 13), (13, 0x10, 0, 0, 0), (21, 0x11, 2, 8, 8)]
    relocations = relocations if relocations is not None else [(1, 4, 2, -4), (8, 11, 3, 0)]
    rela = b"".join(struct.pack("<QQq", offset, symbol << 32 | kind, addend) for offset, kind, symbol, addend in relocations)
    symtab = bytes(24) + b"".join(struct.pack("<IBBHQQ", n, info, 0, s, v, size) for n, info, s, v, size in symbols)
    shstrtab = b"\0.text\0.bss\0.rela.text\0.symtab\0.strtab\0.shstrtab\0"
    parts, offsets, at = [CODE, rela, symtab, names, shstrtab], [], 64
    for part in parts:
        offsets.append(at)
        at += len(part)
    headers = [
        [0] * 10,
        [1, 1, SHF_ALLOC | SHF_EXEC, 0, offsets[0], len(CODE), 0, 0, 16, 0],
        [7, 8, SHF_ALLOC | SHF_WRITE, 0, offsets[1], 64, 0, 0, 8, 0],
        [12, 4, 0, 0, offsets[1], len(rela), 4, 1, 8, 24],
        [23, 2, 0, 0, offsets[2], len(symtab), 5, 1, 8, 24],
        [31, 3, 0, 0, offsets[3], len(names), 0, 0, 1, 0],
        [39, 3, 0, 0, offsets[4], len(shstrtab), 0, 0, 1, 0],
    ]
    for field, value in (text_header or {}).items():
        headers[1][field] = value
    for field, value in (bss_header or {}).items():
        headers[2][field] = value
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    fields = [1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, len(headers), 6]
    for field, value in (header or {}).items():
        fields[field] = value
    packed = b"".join(struct.pack("<IIQQQQIIQQ", *h) for h in headers)
    return struct.pack("<16sHHIQQQIHHHHHH", ident, *fields) + b"".join(parts) + packed


def refused(data: bytes) -> str:
    with pytest.raises(GuestError) as error:
        read_object(data, "t.o")
    assert str(error.value).startswith("t.o: ")
    return error.value.message


def test_the_object_of_these_tests_is_read_and_linked() -> None:
    program = read_object(make_object(), "t.o")
    program.validate()
    assert program.undefined() == ("vmalloc",)
    assert [(s.name, s.kind, s.size) for s in program.sections] == [
        (".text", SectionKind.TEXT, 13), (".bss", SectionKind.BSS, 64),
    ]  # fmt: skip
    linked = link(program, {SectionKind.TEXT: 0x10000, SectionKind.BSS: 0x20000}, {"vmalloc": 0x30000}.get)
    assert linked.images[".text"][1].hex() == "e8fbff0100" + "48c7c008000200" + "c3"
    assert linked.symbols["counter"] == 0x20008


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ELF file"),
        (b"MZ" + bytes(100), "not an ELF file"),
        (make_object()[:40], "truncated: 40 bytes"),
        (make_object()[:-1], "section headers .* lie outside the file"),
        (make_object()[:4] + b"\x01" + make_object()[5:], "ELF class 1 is not 2"),
        (make_object()[:5] + b"\x02" + make_object()[6:], "data encoding 2"),
        (make_object(header={0: 2}), "ELF type 2 is not 1"),
        (make_object(header={1: 3}), "ELF machine 3 is not 62"),
        (make_object(header={2: 9}), "ELF version"),
        (make_object(header={5: 1 << 63}), "section headers"),
        (make_object(header={10: 40}), "section header size 40"),
        (make_object(header={11: 0}), "number of sections 0"),
        (make_object(header={11: 60000}), "number of sections 60000"),
        (make_object(header={12: 99}), "section name table 99"),
        (make_object(text_header={0: 5000}), "name of section 1: string 0x1388 lies outside"),
        (make_object(text_header={4: 1 << 40}), "section 1 .* lies outside the file"),
        (make_object(text_header={5: (1 << 64) - 1}), "section 1 .* lies outside the file"),
        (make_object(text_header={1: 8, 5: 1 << 50}), "size 0x4000000000000 exceeds"),
        (make_object(text_header={8: 3}), "alignment 0x3 is not a power of two"),
        (make_object(text_header={8: 1 << 63}), "alignment 0x8000000000000000 is not a power of two up to 4096"),
        (make_object(bss_header={1: 1, 4: 70, 5: 8}), "sections .text and .bss overlap in the file"),
        (make_object(text_header={2: 7}), "both writable and executable"),
        (make_object(text_header={2: 0x402}), "thread-local storage"),
        (make_object(symbols=[(1, 0x12, 1, 14, 0)]), r"symbol 1 \(init_module\): .* lies outside section .text"),
        (make_object(symbols=[(1, 0x12, 1, 0, 1 << 60)]), "lies outside section .text"),
        (make_object(symbols=[(1, 0x12, 77, 0, 0)]), "section 77 is not among 7 sections"),
        (make_object(symbols=[(9999, 0x12, 1, 0, 0)]), "name of symbol 1: string 0x270f"),
        (make_object(symbols=[(1, 0xA2, 1, 0, 0)]), "binding 10"),
        (make_object(symbols=[(1, 0x1A, 1, 0, 0)]), "type 10 is not supported"),
        (make_object(symbols=[(1, 0x12, 1, 0, 0), (1, 0x12, 1, 0, 0)]), "symbol init_module is defined twice"),
        (make_object(symbols=[(1, 0x12, 1, 0, 0), (21, 0x11, 0xFFF2, 3, 8)]), "alignment 0x3"),
        (make_object(symbols=[(21, 0x12, 1, 0, 0)], relocations=[]), "no entry: the program defines neither"),
        (make_object(symbols=[(1, 0x12, 2, 0, 0)], relocations=[]), "entry init_module is not in a text section"),
        (make_object(relocations=[(1, 4, 99, 0)]), r".rela.text\[0\]: symbol 99 is not among 4 symbols"),
        (make_object(relocations=[(1, 42, 2, 0)]), "relocation type 42 is not supported"),
        (make_object(relocations=[(10, 1, 2, 0)]), "offset 0xa lies outside section .text of 0xd bytes"),
        (make_object(relocations=[(1 << 60, 2, 2, 0)]), "offset 0x1000000000000000 lies outside"),
        (make_object(names=b"\0init_module\0vmalloc\0\xff\xfe\0"), "is not UTF-8"),
    ],
)
def test_a_bad_object_gives_one_message_that_names_what_is_bad(data: bytes, message: str) -> None:
    assert re.search(message, refused(data))


def test_common_symbols_are_allocated_in_bss_by_their_alignment() -> None:
    program = read_object(
        make_object(symbols=[(1, 0x12, 1, 0, 13), (13, 0x11, 0xFFF2, 1, 3), (21, 0x11, 0xFFF2, 16, 8)], relocations=[]), "t.o"
    )
    program.validate()
    common = program.sections[-1]
    assert (common.kind, common.size, common.align) == (SectionKind.BSS, 24, 16)
    symbol = program.symbol("counter")
    assert symbol is not None and symbol.offset == 16


@cache
def compiled() -> bytes:
    """An object by gcc with most kinds of sections and symbols."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc")
    source = """
    static int counter; int common; const char *names[] = {"a", "b"}; extern int absent __attribute__((weak));
    const int table[4] = {1, 2, 3, 4}; extern void *vmalloc(unsigned long);
    __attribute__((section(".data..ro_after_init"))) int ro = 1;
    int init_module(void) { counter++; common = table[counter & 3]; return &absent != 0 || vmalloc(4) == names[0] || ro; }
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "t.o"
        command = [gcc, "-c", "-O1", "-ffreestanding", "-fno-pic", "-mcmodel=kernel", "-fcommon", "-x", "c", "-", "-o", str(target)]
        subprocess.run(command, input=source.encode(), check=True)
        return target.read_bytes()


def test_sections_symbols_and_relocations_are_those_that_pyelftools_reads() -> None:
    data = compiled()
    program = read_object(data, "t.o")
    program.validate()
    elf = ELFFile(io.BytesIO(data))
    theirs = {s.name: s for s in elf.iter_sections()}
    loaded = {s.name for s in theirs.values() if s["sh_flags"] & 2 and s.name not in (".eh_frame", ".note.gnu.property")}
    assert {s.name for s in program.sections} == loaded | {".bss.common"}
    for section in program.sections:
        if section.name in theirs:
            assert section.size == theirs[section.name]["sh_size"]
            assert section.kind is SectionKind.BSS or section.data == theirs[section.name].data()
    names = {s.name for s in elf.get_section_by_name(".symtab").iter_symbols() if s["st_info"]["bind"] != "STB_LOCAL"}
    assert names <= {s.name for s in program.symbols}
    counted = sum(
        s.num_relocations() for s in elf.iter_sections() if s["sh_type"] == "SHT_RELA" and s.name.removeprefix(".rela") in loaded
    )
    assert len(program.relocations) == counted
    first = next(theirs[".rela.text"].iter_relocations())
    ours = next(r for r in program.relocations if program.sections[r.section].name == ".text")
    assert (ours.offset, ours.type, ours.addend) == (
        first["r_offset"], RelocationType(first["r_info_type"]), first["r_addend"],
    )  # fmt: skip


def test_ro_after_init_data_has_its_own_kind() -> None:
    program = read_object(compiled(), "t.o")
    assert SectionKind.RO_AFTER_INIT in program.areas()


def test_the_recorded_kernel_modules_are_read_as_far_as_their_entry() -> None:
    root = Path(os.environ.get("VMEMU_ORACLE", Path(__file__).resolve().parents[3] / "shared" / "oracle"))
    files = sorted((root / "ko").glob("*.ko.xz"))
    if not files:
        pytest.skip("no recorded modules (VMEMU_ORACLE)")
    for file in files:
        program = read_object(lzma.decompress(file.read_bytes()), file.name)
        program.validate()
        expected = file.with_name(file.name.removesuffix(".ko.xz") + ".undefined.txt").read_text().split()
        assert set(expected) == set(program.undefined())
